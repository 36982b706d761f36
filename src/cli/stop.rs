//! `bootcache stop VM…`: ends VMs that `bootcache boot` started.

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use bootcache::attach;
use bootcache::control::{Client, ControlError, Request};
use bootcache::name::HostName;
use bootcache::serve::CONTROL_SOCKET;
use bootcache::store::Store;
use futures_util::StreamExt;
use futures_util::future::Either;
use futures_util::stream;

use super::guest;

/// VMs that are ended at once. The daemon has places for more connections than that, and for other commands.
const AT_ONCE: usize = 32;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The VMs
    #[arg(required = true)]
    names: Vec<HostName>,
    /// End it at once instead of asking the guest to shut down: what it had not written yet is lost
    #[arg(long)]
    force: bool,
    /// Delete the overlay too, and with it all that the VM wrote
    #[arg(long)]
    remove: bool,
    /// How long a guest may take to shut down before it is ended
    #[arg(long, value_name = "SECONDS", default_value = "30")]
    patience: u64,
}

pub(crate) fn run(globals: &super::Globals, args: Args) -> anyhow::Result<ExitCode> {
    super::block_on(async {
        let store = globals.existing_store()?;
        let names: BTreeSet<HostName> = args.names.iter().cloned().collect();
        let (present, gone): (Vec<_>, Vec<_>) =
            names.into_iter().partition(|name| store.vm_dir(name).exists());
        // A guest that shuts down writes to its disk.
        let is_overlay = |name: &HostName| store.overlay_dir(name).exists();
        if !present.is_empty() || gone.iter().any(is_overlay) {
            super::daemon::daemon(store.dir()).await?;
        }
        let (store, args) = (&store, &args);
        let stopped = present.into_iter().map(async |name| (stop(store, &name, args).await, name));
        let gone = gone.into_iter().map(async |name| (stopped_before(store, &name, args).await, name));
        let all = stopped.map(Either::Left).chain(gone.map(Either::Right));
        let failed = stream::iter(all)
            .buffer_unordered(AT_ONCE)
            .map(|(result, name)| match result {
                Ok(()) if globals.json => {
                    println!("{}", serde_json::json!({ "name": name, "overlay_removed": args.remove }));
                    false
                }
                Ok(()) => false,
                Err(error) => {
                    eprintln!("bootcache: {name}: {error:#}");
                    true
                }
            })
            .fold(false, async |any, failed| any | failed)
            .await;
        Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    })
}

/// Ends one VM and removes what belongs to it; its overlay only if that is wanted.
async fn stop(store: &Store, name: &HostName, args: &Args) -> anyhow::Result<()> {
    let mut client = client(store).await?;
    guest::check_ours(store, &mut client, name).await?;
    match args.force {
        true => guest::end(store, name).await?,
        false => guest::shut_down(store, name, Duration::from_secs(args.patience)).await?,
    }
    attach::forget(store.dir(), name.as_str()).await?;
    guest::check_unused(&mut client, name).await?;
    match client.call(&Request::VmClose { name: name.clone() }).await {
        // One that did not come as far as its socket has none to close.
        Ok(_) | Err(ControlError::Refused(_)) => {}
        Err(error) => return Err(error.into()),
    }
    std::fs::remove_dir_all(store.vm_dir(name))?;
    if args.remove {
        client.call(&Request::OverlayRemove { name: name.clone() }).await?;
    }
    Ok(())
}

/// A VM that was stopped before may still have its overlay.
async fn stopped_before(store: &Store, name: &HostName, args: &Args) -> anyhow::Result<()> {
    if !store.overlay_dir(name).exists() {
        bail!("there is no VM '{name}'");
    }
    if args.remove {
        client(store).await?.call(&Request::OverlayRemove { name: name.clone() }).await?;
    } else {
        eprintln!("{name} is stopped already; `bootcache stop --remove {name}` deletes what it wrote");
    }
    Ok(())
}

async fn client(store: &Store) -> anyhow::Result<Client> {
    Ok(Client::connect(&store.dir().join(CONTROL_SOCKET)).await?)
}
