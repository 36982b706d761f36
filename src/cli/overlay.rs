//! `bootcache overlay create|list|show|commit|remove`.

use std::process::ExitCode;

use anyhow::bail;
use bootcache::control::{OverlayInfo, Reply, Request};
use bootcache::name::{HostName, ImageName};
use indicatif::HumanBytes;

use super::session::Session;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Make an empty overlay on an image: a disk of its own for one VM
    Create {
        /// The image below
        image: ImageName,
        /// What to call it: 1 to 63 of a-z 0-9 -
        name: HostName,
        /// How large it is, such as 20G: the image's size or more, and without this just as large
        #[arg(long, value_parser = super::size::parse)]
        size: Option<u64>,
    },
    /// List the overlays
    #[command(visible_alias = "ls")]
    List,
    /// Show one overlay
    Show {
        /// The overlay
        name: HostName,
    },
    /// Make an incremental image of what an overlay holds; the overlay stays
    Commit {
        /// The overlay
        name: HostName,
        /// What to call the image
        image: ImageName,
    },
    /// Delete an overlay and all that was written to it
    #[command(visible_alias = "rm")]
    Remove {
        /// The overlays
        #[arg(required = true)]
        names: Vec<HostName>,
    },
}

pub(crate) fn run(globals: &super::Globals, args: Args) -> anyhow::Result<ExitCode> {
    super::block_on(async {
        let mut session = Session::open(&globals.existing_store_dir()?).await?;
        let result = carry_out(&mut session, args.command, globals.json).await;
        session.close().await?;
        result.map(|()| ExitCode::SUCCESS)
    })
}

async fn carry_out(session: &mut Session, command: Command, json: bool) -> anyhow::Result<()> {
    match command {
        Command::Create { image, name, size } => {
            let Reply::Overlay(info) = session.call(Request::OverlayCreate { image, name, size }).await?
            else {
                bail!("the daemon answered out of turn");
            };
            if json {
                println!("{}", serde_json::to_string(&info)?);
            } else {
                println!("made overlay {} of {}", info.name, HumanBytes(info.size));
            }
        }
        Command::List => {
            let infos = list(session).await?;
            if json {
                println!("{}", serde_json::to_string(&infos)?);
            } else {
                print_list(&infos);
            }
        }
        Command::Show { name } => {
            let Reply::Overlay(info) = session.call(Request::OverlayShow { name }).await? else {
                bail!("the daemon answered out of turn");
            };
            if json {
                println!("{}", serde_json::to_string(&info)?);
            } else {
                show(&info);
            }
        }
        Command::Commit { name, image } => {
            let request = Request::OverlayCommit { name: name.clone(), image: image.clone() };
            let Reply::Image { root } = session.call(request).await? else {
                bail!("the daemon answered out of turn");
            };
            if json {
                println!("{}", serde_json::json!({ "name": image, "root": root }));
            } else {
                println!("made image {image} of overlay {name} (root {})", root.short());
            }
        }
        Command::Remove { names } => {
            for name in names {
                session.call(Request::OverlayRemove { name: name.clone() }).await?;
                if json {
                    println!("{}", serde_json::json!({ "name": name }));
                }
            }
        }
    }
    Ok(())
}

async fn list(session: &mut Session) -> anyhow::Result<Vec<OverlayInfo>> {
    match session.call(Request::OverlayList).await? {
        Reply::Overlays(infos) => Ok(infos),
        _ => bail!("the daemon answered out of turn"),
    }
}

fn print_list(infos: &[OverlayInfo]) {
    if infos.is_empty() {
        println!("no overlays: `bootcache overlay create IMAGE NAME` makes one");
        return;
    }
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header(["NAME", "IMAGE", "SIZE", "WRITTEN", "CLIENTS"]);
    for info in infos {
        table.add_row([
            info.name.to_string(),
            info.below(),
            HumanBytes(info.size).to_string(),
            HumanBytes(info.data).to_string(),
            info.connections.to_string(),
        ]);
    }
    println!("{}", table.trim_fmt());
    for info in infos {
        if let Some(error) = &info.error {
            eprintln!("bootcache: overlay {} cannot be used: {error}", info.name);
        }
    }
}

fn show(info: &OverlayInfo) {
    println!("name      {}", info.name);
    println!("image     {}", info.below());
    if let Some(base) = info.base {
        println!("base root {base}");
    }
    println!("size      {} ({} bytes)", HumanBytes(info.size), info.size);
    println!("written   {} ({} bytes)", HumanBytes(info.data), info.data);
    println!("clients   {}", info.connections);
}
