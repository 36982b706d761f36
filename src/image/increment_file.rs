//! An incremental image as one file: what it adds to its base, and nothing of the base.
//!
//! ```text
//! "bootcache incr 1"             16 bytes; the last is the version
//! length of the manifest          4 bytes; all integers are little-endian
//! number of runs                  4 bytes
//! BLAKE3 of the 24 bytes above, the manifest and the runs
//! manifest                       as in the store (`image::manifest`), without a boot cache; binds root, size and base
//! runs                           16 bytes each, ascending: first block u64, number of blocks u63 and 1 bit: zero
//! frames                         to the end: the blocks of the runs that are not zero, in order, up to 64 in a frame:
//!                                  length u32, BLAKE3 of the compressed bytes 32, zstd
//! ```
//!
//! Every byte is covered by a digest, every length is checked before it is used. Whoever takes the file in checks the
//! root on top, which only the right base together with the right blocks can have.

use std::io::{self, Read, Write};

use crate::block::{BLOCK_SIZE, Extent, blocks_for};
use crate::digest::{DIGEST_BYTES, Digest};

use super::increment_tree::Change;
use super::manifest::{MANIFEST_BYTES_MAX, Manifest, ManifestError};
use super::tree::SIZE_MAX;

/// What the file begins with.
pub const MAGIC: &[u8; 16] = b"bootcache incr 1";
const FRAME_BLOCKS: u64 = 64;
const FRAME_BYTES: usize = 256 << 10;
/// zstd never makes more of a frame than this.
const COMPRESSED_MAX: usize = FRAME_BYTES + (FRAME_BYTES >> 8) + 64;
const RUN_BYTES: usize = 16;
const ZERO_BIT: u64 = 1 << 63;
const LEVEL: i32 = 6;

/// Why a file is not a sound increment.
#[derive(Debug, thiserror::Error)]
pub enum IncrementFileError {
    /// It cannot be read.
    #[error("{0}")]
    Io(io::Error),
    /// It is damaged or was made by something else.
    #[error("it is not a sound incremental image: {0}")]
    Damaged(&'static str),
    /// Its manifest is.
    #[error("it is not a sound incremental image: {0}")]
    Manifest(ManifestError),
}

impl From<io::Error> for IncrementFileError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::Damaged("it is truncated"),
            _ => Self::Io(error),
        }
    }
}

/// Frames of the blocks that `changes` hold, in order.
pub(super) fn frames(changes: &[Change]) -> impl Iterator<Item = Vec<Extent>> {
    let mut runs = changes.iter().filter(|change| !change.zero).map(|change| change.extent).peekable();
    let mut rest = Extent::new(0, 0);
    std::iter::from_fn(move || {
        let (mut frame, mut room) = (Vec::new(), FRAME_BLOCKS);
        while room > 0 {
            if rest.is_empty() {
                let Some(next) = runs.next() else { break };
                rest = next;
            }
            let taken = Extent::new(rest.start, rest.count.min(room));
            rest = Extent::new(taken.end(), rest.count - taken.count);
            room -= taken.count;
            frame.push(taken);
        }
        (!frame.is_empty()).then_some(frame)
    })
}

/// Writes an increment: `read` fills a buffer with the blocks of an extent, zeroes past the end of the disk.
///
/// # Errors
/// Those of `out` and `read`.
pub(super) fn write(
    mut out: impl Write,
    manifest: &Manifest,
    changes: &[Change],
    mut read: impl FnMut(Extent, &mut [u8]) -> io::Result<()>,
) -> io::Result<()> {
    let too_many = |_| io::Error::other("the increment has too many runs");
    let manifest = Manifest { boot: None, ..manifest.clone() }.to_bytes();
    let mut bound = MAGIC.to_vec();
    bound.extend(u32::try_from(manifest.len()).map_err(too_many)?.to_le_bytes());
    bound.extend(u32::try_from(changes.len()).map_err(too_many)?.to_le_bytes());
    let counts = bound.len();
    bound.extend(manifest);
    for change in changes {
        bound.extend(change.extent.start.to_le_bytes());
        bound.extend((change.extent.count | if change.zero { ZERO_BIT } else { 0 }).to_le_bytes());
    }
    out.write_all(&bound[..counts])?;
    out.write_all(&Digest::of(&bound).0)?;
    out.write_all(&bound[counts..])?;
    let mut compressor = zstd::bulk::Compressor::new(LEVEL)?;
    let mut buffer = vec![0; FRAME_BYTES];
    for frame in frames(changes) {
        let mut length = 0;
        for extent in frame {
            let bytes = usize::try_from(extent.bytes()).expect("a frame has 256 KiB");
            read(extent, &mut buffer[length..length + bytes])?;
            length += bytes;
        }
        let compressed = compressor.compress(&buffer[..length])?;
        out.write_all(&u32::try_from(compressed.len()).expect("zstd expands by little").to_le_bytes())?;
        out.write_all(&Digest::of(&compressed).0)?;
        out.write_all(&compressed)?;
    }
    Ok(())
}

