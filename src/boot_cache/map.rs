//! The boot map: from a block of the image to the frame that brings it.
//!
//! Derived from the heads, never stored. 24 bytes a run rather than a word a block, and found by binary search: it is
//! asked only for blocks that are not present.

use super::heads::Run;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    start: u64,
    end: u64,
    frame: u32,
}

/// Which frame brings which blocks; no block is brought twice.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct BootMap {
    /// By first block; ranges do not overlap.
    entries: Vec<Entry>,
}

impl BootMap {
    /// The map of the runs of each frame, in order; none when a block occurs twice.
    pub(super) fn of<'a>(frames: impl Iterator<Item = &'a [Run]>) -> Option<Self> {
        let mut entries = Vec::new();
        for (frame, runs) in frames.enumerate() {
            let frame = u32::try_from(frame).ok()?;
            let of_run = |run: &Run| Entry { start: run.extent.start, end: run.extent.end(), frame };
            entries.extend(runs.iter().map(of_run));
        }
        entries.sort_unstable_by_key(|entry| entry.start);
        let disjoint = entries.windows(2).all(|pair| pair[0].end <= pair[1].start);
        disjoint.then_some(Self { entries })
    }

    pub(super) fn position(&self, block: u64) -> Option<usize> {
        let after = self.entries.partition_point(|entry| entry.start <= block);
        let entry = self.entries[..after].last()?;
        (block < entry.end).then_some(entry.frame as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::Extent;

    fn run(start: u64, count: u64) -> Run {
        Run { extent: Extent::new(start, count), zero: false }
    }

    #[test]
    fn finds_the_frame_of_each_block_and_none_between() {
        let frames = [vec![run(10, 2), run(0, 1)], vec![run(12, 3)]];
        let map = BootMap::of(frames.iter().map(Vec::as_slice)).unwrap();
        let found: Vec<Option<usize>> = (0..16).map(|block| map.position(block)).collect();
        assert_eq!(found[0], Some(0));
        assert_eq!(found[1..10], [None; 9]);
        assert_eq!(found[10..12], [Some(0); 2]);
        assert_eq!(found[12..15], [Some(1); 3]);
        assert_eq!(found[15], None);
    }

    #[test]
    fn a_block_that_occurs_twice_is_refused() {
        let frames = [vec![run(10, 3)], vec![run(12, 1)]];
        assert_eq!(BootMap::of(frames.iter().map(Vec::as_slice)), None);
    }
}
