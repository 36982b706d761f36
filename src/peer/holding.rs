//! What a node holds of one image: its manifest, blocks, digest tree and boot frames, whole or still arriving.
//!
//! The transfer engine adds to it what it has verified, the peer server gives it to others from the first frame on.
//! Both see one thing, so that what is served is what was verified.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use bootcache_nbd::disk::{Attempt, SharedDisk};
use roaring::RoaringBitmap;
use tokio::sync::futures::Notified;
use tokio::sync::{Notify, broadcast};

use crate::block::{Extent, bytes_in_block};
use crate::boot_cache::{BootCache, BootCacheError, Heads};
use crate::digest::Digest;
use crate::image::manifest::Manifest;
use crate::image::page::{LastPage, PAGE_BLOCKS, Page};
use crate::image::partial_tree::{PartialTree, Verdict};
use crate::image::tree::{Tree, TreeError};
use crate::local_cache::LocalCache;

use super::message::{Have, Peer};

/// The digest tree as far as it is known.
#[derive(Debug)]
pub enum KnownTree {
    /// All of it.
    Whole(Tree),
    /// What has come so far.
    Partial(PartialTree),
}

impl KnownTree {
    /// Whether `data` is the content of `block`. `last` is of this tree alone.
    ///
    /// # Errors
    /// As of [`KnownTree::page`].
    pub fn verify(&self, block: u64, data: &[u8], last: &mut LastPage) -> Result<Verdict, TreeError> {
        match self {
            Self::Whole(tree) if tree.verify_block(block, data, last)? => Ok(Verdict::Good),
            Self::Whole(_) => Ok(Verdict::Bad),
            Self::Partial(tree) => tree.verify_block(block, data, last),
        }
    }

    /// The group digests.
    pub fn top(&self) -> &[u8] {
        match self {
            Self::Whole(tree) => tree.top_bytes(),
            Self::Partial(tree) => tree.top_bytes(),
        }
    }

    /// The page digests of `group`, if it exists and is known.
    ///
    /// # Errors
    /// As of [`KnownTree::page`].
    pub fn group(&self, group: u64) -> Result<Option<Vec<u8>>, TreeError> {
        match self {
            Self::Whole(tree) => (group < tree.groups()).then(|| tree.group_bytes(group)).transpose(),
            Self::Partial(tree) => tree.group_bytes(group),
        }
    }

    /// Page `page`, if it exists and is known.
    ///
    /// # Errors
    /// [`TreeError::Io`] when the file cannot be read, [`TreeError::Damaged`] when it has become shorter.
    pub fn page(&self, page: u64) -> Result<Option<Page>, TreeError> {
        match self {
            Self::Whole(tree) => (page < tree.pages()).then(|| tree.page(page)).transpose(),
            Self::Partial(tree) => tree.page(page),
        }
    }

    /// Whether the digests of the blocks of `page` are known.
    pub fn knows_page(&self, page: u64) -> bool {
        match self {
            Self::Whole(tree) => page < tree.pages(),
            Self::Partial(tree) => tree.knows_page(page),
        }
    }

    /// Has `page` come again, since it cannot be read here; false for a tree of which nothing comes.
    pub fn forget_page(&self, page: u64) -> bool {
        match self {
            Self::Whole(_) => false,
            Self::Partial(tree) => {
                tree.forget_page(page);
                true
            }
        }
    }

    /// Whether the page digests of `group` are known.
    pub fn knows_group(&self, group: u64) -> bool {
        match self {
            Self::Whole(tree) => group < tree.groups(),
            Self::Partial(tree) => tree.knows_group(group),
        }
    }

    /// Whether `block` is all zeroes; none when that is not known.
    ///
    /// # Errors
    /// As of [`KnownTree::page`].
    pub fn is_zero(&self, block: u64) -> Result<Option<bool>, TreeError> {
        match self {
            Self::Whole(tree) => tree.is_zero(block).map(Some),
            Self::Partial(tree) => tree.is_zero(block),
        }
    }

