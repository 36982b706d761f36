//! Whether a sparse VMDK file holds the grains that its tables name. No reader of the format: that is `qemu-img`'s work.
//!
//! `qemu-img check` looks only at where a grain begins, and `convert` reads what is missing of it as zeroes. So a file
//! whose last bytes did not arrive passes for a good one. Field names are those of VMware's "Virtual Disk Format 5.0",
//! what QEMU does with them is in its `block/vmdk.c`. Compressed grains say how long they are, and `qemu-img` refuses
//! one that is cut.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::tree::SIZE_MAX;

const MAGIC: &[u8] = b"KDMV";
const HEADER_BYTES: usize = 72;
const HAS_ZERO_GRAINS: u32 = 1 << 2;
const IS_COMPRESSED: u32 = 1 << 16;
const ZERO_GRAIN: u32 = 1;
const SECTOR: u64 = 512;
/// QEMU refuses larger tables.
const TABLE_ENTRIES_MAX: u32 = 512;
const GRAIN_SECTORS_MIN: u64 = 8;
const GRAIN_SECTORS_MAX: u64 = 1 << 16;
const DIRECTORY_CHUNK: usize = 4096;

/// Whether every grain that the tables of the VMDK in `file` name lies within its `length` bytes, as far as a guest
/// sees it.
///
/// # Errors
/// Those of the file system; a table past the end of the file is not one, but `false`.
pub(super) fn holds_its_grains(file: &File, length: u64) -> io::Result<bool> {
    match check(file, length) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        other => other,
    }
}

fn check(file: &File, length: u64) -> io::Result<bool> {
    let mut header = [0; HEADER_BYTES];
    file.read_exact_at(&mut header, 0)?;
    let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("the slice has 4 bytes"));
    let long = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().expect("the slice has 8 bytes"));
    let (flags, capacity, grain) = (word(8), long(12), long(20));
    let (table_entries, directory_at) = (word(44), long(56));
    let is_known = &header[..4] == MAGIC
        && flags & IS_COMPRESSED == 0
        && capacity <= SIZE_MAX / SECTOR
        && (GRAIN_SECTORS_MIN..=GRAIN_SECTORS_MAX).contains(&grain)
        && (1..=TABLE_ENTRIES_MAX).contains(&table_entries);
    if !is_known {
        // QEMU refuses it, or it has no such tables.
        return Ok(true);
    }
    let tables = capacity.div_ceil(grain * u64::from(table_entries));
    let has_zero_grains = flags & HAS_ZERO_GRAINS != 0;
    let mut table = vec![0; table_entries as usize * 4];
    let mut chunk = [0; DIRECTORY_CHUNK];
    let mut first = 0; // of the grains of a table
    for done in (0..tables).step_by(DIRECTORY_CHUNK / 4) {
        let count =
            usize::try_from(tables - done).map_or(DIRECTORY_CHUNK, |rest| DIRECTORY_CHUNK.min(rest * 4));
        let entries = &mut chunk[..count];
        file.read_exact_at(entries, directory_at.saturating_mul(SECTOR).saturating_add(done * 4))?;
        for table_at in words(entries) {
            if table_at != 0 {
                file.read_exact_at(&mut table, u64::from(table_at) * SECTOR)?;
                let are_within = words(&table).zip(first..).all(|(at, number)| {
                    let is_stored = at != 0 && !(has_zero_grains && at == ZERO_GRAIN);
                    let seen = grain.min(capacity.saturating_sub(number * grain));
                    !is_stored || (u64::from(at) + seen) * SECTOR <= length
                });
                if !are_within {
                    return Ok(false);
                }
            }
            first += u64::from(table_entries);
        }
    }
    Ok(true)
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u32> {
    bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Eleven sectors in grains of eight; the directory at 512, one table of two entries at 1024.
    fn file(grains: [u32; 2], flags: u32, length: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        let mut header = [0; 512];
        header[..4].copy_from_slice(MAGIC);
        header[8..12].copy_from_slice(&flags.to_le_bytes());
        for (at, value) in [(12, 11_u64), (20, 8), (56, 1)] {
            header[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        header[44..48].copy_from_slice(&2_u32.to_le_bytes());
        file.write_all_at(&header, 0).unwrap();
        file.write_all_at(&2_u32.to_le_bytes(), 512).unwrap();
        for (grain, at) in grains.into_iter().zip([1024, 1028]) {
            file.write_all_at(&grain.to_le_bytes(), at).unwrap();
        }
        file.set_len(length).unwrap();
        file
    }

    fn holds(grains: [u32; 2], flags: u32, length: u64) -> bool {
        holds_its_grains(&file(grains, flags, length), length).unwrap()
    }

    #[test]
    fn a_grain_past_the_end_is_missed() {
        assert!(holds([0, 0], 0, 1536));
        assert!(holds([3, 0], 0, 1536 + 4096));
        assert!(!holds([3, 0], 0, 1536 + 4095));
        assert!(!holds([u32::MAX, 0], 0, 1536 + 4096));
        assert!(holds([0, 3], 0, 1536 + 3 * 512), "a guest sees three sectors of the last grain");
        assert!(!holds([0, 3], 0, 1536 + 3 * 512 - 1));
        assert!(!holds([0, 0], 0, 1030), "the table itself is cut");
        assert!(!holds([0, 0], 0, 60));
    }

    #[test]
    fn a_grain_that_only_says_zero_is_not_stored() {
        assert!(holds([1, 1], HAS_ZERO_GRAINS, 1536));
        assert!(!holds([3, 1], HAS_ZERO_GRAINS, 1536));
        assert!(holds([1, 0], 0, 1536 + 4096), "an offset like any other");
    }
}
