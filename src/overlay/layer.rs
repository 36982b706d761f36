//! The reading half of an overlay: a map and a diff over a base. Increments are read through it too.
//!
//! It never changes anything, so it needs no lock: a block's state is looked up, then its bytes are read where the
//! state says. A block only ever leaves [`BlockState::Absent`], and a diff's bytes are written before the state says so.

use std::io;
use std::sync::Arc;

use bootcache_nbd::disk::{BASE_ALLOCATION, STATE_HOLE, STATE_ZERO};
use bootcache_nbd::{Attempt, BoxFuture, SharedDisk, StatusExtent};
use futures_util::future::try_join_all;

use super::map::{BlockMap, BlockState};
use super::storage::DiffFile;
use crate::block::{BLOCK_SIZE, Extent};
use crate::local_cache::{CONTEXT_PRESENT, STATE_PRESENT};

/// One request about status, or hint to read ahead, looks at so many pieces and no more: a whole disk may be in millions,
/// and those of equal status make but one extent.
pub(super) const PIECES_MAX: usize = 16 << 10;
/// After so many of them, others may use the worker thread.
const PIECES_AT_ONCE: usize = 1024;

/// Map, diff and base of one disk.
#[derive(Clone)]
pub(crate) struct Layer {
    pub(super) map: Arc<BlockMap>,
    pub(super) diff: Arc<dyn DiffFile>,
    pub(super) base: SharedDisk,
    pub(super) size: u64,
}

impl std::fmt::Debug for Layer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Layer").field("size", &self.size).field("diff", &self.diff).finish_non_exhaustive()
    }
}

/// Bytes that follow each other and are in one place.
struct Piece {
    offset: u64,
    length: u64,
    state: BlockState,
}

impl Layer {
    /// The range cut where the state changes.
    fn pieces(&self, offset: u64, length: u64) -> impl Iterator<Item = Piece> + '_ {
        let end = offset + length;
        self.map.runs(Extent::touching(offset, length)).map(move |run| {
            let first = run.extent.offset().max(offset);
            let last = (run.extent.end() * BLOCK_SIZE).min(end);
            Piece { offset: first, length: last - first, state: run.state }
        })
    }

    /// Size of the disk in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// See [`bootcache_nbd::Disk::try_read`].
    pub(crate) fn try_read(&self, offset: u64, buf: &mut [u8]) -> Attempt {
        let mut rest = buf;
        for piece in self.pieces(offset, rest.len() as u64) {
            let (part, after) = rest.split_at_mut(usize::try_from(piece.length).expect("part of a slice"));
            rest = after;
            let attempt = match piece.state {
                BlockState::Zero => {
                    part.fill(0);
                    continue;
                }
                BlockState::Data => self.diff.try_read_at(part, piece.offset),
                BlockState::Absent => self.base.try_read(piece.offset, part),
            };
            let Attempt::Ready(Ok(())) = attempt else { return attempt };
        }
        Attempt::Ready(Ok(()))
    }

    /// See [`bootcache_nbd::Disk::read`]. Pieces that must wait wait together.
    pub(crate) async fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut rest = buf;
        let mut waiting: Vec<BoxFuture<'_, io::Result<()>>> = Vec::new();
        for piece in self.pieces(offset, rest.len() as u64) {
            let (part, after) = rest.split_at_mut(usize::try_from(piece.length).expect("part of a slice"));
            rest = after;
            match piece.state {
                BlockState::Zero => part.fill(0),
                BlockState::Data => waiting.push(Box::pin(read_diff(&self.diff, piece.offset, part))),
                BlockState::Absent => waiting.push(self.base.read(piece.offset, part)),
            }
        }
        try_join_all(waiting).await.map(|_| ())
    }

    /// See [`bootcache_nbd::Disk::status`]. What is the layer's own is on this node. The first part of a range that is in
    /// very many pieces is answered, even where they make but one extent.
    pub(crate) async fn status(
        &self,
        context: &str,
        offset: u64,
        length: u64,
        extents_max: usize,
    ) -> io::Result<Vec<StatusExtent>> {
        let (data, zero) = match context {
            BASE_ALLOCATION => (0, STATE_HOLE | STATE_ZERO),
            CONTEXT_PRESENT => (STATE_PRESENT, STATE_PRESENT),
            _ => (0, 0),
        };
        let mut extents = Merged { extents: Vec::new(), max: extents_max, looked: 0 };
        for (count, piece) in self.pieces(offset, length).enumerate() {
            give_way(count).await;
            match piece.state {
                BlockState::Data => extents.push(piece.length, data),
                BlockState::Zero => extents.push(piece.length, zero),
                BlockState::Absent => {
                    let mut done = 0;
                    while done < piece.length && !extents.full() {
                        let (at, left) = (piece.offset + done, piece.length - done);
                        for extent in self.base.status(context, at, left, extents_max).await? {
                            let cut = extent.length.min(piece.length - done);
                            extents.push(cut, extent.flags);
                            done += cut;
                        }
                    }
                }
            }
            if extents.full() {
                break;
            }
        }
        extents.extents.truncate(extents_max);
        Ok(extents.extents)
    }

    /// See [`bootcache_nbd::Disk::prefetch`]. A hint: what is in very many pieces is read ahead in its first part.
    pub(crate) async fn prefetch(&self, offset: u64, length: u64) -> io::Result<()> {
        for (count, piece) in self.pieces(offset, length).take(PIECES_MAX).enumerate() {
            give_way(count).await;
            match piece.state {
                BlockState::Zero => {}
                BlockState::Absent => self.base.prefetch(piece.offset, piece.length).await?,
                BlockState::Data => {
                    let diff = self.diff.clone();
                    blocking(move || diff.read_ahead(piece.offset, piece.length)).await?;
                }
            }
        }
        Ok(())
    }
}

/// Lets other tasks run now and then while pieces are looked at, of which this is number `count`.
async fn give_way(count: usize) {
    if count % PIECES_AT_ONCE == PIECES_AT_ONCE - 1 {
        tokio::task::yield_now().await;
    }
}

/// Extents joined where their flags are equal; one more than `max` are collected, to see where the last one ends, of
/// so many pieces and no more.
struct Merged {
    extents: Vec<StatusExtent>,
    max: usize,
    /// Pieces that came.
    looked: usize,
}

impl Merged {
    fn push(&mut self, length: u64, flags: u32) {
        self.looked += 1;
        match self.extents.last_mut() {
            Some(last) if last.flags == flags => last.length += length,
            _ => self.extents.push(StatusExtent { length, flags }),
        }
    }

    fn full(&self) -> bool {
        self.extents.len() > self.max || self.looked >= PIECES_MAX
    }
}

/// Reads from the page cache if it is there, else on a thread that may wait for the device.
pub(crate) async fn read_diff<F: DiffFile + ?Sized>(
    diff: &Arc<F>,
    offset: u64,
    buf: &mut [u8],
) -> io::Result<()> {
    if let Attempt::Ready(result) = diff.try_read_at(buf, offset) {
        return result;
    }
    let (diff, length) = (diff.clone(), buf.len());
    let bytes = blocking(move || {
        let mut bytes = vec![0; length];
        diff.read_at(&mut bytes, offset).map(|()| bytes)
    });
    buf.copy_from_slice(&bytes.await?);
    Ok(())
}

/// Runs `work` on a thread that may block. It runs to its end even if the future is dropped.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}
