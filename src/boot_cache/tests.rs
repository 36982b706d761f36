//! The boot cache as a whole, against a plain `Vec<u8>` image.

use std::fs;

use proptest::prelude::*;

use super::merge::{Touch, extents};
use super::*;
use crate::block::{BLOCK_BYTES, Extent};

const ROOT: Digest = Digest([7; 32]);

/// An image whose blocks are partly zero, partly text-like, partly noise, and the last one short.
fn image(blocks: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let mut noise = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_le_bytes()[6]
    };
    let mut bytes = Vec::with_capacity(blocks * BLOCK_BYTES);
    for block in 0..blocks {
        let byte = noise();
        match block % 5 {
            0 => bytes.resize(bytes.len() + BLOCK_BYTES, 0),
            1 | 2 => bytes.extend((0..BLOCK_BYTES).map(|_| noise())),
            _ => bytes.resize(bytes.len() + BLOCK_BYTES, byte.max(1)),
        }
    }
    bytes.truncate(bytes.len() - 100);
    bytes
}

fn reader(image: &[u8]) -> impl Fn(Extent, &mut [u8]) -> io::Result<()> + Sync {
    move |extent, buffer: &mut [u8]| {
        let start = usize::try_from(extent.offset()).unwrap();
        let end = (start + buffer.len()).min(image.len());
        buffer.fill(0);
        buffer[..end - start].copy_from_slice(&image[start..end]);
        Ok(())
    }
}

fn touches(blocks: &[u64]) -> Vec<Touch> {
    let touch = |(at, &block): (usize, &u64)| Touch { block, time_ns: at as u64 * 1_000_000 };
    blocks.iter().enumerate().map(touch).collect()
}

fn write(
    image: &[u8],
    touches: &[Touch],
    threads: usize,
) -> (tempfile::TempDir, std::path::PathBuf, Written) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("boot");
    let builder =
        Builder { root: ROOT, size: image.len() as u64, touches, end_ns: 5_000_000, level: 1, threads };
    let written = builder.write(&path, &reader(image), &|_| ()).unwrap();
    (dir, path, written)
}

/// Every block of the boot cache with its data, in stream order.
fn unpack(boot_cache: &BootCache) -> Vec<(u64, Vec<u8>)> {
    let mut blocks = Vec::new();
    for index in 0..boot_cache.heads().frames().len() {
        let bytes = boot_cache.read_frame(index).unwrap();
        let frame = decode_frame(boot_cache.heads(), index, &bytes).unwrap();
        for (extent, data) in frame.runs() {
            let zeroes = vec![0; usize::try_from(extent.bytes()).unwrap()];
            let data = data.unwrap_or(&zeroes);
            blocks.extend(extent.blocks().zip(data.chunks(BLOCK_BYTES).map(<[u8]>::to_vec)));
        }
    }
    blocks
}

#[test]
fn brings_each_block_in_order_with_its_data_and_zeroes_cost_nothing() {
    let image = image(3000);
    let order: Vec<u64> = (0..3000).map(|at| (at * 7 + 3) % 3000).collect();
    let (_dir, path, written) = write(&image, &touches(&order), 2);
    let boot_cache = BootCache::open(&path, ROOT).unwrap();
    let blocks = unpack(&boot_cache);
    assert_eq!(blocks.iter().map(|(block, _)| *block).collect::<Vec<_>>(), order);
    let mut padded = image;
    padded.resize(3000 * BLOCK_BYTES, 0);
    for (block, data) in &blocks {
        let start = usize::try_from(*block).unwrap() * BLOCK_BYTES;
        assert!(padded[start..start + BLOCK_BYTES] == data[..], "block {block}");
    }
    let heads = boot_cache.heads();
    assert_eq!((heads.blocks(), heads.data_blocks()), (3000, 2400));
    assert_eq!(heads.extents(), extents(&touches(&order)));
    assert_eq!(written.file_length, boot_cache.file_length());
    assert!(fs::metadata(path).unwrap().len() < 3000 * 4096 * 9 / 20);
}

#[test]
fn frames_are_small_at_the_head_and_never_too_long() {
    let image = image(12_000);
    let order: Vec<u64> = (0..12_000).collect();
    let (_dir, path, _) = write(&image, &touches(&order), 2);
    let boot_cache = BootCache::open(&path, ROOT).unwrap();
    let frames = boot_cache.heads().frames();
    assert!(frames.iter().all(|frame| frame.length as usize <= FRAME_LENGTH_MAX));
    assert!(frames[..8].iter().all(|frame| frame.length <= 64 << 10));
    let last = frames[frames.len() - 10..].iter().map(|frame| frame.length).max().unwrap();
    assert!(last > 128 << 10, "{last}");
    assert!(frames.windows(2).all(|pair| pair[0].due_ms <= pair[1].due_ms));
}

