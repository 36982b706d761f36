//! From reads to the order of the boot cache: which blocks a boot reads, each once, in first-touch order.
//!
//! Of several boots of one image, blocks are ordered by the mean rank of their first touch over the boots that read
//! them, ties in the order in which they were first seen; what only a minority of the boots read goes last. Pure.
//!
//! The algorithm that the thesis prints has two defects that are not here, and that the tests are named for: it shifts
//! by 3 where a block is 2¹² bytes, and its scan loses the index of the block it is on when it meets a taken block.

use std::collections::HashMap;

use super::recording::Recording;
use crate::block::Extent;

/// A block of the boot set, at its place in the order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Touch {
    /// Block index in the image.
    pub block: u64,
    /// When the recorded boots first asked for it, the mean over those that did, in ns since their start.
    pub time_ns: u64,
}

/// The blocks that `recordings` read, as extents in the order of [`first_touches`].
pub fn merge(recordings: &[Recording], image_blocks: u64) -> Vec<Extent> {
    extents(&first_touches(recordings, image_blocks))
}

/// The blocks that `recordings` read of an image of `image_blocks` blocks, each once, in the order in which a boot
/// will want them. What is asked for beyond the image's end is left out.
pub fn first_touches(recordings: &[Recording], image_blocks: u64) -> Vec<Touch> {
    let mut seen = Seen::default();
    for recording in recordings {
        seen.add(recording, image_blocks);
    }
    let (mut most, mut few): (Vec<Sums>, Vec<Sums>) =
        seen.blocks.into_iter().partition(|sums| u64::from(sums.runs) * 2 >= recordings.len() as u64);
    by_mean_rank(&mut most);
    by_mean_rank(&mut few);
    most.into_iter()
        .chain(few)
        .map(|sums| Touch { block: sums.block, time_ns: sums.mean_time_ns() })
        .collect()
}

/// Neighbours in order that are neighbours on the disk become one extent.
pub fn extents(touches: &[Touch]) -> Vec<Extent> {
    let mut extents: Vec<Extent> = Vec::new();
    for touch in touches {
        match extents.last_mut() {
            Some(last) if last.end() == touch.block => last.count += 1,
            _ => extents.push(Extent::new(touch.block, 1)),
        }
    }
    extents
}

/// What the recordings together say of one block.
#[derive(Debug, Clone, Copy)]
struct Sums {
    block: u64,
    rank: u64,
    time_ns: u128,
    /// Recordings that read it.
    runs: u32,
    /// The last recording that read it, to count each once.
    last_run: u32,
}

impl Sums {
    fn mean_time_ns(&self) -> u64 {
        u64::try_from(self.time_ns / u128::from(self.runs)).expect("a mean is no larger than the largest")
    }
}

/// Every block that was read so far, in the order of discovery.
#[derive(Debug, Default)]
struct Seen {
    blocks: Vec<Sums>,
    index: HashMap<u64, usize>,
    runs: u32,
}

impl Seen {
    fn add(&mut self, recording: &Recording, image_blocks: u64) {
        self.runs += 1;
        let mut rank = 0;
        for read in &recording.reads {
            let asked = Extent::touching(read.offset, read.length);
            for block in asked.start..asked.end().min(image_blocks) {
                if self.touch(block, rank, read.time_ns) {
                    rank += 1;
                }
            }
        }
    }

    /// Whether this is the first time that the present recording reads `block`.
    fn touch(&mut self, block: u64, rank: u64, time_ns: u64) -> bool {
        let at = *self.index.entry(block).or_insert_with(|| {
            self.blocks.push(Sums { block, rank: 0, time_ns: 0, runs: 0, last_run: 0 });
            self.blocks.len() - 1
        });
        let sums = &mut self.blocks[at];
        if sums.last_run == self.runs {
            return false;
        }
        sums.last_run = self.runs;
        sums.runs += 1;
        sums.rank += rank;
        sums.time_ns += u128::from(time_ns);
        true
    }
}

