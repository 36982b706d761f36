//! One node's open images, overlays and VM sockets, and what can be asked of them.

mod error;
mod images;
mod overlays;
mod vms;

use std::collections::{HashMap, HashSet};
use std::io;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::Instant;

use bootcache_nbd::{Export, Limits, SharedDisk, SharedLimits};
use tokio::sync::Mutex;

pub use error::NodeError;
use overlays::OpenOverlay;

use super::report;
use super::vm_socket::VmSocket;
use crate::control::{ImageStatus, Reply, Request, Status};
use crate::digest::Digest;
use crate::image_disk::ImageDisk;
use crate::load::Sampler;
use crate::name::{HostName, ImageName};
use crate::peer::catalogue::Catalogue;
use crate::store::{Hold, ImageEntry, Store, StoreError, StoreLock};
use crate::transfer::{self, Arrivals, Plan, Target};

/// Increments on increments that are opened: more than people make, and few enough to open one by one.
const BASE_DEPTH_MAX: usize = 64;

pub(super) fn at(path: &Path) -> impl FnOnce(io::Error) -> NodeError {
    move |source| NodeError::Io { path: path.to_owned(), source }
}

/// An image that is open: its disk, and a hold that keeps it from being removed.
pub(super) struct OpenImage {
    disk: SharedDisk,
    _hold: Hold,
    /// Keeps the bases open, so that all increments of a base share one disk.
    _base: Option<Arc<Self>>,
}

#[derive(Default)]
struct Inner {
    images: HashMap<Digest, Weak<OpenImage>>,
    overlays: HashMap<HostName, OpenOverlay>,
    vms: HashMap<HostName, VmSocket>,
    /// Overlays that images are being made of.
    sealing: Arc<std::sync::Mutex<HashSet<HostName>>>,
}

impl Inner {
    fn sealing(&self) -> std::sync::MutexGuard<'_, HashSet<HostName>> {
        self.sealing.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// A node's data plane: the one owner of its open images, overlays and VM sockets. Holds the store's lock.
pub struct Node {
    store: Store,
    catalogue: Arc<Catalogue>,
    arrivals: Arrivals,
    nbd_limits: SharedLimits,
    _lock: StoreLock,
    started: Instant,
    /// One thing is opened or closed at a time, so that nothing is ever opened twice. Held for moments only.
    inner: Mutex<Inner>,
    /// Held by whoever waits for the store's own lock of changes.
    changes: Mutex<()>,
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
        let arrivals = Arrivals::new(store.clone(), Arc::clone(&catalogue), options);
        let started = Instant::now();
        let nbd_limits = Limits::default().into();
        let (inner, changes) = (Mutex::default(), Mutex::default());
        Ok(Self { store, catalogue, arrivals, nbd_limits, _lock: lock, started, inner, changes })
    }

    /// The images of this node, as its peer server finds them.
    pub const fn catalogue(&self) -> &Arc<Catalogue> {
        &self.catalogue
    }

