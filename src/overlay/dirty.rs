//! Which blocks changed their state since the last flush.
//!
//! One bit a block, and a list of the words that have bits set, so that a flush costs what was written and not what
//! the disk measures. The map is changed first and the mark set afterwards: a flush that takes the mark sees the state.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use super::map::{BlockMap, Run, WORD_BLOCKS};
use crate::block::Extent;

/// A word of the map, and one bit for each of its blocks that changed.
pub(super) type DirtyWord = (usize, u32);

/// The set; goes with one [`BlockMap`].
#[derive(Debug)]
pub(super) struct DirtySet {
    bits: Box<[AtomicU32]>,
    words: Mutex<Vec<usize>>,
}

impl DirtySet {
    /// An empty set for a map of `words` words.
    pub(super) fn new(words: usize) -> Self {
        Self { bits: (0..words).map(|_| AtomicU32::new(0)).collect(), words: Mutex::default() }
    }

    /// Adds blocks of one word.
    pub(super) fn mark(&self, word: usize, bits: u32) {
        if self.bits[word].fetch_or(bits, Ordering::AcqRel) == 0 {
            self.words.lock().unwrap_or_else(PoisonError::into_inner).push(word);
        }
    }

    /// Takes everything out, in order.
    pub(super) fn take(&self) -> Vec<DirtyWord> {
        let mut words = std::mem::take(&mut *self.words.lock().unwrap_or_else(PoisonError::into_inner));
        words.sort_unstable();
        words
            .into_iter()
            .map(|word| (word, self.bits[word].swap(0, Ordering::AcqRel)))
            .filter(|(_, bits)| *bits != 0)
            .collect()
    }

    /// Puts back what a flush could not record.
    pub(super) fn put_back(&self, words: &[DirtyWord]) {
        words.iter().for_each(|(word, bits)| self.mark(*word, *bits));
    }
}

/// The runs of the marked blocks, with the state that they have now.
pub(super) fn runs_of(map: &BlockMap, words: &[DirtyWord]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (word, bits) in words {
        let base = *word as u64 * WORD_BLOCKS;
        for block in (0..WORD_BLOCKS).filter(|bit| bits >> bit & 1 == 1).map(|bit| base + bit) {
            let state = map.get(block);
            match runs.last_mut() {
                Some(run) if run.extent.end() == block && run.state == state => run.extent.count += 1,
                _ => runs.push(Run { extent: Extent::new(block, 1), state }),
            }
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::overlay::map::BlockState;

    #[test]
    fn gives_each_change_once_as_long_runs() {
        let map = BlockMap::new(200 * 4096);
        let set = DirtySet::new(map.words().len());
        map.set(Extent::new(30, 40), BlockState::Data, |word, bits| set.mark(word, bits));
        map.set(Extent::new(40, 5), BlockState::Zero, |word, bits| set.mark(word, bits));
        let taken = set.take();
        let run = |start, count, state| Run { extent: Extent::new(start, count), state };
        assert_eq!(
            runs_of(&map, &taken),
            [run(30, 10, BlockState::Data), run(40, 5, BlockState::Zero), run(45, 25, BlockState::Data)]
        );
        assert!(set.take().is_empty());
        set.put_back(&taken);
        assert_eq!(set.take(), taken);
    }
}
