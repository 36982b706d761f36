//! The images of a node as its peer server finds them: those that are on their way, and those of the store.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use bootcache_nbd::disk::SharedDisk;

use crate::digest::Digest;
use crate::image::tree::TreeError;
use crate::image_disk::ImageDisk;
use crate::store::{ImageEntry, Store, StoreError};

use super::holding::{Holding, Holdings};
use super::message::{Load, Wanted};
use super::server::Provider;

/// Increments upon increments: a bound for a store that is damaged.
const LAYERS_MAX: usize = 64;

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

/// Finds images for a `super::server::Server`. Opens each image of the store once, when it is first asked for.
pub struct Catalogue {
    store: Store,
    holdings: Holdings,
    /// Held while an image is opened, so that many who ask at once open it once.
    opening: Mutex<()>,
    load: Box<dyn Fn() -> Load + Send + Sync>,
}

impl std::fmt::Debug for Catalogue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Catalogue").field("holdings", &self.holdings).finish_non_exhaustive()
    }
}

impl Catalogue {
    /// The images of `store`; `load` samples this node's load.
    pub fn new(store: Store, load: impl Fn() -> Load + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self { store, holdings: Holdings::default(), opening: Mutex::new(()), load: Box::new(load) })
    }

    /// Offers an image that is on its way.
    pub fn offer(&self, holding: Arc<Holding>) {
        self.holdings.insert(holding);
    }

    /// Offers an image no longer, so that it can be removed.
    pub fn withdraw(&self, root: Digest) {
        self.holdings.remove(root);
    }

    fn open(&self, entry: &ImageEntry) -> Result<Holding, OpenError> {
        if !entry.is_complete() {
            return Err(OpenError::Incomplete);
        }
        let disk = self.disk(entry, 0)?;
        let origin = !is_pulled(&entry.dir);
        Ok(Holding::open_complete(&entry.dir, entry.manifest.clone(), disk)?.published(origin))
    }

    fn disk(&self, entry: &ImageEntry, depth: usize) -> Result<SharedDisk, OpenError> {
        if depth == LAYERS_MAX {
            return Err(OpenError::Layers);
        }
        let increment = entry.index_path().exists();
        match entry.manifest.base.filter(|_| increment) {
            None => Ok(Arc::new(ImageDisk::open(&entry.disk_path())?)),
            Some(base) => {
                let below = self.disk(&self.store.image(base)?, depth + 1)?;
                let (index, disk) = (entry.index_path(), entry.disk_path());
                Ok(Arc::new(ImageDisk::open_increment(&index, &disk, below, base)?))
            }
        }
    }
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
        if let Some(holding) = self.holdings.get(root) {
            return Some(holding);
        }
        let _opening = self.opening.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(holding) = self.holdings.get(root) {
            return Some(holding);
        }
        let entry = self.store.image(root).ok()?;
        match self.open(&entry) {
            Ok(holding) => {
                let holding = Arc::new(holding);
                self.holdings.insert(Arc::clone(&holding));
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
