//! `bootcache stop VM…`: ends VMs that `bootcache boot` started.

use std::process::ExitCode;
use std::time::Duration;

use bootcache::control::Request;
use bootcache::name::HostName;
use bootcache::store::Store;

use super::guest;
use super::session::Session;

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
        let mut session = Session::open(store.dir()).await?;
        let mut code = ExitCode::SUCCESS;
        for name in args.names {
            let dir = store.vm_dir(&name);
            if !dir.exists() {
                eprintln!("bootcache: there is no VM '{name}'");
                code = ExitCode::FAILURE;
                continue;
            }
            guest::stop(&store, &name, patience).await?;
            super::attach::detach_vm(store.dir(), &name).await?;
            // Without a daemon there is no socket to close.
            let _ = session.call(Request::VmClose { name: name.clone() }).await;
            std::fs::remove_dir_all(&dir)?;
            if args.remove {
                session.call(Request::OverlayRemove { name }).await?;
            }
        }
        session.close().await?;
        Ok(code)
    })
}