    /// The images that are on their way to this node.
    pub const fn arrivals(&self) -> &Arrivals {
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
            Request::Status => self.status().await.map(Reply::Status),
            Request::OverlayCreate { image, name, size } => {
                self.create_overlay(&image, &name, size).await.map(Reply::Overlay)
            }
            Request::OverlayList => self.overlays().await.map(Reply::Overlays),
            Request::OverlayShow { name } => {
                self.overlay_info(&*self.inner.lock().await, &name).map(Reply::Overlay)
            }
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
    pub async fn export(&self, name: &str) -> Result<Export, String> {
        let mut inner = self.inner.lock().await;
        let found = self.find_export(&mut inner, name);
        drop(inner);
        found.map_err(|error| error.to_string())
    }

    fn find_export(&self, inner: &mut Inner, name: &str) -> Result<Export, NodeError> {
        if let Ok(overlay) = name.parse::<HostName>()
            && self.store.overlay_dir(&overlay).exists()
        {
            return self.overlay_export(inner, &overlay);
        }
        let image: ImageName =
            name.parse().map_err(|_| NodeError::NoExport(name.chars().take(80).collect()))?;
        let entry = self.store.resolve(&image)?;
        let open = self.open_image(inner, entry, 0)?;
        // The connection's disk keeps the image open: so it counts as in use.
        let disk = Arc::new(super::exports::HeldImage { disk: Arc::clone(&open.disk), _image: open });
        let description = "image, read-only".to_owned();
        Ok(Export { description, ..Export::new(name, disk) })
    }

    /// The export of overlay `name`.
    fn overlay_export(&self, inner: &mut Inner, name: &HostName) -> Result<Export, NodeError> {
        if inner.sealing().contains(name) {
            return Err(NodeError::InUse(name.clone()));
        }
        let open = self.open_overlay(inner, name)?;
        Ok(Export {
            name: name.to_string(),
            description: "overlay, writable".to_owned(),
            disk: Arc::new(open.overlay.clone()),
            closed: open.closed.clone(),
            stats: Arc::clone(&open.stats),
        })
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
        let mut inner = self.inner.lock().await;
        VmSocket::close_all(inner.vms.drain().map(|(_, socket)| socket)).await;
        self.arrivals.stop().await;
        // Each of them, whatever becomes of the others.
        let mut result = Ok(());
        for (name, open) in inner.overlays.drain() {
            open.closed.cancel();
            let flushed = bootcache_nbd::Disk::flush(&open.overlay).await;
            let flushed = flushed.map_err(at(&self.store.overlay_dir(&name)));
            result = result.and(flushed);
        }
        result
    }

    fn open_image(
        &self,
        inner: &mut Inner,
        entry: ImageEntry,
        depth: usize,
    ) -> Result<Arc<OpenImage>, NodeError> {
        if let Some(open) = inner.images.get(&entry.root).and_then(Weak::upgrade) {
            return Ok(open);
        }
        if depth == BASE_DEPTH_MAX {
            return Err(NodeError::TooDeep(entry.root));
        }
        let hold = self.store.hold(entry.root)?;
        let (store, root) = (self.store.clone(), entry.root);
        // Nobody waits for it: the disk may be slow, and a lost one only brings the image's eviction forward.
        tokio::task::spawn_blocking(move || {
            if let Err(error) = store.touch(root) {
                tracing::warn!("the image counts as unused: {error}");
            }
        });
        if !entry.is_complete() {
            let engine = self.arrivals.get(entry.root).ok_or(NodeError::Incomplete(entry.root))?;
            let open = Arc::new(OpenImage { disk: engine.disk(), _hold: hold, _base: None });
            inner.images.insert(entry.root, Arc::downgrade(&open));
            return Ok(open);
        }
        let (disk, base): (SharedDisk, _) = match entry.below() {
            None => (Arc::new(ImageDisk::open(&entry.disk_path()).map_err(at(&entry.disk_path()))?), None),
            Some(root) => {
                let base = self.open_image(inner, self.store.image(root)?, depth + 1)?;
                let below = Arc::clone(&base.disk);
                let disk = ImageDisk::open_increment(&entry.index_path(), &entry.disk_path(), below, root)?;
                (Arc::new(disk), Some(base))
            }
        };
        entry.check_length(disk.size())?;
        let open = Arc::new(OpenImage { disk, _hold: hold, _base: base });
        inner.images.insert(entry.root, Arc::downgrade(&open));
        Ok(open)
    }

    /// A name of the image with this root, if it has one.
    fn name_of(&self, root: Digest) -> Result<Option<ImageName>, StoreError> {
        Ok(self.store.names()?.into_iter().find(|(_, other)| *other == root).map(|(name, _)| name))
    }

    async fn status(&self) -> Result<Status, NodeError> {
        let inner = self.inner.lock().await;
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
                open: inner.images.get(&root).is_some_and(|image| image.strong_count() > 0),
                present: if complete { allocated } else { 0 },
                allocated,
                pulled: entry.is_pulled(),
                transfer: self.arrivals.get(root).map(|engine| report::transfer(&engine)),
            });
        }
        let open: Vec<HostName> = inner.overlays.keys().cloned().collect();
        let mut overlays = Vec::new();
        for name in open {
            overlays.push(self.overlay_info(&inner, &name)?);
        }
        overlays.sort_by(|a, b| a.name.cmp(&b.name));
        let mut vms: Vec<_> = inner.vms.iter().map(|(name, socket)| socket.info(name)).collect();
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
mod tests;
