//! The overlays of a node: opened when they are needed, listed without, removed and sealed while nobody uses them.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bootcache_nbd::ExportStats;
use bootcache_nbd::SharedDisk;
use tokio_util::sync::CancellationToken;

use super::{Inner, Node, NodeError, OpenImage, at};
use crate::attach::Table;
use crate::block::BLOCK_SIZE;
use crate::control::OverlayInfo;
use crate::digest::Digest;
use crate::image::increment::IncrementError;
use crate::image::increment::publish_sealed;
use crate::image::manifest::ImageKind;
use crate::image::tree::SIZE_MAX;
use crate::local_cache::Reader;
use crate::name::HostName;
use crate::name::ImageName;
use crate::overlay::Overlay;
use crate::serve::overlay_meta::OverlayMeta;
use crate::serve::report;
use crate::serve::vm_socket::VmSocket;
use crate::store::atomic::sync_dir;
use crate::store::{Scratch, Store};

/// An overlay that is open, and the image below it.
pub(super) struct OpenOverlay {
    pub(super) overlay: Overlay,
    base: Digest,
    /// Ends the connections to it.
    pub(super) closed: CancellationToken,
    pub(super) stats: Arc<ExportStats>,
    /// Counts this VM's waiting, if the image was still on its way when it was opened.
    reader: Option<Arc<Reader>>,
    _image: Arc<OpenImage>,
}

