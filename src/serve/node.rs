//! One node's open images, overlays and VM sockets, and what can be asked of them.

mod error;
mod images;
mod overlays;
mod turns;
mod vms;

use std::collections::{HashMap, HashSet};
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bootcache_nbd::{Export, Limits, OpenError, SharedLimits};

pub use error::NodeError;
use images::Images;
pub(super) use images::OpenImage;
use overlays::OpenOverlay;
use turns::{Turn, Turns};

use super::report;
use super::vm_socket::VmSocket;
use crate::control::{ImageStatus, Reply, Request, Status};
use crate::digest::Digest;
use crate::load::Sampler;
use crate::name::{HostName, ImageName};
use crate::peer::catalogue::Catalogue;
use crate::store::{Store, StoreError, StoreLock};
use crate::transfer::{self, Arrivals, Plan, Target};

pub(super) fn at(path: &Path) -> impl FnOnce(io::Error) -> NodeError {
    move |source| NodeError::Io { path: path.to_owned(), source }
}

/// What is open under a name. Looked at and changed in moments; what takes longer is done before, or after.
#[derive(Default)]
struct Open {
    overlays: HashMap<HostName, Arc<OpenOverlay>>,
    vms: HashMap<HostName, VmSocket>,
    /// Overlays that images are being made of.
    sealing: HashSet<HostName>,
}

fn lock(open: &Mutex<Open>) -> MutexGuard<'_, Open> {
    open.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A node's data plane: the one owner of its open images, overlays and VM sockets. Holds the store's lock.
pub struct Node {
    store: Store,
    catalogue: Arc<Catalogue>,
    arrivals: Arc<Arrivals>,
    nbd_limits: SharedLimits,
    _lock: StoreLock,
    started: Instant,
    images: Arc<Images>,
    /// An overlay, and a VM's socket, is opened and closed by who has the [`Turn`] of its name.
    open: Arc<Mutex<Open>>,
    turns: Turns,
    /// Held by whoever waits for the store's own lock of changes.
    changes: tokio::sync::Mutex<()>,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node").field("store", &self.store).finish_non_exhaustive()
    }
}

impl Node {
    /// Takes `store` for this process.
    ///
    /// # Errors
    /// [`StoreError::Locked`] when another process has it.
    pub fn open(store: Store) -> Result<Self, NodeError> {
        Self::open_as(store, transfer::Options::default())
    }

    /// As [`Node::open`], for a node that fetches images as `options` say, from others and for others.
    ///
    /// # Errors
    /// [`StoreError::Locked`] when another process has it.
    pub fn open_as(store: Store, options: transfer::Options) -> Result<Self, NodeError> {
        let lock = store.lock()?;
        let sampler = Sampler::default();
        let catalogue = Catalogue::new(store.clone(), move || sampler.load());
        let arrivals = Arc::new(Arrivals::new(store.clone(), Arc::clone(&catalogue), options));
        Ok(Self {
            images: Arc::new(Images::new(store.clone(), Arc::clone(&arrivals))),
            store,
            catalogue,
            arrivals,
            nbd_limits: Limits::default().into(),
            _lock: lock,
            started: Instant::now(),
            open: Arc::default(),
            turns: Turns::default(),
            changes: tokio::sync::Mutex::default(),
        })
    }

    /// The images of this node, as its peer server finds them.
    pub const fn catalogue(&self) -> &Arc<Catalogue> {
        &self.catalogue
    }

    /// The images that are on their way to this node.
    pub const fn arrivals(&self) -> &Arc<Arrivals> {
        &self.arrivals
    }

    /// What all NBD clients of this node together may ask for, on whatever socket.
    pub const fn nbd_limits(&self) -> &SharedLimits {
        &self.nbd_limits
    }

    /// The store.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Carries out one request.
    ///
    /// Dropping the future may leave it half done; nothing that others see is ever half made.
    pub async fn handle(&self, request: Request) -> Result<Reply, NodeError> {
        match request {
            Request::Status => self.status().map(Reply::Status),
            Request::OverlayCreate { image, name, size } => {
                self.create_overlay(&image, &name, size).await.map(Reply::Overlay)
            }
            Request::OverlayList => self.overlays().map(Reply::Overlays),
            Request::OverlayShow { name } => self.overlay_info(&name).map(Reply::Overlay),
            Request::OverlayCommit { name, image } => {
                self.commit_overlay(&name, &image).await.map(|root| Reply::Image { root })
            }
            Request::OverlayRemove { name } => self.remove_overlay(&name).await.map(|()| Reply::Done),
            Request::Pull { name, root, boot, sources, fill, fill_rate } => {
                let target = Target { name, root, boot, verify: false };
                let root = self.arrivals.pull(&target, &Plan { sources, fill, fill_rate }).await?;
                Ok(Reply::Image { root })
            }
            Request::ImageRemove { name } => {
                let removed = self.remove_image(&name).await?;
                Ok(Reply::Removed { freed: removed.freed() })
            }
            Request::VmOpen { name, owner } => self.open_vm(&name, owner).await.map(Reply::Vm),
            Request::VmClose { name } => self.close_vm(&name).await.map(|()| Reply::Done),
        }
    }

