//! One node's open images, overlays and VM sockets, and what can be asked of them.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Instant;

use bootcache_nbd::{Export, ExportStats, Limits, SharedDisk, SharedLimits};
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::overlay_meta::OverlayMeta;
use super::report;
use super::vm_socket::VmSocket;
use crate::block::BLOCK_SIZE;
use crate::control::{ImageStatus, OverlayInfo, Owner, Reply, Request, Status, VmInfo};
use crate::digest::Digest;
use crate::image::increment::{IncrementError, publish_sealed};
use crate::image::tree::SIZE_MAX;
use crate::image_disk::ImageDisk;
use crate::load::Sampler;
use crate::local_cache::Reader;
use crate::name::{HostName, ImageName};
use crate::overlay::{Overlay, OverlayError};
use crate::peer::catalogue::Catalogue;
use crate::store::{Hold, ImageEntry, Store, StoreError, StoreLock};
use crate::transfer::{self, Arrivals, Plan, PullError, Target};

/// Increments on increments that are opened: more than people make, and few enough to open one by one.
const BASE_DEPTH_MAX: usize = 64;

/// Why a request was not carried out; one line for a person.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The store has not got it, or cannot give it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The overlay cannot be made, opened or sealed.
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    /// A file or socket cannot be used.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or socket.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// No overlay of that name.
    #[error("there is no overlay '{0}': `bootcache overlay list` shows those there are")]
    NoOverlay(HostName),
    /// Nothing of that name.
    #[error("there is no image or overlay '{0}'")]
    NoExport(String),
    /// No VM of that name has a socket.
    #[error("VM '{0}' has no open socket")]
    NoVm(HostName),
    /// An image or overlay has the name already.
    #[error("the name '{0}' is taken: choose another, or remove what has it")]
    Taken(String),
    /// The overlay cannot have that size.
    #[error(
        "an overlay cannot have {size} bytes on image '{image}': take a multiple of 4096 from {least}, the image's \
         size, to {SIZE_MAX}"
    )]
    OverlaySize {
        /// What was asked for.
        size: u64,
        /// The image.
        image: ImageName,
        /// The image's size.
        least: u64,
    },
    /// Somebody uses the overlay.
    #[error("overlay '{0}' is in use: stop its VM first")]
    InUse(HostName),
    /// What it was sealed to cannot become an image.
    #[error("cannot commit the overlay: {0}")]
    Commit(IncrementError),
    /// Only some of the image is here.
    #[error("only a part of image {} is here: go on with `bootcache pull`", .0.short())]
    Incomplete(Digest),
    /// An image cannot be fetched.
    #[error(transparent)]
    Pull(#[from] PullError),
    /// Increments on increments without end.
    #[error("image {} stands on more than {BASE_DEPTH_MAX} others: its manifest is damaged", .0.short())]
    TooDeep(Digest),
}

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

/// An overlay that is open, and the image below it.
struct OpenOverlay {
    overlay: Overlay,
    base: Digest,
    /// Ends the connections to it.
    closed: CancellationToken,
    stats: Arc<ExportStats>,
    /// Counts this VM's waiting, if the image was still on its way when it was opened.
    reader: Option<Arc<Reader>>,
    _image: Arc<OpenImage>,
}

impl OpenOverlay {
    fn connections(&self) -> u32 {
        self.stats.connections.load(Ordering::Relaxed)
    }
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

/// An overlay that an image is being made of, until this is dropped.
struct Sealing {
    all: Arc<std::sync::Mutex<HashSet<HostName>>>,
    name: HostName,
}

impl Drop for Sealing {
    fn drop(&mut self) {
        self.all.lock().unwrap_or_else(std::sync::PoisonError::into_inner).remove(&self.name);
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
    /// One thing is opened or closed at a time, so that nothing is ever opened twice.
    inner: Mutex<Inner>,
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
        Ok(Self { store, catalogue, arrivals, nbd_limits, _lock: lock, started, inner: Mutex::default() })
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

    /// Opens the sockets of the VMs that had one when the last daemon ended, however it ended.
    pub async fn reopen_vms(&self) -> Result<(), NodeError> {
        let dir = self.store.dir().join("vms");
        for entry in fs::read_dir(&dir).map_err(at(&dir))? {
            let entry = entry.map_err(at(&dir))?;
            let Some(name) = entry.file_name().to_str().and_then(|name| name.parse::<HostName>().ok()) else {
                continue;
            };
            let Some(owner) = VmSocket::recorded(&entry.path()).map_err(at(&entry.path()))? else { continue };
            if let Err(error) = self.open_vm(&name, owner).await {
                warn!("the socket of VM '{name}' is not open again: {error}");
            }
        }
        Ok(())
    }

    /// Closes every socket and overlay; what guests wrote is durable when it returns.
    pub async fn close(&self) -> Result<(), NodeError> {
        let mut inner = self.inner.lock().await;
        for (_, socket) in inner.vms.drain() {
            socket.close().await;
        }
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

    fn open_overlay<'a>(&self, inner: &'a mut Inner, name: &HostName) -> Result<&'a OpenOverlay, NodeError> {
        if !inner.overlays.contains_key(name) {
            let dir = self.store.overlay_dir(name);
            if !dir.exists() {
                return Err(NodeError::NoOverlay(name.clone()));
            }
            let meta = OverlayMeta::read(&dir)?;
            let entry = self.store.image(meta.base)?;
            let image = self.open_image(inner, entry, 0)?;
            let cache = self.arrivals.get(meta.base).map(|engine| Arc::clone(engine.cache()));
            let reader = cache.map(|cache| Arc::new(Reader::new(cache)));
            let below = reader
                .as_ref()
                .map_or_else(|| Arc::clone(&image.disk), |reader| Arc::clone(reader) as SharedDisk);
            let overlay = Overlay::open(&dir, below, meta.base)?;
            let closed = CancellationToken::new();
            let stats = Arc::default();
            let open = OpenOverlay { overlay, base: meta.base, closed, stats, reader, _image: image };
            inner.overlays.insert(name.clone(), open);
        }
        Ok(&inner.overlays[name])
    }