/// An increment that is being read.
#[derive(Debug)]
pub(super) struct Reader<R> {
    input: R,
    /// What it says of the image; it has a base.
    pub(super) manifest: Manifest,
    /// Root of the image that it adds to.
    pub(super) base: Digest,
    /// The blocks it has, in ascending order, within the disk.
    pub(super) changes: Vec<Change>,
}

impl<R: Read> Reader<R> {
    /// Reads all but the blocks. `length` is that of the file, which bounds what it may claim.
    pub(super) fn new(mut input: R, length: u64) -> Result<Self, IncrementFileError> {
        const DAMAGED: IncrementFileError =
            IncrementFileError::Damaged("its beginning does not have its digest");
        let mut head = [0; 24];
        input.read_exact(&mut head)?;
        let mut digest = [0; DIGEST_BYTES];
        input.read_exact(&mut digest)?;
        let number = |at: usize| {
            u32::from_le_bytes(head[at..at + 4].try_into().expect("the slice has 4 bytes")) as usize
        };
        let (manifest_length, runs_length) = (number(16), number(20).saturating_mul(RUN_BYTES));
        if head[..16] != *MAGIC {
            return Err(IncrementFileError::Damaged("it does not begin like one"));
        }
        if manifest_length > MANIFEST_BYTES_MAX || runs_length as u64 > length {
            return Err(DAMAGED);
        }
        let mut bound = head.to_vec();
        bound.resize(head.len() + manifest_length + runs_length, 0);
        input.read_exact(&mut bound[head.len()..])?;
        if Digest::of(&bound).0 != digest {
            return Err(DAMAGED);
        }
        let (manifest, runs) = bound[head.len()..].split_at(manifest_length);
        let manifest = Manifest::from_bytes(manifest).map_err(IncrementFileError::Manifest)?;
        let base = manifest.base.ok_or(IncrementFileError::Damaged("it names no base"))?;
        if manifest.size > SIZE_MAX {
            return Err(IncrementFileError::Damaged("its disk is larger than the limit of 8 TiB"));
        }
        let changes = parse_runs(runs, blocks_for(manifest.size))
            .ok_or(IncrementFileError::Damaged("its runs are not in order or not within the disk"))?;
        Ok(Self { input, manifest, base, changes })
    }

    /// Reads all blocks and shows each extent of them, whole blocks, to `put`.
    pub(super) fn read_blocks(
        mut self,
        mut put: impl FnMut(Extent, &[u8]) -> Result<(), IncrementFileError>,
    ) -> Result<(), IncrementFileError> {
        const DAMAGED: IncrementFileError = IncrementFileError::Damaged("a frame does not have its digest");
        let mut compressed = vec![0; COMPRESSED_MAX];
        for frame in frames(&self.changes) {
            let (mut length, mut digest) = ([0; 4], [0; DIGEST_BYTES]);
            self.input.read_exact(&mut length)?;
            self.input.read_exact(&mut digest)?;
            let compressed = compressed.get_mut(..u32::from_le_bytes(length) as usize).ok_or(DAMAGED)?;
            self.input.read_exact(compressed)?;
            if Digest::of(compressed).0 != digest {
                return Err(DAMAGED);
            }
            let blocks: u64 = frame.iter().map(|extent| extent.count).sum();
            let bytes = usize::try_from(blocks * BLOCK_SIZE).expect("a frame has 256 KiB");
            let data = zstd::bulk::decompress(compressed, bytes).map_err(|_| DAMAGED)?;
            if data.len() != bytes {
                return Err(DAMAGED);
            }
            let mut rest = &data[..];
            for extent in frame {
                let (here, after) =
                    rest.split_at(usize::try_from(extent.bytes()).expect("a frame has 256 KiB"));
                put(extent, here)?;
                rest = after;
            }
        }
        match self.input.read(&mut [0])? {
            0 => Ok(()),
            _ => Err(IncrementFileError::Damaged("something follows its end")),
        }
    }
}

