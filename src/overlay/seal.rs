//! Making an incremental image of an overlay: its own index and disk, without what the base has anyway.
//!
//! The image gets a copy, so that the overlay can be written again without harm to it. A data block equal to the base's
//! is left out, one of zeroes becomes zero, a zero block over zeroes is left out. The disk is synced before the
//! index, which makes the pair an increment, is written.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bootcache_nbd::{Attempt, SharedDisk};

use super::layer::{blocking, read_diff};
use super::map::{BlockState, Run};
use super::storage::{DiffFile, FileDiff};
use super::{INDEX_FILE, Inner, Overlay, OverlayError, write_index};
use crate::block::{BLOCK_BYTES, BLOCK_SIZE, Extent};

/// The disk's file name within an increment's folder.
pub const DISK_FILE: &str = "disk";
/// Blocks compared and copied at a time.
const CHUNK_BLOCKS: u64 = 256;

/// What sealing came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sealed {
    /// What is the increment's own, in order.
    pub runs: Vec<Run>,
    /// Blocks that the overlay holds although the base has the same.
    pub dropped_blocks: u64,
}

/// Ends the time in which writes are refused.
struct Frozen<'a>(&'a Inner);

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        self.0.sealed.store(false, Ordering::SeqCst);
    }
}

impl Overlay {
    /// Makes `index` and `disk` of an incremental image in the existing folder `dir`, which must hold neither.
    ///
    /// The overlay is flushed first and stays what it is; nothing may be writing to it, and writes are refused (`EROFS`)
    /// until the future ends or is dropped. What is in `dir` after a failure is no image.
    ///
    /// # Errors
    /// [`OverlayError::Diff`] when blocks cannot be read or copied, [`OverlayError::Index`].
    pub async fn seal(&self, dir: &Path) -> Result<Sealed, OverlayError> {
        self.0.sealed.store(true, Ordering::SeqCst);
        let _frozen = Frozen(&self.0);
        let disk = dir.join(DISK_FILE);
        let sealed = self
            .copy_own(&disk)
            .await
            .map_err(|error| OverlayError::Diff { path: disk.display().to_string(), error })?;
        let (index, header) = (dir.join(INDEX_FILE), self.0.header);
        let written = tokio::task::spawn_blocking(move || {
            write_index(&index, header, &sealed.runs)?;
            Ok(sealed)
        });
        written.await.unwrap_or_else(|error| {
            let error = io::Error::other(error);
            Err(OverlayError::Index { path: dir.join(INDEX_FILE).display().to_string(), error: error.into() })
        })
    }

    async fn copy_own(&self, disk: &Path) -> io::Result<Sealed> {
        self.0.flush().await?;
        let (path, size) = (disk.to_owned(), self.0.layer.size);
        let disk = Arc::new(blocking(move || FileDiff::create(&path, size)).await?);
        let mut sealed = Sealed { runs: Vec::new(), dropped_blocks: 0 };
        for run in self.0.layer.map.own_runs() {
            let mut rest = run.extent;
            while !rest.is_empty() {
                let extent = Extent::new(rest.start, CHUNK_BLOCKS.min(rest.count));
                rest = Extent::new(extent.end(), rest.count - extent.count);
                self.copy_chunk(Run { extent, state: run.state }, &disk, &mut sealed).await?;
            }
        }
        blocking(move || disk.sync()).await?;
        Ok(sealed)
    }

    /// Sorts the blocks of a chunk into what is the increment's own, copying the data, and what the base has too.
    async fn copy_chunk(&self, chunk: Run, disk: &Arc<FileDiff>, sealed: &mut Sealed) -> io::Result<()> {
        let layer = &self.0.layer;
        let start = chunk.extent.offset();
        let length = (chunk.extent.end() * BLOCK_SIZE).min(layer.size) - start;
        let length = usize::try_from(length).expect("a chunk is small");
        let (mut ours, mut theirs) = (vec![0; length], vec![0; length]);
        if chunk.state == BlockState::Data {
            read_diff(&layer.diff, start, &mut ours).await?;
        }
        read_disk(&layer.base, start, &mut theirs).await?;
        let mut runs: Vec<Run> = Vec::new();
        let pairs = ours.chunks(BLOCK_BYTES).zip(theirs.chunks(BLOCK_BYTES));
        for (block, (our, their)) in chunk.extent.blocks().zip(pairs) {
            if our == their {
                sealed.dropped_blocks += 1;
            } else if our.iter().all(|byte| *byte == 0) {
                push(&mut runs, Run { extent: Extent::new(block, 1), state: BlockState::Zero });
            } else {
                push(&mut runs, Run { extent: Extent::new(block, 1), state: BlockState::Data });
            }
        }
        runs.iter().for_each(|run| push(&mut sealed.runs, *run));
        let disk = disk.clone();
        blocking(move || {
            for run in runs.iter().filter(|run| run.state == BlockState::Data) {
                let from = usize::try_from(run.extent.offset() - start).expect("within the chunk");
                let until = ours.len().min(from + usize::try_from(run.extent.bytes()).expect("a chunk"));
                disk.write_at([&ours[from..until], &[], &[]], run.extent.offset())?;
            }
            Ok(())
        })
        .await
    }
}

/// Appends a run, joined to the last one if they are neighbours of one state.
fn push(runs: &mut Vec<Run>, run: Run) {
    match runs.last_mut() {
        Some(last) if last.extent.end() == run.extent.start && last.state == run.state => {
            last.extent.count += run.extent.count;
        }
        _ => runs.push(run),
    }
}

async fn read_disk(disk: &SharedDisk, offset: u64, buf: &mut [u8]) -> io::Result<()> {
    match disk.try_read(offset, buf) {
        Attempt::Ready(result) => result,
        Attempt::WouldBlock => disk.read(offset, buf).await,
    }
}
