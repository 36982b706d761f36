//! What guests read that the boot cache did not foresee: kept, so that `record --merge-misses` can make it better.
//!
//! Each block once, in the order in which it was missed, with the time since the transfer began. Kept beside the image
//! in the form of a recording (`images/ROOT/misses`); losing it costs nothing, so a damaged one is begun anew.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;

use crate::block::BLOCK_SIZE;
use crate::boot_cache::kept;
use crate::boot_cache::recording::{Read, Recording};
use crate::digest::Digest;
use crate::store::write_atomic;

/// The file's name in the image's folder.
pub const FILE: &str = "misses";
/// Blocks that are kept; the first ones of a boot matter most.
const BLOCKS_MAX: usize = 1 << 16;

/// The blocks of one image that were missed. Owned by its transfer.
#[derive(Debug)]
pub(super) struct Missed {
    path: PathBuf,
    root: Digest,
    began: Instant,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    known: HashSet<u64>,
    reads: Vec<Read>,
    /// How many of `reads` the file has.
    saved: usize,
}

impl Missed {
    /// Goes on with what is kept in the image's folder `dir`.
    pub(super) fn open(dir: &Path, root: Digest) -> Self {
        let path = dir.join(FILE);
        let kept = kept::read(&path).ok().filter(|(found, _)| *found == root);
        let reads = kept.map_or_else(Vec::new, |(_, recording)| recording.reads);
        let known = reads.iter().map(|read| read.offset / BLOCK_SIZE).collect();
        let state = State { known, saved: reads.len(), reads };
        Self { path, root, began: Instant::now(), state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes blocks that a guest waits for and the boot cache does not have.
    pub(super) fn note(&self, blocks: impl Iterator<Item = u64>) {
        let time_ns = u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let mut state = self.state();
        for block in blocks {
            if state.reads.len() < BLOCKS_MAX && state.known.insert(block) {
                let read = Read { offset: block * BLOCK_SIZE, length: BLOCK_SIZE, time_ns, took_ns: 0 };
                state.reads.push(read);
            }
        }
    }

    /// Keeps what was missed since the last time. Blocking. Of a failure people are told: it costs a hint, no byte.
    pub(super) fn save(&self) {
        let reads = {
            let state = self.state();
            if state.saved == state.reads.len() {
                return;
            }
            state.reads.clone()
        };
        let count = reads.len();
        let end_ns = reads.iter().map(|read| read.time_ns).max().unwrap_or(0);
        let recording = Recording::new(reads, end_ns);
        match write_atomic(&self.path, &recording.to_bytes(self.root)) {
            Ok(()) => self.state().saved = count,
            Err(error) => tracing::warn!(path = %self.path.display(), %error, "cannot keep what was missed"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_block_is_kept_once_across_restarts() {
        let dir = tempfile::tempdir().unwrap();
        let root = Digest::of(b"image");
        let missed = Missed::open(dir.path(), root);
        missed.note([7, 9, 7].into_iter());
        missed.save();
        missed.note([11].into_iter());
        drop(missed);
        let missed = Missed::open(dir.path(), root);
        missed.note([9, 3].into_iter());
        missed.save();
        let (found, recording) = kept::read(&dir.path().join(FILE)).unwrap();
        let mut blocks: Vec<u64> = recording.reads.iter().map(|read| read.offset / BLOCK_SIZE).collect();
        blocks.sort_unstable();
        assert_eq!((found, blocks), (root, vec![3, 7, 9]));
        std::fs::write(dir.path().join(FILE), b"rubbish").unwrap();
        assert!(Missed::open(dir.path(), root).state().reads.is_empty());
    }
}
