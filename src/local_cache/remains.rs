//! Bytes that may be in the place of absent blocks: of a write that failed or was lost, of one that a crash left behind,
//! or wrong ones.
//!
//! They are harmless until such a block turns out to be zero, which is marked and not written. Its place is made a hole
//! then, and not before: a read that began when the block was here still finds its bytes. Not durable: the file is
//! searched for them when it is opened.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use roaring::RoaringBitmap;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use crate::block::{BLOCK_BYTES, BLOCK_SIZE, Extent, bytes_in_block};

/// The absent blocks of one image in whose place the file may have bytes.
#[derive(Debug, Default)]
pub(super) struct Remains(Mutex<RoaringBitmap>);

fn bits(extent: Extent) -> Range<u32> {
    let bit = |block| u32::try_from(block).expect("an image has at most 2^31 blocks");
    bit(extent.start)..bit(extent.end())
}

impl Remains {
    fn set(&self) -> MutexGuard<'_, RoaringBitmap> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There may be bytes in the place of `extent`.
    pub(super) fn add(&self, extent: Extent) {
        self.set().insert_range(bits(extent));
    }

    /// There may be bytes in the place of `blocks`.
    pub(super) fn add_all(&self, blocks: &RoaringBitmap) {
        *self.set() |= blocks;
    }

    /// What belongs in the place of `extent` is about to be written there.
    pub(super) fn remove(&self, extent: Extent) {
        self.set().remove_range(bits(extent));
    }

    /// Makes holes of those blocks of `extent` in whose place there may be bytes. `file` is a disk of `size` bytes. Blocks.
    ///
    /// # Errors
    /// When a hole cannot be made.
    pub(super) fn clear(&self, extent: Extent, file: &File, size: u64) -> io::Result<()> {
        let mut set = self.set();
        if set.is_empty() {
            return Ok(());
        }
        let mut found = RoaringBitmap::new();
        found.insert_range(bits(extent));
        found &= &*set;
        let mut blocks = found.iter().map(u64::from).peekable();
        while let Some(start) = blocks.next() {
            let mut run = Extent::new(start, 1);
            while blocks.next_if_eq(&run.end()).is_some() {
                run.count += 1;
            }
            punch(file, size, run)?;
            set.remove_range(bits(run));
        }
        Ok(())
    }
}

/// Makes a hole of `extent` in `file`, a disk of `size` bytes.
fn punch(file: &File, size: u64, extent: Extent) -> io::Result<()> {
    let length = (extent.end() * BLOCK_SIZE).min(size) - extent.offset();
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match fallocate(file, hole, extent.offset(), length) {
        Err(Errno::OPNOTSUPP) => extent.blocks().try_for_each(|block| {
            let length = usize::try_from(bytes_in_block(block, size)).expect("at most a block");
            file.write_all_at(&[0; BLOCK_BYTES][..length], block * BLOCK_SIZE)
        }),
        other => Ok(other?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_left_becomes_a_hole_and_only_once() {
        let size = 9 * BLOCK_SIZE + 100;
        let mut file = vec![7; usize::try_from(size).unwrap()];
        let disk = tempfile::tempfile().unwrap();
        disk.write_all_at(&file, 0).unwrap();
        let remains = Remains::default();
        remains.add(Extent::new(2, 3));
        remains.add_all(&[6, 9].into_iter().collect());
        remains.remove(Extent::new(3, 1));
        remains.clear(Extent::new(0, 10), &disk, size).unwrap();
        let read = || {
            let mut bytes = vec![0; file.len()];
            disk.read_exact_at(&mut bytes, 0).unwrap();
            bytes
        };
        let cleared = read();
        // What is written later stays.
        disk.write_all_at(&[8; 10], 2 * BLOCK_SIZE).unwrap();
        remains.clear(Extent::new(0, 10), &disk, size).unwrap();
        assert_eq!(read()[2 * BLOCK_BYTES..][..10], [8; 10]);
        for block in [2, 4, 6, 9] {
            let end = ((block + 1) * BLOCK_BYTES).min(file.len());
            file[block * BLOCK_BYTES..end].fill(0);
        }
        assert!(cleared == file);
    }
}
