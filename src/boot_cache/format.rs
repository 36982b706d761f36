//! The boot cache as a file: a header, the heads, then the frames one after another.
//!
//! ```text
//! "bootcache boot 1"             16 bytes; the last is the version
//! root digest of the image       32 bytes
//! length of the heads             8 bytes, little-endian
//! BLAKE3 of the heads            32 bytes
//! heads                          see `heads`
//! frames                         compressed, in order, without gaps, to the end of the file
//! ```
//!
//! Every byte is covered: the root and the heads' digest by what the caller knows of the image, the heads by that
//! digest, each frame by its digest in the heads, the file's length by the sum. A file on a compute node may be
//! incomplete: it has its full length from the start, and a frame that is not there yet has the wrong digest.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use rustix::fs::{FallocateFlags, fallocate};

use super::frames::Packed;
use super::heads::{FrameEntry, HEADS_LENGTH_MAX, Heads};
use super::{BootCacheError, check_frame, frames, merge::Touch};
use crate::digest::{DIGEST_BYTES, Digest};
use crate::store::atomic::sync_dir;

const MAGIC: &[u8; 16] = b"bootcache boot 1";
const HEADER_BYTES: usize = MAGIC.len() + DIGEST_BYTES + 8 + DIGEST_BYTES;
/// zstd level of frames: they are compressed once and sent often.
pub const LEVEL_DEFAULT: i32 = 19;

/// An open boot cache, complete or still arriving. Which frames have arrived is for the caller to remember.
#[derive(Debug)]
pub struct BootCache {
    file: File,
    heads: Heads,
    heads_bytes: Vec<u8>,
    heads_digest: Digest,
}

impl BootCache {
    /// Opens the boot cache at `path` of the image `root`. Frames are checked when they are read.
    ///
    /// # Errors
    /// [`BootCacheError::NotABootCache`], [`BootCacheError::OtherImage`], [`BootCacheError::Damaged`],
    /// [`BootCacheError::Io`].
    pub fn open(path: &Path, root: Digest) -> Result<Self, BootCacheError> {
        let file = File::options().read(true).write(true).open(path).or_else(|_| File::open(path))?;
        let file_length = file.metadata()?.len();
        let mut header = [0; HEADER_BYTES];
        file.read_exact_at(&mut header, 0).map_err(cut_short)?;
        let header = Header::parse(&header)?;
        if header.root != root {
            return Err(BootCacheError::OtherImage { found: header.root });
        }
        let mut heads_bytes = vec![0; header.heads_length];
        file.read_exact_at(&mut heads_bytes, HEADER_BYTES as u64).map_err(cut_short)?;
        let heads = Heads::parse(&heads_bytes, header.heads_digest)?;
        let boot_cache = Self { file, heads, heads_bytes, heads_digest: header.heads_digest };
        boot_cache.check_image(root)?;
        if boot_cache.file_length() == file_length {
            Ok(boot_cache)
        } else {
            Err(BootCacheError::Damaged("its length is wrong"))
        }
    }

    /// Makes a boot cache at `path` of which only the heads have arrived. `heads_digest` is the one pinned with the
    /// image `root`. What was at `path` is lost.
    ///
    /// # Errors
    /// [`BootCacheError::Damaged`] when the heads are not those, [`BootCacheError::OtherImage`],
    /// [`BootCacheError::Io`].
    pub fn create(
        path: &Path,
        root: Digest,
        heads_bytes: Vec<u8>,
        heads_digest: Digest,
    ) -> Result<Self, BootCacheError> {
        let heads = Heads::parse(&heads_bytes, heads_digest)?;
        let file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
        let boot_cache = Self { file, heads, heads_bytes, heads_digest };
        boot_cache.check_image(root)?;
        let heads_length = boot_cache.heads_bytes.len();
        let header = Header { root, heads_length, heads_digest };
        boot_cache.file.set_len(boot_cache.file_length())?;
        boot_cache.file.write_all_at(&header.to_bytes(), 0)?;
        boot_cache.file.write_all_at(&boot_cache.heads_bytes, HEADER_BYTES as u64)?;
        Ok(boot_cache)
    }

    /// What is known before the first frame.
    pub fn heads(&self) -> &Heads {
        &self.heads
    }

    /// The heads as they are sent.
    pub fn heads_bytes(&self) -> &[u8] {
        &self.heads_bytes
    }

    /// The digest that is pinned with the image.
    pub fn heads_digest(&self) -> Digest {
        self.heads_digest
    }

    /// Bytes in the file once it is complete.
    pub fn file_length(&self) -> u64 {
        self.frames_start() + self.heads.frames_length()
    }

