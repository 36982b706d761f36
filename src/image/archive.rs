//! Container images as tar archives: which kind one is, and whether it is whole.
//!
//! Which kind is decided by its first entries alone, so that it is known when the first bytes of the archive arrive
//! (`docker save` writes its manifest last). Whether the rest is as those promise is checked when the image is added.

use std::io::{self, Read};

use flate2::read::GzDecoder;

/// How many bytes of an archive are enough to tell its kind; of a shorter one all are.
pub const HEAD_BYTES: usize = 64 << 10;

/// Bytes of a tar header, and the unit of everything in the archive.
const RECORD: usize = 512;
/// First bytes of a gzip file.
const GZIP: [u8; 2] = [0x1f, 0x8b];

/// What a container's archive is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ArchiveKind {
    /// `docker save`, which may be an OCI layout too: layers, and what says how they go together.
    Saved,
    /// A root file system.
    RootFs,
}

/// What is wrong with an archive.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// It is no tar archive, plain or by gzip.
    #[error("it is not a tar archive, plain or compressed with gzip")]
    NotTar,
    /// It ends in the middle.
    #[error("the archive ends in the middle: it was not copied as a whole")]
    Truncated,
    /// A header is damaged.
    #[error("the archive is damaged at its byte {0}")]
    Damaged(u64),
    /// It has no entries.
    #[error("the archive is empty")]
    Empty,
    /// What is needed to load it is missing.
    #[error("it looks like a saved image, but has no manifest.json: save it again")]
    NoManifest,
    /// An OCI layout alone, which dockerd does not load: tried with 20.10.
    #[error(
        "it is an OCI layout without manifest.json, which Docker does not load: make it one with \
         `skopeo copy oci-archive:FILE docker-archive:NEW`, or take what `docker save` writes"
    )]
    OciLayout,
    /// A saved image that begins with something else.
    #[error(
        "it is a saved image in an order that cannot be loaded while it arrives: load it into Docker and `docker save` it"
    )]
    Order,
    /// It cannot be read.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl ArchiveKind {
    /// The kind, by the first [`HEAD_BYTES`] of the archive.
    pub fn of_head(head: &[u8]) -> Result<Self, ArchiveError> {
        let mut entries = entries(head)?;
        while let Some(entry) = entries.next()? {
            if let Some(kind) = entry.kind() {
                return Ok(kind);
            }
        }
        if entries.at == 0 { Err(ArchiveError::Empty) } else { Ok(Self::RootFs) }
    }
}

/// Reads a whole archive and says what it is.
///
/// # Errors
/// When it is cut short, damaged, or not what its beginning promises.
pub fn check(archive: impl Read) -> Result<ArchiveKind, ArchiveError> {
    let mut entries = entries(archive)?;
    let (mut kind, mut has_manifest, mut is_layout) = (None, false, false);
    while let Some(entry) = entries.next()? {
        kind = kind.or_else(|| entry.kind());
        has_manifest |= entry.path() == "manifest.json";
        is_layout |= matches!(entry.path(), "index.json" | "oci-layout");
    }
    match kind {
        None if entries.at == 0 => Err(ArchiveError::Empty),
        Some(ArchiveKind::Saved) if !has_manifest && is_layout => Err(ArchiveError::OciLayout),
        Some(ArchiveKind::Saved) if !has_manifest => Err(ArchiveError::NoManifest),
        Some(ArchiveKind::RootFs) if has_manifest || is_layout => Err(ArchiveError::Order),
        kind => Ok(kind.unwrap_or(ArchiveKind::RootFs)),
    }
}

/// An entry's header.
struct Entry {
    name: String,
    /// Regular file, folder, or another thing of a file system; otherwise a header about the next entry.
    is_file: bool,
    length: u64,
}

impl Entry {
    /// Reads a header; `None` if its sum is wrong.
    fn parse(header: &[u8]) -> Option<Self> {
        let text = |from: usize, length: usize| {
            let field = &header[from..from + length];
            let end = field.iter().position(|byte| *byte == 0).unwrap_or(length);
            String::from_utf8_lossy(&field[..end]).into_owned()
        };
        let octal = |from, length| u64::from_str_radix(text(from, length).trim(), 8).ok();
        let sum: u64 = (0..RECORD)
            .map(|at| if (148..156).contains(&at) { u64::from(b' ') } else { u64::from(header[at]) })
            .sum();
        if octal(148, 8)? != sum {
            return None;
        }
        // Sizes of 8 GiB and more are binary.
        let length = match header[124] & 0x80 {
            0 => octal(124, 12)?,
            _ => u64::from_be_bytes(header[128..136].try_into().ok()?),
        };
        let prefix = if header[257..].starts_with(b"ustar\0") { text(345, 155) } else { String::new() };
        let name = if prefix.is_empty() { text(0, 100) } else { format!("{prefix}/{}", text(0, 100)) };
        // x, g: POSIX; K, L: GNU's long names.
        let is_file = !matches!(header[156], b'x' | b'g' | b'K' | b'L');
        (length < 1 << 50).then_some(Self { name, is_file, length })
    }

    /// Its path without `./` before it.
    fn path(&self) -> &str {
        self.name.trim_start_matches("./").trim_end_matches('/')
    }

    /// What an archive that begins with this entry is; `None` if it says nothing.
    fn kind(&self) -> Option<ArchiveKind> {
        let first = self.path().split('/').next().unwrap_or_default();
        if !self.is_file || first.is_empty() || first == "." {
            return None;
        }
        let digest = first.split('.').next().unwrap_or_default();
        let is_layer = digest.len() == 64 && digest.bytes().all(|byte| byte.is_ascii_hexdigit());
        let is_saved =
            matches!(first, "blobs" | "oci-layout" | "index.json" | "manifest.json" | "repositories");
        Some(if is_layer || is_saved { ArchiveKind::Saved } else { ArchiveKind::RootFs })
    }
}

