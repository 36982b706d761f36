//! The index on disk: an append-only log of checksummed runs.
//!
//! ```text
//! header   96 bytes   magic 16 | version u32 | block size u32 | disk size u64 | root of the base 32 | BLAKE3 of these 32
//! record   32 bytes   start u64 | count u62, state u2 (top) u64 | batch u32 | left u32 | checksum 8
//! ```
//!
//! All integers are little-endian. The state is 0 absent, 1 data, 2 zero; later records win. The records of one flush
//! are a *batch*: numbered from 1 upwards, `left` counting down to 0, and believed only when all are there. The checksum
//! is the first 8 bytes of BLAKE3 over the record's other 24, keyed with the header's digest, so a record cannot come
//! from another disk's log.
//!
//! A batch is written only after the one before it is durable, whichever process wrote that ([`Log::catch_up`]). A crash
//! can therefore tear the last batch and no other:
//! on opening, a bad record followed by nothing of a later batch is a torn tail and is cut off; followed by a valid
//! record of a later batch it is damage, and the log is refused.

use std::io;
use std::sync::Arc;

use super::map::{BlockState, Run};
use super::storage::{LogFile, ReplaceError};
use crate::block::{BLOCK_SIZE, Extent, blocks_for};
use crate::digest::{DIGEST_BYTES, Digest};

const MAGIC: [u8; 16] = *b"bootcache index\n";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 96;
const RECORD_BYTES: usize = 32;
const STATE_SHIFT: u32 = 62;
/// Largest disk, so that a damaged header cannot ask for more memory than there is: 16 TiB.
pub const SIZE_MAX: u64 = 16 << 40;
/// The log is written anew when it holds this many records more than twice what it held after the last time.
const COMPACT_SLACK: u64 = 4096;

/// What is wrong with an index.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// It could not be read or written.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The file is something else, or its header has changed.
    #[error("it is not a bootcache index, or its header is damaged")]
    Header,
    /// It was written by another version.
    #[error("it has format version {0}, this program reads version {VERSION}")]
    Version(u32),
    /// A record that was durable has changed.
    #[error(
        "record {0} is damaged, and later flushes stand behind it: restore the index from a copy, or give the overlay up"
    )]
    Damaged(usize),
    /// Sizes beyond [`SIZE_MAX`] are not supported.
    #[error("a disk of {0} bytes is too large: the limit is {SIZE_MAX}")]
    TooLarge(u64),
}

/// What an index belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Root digest of the image below.
    pub base: Digest,
    /// Size of the disk in bytes.
    pub size: u64,
}

impl Header {
    /// The header's bytes, which alone are a valid, empty index.
    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..16].copy_from_slice(&MAGIC);
        bytes[16..20].copy_from_slice(&VERSION.to_le_bytes());
        bytes[20..24].copy_from_slice(&4096u32.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.size.to_le_bytes());
        bytes[32..64].copy_from_slice(&self.base.0);
        let digest = Digest::of(&bytes[..64]);
        bytes[64..].copy_from_slice(&digest.0);
        bytes
    }

    fn decode(bytes: &[u8]) -> Result<(Self, Key), IndexError> {
        let header = bytes.get(..HEADER_BYTES).ok_or(IndexError::Header)?;
        if header[..16] != MAGIC {
            return Err(IndexError::Header);
        }
        let version = u32::from_le_bytes(array(&header[16..20]));
        if version != VERSION {
            return Err(IndexError::Version(version));
        }
        let key = Digest::of(&header[..64]).0;
        if header[64..] != key || u64::from(u32::from_le_bytes(array(&header[20..24]))) != BLOCK_SIZE {
            return Err(IndexError::Header);
        }
        let size = u64::from_le_bytes(array(&header[24..32]));
        if size > SIZE_MAX {
            return Err(IndexError::TooLarge(size));
        }
        Ok((Self { base: Digest(array(&header[32..64])), size }, key))
    }
}

/// The digest of the header, with which every record is keyed.
type Key = [u8; DIGEST_BYTES];

/// What an index file says.
#[derive(Debug)]
pub(super) struct Content {
    pub(super) header: Header,
    /// In the order of writing.
    pub(super) runs: Vec<Run>,
    key: Key,
    /// Bytes up to the end of the last whole batch.
    length: usize,
    batch: u32,
}

/// Reads an index file's bytes.
pub(super) fn parse(bytes: &[u8]) -> Result<Content, IndexError> {
    let (header, key) = Header::decode(bytes)?;
    let blocks = blocks_for(header.size);
    let mut content = Content { header, runs: Vec::new(), key, length: HEADER_BYTES, batch: 0 };
    let records = bytes[HEADER_BYTES..].chunks_exact(RECORD_BYTES);
    let mut pending = Vec::new();
    let mut left_expected: Option<u32> = None;
    for (index, bytes) in records.clone().enumerate() {
        let expected = |record: &Record| {
            record.batch == content.batch + 1
                && left_expected.is_none_or(|left| record.left == left)
                && record
                    .run
                    .extent
                    .start
                    .checked_add(record.run.extent.count)
                    .is_some_and(|end| end <= blocks)
        };
        let Some(record) = Record::decode(bytes, &key).filter(expected) else {
            let torn = content.batch + 1;
            let later = |bytes| Record::decode(bytes, &key).is_some_and(|record| record.batch > torn);
            return if records.skip(index).any(later) {
                Err(IndexError::Damaged(index))
            } else {
                Ok(content)
            };
        };
        pending.push(record.run);
        left_expected = record.left.checked_sub(1);
        if record.left == 0 {
            content.runs.append(&mut pending);
            content.batch += 1;
            content.length = HEADER_BYTES + (index + 1) * RECORD_BYTES;
        }
    }
    Ok(content)
}

