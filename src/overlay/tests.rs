//! The overlay on real files, against a plain vector of bytes.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bootcache_nbd::disk::{BASE_ALLOCATION, STATE_HOLE, STATE_ZERO};
use proptest::prelude::*;
use tokio::runtime::{Builder, Runtime};

use super::*;
use crate::block::{BLOCK_BYTES, Extent};
use crate::image_disk::ImageDisk;
use crate::local_cache::{CONTEXT_PRESENT, STATE_PRESENT};

/// An image in memory whose reads have to wait now and then.
pub(super) struct MemoryBase {
    pub(super) bytes: Vec<u8>,
    reads: AtomicUsize,
}

impl MemoryBase {
    pub(super) fn patterned(size: usize) -> Arc<Self> {
        // Every third block is a hole.
        let byte =
            |at: usize| if at / BLOCK_BYTES % 3 == 2 { 0 } else { u8::try_from(at / 7 % 251).unwrap() + 1 };
        Arc::new(Self { bytes: (0..size).map(byte).collect(), reads: AtomicUsize::new(0) })
    }

    fn copy(&self, offset: u64, buf: &mut [u8]) {
        let start = usize::try_from(offset).unwrap();
        buf.copy_from_slice(&self.bytes[start..start + buf.len()]);
    }
}

impl Disk for MemoryBase {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn features(&self) -> Features {
        Features::READ_ONLY
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Attempt {
        if self.reads.fetch_add(1, Ordering::Relaxed).is_multiple_of(2) {
            buf.fill(0xee);
            return Attempt::WouldBlock;
        }
        self.copy(offset, buf);
        Attempt::Ready(Ok(()))
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async move {
            tokio::task::yield_now().await;
            self.copy(offset, buf);
            Ok(())
        })
    }

    fn status(
        &self,
        _: &str,
        offset: u64,
        length: u64,
        max: usize,
    ) -> BoxFuture<'_, io::Result<Vec<StatusExtent>>> {
        let mut extents = Vec::new();
        let mut at = offset;
        while at < offset + length && extents.len() < max {
            let end = (at / 4096 + 1) * 4096;
            let flags = if at / 4096 % 3 == 2 { STATE_HOLE | STATE_ZERO } else { 0 };
            extents.push(StatusExtent { length: end.min(self.size()) - at, flags });
            at = end;
        }
        Box::pin(async move { Ok(extents) })
    }
}

pub(super) const ROOT: Digest = Digest([7; 32]);

pub(super) fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

pub(super) async fn write(disk: &dyn Disk, offset: u64, data: &[u8], fua: bool) -> io::Result<()> {
    match if fua { Attempt::WouldBlock } else { disk.try_write(offset, data) } {
        Attempt::Ready(result) => result,
        Attempt::WouldBlock => disk.write(offset, data, fua).await,
    }
}

pub(super) async fn read(disk: &dyn Disk, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0xcc; length];
    match disk.try_read(offset, &mut bytes) {
        Attempt::Ready(result) => result.unwrap(),
        Attempt::WouldBlock => disk.read(offset, &mut bytes).await.unwrap(),
    }
    bytes
}

/// Punching a long range holds the file's lock: a write beside it would hold up a worker thread.
#[test]
fn writes_beside_a_range_that_is_given_back_go_to_a_thread_that_may_block() {
    let dir = tempfile::tempdir().unwrap();
    let base = MemoryBase::patterned(70_000);
    Overlay::create(dir.path(), ROOT, 70_000).unwrap();
    let overlay = Overlay::open(dir.path(), base, ROOT).unwrap();
    assert!(matches!(overlay.try_write(0, &[1; 4096]), Attempt::Ready(Ok(()))));
    let long = overlay.0.inline.long();
    for offset in [0, 8192] {
        assert!(matches!(overlay.try_write(offset, &[2; 4096]), Attempt::WouldBlock));
    }
    runtime().block_on(overlay.write(8192, &[2; 4096], false)).unwrap();
    drop(long);
    runtime().block_on(overlay.trim(8192, 4096, false)).unwrap();
    assert!(matches!(overlay.try_write(0, &[3; 4096]), Attempt::Ready(Ok(()))));
    runtime().block_on(async { assert_eq!(read(&overlay, 0, 8192).await[..4096], [3; 4096]) });
}

