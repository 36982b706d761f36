//! What format a file has, and which other files it would make a reader open. Only the given file's own bytes are
//! looked at, by this code, before any other program sees the file.
//!
//! The rule: a stated format is taken as stated. Without one, the file's first bytes decide; a file that begins like
//! no known format is raw. A raw disk is written by its guest, who can make it begin like a qcow2 file, so what is
//! found is never trusted further than this: `qemu-img` is told the format and never probes, a file that refers to
//! others is refused unless that was allowed (CVE-2024-32498, CVE-2026-24708), and a name that contradicts the bytes
//! (`disk.raw` that begins like qcow2) must be settled by stating the format.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::manifest::SourceFormat;

/// Bytes at the start of a file that are looked at.
const HEAD_BYTES: usize = 64 << 10;
/// QEMU reads a VMDK's description, with the name of its parent, here, whatever the header says.
const VMDK_DESCRIPTION_AT: usize = 0x200;
/// The longest description that QEMU reads there.
const VMDK_DESCRIPTION_BYTES: usize = 20 * 512;

/// Why a file is not taken as an image.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// It must be made into something else first.
    #[error("it is {what}, which is no disk image: {advice}")]
    Foreign { what: &'static str, advice: &'static str },
    /// It does not begin as the stated format does.
    #[error("it does not begin like a {0} image: leave --format out, or state the right one")]
    NotAsStated(SourceFormat),
    /// It does not begin as its name says, and no known format does.
    #[error("its name says {0} but it does not begin so: state --format raw, or rename the file")]
    NotAsNamed(SourceFormat),
    /// Name and content contradict each other.
    #[error("its name says {name} but it begins like {found}: state --format {name} or --format {found}")]
    NameContradicts { name: SourceFormat, found: SourceFormat },
    /// It would open another file of this host.
    #[error("it refers to another file, {0}: add --allow-backing-files if you trust it")]
    OutsideFile(String),
    /// It is broken or uses what is not supported.
    #[error("{0}")]
    Unsound(&'static str),
}

/// The first bytes of a file.
#[derive(Debug)]
pub struct Head {
    bytes: Vec<u8>,
}

