//! What is done with what came: checked against the image's digests, and only then kept, shown and passed on.
//!
//! Blocks are held against the digest tree, whose parts may come in the same answer and are checked first. A boot
//! frame is held against its digest in the heads, which the manifest pins; where the tree is known, its blocks are
//! held against that too. Blocking; pure but for the writes.

use std::io;

use crate::block::{BLOCK_BYTES, BLOCK_SIZE, Extent, bytes_in_block};
use crate::boot_cache::{BootCacheError, decode_frame};
use crate::image::page::{LastPage, PAGE_BLOCKS};
use crate::image::partial_tree::Verdict;
use crate::image::tree::{GROUP_PAGES, TreeError};
use crate::local_cache::LocalCache;
use crate::peer::holding::Holding;
use crate::peer::message::{Answer, Ask, from_wire};

/// Why what came was not kept.
#[derive(Debug, thiserror::Error)]
pub(super) enum Wrong {
    /// It is not the image: whoever sent it lies or is broken.
    #[error("{0}")]
    Lie(&'static str),
    /// This node could not keep it.
    #[error("cannot keep what came: {0}")]
    Local(io::Error),
}

impl From<TreeError> for Wrong {
    fn from(error: TreeError) -> Self {
        match error {
            TreeError::Malformed(what) => Self::Lie(what),
            other => Self::Local(io::Error::other(other)),
        }
    }
}

impl From<BootCacheError> for Wrong {
    fn from(error: BootCacheError) -> Self {
        match error {
            BootCacheError::Io(error) => Self::Local(error),
            _ => Self::Lie("a boot frame does not have its digest"),
        }
    }
}

/// Keeps the answer to the request `ask` for blocks. Blocks whose page is not known are left out. Number of blocks kept.
pub(super) fn blocks(
    holding: &Holding,
    cache: &LocalCache,
    ask: &Ask,
    answer: &Answer,
    bulk: &[u8],
) -> Result<u64, Wrong> {
    let Answer::Blocks { groups, pages, extents, packed } = answer else { return Ok(0) };
    let Ask::Blocks { extents: asked, groups: asked_groups, pages: asked_pages, .. } = ask else {
        return Ok(0);
    };
    // Before any of it is looked at: each part may cost much more than it takes to send it.
    if !are_among(groups, asked_groups) || !are_among(pages, asked_pages) {
        return Err(Wrong::Lie("an answer has parts of the digest tree that were not asked for"));
    }
    let mut rest = bulk;
    let mut take = |length: u32| {
        let cut = rest.split_at_checked(length as usize);
        let (taken, after) = cut.ok_or(Wrong::Lie("an answer is shorter than its head says"))?;
        rest = after;
        Ok::<_, Wrong>(taken)
    };
    for (group, length) in groups {
        let group = u64::from(*group);
        let was_known = holding.tree.knows_group(group);
        holding.tree.add_group(group, take(*length)?)?;
        if !was_known {
            learn_group(holding, cache, group);
        }
    }
    for (page, length) in pages {
        let page = u64::from(*page);
        let was_known = holding.tree.knows_page(page);
        let bytes = take(*length)?;
        if !holding.tree.knows_group(page / GROUP_PAGES) {
            // Nothing to hold it against: no fault of who sent it, and no use.
            continue;
        }
        holding.tree.add_page(page, bytes)?;
        if !was_known {
            learn_page(holding, cache, page);
        }
    }
    let extents: Vec<Extent> = extents.iter().copied().map(from_wire).collect();
    let asked: Vec<Extent> = asked.iter().copied().map(from_wire).collect();
    if !extents.iter().all(|extent| asked.iter().any(|asked| contains(*asked, *extent))) {
        return Err(Wrong::Lie("an answer has blocks that were not asked for"));
    }
    let length: u64 = extents.iter().map(|extent| bytes_of(holding, *extent)).sum();
    if length > asked.iter().map(|extent| extent.bytes()).sum() {
        return Err(Wrong::Lie("an answer has blocks more than once"));
    }
    let length = usize::try_from(length).expect("a request is for 1 MiB at most");
    let unpacked;
    let data = match packed {
        false => rest,
        true => {
            unpacked = zstd::bulk::decompress(rest, length)
                .map_err(|_| Wrong::Lie("an answer cannot be unpacked"))?;
            &unpacked
        }
    };
    if data.len() != length {
        return Err(Wrong::Lie("an answer does not have the length of its blocks"));
    }
    let mut kept = 0;
    let mut at = 0;
    for extent in extents {
        let length = usize::try_from(bytes_of(holding, extent)).expect("as above");
        kept += keep(holding, cache, extent.start, &data[at..at + length])?;
        at += length;
    }
    Ok(kept)
}

/// Whether each of `parts`, with its length, was asked for, and comes no more often than that.
fn are_among(parts: &[(u32, u32)], asked: &[u32]) -> bool {
    let mut left = asked.to_vec();
    let mut take = |part: &u32| left.iter().position(|asked| asked == part).map(|at| left.swap_remove(at));
    parts.iter().all(|(part, _)| take(part).is_some())
}

fn contains(outer: Extent, inner: Extent) -> bool {
    inner.start >= outer.start && inner.start.checked_add(inner.count).is_some_and(|end| end <= outer.end())
}

fn bytes_of(holding: &Holding, extent: Extent) -> u64 {
    match extent.count {
        0 => 0,
        count => (count - 1) * BLOCK_SIZE + bytes_in_block(extent.end() - 1, holding.manifest.size),
    }
}

/// As the tree says. A page of it that cannot be read counts as one that has not come, and comes again: no write here helps.
fn verify(holding: &Holding, block: u64, data: &[u8], last: &mut LastPage) -> Result<Verdict, Wrong> {
    match holding.tree.verify(block, data, last) {
        Err(error) if holding.tree.forget_page(block / PAGE_BLOCKS) => {
            tracing::error!(image = %holding.root().short(), block, %error, "a page of the digest tree has to come again");
            Ok(Verdict::UnknownPage)
        }
        verdict => Ok(verdict?),
    }
}

/// Verifies `data`, which begins at block `start`, and keeps it if all of it is right.
pub(super) fn keep(holding: &Holding, cache: &LocalCache, start: u64, data: &[u8]) -> Result<u64, Wrong> {
    let (mut good, mut last) = (0, LastPage::default());
    for (block, bytes) in (start..).zip(data.chunks(BLOCK_BYTES)) {
        match verify(holding, block, bytes, &mut last)? {
            Verdict::Good => good += 1,
            Verdict::Bad if cfg!(bootcache_unchecked) => good += 1,
            Verdict::Bad => return Err(Wrong::Lie("a block does not have its digest")),
            Verdict::UnknownPage => break,
        }
    }
    if good > 0 {
        let length = data.len().min(good * BLOCK_BYTES);
        cache.insert(start, &data[..length]).map_err(Wrong::Local)?;
        let last = start + good as u64 - 1;
        (start / PAGE_BLOCKS..=last / PAGE_BLOCKS).for_each(|page| holding.note_page(page));
    }
    Ok(good as u64)
}

/// Keeps boot frame `index`: its blocks for the guests, and itself for others.
pub(super) fn frame(holding: &Holding, cache: &LocalCache, index: usize, bytes: &[u8]) -> Result<(), Wrong> {
    let frames = holding.frames().ok_or(Wrong::Lie("a frame came before the heads"))?;
    keep_frame_blocks(holding, cache, index, bytes)?;
    frames.insert(index, bytes)?;
    holding.changed();
    Ok(())
}

/// Keeps the blocks of boot frame `index`, which is checked.
pub(super) fn keep_frame_blocks(
    holding: &Holding,
    cache: &LocalCache,
    index: usize,
    bytes: &[u8],
) -> Result<(), Wrong> {
    let frames = holding.frames().ok_or(Wrong::Lie("a frame came before the heads"))?;
    let blocks = decode_frame(frames.heads(), index, bytes)?;
    for (extent, data) in blocks.runs() {
        keep_run(holding, cache, index, extent, data)?;
    }
    Ok(())
}

/// Keeps `extent` of boot frame `frame`: its `data`, or else zeroes.
fn keep_run(
    holding: &Holding,
    cache: &LocalCache,
    frame: usize,
    extent: Extent,
    data: Option<&[u8]>,
) -> Result<(), Wrong> {
    let pages = extent.start / PAGE_BLOCKS..=(extent.end() - 1) / PAGE_BLOCKS;
    let unknown: Vec<u64> = pages.filter(|page| !holding.tree.knows_page(*page)).collect();
    let kept = write_run(holding, cache, frame, extent, data);
    // A page that came in between was held against what was here before.
    let came = unknown.into_iter().filter(|page| holding.tree.knows_page(*page));
    came.for_each(|page| learn_page(holding, cache, page));
    kept
}

/// Writes `extent` of boot frame `frame`, unless the tree says otherwise, as far as it is known.
fn write_run(
    holding: &Holding,
    cache: &LocalCache,
    frame: usize,
    extent: Extent,
    data: Option<&[u8]>,
) -> Result<(), Wrong> {
    let Some(data) = data else {
        for block in extent.blocks() {
            // A page that cannot be read is as good as unknown.
            if !matches!(holding.tree.is_zero(block), Ok(Some(false))) {
                cache.insert_zero(Extent::new(block, 1)).map_err(Wrong::Local)?;
            }
        }
        return Ok(());
    };
    let length = usize::try_from(bytes_of(holding, extent)).expect("a frame fits memory");
    let data = &data[..length];
    let mut last = LastPage::default();
    for (block, bytes) in extent.blocks().zip(data.chunks(BLOCK_BYTES)) {
        // The heads are pinned, but the tree has the last word.
        if verify(holding, block, bytes, &mut last)? == Verdict::Bad {
            tracing::error!(
                image = %holding.root().short(), frame,
                "the boot cache contradicts the image: record the image again"
            );
            return Ok(());
        }
    }
    cache.insert(extent.start, data).map_err(Wrong::Local)?;
    Ok(())
}

/// A group tells which of its pages are all zero.
fn learn_group(holding: &Holding, cache: &LocalCache, group: u64) {
    let first = group * GROUP_PAGES;
    for page in first..(first + GROUP_PAGES).min(holding.tree.pages()) {
        if holding.tree.knows_page(page) {
            learn_page(holding, cache, page);
        }
    }
}

/// A page that is new tells whether what the boot stream brought is right.
pub(super) fn learn_page(holding: &Holding, cache: &LocalCache, page: u64) {
    let start = page * PAGE_BLOCKS;
    let end = (start + PAGE_BLOCKS).min(holding.block_count());
    let whole = Extent::new(start, end - start);
    for run in cache.present(whole) {
        audit(holding, cache, run);
    }
    learn_zeroes(holding, cache, page);
}

/// Says of all blocks that are known to be zero that they are here.
pub(super) fn learn_all_zeroes(holding: &Holding, cache: &LocalCache) {
    let known = (0..holding.tree.pages()).filter(|page| holding.tree.knows_page(*page));
    known.for_each(|page| learn_zeroes(holding, cache, page));
}

/// A page tells which of its blocks are zero.
fn learn_zeroes(holding: &Holding, cache: &LocalCache, page: u64) {
    // They stay absent, and are fetched; what is wrong is told then.
    let complain = |error: &dyn std::error::Error| {
        tracing::debug!(image = %holding.root().short(), page, %error, "cannot make a hole of zero blocks");
    };
    let start = page * PAGE_BLOCKS;
    let blocks = usize::try_from(PAGE_BLOCKS.min(holding.block_count() - start)).expect("at most 128");
    let digests = holding.tree.page(page).unwrap_or_else(|error| {
        complain(&error);
        None
    });
    for run in digests.iter().flat_map(|digests| digests.zero_runs(blocks)) {
        if let Err(error) = cache.insert_zero(Extent::new(start + run.start as u64, run.len() as u64)) {
            complain(&error);
        }
    }
    holding.note_page(page);
}

/// Holds blocks that came by the stream, before their page, against it.
fn audit(holding: &Holding, cache: &LocalCache, run: Extent) {
    let (mut wrong, mut last) = (Vec::new(), LastPage::default());
    for block in run.blocks() {
        let mut bytes = [0; BLOCK_BYTES];
        let length = usize::try_from(bytes_in_block(block, holding.manifest.size)).expect("at most a block");
        let read = cache.read_blocking(block * BLOCK_SIZE, &mut bytes[..length]);
        // What cannot be held against its digest is not believed either.
        let verdict = holding.tree.verify(block, &bytes[..length], &mut last);
        if read.is_err() || matches!(verdict, Err(_) | Ok(Verdict::Bad)) {
            tracing::error!(
                image = %holding.root().short(), block,
                "a block is not what the image says: fetching it again; check this disk, and record the image again"
            );
            wrong.push(block);
        }
    }
    if !wrong.is_empty()
        && let Err(error) = cache.forget(&wrong)
    {
        tracing::error!(
            image = %holding.root().short(), blocks = ?wrong, %error,
            "cannot write down that blocks were wrong: a restart would believe them; remove the image"
        );
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::sync::Arc;

    use super::*;
    use crate::digest::Digest;
    use crate::image::manifest::{ImageKind, MANIFEST_VERSION, Manifest, SourceFormat};
    use crate::image::partial_tree::PartialTree;
    use crate::image::tree::Tree;
    use crate::image::tree_builder::build_from;
    use crate::peer::holding::{Blocks, KnownTree};

    const BLOCKS: u64 = 2 * PAGE_BLOCKS;

    /// An image whose block 1 is data and whose other blocks are zero, of which nothing is here.
    fn nothing_here() -> (tempfile::TempDir, Tree, Holding, Arc<LocalCache>) {
        let dir = tempfile::tempdir().unwrap();
        let source =
            File::options().read(true).write(true).create_new(true).open(dir.path().join("source")).unwrap();
        source.set_len(BLOCKS * BLOCK_SIZE).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&source, &[7; BLOCK_BYTES], BLOCK_SIZE).unwrap();
        build_from(&source, BLOCKS * BLOCK_SIZE, &dir.path().join("whole")).unwrap();
        let tree = Tree::open(&dir.path().join("whole"), None).unwrap();
        LocalCache::create(dir.path(), tree.root(), tree.size()).unwrap();
        let cache = Arc::new(LocalCache::open(dir.path(), tree.root(), tree.size()).unwrap());
        let partial =
            PartialTree::create(&dir.path().join("tree"), tree.root(), tree.size(), tree.top_bytes())
                .unwrap();
        let manifest = Manifest {
            version: MANIFEST_VERSION,
            size: tree.size(),
            root: tree.root(),
            raw_blake3: None,
            kind: ImageKind::Vm,
            source_format: SourceFormat::Raw,
            base: None,
            allocated: BLOCK_SIZE,
            boot: None,
        };
        let holding =
            Holding::new(manifest, Blocks::Cache(Arc::clone(&cache)), KnownTree::Partial(partial), None);
        (dir, tree, holding, cache)
    }

    fn ask(extents: Vec<(u64, u32)>, groups: Vec<u32>, pages: Vec<u32>) -> Ask {
        Ask::Blocks { root: Digest::of(b""), extents, groups, pages, urgent: false, pack: true }
    }

    fn answer(extents: Vec<(u64, u32)>, packed: bool) -> Answer {
        Answer::Blocks { groups: Vec::new(), pages: Vec::new(), extents, packed }
    }

    #[test]
    fn an_answer_that_repeats_blocks_is_a_lie_before_anything_is_made_of_its_length() {
        let (_dir, _, holding, cache) = nothing_here();
        let ask = ask(vec![(0, 256)], Vec::new(), Vec::new());
        let many = answer(vec![(0, 256); 400_000], true);
        let error = blocks(&holding, &cache, &ask, &many, &[]).unwrap_err();
        assert!(matches!(error, Wrong::Lie(what) if what.contains("more than once")), "{error}");
        assert!(blocks(&holding, &cache, &ask, &answer(vec![(0, 2), (1, 255)], false), &[0; 9]).is_err());
    }

    /// Each group of an answer, 4 KiB, had 64 MiB read and hashed, as often as it came.
    #[test]
    fn parts_of_the_tree_that_were_not_asked_for_or_that_come_again_are_a_lie() {
        let (_dir, tree, holding, cache) = nothing_here();
        let (group, page) = (tree.group_bytes(0).unwrap(), tree.page_bytes(0).unwrap());
        let length = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap();
        let answer = |groups: usize, pages: usize| Answer::Blocks {
            groups: vec![(0, length(&group)); groups],
            pages: vec![(0, length(&page)); pages],
            extents: Vec::new(),
            packed: false,
        };
        let bulk = |groups: usize, pages: usize| [group.repeat(groups), page.repeat(pages)].concat();
        let keep = |ask: &Ask, groups, pages| {
            blocks(&holding, &cache, ask, &answer(groups, pages), &bulk(groups, pages))
        };
        let both = ask(Vec::new(), vec![0], vec![0]);
        let wrong = [
            (&both, 1000, 1),
            (&both, 1, 2),
            (&ask(Vec::new(), Vec::new(), vec![0]), 1, 0),
            (&ask(Vec::new(), vec![0], vec![1]), 1, 1),
        ];
        for (ask, groups, pages) in wrong {
            let error = keep(ask, groups, pages).unwrap_err();
            assert!(matches!(error, Wrong::Lie(what) if what.contains("not asked for")), "{error}");
        }
        assert!(!holding.tree.knows_group(0));
        assert_eq!(keep(&both, 1, 1).unwrap(), 0);
        assert!(holding.tree.knows_page(0));
    }

    #[test]
    fn a_group_that_is_known_has_nothing_looked_at_again() {
        let (_dir, tree, holding, cache) = nothing_here();
        holding.tree.add_group(0, &tree.group_bytes(0).unwrap()).unwrap();
        holding.tree.add_page(0, &tree.page_bytes(0).unwrap()).unwrap();
        // Nothing but an audit would find this out.
        cache.insert(1, &[9; BLOCK_BYTES]).unwrap();
        let group = tree.group_bytes(0).unwrap();
        let groups = vec![(0, u32::try_from(group.len()).unwrap())];
        let answer = Answer::Blocks { groups, pages: Vec::new(), extents: Vec::new(), packed: false };
        let ask = ask(Vec::new(), vec![0], Vec::new());
        blocks(&holding, &cache, &ask, &answer, &group).unwrap();
        assert!(cache.has(Extent::new(1, 1)));
    }

    #[test]
    fn a_boot_block_that_is_wrong_is_found_out_though_its_page_comes_while_it_is_written() {
        for round in 0..100 {
            let (_dir, tree, holding, cache) = nothing_here();
            let start = std::sync::Barrier::new(2);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    start.wait();
                    holding.tree.add_group(0, &tree.group_bytes(0).unwrap()).unwrap();
                    holding.tree.add_page(0, &tree.page_bytes(0).unwrap()).unwrap();
                    learn_page(&holding, &cache, 0);
                });
                start.wait();
                // At another moment in each round.
                (0..round * 40).for_each(|_| std::hint::spin_loop());
                keep_run(&holding, &cache, 0, Extent::new(0, 1), Some(&[9; BLOCK_BYTES])).unwrap();
                keep_run(&holding, &cache, 0, Extent::new(1, 1), None).unwrap();
            });
            for block in cache.present(Extent::new(0, 2)).into_iter().flat_map(Extent::blocks) {
                let mut bytes = [0; BLOCK_BYTES];
                cache.read_blocking(block * BLOCK_SIZE, &mut bytes).unwrap();
                let verdict = holding.tree.verify(block, &bytes, &mut LastPage::default()).unwrap();
                assert_eq!(verdict, Verdict::Good, "block {block}, round {round}");
            }
            assert!(cache.has(Extent::new(0, 1)), "its page says that it is zero");
        }
    }

    #[test]
    fn what_came_before_its_digest_and_was_wrong_leaves_a_hole_where_zeroes_belong() {
        let (_dir, tree, holding, cache) = nothing_here();
        // As a boot frame that lies: data in a block that is zero.
        cache.insert(0, &[9; 2 * BLOCK_BYTES]).unwrap();
        holding.tree.add_group(0, &tree.group_bytes(0).unwrap()).unwrap();
        holding.tree.add_page(0, &tree.page_bytes(0).unwrap()).unwrap();
        learn_page(&holding, &cache, 0);
        assert!(cache.has(Extent::new(0, 1)) && !cache.has(Extent::new(1, 1)));
        let mut zero = [1; BLOCK_BYTES];
        cache.read_blocking(0, &mut zero).unwrap();
        assert!(zero == [0; BLOCK_BYTES], "something of it is left in the file");
    }
}
