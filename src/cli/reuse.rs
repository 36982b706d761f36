//! `bootcache boot --reuse`: VMs that were stopped, or went off by themselves, go on with their overlays.

use std::collections::HashMap;
use std::fs::File;

use anyhow::{bail, ensure};
use bootcache::attach;
use bootcache::control::{Client, OverlayInfo, Reply, Request};
use bootcache::digest::Digest;
use bootcache::name::HostName;
use bootcache::store::Store;

use super::guest;

/// Which of the VMs have an overlay, each with a lock that keeps other commands from going on with it; what is left of
/// those that went off by themselves is removed, but for the overlay.
///
/// # Errors
/// One of them runs, is used by somebody else, is damaged, or is not of the image with that root. Nothing is started then.
pub(super) async fn kept(
    store: &Store,
    client: &mut Client,
    names: &[HostName],
    root: Digest,
) -> anyhow::Result<HashMap<HostName, File>> {
    let overlays = list(client).await?;
    let kept: Vec<&OverlayInfo> = overlays.iter().filter(|overlay| names.contains(&overlay.name)).collect();
    let mut locks = HashMap::new();
    for overlay in &kept {
        let name = &overlay.name;
        let Some(lock) = store.lock_overlay(name)? else {
            bail!("VM '{name}' is just being started by another command");
        };
        locks.insert(name.clone(), lock);
        if let Some(error) = &overlay.error {
            bail!("overlay '{name}' cannot be used: {error}");
        }
        if overlay.base != Some(root) {
            bail!("overlay '{name}' is of image {}: boot that one, or choose another name", overlay.below());
        }
        if guest::runs(store, name).await? {
            bail!("VM '{name}' runs: `bootcache stop {name}` ends it");
        }
    }
    for overlay in &kept {
        let (name, dir) = (&overlay.name, store.vm_dir(&overlay.name));
        if dir.exists() {
            guest::check_ours(store, client, name).await?;
            if let Some(what) = guest::would_lose(store, name).await? {
                bail!("{what}; `bootcache stop --force {name}` forgets it");
            }
        }
        // The kernel's disk of a guest that went off is still attached, and counts as a client.
        attach::forget(store.dir(), name.as_str()).await?;
        let connections =
            list(client).await?.iter().find(|other| other.name == *name).map(|now| now.connections);
        ensure!(connections == Some(0), "overlay '{name}' is in use by an NBD client: end that first");
        if dir.exists() {
            guest::end(store, name).await?;
            let _ = client.call(&Request::VmClose { name: name.clone() }).await;
            std::fs::remove_dir_all(&dir)?;
        }
    }
    Ok(locks)
}

/// Refuses names of which one is taken by an overlay that is there, before anything is started.
pub(super) async fn none_kept(client: &mut Client, names: &[HostName]) -> anyhow::Result<()> {
    match list(client).await?.iter().find(|overlay| names.contains(&overlay.name)) {
        Some(overlay) => bail!(
            "the name '{0}' is taken: choose another, or go on with what is there with --reuse (`bootcache overlay \
             remove {0}` deletes it)",
            overlay.name
        ),
        None => Ok(()),
    }
}

async fn list(client: &mut Client) -> anyhow::Result<Vec<OverlayInfo>> {
    match client.call(&Request::OverlayList).await? {
        Reply::Overlays(overlays) => Ok(overlays),
        _ => bail!("the daemon answered out of turn"),
    }
}