#[test]
fn the_file_does_not_depend_on_the_number_of_threads() {
    let image = image(3000);
    let order: Vec<u64> = (0..3000).rev().collect();
    let (_one, path_one, _) = write(&image, &touches(&order), 1);
    let (_four, path_four, _) = write(&image, &touches(&order), 4);
    assert!(fs::read(path_one).unwrap() == fs::read(path_four).unwrap());
}

#[test]
fn the_frames_stand_in_order_without_gaps_behind_the_heads() {
    let image = image(9000);
    let order: Vec<u64> = (0..9000).rev().collect();
    let touches = touches(&order);
    let (_dir, path, written) = write(&image, &touches, 4);
    let packed = frames::pack(&touches, 1, 1, &reader(&image), Ok, &|_| ()).unwrap();
    let frames: Vec<u8> = packed.into_iter().flatten().flat_map(|(_, bytes)| bytes).collect();
    let bytes = fs::read(&path).unwrap();
    let heads = BootCache::open(&path, ROOT).unwrap().heads_bytes().to_vec();
    let at = bytes.len() - frames.len();
    assert!(bytes[at..] == frames[..] && bytes[at - heads.len()..at] == heads[..]);
    assert_eq!((at - heads.len(), bytes.len() as u64), (16 + 32 + 8 + 32, written.file_length));
}

#[test]
fn the_boot_map_knows_the_frame_of_each_block_and_of_no_other() {
    let image = image(2000);
    let order: Vec<u64> = (0..1000).map(|at| at * 2).collect();
    let (_dir, path, _) = write(&image, &touches(&order), 2);
    let boot_cache = BootCache::open(&path, ROOT).unwrap();
    let heads = boot_cache.heads();
    for frame in 0..heads.frames().len() {
        for run in heads.frame_runs(frame) {
            assert!(run.extent.blocks().all(|block| heads.position(block) == Some(frame)));
        }
    }
    assert!((0..1000).all(|at| heads.position(at * 2 + 1).is_none()));
}

#[test]
fn any_byte_changed_is_noticed_before_its_frame_is_used() {
    let image = image(40);
    let order: Vec<u64> = (0..40).collect();
    let (_dir, path, _) = write(&image, &touches(&order), 1);
    let good = fs::read(&path).unwrap();
    let sound = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        BootCache::open(&path, ROOT).is_ok_and(|cache| cache.present_frames().unwrap().iter().all(|p| *p))
    };
    assert!(sound(&good));
    let step = good.len() / 2000 + 1;
    let heads_end = good.len().min(600);
    for at in (0..heads_end).chain((heads_end..good.len()).step_by(step)) {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        assert!(!sound(&bad), "byte {at}");
    }
    assert!(!sound(&good[..good.len() - 1]));
    assert!(!sound(&good[..20]));
    assert!(!sound(&[good.as_slice(), &[0]].concat()));
}

#[test]
fn the_boot_cache_of_another_image_is_refused() {
    let (_dir, path, _) = write(&image(10), &touches(&[1, 2]), 1);
    let error = BootCache::open(&path, Digest([8; 32])).unwrap_err();
    assert!(matches!(error, BootCacheError::OtherImage { found: ROOT }), "{error}");
    // Also when only the header was made to agree.
    let mut bytes = fs::read(&path).unwrap();
    bytes[16..48].fill(8);
    fs::write(&path, bytes).unwrap();
    let error = BootCache::open(&path, Digest([8; 32])).unwrap_err();
    assert!(matches!(error, BootCacheError::OtherImage { found: ROOT }), "{error}");
}

