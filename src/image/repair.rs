//! Puts right a stored disk whose bytes have changed since it was stored, from an intact copy of the same image.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::extents::data_extents;
use crate::block::BLOCK_BYTES;

/// What is compared at a time: whole blocks.
const CHUNK: u64 = 1 << 20;

/// Writes to the disk at `stored` what differs from that at `intact`, whose digests were just made; gives the number of
/// blocks, and one more for a length that was wrong: `intact` has `size` bytes.
///
/// In place, so that whoever has the image open, a VM on an overlay for instance, reads right bytes from then on. An
/// interruption leaves some blocks as wrong as they were.
pub(super) fn repair(stored: &Path, intact: &Path, size: u64) -> io::Result<u64> {
    let (stored, intact) = (File::options().read(true).write(true).open(stored)?, File::open(intact)?);
    let mut repaired = 0;
    if stored.metadata()?.len() != size {
        stored.set_len(size)?;
        repaired += 1;
    }
    let mut chunks = BTreeSet::new();
    for file in [&stored, &intact] {
        for extent in data_extents(file, 0..size) {
            let extent = extent?;
            chunks.extend(extent.start / CHUNK..extent.end.div_ceil(CHUNK));
        }
    }
    let (mut right, mut found) = (Vec::new(), Vec::new());
    for start in chunks.into_iter().map(|chunk| chunk * CHUNK) {
        let length = usize::try_from(CHUNK.min(size - start)).expect("a chunk fits into memory");
        right.resize(length, 0);
        found.resize(length, 0);
        intact.read_exact_at(&mut right, start)?;
        // What cannot be read may be written all the same: disks take another sector then.
        let is_readable = stored.read_exact_at(&mut found, start).is_ok();
        let blocks = right.chunks(BLOCK_BYTES).zip(found.chunks(BLOCK_BYTES)).enumerate();
        for (number, (right, _)) in blocks.filter(|(_, (right, found))| !is_readable || right != found) {
            stored.write_all_at(right, start + (number * BLOCK_BYTES) as u64)?;
            repaired += 1;
        }
    }
    if repaired > 0 {
        stored.sync_data()?;
    }
    Ok(repaired)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_is_written_and_holes_count_as_zeroes() {
        let dir = tempfile::tempdir().unwrap();
        let (stored, intact) = (dir.path().join("stored"), dir.path().join("intact"));
        let size = 3 * CHUNK + 5000;
        let mut bytes = vec![0; usize::try_from(size).unwrap()];
        bytes[100] = 1;
        bytes[2 * usize::try_from(CHUNK).unwrap()] = 2;
        *bytes.last_mut().unwrap() = 3;
        for path in [&stored, &intact] {
            let file = File::create(path).unwrap();
            file.set_len(size).unwrap();
            for (at, byte) in bytes.iter().enumerate().filter(|(_, byte)| **byte != 0) {
                file.write_all_at(&[*byte], at as u64).unwrap();
            }
        }
        assert_eq!(repair(&stored, &intact, size).unwrap(), 0);
        let rot = File::options().write(true).open(&stored).unwrap();
        rot.write_all_at(b"x", 4096).unwrap();
        rot.write_all_at(b"y", CHUNK + 70_000).unwrap();
        rot.write_all_at(b"z", size - 1).unwrap();
        assert_eq!(repair(&stored, &intact, size).unwrap(), 3);
        assert_eq!(std::fs::read(&stored).unwrap(), bytes);
        for length in [CHUNK, size + 1] {
            rot.set_len(length).unwrap();
            assert!(repair(&stored, &intact, size).unwrap() >= 1);
            assert_eq!(std::fs::read(&stored).unwrap(), bytes);
        }
    }
}
