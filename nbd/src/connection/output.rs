//! Buffers that replies are put together in, without writing zeroes first and without an allocation per request.

use std::sync::{Arc, Mutex, PoisonError};

use crate::chunk::HEADER_MAX;
use crate::limits::PIECE_BYTES;

/// Pieces that are kept for the next use.
const KEPT_MAX: usize = 32;
/// Longest read that gets a buffer of its own.
const SHORT_MAX: usize = 64 << 10;

/// A buffer for replies. What lies behind the used part is left over from earlier ones.
#[derive(Debug, Default)]
pub(crate) struct Output {
    bytes: Vec<u8>,
    used: usize,
    header: Vec<u8>,
}

impl Output {
    /// Appends what `encode` appends to an empty vector.
    pub(crate) fn put(&mut self, encode: impl FnOnce(&mut Vec<u8>)) {
        let mut header = std::mem::take(&mut self.header);
        header.clear();
        encode(&mut header);
        self.space(header.len()).copy_from_slice(&header);
        self.header = header;
    }

    /// Appends `length` bytes that the caller overwrites.
    pub(crate) fn space(&mut self, length: usize) -> &mut [u8] {
        let start = self.used;
        self.used += length;
        if self.bytes.len() < self.used {
            self.bytes.resize(self.used, 0);
        }
        &mut self.bytes[start..self.used]
    }

    /// What has been appended since there were `start` bytes.
    pub(crate) fn since(&self, start: usize) -> &[u8] {
        &self.bytes[start..self.used]
    }

    /// All that has been appended.
    pub(crate) fn filled(&self) -> &[u8] {
        &self.bytes[..self.used]
    }

    /// Number of bytes that have been appended.
    pub(crate) const fn len(&self) -> usize {
        self.used
    }

    /// Forgets what was appended behind the first `length` bytes.
    pub(crate) const fn truncate(&mut self, length: usize) {
        self.used = length;
    }
}

/// Outputs that hold a piece and its headers, shared by a server's connections.
#[derive(Debug, Clone, Default)]
pub(crate) struct Pieces {
    kept: Arc<Mutex<Vec<Output>>>,
}

impl Pieces {
    /// An empty output for replies to a read of `length` bytes, with room for a piece of it; goes back when it is dropped. A
    /// short read gets one of its own size: it may wait long, and holds what it is charged for.
    pub(crate) fn take(&self, length: usize) -> Piece {
        let new = |room| Output { bytes: Vec::with_capacity(room + 2 * HEADER_MAX), ..Output::default() };
        let output = if length > SHORT_MAX {
            let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner).pop();
            kept.unwrap_or_else(|| new(PIECE_BYTES))
        } else {
            new(length)
        };
        Piece { output, pieces: self.clone() }
    }
}

/// An [`Output`] of [`Pieces`].
#[derive(Debug)]
pub(crate) struct Piece {
    output: Output,
    pieces: Pieces,
}

impl std::ops::Deref for Piece {
    type Target = Output;

    fn deref(&self) -> &Output {
        &self.output
    }
}

impl std::ops::DerefMut for Piece {
    fn deref_mut(&mut self) -> &mut Output {
        &mut self.output
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        let mut output = std::mem::take(&mut self.output);
        output.truncate(0);
        if output.bytes.capacity() >= PIECE_BYTES {
            let mut kept = self.pieces.kept.lock().unwrap_or_else(PoisonError::into_inner);
            if kept.len() < KEPT_MAX {
                kept.push(output);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_cut_off_is_overwritten_by_what_follows() {
        let mut output = Output::default();
        output.put(|out| out.extend_from_slice(b"head"));
        output.space(4).copy_from_slice(b"data");
        assert_eq!(output.since(4), b"data");
        output.truncate(4);
        output.put(|out| out.extend_from_slice(b"err"));
        assert_eq!(output.filled(), b"headerr");
    }

    #[test]
    fn pieces_come_back_empty_and_only_so_many_are_kept() {
        let pieces = Pieces::default();
        let taken: Vec<Piece> = (0..KEPT_MAX + 5).map(|_| pieces.take(PIECE_BYTES)).collect();
        drop(taken);
        assert_eq!(pieces.kept.lock().unwrap().len(), KEPT_MAX);
        let mut piece = pieces.take(PIECE_BYTES);
        piece.put(|out| out.push(1));
        drop(piece);
        assert_eq!(pieces.take(PIECE_BYTES).len(), 0);
    }

    /// Once, each had a whole piece for as long as it waited, and was charged for 4 KiB.
    #[test]
    fn a_short_read_holds_what_it_needs_and_takes_no_piece() {
        let pieces = Pieces::default();
        drop(pieces.take(PIECE_BYTES));
        let short = pieces.take(4096);
        assert!(short.bytes.capacity() < 8192, "{}", short.bytes.capacity());
        drop(short);
        assert_eq!(pieces.kept.lock().unwrap().len(), 1);
        assert!(pieces.take(1 << 20).bytes.capacity() >= PIECE_BYTES);
    }
}