#[test]
fn arrives_frame_by_frame_and_is_then_the_same_file() {
    let image = image(600);
    let order: Vec<u64> = (0..600).collect();
    let (dir, path, written) = write(&image, &touches(&order), 2);
    let origin = BootCache::open(&path, ROOT).unwrap();
    let copy_path = dir.path().join("copy");
    let heads = origin.heads_bytes().to_vec();
    let copy = BootCache::create(&copy_path, ROOT, heads, written.heads_digest).unwrap();
    let frames = origin.heads().frames().len();
    assert!(frames > 3);
    for index in (0..frames).rev() {
        assert_eq!(copy.present_frames().unwrap(), (0..frames).map(|at| at > index).collect::<Vec<_>>());
        let bytes = origin.read_frame(index).unwrap();
        let other = (index + 1) % frames;
        assert!(
            matches!(copy.write_frame(other, &bytes), Err(BootCacheError::BadFrame(bad)) if bad == other)
        );
        copy.write_frame(index, &bytes).unwrap();
    }
    assert!(fs::read(&copy_path).unwrap() == fs::read(&path).unwrap());
    let wrong = BootCache::create(&copy_path, ROOT, vec![1, 2, 3], written.heads_digest);
    assert!(matches!(wrong, Err(BootCacheError::Damaged(_))));
}

#[test]
fn a_boot_set_may_be_empty_or_all_zero() {
    let image = vec![0; 64 << 12];
    for order in [vec![], (0..64).collect::<Vec<u64>>()] {
        let (_dir, path, _) = write(&image, &touches(&order), 2);
        let boot_cache = BootCache::open(&path, ROOT).unwrap();
        assert_eq!(boot_cache.heads().blocks(), order.len() as u64);
        assert_eq!(boot_cache.heads().frames_length(), 0);
        assert_eq!(unpack(&boot_cache).len(), order.len());
    }
}

/// Heads of a few KiB took more than a gigabyte of memory.
#[test]
fn heads_that_unpack_to_very_many_zero_blocks_are_refused() {
    let parse = |frames: u64, runs: u64, run: &[u8]| {
        let mut plain = ROOT.0.to_vec();
        for number in [1 << 40, 0, frames] {
            varint::put(&mut plain, number);
        }
        for _ in 0..frames {
            plain.push(0);
            plain.extend_from_slice(&ROOT.0);
            plain.push(0);
            varint::put(&mut plain, runs);
            (0..runs).for_each(|_| plain.extend_from_slice(run));
        }
        let packed = zstd::bulk::compress(&plain, 1).unwrap();
        let framed = [u32::try_from(plain.len()).unwrap().to_le_bytes().as_slice(), &packed].concat();
        Heads::parse(&framed, Digest::of(&framed)).map(|heads| heads.blocks())
    };
    // One block each, a block after the run before.
    assert_eq!(parse(3, 256, &[2, 3]).unwrap(), 768);
    assert!(parse(1, 257, &[2, 3]).is_err(), "more blocks than a frame has");
    assert!(parse(1, 1, &[2, 0xd9, 4]).is_err(), "one run of 300 blocks");
    assert!(parse(8193, 256, &[2, 3]).is_err(), "more runs than there may be");
}

#[test]
fn the_lower_bound_is_the_latest_that_a_frame_can_be_behind() {
    let image = image(2000);
    let order: Vec<u64> = (0..2000).collect();
    let (_dir, path, _) = write(&image, &touches(&order), 2);
    let boot_cache = BootCache::open(&path, ROOT).unwrap();
    let heads = boot_cache.heads();
    assert_eq!(heads.waiting_min_ms(u64::MAX), 0);
    let goodput = 100_000;
    let total = heads.frames_length();
    let by_hand = heads.frames().iter().map(|frame| {
        let sent_ms = (frame.offset + u64::from(frame.length)) * 1000 / goodput;
        sent_ms.saturating_sub(u64::from(frame.due_ms))
    });
    assert_eq!(heads.waiting_min_ms(goodput), by_hand.max().unwrap());
    assert!(heads.waiting_min_ms(goodput) <= total * 1000 / goodput);
}

#[test]
fn a_failed_read_leaves_no_file_behind() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("boot");
    let touches = touches(&(0..5000).collect::<Vec<u64>>());
    let builder =
        Builder { root: ROOT, size: 5000 << 12, touches: &touches, end_ns: 0, level: 1, threads: 3 };
    let fail = |extent: Extent, _: &mut [u8]| {
        if extent.start > 2000 { Err(io::Error::other("bad sector")) } else { Ok(()) }
    };
    assert_eq!(builder.write(&path, &fail, &|_| ()).unwrap_err().to_string(), "bad sector");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn heads_from_anywhere_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let packed = zstd::bulk::compress(&bytes, 1).unwrap();
        let framed = [u32::try_from(bytes.len()).unwrap().to_le_bytes().as_slice(), &packed].concat();
        let _ = Heads::parse(&framed, Digest::of(&framed));
        let _ = Heads::parse(&bytes, Digest::of(&bytes));
    }
}
