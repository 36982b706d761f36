//! `bootcache stop VM…`: ends VMs that `bootcache boot` started.

use std::process::ExitCode;
use std::time::Duration;

use bootcache::attach;
use bootcache::control::Request;
use bootcache::name::HostName;
use bootcache::store::Store;

use super::guest;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The VMs
    #[arg(required = true)]
    names: Vec<HostName>,
    /// End it at once instead of asking the guest to shut down
    #[arg(long)]
    force: bool,
    /// Delete the overlay too, and with it all that the VM wrote
    #[arg(long)]
    remove: bool,
    /// How long the guest may take to shut down
    #[arg(long, value_name = "SECONDS", default_value = "30")]
    patience: u64,
}

pub(crate) fn run(globals: &super::Globals, args: Args) -> anyhow::Result<ExitCode> {
    super::block_on(async {
        let store = Store::open(&globals.store_dir())?;
        let patience = if args.force { Duration::ZERO } else { Duration::from_secs(args.patience) };
        let (names, missing): (Vec<_>, Vec<_>) =
            args.names.into_iter().partition(|name| store.vm_dir(name).exists());
        for name in &missing {
            eprintln!("bootcache: there is no VM '{name}'");
        }
        let code = if missing.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
        if names.is_empty() {
            return Ok(code);
        }
        // A guest that shuts down writes to its disk.
        let mut client = super::daemon::daemon(store.dir()).await?;
        for name in names {
            guest::check_ours(&store, &mut client, &name).await?;
            guest::stop(&store, &name, patience).await?;
            attach::forget(store.dir(), name.as_str()).await?;
            // One that did not come as far as its socket has none to close.
            let _ = client.call(&Request::VmClose { name: name.clone() }).await;
            std::fs::remove_dir_all(store.vm_dir(&name))?;
            if args.remove {
                client.call(&Request::OverlayRemove { name: name.clone() }).await?;
            }
            if globals.json {
                println!("{}", serde_json::json!({ "name": name, "overlay_removed": args.remove }));
            }
        }
        Ok(code)
    })
}
