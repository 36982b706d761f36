//! Which blocks of an image are here: one bit a block, flat and atomic.
//!
//! Bits are only ever set, except of blocks that were found to be wrong. A set bit publishes the bytes that were
//! written before it. Not durable: `super::saved` is.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use roaring::RoaringBitmap;

use crate::block::Extent;

/// The blocks of one image that are here.
#[derive(Debug)]
pub(super) struct Presence {
    words: Vec<AtomicU64>,
    blocks: u64,
    present: AtomicU64,
    complete: AtomicBool,
}

/// The bits of `extent` that fall into each word: `(word, mask)`.
fn masks(extent: Extent) -> impl Iterator<Item = (usize, u64)> {
    let end = extent.end();
    let first = if extent.is_empty() { end } else { extent.start / 64 * 64 };
    (first..end).step_by(64).map(move |base| {
        let low = extent.start.max(base) - base;
        let high = (end - base).min(64);
        let mask = (u64::MAX >> (64 - (high - low))) << low;
        (usize::try_from(base / 64).expect("the bitmap is in memory"), mask)
    })
}

impl Presence {
    /// Nothing of `blocks` blocks is here.
    pub(super) fn new(blocks: u64) -> Self {
        let words = (0..blocks.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self { words, blocks, present: AtomicU64::new(0), complete: AtomicBool::new(blocks == 0) }
    }

    /// Number of blocks, present or not.
    pub(super) const fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Blocks that are present.
    pub(super) fn count(&self) -> u64 {
        self.present.load(Ordering::Relaxed)
    }

    /// Whether every block is present; once so, no bit needs to be looked at again.
    pub(super) fn is_complete(&self) -> bool {
        self.complete.load(Ordering::Acquire)
    }

    /// Marks `extent` present. Whether a bit changed.
    pub(super) fn set(&self, extent: Extent) -> bool {
        let mut fresh = 0;
        for (word, mask) in masks(extent) {
            let before = self.words[word].fetch_or(mask, Ordering::Release);
            fresh += u64::from((mask & !before).count_ones());
        }
        if fresh > 0 && self.present.fetch_add(fresh, Ordering::AcqRel) + fresh == self.blocks {
            self.complete.store(true, Ordering::Release);
        }
        fresh > 0
    }

    /// Marks `block` absent again.
    pub(super) fn forget(&self, block: u64) {
        self.complete.store(false, Ordering::Release);
        for (word, mask) in masks(Extent::new(block, 1)) {
            if self.words[word].fetch_and(!mask, Ordering::AcqRel) & mask != 0 {
                self.present.fetch_sub(1, Ordering::AcqRel);
            }
        }
        self.complete.store(self.count() == self.blocks, Ordering::Release);
    }

    /// Whether all of `extent` is present.
    pub(super) fn has(&self, extent: Extent) -> bool {
        self.is_complete()
            || masks(extent).all(|(word, mask)| self.words[word].load(Ordering::Acquire) & mask == mask)
    }

    /// The runs of `extent` whose bits are `present`, in order.
    pub(super) fn runs(&self, extent: Extent, present: bool) -> Vec<Extent> {
        self.first_runs(extent, present, usize::MAX)
    }

    /// The first of them, `most` at most.
    pub(super) fn first_runs(&self, extent: Extent, present: bool, most: usize) -> Vec<Extent> {
        let mut runs: Vec<Extent> = Vec::new();
        let mut push = |start: u64, count: u64| {
            let is_full = runs.len() == most;
            match runs.last_mut() {
                Some(last) if last.end() == start => last.count += count,
                _ if is_full => return false,
                _ => runs.push(Extent::new(start, count)),
            }
            true
        };
        for (word, mask) in masks(extent) {
            let bits = self.words[word].load(Ordering::Acquire);
            let mut rest = mask & if present { bits } else { !bits };
            let base = word as u64 * 64;
            while rest != 0 {
                let low = u64::from(rest.trailing_zeros());
                let length = u64::from((!(rest >> low)).trailing_zeros());
                if !push(base + low, length) {
                    return runs;
                }
                if low + length >= 64 {
                    break;
                }
                rest &= u64::MAX << (low + length);
            }
        }
        runs
    }

    /// The bits as they are now, for disk and wire.
    pub(super) fn snapshot(&self) -> RoaringBitmap {
        let mut bitmap = RoaringBitmap::new();
        for run in self.runs(Extent::new(0, self.blocks), true) {
            let start = u32::try_from(run.start).expect("an image has at most 2^31 blocks");
            let end = u32::try_from(run.end()).expect("an image has at most 2^31 blocks");
            bitmap.insert_range(start..end);
        }
        bitmap
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn agrees_with_a_set_of_numbers(
            blocks in 1_u64..400,
            sets in prop::collection::vec((0_u64..400, 1_u64..200), 0..12),
            probe in (0_u64..400, 1_u64..200),
        ) {
            let clip = |(start, count): (u64, u64)| {
                let start = start % blocks;
                Extent::new(start, count.min(blocks - start))
            };
            let presence = Presence::new(blocks);
            let mut model = BTreeSet::new();
            for set in sets {
                let extent = clip(set);
                let fresh = extent.blocks().any(|block| !model.contains(&block));
                prop_assert_eq!(presence.set(extent), fresh);
                model.extend(extent.blocks());
            }
            let probe = clip(probe);
            prop_assert_eq!(presence.has(probe), probe.blocks().all(|block| model.contains(&block)));
            for present in [true, false] {
                let runs = presence.runs(probe, present);
                prop_assert!(runs.windows(2).all(|pair| pair[0].end() < pair[1].start));
                let found: Vec<u64> = runs.iter().flat_map(|run| run.blocks()).collect();
                let expected: Vec<u64> =
                    probe.blocks().filter(|block| model.contains(block) == present).collect();
                prop_assert_eq!(found, expected);
                for most in 0..4 {
                    let first = presence.first_runs(probe, present, most);
                    prop_assert_eq!(&first[..], &runs[..runs.len().min(most)]);
                }
            }
            prop_assert_eq!(presence.count(), model.len() as u64);
            prop_assert_eq!(presence.is_complete(), model.len() as u64 == blocks);
            prop_assert_eq!(presence.snapshot().iter().map(u64::from).collect::<BTreeSet<_>>(), model);
        }
    }
}
