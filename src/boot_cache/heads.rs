//! The heads: everything about a boot cache but its data, small enough to be sent before the first frame.
//!
//! ```text
//! length of the rest, unpacked     4 bytes, little-endian
//! zstd of:
//!   root digest of the image      32 bytes
//!   size of the image in bytes     varint
//!   when the boot was over, in ms  varint
//!   number of frames               varint
//!   for each frame, in order:
//!     compressed length            varint; 0 only when none of its blocks has data
//!     BLAKE3 of the compressed     32 bytes
//!     due in ms                    varint; when the recorded boot first asked for a block of it
//!     number of runs               varint
//!     for each run, in order:
//!       first block                zigzag varint, from the end of the run before it (0 for the first of all)
//!       count · 2 + zero           varint; zero = 1: all blocks of the run are zero, and not in the frame's data
//! ```
//!
//! The digest that is pinned with the image is that of these bytes as they are sent. Whoever holds a [`Heads`] knows
//! that each block occurs in it once, lies in the image, and that no frame is larger than the limits below.

use std::ops::Range;

use super::map::BootMap;
use super::{BootCacheError, varint};
use crate::block::{Extent, blocks_for};
use crate::digest::{DIGEST_BYTES, Digest};

/// Most bytes of heads as they are stored and sent, in one piece.
pub const HEADS_LENGTH_MAX: usize = 4 << 20;
/// Most compressed bytes in a frame.
pub const FRAME_LENGTH_MAX: usize = 256 << 10;
/// Most blocks in a frame, zero or not (1 MiB).
pub const FRAME_BLOCKS_MAX: u64 = 256;
/// Most runs in all. Zero runs pack to nearly nothing, and take 48 bytes of memory each.
const RUNS_MAX: usize = 2 << 20;
const UNPACKED_MAX: usize = 64 << 20;
/// The least that a frame takes in the heads: a length, its digest, when it is due, a count of runs.
const FRAME_ENTRY_MIN: usize = DIGEST_BYTES + 3;

/// Blocks that are neighbours on the disk and in the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Which blocks.
    pub extent: Extent,
    /// All of them are zero, and none is in the frame's data.
    pub zero: bool,
}

/// One frame of the stream, without its data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Compressed bytes.
    pub length: u32,
    /// BLAKE3 of the compressed bytes.
    pub digest: Digest,
    /// When the recorded boot first asked for a block of this frame, in ms since its start.
    pub due_ms: u32,
    /// Byte offset of the compressed bytes from the first frame's.
    pub offset: u64,
    /// Which of [`Heads::runs`] it holds.
    runs: Range<usize>,
}

/// The table of a boot cache; see the module's documentation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heads {
    root: Digest,
    size: u64,
    end_ms: u32,
    frames: Vec<Frame>,
    runs: Vec<Run>,
    map: BootMap,
}

/// A frame as the builder hands it over.
#[derive(Debug)]
pub(super) struct FrameEntry {
    pub(super) length: u32,
    pub(super) digest: Digest,
    pub(super) due_ms: u32,
    pub(super) runs: Vec<Run>,
}

impl Heads {
    /// The heads in `bytes`, which must have the digest that was pinned with the image.
    ///
    /// # Errors
    /// [`BootCacheError::Damaged`], whichever byte was changed.
    pub fn parse(bytes: &[u8], expected: Digest) -> Result<Self, BootCacheError> {
        if bytes.len() > HEADS_LENGTH_MAX {
            return Err(BootCacheError::Damaged("its heads are too large"));
        }
        if Digest::of(bytes) != expected {
            return Err(BootCacheError::Damaged("its heads have the wrong digest"));
        }
        let malformed = BootCacheError::Damaged("its heads are malformed");
        let Some((length, packed)) = bytes.split_first_chunk::<4>() else { return Err(malformed) };
        let length = u32::from_le_bytes(*length) as usize;
        if length > UNPACKED_MAX {
            return Err(BootCacheError::Damaged("its heads claim to be too large"));
        }
        match zstd::bulk::decompress(packed, length) {
            Ok(plain) if plain.len() == length => Self::decode(&plain).ok_or(malformed),
            _ => Err(malformed),
        }
    }

    /// The image that the boot cache is of.
    pub fn root(&self) -> Digest {
        self.root
    }

    /// Size of the image in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// When the recorded boot was over, in ms since its start.
    pub fn end_ms(&self) -> u32 {
        self.end_ms
    }

    /// The frames in stream order.
    pub fn frames(&self) -> &[Frame] {
        &self.frames
    }

    /// The runs of every frame in stream order.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// The runs of frame `index`, which must be less than the number of frames.
    pub fn frame_runs(&self, index: usize) -> &[Run] {
        &self.runs[self.frames[index].runs.clone()]
    }

    /// The boot set in stream order: neighbouring runs joined, across frames too.
    pub fn extents(&self) -> Vec<Extent> {
        let mut extents: Vec<Extent> = Vec::new();
        for run in &self.runs {
            match extents.last_mut() {
                Some(last) if last.end() == run.extent.start => last.count += run.extent.count,
                _ => extents.push(run.extent),
            }
        }
        extents
    }

    /// The frame that brings `block`; none when the recorded boots did not read it. This is the boot map.
    pub fn position(&self, block: u64) -> Option<usize> {
        self.map.position(block)
    }

    /// Blocks in the boot set, zero or not.
    pub fn blocks(&self) -> u64 {
        self.runs.iter().map(|run| run.extent.count).sum()
    }

