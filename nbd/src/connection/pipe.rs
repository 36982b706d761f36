//! Pipes that carry a reply's header and pages of a file to a socket: the bytes of the file are not copied, the socket
//! holds the page cache's own pages until the client has read them (splice(2)).
//!
//! What is written to such a page meanwhile is what the client gets: a write beside the read, which the protocol lets
//! have either outcome.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{SeekFrom, seek};
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};

use crate::limits::PIECE_BYTES;

/// Pipes that are kept for the next use.
const KEPT_MAX: usize = 16;
/// Pipes that there are at most, each two descriptors and a piece of page cache: what is more is copied.
const PIPES_MAX: usize = 64;
/// Room for the pages of a piece that begins within a page, and for a header. A power of two, as the kernel has them.
const ROOM_BYTES: usize = 2 * PIECE_BYTES;

/// How far apart the bytes are by which a range is found to be cached: the kernel brings and drops pages in runs.
const PROBE_BYTES: usize = 32 << 10;

/// A pipe that is empty, or holds what [`Pipe::fill`] has put there.
#[derive(Debug)]
pub(super) struct Pipe {
    source: OwnedFd,
    sink: OwnedFd,
    _place: Place,
}

/// One of the places that there are for pipes.
#[derive(Debug)]
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(taken: &Arc<AtomicUsize>) -> io::Result<Self> {
        let place = Self(Arc::clone(taken));
        match taken.fetch_add(1, Ordering::Relaxed) < PIPES_MAX {
            true => Ok(place),
            false => Err(io::ErrorKind::QuotaExceeded.into()),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Whether a range of a file is in the page cache, by a byte of every [`PROBE_BYTES`]: one page between that is not makes
/// whoever believed this wait for the device once.
pub(super) fn is_cached(file: impl AsFd, offset: u64, length: usize) -> bool {
    let last = offset + length as u64 - 1;
    let probe = |at: u64| {
        let byte = &mut [0];
        preadv2(&file, &mut [io::IoSliceMut::new(byte)], at, ReadWriteFlags::NOWAIT) == Ok(1)
    };
    (offset..=last).step_by(PROBE_BYTES).all(probe) && probe(last)
}

/// What a range of a file turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    /// Its bytes are in the pipe, behind the header.
    Bytes,
    /// A hole; the pipe is empty.
    Hole,
}

impl Pipe {
    fn new(place: Place) -> io::Result<Self> {
        let (source, sink) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        // Fails for users that are not privileged and have many.
        fcntl_setpipe_size(&sink, ROOM_BYTES)?;
        Ok(Self { source, sink, _place: place })
    }

    /// Puts `header` and then `length` bytes at `offset` of a file into the pipe, which is empty. Blocks while the device
    /// reads. After an error nobody knows what is in the pipe.
    pub(super) fn fill(
        &self,
        header: &[u8],
        file: impl AsFd,
        offset: u64,
        length: usize,
    ) -> io::Result<Content> {
        let hole = match seek(&file, SeekFrom::Data(offset)) {
            Ok(data) => data >= offset + length as u64,
            // Behind the last data; or the file system knows no holes.
            Err(error) => error == Errno::NXIO,
        };
        if hole {
            return Ok(Content::Hole);
        }
        if rustix::io::write(&self.sink, header)? < header.len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        let (mut at, end) = (offset, offset + length as u64);
        while at < end {
            let left = usize::try_from(end - at).expect("at most the length");
            // Moves `at` on.
            match splice(&file, Some(&mut at), &self.sink, None, left, SpliceFlags::empty()) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Content::Bytes)
    }

    /// Moves at most `length` bytes into a socket that does not block.
    pub(super) fn drain(&self, socket: impl AsFd, length: usize) -> io::Result<usize> {
        Ok(splice(&self.source, None, socket, None, length, SpliceFlags::NONBLOCK)?)
    }
}

/// Empty pipes, shared by a server's connections.
#[derive(Debug, Clone, Default)]
pub(crate) struct Pipes {
    kept: Arc<Mutex<Vec<Pipe>>>,
    taken: Arc<AtomicUsize>,
}

impl Pipes {
    /// An empty pipe; its user drops it, or gives it back empty.
    pub(super) fn take(&self) -> io::Result<Pipe> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner).pop();
        kept.map_or_else(|| Pipe::new(Place::take(&self.taken)?), Ok)
    }

    /// Keeps an empty pipe for the next.
    pub(super) fn give_back(&self, pipe: Pipe) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < KEPT_MAX {
            kept.push(pipe);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, SeekFrom, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn drained(pipe: &Pipe, length: usize) -> Vec<u8> {
        let (near, mut far) = UnixStream::pair().unwrap();
        let mut got = vec![0; length];
        let reader = std::thread::spawn(move || {
            far.read_exact(&mut got).unwrap();
            got
        });
        let mut left = length;
        while left > 0 {
            left -= pipe.drain(&near, left).unwrap();
        }
        reader.join().unwrap()
    }

    #[test]
    fn a_piece_from_anywhere_in_a_file_comes_behind_its_header() {
        let mut file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..2 * PIECE_BYTES).map(|at| (at / 7 % 251).to_le_bytes()[0]).collect();
        file.write_all(&bytes).unwrap();
        let pipes = Pipes::default();
        for (offset, length) in [(0, PIECE_BYTES), (1, PIECE_BYTES), (4095, 3), (PIECE_BYTES + 17, 70_000)] {
            let pipe = pipes.take().unwrap();
            assert_eq!(pipe.fill(b"header", &file, offset as u64, length).unwrap(), Content::Bytes);
            let got = drained(&pipe, 6 + length);
            assert!(
                got[..6] == *b"header" && got[6..] == bytes[offset..offset + length],
                "{offset} {length}"
            );
            pipes.give_back(pipe);
        }
        assert_eq!(pipes.kept.lock().unwrap().len(), 1);
    }

    #[test]
    fn there_are_only_so_many_pipes() {
        let pipes = Pipes::default();
        let mut taken: Vec<Pipe> = (0..PIPES_MAX).map(|_| pipes.take().unwrap()).collect();
        assert!(pipes.take().is_err());
        taken.pop();
        let again = pipes.take().unwrap();
        assert!(pipes.take().is_err());
        pipes.give_back(again);
        assert!(pipes.take().is_ok());
        drop(taken);
        assert_eq!(pipes.taken.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_hole_is_told_and_a_file_that_ends_early_is_an_error() {
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(4 << 20).unwrap();
        file.seek(SeekFrom::Start(1 << 20)).unwrap();
        file.write_all(&[1; 4096]).unwrap();
        let pipe = Pipes::default().take().unwrap();
        assert_eq!(pipe.fill(b"h", &file, 0, PIECE_BYTES).unwrap(), Content::Hole);
        assert_eq!(pipe.fill(b"h", &file, 3 << 20, PIECE_BYTES).unwrap(), Content::Hole);
        assert_eq!(pipe.fill(b"h", &file, (1 << 20) - 4096, 8192).unwrap(), Content::Bytes);
        let got = drained(&pipe, 8193);
        assert!(got[1..4097] == [0; 4096] && got[4097..] == [1; 4096]);
        file.set_len((1 << 20) + 100).unwrap();
        let error = pipe.fill(b"h", &file, 1 << 20, 8192).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
