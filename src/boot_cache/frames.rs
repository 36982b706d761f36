//! Frames: the data of the boot set, cut, compressed once at a high level, and taken apart again.
//!
//! A frame holds at most 64 KiB of compressed data at the head of the stream, where a guest is about to wait for it,
//! and 256 KiB further on, where ratio counts for more. Where the cuts are depends on the data alone, not on the
//! number of threads: the same boot set always makes the same file.

use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use super::BootCacheError;
use super::heads::{FRAME_BLOCKS_MAX, FRAME_LENGTH_MAX, FrameEntry, Heads, Run};
use super::merge::Touch;
use crate::block::{BLOCK_BYTES, BLOCK_SIZE, Extent};
use crate::digest::Digest;
use crate::image::page::is_zero;

/// Compressed bytes that a frame may have, by how many blocks of the boot set come before it.
const LENGTHS: [(u64, usize); 3] = [(1024, 64 << 10), (4096, 128 << 10), (u64::MAX, FRAME_LENGTH_MAX)];
/// Level at which a piece is tried, to see where to cut it.
const TRIAL_LEVEL: i32 = 3;

/// Reads blocks of the image from several threads at once: fills the buffer from the extent's first byte. A last block
/// that the image has only in part is padded with zeroes.
pub type ReadBlocks<'a> = &'a (dyn Fn(Extent, &mut [u8]) -> io::Result<()> + Sync);

/// A frame and its compressed bytes.
pub(super) type Packed = (FrameEntry, Vec<u8>);

/// Blocks of the boot set that are compressed together, before it is known into how many frames they go.
struct Piece<'a> {
    touches: &'a [Touch],
    length_max: usize,
}

/// Cuts and compresses the boot set on `threads` threads. `keep` gets the frames of each piece, as they are made and in no
/// order; what it makes of them comes back in that of the stream. `done` is called with the number of blocks of each piece.
pub(super) fn pack<Kept: Send>(
    touches: &[Touch],
    level: i32,
    threads: usize,
    read: ReadBlocks<'_>,
    keep: impl Fn(Vec<Packed>) -> io::Result<Kept> + Sync,
    done: &(dyn Fn(u64) + Sync),
) -> io::Result<Vec<Kept>> {
    let pieces = pieces(touches);
    let results: Vec<Mutex<Option<io::Result<Kept>>>> = pieces.iter().map(|_| Mutex::new(None)).collect();
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let work = || {
        while !failed.load(Ordering::Relaxed) {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(piece) = pieces.get(at) else { return };
            let result = pack_piece(piece, level, read).and_then(&keep);
            failed.fetch_or(result.is_err(), Ordering::Relaxed);
            *results[at].lock().expect("no thread panics with it") = Some(result);
            done(piece.touches.len() as u64);
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads.max(1) {
            scope.spawn(work);
        }
        work();
    });
    // After a failure the pieces behind it may be absent, those before it are not.
    results.into_iter().map_while(|result| result.into_inner().expect("no thread panicked")).collect()
}

fn pieces(mut touches: &[Touch]) -> Vec<Piece<'_>> {
    let mut pieces = Vec::new();
    let mut before = 0;
    while !touches.is_empty() {
        let (_, length_max) =
            LENGTHS.into_iter().find(|(until, _)| before < *until).expect("the last is endless");
        let blocks = (4 * length_max / BLOCK_BYTES).min(touches.len());
        let (piece, rest) = touches.split_at(blocks);
        pieces.push(Piece { touches: piece, length_max });
        before += blocks as u64;
        touches = rest;
    }
    pieces
}

/// Blocks in stream order and the data of those that are not zero.
struct Blocks<'a> {
    touches: &'a [Touch],
    /// For each block, whether it is zero.
    zero: Vec<bool>,
    data: Vec<u8>,
}

impl<'a> Blocks<'a> {
    fn read(touches: &'a [Touch], read: ReadBlocks<'_>) -> io::Result<Self> {
        let mut data = vec![0; touches.len() * BLOCK_BYTES];
        let mut at = 0;
        for extent in super::merge::extents(touches) {
            let length = usize::try_from(extent.bytes()).expect("a piece fits memory");
            read(extent, &mut data[at..at + length])?;
            at += length;
        }
        let zero: Vec<bool> = data.chunks(BLOCK_BYTES).map(is_zero).collect();
        let mut kept = 0;
        for (index, zero) in zero.iter().enumerate() {
            if !zero {
                data.copy_within(index * BLOCK_BYTES..(index + 1) * BLOCK_BYTES, kept);
                kept += BLOCK_BYTES;
            }
        }
        data.truncate(kept);
        Ok(Self { touches, zero, data })
    }

    /// The first blocks, with `data_blocks` blocks of data among them and any zero blocks that follow, and the rest.
    fn split(self, data_blocks: usize) -> (Self, Self) {
        let is_next = |seen: &mut usize, zero: &bool| {
            *seen += usize::from(!zero);
            Some(*seen > data_blocks)
        };
        let cut = self.zero.iter().scan(0, is_next).position(|next| next).unwrap_or(self.zero.len());
        let (first, rest) = self.touches.split_at(cut);
        let (first_data, rest_data) = self.data.split_at(data_blocks * BLOCK_BYTES);
        let first = Blocks { touches: first, zero: self.zero[..cut].to_vec(), data: first_data.to_vec() };
        let rest = Blocks { touches: rest, zero: self.zero[cut..].to_vec(), data: rest_data.to_vec() };
        (first, rest)
    }

