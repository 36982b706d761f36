//! Which blocks are the overlay's own: two bits a block, flat in memory, read without a lock.
//!
//! Not durable and not ordered by itself: [`super::log`] holds what survives, [`super::dirty`] what has changed since. An
//! overlay that is written keeps a copy in [`super::live`], which outlives this process.
//! A state is stored with release and loaded with acquire ordering, so whoever sees [`BlockState::Data`] also sees the
//! bytes that were written to the diff before.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::block::{Extent, blocks_for};

/// Blocks in one word of the map.
pub(super) const WORD_BLOCKS: u64 = 32;
/// The low bit of every block's pair.
const LOW_BITS: u64 = 0x5555_5555_5555_5555;

/// Where a block's bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockState {
    /// In the layer below.
    Absent,
    /// In the diff.
    Data,
    /// Nowhere: it reads as zeroes.
    Zero,
}

impl BlockState {
    /// The two bits of this state, in memory and on disk.
    pub(super) const fn bits(self) -> u64 {
        match self {
            Self::Absent => 0,
            Self::Data => 1,
            Self::Zero => 2,
        }
    }

    /// The state of two bits; 3 is none.
    pub(super) const fn from_bits(bits: u64) -> Option<Self> {
        match bits {
            0 => Some(Self::Absent),
            1 => Some(Self::Data),
            2 => Some(Self::Zero),
            _ => None,
        }
    }
}

/// Blocks that follow each other and share a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The blocks.
    pub extent: Extent,
    /// Their state.
    pub state: BlockState,
}

/// The map of one disk.
#[derive(Debug)]
pub(super) struct BlockMap {
    words: Box<[AtomicU64]>,
    blocks: u64,
}

impl BlockMap {
    /// A map of a disk of `size` bytes, all blocks absent.
    pub(super) fn new(size: u64) -> Self {
        let blocks = blocks_for(size);
        let words = (0..blocks.div_ceil(WORD_BLOCKS)).map(|_| AtomicU64::new(0)).collect();
        Self { words, blocks }
    }

    /// Another map of this disk, if `words` could be one: as many, each state a valid one, none beyond the end.
    pub(super) fn with_words(&self, words: impl Iterator<Item = u64>) -> Option<Self> {
        let map = Self { words: words.map(AtomicU64::new).collect(), blocks: self.blocks };
        let beyond = match self.blocks % WORD_BLOCKS {
            0 => 0,
            rest => u64::MAX << (2 * rest),
        };
        let is_valid = map.words.len() == self.words.len()
            && map.words().all(|word| word & (word >> 1) & LOW_BITS == 0)
            && map.words.last().is_none_or(|last| load(last) & beyond == 0);
        is_valid.then_some(map)
    }

    /// A copy of some words, as the map of a disk of its own.
    pub(super) fn part(&self, words: Range<usize>) -> Self {
        let words: Box<[AtomicU64]> = self.words[words].iter().map(|word| load(word).into()).collect();
        Self { blocks: words.len() as u64 * WORD_BLOCKS, words }
    }

    /// The words, two bits a block.
    pub(super) fn words(&self) -> impl ExactSizeIterator<Item = u64> {
        self.words.iter().map(load)
    }

    /// Tells `changed` of every block whose state differs from that in `other`, a map of the same disk.
    pub(super) fn differences(&self, other: &Self, mut changed: impl FnMut(usize, u32)) {
        for (index, (word, other)) in self.words().zip(other.words()).enumerate() {
            let differs = word ^ other;
            if differs != 0 {
                changed(index, even_bits((differs | differs >> 1) & LOW_BITS));
            }
        }
    }

    /// The state of one block.
    pub(super) fn get(&self, block: u64) -> BlockState {
        let (word, shift) = position(block);
        state_at(load(&self.words[word]), shift)
    }

    /// The run that starts at `start`, cut at `end`. `start` must be below `end`.
    pub(super) fn run(&self, start: u64, end: u64) -> Run {
        debug_assert!(start < end && end <= self.blocks, "a run lies within the disk");
        let state = self.get(start);
        let all_same = state.bits() * LOW_BITS;
        let mut at = start;
        while at < end {
            let (word, shift) = position(at);
            // Pairs that differ from `state`, seen from `at` upwards.
            let different = (load(&self.words[word]) ^ all_same) >> shift;
            let rest = WORD_BLOCKS - at % WORD_BLOCKS;
            let same = u64::from(different.trailing_zeros() / 2).min(rest);
            at += same;
            if same < rest {
                break;
            }
        }
        // Another thread may have changed the first block between the two looks.
        let count = at.min(end).saturating_sub(start).max(1);
        Run { extent: Extent::new(start, count), state }
    }

