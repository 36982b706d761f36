//! The table of the thesis (logical, allocated, requested, unique) and the distributions of its figures.

use serde::Serialize;

use crate::block::{BLOCK_SIZE, Extent};
use crate::boot_cache::merge::{extents, first_touches};
use crate::boot_cache::recording::Recording;

/// Upper bounds of the size classes in bytes, the last class open.
pub const CLASS_BOUNDS: [u64; 6] = [4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10, 128 << 10];
/// What to call the size classes.
pub const CLASS_LABELS: [&str; 7] = ["≤4K", "4-8K", "8-16K", "16-32K", "32-64K", "64-128K", ">128K"];
/// Units to which the boot set is rounded up, in bytes, to see what larger requests would cost.
pub const UNITS: [u64; 4] = [16 << 10, 64 << 10, 256 << 10, 1 << 20];

/// Reads of one size class.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Class {
    /// Number of reads.
    pub reads: u64,
    /// Bytes that they asked for.
    pub bytes: u64,
}

/// Lengths of the runs in first-touch order, in blocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct RunLengths {
    /// Half are no longer.
    pub median: u64,
    /// Nine of ten are no longer.
    pub p90: u64,
    /// The longest.
    pub max: u64,
}

/// What the recordings of an image say together; of several, reads and bytes requested are those of a mean boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Boots recorded.
    pub boots: usize,
    /// Size of the image in bytes.
    pub logical: u64,
    /// Bytes of the image that are not zero; none when the image is not at hand.
    pub allocated: Option<u64>,
    /// Reads of one boot.
    pub reads: u64,
    /// Bytes that one boot asked for.
    pub requested: u64,
    /// Bytes of the blocks that were read, each once.
    pub unique: u64,
    /// Runs in first-touch order.
    pub extents: u64,
    /// How long those are.
    pub run_lengths: RunLengths,
    /// By [`CLASS_LABELS`], of one boot.
    pub classes: [Class; 7],
    /// Bytes of the boot set rounded up to each of [`UNITS`].
    pub rounded: [u64; 4],
    /// When the boot was over, in ms since its start; the mean.
    pub end_ms: u64,
}

impl Summary {
    /// Of one or more recordings of an image of `logical` bytes.
    pub fn of(recordings: &[Recording], logical: u64, allocated: Option<u64>) -> Self {
        let boots = recordings.len().max(1) as u64;
        let touches = first_touches(recordings, logical.div_ceil(BLOCK_SIZE));
        let runs = extents(&touches);
        let mut classes = [Class::default(); 7];
        for read in recordings.iter().flat_map(|recording| &recording.reads) {
            let class = &mut classes[class_of(read.length)];
            class.reads += 1;
            class.bytes += read.length;
        }
        for class in &mut classes {
            *class = Class { reads: class.reads / boots, bytes: class.bytes / boots };
        }
        let mut blocks: Vec<u64> = touches.iter().map(|touch| touch.block).collect();
        blocks.sort_unstable();
        Self {
            boots: recordings.len(),
            logical,
            allocated,
            reads: recordings.iter().map(|recording| recording.reads.len() as u64).sum::<u64>() / boots,
            requested: recordings.iter().map(Recording::bytes_requested).sum::<u64>() / boots,
            unique: touches.len() as u64 * BLOCK_SIZE,
            extents: runs.len() as u64,
            run_lengths: run_lengths(&runs),
            classes,
            rounded: UNITS.map(|unit| rounded_up(&blocks, unit)),
            end_ms: recordings.iter().map(|recording| recording.end_ns / 1_000_000).sum::<u64>() / boots,
        }
    }
}

/// The index of the size class of a read of `length` bytes.
pub fn class_of(length: u64) -> usize {
    CLASS_BOUNDS.iter().position(|bound| length <= *bound).unwrap_or(CLASS_BOUNDS.len())
}

fn run_lengths(runs: &[Extent]) -> RunLengths {
    let mut lengths: Vec<u64> = runs.iter().map(|run| run.count).collect();
    lengths.sort_unstable();
    let at = |percent: usize| lengths.get((lengths.len().max(1) - 1) * percent / 100).copied().unwrap_or(0);
    RunLengths { median: at(50), p90: at(90), max: at(100) }
}

fn rounded_up(sorted_blocks: &[u64], unit: u64) -> u64 {
    let mut units: Vec<u64> = sorted_blocks.iter().map(|block| block * BLOCK_SIZE / unit).collect();
    units.dedup();
    units.len() as u64 * unit
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot_cache::recording::Read;

    #[test]
    fn counts_what_a_small_boot_read() {
        let sizes = [(0, 512), (0, 4096), (8192, 8192), (1 << 20, 256 << 10), (4096, 4096)];
        let read = |(time_ns, &(offset, length)): (usize, &(u64, u64))| Read {
            offset,
            length,
            time_ns: time_ns as u64,
            took_ns: 0,
        };
        let recording = Recording::new(sizes.iter().enumerate().map(read).collect(), 7_000_000);
        let summary = Summary::of(&[recording.clone(), recording], 2 << 20, Some(1 << 20));
        assert_eq!((summary.boots, summary.reads, summary.end_ms), (2, 5, 7));
        assert_eq!(summary.requested, 512 + 4096 + 8192 + (256 << 10) + 4096);
        assert_eq!(summary.unique, (1 + 2 + 64 + 1) * 4096);
        assert_eq!(summary.extents, 4);
        assert_eq!(summary.run_lengths, RunLengths { median: 1, p90: 2, max: 64 });
        assert_eq!(summary.classes.map(|class| class.reads), [3, 1, 0, 0, 0, 0, 1]);
        assert_eq!(
            summary.rounded,
            [16 << 10, 64 << 10, 256 << 10, 1 << 20]
                .map(|unit: u64| { unit + (256_u64 << 10).next_multiple_of(unit) })
        );
    }

    #[test]
    fn classes_include_their_upper_bound() {
        assert_eq!([1, 4096, 4097, 8192, 16384, 131_072, 131_073].map(class_of), [0, 0, 1, 1, 2, 5, 6]);
    }

    #[test]
    fn a_boot_that_read_nothing_is_all_zeroes() {
        let summary = Summary::of(&[Recording::default()], 4096, None);
        assert_eq!((summary.reads, summary.unique, summary.run_lengths.max), (0, 0, 0));
    }
}
