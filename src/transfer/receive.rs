//! What is done with what came: checked against the image's digests, and only then kept, shown and passed on.
//!
//! Blocks are held against the digest tree, whose parts may come in the same answer and are checked first. A boot
//! frame is held against its digest in the heads, which the manifest pins; where the tree is known, its blocks are
//! held against that too. Blocking; pure but for the writes.

use std::io;

use crate::block::{BLOCK_BYTES, BLOCK_SIZE, Extent, bytes_in_block};
use crate::boot_cache::{BootCacheError, decode_frame};
use crate::image::page::PAGE_BLOCKS;
use crate::image::partial_tree::Verdict;
use crate::image::tree::{GROUP_PAGES, TreeError};
use crate::local_cache::LocalCache;
use crate::peer::holding::Holding;
use crate::peer::message::{Answer, from_wire};

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

/// Keeps the answer to a request for `asked`. Blocks whose page is not known are left out. Number of blocks kept.
pub(super) fn blocks(
    holding: &Holding,
    cache: &LocalCache,
    answer: &Answer,
    bulk: &[u8],
    asked: &[Extent],
) -> Result<u64, Wrong> {
    let Answer::Blocks { groups, pages, extents, packed } = answer else { return Ok(0) };
    let mut rest = bulk;
    let mut take = |length: u32| {
        let cut = rest.split_at_checked(length as usize);
        let (taken, after) = cut.ok_or(Wrong::Lie("an answer is shorter than its head says"))?;
        rest = after;
        Ok::<_, Wrong>(taken)
    };
    for (group, length) in groups {
        holding.tree.add_group(u64::from(*group), take(*length)?)?;
        learn_group(holding, cache, u64::from(*group));
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
    if !extents.iter().all(|extent| asked.iter().any(|asked| contains(*asked, *extent))) {
        return Err(Wrong::Lie("an answer has blocks that were not asked for"));
    }
    let length: u64 = extents.iter().map(|extent| bytes_of(holding, *extent)).sum();
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

fn contains(outer: Extent, inner: Extent) -> bool {
    inner.start >= outer.start && inner.start.checked_add(inner.count).is_some_and(|end| end <= outer.end())
}

fn bytes_of(holding: &Holding, extent: Extent) -> u64 {
    match extent.count {
        0 => 0,
        count => (count - 1) * BLOCK_SIZE + bytes_in_block(extent.end() - 1, holding.manifest.size),
    }
}

/// Verifies `data`, which begins at block `start`, and keeps it if all of it is right.
pub(super) fn keep(holding: &Holding, cache: &LocalCache, start: u64, data: &[u8]) -> Result<u64, Wrong> {
    let mut good = 0;
    for (block, bytes) in (start..).zip(data.chunks(BLOCK_BYTES)) {
        match holding.tree.verify(block, bytes) {
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
        match data {
            None => extent.blocks().filter(|block| holding.tree.is_zero(*block) != Some(false)).for_each(
                |block| {
                    cache.insert_zero(Extent::new(block, 1));
                },
            ),
            Some(data) => {
                let length = usize::try_from(bytes_of(holding, extent)).expect("a frame fits memory");
                let data = &data[..length];
                // The heads are pinned, but the tree has the last word.
                let bad = extent
                    .blocks()
                    .zip(data.chunks(BLOCK_BYTES))
                    .any(|(block, bytes)| holding.tree.verify(block, bytes) == Verdict::Bad);
                if bad {
                    tracing::error!(
                        image = %holding.root().short(), frame = index,
                        "the boot cache contradicts the image: record the image again"
                    );
                } else {
                    cache.insert(extent.start, data).map_err(Wrong::Local)?;
                }
            }
        }
    }
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

/// A page tells which of its blocks are zero.
pub(super) fn learn_zeroes(holding: &Holding, cache: &LocalCache, page: u64) {
    let start = page * PAGE_BLOCKS;
    let end = (start + PAGE_BLOCKS).min(holding.block_count());
    let mut at = start;
    while at < end {
        let zero = holding.tree.is_zero(at) == Some(true);
        let run = (at..end).take_while(|block| (holding.tree.is_zero(*block) == Some(true)) == zero).count();
        if zero {
            cache.insert_zero(Extent::new(at, run as u64));
        }
        at += run as u64;
    }
    holding.note_page(page);
}

/// Holds blocks that came by the stream, before their page, against it.
fn audit(holding: &Holding, cache: &LocalCache, run: Extent) {
    for block in run.blocks() {
        let mut bytes = [0; BLOCK_BYTES];
        let length = usize::try_from(bytes_in_block(block, holding.manifest.size)).expect("at most a block");
        let read = cache.read_blocking(block * BLOCK_SIZE, &mut bytes[..length]);
        if read.is_err() || holding.tree.verify(block, &bytes[..length]) == Verdict::Bad {
            tracing::error!(
                image = %holding.root().short(), block,
                "a block is not what the image says: fetching it again; check this disk, and record the image again"
            );
            cache.forget(block);
        }
    }
}