/// Reads headers, and skips what lies between them.
struct Entries<R> {
    archive: R,
    /// Bytes of records read.
    at: u64,
    /// Bytes of the last entry's data, which come before the next header.
    data: u64,
}

/// The entries of an archive, which gzip may have compressed.
fn entries<'a>(mut archive: impl Read + 'a) -> io::Result<Entries<Box<dyn Read + 'a>>> {
    let mut magic = Vec::new();
    archive.by_ref().take(GZIP.len() as u64).read_to_end(&mut magic)?;
    let compressed = magic == GZIP;
    let whole = io::Cursor::new(magic).chain(archive);
    let archive: Box<dyn Read> = if compressed {
        Box::new(io::BufReader::with_capacity(HEAD_BYTES, GzDecoder::new(whole)))
    } else {
        Box::new(io::BufReader::with_capacity(HEAD_BYTES, whole))
    };
    Ok(Entries { archive, at: 0, data: 0 })
}

impl<R: Read> Entries<R> {
    /// The next entry; `None` at the end of the archive.
    fn next(&mut self) -> Result<Option<Entry>, ArchiveError> {
        let skipped = io::copy(&mut self.archive.by_ref().take(self.data), &mut io::sink());
        if skipped.map_err(cut_short)? < self.data {
            return Err(ArchiveError::Truncated);
        }
        self.at += self.data;
        let mut header = Vec::with_capacity(RECORD);
        let read = self.archive.by_ref().take(RECORD as u64).read_to_end(&mut header);
        let read =
            read.map_err(|error| if self.at == 0 { ArchiveError::NotTar } else { cut_short(error) })?;
        let damaged = if self.at == 0 { ArchiveError::NotTar } else { ArchiveError::Damaged(self.at) };
        match read {
            0 => return Ok(None), // some tools leave the end mark out
            RECORD => {}
            _ if self.at == 0 => return Err(ArchiveError::NotTar),
            _ => return Err(ArchiveError::Truncated),
        }
        if header.iter().all(|byte| *byte == 0) {
            return Ok(None); // the end mark; what follows is padding
        }
        self.at += RECORD as u64;
        let entry = Entry::parse(&header).ok_or(damaged)?;
        self.data = entry.length.next_multiple_of(RECORD as u64);
        Ok(Some(entry))
    }
}

/// A stream that gzip says has ended early.
fn cut_short(error: io::Error) -> ArchiveError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => ArchiveError::Truncated,
        _ => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// A tar archive with these files, as tar writes it.
    fn tar(files: &[&str]) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        for file in files {
            let path = dir.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, vec![7; 1000]).unwrap();
        }
        let output =
            std::process::Command::new("tar").arg("-C").arg(dir.path()).arg("-c").args(files).output();
        output.unwrap().stdout
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn a_root_file_system_and_a_saved_image_are_told_apart_by_their_beginning() {
        let layer = format!("{}/layer.tar", "0a".repeat(32));
        let cases = [
            (tar(&["bin/sh", "etc/passwd"]), ArchiveKind::RootFs),
            (tar(&["./bin/sh", "./blobs"]), ArchiveKind::RootFs),
            (tar(&[&layer, "manifest.json"]), ArchiveKind::Saved),
            (tar(&["./blobs/sha256/x", "./index.json", "./manifest.json"]), ArchiveKind::Saved),
        ];
        for (archive, kind) in cases {
            for bytes in [archive.clone(), gzip(&archive)] {
                assert_eq!(ArchiveKind::of_head(&bytes[..bytes.len().min(HEAD_BYTES)]).unwrap(), kind);
                assert_eq!(check(&bytes[..]).unwrap(), kind);
            }
        }
    }

    #[test]
    fn an_archive_that_is_cut_short_or_damaged_is_refused() {
        let whole = tar(&["bin/sh", "etc/passwd", "etc/group"]);
        for end in (1..whole.len()).step_by(100).filter(|end| *end < 4600 && !end.is_multiple_of(RECORD)) {
            assert!(check(&whole[..end]).is_err(), "{end}");
        }
        let packed = gzip(&whole);
        assert!(matches!(check(&packed[..packed.len() / 2]), Err(ArchiveError::Truncated)));
        let mut damaged = whole.clone();
        damaged[1536 + 3] ^= 1;
        assert!(matches!(check(&damaged[..]), Err(ArchiveError::Damaged(1536))));
        assert!(matches!(check(&[7; 5000][..]), Err(ArchiveError::NotTar)));
        assert!(matches!(check(&gzip(b"text")[..]), Err(ArchiveError::NotTar)));
        assert!(matches!(check(&[0; 10240][..]), Err(ArchiveError::Empty)));
    }

    #[test]
    fn a_saved_image_without_a_manifest_or_in_another_order_is_refused() {
        let layer = format!("{}/layer.tar", "0a".repeat(32));
        assert!(matches!(check(&tar(&[&layer])[..]), Err(ArchiveError::NoManifest)));
        let layout = tar(&["./blobs/sha256/x", "./index.json", "./oci-layout"]);
        assert!(matches!(check(&layout[..]), Err(ArchiveError::OciLayout)));
        assert!(matches!(check(&tar(&["a", &layer, "manifest.json"])[..]), Err(ArchiveError::Order)));
    }
}
