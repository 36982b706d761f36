//! Whether a qcow2 file holds the clusters that its tables name. No reader of the format: that is `qemu-img`'s work.
//!
//! `qemu-img check` lets up to a cluster be missing at the end, and `convert` reads what is missing as zeroes, or
//! decompresses it to garbage. So a file whose last bytes did not arrive passes for a good one. Field names and masks
//! are those of QEMU's `docs/interop/qcow2.txt`.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

const HEADER_BYTES: usize = 104;
const L1_ENTRIES_MAX: u32 = 4 << 20;
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
const READS_AS_ZEROES: u64 = 1;
const EXTERNAL_DATA_FILE: u64 = 1 << 2;
const EXTENDED_L2: u64 = 1 << 4;
const SECTOR: u64 = 512;

/// Whether every cluster that the active tables of the qcow2 in `file` name lies within its `length` bytes.
///
/// The last uncompressed cluster may be cut at a multiple of 512, as QEMU itself leaves it when its end is zero.
///
/// # Errors
/// Those of the file system; a table past the end of the file is not one, but `false`.
pub(super) fn holds_its_clusters(file: &File, length: u64) -> io::Result<bool> {
    match check(file, length) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        other => other,
    }
}

/// Whether QEMU has found the qcow2 damaged and said so in its header, in bit 1 of the incompatible features
/// (docs/interop/qcow2.txt of QEMU): `qemu-img check` does not mind that.
pub(super) fn is_marked_corrupt(file: &File) -> bool {
    let mut header = [0; 80];
    let has_features = file.read_exact_at(&mut header, 0).is_ok() && header[4..8] != 2_u32.to_be_bytes();
    has_features && header[79] & 2 != 0
}

fn check(file: &File, length: u64) -> io::Result<bool> {
    let mut header = [0; HEADER_BYTES];
    file.read_exact_at(&mut header[..72], 0)?;
    let word = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().expect("the slice has 4 bytes"));
    let (version, cluster_bits, l1_entries) = (word(4), word(20), word(36));
    let l1_at = u64::from(word(40)) << 32 | u64::from(word(44));
    let mut incompatible = [0; 8];
    if version >= 3 {
        file.read_exact_at(&mut incompatible, 72)?;
    }
    let incompatible = u64::from_be_bytes(incompatible);
    let is_known = (9..=21).contains(&cluster_bits) && l1_entries <= L1_ENTRIES_MAX;
    if !is_known || incompatible & EXTERNAL_DATA_FILE != 0 {
        // QEMU refuses the one; of the other, the clusters are elsewhere.
        return Ok(true);
    }
    let entry_bytes = if incompatible & EXTENDED_L2 == 0 { 8 } else { 16 };
    let mut l2 = vec![0; 1 << cluster_bits];
    for l1_entry in 0..u64::from(l1_entries) {
        let mut entry = [0; 8];
        file.read_exact_at(&mut entry, l1_at.saturating_add(l1_entry * 8))?;
        let l2_at = u64::from_be_bytes(entry) & OFFSET_MASK;
        if l2_at == 0 {
            continue;
        }
        file.read_exact_at(&mut l2, l2_at)?;
        let entries = l2.chunks_exact(entry_bytes).filter_map(|entry| entry.first_chunk());
        if !entries
            .map(|entry| u64::from_be_bytes(*entry))
            .all(|entry| is_within(entry, cluster_bits, length))
        {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether the cluster of one L2 entry lies within the file.
fn is_within(entry: u64, cluster_bits: u32, length: u64) -> bool {
    if entry & COMPRESSED != 0 {
        let offset_bits = 62 - (cluster_bits - 8);
        let offset = entry & ((1 << offset_bits) - 1);
        let more_sectors = (entry & (COMPRESSED - 1)) >> offset_bits;
        let end = offset / SECTOR * SECTOR + (more_sectors + 1) * SECTOR;
        return end <= length.next_multiple_of(SECTOR);
    }
    let offset = entry & OFFSET_MASK;
    if offset == 0 || entry & READS_AS_ZEROES != 0 {
        return true;
    }
    offset < length && (offset + (1 << cluster_bits) <= length || length.is_multiple_of(SECTOR))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One L1 entry, one L2 table of 512 bytes at 1024, with `entry` in it.
    fn file(entry: u64, length: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        let mut header = [0; 512];
        header[..4].copy_from_slice(b"QFI\xfb");
        header[4..8].copy_from_slice(&3_u32.to_be_bytes());
        header[20..24].copy_from_slice(&9_u32.to_be_bytes());
        header[36..40].copy_from_slice(&1_u32.to_be_bytes());
        header[40..48].copy_from_slice(&512_u64.to_be_bytes());
        file.write_all_at(&header, 0).unwrap();
        file.write_all_at(&1024_u64.to_be_bytes(), 512).unwrap();
        file.write_all_at(&entry.to_be_bytes(), 1024 + 8).unwrap();
        file.set_len(length).unwrap();
        file
    }

    fn holds(entry: u64, length: u64) -> bool {
        holds_its_clusters(&file(entry, length), length).unwrap()
    }

    #[test]
    fn a_cluster_past_the_end_is_missed() {
        assert!(holds(0, 1536));
        assert!(holds(1536, 2048));
        assert!(!holds(1536, 2047), "cut in the middle of a sector");
        assert!(!holds(2048, 2048));
        assert!(holds(1 << 40 | READS_AS_ZEROES, 2048), "only reserved");
        assert!(!holds(0, 1500), "the table itself is cut");
        assert!(!holds(0, 100));
    }

    #[test]
    fn a_compressed_cluster_must_be_there_to_its_last_sector() {
        let offset_bits = 62 - (9 - 8);
        let entry = COMPRESSED | 1 << offset_bits | 1600;
        assert!(holds(entry, 2560), "two sectors from 1536");
        assert!(holds(entry, 2500), "some tools do not pad the last one");
        assert!(!holds(entry, 2048));
    }
}