    /// The runs of `extent`, in order.
    pub(super) fn runs(&self, extent: Extent) -> impl Iterator<Item = Run> + '_ {
        let mut at = extent.start;
        std::iter::from_fn(move || {
            if at >= extent.end() {
                return None;
            }
            let run = self.run(at, extent.end());
            at = run.extent.end();
            Some(run)
        })
    }

    /// All runs that are not absent, in order.
    pub(super) fn own_runs(&self) -> Vec<Run> {
        self.runs(Extent::new(0, self.blocks)).filter(|run| run.state != BlockState::Absent).collect()
    }

    /// Whether every block of `extent` has this state.
    pub(super) fn all(&self, extent: Extent, state: BlockState) -> bool {
        self.runs(extent).all(|run| run.state == state)
    }

    /// Sets every block of `extent`, and tells `changed` the number of each word in which that changed something, with
    /// one bit for each block changed.
    pub(super) fn set(&self, extent: Extent, state: BlockState, mut changed: impl FnMut(usize, u32)) {
        assert!(extent.end() <= self.blocks, "a run lies within the disk");
        let pattern = state.bits() * LOW_BITS;
        let mut at = extent.start;
        while at < extent.end() {
            let (word, shift) = position(at);
            let count = (WORD_BLOCKS - at % WORD_BLOCKS).min(extent.end() - at);
            let mask = (u64::MAX >> (64 - 2 * count)) << shift;
            let before = self.words[word]
                .fetch_update(Ordering::AcqRel, Ordering::Acquire, |old| Some(old & !mask | pattern & mask))
                .expect("the closure always gives a value");
            let differs = (before ^ pattern) & mask;
            if differs != 0 {
                changed(word, even_bits((differs | differs >> 1) & LOW_BITS));
            }
            at += count;
        }
    }

    /// Blocks in each state that is not absent: data, zero.
    pub(super) fn counts(&self) -> (u64, u64) {
        self.words().fold((0, 0), |(data, zero), word| {
            (
                data + u64::from((word & LOW_BITS).count_ones()),
                zero + u64::from((word & !LOW_BITS).count_ones()),
            )
        })
    }
}

fn load(word: &AtomicU64) -> u64 {
    word.load(Ordering::Acquire)
}

/// Word and shift of a block's pair of bits.
fn position(block: u64) -> (usize, u32) {
    let word = usize::try_from(block / WORD_BLOCKS).expect("the map of such a disk fits into memory");
    let shift = u32::try_from(block % WORD_BLOCKS * 2).expect("below 64");
    (word, shift)
}

fn state_at(word: u64, shift: u32) -> BlockState {
    BlockState::from_bits(word >> shift & 3).expect("only valid states are ever stored")
}

/// Moves the 32 even bits together.
fn even_bits(bits: u64) -> u32 {
    let mut x = bits & LOW_BITS;
    x = (x | x >> 1) & 0x3333_3333_3333_3333;
    x = (x | x >> 2) & 0x0f0f_0f0f_0f0f_0f0f;
    x = (x | x >> 4) & 0x00ff_00ff_00ff_00ff;
    x = (x | x >> 8) & 0x0000_ffff_0000_ffff;
    u32::try_from((x | x >> 16) & 0xffff_ffff).expect("32 bits are left")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::block::BLOCK_SIZE;

    const STATES: [BlockState; 3] = [BlockState::Absent, BlockState::Data, BlockState::Zero];

    proptest! {
        #[test]
        fn behaves_like_a_vector_of_states(
            blocks in 1u64..300,
            steps in proptest::collection::vec((0u64..300, 0u64..300, 0usize..3), 0..40),
        ) {
            let map = BlockMap::new(blocks * BLOCK_SIZE);
            let mut model = vec![BlockState::Absent; usize::try_from(blocks).unwrap()];
            for (a, b, state) in steps {
                let (start, end) = (a.min(b) % blocks, a.max(b).min(blocks));
                let extent = Extent::new(start, end.saturating_sub(start));
                let mut changed = Vec::new();
                map.set(extent, STATES[state], |word, bits| {
                    changed.extend((0..32).filter(|bit| bits >> bit & 1 == 1).map(|bit| word * 32 + bit));
                });
                let mut expected = Vec::new();
                for block in extent.blocks() {
                    let block = usize::try_from(block).unwrap();
                    if model[block] != STATES[state] {
                        model[block] = STATES[state];
                        expected.push(block);
                    }
                }
                prop_assert_eq!(changed, expected);
                let mut at = 0;
                for run in map.runs(Extent::new(0, blocks)) {
                    prop_assert_eq!(run.extent.start, at);
                    for block in run.extent.blocks() {
                        prop_assert_eq!(model[usize::try_from(block).unwrap()], run.state);
                    }
                    at = run.extent.end();
                    prop_assert!(at == blocks || model[usize::try_from(at).unwrap()] != run.state, "runs are as long as can be");
                }
                prop_assert_eq!(at, blocks);
            }
        }
    }
}