#[derive(Debug, Clone)]
enum Step {
    Write { at: usize, length: usize, byte: u8, fua: bool },
    Zero { at: usize, length: usize, no_hole: bool },
    Trim { at: usize, length: usize },
    Read { at: usize, length: usize },
    Flush,
    Reopen,
    Status { at: usize, length: usize },
    Seal,
}

fn step() -> impl Strategy<Value = Step> {
    let range = || (0usize..70_000, prop_oneof![1usize..600, 1usize..20_000, Just(4096), Just(8192)]);
    prop_oneof![
        5 => (range(), any::<u8>(), any::<bool>())
            .prop_map(|((at, length), byte, fua)| Step::Write { at, length, byte, fua: fua && byte > 200 }),
        2 => (0usize..18, 1usize..5, 1u8..).prop_map(|(block, count, byte)|
            Step::Write { at: block * 4096, length: count * 4096, byte, fua: false }),
        2 => (range(), any::<bool>()).prop_map(|((at, length), no_hole)| Step::Zero { at, length, no_hole }),
        2 => range().prop_map(|(at, length)| Step::Trim { at, length }),
        4 => range().prop_map(|(at, length)| Step::Read { at, length }),
        1 => Just(Step::Flush),
        1 => Just(Step::Reopen),
        2 => range().prop_map(|(at, length)| Step::Status { at, length }),
        1 => Just(Step::Seal),
    ]
}

/// Cuts a range to the disk; `None` if nothing is left.
fn cut(at: usize, length: usize, size: usize) -> Option<std::ops::Range<usize>> {
    let range = at.min(size)..(at + length).min(size);
    (!range.is_empty()).then_some(range)
}

async fn check(size: usize, steps: Vec<Step>) {
    let dir = tempfile::tempdir().unwrap();
    let base = MemoryBase::patterned(size);
    let mut model = base.bytes.clone();
    Overlay::create(dir.path(), ROOT, size as u64).unwrap();
    let open = || Overlay::open(dir.path(), base.clone(), ROOT).unwrap();
    let mut overlay = open();
    for step in steps {
        match step {
            Step::Write { at, length, byte, fua } => {
                let Some(range) = cut(at, length, size) else { continue };
                let data: Vec<u8> =
                    (0..range.len()).map(|i| byte.wrapping_add(u8::try_from(i % 13).unwrap())).collect();
                write(&overlay, range.start as u64, &data, fua).await.unwrap();
                model[range].copy_from_slice(&data);
            }
            Step::Zero { at, length, no_hole } => {
                let Some(range) = cut(at, length, size) else { continue };
                let flags = ZeroFlags { no_hole, fast: false };
                overlay.zero(range.start as u64, range.len() as u64, flags, false).await.unwrap();
                model[range].fill(0);
            }
            Step::Trim { at, length } => {
                let Some(range) = cut(at, length, size) else { continue };
                overlay.trim(range.start as u64, range.len() as u64, false).await.unwrap();
                let end = if range.end == size { size } else { range.end / BLOCK_BYTES * BLOCK_BYTES };
                let start = range.start.next_multiple_of(BLOCK_BYTES);
                if start < end {
                    model[start..end].fill(0);
                }
            }
            Step::Read { at, length } => {
                let Some(range) = cut(at, length, size) else { continue };
                assert!(
                    read(&overlay, range.start as u64, range.len()).await == model[range.clone()],
                    "read {range:?}"
                );
            }
            Step::Status { at, length } => {
                let Some(range) = cut(at, length, size) else { continue };
                let extents =
                    overlay.status(BASE_ALLOCATION, range.start as u64, range.len() as u64, 5).await.unwrap();
                assert!((1..=5).contains(&extents.len()));
                let mut start = range.start;
                for (i, extent) in extents.iter().enumerate() {
                    let end = start + usize::try_from(extent.length).unwrap();
                    assert!(
                        extent.flags == 0 || model[start..end].iter().all(|byte| *byte == 0),
                        "{extent:?}"
                    );
                    assert!(i == 0 || extents[i - 1].flags != extent.flags, "neighbours are merged");
                    start = end;
                }
                assert!(start == range.end || extents.len() == 5, "cut only for the limit");
            }
            Step::Flush => overlay.flush().await.unwrap(),
            Step::Reopen => {
                overlay.flush().await.unwrap();
                drop(overlay);
                overlay = open();
            }
            Step::Seal => {
                let image = tempfile::tempdir().unwrap();
                let sealed = overlay.seal(image.path()).await.unwrap();
                let (index, disk) = (image.path().join(INDEX_FILE), image.path().join(DISK_FILE));
                let increment = ImageDisk::open_increment(&index, &disk, base.clone(), ROOT).unwrap();
                assert!(read(&increment, 0, size).await == model, "the increment reads as the overlay does");
                assert_eq!(read_index(&index).unwrap().1, sealed.runs);
            }
        }
    }
    overlay.flush().await.unwrap();
    drop(overlay);
    assert!(read(&open(), 0, size).await == model, "after reopening");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]
    #[test]
    fn behaves_like_a_vector_of_bytes(
        size in prop_oneof![Just(65536usize), 1usize..70_000],
        steps in proptest::collection::vec(step(), 1..60),
    ) {
        runtime().block_on(check(size, steps));
    }
}