    /// The export called `name`: an overlay, else an image.
    ///
    /// # Errors
    /// A message for whoever asked.
    pub async fn export(&self, name: &str) -> Result<Export, OpenError> {
        self.find_export(name).await.map_err(OpenError::from)
    }

    async fn find_export(&self, name: &str) -> Result<Export, NodeError> {
        if let Ok(overlay) = name.parse::<HostName>()
            && self.store.overlay_dir(&overlay).exists()
        {
            return self.overlay_export(&self.turns.turn(&overlay).await).await;
        }
        let image: ImageName =
            name.parse().map_err(|_| NodeError::NoExport(name.chars().take(80).collect()))?;
        let open = self.open_image(self.store.resolve(&image)?.root).await?;
        // The connection's disk keeps the image open: so it counts as in use.
        let disk = Arc::new(super::exports::HeldImage { disk: Arc::clone(&open.disk), _image: open });
        let description = "image, read-only".to_owned();
        Ok(Export { description, ..Export::new(name, disk) })
    }

    /// Names and descriptions of all exports.
    pub fn export_names(&self) -> Vec<(String, String)> {
        let images = self.store.names().unwrap_or_default();
        let images = images.into_iter().map(|(name, _)| (name.to_string(), "image, read-only".to_owned()));
        let overlays = self.overlay_names().unwrap_or_default();
        let overlays = overlays.into_iter().map(|name| (name.to_string(), "overlay, writable".to_owned()));
        images.chain(overlays).collect()
    }

    /// Closes every socket and overlay; what guests wrote is durable when it returns.
    pub async fn close(&self) -> Result<(), NodeError> {
        let Open { vms, overlays, .. } = std::mem::take(&mut *lock(&self.open));
        VmSocket::close_all(vms.into_values()).await;
        self.arrivals.stop().await;
        // Each of them, whatever becomes of the others.
        let mut result = Ok(());
        for (name, open) in overlays {
            open.closed.cancel();
            let flushed = bootcache_nbd::Disk::flush(&open.overlay).await;
            let flushed = flushed.map_err(at(&self.store.overlay_dir(&name)));
            result = result.and(flushed);
        }
        result
    }

    /// Runs what waits for the store's lock of changes: one at a time, since those who wait for it only look now and then.
    ///
    /// Dropped, the work goes on to its end.
    async fn changing<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, NodeError> + Send + 'static,
    ) -> Result<T, NodeError> {
        let _one = self.changes.lock().await;
        self.apart(work).await
    }

    /// Runs what may take long where it holds up nobody.
    ///
    /// Dropped, the work goes on to its end.
    async fn apart<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, NodeError> + Send + 'static,
    ) -> Result<T, NodeError> {
        let done = tokio::task::spawn_blocking(work).await;
        done.unwrap_or_else(|error| Err(at(self.store.dir())(io::Error::other(error))))
    }

    /// A name of the image with this root, if it has one.
    fn name_of(&self, root: Digest) -> Result<Option<ImageName>, StoreError> {
        Ok(self.store.names()?.into_iter().find(|(_, other)| *other == root).map(|(name, _)| name))
    }

    fn status(&self) -> Result<Status, NodeError> {
        let mut images = Vec::new();
        for (name, root) in self.store.names()? {
            let Ok(entry) = self.store.image(root) else { continue };
            let (allocated, complete) = (entry.manifest.allocated, entry.is_complete());
            images.push(ImageStatus {
                name,
                root,
                kind: entry.manifest.kind,
                boot_bytes: entry.manifest.boot.as_ref().map_or(0, |boot| boot.file_length),
                boot: entry.manifest.boot.as_ref().map(|boot| boot.heads_digest),
                complete,
                size: entry.manifest.size,
                open: self.images.is_open(root),
                present: if complete { allocated } else { 0 },
                allocated,
                pulled: entry.is_pulled(),
                transfer: self.arrivals.get(root).map(|engine| report::transfer(&engine)),
            });
        }
        let (open, mut vms) = {
            let open = lock(&self.open);
            let vms: Vec<_> = open.vms.iter().map(|(name, socket)| socket.info(name)).collect();
            (open.overlays.clone(), vms)
        };
        let mut overlays = Vec::new();
        for (name, open) in open {
            overlays.push(self.open_info(&name, &open)?);
        }
        overlays.sort_by(|a, b| a.name.cmp(&b.name));
        vms.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Status {
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_seconds: self.started.elapsed().as_secs(),
            images,
            overlays,
            vms,
        })
    }
}

#[cfg(test)]
pub(super) mod tests;
