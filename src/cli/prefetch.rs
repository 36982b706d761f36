//! `bootcache prefetch`: images brought to nodes ahead of demand.

use std::process::ExitCode;

use anyhow::bail;
use bootcache::name::{HostName, ImageName};
use bootcache::wire::cluster::Prefetch;

use super::remote::ControllerArgs;

#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("what").required(true).args(["image", "standing"]))]
pub(crate) struct Args {
    /// The image
    image: Option<ImageName>,
    /// The nodes that are to get it [default: all that are online]
    #[arg(value_name = "NODE")]
    nodes: Vec<HostName>,
    /// Only what boots, some tens of megabytes
    #[arg(long)]
    boot_only: bool,
    /// From now on, keep the boot caches of all images on all nodes; `off` ends that
    #[arg(long, value_name = "on|off", conflicts_with = "nodes")]
    standing: Option<Switch>,
    #[command(flatten)]
    controller: ControllerArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Switch {
    On,
    Off,
}

pub(crate) fn run(globals: &super::Globals, args: &Args) -> anyhow::Result<ExitCode> {
    super::block_on(async {
        let (request, done) = match (&args.image, args.standing) {
            (None, Some(switch)) => {
                let on = switch == Switch::On;
                let text =
                    if on { "all nodes keep all boot caches from now on" } else { "nothing is kept ahead" };
                (Prefetch::Standing { on }, text.to_owned())
            }
            (Some(image), None) => {
                let text = format!("{image} is on its way: `bootcache images` shows where it is");
                let (nodes, boot_only) = (args.nodes.clone(), args.boot_only);
                (Prefetch::Image { image: image.clone(), nodes, boot_only }, text)
            }
            _ => bail!("name an image, or give --standing on|off"),
        };
        args.controller.connect(globals).await?.call(&request).await?;
        if globals.json {
            println!("{}", serde_json::to_string(&request)?);
        } else {
            println!("{done}");
        }
        Ok(ExitCode::SUCCESS)
    })
}