#[derive(Debug)]
struct Record {
    run: Run,
    batch: u32,
    left: u32,
}

impl Record {
    fn encode(&self, key: &Key) -> [u8; RECORD_BYTES] {
        let mut bytes = [0; RECORD_BYTES];
        bytes[..8].copy_from_slice(&self.run.extent.start.to_le_bytes());
        let count = self.run.extent.count | self.run.state.bits() << STATE_SHIFT;
        bytes[8..16].copy_from_slice(&count.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.batch.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.left.to_le_bytes());
        let checksum = blake3::keyed_hash(key, &bytes[..24]);
        bytes[24..].copy_from_slice(&checksum.as_bytes()[..8]);
        bytes
    }

    fn decode(bytes: &[u8], key: &Key) -> Option<Self> {
        if blake3::keyed_hash(key, &bytes[..24]).as_bytes()[..8] != bytes[24..] {
            return None;
        }
        let count = u64::from_le_bytes(array(&bytes[8..16]));
        let extent =
            Extent::new(u64::from_le_bytes(array(&bytes[..8])), count & (u64::MAX >> (64 - STATE_SHIFT)));
        Some(Self {
            run: Run { extent, state: BlockState::from_bits(count >> STATE_SHIFT)? },
            batch: u32::from_le_bytes(array(&bytes[16..20])),
            left: u32::from_le_bytes(array(&bytes[20..24])),
        })
    }
}

fn encode_batch(runs: &[Run], batch: u32, key: &Key) -> Vec<u8> {
    let left = (0..u32::try_from(runs.len()).expect("a batch has fewer runs than a map has words")).rev();
    runs.iter().zip(left).flat_map(|(run, left)| Record { run: *run, batch, left }.encode(key)).collect()
}

/// A whole index: `runs` in one batch.
pub(super) fn encode(header: Header, runs: &[Run]) -> Vec<u8> {
    let bytes = header.encode();
    let key = bytes[64..].try_into().expect("the header ends with its digest");
    [bytes.to_vec(), encode_batch(runs, 1, &key)].concat()
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().expect("the caller cut it to this length")
}

/// The log of one overlay, open for appending. One owner at a time: whoever flushes.
#[derive(Debug)]
pub(super) struct Log {
    file: Arc<dyn LogFile>,
    header: Header,
    key: Key,
    length: u64,
    batch: u32,
    compacted_records: u64,
    slack: u64,
    /// What it was opened with, until that is written again.
    inherited: Option<Vec<u8>>,
}

impl Log {
    /// Opens for appending and cuts a torn tail off; gives what it holds.
    pub(super) fn open(file: Arc<dyn LogFile>) -> Result<(Self, Vec<Run>), IndexError> {
        let mut bytes = file.load()?;
        let content = parse(&bytes)?;
        if content.length < bytes.len() {
            tracing::info!(
                bytes = bytes.len() - content.length,
                "index: the last flush was not finished; dropped"
            );
            file.truncate(content.length as u64)?;
            file.sync()?;
            bytes.truncate(content.length);
        }
        let Content { header, key, length, batch, runs } = content;
        let log = Self {
            file,
            header,
            key,
            length: length as u64,
            batch,
            compacted_records: 0,
            slack: COMPACT_SLACK,
            inherited: Some(bytes),
        };
        Ok((log, runs))
    }

    /// What it belongs to.
    pub(super) fn header(&self) -> Header {
        self.header
    }

    /// Number of its last batch; 0 of an empty log.
    pub(super) fn batch(&self) -> u32 {
        self.batch
    }

    /// Whether it has grown so much that [`Log::replace`] is due.
    pub(super) fn wants_compaction(&self) -> bool {
        let records = (self.length - HEADER_BYTES as u64) / RECORD_BYTES as u64;
        records > 2 * self.compacted_records + self.slack
    }

    /// Makes compaction due with every append.
    #[cfg(test)]
    pub(super) fn compact_always(&mut self) {
        self.slack = 0;
    }

    /// Writes what it was opened with over itself, once, before anything is promised or put behind it. Whether it did; not
    /// durable until [`Log::sync`].
    ///
    /// The last batch of a process that was killed may be in the page cache alone, and after a sync that failed, another
    /// one would not write it either.
    pub(super) fn catch_up(&mut self) -> io::Result<bool> {
        let Some(bytes) = &self.inherited else { return Ok(false) };
        self.file.write_at(bytes, 0)?;
        self.inherited = None;
        Ok(true)
    }

    /// Writes one batch at the end. Not durable until [`Log::sync`]. After an error the log is as it was.
    pub(super) fn append(&mut self, runs: &[Run]) -> io::Result<()> {
        let bytes = encode_batch(runs, self.batch + 1, &self.key);
        if let Err(error) = self.file.write_at(&bytes, self.length) {
            // What cannot be cut off does no harm: its batch number is never above that of the next batch, which
            // overwrites its start, so a reader takes the rest for a torn tail.
            let _ = self.file.truncate(self.length);
            return Err(error);
        }
        self.length += bytes.len() as u64;
        self.batch += 1;
        Ok(())
    }

    /// Makes what was appended durable.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    /// Puts `runs` in place of the whole content, durably and atomically.
    pub(super) fn replace(&mut self, runs: &[Run]) -> Result<(), ReplaceError> {
        let bytes = encode(self.header, runs);
        self.file.replace(&bytes)?;
        self.length = bytes.len() as u64;
        self.batch = u32::from(!runs.is_empty());
        self.compacted_records = runs.len() as u64;
        self.inherited = None;
        Ok(())
    }
}