/// Once, a write whose client had gone while it waited was done all the same, over newer ones that had been answered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_for_its_range_is_given_up_with_its_client() {
    let (_dir, base, overlay) = new_overlay(4 * BLOCK_BYTES).await;
    for trims in [false, true] {
        let held = overlay.0.locks.lock(Extent::new(0, 4));
        let waiting = tokio::spawn({
            let overlay = overlay.clone();
            async move {
                match trims {
                    true => overlay.trim(0, 4096, false).await,
                    false => overlay.write(0, &[1; 4096], false).await,
                }
            }
        });
        let turns = async |count| {
            while overlay.0.turns.available_permits() != count {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), turns(TURNS - 1)).await.expect("it has its turn");
        tokio::time::sleep(Duration::from_millis(50)).await; // and a thread
        waiting.abort();
        assert!(waiting.await.unwrap_err().is_cancelled());
        drop(held);
        tokio::time::timeout(Duration::from_secs(10), turns(TURNS)).await.expect("the thread ends");
        assert_eq!(read(&overlay, 0, 4096).await, base.bytes[..4096], "trims: {trims}");
    }
}

/// It may be the range of a write that has begun and whose client has gone: what is answered now must come behind it.
#[tokio::test]
async fn a_write_over_data_is_not_done_beside_one_that_holds_the_range() {
    let (_dir, _base, overlay) = new_overlay(4 * BLOCK_BYTES).await;
    write(&overlay, 0, &[1; 4096], false).await.unwrap();
    let held = overlay.0.locks.lock(Extent::new(0, 1));
    assert!(matches!(overlay.try_write(0, &[2; 4096]), Attempt::WouldBlock));
    drop(held);
    write(&overlay, 0, &[3; 4096], false).await.unwrap();
    assert_eq!(read(&overlay, 0, 4096).await, [3; 4096]);
}