impl Head {
    /// Reads the head of `file`.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn read(file: &File) -> io::Result<Self> {
        let mut bytes = vec![0; HEAD_BYTES];
        let mut length = 0;
        while length < bytes.len() {
            match file.read_at(&mut bytes[length..], length as u64)? {
                0 => break,
                count => length += count,
            }
        }
        bytes.truncate(length);
        Ok(Self { bytes })
    }

    fn has(&self, magic: &[u8], at: usize) -> bool {
        self.bytes.get(at..).is_some_and(|bytes| bytes.starts_with(magic))
    }

    fn big_endian(&self, at: usize) -> u64 {
        self.word(at).map_or(0, u64::from_be_bytes)
    }

    fn little_endian(&self, at: usize) -> u64 {
        self.word(at).map_or(0, u64::from_le_bytes)
    }

    fn word(&self, at: usize) -> Option<[u8; 8]> {
        self.bytes.get(at..)?.first_chunk().copied()
    }

    fn text(&self, at: usize, length_max: usize) -> String {
        let bytes = self.bytes.get(at..).unwrap_or_default();
        String::from_utf8_lossy(&bytes[..bytes.len().min(length_max)]).into_owned()
    }

    /// The disk format whose magic the file begins with.
    pub fn magic(&self) -> Option<SourceFormat> {
        if self.has(b"QFI\xfb", 0) {
            return Some(SourceFormat::Qcow2);
        }
        if self.has(b"KDMV", 0) || self.has(b"COWD", 0) || self.is_vmdk_description() {
            return Some(SourceFormat::Vmdk);
        }
        if self.has(&0xbeda_107f_u32.to_le_bytes(), 0x40) {
            return Some(SourceFormat::Vdi);
        }
        self.has(b"vhdxfile", 0).then_some(SourceFormat::Vhdx)
    }

    /// A VMDK that is only a text which names the files that hold the disk. Comments may come before the first line.
    fn is_vmdk_description(&self) -> bool {
        self.has(b"#", 0)
            && self
                .text(0, 4096)
                .lines()
                .any(|line| line.trim().eq_ignore_ascii_case("# disk descriptorfile"))
    }

    /// Whether the file is an incremental image that `image export --increment` wrote.
    pub fn is_increment(&self) -> bool {
        self.has(super::increment_file::MAGIC, 0)
    }

    /// Whether the file is a tar archive, or one that is compressed.
    pub fn is_archive(&self) -> bool {
        self.is_tar()
            || [&b"\x1f\x8b"[..], b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"BZh"]
                .iter()
                .any(|magic| self.has(magic, 0))
    }

    /// Whether the file is a tar archive.
    pub fn is_tar(&self) -> bool {
        self.has(b"ustar", 257)
    }

    /// Refuses what is known to be no disk that can be read here.
    fn refuse_foreign(&self) -> Result<(), FormatError> {
        const DECOMPRESS: &str =
            "decompress a disk first, or state --type container for the archive of a container";
        const CONVERT: &str = "convert it to qcow2 first (`qemu-img convert -O qcow2`)";
        let known: [(&[u8], usize, &str, &str); 11] = [
            (b"\x1f\x8b", 0, "compressed with gzip", DECOMPRESS),
            (b"\xfd7zXZ\0", 0, "compressed with xz", DECOMPRESS),
            (b"\x28\xb5\x2f\xfd", 0, "compressed with zstd", DECOMPRESS),
            (b"BZh", 0, "compressed with bzip2", DECOMPRESS),
            (b"PK\x03\x04", 0, "a zip archive", "unpack it first"),
            (b"7z\xbc\xaf\x27\x1c", 0, "a 7z archive", "unpack it first"),
            (b"conectix", 0, "a VHD image", CONVERT),
            (b"QED\0", 0, "a QED image", CONVERT),
            (b"WithoutFreeSpace", 0, "a Parallels image", CONVERT),
            (b"WithouFreSpacExt", 0, "a Parallels image", CONVERT),
            (b"LUKS\xba\xbe", 0, "encrypted with LUKS", "state --format raw to store it encrypted"),
        ];
        match known.iter().find(|(magic, at, _, _)| self.has(magic, *at)) {
            Some((_, _, what, advice)) => Err(FormatError::Foreign { what, advice }),
            None => Ok(()),
        }
    }

    /// The format of the file at `path`: as `stated`, or by the rule of this module.
    ///
    /// # Errors
    /// [`FormatError`], every kind but [`FormatError::OutsideFile`].
    pub fn choose(&self, path: &Path, stated: Option<SourceFormat>) -> Result<SourceFormat, FormatError> {
        let found = self.magic();
        match stated {
            Some(SourceFormat::Raw) => return Ok(SourceFormat::Raw),
            Some(stated) if found == Some(stated) => return Ok(stated),
            Some(stated) => return Err(FormatError::NotAsStated(stated)),
            None => {}
        }
        let named =
            path.extension().and_then(|extension| extension.to_str()).and_then(SourceFormat::of_extension);
        match (named, found) {
            (Some(name), Some(found)) if name != found => Err(FormatError::NameContradicts { name, found }),
            (_, Some(found)) => Ok(found),
            (Some(name), None) if name != SourceFormat::Raw => Err(FormatError::NotAsNamed(name)),
            _ => self.refuse_foreign().map(|()| SourceFormat::Raw),
        }
    }

    /// Refuses a file of `format` that would make a reader open other files.
    ///
    /// # Errors
    /// [`FormatError::OutsideFile`], [`FormatError::Unsound`].
    pub fn refuse_outside_files(&self, format: SourceFormat) -> Result<(), FormatError> {
        match format {
            SourceFormat::Qcow2 => self.refuse_qcow2_references(),
            SourceFormat::Vmdk => self.refuse_vmdk_references(),
            // QEMU refuses VDI and VHDX files that have a parent.
            SourceFormat::Vdi | SourceFormat::Vhdx | SourceFormat::Raw | SourceFormat::Overlay => Ok(()),
        }
    }

    /// Header fields: QEMU's `docs/interop/qcow2.txt`.
    fn refuse_qcow2_references(&self) -> Result<(), FormatError> {
        const DATA_FILE: u64 = 1 << 2;
        if self.bytes.len() < 72 {
            return Err(FormatError::Unsound("it is truncated: it ends within its header"));
        }
        let version = self.big_endian(0) & 0xffff_ffff;
        if !(2..=3).contains(&version) {
            return Err(FormatError::Unsound("it is qcow of a version other than 2 and 3: convert it first"));
        }
        if self.big_endian(32) >> 32 != 0 {
            return Err(FormatError::Unsound("it is an encrypted qcow2 image: decrypt it first"));
        }
        let (backing_at, backing_length) = (self.big_endian(8), self.big_endian(16) >> 32);
        if backing_at != 0 {
            let at = usize::try_from(backing_at).unwrap_or(usize::MAX);
            let length = usize::try_from(backing_length.min(1023)).expect("at most 1023");
            return Err(FormatError::OutsideFile(format!("'{}'", self.text(at, length).escape_debug())));
        }
        if version == 3 && self.big_endian(72) & DATA_FILE != 0 {
            return Err(FormatError::OutsideFile("its external data file".to_owned()));
        }
        Ok(())
    }

    /// Header fields: VMware's "Virtual Disk Format 5.0", and what QEMU's `block/vmdk.c` does with them.
    fn refuse_vmdk_references(&self) -> Result<(), FormatError> {
        if self.is_vmdk_description() {
            return Err(FormatError::OutsideFile("its extents".to_owned()));
        }
        // Without a capacity, QEMU takes the description for the whole image, and opens the extents that it names.
        if self.has(b"KDMV", 0) && self.little_endian(12) == 0 {
            return Err(FormatError::OutsideFile("its extents".to_owned()));
        }
        let stated_at = usize::try_from(self.little_endian(28).saturating_mul(512)).unwrap_or(usize::MAX);
        for at in [VMDK_DESCRIPTION_AT, stated_at] {
            let description = self.text(at, VMDK_DESCRIPTION_BYTES);
            if let Some(hint) = description.split("parentFileNameHint").nth(1) {
                let parent = hint.split('"').nth(1).unwrap_or_default();
                return Err(FormatError::OutsideFile(format!("'{}'", parent.escape_debug())));
            }
        }
        Ok(())
    }
}

