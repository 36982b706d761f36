//! Blocks that other images on this node have too: found by their digest, and copied instead of fetched.
//!
//! The index holds 8 bytes of each digest and where the block is; whatever it says, a block counts only when its bytes
//! have the digest. It is bounded ([`ENTRIES_MAX`]), built in the background, once for all transfers to a store, and given
//! up with the last of those that look in it: a transfer does until its stream is over, or its fill. It keeps no image from
//! being removed; the space of one is free when it is given up. The bases of increments come first, and for its base an
//! increment's boot stream waits until the index is there: an increment then costs the network the increment alone. For
//! other images the stream begins at once, and goes over to copying when a probe shows that it pays.

use std::collections::{BTreeSet, HashSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::block::{BLOCK_BYTES, BLOCK_SIZE, Extent, bytes_in_block};
use crate::digest::Digest;
use crate::image::page::{PAGE_BLOCKS, block_digest};
use crate::image::tree::Tree;
use crate::store::Store;

use super::engine::Shared;
use super::fill;
use super::receive;

/// Blocks in the index: 16 bytes each in memory.
const ENTRIES_MAX: usize = 1 << 20;
/// Pages of the boot set by which it is probed whether copying pays.
const PROBE_PAGES: usize = 16;
/// Pages whose digests are asked for at once.
const PAGES_AT_ONCE: usize = 32;

/// The images of a store as its transfers look for blocks in them. Owner of the one index, while somebody looks.
pub struct Others {
    store: Store,
    state: Mutex<State>,
    /// Held by whoever builds the index, so that it is built once for all who want it.
    building: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    /// Of each who looks, the base of its image, if it has one.
    looking: Vec<Option<Digest>>,
    similar: Option<Arc<Similar>>,
}

/// A transfer that looks for blocks in other images, until this is dropped.
pub(super) struct Looking {
    others: Arc<Others>,
    base: Option<Digest>,
}

/// An index of the blocks of complete images.
#[derive(Default)]
pub(super) struct Similar {
    /// First 8 bytes of the digest; image (upper 16 bits) and block.
    entries: Vec<(u64, u64)>,
    images: Vec<Image>,
    /// The complete images that there were when it was built, in no order that counts.
    roots: BTreeSet<Digest>,
    /// Those that came first.
    bases: BTreeSet<Digest>,
}

struct Image {
    disk: File,
    size: u64,
}

impl std::fmt::Debug for Similar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Similar").field("blocks", &self.entries.len()).finish_non_exhaustive()
    }
}

fn prefix(digest: Digest) -> u64 {
    let (first, _) = digest.0.split_first_chunk().expect("a digest has 32 bytes");
    u64::from_le_bytes(*first)
}

impl std::fmt::Debug for Others {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Others").field("store", &self.store).finish_non_exhaustive()
    }
}

