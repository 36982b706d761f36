//! The images of a node as its peer server finds them: those that are on their way, and those of the store.
//!
//! Other programs change the store while this one serves it: an image may be recorded, or removed. What was opened is
//! known by its manifest's file, and opened anew for the next who asks when that has changed. A connection that has begun
//! with an image stays with what it began with.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bootcache_nbd::{Disk, SharedDisk};

use crate::digest::Digest;
use crate::image::tree::TreeError;
use crate::image_disk::ImageDisk;
use crate::store::{ImageEntry, Store, StoreError};

use super::holding::Holding;
use super::message::{Load, Wanted};
use super::server::Provider;

/// Increments upon increments: a bound for a store that is damaged.
const LAYERS_MAX: usize = 64;

/// How often it is looked whether what was opened is still in the store.
const TIDY_INTERVAL: Duration = Duration::from_secs(10);

/// Why an image of the store cannot be served.
#[derive(Debug, thiserror::Error)]
enum OpenError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Tree(#[from] TreeError),
    #[error(transparent)]
    Overlay(#[from] crate::overlay::OverlayError),
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("it is still incomplete, and nothing fetches it")]
    Incomplete,
    #[error("too many images build on each other")]
    Layers,
}

type ByRoot = BTreeMap<Digest, Arc<Holding>>;

/// Which file a manifest is: its inode, and its last change in ns. Manifests are replaced, never written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp(u64, i128);

/// Finds images for a `super::server::Server`. Opens each image of the store once, when it is first asked for.
pub struct Catalogue {
    store: Store,
    /// Those on their way.
    coming: Mutex<ByRoot>,
    /// Those of the store that were opened.
    opened: Mutex<BTreeMap<Digest, (Stamp, Arc<Holding>)>>,
    /// Held while an image is opened, so that many who ask at once open it once.
    opening: Mutex<()>,
    load: Box<dyn Fn() -> Load + Send + Sync>,
}

impl std::fmt::Debug for Catalogue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Catalogue").field("coming", &self.coming).finish_non_exhaustive()
    }
}

impl Catalogue {
    /// The images of `store`; `load` samples this node's load.
    pub fn new(store: Store, load: impl Fn() -> Load + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            store,
            coming: Mutex::default(),
            opened: Mutex::default(),
            opening: Mutex::new(()),
            load: Box::new(load),
        })
    }

    /// Offers an image that is on its way.
    pub fn offer(&self, holding: Arc<Holding>) {
        lock(&self.coming).insert(holding.root(), holding);
    }

    /// The image is no longer on its way: all of it is in the store, or it is to be removed.
    pub fn withdraw(&self, root: Digest) {
        lock(&self.coming).remove(&root);
    }

    /// Tidies up every now and then; never ends.
    pub async fn keep_tidy(self: Arc<Self>) {
        loop {
            tokio::time::sleep(TIDY_INTERVAL).await;
            let catalogue = Arc::clone(&self);
            // It only takes locks and looks at files.
            let _ = tokio::task::spawn_blocking(move || catalogue.tidy()).await;
        }
    }

    /// Lets go of images that were removed from the store, or changed: their space is free when nobody is being sent them.
    /// Blocks.
    pub fn tidy(&self) {
        let opened: Vec<(Digest, Stamp)> =
            lock(&self.opened).iter().map(|(root, (stamp, _))| (*root, *stamp)).collect();
        for (root, stamp) in opened {
            if self.stamp(root) != Some(stamp) {
                lock(&self.opened).remove(&root);
            }
        }
    }

    fn stamp(&self, root: Digest) -> Option<Stamp> {
        let metadata = std::fs::metadata(self.store.image_dir(root).join("manifest")).ok()?;
        let changed = i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec());
        Some(Stamp(metadata.ino(), changed))
    }

    /// What is held of image `root` and still is as it was when it was opened.
    fn known(&self, root: Digest) -> Option<Arc<Holding>> {
        if let Some(holding) = lock(&self.coming).get(&root) {
            return Some(Arc::clone(holding));
        }
        let (stamp, holding) = lock(&self.opened).get(&root).cloned()?;
        (self.stamp(root) == Some(stamp)).then_some(holding)
    }

    fn open(&self, entry: &ImageEntry) -> Result<Holding, OpenError> {
        if !entry.is_complete() {
            return Err(OpenError::Incomplete);
        }
        let disk = self.disk(entry, 0)?;
        let published = !is_pulled(&entry.dir);
        Ok(Holding::open_complete(&entry.dir, entry.manifest.clone(), disk, published)?)
    }

    fn disk(&self, entry: &ImageEntry, depth: usize) -> Result<SharedDisk, OpenError> {
        if depth == LAYERS_MAX {
            return Err(OpenError::Layers);
        }
        let disk = match entry.below() {
            None => ImageDisk::open(&entry.disk_path())?,
            Some(base) => {
                let below = self.disk(&self.store.image(base)?, depth + 1)?;
                ImageDisk::open_increment(&entry.index_path(), &entry.disk_path(), below, base)?
            }
        };
        entry.check_length(disk.size())?;
        Ok(Arc::new(disk))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether the image in the store folder `dir` came from a peer.
fn is_pulled(dir: &Path) -> bool {
    dir.join("pulled").exists()
}

impl Provider for Catalogue {
    fn find(&self, wanted: &Wanted) -> Option<Arc<Holding>> {
        let root = match wanted {
            Wanted::Root(root) => *root,
            Wanted::Name(name) => self.store.root_of(name).ok().flatten()?,
        };
        if let Some(holding) = self.known(root) {
            return Some(holding);
        }
        let _opening = lock(&self.opening);
        if let Some(holding) = self.known(root) {
            return Some(holding);
        }
        // Before the manifest is read: what changes in between is seen the next time.
        let stamp = self.stamp(root)?;
        let entry = self.store.image(root).ok()?;
        match self.open(&entry) {
            Ok(holding) => {
                let holding = Arc::new(holding);
                lock(&self.opened).insert(root, (stamp, Arc::clone(&holding)));
                Some(holding)
            }
            Err(OpenError::Incomplete) => None,
            Err(error) => {
                tracing::warn!(image = %root.short(), %error, "cannot give an image to peers");
                None
            }
        }
    }

    fn load(&self) -> Load {
        (self.load)()
    }
}