async fn new_overlay(size: usize) -> (tempfile::TempDir, Arc<MemoryBase>, Overlay) {
    let dir = tempfile::tempdir().unwrap();
    let base = MemoryBase::patterned(size);
    Overlay::create(dir.path(), ROOT, size as u64).unwrap();
    let overlay = Overlay::open(dir.path(), base.clone(), ROOT).unwrap();
    (dir, base, overlay)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn concurrent_writes_to_parts_of_one_absent_block_are_all_kept() {
    for round in 0..20 {
        let (_dir, base, overlay) = new_overlay(3 * BLOCK_BYTES).await;
        let tasks: Vec<_> = (0u8..64)
            .map(|slot| {
                let overlay = overlay.clone();
                tokio::spawn(async move {
                    write(&overlay, 4096 + u64::from(slot) * 60, &[slot; 60], false).await.unwrap()
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        let mut expected = base.bytes[4096..8192].to_vec();
        (0u8..64).for_each(|slot| expected[usize::from(slot) * 60..][..60].fill(slot));
        assert!(read(&overlay, 4096, 4096).await == expected, "round {round}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn writes_zeroes_and_trims_beside_each_other_leave_neighbours_alone() {
    // Four tasks own a quarter of each block and race on the same blocks; whole-block trims race too, in block 0 only.
    let (_dir, _base, overlay) = new_overlay(16 * BLOCK_BYTES).await;
    overlay.zero(0, 16 * 4096, ZeroFlags::default(), false).await.unwrap();
    let trimmer = tokio::spawn({
        let overlay = overlay.clone();
        async move {
            for _ in 0..200 {
                overlay.trim(0, 4096, false).await.unwrap();
            }
        }
    });
    let tasks: Vec<_> = (0u8..4)
        .map(|quarter| {
            let overlay = overlay.clone();
            tokio::spawn(async move {
                for round in 0..200u8 {
                    for block in 0..16u64 {
                        let at = block * 4096 + u64::from(quarter) * 1024;
                        if (round + quarter) % 3 == 0 {
                            overlay.zero(at, 1024, ZeroFlags::default(), false).await.unwrap();
                        } else {
                            write(&overlay, at, &[round; 1024], false).await.unwrap();
                        }
                        if block > 0 {
                            let expected = if (round + quarter) % 3 == 0 { 0 } else { round };
                            assert!(read(&overlay, at, 1024).await.iter().all(|byte| *byte == expected));
                        }
                    }
                    if round % 50 == 0 {
                        overlay.flush().await.unwrap();
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    trimmer.await.unwrap();
}

#[tokio::test]
async fn an_index_that_grew_is_written_anew_and_stays_small() {
    let (dir, base, overlay) = new_overlay(64 * BLOCK_BYTES).await;
    for round in 0u64..6000 {
        let at = round * 7 % 64 * 4096;
        if round % 2 == 0 {
            overlay.trim(at, 4096, false).await.unwrap();
        } else {
            write(&overlay, at, &[3; 4096], false).await.unwrap();
        }
        // Without a sync each, which would take its time: the log sees every change all the same.
        let words = overlay.0.dirty.take();
        overlay.0.dirty.put_back(&words);
        if round % 4 == 0 {
            overlay.flush().await.unwrap();
        }
    }
    overlay.flush().await.unwrap();
    let expected = read(&overlay, 0, 64 * BLOCK_BYTES).await;
    let usage = overlay.usage();
    drop(overlay);
    let length = std::fs::metadata(dir.path().join(INDEX_FILE)).unwrap().len();
    assert!(length < 96 + 32 * 5000, "{length} bytes of index for 64 blocks");
    let overlay = Overlay::open(dir.path(), base, ROOT).unwrap();
    assert_eq!(overlay.usage(), usage);
    assert!(read(&overlay, 0, 64 * BLOCK_BYTES).await == expected);
}

/// Once, an overlay that had no handle left just when its index was to be written anew refused writes from then on.
#[tokio::test]
async fn an_index_that_cannot_be_written_anew_is_appended_to() {
    let (dir, base, overlay) = new_overlay(4 * BLOCK_BYTES).await;
    let in_the_way = dir.path().join("index.new");
    overlay.0.flusher.progress_for_test().await.log.compact_always();
    for block in 0..3 {
        if block == 1 {
            std::fs::create_dir(&in_the_way).unwrap();
        } else if block == 2 {
            std::fs::remove_dir(&in_the_way).unwrap();
        }
        write(&overlay, block * 4096, &[1; 4096], true).await.unwrap();
    }
    drop(overlay);
    let length = std::fs::metadata(dir.path().join(INDEX_FILE)).unwrap().len();
    assert_eq!(length, 96 + 32, "written anew, in the end");
    let overlay = Overlay::open(dir.path(), base, ROOT).unwrap();
    assert_eq!(overlay.usage().data_blocks, 3);
}

#[tokio::test]
async fn an_overlay_is_refused_over_another_image_a_second_time_and_when_damaged() {
    let (dir, base, overlay) = new_overlay(8 * BLOCK_BYTES).await;
    assert!(matches!(Overlay::open(dir.path(), base.clone(), ROOT), Err(OverlayError::InUse(_))));
    for block in 0..4 {
        write(&overlay, block * 4096, &[9; 4096], true).await.unwrap();
    }
    drop(overlay);
    let other = Digest([8; 32]);
    assert!(matches!(Overlay::open(dir.path(), base.clone(), other), Err(OverlayError::OtherBase { .. })));
    let large = MemoryBase::patterned(9 * BLOCK_BYTES);
    assert!(matches!(Overlay::open(dir.path(), large, ROOT), Err(OverlayError::OtherSize { .. })));
    let index = dir.path().join(INDEX_FILE);
    let good = std::fs::read(&index).unwrap();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        std::fs::write(&index, &bad).unwrap();
        let opened = Overlay::open(dir.path(), base.clone(), ROOT);
        if at < good.len() - 32 {
            assert!(matches!(opened, Err(OverlayError::Index { .. })), "byte {at}");
        } else {
            assert_eq!(opened.unwrap().usage().data_blocks, 3, "the last batch counts as torn");
        }
    }
}

#[tokio::test]
async fn half_a_block_at_the_end_of_the_disk_is_written_merged_and_trimmed() {
    let (_dir, base, overlay) = new_overlay(2 * BLOCK_BYTES + 100).await;
    write(&overlay, 8192 + 99, &[1], true).await.unwrap();
    assert_eq!(read(&overlay, 8192, 99).await, base.bytes[8192..8291]);
    assert_eq!(read(&overlay, 8291, 1).await, [1]);
    overlay.trim(8192, 100, true).await.unwrap();
    assert_eq!(read(&overlay, 8192, 100).await, [0; 100]);
    assert_eq!(overlay.usage(), Usage { data_blocks: 0, zero_blocks: 1 });
}

#[tokio::test]
async fn zeroes_with_no_hole_keep_their_space() {
    let (_dir, _base, overlay) = new_overlay(4 * BLOCK_BYTES).await;
    overlay.zero(0, 8192, ZeroFlags { no_hole: true, fast: false }, false).await.unwrap();
    let extents = overlay.status(BASE_ALLOCATION, 0, 8192, 8).await.unwrap();
    assert_eq!(extents, [StatusExtent { length: 8192, flags: 0 }]);
    assert_eq!(read(&overlay, 0, 8192).await, [0; 8192]);
}

#[tokio::test]
async fn sealing_keeps_only_what_differs_from_the_base() {
    let (_dir, base, overlay) = new_overlay(12 * BLOCK_BYTES).await;
    write(&overlay, 0, &base.bytes[..8192], false).await.unwrap(); // blocks 0, 1: as the base has them
    write(&overlay, 8192, &[5; 4096], false).await.unwrap(); // block 2: new
    overlay.trim(5 * 4096, 4096, false).await.unwrap(); // block 5: zero over zeroes
    overlay.trim(6 * 4096, 4096, false).await.unwrap(); // block 6: zero over data
    write(&overlay, 7 * 4096, &[0; 4096], false).await.unwrap(); // block 7: zeroes written over data
    let image = tempfile::tempdir().unwrap();
    let sealed = overlay.seal(image.path()).await.unwrap();
    let run = |start, count, state| Run { extent: Extent::new(start, count), state };
    assert_eq!(sealed.runs, [run(2, 1, BlockState::Data), run(6, 2, BlockState::Zero)][..]);
    assert_eq!(sealed.dropped_blocks, 3);
    write(&overlay, 0, &[1], false).await.unwrap(); // the overlay goes on
}

/// Once, a request about a whole disk of which every second block was trimmed held a worker thread until it had seen all.
#[tokio::test]
async fn status_of_very_many_pieces_is_told_part_by_part() {
    let blocks = layer::PIECES_MAX as u64 * 5 / 2;
    let size = blocks * 4096;
    let dir = tempfile::tempdir().unwrap();
    Overlay::create(dir.path(), ROOT, size).unwrap();
    let overlay = Overlay::open(dir.path(), MemoryBase::patterned(4096), ROOT).unwrap();
    for block in 0..blocks {
        let state = if block % 2 == 0 { BlockState::Data } else { BlockState::Zero };
        overlay.0.layer.map.set(Extent::new(block, 1), state, |_, _| ());
    }
    let (mut at, mut answers) = (0, 0);
    while at < size {
        let extents = overlay.status(CONTEXT_PRESENT, at, size - at, 8).await.unwrap();
        let [StatusExtent { length, flags: STATE_PRESENT }] = extents[..] else { panic!("{extents:?}") };
        assert!(length <= layer::PIECES_MAX as u64 * 4096, "{length} bytes at {at}");
        at += length;
        answers += 1;
    }
    assert_eq!((at, answers), (size, 3));
}

/// Once, a process that could not open the live map left it for the next, which believed it: blocks that had been flushed
/// meanwhile read as the base.
#[tokio::test]
async fn a_live_map_that_cannot_be_used_is_neither_passed_over_nor_left_to_be_believed() {
    let (dir, base, overlay) = new_overlay(4 * BLOCK_BYTES).await;
    write(&overlay, 0, &[1; 4096], true).await.unwrap();
    write(&overlay, 4096, &[2; 4096], false).await.unwrap();
    drop(overlay); // as a kill would
    let (live, aside) = (dir.path().join(LIVE_FILE), dir.path().join("aside"));
    std::fs::rename(&live, &aside).unwrap();
    std::fs::create_dir(&live).unwrap();
    let refused = Overlay::open(dir.path(), base.clone(), ROOT).unwrap_err();
    assert!(matches!(refused, OverlayError::Live { .. }), "{refused}");
    std::fs::remove_dir(&live).unwrap();
    std::fs::rename(&aside, &live).unwrap();
    let overlay = Overlay::open(dir.path(), base.clone(), ROOT).unwrap();
    assert_eq!(read(&overlay, 0, 8192).await, [[1; 4096], [2; 4096]].concat(), "what was answered");
}

#[tokio::test]
async fn an_overlay_whose_live_map_cannot_be_made_is_open_without_one() {
    let (dir, base, overlay) = new_overlay(4 * BLOCK_BYTES).await;
    drop(overlay);
    let live = dir.path().join(LIVE_FILE);
    std::fs::remove_file(&live).unwrap();
    // There is none behind it, and none can be made in its place.
    std::os::unix::fs::symlink("nowhere", &live).unwrap();
    let overlay = Overlay::open(dir.path(), base.clone(), ROOT).unwrap();
    write(&overlay, 0, &[1; 4096], true).await.unwrap();
    assert!(!live.exists());
    drop(overlay);
    std::fs::remove_file(&live).unwrap();
    let overlay = Overlay::open(dir.path(), base, ROOT).unwrap();
    assert_eq!(read(&overlay, 0, 4096).await, [1; 4096]);
    assert!(live.exists());
}

/// Once, the file was mapped: a page of it that the disk could not give ended the process, with the disks of all VMs. A
/// file that is cut off does the same to a mapping.
#[tokio::test]
async fn a_live_map_that_is_lost_harms_nothing_but_what_was_not_flushed() {
    let (dir, base, overlay) = new_overlay(4 * BLOCK_BYTES).await;
    write(&overlay, 0, &[1; 4096], true).await.unwrap();
    let live = std::fs::File::options().write(true).open(dir.path().join(LIVE_FILE)).unwrap();
    live.set_len(0).unwrap();
    write(&overlay, 4096, &[2; 4096], true).await.unwrap();
    assert_eq!(read(&overlay, 0, 8192).await, [[1; 4096], [2; 4096]].concat());
    live.set_len(0).unwrap();
    drop(overlay); // as a kill would
    let overlay = Overlay::open(dir.path(), base, ROOT).unwrap();
    assert_eq!(read(&overlay, 0, 8192).await, [[1; 4096], [2; 4096]].concat());
}
