//! Blocks: the vocabulary, and the only byte ↔ block arithmetic of the crate.
//!
//! Offsets and lengths are bytes (`u64`); indexes and counts are blocks. Everything that maps between the two is here.

use std::fmt;
use std::ops::Range;

/// Bytes in a block: the unit of presence, index and request.
pub const BLOCK_SIZE: u64 = 4096;
/// [`BLOCK_SIZE`] for slices.
pub const BLOCK_BYTES: usize = 4096;

/// The number of a block within an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockIndex(pub u64);

impl BlockIndex {
    /// The block that holds byte `offset`.
    pub const fn containing(offset: u64) -> Self {
        Self(offset / BLOCK_SIZE)
    }

    /// Byte offset of the block's first byte.
    pub const fn offset(self) -> u64 {
        self.0 * BLOCK_SIZE
    }
}

impl fmt::Display for BlockIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A run of blocks, `start` included, `end` not.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Extent {
    /// First block.
    pub start: u64,
    /// Number of blocks.
    pub count: u64,
}

impl Extent {
    /// `count` blocks from `start`.
    pub const fn new(start: u64, count: u64) -> Self {
        Self { start, count }
    }

    /// The blocks that `length` bytes at `offset` touch. An empty range touches none.
    pub const fn touching(offset: u64, length: u64) -> Self {
        if length == 0 {
            return Self { start: offset / BLOCK_SIZE, count: 0 };
        }
        let start = offset / BLOCK_SIZE;
        Self { start, count: (offset + length - 1) / BLOCK_SIZE - start + 1 }
    }

    /// The blocks that lie wholly within `length` bytes at `offset`.
    pub const fn within(offset: u64, length: u64) -> Self {
        let start = offset.div_ceil(BLOCK_SIZE);
        let end = (offset + length) / BLOCK_SIZE;
        Self { start, count: end.saturating_sub(start) }
    }

    /// One past the last block.
    pub const fn end(self) -> u64 {
        self.start + self.count
    }

    /// Byte offset of the first block.
    pub const fn offset(self) -> u64 {
        self.start * BLOCK_SIZE
    }

    /// Length in bytes.
    pub const fn bytes(self) -> u64 {
        self.count * BLOCK_SIZE
    }

    /// Whether there is no block in it.
    pub const fn is_empty(self) -> bool {
        self.count == 0
    }

    /// The block indexes.
    pub const fn blocks(self) -> Range<u64> {
        self.start..self.end()
    }
}

impl fmt::Debug for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.start, self.count)
    }
}

/// Blocks needed for `bytes` bytes; the last may be partly past the end.
pub const fn blocks_for(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK_SIZE)
}

/// Bytes of block `index` that lie within a disk of `size` bytes: [`BLOCK_SIZE`] for all but the last block.
pub const fn bytes_in_block(index: u64, size: u64) -> u64 {
    let start = index * BLOCK_SIZE;
    let rest = size.saturating_sub(start);
    if rest < BLOCK_SIZE { rest } else { BLOCK_SIZE }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn touching_covers_partial_blocks_at_both_ends() {
        assert_eq!(Extent::touching(4095, 2), Extent::new(0, 2));
        assert_eq!(Extent::touching(4096, 4096), Extent::new(1, 1));
        assert_eq!(Extent::touching(5, 0).count, 0);
    }

    #[test]
    fn within_leaves_partial_blocks_out() {
        assert_eq!(Extent::within(1, 8191), Extent::new(1, 1));
        assert_eq!(Extent::within(1, 4096).count, 0);
        assert_eq!(Extent::within(4096, 8192), Extent::new(1, 2));
    }

    #[test]
    fn the_last_block_may_be_short() {
        assert_eq!(bytes_in_block(1, 5000), 904);
        assert_eq!(bytes_in_block(0, 5000), 4096);
        assert_eq!(blocks_for(5000), 2);
    }
}