    /// Blocks in the boot set that have data.
    pub fn data_blocks(&self) -> u64 {
        data_blocks(&self.runs)
    }

    /// Blocks of frame `index` that have data.
    pub fn frame_data_blocks(&self, index: usize) -> u64 {
        data_blocks(self.frame_runs(index))
    }

    /// Compressed bytes of all frames.
    pub fn frames_length(&self) -> u64 {
        self.frames.last().map_or(0, |last| last.offset + u64::from(last.length))
    }

    /// The lower bound of a boot over a link that carries `goodput` payload bytes a second: how long the reads of the
    /// recorded boot must wait in all, in ms, though the stream begins with the boot and never pauses.
    ///
    /// `max(0, maxᵢ(compressed bytes up to frame i ÷ goodput − dueᵢ))`
    pub fn waiting_min_ms(&self, goodput: u64) -> u64 {
        let late = self.frames.iter().map(|frame| {
            let sent = frame.offset + u64::from(frame.length);
            (sent * 1000 / goodput.max(1)).saturating_sub(u64::from(frame.due_ms))
        });
        late.max().unwrap_or(0)
    }

    /// The bytes that [`Heads::parse`] takes; none when they would be too many.
    pub(super) fn encode(root: Digest, size: u64, end_ms: u32, frames: &[FrameEntry]) -> Option<Vec<u8>> {
        if frames.iter().map(|frame| frame.runs.len()).sum::<usize>() > RUNS_MAX {
            return None;
        }
        let mut plain = root.0.to_vec();
        varint::put(&mut plain, size);
        varint::put(&mut plain, u64::from(end_ms));
        varint::put(&mut plain, frames.len() as u64);
        let mut previous_end = 0_u64;
        for frame in frames {
            varint::put(&mut plain, u64::from(frame.length));
            plain.extend_from_slice(&frame.digest.0);
            varint::put(&mut plain, u64::from(frame.due_ms));
            varint::put(&mut plain, frame.runs.len() as u64);
            for run in &frame.runs {
                let step = run.extent.start.cast_signed() - previous_end.cast_signed();
                varint::put(&mut plain, varint::zigzag(step));
                varint::put(&mut plain, run.extent.count << 1 | u64::from(run.zero));
                previous_end = run.extent.end();
            }
        }
        let length = u32::try_from(plain.len()).ok().filter(|length| *length as usize <= UNPACKED_MAX)?;
        let packed = zstd::bulk::compress(&plain, 19).expect("memory to memory");
        let bytes = [length.to_le_bytes().as_slice(), &packed].concat();
        (bytes.len() <= HEADS_LENGTH_MAX).then_some(bytes)
    }

    fn decode(mut plain: &[u8]) -> Option<Self> {
        let bytes = &mut plain;
        let root = take_digest(bytes)?;
        let size = varint::take(bytes)?;
        let end_ms = take_u32(bytes)?;
        let count = take_count(bytes, FRAME_ENTRY_MIN)?;
        let mut frames = Vec::with_capacity(count);
        let mut runs = Vec::new();
        let mut offset = 0;
        for _ in 0..count {
            let length = take_u32(bytes)?;
            let digest = take_digest(bytes)?;
            let due_ms = take_u32(bytes)?;
            let first = runs.len();
            take_runs(bytes, blocks_for(size), &mut runs)?;
            if (data_blocks(&runs[first..]) == 0) != (length == 0) {
                return None;
            }
            if length as usize > FRAME_LENGTH_MAX {
                return None;
            }
            frames.push(Frame { length, digest, due_ms, offset, runs: first..runs.len() });
            offset += u64::from(length);
        }
        let map = BootMap::of(frames.iter().map(|frame| &runs[frame.runs.clone()]))?;
        bytes.is_empty().then_some(Self { root, size, end_ms, frames, runs, map })
    }
}

fn data_blocks(runs: &[Run]) -> u64 {
    runs.iter().filter(|run| !run.zero).map(|run| run.extent.count).sum()
}

fn take_digest(bytes: &mut &[u8]) -> Option<Digest> {
    let (digest, rest) = bytes.split_first_chunk::<DIGEST_BYTES>()?;
    *bytes = rest;
    Some(Digest(*digest))
}

fn take_u32(bytes: &mut &[u8]) -> Option<u32> {
    u32::try_from(varint::take(bytes)?).ok()
}

/// A number of things that take at least `size_min` bytes each; none when there cannot be that many.
fn take_count(bytes: &mut &[u8], size_min: usize) -> Option<usize> {
    let count = usize::try_from(varint::take(bytes)?).ok()?;
    (count <= bytes.len() / size_min).then_some(count)
}

fn take_runs(bytes: &mut &[u8], image_blocks: u64, runs: &mut Vec<Run>) -> Option<()> {
    let count = take_count(bytes, 2)?;
    if count > RUNS_MAX - runs.len() {
        return None;
    }
    let mut blocks = 0;
    for _ in 0..count {
        let previous_end = runs.last().map_or(0, |run: &Run| run.extent.end());
        let start = previous_end.checked_add_signed(varint::unzigzag(varint::take(bytes)?))?;
        let tagged = varint::take(bytes)?;
        let extent = Extent::new(start, tagged >> 1);
        if extent.is_empty() || start.checked_add(extent.count)? > image_blocks {
            return None;
        }
        blocks += extent.count;
        if blocks > FRAME_BLOCKS_MAX {
            return None;
        }
        runs.push(Run { extent, zero: tagged & 1 == 1 });
    }
    Some(())
}