impl Others {
    /// Those of `store`. Nothing is built before a transfer looks.
    pub fn new(store: Store) -> Arc<Self> {
        Arc::new(Self { store, state: Mutex::default(), building: tokio::sync::Mutex::default() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks in the complete images of the store, for an image over `base`; builds the index, unless there is one of just
    /// these. None when there is nothing to find.
    async fn look(self: &Arc<Self>, base: Option<Digest>) -> Option<Looking> {
        self.state().looking.push(base);
        let looking = Looking { others: Arc::clone(self), base };
        let _one = self.building.lock().await;
        let others = Arc::clone(self);
        // Without an answer the runtime is ending.
        tokio::task::spawn_blocking(move || others.build()).await.ok()?;
        looking.similar().is_some().then_some(looking)
    }

    /// Builds the index anew if there is none, or other images are complete by now. Blocking.
    fn build(&self) {
        let roots: BTreeSet<Digest> = complete(&self.store);
        let (now, bases) = {
            let state = self.state();
            let bases: BTreeSet<Digest> = state.looking.iter().flatten().copied().collect();
            (state.similar.clone(), &bases & &roots)
        };
        if now.is_some_and(|now| now.roots == roots && (!now.is_full() || bases.is_subset(&now.bases))) {
            return;
        }
        let similar = Similar::build(&self.store, roots, bases);
        let mut state = self.state();
        if !state.looking.is_empty() {
            state.similar = similar.map(Arc::new);
        }
    }
}

/// The complete images of `store`. Blocking.
fn complete(store: &Store) -> BTreeSet<Digest> {
    let is_complete = |root: &Digest| store.image(*root).is_ok_and(|entry| entry.is_complete());
    store.roots().unwrap_or_default().into_iter().filter(is_complete).collect()
}

impl Looking {
    /// The index, as it is now.
    pub(super) fn similar(&self) -> Option<Arc<Similar>> {
        self.others.state().similar.clone()
    }
}

impl std::fmt::Debug for Looking {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Looking").field("base", &self.base).finish_non_exhaustive()
    }
}

impl Drop for Looking {
    fn drop(&mut self) {
        let mut state = self.others.state();
        if let Some(at) = state.looking.iter().position(|base| *base == self.base) {
            state.looking.swap_remove(at);
        }
        if state.looking.is_empty() {
            state.similar = None;
        }
    }
}

impl Similar {
    /// Indexes the images `roots` of `store`, `bases` first. None when there is nothing in them. Blocking.
    fn build(store: &Store, roots: BTreeSet<Digest>, bases: BTreeSet<Digest>) -> Option<Self> {
        let mut similar = Self { roots, bases, ..Self::default() };
        let order: Vec<Digest> = similar.bases.iter().chain(&similar.roots).copied().collect();
        let mut seen = HashSet::new();
        for root in order.into_iter().filter(|root| seen.insert(*root)) {
            // An image that cannot be used is none that can be copied from.
            if !similar.is_full()
                && let Err(error) = similar.add(store, root)
            {
                tracing::debug!(image = %root.short(), %error, "not looking for blocks in this image");
            }
        }
        similar.entries.sort_unstable();
        (!similar.entries.is_empty()).then_some(similar)
    }

    /// Whether there is no room for further blocks.
    fn is_full(&self) -> bool {
        self.entries.len() >= ENTRIES_MAX
    }

    fn add(&mut self, store: &Store, root: Digest) -> io::Result<()> {
        let entry = store.image(root).map_err(io::Error::other)?;
        let tree = Tree::open(&entry.tree_path(), Some(root)).map_err(io::Error::other)?;
        self.index(&tree, File::open(entry.disk_path())?)
    }

    fn index(&mut self, tree: &Tree, disk: File) -> io::Result<()> {
        let number = self.images.len() as u64;
        // First: of a tree that cannot be read to its end, entries stay.
        self.images.push(Image { disk, size: tree.size() });
        for page in 0..tree.pages() {
            if self.is_full() {
                break;
            }
            let room = ENTRIES_MAX - self.entries.len();
            let digests = tree.page(page).map_err(io::Error::other)?;
            let entry = |(i, digest)| (prefix(digest), number << 48 | (page * PAGE_BLOCKS + i as u64));
            self.entries.extend(digests.digests().map(entry).take(room));
        }
        Ok(())
    }

    fn places(&self, digest: Digest) -> impl Iterator<Item = u64> {
        let prefix = prefix(digest);
        let first = self.entries.partition_point(|entry| entry.0 < prefix);
        self.entries[first..].iter().take_while(move |entry| entry.0 == prefix).map(|entry| entry.1)
    }

    /// Whether a block with this digest is probably there.
    pub(super) fn knows(&self, digest: Digest) -> bool {
        self.places(digest).next().is_some()
    }

    /// The block with this digest, padded with zeroes; none when no image really has it. Blocking.
    fn read(&self, digest: Digest) -> Option<[u8; BLOCK_BYTES]> {
        self.places(digest).find_map(|place| {
            let image = &self.images[usize::try_from(place >> 48).ok()?];
            let block = place & ((1 << 48) - 1);
            let mut bytes = [0; BLOCK_BYTES];
            let length = usize::try_from(bytes_in_block(block, image.size)).ok()?;
            image.disk.read_exact_at(&mut bytes[..length], block * BLOCK_SIZE).ok()?;
            (block_digest(&bytes) == digest).then_some(bytes)
        })
    }
}

impl Shared {
    /// Copies what other images on this node have of `extents`, as far as its digests are known. Blocking.
    pub(super) fn copy_similar(&self, extents: &[Extent]) {
        let Some(similar) = self.similar() else { return };
        let absent = extents.iter().flat_map(|extent| self.cache.absent(*extent));
        for block in absent.flat_map(Extent::blocks) {
            // When the tree cannot be read, who fetches the block is told.
            let Ok(Some(digest)) = self.holding.tree.block_digest(block) else { continue };
            let Some(bytes) = similar.read(digest) else { continue };
            let length = usize::try_from(bytes_in_block(block, self.holding.manifest.size)).unwrap_or(0);
            // Held against the digest once more, as everything is.
            if receive::keep(&self.holding, &self.cache, block, &bytes[..length]).is_ok() {
                self.counters.similar_blocks.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// Finds out whether the boot set should be copied. Ends when what that takes is here.
pub(super) async fn prepare(shared: &Arc<Shared>) {
    let pages = probe(shared).await;
    shared.copies_boot.store(!pages.is_empty(), Ordering::Release);
    shared.probing.store(false, Ordering::Release);
    for pages in pages.chunks(PAGES_AT_ONCE) {
        fill::fetch_pages(shared, pages).await;
    }
}

/// Looks for blocks in other images from now on, if there is anything to find.
pub(super) async fn look(shared: &Shared) -> Option<Arc<Similar>> {
    let looking = shared.options.similar.as_ref()?.look(shared.holding.manifest.base).await?;
    let similar = looking.similar();
    shared.set_looking(Some(looking));
    similar
}

/// The pages of the boot set, if other images have most of it.
async fn probe(shared: &Arc<Shared>) -> Vec<u64> {
    if !shared.lacks_blocks() {
        return Vec::new();
    }
    let Some(similar) = look(shared).await else { return Vec::new() };
    while shared.holding.manifest.boot.is_some() && shared.holding.frames().is_none() {
        if shared.stream.has_given_up() {
            return Vec::new();
        }
        tokio::select! {
            () = shared.holding.frames_known() => {}
            () = shared.sources.changed() => {}
        }
    }
    let Some(frames) = shared.holding.frames() else { return Vec::new() };
    let lacking = frames.heads().extents().into_iter().flat_map(|extent| shared.cache.absent(extent));
    let mut seen = HashSet::new();
    let touched = lacking.flat_map(|extent| extent.start / PAGE_BLOCKS..=(extent.end() - 1) / PAGE_BLOCKS);
    let pages: Vec<u64> = touched.filter(|page| seen.insert(*page)).collect();
    let step = (pages.len() / PROBE_PAGES).max(1);
    let probe: Vec<u64> = pages.iter().copied().step_by(step).collect();
    fill::fetch_pages(shared, &probe).await;
    // What cannot be read counts as not known; it is told when the blocks are fetched.
    let known = probe.iter().filter_map(|page| shared.holding.tree.page(*page).ok().flatten());
    let digests: Vec<Digest> =
        known.flat_map(|page| page.digests().map(|(_, digest)| digest).collect::<Vec<_>>()).collect();
    let found = digests.iter().filter(|digest| similar.knows(**digest)).count();
    let pays = !digests.is_empty() && found * 2 >= digests.len();
    if pays { pages } else { Vec::new() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::import::{self, ImportOptions};
    use crate::image::scan::Watch;

    /// Adds an image whose blocks have the digests of `bytes`, one a block.
    fn add(store: &Store, name: &str, bytes: impl Iterator<Item = u8>) -> Digest {
        let raw = store.dir().join("raw");
        let disk: Vec<u8> = bytes.flat_map(|byte| [byte; BLOCK_BYTES]).collect();
        std::fs::write(&raw, disk).unwrap();
        let options = ImportOptions::default();
        import::import(store, &name.parse().unwrap(), &raw, options, &Watch::default()).unwrap().root
    }

    /// Its entries were numbered as those of the image after it, or of none, and who looked there panicked.
    #[test]
    fn an_image_whose_tree_cannot_be_read_to_its_end_is_no_other_one() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let pages = usize::try_from(PAGE_BLOCKS).unwrap();
        let damaged = add(&store, "damaged", std::iter::repeat_n(1, pages).chain([2; 8]));
        let (entry, mut similar) = (store.image(damaged).unwrap(), Similar::default());
        let tree = Tree::open(&entry.tree_path(), Some(damaged)).unwrap();
        let length = std::fs::metadata(entry.tree_path()).unwrap().len();
        // The last page of digests.
        File::options().write(true).open(entry.tree_path()).unwrap().set_len(length - 4096).unwrap();
        similar.index(&tree, File::open(entry.disk_path()).unwrap()).unwrap_err();
        similar.add(&store, add(&store, "good", [3; 4].into_iter())).unwrap();
        similar.entries.sort_unstable();
        let read = |byte| similar.read(block_digest(&[byte; BLOCK_BYTES]));
        assert_eq!([1, 2, 3].map(|byte| read(byte).map(|bytes| bytes[0])), [Some(1), None, Some(3)]);
    }

    #[tokio::test]
    async fn all_who_look_share_one_index_and_the_last_gives_it_up() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let others = Others::new(store.clone());
        assert!(others.look(None).await.is_none());
        assert!(others.state().looking.is_empty());
        let base = add(&store, "one", [1; 4].into_iter());
        let (first, second) = tokio::join!(others.look(None), others.look(Some(base)));
        let (first, second) = (first.unwrap(), second.unwrap());
        let index = first.similar().unwrap();
        assert!(Arc::ptr_eq(&index, &second.similar().unwrap()));
        add(&store, "two", [2; 4].into_iter());
        let third = others.look(None).await.unwrap();
        // It is one for all again, of both images.
        assert!(Arc::ptr_eq(&first.similar().unwrap(), &third.similar().unwrap()));
        assert!(!Arc::ptr_eq(&index, &third.similar().unwrap()));
        let index = Arc::downgrade(&first.similar().unwrap());
        drop((first, third));
        assert!(second.similar().is_some());
        drop(second);
        assert!(index.upgrade().is_none());
    }
}