    /// The digest of `block`; none when it is all zeroes or not known.
    ///
    /// # Errors
    /// As of [`KnownTree::page`].
    pub fn block_digest(&self, block: u64) -> Result<Option<Digest>, TreeError> {
        match self {
            Self::Whole(tree) => tree.block_digest(block),
            Self::Partial(tree) => tree.block_digest(block),
        }
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        match self {
            Self::Whole(tree) => tree.pages(),
            Self::Partial(tree) => tree.pages(),
        }
    }

    /// Number of groups.
    pub fn groups(&self) -> u64 {
        match self {
            Self::Whole(tree) => tree.groups(),
            Self::Partial(tree) => tree.groups(),
        }
    }

    /// Whether all of it is known.
    pub fn is_complete(&self) -> bool {
        match self {
            Self::Whole(_) => true,
            Self::Partial(tree) => tree.is_complete(),
        }
    }

    /// Takes what a peer sent of it.
    ///
    /// # Errors
    /// [`TreeError::Malformed`] when it is wrong, [`TreeError::Io`].
    pub fn add_group(&self, group: u64, bytes: &[u8]) -> Result<(), TreeError> {
        match self {
            Self::Whole(_) => Ok(()),
            Self::Partial(tree) => tree.add_group(group, bytes),
        }
    }

    /// Takes what a peer sent of it.
    ///
    /// # Errors
    /// [`TreeError::Malformed`] when it is wrong, [`TreeError::Io`].
    pub fn add_page(&self, page: u64, bytes: &[u8]) -> Result<(), TreeError> {
        match self {
            Self::Whole(_) => Ok(()),
            Self::Partial(tree) => tree.add_page(page, bytes),
        }
    }

    /// Makes what has come durable.
    ///
    /// # Errors
    /// [`TreeError::Io`].
    pub fn sync(&self) -> Result<(), TreeError> {
        match self {
            Self::Whole(_) => Ok(()),
            Self::Partial(tree) => tree.sync(),
        }
    }
}

/// The boot cache as far as it is here. Owned by a [`Holding`].
#[derive(Debug)]
pub struct Frames {
    boot: BootCache,
    here: Vec<AtomicBool>,
    /// Frames that will not come: their blocks came another way.
    skipped: Vec<AtomicBool>,
    /// All frames below this one are here.
    contiguous: AtomicU32,
    /// All frames below this one are here or skipped.
    passed: AtomicU32,
    arrived: Notify,
    /// Nothing more will come: who waits for a frame is told so.
    ended: AtomicBool,
}

impl Frames {
    /// A boot cache of which those frames are here that verify; reads all of it.
    ///
    /// # Errors
    /// [`BootCacheError::Io`].
    pub fn check(boot: BootCache) -> Result<Self, BootCacheError> {
        let here = boot.present_frames()?;
        Ok(Self::new(boot, here))
    }

    /// A boot cache of which all frames are here, or none.
    pub fn unchecked(boot: BootCache, all: bool) -> Self {
        let here = vec![all; boot.heads().frames().len()];
        Self::new(boot, here)
    }

    fn new(boot: BootCache, here: Vec<bool>) -> Self {
        let frames = Self {
            boot,
            skipped: here.iter().map(|_| AtomicBool::new(false)).collect(),
            here: here.into_iter().map(AtomicBool::new).collect(),
            contiguous: AtomicU32::new(0),
            passed: AtomicU32::new(0),
            arrived: Notify::new(),
            ended: AtomicBool::new(false),
        };
        frames.advance();
        frames
    }

    fn advance(&self) {
        let step = |mark: &AtomicU32, is_done: &dyn Fn(usize) -> bool| {
            let from = mark.load(Ordering::Acquire) as usize;
            let run = (from..self.count()).take_while(|index| is_done(*index)).count();
            let until = u32::try_from(from + run).expect("a boot cache has fewer than 2^32 frames");
            mark.fetch_max(until, Ordering::AcqRel);
        };
        step(&self.contiguous, &|index| self.has(index));
        step(&self.passed, &|index| self.has(index) || self.is_skipped(index));
    }