/// Refuses a raw disk of `size` bytes whose partition table reaches past its end, as that of a truncated file does.
///
/// # Errors
/// [`FormatError::Unsound`].
pub fn refuse_truncated(head: &Head, size: u64) -> Result<(), FormatError> {
    const TRUNCATED: FormatError = FormatError::Unsound(
        "it is truncated: its partition table reaches past its end (state --format raw to take it as it is)",
    );
    const SECTOR: u64 = 512;
    const PROTECTIVE: u8 = 0xee;
    if head.has(b"EFI PART", 512) {
        let backup = head.little_endian(512 + 32);
        return if backup.saturating_add(1).saturating_mul(SECTOR) > size { Err(TRUNCATED) } else { Ok(()) };
    }
    if !head.has(&[0x55, 0xaa], 510) {
        return Ok(());
    }
    let entries = (0..4).map(|i| 446 + 16 * i);
    let reaches_past = |at: usize| {
        let (kind, place) = (head.bytes[at + 4], head.little_endian(at + 8));
        let end = (place & 0xffff_ffff) + (place >> 32);
        let status_is_sane = head.bytes[at] & 0x7f == 0;
        status_is_sane && kind != 0 && kind != PROTECTIVE && end * SECTOR > size
    };
    // The boot sector of a bare file system has code where the table would be; its statuses are not all sane.
    let is_table = entries.clone().all(|at| head.bytes[at] & 0x7f == 0);
    if is_table && entries.into_iter().any(reaches_past) { Err(TRUNCATED) } else { Ok(()) }
}

