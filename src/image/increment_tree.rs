//! The digest tree of an incremental image, from its base's tree and the blocks it changes. The base's disk is not read.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::block::{BLOCK_BYTES, BLOCK_SIZE, Extent, bytes_in_block};
use crate::digest::Digest;

use super::page::{PAGE_BLOCKS, Page, block_digest, is_zero};
use super::scan::ScanError;
use super::tree::{Tree, TreeError};
use super::tree_builder::TreeBuilder;

/// Blocks that an incremental image has of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    /// The blocks.
    pub extent: Extent,
    /// They read as zeroes; otherwise their bytes are in the increment's disk, at their own offset.
    pub zero: bool,
}

/// Makes at `path` the tree of a disk of `size` bytes that reads as the image of `base`, but for `changes`, which are
/// in ascending order and do not overlap. Returns the root.
///
/// # Errors
/// [`ScanError::Io`] when `disk` cannot be read, [`ScanError::Tree`], also when `size` is less than the base's.
pub fn build_increment_tree(
    base: &Tree,
    size: u64,
    changes: &[Change],
    disk: &File,
    path: &Path,
) -> Result<Digest, ScanError> {
    if size < base.size() {
        return Err(TreeError::Malformed("an increment is smaller than its base").into());
    }
    let builder = TreeBuilder::create(path, size)?;
    let blocks = crate::block::blocks_for(size);
    let mut buffer = [0; BLOCK_BYTES];
    for index in 0..builder.pages() {
        let first = index * PAGE_BLOCKS;
        let end = (first + PAGE_BLOCKS).min(blocks);
        let from = changes.partition_point(|change| change.extent.end() <= first);
        let changes = &changes[from..];
        let below = if first < base.blocks() { base.page(index)? } else { Page::zero() };
        if changes.first().is_none_or(|change| change.extent.start >= end)
            && base_has_all_of(base, index, blocks)
        {
            builder.put(index, &below)?;
            continue;
        }
        let mut page = Page::zero();
        let mut changes = changes.iter().peekable();
        for block in first..end {
            while changes.next_if(|change| change.extent.end() <= block).is_some() {}
            let place = usize::try_from(block - first).expect("a page has 128 blocks");
            let digest = match changes.peek().filter(|change| change.extent.start <= block) {
                Some(change) if change.zero => None,
                Some(_) => {
                    let length =
                        usize::try_from(bytes_in_block(block, size)).expect("a block has 4096 bytes");
                    let data = &mut buffer[..length];
                    disk.read_exact_at(data, block * BLOCK_SIZE)?;
                    (!is_zero(data)).then(|| block_digest(data))
                }
                None => below.digest_at(place),
            };
            if let Some(digest) = digest {
                page.push(place, digest);
            }
        }
        builder.put(index, &page)?;
    }
    Ok(builder.finish()?)
}

/// Whether page `index` of a disk of `blocks` blocks can be taken from the base as it is.
fn base_has_all_of(base: &Tree, index: u64, blocks: u64) -> bool {
    let end = (index + 1) * PAGE_BLOCKS;
    end <= base.blocks().min(blocks) || (base.blocks() == blocks && index < base.pages())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tree_builder::build_from;
    use super::*;

    const BLOCKS: usize = 400;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn is_the_tree_of_the_disk_that_the_increment_makes(
            base in prop::collection::vec(0_u8..3, BLOCKS),
            // 0 absent, 1 zero, 2.. data
            changes in prop::collection::vec(prop_oneof![8 => Just(0_u8), 1 => 1_u8..5], BLOCKS),
            base_cut in 0_usize..BLOCK_BYTES,
            cut in 0_usize..BLOCK_BYTES,
            grown in 0_usize..300,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let file = |name: &str, bytes: &[u8]| {
                std::fs::write(dir.path().join(name), bytes).unwrap();
                File::open(dir.path().join(name)).unwrap()
            };
            let mut below: Vec<u8> = base.iter().flat_map(|value| [*value; BLOCK_BYTES]).collect();
            below.truncate(BLOCKS * BLOCK_BYTES - base_cut);
            let tree_path = dir.path().join("base-tree");
            build_from(&file("base", &below), below.len() as u64, &tree_path).unwrap();
            let tree = Tree::open(&tree_path, None).unwrap();

            let size = BLOCKS * BLOCK_BYTES + grown * BLOCK_BYTES - if grown == 0 { base_cut } else { cut };
            let mut disk = below;
            disk.resize(size, 0);
            let mut diff = vec![0; size];
            let mut list = Vec::new();
            for (block, change) in changes.iter().enumerate().filter(|(_, change)| **change != 0) {
                let range = block * BLOCK_BYTES..size.min((block + 1) * BLOCK_BYTES);
                let value = if *change == 1 { 0 } else { change - 2 };
                disk[range.clone()].fill(value);
                diff[range].fill(value);
                list.push(Change { extent: Extent::new(block as u64, 1), zero: *change == 1 });
            }
            let built =
                build_increment_tree(&tree, size as u64, &list, &file("diff", &diff), &dir.path().join("tree")).unwrap();
            let whole = build_from(&file("whole", &disk), size as u64, &dir.path().join("whole-tree")).unwrap();
            prop_assert_eq!(built, whole);
            let read = |name: &str| std::fs::read(dir.path().join(name)).unwrap();
            prop_assert!(read("tree") == read("whole-tree"));
        }
    }
}