    /// The heads.
    pub fn heads(&self) -> &Heads {
        self.boot.heads()
    }

    /// The heads as they are sent.
    pub fn heads_bytes(&self) -> &[u8] {
        self.boot.heads_bytes()
    }

    /// Number of frames, here or not.
    pub fn count(&self) -> usize {
        self.here.len()
    }

    /// Compressed bytes of frame `index`; 0 when there is none.
    pub fn length(&self, index: usize) -> u64 {
        self.heads().frames().get(index).map_or(0, |frame| u64::from(frame.length))
    }

    /// Frames without a gap from the first: what others can have from here.
    pub fn contiguous(&self) -> u32 {
        self.contiguous.load(Ordering::Acquire)
    }

    /// Frames without a gap from the first, those that were skipped among them: how far the stream is.
    pub fn passed(&self) -> u32 {
        self.passed.load(Ordering::Acquire)
    }

    /// Says that frame `index` will not come, because its blocks are here without it.
    pub fn skip(&self, index: usize) {
        self.skipped[index].store(true, Ordering::Release);
        self.advance();
        self.arrived.notify_waiters();
    }

    fn is_skipped(&self, index: usize) -> bool {
        self.skipped.get(index).is_some_and(|skipped| skipped.load(Ordering::Acquire))
    }

    /// Whether frame `index` is here.
    pub fn has(&self, index: usize) -> bool {
        self.here.get(index).is_some_and(|here| here.load(Ordering::Acquire))
    }

    /// Keeps frame `index`, whose digest is checked again.
    ///
    /// # Errors
    /// [`BootCacheError::BadFrame`], [`BootCacheError::Io`].
    pub fn insert(&self, index: usize, bytes: &[u8]) -> Result<(), BootCacheError> {
        self.boot.write_frame(index, bytes)?;
        self.here[index].store(true, Ordering::Release);
        self.advance();
        self.arrived.notify_waiters();
        Ok(())
    }

    /// Frame `index`, checked.
    ///
    /// # Errors
    /// [`BootCacheError::BadFrame`], [`BootCacheError::Io`].
    pub fn read(&self, index: usize) -> Result<Vec<u8>, BootCacheError> {
        self.boot.read_frame(index)
    }

    /// Says that no more frames will come.
    pub fn end(&self) {
        self.ended.store(true, Ordering::Release);
        self.arrived.notify_waiters();
    }

    /// Waits until frame `index` is here; false when it will not come.
    pub async fn wait(&self, index: usize) -> bool {
        loop {
            let mut arrived = std::pin::pin!(self.arrived.notified());
            arrived.as_mut().enable();
            if self.has(index) {
                return true;
            }
            if index >= self.count() || self.is_skipped(index) || self.ended.load(Ordering::Acquire) {
                return false;
            }
            arrived.await;
        }
    }
}

/// Where blocks are read from, to be given to peers.
#[derive(Clone)]
pub enum Blocks {
    /// A copy that may still be incomplete.
    Cache(Arc<LocalCache>),
    /// A whole image: an increment over its base, or a disk in the store.
    Disk(SharedDisk),
}

/// What a node holds of one image; see the module's documentation.
pub struct Holding {
    /// The image's manifest.
    pub manifest: Manifest,
    /// Its blocks.
    pub blocks: Blocks,
    /// Its digest tree.
    pub tree: KnownTree,
    /// Its boot cache, once there is one; set when the heads have come.
    frames: OnceLock<Frames>,
    /// The heads have come, or never will.
    frames_set: Notify,
    origin: bool,
    /// Pages all of whose blocks are here, in order of coming; grows with `note_page`.
    pages: Mutex<RoaringBitmap>,
    /// Goes up with every frame, page or change of place; waking for each would cost more than it tells.
    changes: AtomicU64,
    /// Nodes that came to this one for the image, and serve it too.
    comers: broadcast::Sender<Peer>,
}