fn parse_runs(bytes: &[u8], blocks: u64) -> Option<Vec<Change>> {
    let (runs, _) = bytes.as_chunks::<RUN_BYTES>();
    let mut done = 0;
    runs.iter()
        .map(|run| {
            let word =
                |at: usize| u64::from_le_bytes(run[at..at + 8].try_into().expect("the slice has 8 bytes"));
            let extent = Extent::new(word(0), word(8) & !ZERO_BIT);
            let end = extent.start.checked_add(extent.count)?;
            let sound = extent.start >= done && !extent.is_empty() && end <= blocks;
            done = end;
            sound.then_some(Change { extent, zero: word(8) & ZERO_BIT != 0 })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::image::manifest::{ImageKind, MANIFEST_VERSION, SourceFormat};

    fn manifest(blocks: u64) -> Manifest {
        Manifest {
            version: MANIFEST_VERSION,
            size: blocks * BLOCK_SIZE,
            root: Digest::of(b"root"),
            raw_blake3: None,
            kind: ImageKind::Vm,
            source_format: SourceFormat::Overlay,
            base: Some(Digest::of(b"base")),
            allocated: 0,
            boot: None,
        }
    }

    fn changes(runs: &[(u64, u64, bool)]) -> (Vec<Change>, u64) {
        let mut at = 0;
        let list = runs
            .iter()
            .map(|(gap, count, zero)| {
                let extent = Extent::new(at + gap, *count);
                at = extent.end();
                Change { extent, zero: *zero }
            })
            .collect();
        (list, at)
    }

    fn fill(extent: Extent, buffer: &mut [u8]) {
        for (block, bytes) in extent.blocks().zip(buffer.chunks_mut(4096)) {
            bytes.fill(u8::try_from(block % 251).unwrap());
        }
    }

    fn written(runs: &[(u64, u64, bool)]) -> (Vec<u8>, Vec<Change>) {
        let (list, blocks) = changes(runs);
        let mut bytes = Vec::new();
        write(&mut bytes, &manifest(blocks), &list, |extent, buffer| {
            fill(extent, buffer);
            Ok(())
        })
        .unwrap();
        (bytes, list)
    }

    fn read(bytes: &[u8]) -> Result<Vec<Change>, IncrementFileError> {
        let reader = Reader::new(bytes, bytes.len() as u64)?;
        let changes = reader.changes.clone();
        let mut seen = Vec::new();
        reader.read_blocks(|extent, data| {
            let mut expected = vec![0; data.len()];
            fill(extent, &mut expected);
            assert!(data == expected);
            seen.extend(extent.blocks());
            Ok(())
        })?;
        let expected: Vec<u64> =
            changes.iter().filter(|change| !change.zero).flat_map(|change| change.extent.blocks()).collect();
        assert_eq!(seen, expected);
        Ok(changes)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn reads_back_what_it_wrote(runs in prop::collection::vec((0_u64..5, 1_u64..150, any::<bool>()), 0..8)) {
            let (bytes, list) = written(&runs);
            prop_assert_eq!(read(&bytes).unwrap(), list);
        }
    }

    #[test]
    fn every_changed_byte_and_every_truncation_is_detected() {
        let (sound, _) = written(&[(1, 70, false), (2, 3, true), (0, 1, false)]);
        for at in 0..sound.len() {
            let mut bytes = sound.clone();
            bytes[at] ^= 4;
            let error = read(&bytes).expect_err("a changed byte").to_string();
            assert!(!error.contains('\n'), "{error}");
            assert!(read(&sound[..at]).is_err());
        }
        let mut longer = sound;
        longer.push(0);
        assert!(read(&longer).is_err());
    }

    #[test]
    fn runs_out_of_order_or_past_the_end_are_refused() {
        let runs = |list: &[(u64, u64)]| -> Vec<u8> {
            list.iter()
                .flat_map(|(start, count)| [start.to_le_bytes(), count.to_le_bytes()].concat())
                .collect()
        };
        assert!(parse_runs(&runs(&[(0, 2), (2, 1)]), 3).is_some());
        for bad in [&[(0, 2), (1, 1)][..], &[(3, 1)], &[(0, 0)], &[(u64::MAX, 2)], &[(1, u64::MAX >> 1)]] {
            assert!(parse_runs(&runs(bad), 3).is_none(), "{bad:?}");
        }
    }
}
