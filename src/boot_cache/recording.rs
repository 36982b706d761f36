//! What one boot read of an image: offsets, lengths and times, in the order in which they were asked for.
//!
//! A [`Recording`] is what a tracer, at QEMU or at an NBD export, hands over, and what merging, analysis and replay
//! start from. It knows nothing of how it was got; the tracer's own file format is not here.
//!
//! A recording is kept beside the boot cache that was made of it (`images/ROOT/recordings/N`), in this form:
//!
//! ```text
//! "bootcache recording 1\n"        22 bytes
//! BLAKE3 of all that follows       32 bytes
//! root digest of the image         32 bytes
//! length of the rest, unpacked      8 bytes, little-endian
//! zstd: MessagePack of (end_ns, reads as (offset, length, time_ns - the read before it, took_ns))
//! ```

use serde::{Deserialize, Serialize};

use crate::digest::{DIGEST_BYTES, Digest};
use crate::image::tree::SIZE_MAX;

const MAGIC: &[u8; 22] = b"bootcache recording 1\n";

/// Most reads that a recording may have; an hour of a busy guest has far fewer.
pub const READS_MAX: usize = 16 << 20;
/// Most bytes that a recording may unpack to.
const UNPACKED_MAX: u64 = 1 << 30;
/// Recordings are written once and are small.
const ZSTD_LEVEL: i32 = 19;

/// One read of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Read {
    /// Byte offset in the image.
    pub offset: u64,
    /// Bytes asked for; never zero.
    pub length: u64,
    /// When it was asked for, in ns since the recording began.
    pub time_ns: u64,
    /// How long the answer took, in ns; 0 when that is not known.
    pub took_ns: u64,
}

/// The reads of one boot.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Recording {
    /// In the order in which they were asked for: `time_ns` never decreases.
    pub reads: Vec<Read>,
    /// When the boot was over (its condition was met), in ns since the recording began. Reads may follow it.
    pub end_ns: u64,
}

/// Bytes that are not a recording, or one of another image.
#[derive(Debug, thiserror::Error)]
pub enum RecordingError {
    /// Not a recording, or damaged.
    #[error("not a sound recording ({0}): record the image again")]
    Damaged(&'static str),
    /// Sound, but not of this image.
    #[error("the recording is of image {}: record this image again", found.short())]
    OtherImage {
        /// The image that it is of.
        found: Digest,
    },
}

impl Recording {
    /// Puts reads that several threads saw into the order in which they were asked for; those of length 0 are left out.
    pub fn new(mut reads: Vec<Read>, end_ns: u64) -> Self {
        reads.retain(|read| read.length > 0);
        reads.sort_by_key(|read| read.time_ns);
        Self { reads, end_ns }
    }

    /// Bytes asked for, repeated reads counted each time.
    pub fn bytes_requested(&self) -> u64 {
        self.reads.iter().map(|read| read.length).sum()
    }

    /// The form in which it is kept: bound to the image `root`, compressed.
    pub fn to_bytes(&self, root: Digest) -> Vec<u8> {
        let mut previous_ns = 0;
        let rows = self.reads.iter().map(|read| {
            let delta_ns = read.time_ns.saturating_sub(previous_ns);
            previous_ns = read.time_ns;
            (read.offset, read.length, delta_ns, read.took_ns)
        });
        let packed = Packed { end_ns: self.end_ns, rows: rows.collect() };
        let plain = rmp_serde::to_vec(&packed).expect("integers always serialize");
        let body = zstd::bulk::compress(&plain, ZSTD_LEVEL).expect("memory to memory");
        let covered = [&root.0, (plain.len() as u64).to_le_bytes().as_slice(), &body].concat();
        [MAGIC.as_slice(), &Digest::of(&covered).0, &covered].concat()
    }