/// By mean rank; equal ones as they were discovered.
fn by_mean_rank(blocks: &mut [Sums]) {
    let crossed = |one: &Sums, other: &Sums| u128::from(one.rank) * u128::from(other.runs);
    blocks.sort_by(|one, other| crossed(one, other).cmp(&crossed(other, one)));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::recording::Read;
    use super::*;

    fn recording(reads: &[(u64, u64)]) -> Recording {
        let read = |(at, &(offset, length)): (usize, &(u64, u64))| Read {
            offset,
            length,
            time_ns: at as u64 * 10,
            took_ns: 0,
        };
        Recording::new(reads.iter().enumerate().map(read).collect(), reads.len() as u64 * 10)
    }

    fn blocks(recordings: &[Recording]) -> Vec<u64> {
        first_touches(recordings, 1 << 20).iter().map(|touch| touch.block).collect()
    }

    #[test]
    fn a_block_is_4096_bytes_where_the_thesis_shifts_by_3() {
        let read = recording(&[(5 << 12, 1 << 12), (7 << 12, 100)]);
        assert_eq!(merge(&[read], 1 << 20), [Extent::new(5, 1), Extent::new(7, 1)]);
    }

    #[test]
    fn a_taken_block_in_the_middle_of_a_read_does_not_lose_the_index_as_the_thesis_scan_does() {
        let read = recording(&[(12 << 12, 4096), (10 << 12, 5 << 12), (9 << 12, 7 << 12)]);
        assert_eq!(blocks(std::slice::from_ref(&read)), [12, 10, 11, 13, 14, 9, 15]);
        let expected = [(12, 1), (10, 2), (13, 2), (9, 1), (15, 1)].map(|(s, c)| Extent::new(s, c));
        assert_eq!(merge(&[read], 1 << 20), expected);
    }

    #[test]
    fn what_a_minority_of_boots_read_goes_last() {
        let usual = recording(&[(0, 4096), (8192, 4096)]);
        let odd = recording(&[(40960, 4096), (0, 4096), (8192, 4096)]);
        assert_eq!(blocks(&[odd, usual.clone(), usual]), [0, 2, 10]);
    }

    #[test]
    fn the_order_of_several_boots_is_the_mean_rank() {
        let one = recording(&[(0, 4096), (4096, 4096), (8192, 4096)]);
        let two = recording(&[(8192, 4096), (0, 4096), (4096, 4096)]);
        // Means: block 0: 1/2, block 1: 3/2, block 2: 2/2.
        assert_eq!(blocks(&[one.clone(), two.clone()]), [0, 2, 1]);
        // Means: block 0: 2/3, block 1: 5/3, block 2: 2/3, and it was seen first.
        assert_eq!(blocks(&[two.clone(), two, one]), [2, 0, 1]);
    }

    #[test]
    fn reads_beyond_the_image_are_clipped_whatever_they_claim() {
        let read = recording(&[(8192, u64::MAX / 2), (1 << 50, 4096)]);
        assert_eq!(merge(&[read], 4), [Extent::new(2, 2)]);
    }

    #[test]
    fn the_time_of_a_block_is_that_of_its_first_touch() {
        let read = recording(&[(0, 4096), (4096, 4096), (0, 4096)]);
        let times: Vec<u64> = first_touches(&[read], 10).iter().map(|touch| touch.time_ns).collect();
        assert_eq!(times, [0, 10]);
    }

    /// The definition, written with lists and a comparison sort.
    fn naive(recordings: &[Recording]) -> Vec<u64> {
        let orders: Vec<Vec<u64>> = recordings.iter().map(naive_order).collect();
        let mut all: Vec<u64> = Vec::new();
        for block in orders.iter().flatten() {
            if !all.contains(block) {
                all.push(*block);
            }
        }
        all.sort_by_key(|block| {
            let ranks: Vec<usize> = orders.iter().filter_map(|o| o.iter().position(|b| b == block)).collect();
            // All means as multiples of 1/60: there are at most five runs.
            (ranks.len() * 2 < recordings.len(), ranks.iter().sum::<usize>() * 60 / ranks.len())
        });
        all
    }

    fn naive_order(recording: &Recording) -> Vec<u64> {
        let mut order = Vec::new();
        for read in &recording.reads {
            for byte in read.offset..read.offset + read.length {
                if !order.contains(&(byte / 4096)) {
                    order.push(byte / 4096);
                }
            }
        }
        order
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn agrees_with_the_definition(
            runs in proptest::collection::vec(
                proptest::collection::vec((0_u64..100_000, 1_u64..20_000), 0..12), 1..5)
        ) {
            let recordings: Vec<Recording> = runs.iter().map(|reads| recording(reads)).collect();
            prop_assert_eq!(blocks(&recordings), naive(&recordings));
            let total: u64 = merge(&recordings, 1 << 20).iter().map(|extent| extent.count).sum();
            prop_assert_eq!(total, blocks(&recordings).len() as u64);
        }
    }
}