/// Comers that a listener may be behind before it misses some.
const COMERS_BEHIND: usize = 64;

impl std::fmt::Debug for Blocks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cache(cache) => cache.fmt(f),
            Self::Disk(_) => f.write_str("Disk"),
        }
    }
}

impl std::fmt::Debug for Holding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Holding").field("root", &self.manifest.root.short()).finish_non_exhaustive()
    }
}

impl Holding {
    /// What is held of the image of `manifest`; `frames` of its boot cache, if they are known already.
    pub fn new(manifest: Manifest, blocks: Blocks, tree: KnownTree, frames: Option<Frames>) -> Self {
        let cell = OnceLock::new();
        if let Some(frames) = frames {
            cell.set(frames).expect("the cell is new");
        }
        let holding = Self {
            manifest,
            blocks,
            tree,
            frames: cell,
            frames_set: Notify::new(),
            origin: false,
            pages: Mutex::new(RoaringBitmap::new()),
            changes: AtomicU64::new(0),
            comers: broadcast::Sender::new(COMERS_BEHIND),
        };
        for page in 0..holding.tree.pages() {
            holding.note_page(page);
        }
        holding
    }

    /// A complete image in the folder `dir` of a store, whose disk is `disk`; whether it was `published` on this node, and
    /// not fetched from a peer. Reads the tree, and the boot cache as far as that has to be.
    ///
    /// # Errors
    /// When the tree cannot be used. Without a sound boot cache, the rest is served, as an image that has none.
    pub fn open_complete(
        dir: &Path,
        mut manifest: Manifest,
        disk: SharedDisk,
        published: bool,
    ) -> Result<Self, TreeError> {
        let tree = Tree::open(&dir.join("tree"), Some(manifest.root))?;
        let open = |digest| {
            let boot = BootCache::open(&dir.join("boot"), manifest.root)?;
            if boot.heads().size() != manifest.size {
                return Err(BootCacheError::OtherImage { found: manifest.root });
            }
            if boot.heads_digest() != digest {
                return Err(BootCacheError::Damaged("its heads are not those of the manifest"));
            }
            match published {
                // Each frame is checked when it is read: to read them all now would keep the first who asks waiting.
                true => Ok(Frames::unchecked(boot, true)),
                // Some may never have come.
                false => Frames::check(boot),
            }
        };
        let frames = manifest.boot.as_ref().and_then(|boot| match open(boot.heads_digest) {
            Ok(frames) => {
                frames.end();
                Some(frames)
            }
            Err(error) => {
                tracing::warn!(image = %manifest.root.short(), %error, "serving the image without its boot cache");
                None
            }
        });
        if frames.is_none() {
            // Who is told of one waits for its heads.
            manifest.boot = None;
        }
        let holding = Self::new(manifest, Blocks::Disk(disk), KnownTree::Whole(tree), frames);
        Ok(Self { origin: published, ..holding })
    }

    /// The image's identity.
    pub const fn root(&self) -> Digest {
        self.manifest.root
    }

    /// Number of blocks.
    pub fn block_count(&self) -> u64 {
        crate::block::blocks_for(self.manifest.size)
    }

    /// Whether the image was published on this node.
    pub const fn is_origin(&self) -> bool {
        self.origin
    }

    /// Says that `peer` came here for the image and serves it too.
    pub fn met(&self, peer: Peer) {
        // Nobody listens when nothing of it is being fetched.
        let _ = self.comers.send(peer);
    }

    /// Who comes from now on. In a burst this is how the first to start learns of the others at once.
    pub fn comers(&self) -> broadcast::Receiver<Peer> {
        self.comers.subscribe()
    }

    /// The boot cache, as far as it is here.
    pub fn frames(&self) -> Option<&Frames> {
        self.frames.get()
    }

