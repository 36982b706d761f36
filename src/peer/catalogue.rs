//! The images of a node as its peer server finds them: those that are on their way, and those of the store.
//!
//! Other programs change the store while this one serves it: an image may be recorded, or removed. What was opened is
//! known by its manifest's file, and opened anew for the next who asks when that has changed. A connection that has begun
//! with an image stays with what it began with.
//!
//! To open an image is to read all of its digest tree: it is done once for all who ask at once, who wait without a thread,
//! and not again for each of them when the tree is damaged.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bootcache_nbd::disk::BoxFuture;
use bootcache_nbd::{Disk, SharedDisk};

use crate::digest::Digest;
use crate::image::tree::TreeError;
use crate::image_disk::ImageDisk;
use crate::store::{ImageEntry, Store, StoreError};

use super::holding::Holding;
use super::message::{Load, Wanted};
use super::server::{Lack, Provider};

/// Increments upon increments: a bound for a store that is damaged.
const LAYERS_MAX: usize = 64;

/// How often it is looked whether what was opened is still in the store, and after which a tree that was damaged is read
/// again for who asks.
const TIDY_INTERVAL: Duration = Duration::from_secs(10);

/// The same complaint about an image is made again only after this long, however many ask for it.
const COMPLAIN_AGAIN: Duration = Duration::from_secs(60);

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

/// What came of opening an image: none when its tree is damaged.
type Opened = (Stamp, Option<Arc<Holding>>);

