//! Turning an overlay into an incremental image: dropping what the base has anyway.
//!
//! Sealing works in place and changes no byte of what the disk shows: a data block equal to the base's becomes absent,
//! one of zeroes becomes zero, a zero block over zeroes becomes absent. The pruned index is written first, atomically,
//! and the space of what it no longer names is given back afterwards, so a crash at any point leaves a valid overlay.
//! What then stands in the folder, `index` and `diff`, is an increment's `index` and `disk`.

use std::io;
use std::sync::atomic::Ordering;

use bootcache_nbd::{Attempt, SharedDisk};

use super::layer::read_diff;
use super::map::{BlockState, Run};
use super::{Overlay, Usage};
use crate::block::{BLOCK_SIZE, Extent};

/// Blocks compared at a time.
const CHUNK_BLOCKS: u64 = 256;

/// What sealing came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sealed {
    /// What is the increment's own.
    pub own: Usage,
    /// Blocks that the overlay held although the base has the same.
    pub dropped_blocks: u64,
}

impl Overlay {
    /// Refuses writes from now on (`EROFS`), then makes the overlay an incremental image as described above.
    ///
    /// Nothing may still be writing. If it fails the overlay is valid and can be sealed again, or opened again to go
    /// on writing. Dropping the future has the same effect as a failure.
    pub async fn seal(&self) -> io::Result<Sealed> {
        self.0.sealed.store(true, Ordering::SeqCst);
        self.0.flush().await?;
        let map = &self.0.layer.map;
        let mut own = Vec::new();
        let mut dropped = Vec::new();
        for run in map.runs(Extent::new(0, map.blocks())).filter(|run| run.state != BlockState::Absent) {
            let mut start = run.extent.start;
            while start < run.extent.end() {
                let chunk = Extent::new(start, CHUNK_BLOCKS.min(run.extent.end() - start));
                self.classify(Run { extent: chunk, state: run.state }, &mut own, &mut dropped).await?;
                start = chunk.end();
            }
        }
        self.0.rewrite_index(own.clone()).await?;
        let inner = self.0.clone();
        let dropped_blocks = dropped.iter().map(|run: &Run| run.extent.count).sum();
        super::layer::blocking(move || {
            for run in dropped.iter().chain(own.iter().filter(|run| run.state == BlockState::Zero)) {
                inner.layer.map.set(run.extent, run.state, |_, _| ());
                inner.punch(run.extent)?;
            }
            inner.layer.diff.sync()
        })
        .await?;
        Ok(Sealed { own: self.usage(), dropped_blocks })
    }

    /// Sorts the blocks of a run into what is the increment's own and what the base has too.
    async fn classify(&self, run: Run, own: &mut Vec<Run>, dropped: &mut Vec<Run>) -> io::Result<()> {
        let layer = &self.0.layer;
        let length = (run.extent.end() * BLOCK_SIZE).min(layer.size) - run.extent.offset();
        let length = usize::try_from(length).expect("a chunk is small");
        let mut ours = vec![0; length];
        let mut theirs = vec![0; length];
        if run.state == BlockState::Data {
            read_diff(&layer.diff, run.extent.offset(), &mut ours).await?;
        }
        read_disk(&layer.base, run.extent.offset(), &mut theirs).await?;
        let block_bytes = usize::try_from(BLOCK_SIZE).expect("4096");
        let pairs = ours.chunks(block_bytes).zip(theirs.chunks(block_bytes));
        for (block, (our, their)) in run.extent.blocks().zip(pairs) {
            if our == their {
                push(dropped, block, BlockState::Absent);
            } else if our.iter().all(|byte| *byte == 0) {
                push(own, block, BlockState::Zero);
            } else {
                push(own, block, BlockState::Data);
            }
        }
        Ok(())
    }
}

fn push(runs: &mut Vec<Run>, block: u64, state: BlockState) {
    match runs.last_mut() {
        Some(run) if run.extent.end() == block && run.state == state => run.extent.count += 1,
        _ => runs.push(Run { extent: Extent::new(block, 1), state }),
    }
}

async fn read_disk(disk: &SharedDisk, offset: u64, buf: &mut [u8]) -> io::Result<()> {
    match disk.try_read(offset, buf) {
        Attempt::Ready(result) => result,
        Attempt::WouldBlock => disk.read(offset, buf).await,
    }
}
