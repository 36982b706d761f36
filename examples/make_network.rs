//! Makes a node's networks as its agent does, or removes them, without an agent: `make_network NODE SPEC.json…` and
//! `make_network NODE --remove BRIDGE…`. A file is a [`NetworkSpec`]. Root; what is there already stays as it is.

use std::process::ExitCode;

use bootcache::network::{NetworkSpec, Networks};

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run(std::env::args().skip(1).collect()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Vec<String>) -> Result<(), Box<dyn std::error::Error>> {
    let Some((node, rest)) = arguments.split_first() else {
        return Err("usage: make_network NODE SPEC.json… | NODE --remove BRIDGE…".into());
    };
    let networks = Networks::new(node.parse()?);
    match rest.split_first() {
        Some((flag, bridges)) if flag == "--remove" => {
            for bridge in bridges {
                networks.remove(bridge).await?;
            }
        }
        _ => {
            for path in rest {
                let spec: NetworkSpec = serde_json::from_str(&std::fs::read_to_string(path)?)?;
                networks.ensure(&spec).await?;
            }
        }
    }
    println!("{}", networks.list().await?.join(" "));
    Ok(())
}