    /// The recording in `bytes`, and the image that it is of.
    ///
    /// # Errors
    /// [`RecordingError::Damaged`], whichever byte was changed.
    pub fn from_bytes(bytes: &[u8]) -> Result<(Digest, Self), RecordingError> {
        let rest = bytes.strip_prefix(MAGIC).ok_or(RecordingError::Damaged("its first bytes are wrong"))?;
        let short = RecordingError::Damaged("it is cut short");
        let Some((digest, covered)) = rest.split_first_chunk::<DIGEST_BYTES>() else { return Err(short) };
        if Digest::of(covered).0 != *digest {
            return Err(RecordingError::Damaged("its digest is wrong"));
        }
        let Some((root, rest)) = covered.split_first_chunk::<DIGEST_BYTES>() else { return Err(short) };
        let Some((length, body)) = rest.split_first_chunk::<8>() else { return Err(short) };
        let length = u64::from_le_bytes(*length);
        if length > UNPACKED_MAX {
            return Err(RecordingError::Damaged("it claims to be too large"));
        }
        let length = usize::try_from(length).map_err(|_| RecordingError::Damaged("it is too large"))?;
        let plain = zstd::bulk::decompress(body, length)
            .map_err(|_| RecordingError::Damaged("it does not decompress"))?;
        let packed: Packed =
            rmp_serde::from_slice(&plain).map_err(|_| RecordingError::Damaged("its table is wrong"))?;
        Ok((Digest(*root), packed.unpack()?))
    }

    /// The recording in `bytes`, which must be of the image `root`.
    ///
    /// # Errors
    /// [`RecordingError`].
    pub fn from_bytes_of(bytes: &[u8], root: Digest) -> Result<Self, RecordingError> {
        let (found, recording) = Self::from_bytes(bytes)?;
        if found == root { Ok(recording) } else { Err(RecordingError::OtherImage { found }) }
    }
}

#[derive(Serialize, Deserialize)]
struct Packed {
    end_ns: u64,
    rows: Vec<(u64, u64, u64, u64)>,
}

impl Packed {
    fn unpack(self) -> Result<Recording, RecordingError> {
        if self.rows.len() > READS_MAX {
            return Err(RecordingError::Damaged("it has too many reads"));
        }
        let mut time_ns = 0_u64;
        let mut reads = Vec::with_capacity(self.rows.len());
        for (offset, length, delta_ns, took_ns) in self.rows {
            time_ns = time_ns.checked_add(delta_ns).ok_or(RecordingError::Damaged("its times overflow"))?;
            if length == 0 || offset.checked_add(length).is_none_or(|end| end > SIZE_MAX) {
                return Err(RecordingError::Damaged("a read has no valid range"));
            }
            reads.push(Read { offset, length, time_ns, took_ns });
        }
        Ok(Recording { reads, end_ns: self.end_ns })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Recording {
        let read = |offset, length, time_ns| Read { offset, length, time_ns, took_ns: 7 };
        Recording::new(vec![read(8192, 512, 40), read(0, 4096, 10), read(0, 0, 20), read(0, 4096, 90)], 100)
    }

    #[test]
    fn a_read_past_the_end_of_any_image_is_refused() {
        let unpacked = |offset| Packed { end_ns: 9, rows: vec![(offset, 4096, 1, 1)] }.unpack();
        assert!(unpacked(SIZE_MAX - 4096).is_ok());
        assert!(unpacked(SIZE_MAX - 4095).is_err());
    }

    #[test]
    fn reads_are_put_in_the_order_they_were_asked_for() {
        let times: Vec<u64> = sample().reads.iter().map(|read| read.time_ns).collect();
        assert_eq!(times, [10, 40, 90]);
        assert_eq!(sample().bytes_requested(), 4096 + 512 + 4096);
    }

    #[test]
    fn survives_being_kept() {
        let root = Digest::of(b"image");
        let bytes = sample().to_bytes(root);
        assert_eq!(Recording::from_bytes_of(&bytes, root).unwrap(), sample());
        let other = Recording::from_bytes_of(&bytes, Digest::of(b"other"));
        assert!(matches!(other, Err(RecordingError::OtherImage { found }) if found == root));
    }

    #[test]
    fn any_byte_changed_or_missing_is_noticed() {
        let root = Digest::of(b"image");
        let bytes = sample().to_bytes(root);
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 0x10;
            assert!(Recording::from_bytes_of(&changed, root).is_err(), "byte {at}");
            assert!(Recording::from_bytes_of(&bytes[..at], root).is_err(), "cut at {at}");
        }
    }
}
