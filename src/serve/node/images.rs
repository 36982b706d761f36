//! The images of a node: opened when they are needed, and removed, of which its own transfer may be the only user.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use bootcache_nbd::SharedDisk;

use super::{Node, NodeError, at};
use crate::digest::Digest;
use crate::image_disk::ImageDisk;
use crate::name::ImageName;
use crate::store::remove::Removed;
use crate::store::{Hold, Store, StoreError};
use crate::transfer::Arrivals;
use crate::transfer::arrivals::TakenOut;

/// Increments on increments that are opened: more than people make, and few enough to open one by one.
pub(super) const BASE_DEPTH_MAX: usize = 64;
/// How long is waited for an image that is being taken up after a restart.
const PATIENCE: Duration = Duration::from_secs(60);

/// An image that is open: its disk, and a hold that keeps it from being removed.
pub(in crate::serve) struct OpenImage {
    pub(super) disk: SharedDisk,
    _hold: Hold,
    /// Keeps the bases open, so that all increments of a base share one disk.
    _base: Option<Arc<Self>>,
}

/// The owner of a node's open images: each is open once, for as long as somebody has it.
pub(super) struct Images {
    store: Store,
    arrivals: Arc<Arrivals>,
    open: Mutex<HashMap<Digest, Weak<OpenImage>>>,
}

impl Images {
    pub(super) fn new(store: Store, arrivals: Arc<Arrivals>) -> Self {
        Self { store, arrivals, open: Mutex::default() }
    }

    fn locked(&self) -> MutexGuard<'_, HashMap<Digest, Weak<OpenImage>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, root: Digest) -> Option<Arc<OpenImage>> {
        self.locked().get(&root).and_then(Weak::upgrade)
    }

    /// Whether somebody has the image.
    pub(super) fn is_open(&self, root: Digest) -> bool {
        self.get(root).is_some()
    }

    /// The image, which is opened unless it is open, `depth` images above the one that is wanted. Blocks.
    fn open(&self, root: Digest, depth: usize) -> Result<Arc<OpenImage>, NodeError> {
        if let Some(open) = self.get(root) {
            return Ok(open);
        }
        if depth == BASE_DEPTH_MAX {
            return Err(NodeError::TooDeep(root));
        }
        let hold = self.store.hold(root)?;
        let entry = self.store.image(root)?;
        let store = self.store.clone();
        // Nobody waits for it: the disk may be slow, and a lost one only brings the image's eviction forward.
        tokio::task::spawn_blocking(move || {
            if let Err(error) = store.touch(root) {
                tracing::warn!("the image counts as unused: {error}");
            }
        });
        if !entry.is_complete() {
            // Under the lock: who takes the transfer out sees that the image is open, or takes it out before.
            let mut images = self.locked();
            let engine = self.arrivals.get(root).ok_or(NodeError::Incomplete(root))?;
            return Ok(insert(
                &mut images,
                root,
                OpenImage { disk: engine.disk(), _hold: hold, _base: None },
            ));
        }
        let (disk, base): (SharedDisk, _) = match entry.below() {
            None => (Arc::new(ImageDisk::open(&entry.disk_path()).map_err(at(&entry.disk_path()))?), None),
            Some(below) => {
                let base = self.open(below, depth + 1)?;
                let (index, disk) = (entry.index_path(), entry.disk_path());
                let disk = ImageDisk::open_increment(&index, &disk, Arc::clone(&base.disk), below)?;
                (Arc::new(disk), Some(base))
            }
        };
        entry.check_length(disk.size())?;
        Ok(insert(&mut self.locked(), root, OpenImage { disk, _hold: hold, _base: base }))
    }

    /// Takes the transfer of an image out that nobody has open.
    fn take_out(&self, root: Digest) -> Result<Option<TakenOut>, StoreError> {
        let images = self.locked();
        if images.get(&root).is_some_and(|image| image.strong_count() > 0) {
            return Err(StoreError::InUse(root));
        }
        Ok(self.arrivals.take_out(root))
    }
}

/// `opened`, unless somebody else has opened the image meanwhile.
fn insert(images: &mut HashMap<Digest, Weak<OpenImage>>, root: Digest, opened: OpenImage) -> Arc<OpenImage> {
    if let Some(open) = images.get(&root).and_then(Weak::upgrade) {
        return open;
    }
    let open = Arc::new(opened);
    images.retain(|_, image| image.strong_count() > 0);
    images.insert(root, Arc::downgrade(&open));
    open
}

impl Node {
    /// Image `root`, which is opened unless it is open. One that is still to be taken up after a restart is waited for.
    pub(super) async fn open_image(&self, root: Digest) -> Result<Arc<OpenImage>, NodeError> {
        if let Some(open) = self.images.get(root) {
            return Ok(open);
        }
        loop {
            let images = Arc::clone(&self.images);
            match self.apart(move || images.open(root, 0)).await {
                Err(NodeError::Incomplete(lacking)) => {
                    let resumed = tokio::time::timeout(PATIENCE, self.arrivals.resumed(lacking)).await;
                    resumed.map_err(|_| NodeError::Resuming(lacking))?;
                    if self.arrivals.get(lacking).is_none() {
                        return Err(NodeError::Incomplete(lacking));
                    }
                }
                opened => return opened,
            }
        }
    }

    /// Removes `name`. Is it the last name of an image that is on its way, and nobody uses that, then its transfer ends
    /// first; it goes on when the image cannot be removed all the same.
    pub(super) async fn remove_image(&self, name: &ImageName) -> Result<Removed, NodeError> {
        let root = self.store.root_of(name)?.ok_or_else(|| StoreError::NoSuchImage(name.clone()))?;
        let nobody_begins = self.arrivals.keep_away(root).await;
        let (store, image) = (self.store.clone(), name.clone());
        let mut ended = false;
        if self.changing(move || Ok(goes(&store, &image, root)?)).await?
            && let Some(taken) = self.images.take_out(root)?
        {
            taken.end().await;
            ended = true;
        }
        let (store, image) = (self.store.clone(), name.clone());
        let removed = self.changing(move || Ok(store.remove(&image)?)).await;
        drop(nobody_begins);
        if ended && removed.is_err() {
            self.arrivals.go_on(root).await;
        }
        removed
    }
}

/// Whether image `root` goes with `name`: it has no other, and nothing builds on it.
fn goes(store: &Store, name: &ImageName, root: Digest) -> Result<bool, StoreError> {
    if store.names()?.iter().any(|(other, other_root)| other != name && *other_root == root) {
        return Ok(false);
    }
    match store.dependent_of(root)? {
        Some(dependent) => Err(StoreError::HasDependent { root, dependent }),
        None => Ok(true),
    }
}
