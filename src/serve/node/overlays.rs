//! The overlays of a node: opened when they are needed, listed without, removed and sealed while nobody uses them.

use std::fs;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use bootcache_nbd::{Export, ExportStats, SharedDisk};
use tokio_util::sync::CancellationToken;

use super::{Node, NodeError, Open, OpenImage, Turn, at, lock};
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
    open: Arc<Mutex<Open>>,
    name: HostName,
}

impl Drop for Sealing {
    fn drop(&mut self) {
        lock(&self.open).sealing.remove(&self.name);
    }
}

impl Node {
    fn overlay(&self, name: &HostName) -> Option<Arc<OpenOverlay>> {
        lock(&self.open).overlays.get(name).cloned()
    }

    /// The overlay whose turn it is, which is opened unless it is open.
    async fn open_overlay(&self, turn: &Turn) -> Result<Arc<OpenOverlay>, NodeError> {
        let name = turn.name();
        if let Some(open) = self.overlay(name) {
            return Ok(open);
        }
        let dir = self.store.overlay_dir(name);
        if !dir.exists() {
            return Err(NodeError::NoOverlay(name.clone()));
        }
        let base = OverlayMeta::read(&dir)?.base;
        let image = self.open_image(base).await?;
        let cache = self.arrivals.get(base).map(|engine| Arc::clone(engine.cache()));
        let reader = cache.map(|cache| Arc::new(Reader::new(cache)));
        let below = reader
            .as_ref()
            .map_or_else(|| Arc::clone(&image.disk), |reader| Arc::clone(reader) as SharedDisk);
        let (turn, all) = (turn.clone(), Arc::clone(&self.open));
        self.apart(move || {
            let overlay = Overlay::open(&dir, below, base)?;
            let (closed, stats) = (CancellationToken::new(), Arc::default());
            let open = Arc::new(OpenOverlay { overlay, base, closed, stats, reader, _image: image });
            lock(&all).overlays.insert(turn.name().clone(), Arc::clone(&open));
            Ok(open)
        })
        .await
    }

    /// The export of the overlay whose turn it is.
    pub(super) async fn overlay_export(&self, turn: &Turn) -> Result<Export, NodeError> {
        let name = turn.name();
        if lock(&self.open).sealing.contains(name) {
            return Err(NodeError::InUse(name.clone()));
        }
        let open = self.open_overlay(turn).await?;
        Ok(Export {
            name: name.to_string(),
            description: "overlay, writable".to_owned(),
            disk: Arc::new(open.overlay.clone()),
            closed: open.closed.clone(),
            stats: Arc::clone(&open.stats),
        })
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
        check_free(&self.store, name)?;
        let held = self.open_image(entry.root).await?;
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
        self.overlay_info(name)
    }

    pub(super) fn overlays(&self) -> Result<Vec<OverlayInfo>, NodeError> {
        let mut infos = Vec::new();
        for name in self.overlay_names()? {
            match self.overlay_info(&name) {
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
    pub(super) fn overlay_info(&self, name: &HostName) -> Result<OverlayInfo, NodeError> {
        if let Some(open) = self.overlay(name) {
            return self.open_info(name, &open);
        }
        let dir = self.store.overlay_dir(name);
        if !dir.exists() {
            return Err(NodeError::NoOverlay(name.clone()));
        }
        let (header, usage) = Overlay::stored(&dir)?;
        Ok(OverlayInfo {
            image: self.name_of(header.base)?,
            size: header.size,
            data: usage.data_blocks * BLOCK_SIZE,
            ..OverlayInfo::new(name.clone(), Some(header.base))
        })
    }

    pub(super) fn open_info(&self, name: &HostName, open: &OpenOverlay) -> Result<OverlayInfo, NodeError> {
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
        let check = |turn: &Turn| match dir.exists() {
            true => self.check_idle(turn),
            false => Err(NodeError::NoOverlay(name.clone())),
        };
        check(&self.turns.turn(name).await)?;
        let store = self.store.clone();
        let change = self.changing(move || Ok(store.change(|_| ())?)).await?;
        let turn = self.turns.turn(name).await;
        check(&turn)?;
        let (store, all) = (self.store.clone(), Arc::clone(&self.open));
        self.apart(move || {
            // Moved first, so that a crash leaves no half of an overlay, and the next start removes the rest.
            let Some(grave) = store.bury(&dir, &change)? else {
                return Err(NodeError::InUse(turn.name().clone()));
            };
            let open = lock(&all).overlays.remove(turn.name());
            drop((change, turn)); // others need not wait for the rest
            if let Some(open) = &open {
                open.closed.cancel();
            }
            // Before the answer: after a power loss a new overlay of the name must not be the old one.
            let overlays = store.dir().join("overlays");
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
        let turn = self.turns.turn(name).await;
        let open = self.open_overlay(&turn).await?;
        self.check_idle(&turn)?;
        let entry = self.store.image(open.base)?;
        if entry.manifest.kind == ImageKind::Container {
            let image = self.name_of(open.base)?;
            let image = image.map_or_else(|| open.base.short().to_string(), |name| name.to_string());
            return Err(NodeError::Container(image));
        }
        if !entry.is_complete() {
            return Err(NodeError::Commit(IncrementError::BaseIncomplete(open.base)));
        }
        lock(&self.open).sealing.insert(name.clone());
        let _sealing = Sealing { open: Arc::clone(&self.open), name: name.clone() };
        let overlay = open.overlay.clone();
        drop((turn, open));
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
    fn check_idle(&self, turn: &Turn) -> Result<(), NodeError> {
        let (name, dir) = (turn.name(), self.store.vm_dir(turn.name()));
        let has_record = VmSocket::recorded(&dir).map_err(at(&dir))?.is_some();
        let is_used = {
            let open = lock(&self.open);
            let connected = open.overlays.get(name).is_some_and(|overlay| overlay.connections() > 0);
            open.vms.contains_key(name) || open.sealing.contains(name) || connected
        };
        if let Some(entry) = Table::live(self.store.dir(), name.as_str())? {
            return Err(NodeError::Attached { name: name.clone(), device: entry.device });
        }
        if has_record || is_used {
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