/// Finds images for a `super::server::Server`. Opens each image of the store once, when it is first asked for.
pub struct Catalogue {
    store: Store,
    /// Those on their way.
    coming: Mutex<ByRoot>,
    /// Those of the store that were opened.
    opened: Mutex<BTreeMap<Digest, Opened>>,
    /// What was last complained of, and when.
    complaints: Mutex<BTreeMap<Digest, (String, Instant)>>,
    /// Each held while its image is opened.
    turns: Mutex<BTreeMap<Digest, Arc<tokio::sync::Mutex<()>>>>,
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
            complaints: Mutex::default(),
            turns: Mutex::default(),
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
    /// Forgets which were damaged. Blocks.
    pub fn tidy(&self) {
        lock(&self.opened).retain(|_, (_, holding)| holding.is_some());
        lock(&self.complaints).retain(|_, (_, made)| made.elapsed() < COMPLAIN_AGAIN);
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

    /// The image that is meant, by its root. Blocks.
    fn root_of(&self, wanted: &Wanted) -> Option<Digest> {
        match wanted {
            Wanted::Root(root) => Some(*root),
            Wanted::Name(name) => self.store.root_of(name).ok().flatten(),
        }
    }

    /// What is held of image `root`, if nothing has to be opened to know. Blocks for a moment.
    fn known(&self, root: Digest) -> Option<Result<Arc<Holding>, Lack>> {
        if let Some(holding) = lock(&self.coming).get(&root) {
            return Some(Ok(Arc::clone(holding)));
        }
        let Some(stamp) = self.stamp(root) else { return Some(Err(Lack::Absent)) };
        let (opened, holding) = lock(&self.opened).get(&root).cloned()?;
        (opened == stamp).then(|| holding.ok_or(Lack::Unreadable))
    }

    fn turn(&self, root: Digest) -> Arc<tokio::sync::Mutex<()>> {
        let mut turns = lock(&self.turns);
        turns.retain(|_, turn| Arc::strong_count(turn) > 1);
        Arc::clone(turns.entry(root).or_default())
    }

    /// Opens image `root` of the store, and remembers what came of it. Blocks.
    fn open_anew(&self, root: Digest) -> Result<Arc<Holding>, Lack> {
        // Before the manifest is read: what changes in between is seen the next time.
        let stamp = self.stamp(root).ok_or(Lack::Absent)?;
        let opened = self.store.image(root).map_err(OpenError::from).and_then(|entry| self.open(&entry));
        let opened = opened.map(Arc::new);
        // What else is wrong may be over in a moment, and costs little to see.
        if matches!(opened, Ok(_) | Err(OpenError::Tree(TreeError::Damaged { .. }))) {
            lock(&self.opened).insert(root, (stamp, opened.as_ref().ok().cloned()));
        }
        opened.map_err(|error| match error {
            OpenError::Incomplete | OpenError::Store(StoreError::NoSuchRoot(_)) => Lack::Absent,
            error => {
                let error = error.to_string();
                if self.is_new_complaint(root, &error) {
                    tracing::warn!(image = %root.short(), error, "cannot give an image to peers");
                }
                Lack::Unreadable
            }
        })
    }

    /// Whether `error` was not complained of just now.
    fn is_new_complaint(&self, root: Digest, error: &str) -> bool {
        let mut complaints = lock(&self.complaints);
        let known = complaints.get(&root);
        if known.is_some_and(|(known, made)| known == error && made.elapsed() < COMPLAIN_AGAIN) {
            return false;
        }
        complaints.insert(root, (error.to_owned(), Instant::now()));
        true
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
    fn find(self: Arc<Self>, wanted: Wanted) -> BoxFuture<'static, Result<Arc<Holding>, Lack>> {
        Box::pin(async move {
            let catalogue = Arc::clone(&self);
            let look = move || {
                let root = catalogue.root_of(&wanted)?;
                Some((root, catalogue.known(root)))
            };
            let looked = tokio::task::spawn_blocking(look).await.ok().flatten();
            let (root, known) = looked.ok_or(Lack::Absent)?;
            if let Some(found) = known {
                return found;
            }
            let turn = self.turn(root).lock_owned().await;
            let open = move || {
                // Here, since it goes on when nobody waits for it any more.
                let _turn = turn;
                self.known(root).unwrap_or_else(|| self.open_anew(root))
            };
            tokio::task::spawn_blocking(open).await.unwrap_or(Err(Lack::Unreadable))
        })
    }

    fn load(&self) -> Load {
        (self.load)()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::unix::fs::FileExt;

    use rustix::fs::{CWD, FileType, Mode, mknodat};
    use tokio::task::{JoinSet, spawn_blocking};

    use super::*;
    use crate::image::import;

    /// A catalogue of one image, and where that lies.
    fn one_image(dir: &Path) -> (Arc<Catalogue>, ImageEntry) {
        let (store, entry) = import::tests::one_image(dir);
        (Catalogue::new(store, Load::default), entry)
    }

    /// Each who asked held a thread while the first read the tree, and a node whose guests need them has 512.
    #[test]
    fn many_who_ask_for_an_image_that_is_being_opened_take_one_thread() {
        let dir = tempfile::tempdir().unwrap();
        let (catalogue, entry) = one_image(dir.path());
        let tree = entry.dir.join("tree");
        // Whoever opens it waits until there is a writer.
        fs::remove_file(&tree).unwrap();
        mknodat(CWD, &tree, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let runtime = builder.worker_threads(1).max_blocking_threads(4).enable_time().build().unwrap();
        let limit = Duration::from_secs(20);
        let (mut asking, other) = runtime.block_on(async {
            let mut asking = JoinSet::new();
            for _ in 0..20 {
                asking.spawn(Arc::clone(&catalogue).find(Wanted::Root(entry.root)));
            }
            tokio::time::sleep(Duration::from_millis(300)).await;
            let absent = Arc::clone(&catalogue).find(Wanted::Root(Digest::of(b"not here")));
            let other =
                async { (spawn_blocking(|| 7).await.unwrap(), absent.await.unwrap_err() == Lack::Absent) };
            (asking, tokio::time::timeout(limit, other).await)
        });
        let early = asking.try_join_next();
        // Lets the first one go, and the others find a tree that is damaged.
        let writer = File::options().read(true).write(true).open(&tree).unwrap();
        fs::write(dir.path().join("rubbish"), b"rubbish").unwrap();
        fs::rename(dir.path().join("rubbish"), &tree).unwrap();
        drop(writer);
        let rest = runtime.block_on(async {
            let all = async {
                while let Some(found) = asking.join_next().await {
                    assert_eq!(found.unwrap().unwrap_err(), Lack::Unreadable);
                }
            };
            tokio::time::timeout(limit, all).await
        });
        runtime.shutdown_background();
        assert!(early.is_none(), "nobody opened it");
        assert_eq!(other.expect("there are threads left"), (7, true));
        rest.expect("all are answered");
    }

    #[tokio::test]
    async fn a_tree_that_is_damaged_is_not_read_again_for_each_who_asks() {
        let dir = tempfile::tempdir().unwrap();
        let (catalogue, entry) = one_image(dir.path());
        let find = async || Arc::clone(&catalogue).find(Wanted::Root(entry.root)).await.is_ok();
        let tree = File::options().read(true).write(true).open(entry.dir.join("tree")).unwrap();
        let mut right = [0];
        tree.read_exact_at(&mut right, 4096).unwrap();
        tree.write_all_at(&[!right[0]], 4096).unwrap();
        assert!(!find().await);
        tree.write_all_at(&right, 4096).unwrap();
        assert!(!find().await, "it was read again");
        catalogue.tidy();
        assert!(find().await);
        // An image that was replaced is another one at once.
        tree.write_all_at(&[!right[0]], 4096).unwrap();
        let manifest = entry.dir.join("manifest");
        let touch = || {
            let bytes = fs::read(&manifest).unwrap();
            crate::store::write_atomic(&manifest, &bytes).unwrap();
        };
        touch();
        assert!(!find().await);
        tree.write_all_at(&right, 4096).unwrap();
        touch();
        assert!(find().await);
    }

    /// It said that it has no such image, and a line of the log for each who asked told why.
    #[tokio::test]
    async fn an_image_that_cannot_be_read_is_not_absent_and_is_complained_of_once() {
        let dir = tempfile::tempdir().unwrap();
        let (catalogue, entry) = one_image(dir.path());
        let find = async || Arc::clone(&catalogue).find(Wanted::Root(entry.root)).await;
        let (tree, away) = (entry.dir.join("tree"), entry.dir.join("away"));
        fs::rename(&tree, &away).unwrap();
        // It opens, and every read of it fails.
        fs::create_dir(&tree).unwrap();
        for _ in 0..3 {
            assert_eq!(find().await.unwrap_err(), Lack::Unreadable);
        }
        let (complaint, _) = lock(&catalogue.complaints).get(&entry.root).cloned().unwrap();
        assert!(!catalogue.is_new_complaint(entry.root, &complaint), "{complaint}");
        assert!(catalogue.is_new_complaint(entry.root, "another one"));
        assert!(catalogue.is_new_complaint(Digest::of(b"another image"), "another one"));
        fs::remove_dir(&tree).unwrap();
        fs::rename(&away, &tree).unwrap();
        find().await.unwrap();
    }
}