    /// The compressed bytes of frame `index`, checked.
    ///
    /// # Errors
    /// [`BootCacheError::BadFrame`] when it is not there or has changed, [`BootCacheError::Io`].
    pub fn read_frame(&self, index: usize) -> Result<Vec<u8>, BootCacheError> {
        let frame = self.heads.frames().get(index).ok_or(BootCacheError::BadFrame(index))?;
        let mut bytes = vec![0; frame.length as usize];
        self.file.read_exact_at(&mut bytes, self.frames_start() + frame.offset)?;
        check_frame(&self.heads, index, &bytes)?;
        Ok(bytes)
    }

    /// Stores the compressed bytes of frame `index`, checked. They are durable only with the file's next sync, and
    /// need not be: a frame is checked again when it is read.
    ///
    /// # Errors
    /// [`BootCacheError::BadFrame`] when they are not this frame's, [`BootCacheError::Io`].
    pub fn write_frame(&self, index: usize, bytes: &[u8]) -> Result<(), BootCacheError> {
        check_frame(&self.heads, index, bytes)?;
        let offset = self.frames_start() + self.heads.frames()[index].offset;
        Ok(self.file.write_all_at(bytes, offset)?)
    }

    /// For each frame, whether it is there and sound. Reads the whole file.
    ///
    /// # Errors
    /// [`BootCacheError::Io`].
    pub fn present_frames(&self) -> Result<Vec<bool>, BootCacheError> {
        let present = |index| match self.read_frame(index) {
            Ok(_) => Ok(true),
            Err(BootCacheError::BadFrame(_)) => Ok(false),
            Err(error) => Err(error),
        };
        (0..self.heads.frames().len()).map(present).collect()
    }

    fn frames_start(&self) -> u64 {
        (HEADER_BYTES + self.heads_bytes.len()) as u64
    }

    fn check_image(&self, root: Digest) -> Result<(), BootCacheError> {
        if self.heads.root() == root {
            Ok(())
        } else {
            Err(BootCacheError::OtherImage { found: self.heads.root() })
        }
    }
}

struct Header {
    root: Digest,
    heads_length: usize,
    heads_digest: Digest,
}

impl Header {
    fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, BootCacheError> {
        let rest = bytes.strip_prefix(MAGIC).ok_or(BootCacheError::NotABootCache)?;
        let (root, rest) = rest.split_first_chunk().expect("the header's length is fixed");
        let (length, rest) = rest.split_first_chunk().expect("the header's length is fixed");
        let (digest, _) = rest.split_first_chunk().expect("the header's length is fixed");
        let heads_length = usize::try_from(u64::from_le_bytes(*length)).unwrap_or(usize::MAX);
        if heads_length > HEADS_LENGTH_MAX {
            return Err(BootCacheError::Damaged("its heads claim to be too large"));
        }
        Ok(Self { root: Digest(*root), heads_length, heads_digest: Digest(*digest) })
    }

    fn to_bytes(&self) -> Vec<u8> {
        let length = (self.heads_length as u64).to_le_bytes();
        [MAGIC.as_slice(), &self.root.0, &length, &self.heads_digest.0].concat()
    }
}

fn cut_short(error: io::Error) -> BootCacheError {
    if error.kind() == io::ErrorKind::UnexpectedEof {
        BootCacheError::Damaged("it is cut short")
    } else {
        BootCacheError::Io(error)
    }
}

/// What a boot cache is made of.
#[derive(Debug, Clone)]
pub struct Builder<'a> {
    /// The image that it is of.
    pub root: Digest,
    /// Size of the image in bytes.
    pub size: u64,
    /// The boot set in stream order, each block once and within the image.
    pub touches: &'a [Touch],
    /// When the recorded boot was over, in ns since its start.
    pub end_ns: u64,
    /// zstd level of the frames; [`LEVEL_DEFAULT`] unless there is a reason.
    pub level: i32,
    /// Threads that compress.
    pub threads: usize,
}

/// What [`Builder::write`] wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// To be pinned with the image.
    pub heads_digest: Digest,
    /// Bytes of the heads.
    pub heads_length: u64,
    /// Bytes of the file.
    pub file_length: u64,
    /// Number of frames.
    pub frames: usize,
}

/// The boot set has so many frames and runs that its heads would be too large to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the recording is too long or too scattered for a boot cache: record a shorter boot")]
pub struct TooScattered;

impl TooScattered {
    /// Whether `error` is for this reason.
    pub fn is(error: &io::Error) -> bool {
        error.get_ref().is_some_and(|inner| inner.is::<Self>())
    }
}