    /// Says which boot cache there is; once.
    pub fn set_frames(&self, frames: Frames) {
        // A second one would be the same: the heads are pinned by the manifest.
        let _ = self.frames.set(frames);
        self.frames_set.notify_waiters();
        self.changed();
    }

    /// Ends when the heads of the boot cache are known, but not when they never will be.
    pub async fn frames_known(&self) {
        let mut set = std::pin::pin!(self.frames_set.notified());
        set.as_mut().enable();
        if self.frames().is_none() {
            set.await;
        }
    }

    /// Ends when there may be more boot frames than when it was called.
    pub fn more_frames(&self) -> Notified<'_> {
        self.frames().map_or(&self.frames_set, |frames| &frames.arrived).notified()
    }

    /// Waits until frame `index` of the boot cache is here; false when it will not come.
    pub async fn wait_frame(&self, index: usize) -> bool {
        if self.manifest.boot.is_none() {
            return false;
        }
        loop {
            let mut set = std::pin::pin!(self.frames_set.notified());
            set.as_mut().enable();
            if let Some(frames) = self.frames() {
                return frames.wait(index).await;
            }
            if self.is_complete() {
                return false;
            }
            set.await;
        }
    }

    /// Whether every block is here.
    pub fn is_complete(&self) -> bool {
        match &self.blocks {
            Blocks::Cache(cache) => cache.is_complete() && self.tree.is_complete(),
            Blocks::Disk(_) => true,
        }
    }

    /// The runs of `extent` that are here.
    pub fn present(&self, extent: Extent) -> Vec<Extent> {
        match &self.blocks {
            Blocks::Cache(cache) => cache.present(extent),
            Blocks::Disk(_) => vec![extent],
        }
    }

    /// Counts `page` among those that are here, if all its blocks are.
    pub fn note_page(&self, page: u64) {
        let Blocks::Cache(cache) = &self.blocks else { return };
        let start = page * PAGE_BLOCKS;
        let count = PAGE_BLOCKS.min(self.block_count() - start);
        if cache.has(Extent::new(start, count)) && self.tree.knows_page(page) {
            let page = u32::try_from(page).expect("an image has fewer than 2^32 pages");
            if self.pages.lock().unwrap_or_else(PoisonError::into_inner).insert(page) {
                self.changed();
            }
        }
    }

    /// Says that something is here that was not.
    pub fn changed(&self) {
        self.changes.fetch_add(1, Ordering::Release);
    }

    /// A number that is another one when something has changed.
    pub fn version(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// The pages that are here, as a roaring bitmap in its portable form; empty when all are.
    pub fn pages(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        if !self.is_complete() {
            let mut bitmap = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
            bitmap.optimize();
            bitmap.serialize_into(&mut bytes).expect("a vector takes every write");
        }
        bytes
    }

    /// What is here, as it is told to peers; without the pages.
    pub fn have(&self) -> Have {
        Have {
            complete: self.is_complete(),
            frames: self.frames().map_or(0, Frames::contiguous),
            origin: self.origin,
            pages: None,
            load: super::message::Load::default(),
        }
    }

    /// Reads `extent`, which is here; the disk's last block may be short.
    ///
    /// # Errors
    /// Of this node's own disk.
    pub async fn read(&self, extent: Extent) -> io::Result<Vec<u8>> {
        let last = extent.end() - 1;
        let length = (extent.count - 1) * crate::block::BLOCK_SIZE + bytes_in_block(last, self.manifest.size);
        let mut bytes = vec![0; usize::try_from(length).expect("requests are bounded")];
        match &self.blocks {
            Blocks::Cache(cache) => cache.read_present(extent.offset(), &mut bytes).await?,
            Blocks::Disk(disk) => match disk.try_read(extent.offset(), &mut bytes) {
                Attempt::Ready(result) => result?,
                Attempt::WouldBlock => disk.read(extent.offset(), &mut bytes).await?,
            },
        }
        Ok(bytes)
    }
}