/// Refuses a VDI file of `length` bytes that does not hold the blocks its header says it holds: `qemu-img check` finds
/// nothing wrong with it, and `convert` would read the missing ones as zeroes.
///
/// # Errors
/// [`FormatError::Unsound`].
pub fn refuse_truncated_vdi(head: &Head, length: u64) -> Result<(), FormatError> {
    const DATA_AT: usize = 0x158; // u32 offset of the first block
    const BLOCK_SIZE: usize = 0x178; // u32 bytes, u32 extra bytes
    const BLOCKS_ALLOCATED: usize = 0x184; // u32
    let field = |at: usize| head.little_endian(at) & 0xffff_ffff;
    let block = field(BLOCK_SIZE) + field(BLOCK_SIZE + 4);
    let end = block.saturating_mul(field(BLOCKS_ALLOCATED)).saturating_add(field(DATA_AT));
    if end > length {
        return Err(FormatError::Unsound("it is truncated: its header tells of blocks past its end"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(bytes: &[u8]) -> Head {
        Head { bytes: bytes.to_vec() }
    }

    fn qcow2(version: u32, backing: u64, incompatible: u64) -> Head {
        let mut bytes = vec![0; 512];
        bytes[..4].copy_from_slice(b"QFI\xfb");
        bytes[4..8].copy_from_slice(&version.to_be_bytes());
        bytes[8..16].copy_from_slice(&backing.to_be_bytes());
        bytes[16..20].copy_from_slice(&11_u32.to_be_bytes());
        bytes[72..80].copy_from_slice(&incompatible.to_be_bytes());
        bytes[300..311].copy_from_slice(b"/etc/passwd");
        Head { bytes }
    }

    fn choose(bytes: &[u8], path: &str, stated: Option<SourceFormat>) -> Result<SourceFormat, FormatError> {
        head(bytes).choose(Path::new(path), stated)
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_it_panic(mut bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..1200), magic in 0..6_usize) {
            let magic = [&b"QFI\xfb\0\0\0\x03"[..], b"KDMV", b"# Disk DescriptorFile\n", b"vhdxfile", b"EFI PART", b""][magic];
            let length = bytes.len().min(magic.len());
            bytes[..length].copy_from_slice(&magic[..length]);
            if bytes.len() > 600 {
                bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
            }
            let head = head(&bytes);
            for format in [SourceFormat::Raw, SourceFormat::Qcow2, SourceFormat::Vmdk, SourceFormat::Vdi] {
                let _either = head.choose(Path::new("x"), Some(format));
                let _either = head.refuse_outside_files(format);
            }
            let _either = head.choose(Path::new("x"), None);
            let _either = refuse_truncated(&head, 1 << 20);
            let _either = refuse_truncated_vdi(&head, 1 << 20);
        }
    }

    #[test]
    fn the_first_bytes_decide_unless_the_name_contradicts_them() {
        assert_eq!(choose(b"QFI\xfb", "cloud.img", None).unwrap(), SourceFormat::Qcow2);
        assert_eq!(choose(b"\0\0\0\0", "disk", None).unwrap(), SourceFormat::Raw);
        assert_eq!(choose(b"vhdxfile", "disk.vhdx", None).unwrap(), SourceFormat::Vhdx);
        assert!(matches!(choose(b"QFI\xfb", "disk.raw", None), Err(FormatError::NameContradicts { .. })));
        assert!(matches!(choose(b"\0", "disk.qcow2", None), Err(FormatError::NotAsNamed(_))));
        let said = choose(b"\0", "disk.qcow2", None).unwrap_err().to_string();
        assert!(said.contains("state --format raw") && !said.contains("out"), "{said}");
        assert!(matches!(choose(b"\x1f\x8b", "disk.img.gz", None), Err(FormatError::Foreign { .. })));
        let said = choose(b"\x1f\x8b", "c.tar.gz", None).unwrap_err().to_string();
        assert!(said.contains("decompress") && said.contains("--type container"), "{said}");
    }

    #[test]
    fn a_stated_format_is_taken_as_stated_and_never_probed() {
        assert_eq!(choose(b"QFI\xfb", "x", Some(SourceFormat::Raw)).unwrap(), SourceFormat::Raw);
        assert!(choose(b"QFI\xfb", "x", Some(SourceFormat::Vmdk)).is_err());
        assert!(choose(b"", "x", Some(SourceFormat::Qcow2)).is_err());
    }

    #[test]
    fn qcow2_backing_and_data_files_are_found_in_the_header() {
        let refuse = |head: &Head| head.refuse_outside_files(SourceFormat::Qcow2);
        assert!(refuse(&qcow2(3, 0, 0)).is_ok());
        let error = refuse(&qcow2(2, 300, 0)).unwrap_err().to_string();
        assert!(error.contains("'/etc/passwd'"), "{error}");
        assert!(refuse(&qcow2(3, u64::MAX, 0)).is_err());
        assert!(matches!(refuse(&qcow2(3, 0, 4)), Err(FormatError::OutsideFile(_))));
        assert!(refuse(&qcow2(1, 0, 0)).is_err());
        assert!(refuse(&head(b"QFI\xfb\0\0\0\x03")).is_err());
    }

    #[test]
    fn vmdk_parents_and_extents_are_found_wherever_qemu_looks_for_them() {
        let refuse = |bytes: &[u8]| head(bytes).refuse_outside_files(SourceFormat::Vmdk);
        let mut sparse = vec![0; 64 << 10];
        sparse[..4].copy_from_slice(b"KDMV");
        assert!(refuse(&sparse).is_err(), "no capacity");
        sparse[12] = 1;
        assert!(refuse(&sparse).is_ok());
        for at in [0x200, 0x4000] {
            let mut child = sparse.clone();
            child[28..36].copy_from_slice(&(0x4000_u64 / 512).to_le_bytes());
            child[at..at + 27].copy_from_slice(b"parentFileNameHint=\"/a/b\"\n\n");
            assert!(refuse(&child).unwrap_err().to_string().contains("'/a/b'"));
        }
        assert!(refuse(b"# Disk DescriptorFile\nRW 1 FLAT \"/etc/passwd\" 0\n").is_err());
        assert!(refuse(b"# comment\n# Disk DescriptorFile\n").is_err());
    }

    #[test]
    fn a_partition_table_that_reaches_past_the_end_is_a_truncated_disk() {
        let mut mbr = vec![0; 1024];
        mbr[510..512].copy_from_slice(&[0x55, 0xaa]);
        mbr[450] = 0x83;
        mbr[454..458].copy_from_slice(&2048_u32.to_le_bytes());
        mbr[458..462].copy_from_slice(&2048_u32.to_le_bytes());
        assert!(refuse_truncated(&head(&mbr), 4096 * 512).is_ok());
        assert!(refuse_truncated(&head(&mbr), 4095 * 512).is_err());
        mbr[512..520].copy_from_slice(b"EFI PART");
        mbr[544..552].copy_from_slice(&9999_u64.to_le_bytes());
        assert!(refuse_truncated(&head(&mbr), 10_000 * 512).is_ok());
        assert!(refuse_truncated(&head(&mbr), 9_999 * 512).is_err());
    }

    #[test]
    fn a_vdi_that_ends_before_its_last_block_is_truncated() {
        let mut bytes = vec![0; 512];
        for (at, value) in [(0x158, 4096_u32), (0x178, 1 << 20), (0x17c, 0), (0x184, 3)] {
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        let end = 4096 + (3 << 20);
        assert!(refuse_truncated_vdi(&head(&bytes), end).is_ok());
        assert!(refuse_truncated_vdi(&head(&bytes), end - 1).is_err());
    }
}
