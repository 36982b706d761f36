//! The presence bitmap on disk.
//!
//! ```text
//! magic   8   "BCPRESN\n"
//! version 4   1, little-endian
//! zero    4
//! size    8   of the disk, little-endian
//! root   32   of the image
//! bitmap      roaring, in its portable form
//! digest 32   BLAKE3 of everything before
//! ```
//!
//! Replaced as a whole by rename, so that a crash leaves the old one or the new one. It only ever names blocks whose
//! data was synced before it was written. A file that is not sound counts as empty: nothing is lost but time.

use std::io;
use std::path::Path;

use roaring::RoaringBitmap;

use crate::digest::{DIGEST_BYTES, Digest};
use crate::store::write_atomic;

const MAGIC: &[u8; 8] = b"BCPRESN\n";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 56;

fn encode(root: Digest, size: u64, bitmap: &RoaringBitmap) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + bitmap.serialized_size() + DIGEST_BYTES);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&size.to_le_bytes());
    bytes.extend_from_slice(&root.0);
    bitmap.serialize_into(&mut bytes).expect("a vector takes every write");
    let digest = Digest::of(&bytes);
    bytes.extend_from_slice(&digest.0);
    bytes
}

fn decode(bytes: &[u8], root: Digest, size: u64) -> Option<RoaringBitmap> {
    let (body, digest) = bytes.split_last_chunk::<DIGEST_BYTES>()?;
    let (header, bitmap) = body.split_first_chunk::<HEADER_BYTES>()?;
    let expected = encode(root, size, &RoaringBitmap::new());
    if Digest::of(body).0 != *digest || header[..] != expected[..HEADER_BYTES] {
        return None;
    }
    RoaringBitmap::deserialize_from(bitmap).ok()
}

/// Replaces the bitmap at `path`, durably.
///
/// # Errors
/// Any of writing, syncing or renaming; the old file is then still there.
pub(super) fn save(path: &Path, root: Digest, size: u64, bitmap: &RoaringBitmap) -> io::Result<()> {
    write_atomic(path, &encode(root, size, bitmap))
}

/// Reads the bitmap at `path`; empty when it is not sound or belongs to another image.
///
/// # Errors
/// [`io::ErrorKind::NotFound`] when there is none: the image is complete. Others when it cannot be read.
pub(super) fn load(path: &Path, root: Digest, size: u64) -> io::Result<RoaringBitmap> {
    let bytes = std::fs::read(path)?;
    Ok(decode(&bytes, root, size).unwrap_or_else(|| {
        tracing::warn!(path = %path.display(), "the presence bitmap is damaged: starting from what verifies");
        RoaringBitmap::new()
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_damaged_byte_and_every_prefix_is_noticed() {
        let root = Digest::of(b"image");
        let bitmap: RoaringBitmap = [1, 5, 100_000].into_iter().collect();
        let bytes = encode(root, 1 << 30, &bitmap);
        assert_eq!(decode(&bytes, root, 1 << 30), Some(bitmap));
        assert_eq!(decode(&bytes, root, 1 << 31), None);
        assert_eq!(decode(&bytes, Digest::of(b"other"), 1 << 30), None);
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 0x10;
            assert_eq!(decode(&bad, root, 1 << 30), None, "{at}");
            assert_eq!(decode(&bytes[..at], root, 1 << 30), None, "{at}");
        }
    }
}