impl Builder<'_> {
    /// Writes the file at `path`, which appears only when it is complete and durable; `path` with `.new` appended is
    /// used on the way. What is compressed waits on the same disk, not in memory. `done` hears of every few blocks that are
    /// compressed, from any thread.
    ///
    /// # Errors
    /// Those of `read`, and of writing; one with [`TooScattered`] in it.
    pub fn write(
        &self,
        path: &Path,
        read: frames::ReadBlocks<'_>,
        done: &(dyn Fn(u64) + Sync),
    ) -> io::Result<Written> {
        let mut new_path = path.as_os_str().to_owned();
        new_path.push(".new");
        let new_path = Path::new(&new_path);
        let spool = Spool::create(new_path)?;
        let pieces =
            frames::pack(self.touches, self.level, self.threads, read, |frames| spool.keep(frames), done)?;
        let (places, entries): (Vec<_>, Vec<_>) = pieces.into_iter().unzip();
        let entries: Vec<FrameEntry> = entries.into_iter().flatten().collect();
        let end_ms = u32::try_from(self.end_ns / 1_000_000).unwrap_or(u32::MAX);
        let heads = Heads::encode(self.root, self.size, end_ms, &entries)
            .ok_or_else(|| io::Error::other(TooScattered))?;
        let heads_digest = Digest::of(&heads);
        let heads_length = heads.len();
        let header = Header { root: self.root, heads_length, heads_digest };
        let write = || -> io::Result<u64> {
            let mut file = File::create(new_path)?;
            file.write_all(&header.to_bytes())?;
            file.write_all(&heads)?;
            places.into_iter().try_for_each(|place| spool.give(place, &mut file))?;
            file.sync_all()?;
            std::fs::rename(new_path, path)?;
            path.parent().map_or(Ok(()), sync_dir)?;
            Ok(file.metadata()?.len())
        };
        let file_length = write().inspect_err(|_| {
            let _ = std::fs::remove_file(new_path);
        })?;
        Ok(Written { heads_digest, heads_length: heads_length as u64, file_length, frames: entries.len() })
    }
}

/// A file without a name for the compressed frames of a boot cache, until its heads, which come before them, are known.
struct Spool {
    file: File,
    /// What it holds.
    held: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    length: u64,
    digests: HashSet<Digest>,
}

impl Spool {
    /// Makes it on the file system of `path`, a name that is free.
    fn create(path: &Path) -> io::Result<Self> {
        let file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
        std::fs::remove_file(path)?;
        Ok(Self { file, held: Mutex::default() })
    }

    /// Keeps frames that follow each other, and gives their place. Fails once no heads could hold all of their digests,
    /// which cannot be compressed.
    fn keep(&self, frames: Vec<Packed>) -> io::Result<(Range<u64>, Vec<FrameEntry>)> {
        let (entries, bodies): (Vec<_>, Vec<_>) = frames.into_iter().unzip();
        let bytes = bodies.concat();
        let start = {
            let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
            held.digests.extend(entries.iter().map(|entry| entry.digest));
            if held.digests.len() * DIGEST_BYTES > HEADS_LENGTH_MAX {
                return Err(io::Error::other(TooScattered));
            }
            held.length += bytes.len() as u64;
            held.length - bytes.len() as u64
        };
        self.file.write_all_at(&bytes, start)?;
        Ok((start..start + bytes.len() as u64, entries))
    }

    /// Appends the frames at `place` to `file`. Their space is given back, so that they take it only once.
    fn give(&self, place: Range<u64>, file: &mut File) -> io::Result<()> {
        let length = place.end - place.start;
        let mut bytes = vec![0; usize::try_from(length).expect("they came from memory")];
        self.file.read_exact_at(&mut bytes, place.start)?;
        file.write_all(&bytes)?;
        if length > 0 {
            // All of it goes when this does; a file system without holes keeps it until then.
            let _ = fallocate(
                &self.file,
                FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                place.start,
                length,
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packing_ends_when_no_heads_could_hold_the_digests_of_its_frames() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::create(&dir.path().join("spool")).unwrap();
        let frame = |number: usize| {
            let digest = Digest::of(&number.to_le_bytes());
            (FrameEntry { length: 1, digest, due_ms: 0, runs: Vec::new() }, vec![1])
        };
        let most = HEADS_LENGTH_MAX / DIGEST_BYTES;
        let (place, entries) = spool.keep((0..most).map(frame).collect()).unwrap();
        assert_eq!((place, entries.len()), (0..most as u64, most));
        assert_eq!(spool.keep(vec![frame(7)]).unwrap().0, most as u64..most as u64 + 1);
        let error = spool.keep(vec![frame(most)]).unwrap_err();
        assert!(TooScattered::is(&error), "{error}");
    }
}