    /// Makes an overlay of `size` bytes, or as large as its image.
    async fn create_overlay(
        &self,
        image: &ImageName,
        name: &HostName,
        size: Option<u64>,
    ) -> Result<OverlayInfo, NodeError> {
        let entry = self.store.resolve(image)?;
        let least = entry.manifest.size;
        let size = size.unwrap_or(least);
        if size < least || (size != least && !size.is_multiple_of(BLOCK_SIZE)) || size > SIZE_MAX {
            return Err(NodeError::OverlaySize { size, image: image.clone(), least });
        }
        let dir = self.store.overlay_dir(name);
        let mut inner = self.inner.lock().await;
        self.check_free(name)?;
        // Opened first: an image that cannot be read gets no overlays. The hold keeps it until the overlay is there.
        let _image = self.open_image(&mut inner, entry.clone(), 0)?;
        let scratch = self.store.scratch("overlay")?;
        let made = scratch.join("overlay");
        Overlay::create(&made, entry.root, size)?;
        OverlayMeta::new(entry.root).write(&made)?;
        let change = self.store.change(|_| ())?;
        self.check_free(name)?; // others may have added an image
        fs::rename(&made, &dir).map_err(at(&dir))?;
        crate::store::atomic::sync_dir(&self.store.dir().join("overlays")).map_err(at(&dir))?;
        drop(change);
        self.overlay_info(&inner, name)
    }

    /// Whether neither an image nor an overlay has the name.
    fn check_free(&self, name: &HostName) -> Result<(), NodeError> {
        let image = name.as_str().parse::<ImageName>().ok();
        let image = image.map(|image| self.store.root_of(&image)).transpose()?.flatten();
        if image.is_some() || self.store.overlay_dir(name).exists() {
            return Err(NodeError::Taken(name.to_string()));
        }
        Ok(())
    }

    async fn overlays(&self) -> Result<Vec<OverlayInfo>, NodeError> {
        let inner = self.inner.lock().await;
        let mut infos = Vec::new();
        for name in self.overlay_names()? {
            match self.overlay_info(&inner, &name) {
                Ok(info) => infos.push(info),
                Err(NodeError::NoOverlay(_)) => {}
                Err(error) => {
                    let error = Some(error.to_string());
                    infos.push(OverlayInfo { error, ..OverlayInfo::new(name, None) });
                }
            }
        }
        Ok(infos)
    }

    /// Of one that is not open only what its files say: a look does not open it.
    fn overlay_info(&self, inner: &Inner, name: &HostName) -> Result<OverlayInfo, NodeError> {
        let Some(open) = inner.overlays.get(name) else {
            let dir = self.store.overlay_dir(name);
            if !dir.exists() {
                return Err(NodeError::NoOverlay(name.clone()));
            }
            let (header, usage) = Overlay::stored(&dir)?;
            return Ok(OverlayInfo {
                image: self.name_of(header.base)?,
                size: header.size,
                data: usage.data_blocks * BLOCK_SIZE,
                ..OverlayInfo::new(name.clone(), Some(header.base))
            });
        };
        Ok(OverlayInfo {
            image: self.name_of(open.base)?,
            size: bootcache_nbd::Disk::size(&open.overlay),
            data: open.overlay.usage().data_blocks * BLOCK_SIZE,
            connections: open.connections(),
            reads: open.stats.reads.load(Ordering::Relaxed),
            read_bytes: open.stats.read_bytes.load(Ordering::Relaxed),
            written_bytes: open.stats.written_bytes.load(Ordering::Relaxed),
            waits: open.reader.as_ref().map(|reader| report::waits(reader.counters())),
            ..OverlayInfo::new(name.clone(), Some(open.base))
        })
    }

    /// A name of the image with this root, if it has one.
    fn name_of(&self, root: Digest) -> Result<Option<ImageName>, StoreError> {
        Ok(self.store.names()?.into_iter().find(|(_, other)| *other == root).map(|(name, _)| name))
    }

