//! `bootcache ca init|issue`.

use std::path::PathBuf;
use std::process::ExitCode;

use bootcache::name::HostName;
use bootcache::tls::{self, Role};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
    /// Folder of the certificate authority [default: ca in the store]
    #[arg(long, global = true, value_name = "DIR")]
    ca_dir: Option<PathBuf>,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Make the cluster's certificate authority, once
    Init,
    /// Make a certificate for a member of the cluster
    Issue {
        /// Name of the member: a host's, or a person's
        name: HostName,
        /// What it is
        #[arg(long, value_enum, default_value = "node")]
        role: RoleArg,
        /// Addresses under which NBD clients other than bootcache reach it
        #[arg(long, value_name = "IP|DNS")]
        address: Vec<String>,
        /// Where its files go, to be copied to its --tls-dir [default: NAME below the authority's folder]
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
    },
}

#[derive(Debug, Clone, Copy, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
enum RoleArg {
    Node,
    Controller,
    User,
}

impl From<RoleArg> for Role {
    fn from(role: RoleArg) -> Self {
        match role {
            RoleArg::Node => Self::Node,
            RoleArg::Controller => Self::Controller,
            RoleArg::User => Self::User,
        }
    }
}

pub(crate) fn run(globals: &super::Globals, args: Args) -> anyhow::Result<ExitCode> {
    let ca_dir = args.ca_dir.unwrap_or_else(|| globals.store_dir().join("ca"));
    match args.command {
        Command::Init => {
            tls::init_ca(&ca_dir)?;
            if globals.json {
                println!("{}", serde_json::json!({ "ca": ca_dir.to_string_lossy() }));
            } else {
                println!("made a certificate authority in {}: keep ca-key.pem to yourself", ca_dir.display());
            }
        }
        Command::Issue { name, role, address, out } => {
            let out = out.unwrap_or_else(|| ca_dir.join(name.as_str()));
            let replaced = tls::holds_member(&out);
            tls::issue(&ca_dir, &name, role.into(), &address, &out)?;
            if globals.json {
                let dir = out.to_string_lossy();
                let told =
                    serde_json::json!({ "name": name, "role": role, "dir": dir, "replaced": replaced });
                println!("{told}");
            } else {
                if replaced {
                    println!("the certificate that was in {} is replaced", out.display());
                }
                println!("{}: copy this folder to {name} and name it with --tls-dir there", out.display());
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