impl OpenOverlay {
    fn connections(&self) -> u32 {
        self.stats.connections.load(Ordering::Relaxed)
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

impl Node {
    pub(super) fn open_overlay<'a>(
        &self,
        inner: &'a mut Inner,
        name: &HostName,
    ) -> Result<&'a OpenOverlay, NodeError> {
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
    pub(super) async fn create_overlay(
        &self,
        image: &ImageName,
        name: &HostName,
        size: Option<u64>,
    ) -> Result<OverlayInfo, NodeError> {
        let entry = self.store.resolve(image)?;
        if entry.manifest.kind == ImageKind::Container {
            return Err(NodeError::Container(image.to_string()));
        }
        let least = entry.manifest.size;
        let size = size.unwrap_or(least);
        if size < least || (size != least && !size.is_multiple_of(BLOCK_SIZE)) || size > SIZE_MAX {
            return Err(NodeError::OverlaySize { size, image: image.clone(), least });
        }
        // Opened first: an image that cannot be read gets no overlays. The hold keeps it until the overlay is there.
        let held = {
            let mut inner = self.inner.lock().await;
            check_free(&self.store, name)?;
            self.open_image(&mut inner, entry.clone(), 0)?
        };
        let (store, new) = (self.store.clone(), name.clone());
        self.changing(move || {
            let _held = held;
            let scratch = store.scratch("overlay")?;
            let (made, dir) = (scratch.join("overlay"), store.overlay_dir(&new));
            Overlay::create(&made, entry.root, size)?;
            OverlayMeta::new(entry.root).write(&made)?;
            let _change = store.change(|_| ())?;
            check_free(&store, &new)?; // others may have added an image or an overlay
            fs::rename(&made, &dir).map_err(at(&dir))?;
            sync_dir(&store.dir().join("overlays")).map_err(at(&dir))
        })
        .await?;
        self.overlay_info(&*self.inner.lock().await, name)
    }

    /// Runs what waits for the store's lock of changes: one at a time, since those who wait for it only look now and then.
    ///
    /// Dropped, the work goes on to its end.
    pub(super) async fn changing<T: Send + 'static>(
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

    pub(super) async fn overlays(&self) -> Result<Vec<OverlayInfo>, NodeError> {
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
    pub(super) fn overlay_info(&self, inner: &Inner, name: &HostName) -> Result<OverlayInfo, NodeError> {
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

    pub(super) fn overlay_names(&self) -> Result<Vec<HostName>, NodeError> {
        let dir = self.store.dir().join("overlays");
        let mut names = Vec::new();
        for entry in fs::read_dir(&dir).map_err(at(&dir))? {
            let name = entry.map_err(at(&dir))?.file_name();
            names.extend(name.to_str().and_then(|name| name.parse::<HostName>().ok()));
        }
        names.sort();
        Ok(names)
    }

    pub(super) async fn remove_overlay(&self, name: &HostName) -> Result<(), NodeError> {
        let dir = self.store.overlay_dir(name);
        let check = |inner: &Inner| match dir.exists() {
            true => self.check_idle(inner, name),
            false => Err(NodeError::NoOverlay(name.clone())),
        };
        check(&*self.inner.lock().await)?;
        let store = self.store.clone();
        let change = self.changing(move || Ok(store.change(|_| ())?)).await?;
        // Moved first, so that a crash leaves no half of an overlay, and the next start removes the rest.
        let (open, grave) = {
            let mut inner = self.inner.lock().await;
            check(&inner)?;
            let grave = self.store.bury(&dir, &change)?;
            (inner.overlays.remove(name), grave)
        };
        drop(change); // others need not wait for the rest
        if let Some(open) = &open {
            open.closed.cancel();
        }
        let overlays = self.store.dir().join("overlays");
        self.apart(move || {
            // Before the answer: after a power loss a new overlay of the name must not be the old one.
            let synced = sync_dir(&overlays).map_err(at(&overlays));
            drop((open, grave));
            synced
        })
        .await
    }

    async fn scratch(&self, label: &'static str) -> Result<Scratch, NodeError> {
        let store = self.store.clone();
        self.changing(move || Ok(store.scratch(label)?)).await
    }

    pub(super) async fn commit_overlay(
        &self,
        name: &HostName,
        image: &ImageName,
    ) -> Result<Digest, NodeError> {
        self.store.check_free(image)?;
        let (overlay, _sealing) = {
            let mut inner = self.inner.lock().await;
            self.open_overlay(&mut inner, name)?;
            self.check_idle(&inner, name)?;
            let open = &inner.overlays[name];
            let (overlay, base) = (open.overlay.clone(), open.base);
            let entry = self.store.image(base)?;
            if entry.manifest.kind == ImageKind::Container {
                let image =
                    self.name_of(base)?.map_or_else(|| base.short().to_string(), |name| name.to_string());
                return Err(NodeError::Container(image));
            }
            if !entry.is_complete() {
                return Err(NodeError::Commit(IncrementError::BaseIncomplete(base)));
            }
            inner.sealing().insert(name.clone());
            (overlay, Sealing { all: Arc::clone(&inner.sealing), name: name.clone() })
        };
        // It takes long, and others go on meanwhile.
        self.seal(&overlay, image).await
    }

    pub(super) async fn seal(&self, overlay: &Overlay, image: &ImageName) -> Result<Digest, NodeError> {
        let scratch = self.scratch("commit").await?;
        overlay.seal(scratch.path()).await?;
        let (store, image) = (self.store.clone(), image.clone());
        let publish = move || publish_sealed(&store, scratch, &image).map(|entry| entry.root);
        // Without an answer the runtime is ending, and the scratch folder goes with it.
        let published = tokio::task::spawn_blocking(publish).await;
        published.unwrap_or(Err(IncrementError::Cancelled)).map_err(NodeError::Commit)
    }

    /// Refuses what a client has open, an image is being made of, or a VM has its socket on. The records count too: a
    /// guest whose daemon was killed runs on and waits for the next one, and a `/dev/nbdX` without a keeper is connected
    /// to nobody and has what was written to it all the same.
    pub(super) fn check_idle(&self, inner: &Inner, name: &HostName) -> Result<(), NodeError> {
        let dir = self.store.vm_dir(name);
        let has_socket =
            inner.vms.contains_key(name) || VmSocket::recorded(&dir).map_err(at(&dir))?.is_some();
        if has_socket || inner.sealing().contains(name) {
            return Err(NodeError::InUse(name.clone()));
        }
        if let Some(entry) = Table::live(self.store.dir(), name.as_str())? {
            return Err(NodeError::Attached { name: name.clone(), device: entry.device });
        }
        if inner.overlays.get(name).is_some_and(|open| open.connections() > 0) {
            return Err(NodeError::InUse(name.clone()));
        }
        Ok(())
    }
}

/// Whether neither an image nor an overlay has the name.
fn check_free(store: &Store, name: &HostName) -> Result<(), NodeError> {
    let image = name.as_str().parse::<ImageName>().ok();
    let image = image.map(|image| store.root_of(&image)).transpose()?.flatten();
    if image.is_some() || store.overlay_dir(name).exists() {
        return Err(NodeError::Taken(name.to_string()));
    }
    Ok(())
}
