//! Blocks that other images on this node have too: found by their digest, and copied instead of fetched.
//!
//! The index holds 8 bytes of each digest and where the block is; whatever it says, a block counts only when its bytes
//! have the digest. It is bounded ([`ENTRIES_MAX`]), built in the background, and given up with the transfer, or with the
//! stream when nothing is filled. It keeps no image from being removed; the space of one is free when it is given up. The base
//! of an increment comes first, and for it the boot stream waits until the index is there: an increment then costs the
//! network the increment alone. For other images the stream begins at once, and goes over to copying when a probe
//! shows that it pays.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

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

/// An index of the blocks of other images.
pub(super) struct Similar {
    /// First 8 bytes of the digest; image (upper 16 bits) and block.
    entries: Vec<(u64, u64)>,
    images: Vec<Image>,
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

impl Similar {
    /// Indexes the complete images of `store` but `except`, `base` first. None when there are none. Blocking.
    pub(super) fn build(store: &Store, except: Digest, base: Option<Digest>) -> Option<Self> {
        let mut roots = store.roots().ok()?;
        roots.retain(|root| *root != except);
        roots.sort_by_key(|root| Some(*root) != base);
        let mut similar = Self { entries: Vec::new(), images: Vec::new() };
        for root in roots {
            // An image that cannot be used is none that can be copied from.
            if similar.entries.len() < ENTRIES_MAX
                && let Err(error) = similar.add(store, root)
            {
                tracing::debug!(image = %root.short(), %error, "not looking for blocks in this image");
            }
        }
        similar.entries.sort_unstable();
        (!similar.entries.is_empty()).then_some(similar)
    }

    fn add(&mut self, store: &Store, root: Digest) -> io::Result<()> {
        let entry = store.image(root).map_err(io::Error::other)?;
        if !entry.is_complete() {
            return Ok(());
        }
        let tree = Tree::open(&entry.tree_path(), Some(root)).map_err(io::Error::other)?;
        let disk = File::open(entry.disk_path())?;
        let number = self.images.len() as u64;
        for page in 0..tree.pages() {
            let room = ENTRIES_MAX - self.entries.len();
            if room == 0 {
                break;
            }
            let digests = tree.page(page).map_err(io::Error::other)?;
            let entry = |(i, digest)| (prefix(digest), number << 48 | (page * PAGE_BLOCKS + i as u64));
            self.entries.extend(digests.digests().map(entry).take(room));
        }
        self.images.push(Image { disk, size: tree.size() });
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

/// Builds the index, and finds out whether the boot set should be copied. Ends when what that takes is here.
pub(super) async fn prepare(shared: &Arc<Shared>) {
    let pages = probe(shared).await;
    shared.copies_boot.store(!pages.is_empty(), Ordering::Release);
    shared.probing.store(false, Ordering::Release);
    for pages in pages.chunks(PAGES_AT_ONCE) {
        fill::fetch_pages(shared, pages).await;
    }
}

/// Builds the index, if there is anything to find.
pub(super) async fn index(shared: &Shared) -> Option<Arc<Similar>> {
    let store = shared.options.similar.clone()?;
    let (root, base) = (shared.holding.root(), shared.holding.manifest.base);
    let built = tokio::task::spawn_blocking(move || Similar::build(&store, root, base)).await;
    let similar = Arc::new(built.ok().flatten()?);
    shared.set_similar(Some(Arc::clone(&similar)));
    Some(similar)
}

/// The pages of the boot set, if other images have most of it.
async fn probe(shared: &Arc<Shared>) -> Vec<u64> {
    let Some(similar) = index(shared).await else { return Vec::new() };
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