    fn overlay_names(&self) -> Result<Vec<HostName>, NodeError> {
        let dir = self.store.dir().join("overlays");
        let mut names = Vec::new();
        for entry in fs::read_dir(&dir).map_err(at(&dir))? {
            let name = entry.map_err(at(&dir))?.file_name();
            names.extend(name.to_str().and_then(|name| name.parse::<HostName>().ok()));
        }
        names.sort();
        Ok(names)
    }

    async fn remove_overlay(&self, name: &HostName) -> Result<(), NodeError> {
        let mut inner = self.inner.lock().await;
        let dir = self.store.overlay_dir(name);
        if !dir.exists() {
            return Err(NodeError::NoOverlay(name.clone()));
        }
        self.check_idle(&inner, name)?;
        if let Some(open) = inner.overlays.remove(name) {
            open.closed.cancel();
        }
        // Moved first, so that a crash leaves no half of an overlay, and the next start removes the rest.
        let scratch = self.store.scratch("removed")?;
        fs::rename(&dir, scratch.join("overlay")).map_err(at(&dir))
    }

    async fn commit_overlay(&self, name: &HostName, image: &ImageName) -> Result<Digest, NodeError> {
        self.store.check_free(image)?;
        let (overlay, _sealing) = {
            let mut inner = self.inner.lock().await;
            self.open_overlay(&mut inner, name)?;
            self.check_idle(&inner, name)?;
            let open = &inner.overlays[name];
            let (overlay, base) = (open.overlay.clone(), open.base);
            if !self.store.image(base)?.is_complete() {
                return Err(NodeError::Commit(IncrementError::BaseIncomplete(base)));
            }
            inner.sealing().insert(name.clone());
            (overlay, Sealing { all: Arc::clone(&inner.sealing), name: name.clone() })
        };
        // It takes long, and others go on meanwhile.
        self.seal(&overlay, image).await
    }

    async fn seal(&self, overlay: &Overlay, image: &ImageName) -> Result<Digest, NodeError> {
        let scratch = self.store.scratch("commit")?;
        overlay.seal(scratch.path()).await?;
        let (store, image) = (self.store.clone(), image.clone());
        let publish = move || publish_sealed(&store, scratch, &image).map(|entry| entry.root);
        // Without an answer the runtime is ending, and the scratch folder goes with it.
        let published = tokio::task::spawn_blocking(publish).await;
        published.unwrap_or(Err(IncrementError::Cancelled)).map_err(NodeError::Commit)
    }

    async fn open_vm(&self, name: &HostName, owner: Option<Owner>) -> Result<VmInfo, NodeError> {
        let mut inner = self.inner.lock().await;
        if let Some(socket) = inner.vms.get(name) {
            return Ok(socket.info(name));
        }
        let export = self.overlay_export(&mut inner, name)?;
        let dir = self.store.vm_dir(name);
        let socket = VmSocket::open(&dir, export, owner, self.nbd_limits.clone()).map_err(at(&dir))?;
        let info = socket.info(name);
        inner.vms.insert(name.clone(), socket);
        Ok(info)
    }

    async fn close_vm(&self, name: &HostName) -> Result<(), NodeError> {
        let dir = self.store.vm_dir(name);
        let mut inner = self.inner.lock().await;
        // One whose socket could not be opened again has a record all the same.
        if !inner.vms.contains_key(name) && VmSocket::recorded(&dir).map_err(at(&dir))?.is_none() {
            return Err(NodeError::NoVm(name.clone()));
        }
        VmSocket::forget(&dir).map_err(at(&dir))?;
        let socket = inner.vms.remove(name);
        drop(inner);
        if let Some(socket) = socket {
            socket.close().await;
        }
        Ok(())
    }

    /// Refuses what a client has open, an image is being made of, or a VM has its socket on. The record counts too: a
    /// guest whose daemon was killed runs on and waits for the next one.
    fn check_idle(&self, inner: &Inner, name: &HostName) -> Result<(), NodeError> {
        let dir = self.store.vm_dir(name);
        let connected = inner.overlays.get(name).is_some_and(|open| open.connections() > 0);
        let has_socket =
            inner.vms.contains_key(name) || VmSocket::recorded(&dir).map_err(at(&dir))?.is_some();
        if connected || has_socket || inner.sealing().contains(name) {
            return Err(NodeError::InUse(name.clone()));
        }
        Ok(())
    }

    async fn status(&self) -> Result<Status, NodeError> {
        let inner = self.inner.lock().await;
        let mut images = Vec::new();
        for (name, root) in self.store.names()? {
            let Ok(entry) = self.store.image(root) else { continue };
            let allocated = entry.manifest.allocated;
            images.push(ImageStatus {
                name,
                root,
                kind: entry.manifest.kind,
                boot_bytes: entry.manifest.boot.as_ref().map_or(0, |boot| boot.file_length),
                boot: entry.manifest.boot.as_ref().map(|boot| boot.heads_digest),
                complete: entry.is_complete(),
                size: entry.manifest.size,
                open: inner.images.get(&root).is_some_and(|image| image.strong_count() > 0),
                present: if entry.is_complete() { allocated } else { 0 },
                allocated,
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