    fn data_blocks(&self) -> usize {
        self.data.len() / BLOCK_BYTES
    }

    fn runs(&self) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        for (touch, &zero) in self.touches.iter().zip(&self.zero) {
            match runs.last_mut() {
                Some(last) if last.zero == zero && last.extent.end() == touch.block => last.extent.count += 1,
                _ => runs.push(Run { extent: Extent::new(touch.block, 1), zero }),
            }
        }
        runs
    }

    fn due_ms(&self) -> u32 {
        let first_ns = self.touches.iter().map(|touch| touch.time_ns).min().unwrap_or(0);
        u32::try_from(first_ns / 1_000_000).unwrap_or(u32::MAX)
    }
}

fn pack_piece(piece: &Piece<'_>, level: i32, read: ReadBlocks<'_>) -> io::Result<Vec<Packed>> {
    let mut packed = Vec::new();
    let blocks = Blocks::read(piece.touches, read)?;
    let trial_length = compress(&blocks.data, TRIAL_LEVEL)?.len();
    pack_evenly(blocks, trial_length, level, piece.length_max, &mut packed)?;
    Ok(packed)
}

/// Cuts `blocks`, which compress to about `length`, into as many equal parts as `length_max` asks for; parts that turn
/// out too long are cut again.
fn pack_evenly(
    mut blocks: Blocks<'_>,
    length: usize,
    level: i32,
    length_max: usize,
    packed: &mut Vec<Packed>,
) -> io::Result<()> {
    let parts_max = blocks.data_blocks().max(1);
    let parts = length.div_ceil(length_max).clamp(1, parts_max);
    for left in (1..=parts).rev() {
        let share = blocks.data_blocks().div_ceil(left);
        let (part, rest) = blocks.split(share);
        blocks = rest;
        let bytes = compress(&part.data, level)?;
        if bytes.len() > length_max && part.data_blocks() > 1 {
            pack_evenly(part, bytes.len().max(length_max + 1), level, length_max, packed)?;
            continue;
        }
        packed.push((
            FrameEntry {
                length: u32::try_from(bytes.len()).expect("no longer than FRAME_LENGTH_MAX"),
                digest: Digest::of(&bytes),
                due_ms: part.due_ms(),
                runs: part.runs(),
            },
            bytes,
        ));
    }
    Ok(())
}

fn compress(data: &[u8], level: i32) -> io::Result<Vec<u8>> {
    if data.is_empty() { Ok(Vec::new()) } else { zstd::bulk::compress(data, level) }
}

/// The blocks of one frame.
#[derive(Debug)]
pub struct FrameBlocks<'a> {
    runs: &'a [Run],
    data: Vec<u8>,
}

impl FrameBlocks<'_> {
    /// Each run with its data, in stream order; none for a run of zeroes.
    pub fn runs(&self) -> impl Iterator<Item = (Extent, Option<&[u8]>)> {
        let mut rest = self.data.as_slice();
        self.runs.iter().map(move |run| {
            if run.zero {
                return (run.extent, None);
            }
            let length = usize::try_from(run.extent.bytes()).expect("a frame fits memory");
            let (data, after) = rest.split_at(length);
            rest = after;
            (run.extent, Some(data))
        })
    }
}

/// Checks `bytes`, the compressed frame `index` of `heads`, against its digest and takes it apart.
///
/// Costs at most [`FRAME_BLOCKS_MAX`] blocks of memory, whatever `bytes` claim.
///
/// # Errors
/// [`BootCacheError::BadFrame`].
pub fn decode_frame<'a>(
    heads: &'a Heads,
    index: usize,
    bytes: &[u8],
) -> Result<FrameBlocks<'a>, BootCacheError> {
    check_frame(heads, index, bytes)?;
    let blocks = heads.frame_data_blocks(index);
    debug_assert!(blocks <= FRAME_BLOCKS_MAX, "heads are checked when they are parsed");
    let length = usize::try_from(blocks * BLOCK_SIZE).expect("bounded by FRAME_BLOCKS_MAX");
    let data = if length == 0 { Vec::new() } else { decompress(index, bytes, length)? };
    Ok(FrameBlocks { runs: heads.frame_runs(index), data })
}

/// Checks that `bytes` are the compressed frame `index` of `heads`.
///
/// # Errors
/// [`BootCacheError::BadFrame`], also when there is no such frame.
pub fn check_frame(heads: &Heads, index: usize, bytes: &[u8]) -> Result<(), BootCacheError> {
    match heads.frames().get(index) {
        Some(frame) if frame.length as usize == bytes.len() && frame.digest == Digest::of(bytes) => Ok(()),
        _ => Err(BootCacheError::BadFrame(index)),
    }
}

fn decompress(index: usize, bytes: &[u8], length: usize) -> Result<Vec<u8>, BootCacheError> {
    match zstd::bulk::decompress(bytes, length) {
        Ok(data) if data.len() == length => Ok(data),
        _ => Err(BootCacheError::BadFrame(index)),
    }
}
