//! The cache against a plain vector, with readers, restarts and crashes.

use proptest::prelude::*;

use super::*;

const ROOT: Digest = Digest([7; 32]);

fn block(index: u64) -> Vec<u8> {
    if index % 7 == 3 {
        return vec![0; BLOCK_BYTES];
    }
    let byte = |at: u64| u8::try_from((index * 31 + at) % 251).expect("less than 251") | 1;
    (0..BLOCK_SIZE).map(byte).collect()
}

fn image(size: u64) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..blocks_for(size)).flat_map(block).collect();
    bytes.truncate(usize::try_from(size).unwrap());
    bytes
}

fn slice(image: &[u8], extent: Extent) -> &[u8] {
    let end = (extent.end() * BLOCK_SIZE).min(image.len() as u64);
    &image[usize::try_from(extent.offset()).unwrap()..usize::try_from(end).unwrap()]
}

fn fresh(size: u64) -> (tempfile::TempDir, LocalCache) {
    let dir = tempfile::tempdir().unwrap();
    LocalCache::create(dir.path(), ROOT, size).unwrap();
    let cache = LocalCache::open(dir.path(), ROOT, size).unwrap();
    (dir, cache)
}

#[derive(Debug, Clone)]
enum Step {
    Insert(u64, u64),
    Save,
    Restart,
    /// Power is lost; of what was written since the last save, only blocks divisible by this arrived, and torn.
    Crash(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0_u64..60, 1_u64..12).prop_map(|(start, count)| Step::Insert(start, count)),
        1 => Just(Step::Save),
        1 => Just(Step::Restart),
        1 => (2_u64..5).prop_map(Step::Crash),
    ];
    prop::collection::vec(step, 1..24)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn nothing_is_believed_that_the_disk_does_not_hold(steps in steps(), tail in 1_u64..4096) {
        let size = 59 * BLOCK_SIZE + tail;
        let image = image(size);
        let (dir, mut cache) = fresh(size);
        let path = dir.path().join("disk");
        let mut durable = std::fs::read(&path).unwrap();
        for step in steps {
            match step {
                Step::Insert(start, count) => {
                    let extent = Extent::new(start, count.min(60 - start));
                    cache.insert(start, slice(&image, extent)).unwrap();
                    prop_assert!(cache.has(extent));
                }
                Step::Save => {
                    cache.save(true).unwrap();
                    durable = std::fs::read(&path).unwrap();
                }
                Step::Restart => {
                    cache.save(true).unwrap();
                    durable = std::fs::read(&path).unwrap();
                    cache = LocalCache::open(dir.path(), ROOT, size).unwrap();
                }
                Step::Crash(keep) => {
                    let written = std::fs::read(&path).unwrap();
                    for at in (0..60).step_by(usize::try_from(keep).unwrap()) {
                        let torn = at * BLOCK_BYTES..(at * BLOCK_BYTES + 700).min(durable.len());
                        durable[torn.clone()].copy_from_slice(&written[torn]);
                    }
                    std::fs::write(&path, &durable).unwrap();
                    cache = LocalCache::open(dir.path(), ROOT, size).unwrap();
                    let verify = |index: u64, bytes: &[u8]| {
                        Ok(Some(bytes == slice(&image, Extent::new(index, 1))))
                    };
                    cache.recover(true, verify).unwrap();
                }
            }
            for run in cache.present(Extent::new(0, 60)) {
                let mut bytes = vec![0xee; slice(&image, run).len()];
                if !matches!(cache.try_read(run.offset(), &mut bytes), Attempt::Ready(Ok(()))) {
                    cache.file.read_exact_at(&mut bytes, run.offset()).unwrap();
                }
                prop_assert_eq!(&bytes[..], slice(&image, run));
            }
        }
    }
}

#[test]
fn a_killed_daemon_wins_back_what_it_had_not_saved() {
    let (dir, cache) = fresh(40 * BLOCK_SIZE);
    cache.insert(0, &image(10 * BLOCK_SIZE)).unwrap();
    cache.save(true).unwrap();
    cache.insert(20, &(20..25).flat_map(block).collect::<Vec<_>>()).unwrap();
    drop(cache);
    let mut cache = LocalCache::open(dir.path(), ROOT, 40 * BLOCK_SIZE).unwrap();
    assert!(!cache.has(Extent::new(20, 1)));
    let won = cache.recover(true, |index, bytes| Ok(Some(bytes == block(index)))).unwrap();
    // 24 is a zero block: nothing of it is in the file, and its page will tell.
    assert_eq!((won, cache.has(Extent::new(20, 4))), (4, true));
}

#[test]
fn a_block_that_rotted_is_forgotten_when_everything_is_verified_again() {
    let (dir, cache) = fresh(8 * BLOCK_SIZE);
    cache.insert(0, &image(8 * BLOCK_SIZE)).unwrap();
    drop(cache);
    let mut cache = LocalCache::open(dir.path(), ROOT, 8 * BLOCK_SIZE).unwrap();
    cache.insert(0, &image(6 * BLOCK_SIZE)).unwrap();
    cache.file.write_all_at(&[9; 10], 5 * BLOCK_SIZE + 5).unwrap();
    cache.recover(false, |index, bytes| Ok(Some(bytes == block(index)))).unwrap();
    assert_eq!(cache.absent(Extent::new(0, 8)), [Extent::new(5, 1)]);
}

/// What the kernel does with pages that it could not write: they are gone, and the next sync succeeds.
fn lose(cache: &LocalCache, extent: Extent) {
    cache.fail_sync.store(true, std::sync::atomic::Ordering::Relaxed);
    let zeroes = vec![0; usize::try_from(extent.bytes()).unwrap()];
    cache.file.write_all_at(&zeroes, extent.offset()).unwrap();
}

#[test]
fn after_a_failed_sync_nothing_is_believed_that_came_after_the_last_good_save() {
    let (dir, cache) = fresh(40 * BLOCK_SIZE);
    cache.insert(0, &image(10 * BLOCK_SIZE)).unwrap();
    cache.save(true).unwrap();
    cache.insert(20, &(20..30).flat_map(block).collect::<Vec<_>>()).unwrap();
    lose(&cache, Extent::new(20, 10));
    cache.save(true).unwrap_err();
    assert_eq!(cache.present(Extent::new(0, 40)), [Extent::new(0, 10)]);
    // A sync that succeeds afterwards brings nothing back, neither here nor after a restart.
    cache.insert(35, &block(35)).unwrap();
    cache.save(true).unwrap();
    let again = LocalCache::open(dir.path(), ROOT, 40 * BLOCK_SIZE).unwrap();
    assert_eq!(again.present(Extent::new(0, 40)), [Extent::new(0, 10), Extent::new(35, 1)]);
    // What was lost comes again, and is written again.
    cache.insert(20, &(20..30).flat_map(block).collect::<Vec<_>>()).unwrap();
    cache.save(true).unwrap();
    let mut bytes = vec![0; 10 * BLOCK_BYTES];
    cache.read_blocking(20 * BLOCK_SIZE, &mut bytes).unwrap();
    assert!(bytes == (20..30).flat_map(block).collect::<Vec<_>>());
}

/// Once, good blocks were absent again when there was no room for the bits: reads waited for what had been here.
#[test]
fn what_was_synced_stays_when_its_bits_cannot_be_saved() {
    for count in [3, 5] {
        let (dir, cache) = fresh(5 * BLOCK_SIZE);
        let present = dir.path().join("present");
        cache.insert(0, &image(count * BLOCK_SIZE)).unwrap();
        std::fs::remove_file(&present).unwrap();
        std::fs::create_dir_all(present.join("in the way")).unwrap();
        cache.save(true).unwrap_err();
        assert!(cache.has(Extent::new(0, count)));
        std::fs::remove_dir_all(&present).unwrap();
        std::fs::write(&present, "").unwrap();
        assert_eq!(cache.save(true).unwrap(), count == 5);
        let again = LocalCache::open(dir.path(), ROOT, 5 * BLOCK_SIZE).unwrap();
        assert_eq!(again.present(Extent::new(0, 5)), [Extent::new(0, count)]);
    }
}

#[test]
fn an_image_is_not_complete_whose_last_sync_failed() {
    let (dir, cache) = fresh(5 * BLOCK_SIZE);
    cache.insert(0, &image(5 * BLOCK_SIZE)).unwrap();
    lose(&cache, Extent::new(0, 5));
    cache.save(true).unwrap_err();
    assert!(!cache.is_complete() && dir.path().join("present").exists());
    assert_eq!(cache.absent(Extent::new(0, 5)), [Extent::new(0, 5)]);
}

#[test]
fn a_complete_image_needs_no_bitmap() {
    let (dir, cache) = fresh(5 * BLOCK_SIZE + 77);
    cache.insert(0, &image(5 * BLOCK_SIZE + 77)).unwrap();
    assert!(cache.is_complete() && dir.path().join("present").exists());
    assert!(cache.save(true).unwrap());
    assert!(!dir.path().join("present").exists());
    let cache = LocalCache::open(dir.path(), ROOT, 5 * BLOCK_SIZE + 77).unwrap();
    assert!(cache.is_complete());
}

/// Once, an error of the file system passed for the absence of the bitmap, and absent blocks read as zeroes.
#[test]
fn a_copy_of_which_it_cannot_be_told_whether_it_is_complete_is_not_opened() {
    let (dir, _cache) = fresh(5 * BLOCK_SIZE);
    let present = dir.path().join("present");
    std::fs::remove_file(&present).unwrap();
    std::os::unix::fs::symlink("present", &present).unwrap();
    LocalCache::open(dir.path(), ROOT, 5 * BLOCK_SIZE).unwrap_err();
}

/// The digests may come last.
#[test]
fn an_image_of_which_every_block_is_here_is_complete_only_when_it_may_be() {
    let (dir, cache) = fresh(5 * BLOCK_SIZE);
    cache.insert(0, &image(5 * BLOCK_SIZE)).unwrap();
    for _ in 0..2 {
        assert!(!cache.save(false).unwrap());
        assert!(dir.path().join("present").exists());
    }
    let again = LocalCache::open(dir.path(), ROOT, 5 * BLOCK_SIZE).unwrap();
    assert!(again.is_complete(), "all blocks are saved");
    assert!(cache.save(true).unwrap() && cache.save(true).unwrap());
    assert!(!dir.path().join("present").exists());
}

#[test]
fn status_tells_what_is_here_to_the_byte() {
    let (_dir, cache) = fresh(8 * BLOCK_SIZE);
    cache.insert(2, &block(2)).unwrap();
    let runs = |offset, length, most| -> Vec<(u64, u32)> {
        cache.present_status(offset, length, most).iter().map(|run| (run.length, run.flags)).collect()
    };
    assert_eq!(runs(0, 8 * BLOCK_SIZE, 9), [(8192, 0), (4096, 1), (5 * 4096, 0)]);
    assert_eq!(runs(8193, 5000, 9), [(4095, 1), (905, 0)]);
    assert_eq!(runs(0, 8 * BLOCK_SIZE, 1), [(8192, 0)]);
}

/// A boot block that turned out wrong was taken back in memory, and its place made a hole, while the saved bits still
/// named it: a daemon that was killed then gave zeroes to guests for ever.
#[test]
fn a_block_that_was_taken_back_is_not_believed_after_a_crash() {
    let (dir, cache) = fresh(8 * BLOCK_SIZE);
    cache.insert(4, &[9; 3 * BLOCK_BYTES]).unwrap();
    cache.save(true).unwrap();
    cache.forget(&[5]).unwrap();
    assert_eq!(cache.present(Extent::new(0, 8)), [Extent::new(4, 1), Extent::new(6, 1)]);
    drop(cache);
    let cache = LocalCache::open(dir.path(), ROOT, 8 * BLOCK_SIZE).unwrap();
    assert_eq!(cache.present(Extent::new(0, 8)), [Extent::new(4, 1), Extent::new(6, 1)]);
}

#[test]
fn what_a_check_of_everything_finds_wrong_is_not_believed_after_a_crash() {
    let (dir, cache) = fresh(8 * BLOCK_SIZE);
    cache.insert(0, &image(6 * BLOCK_SIZE)).unwrap();
    cache.save(true).unwrap();
    cache.file.write_all_at(&[9; 10], 5 * BLOCK_SIZE + 5).unwrap();
    for won in [-1, 0] {
        let mut cache = LocalCache::open(dir.path(), ROOT, 8 * BLOCK_SIZE).unwrap();
        assert_eq!(cache.recover(false, |index, bytes| Ok(Some(bytes == block(index)))).unwrap(), won);
        drop(cache);
        let cache = LocalCache::open(dir.path(), ROOT, 8 * BLOCK_SIZE).unwrap();
        assert_eq!(cache.absent(Extent::new(0, 6)), [Extent::new(5, 1)]);
    }
}

fn read_block(cache: &LocalCache, index: u64) -> Vec<u8> {
    let mut bytes = vec![0xee; BLOCK_BYTES];
    cache.read_blocking(index * BLOCK_SIZE, &mut bytes).unwrap();
    bytes
}

/// Boot blocks are here before their digests. What of them was not saved stayed in the file, and when the digests then
/// said that the blocks are zero, that is what guests read.
#[test]
fn a_zero_block_reads_as_zeroes_whatever_a_crash_left_in_its_place() {
    let (dir, cache) = fresh(8 * BLOCK_SIZE);
    cache.insert(2, &[9; 4 * BLOCK_BYTES]).unwrap();
    drop(cache);
    let mut cache = LocalCache::open(dir.path(), ROOT, 8 * BLOCK_SIZE).unwrap();
    assert_eq!(cache.recover(true, |_, _| Ok(None)).unwrap(), 0);
    // As a page tells it, and as a block that was fetched.
    cache.insert_zero(Extent::new(1, 2)).unwrap();
    cache.insert(3, &[0; BLOCK_BYTES]).unwrap();
    cache.insert(4, &block(4)).unwrap();
    cache.insert_zero(Extent::new(4, 1)).unwrap();
    assert_eq!(cache.present(Extent::new(0, 8)), [Extent::new(1, 4)]);
    for zero in 1..4 {
        assert!(read_block(&cache, zero) == [0; BLOCK_BYTES], "{zero}");
    }
    assert!(read_block(&cache, 4) == block(4));
}

#[test]
fn a_zero_block_reads_as_zeroes_whatever_a_failed_save_took_back() {
    let (_dir, cache) = fresh(8 * BLOCK_SIZE);
    cache.insert(2, &[9; BLOCK_BYTES]).unwrap();
    cache.fail_sync.store(true, std::sync::atomic::Ordering::Relaxed);
    cache.save(true).unwrap_err();
    // Who began to read it before still finds what was there.
    assert!(read_block(&cache, 2) == [9; BLOCK_BYTES]);
    cache.insert_zero(Extent::new(2, 1)).unwrap();
    assert!(read_block(&cache, 2) == [0; BLOCK_BYTES]);
}

/// Counts what it is asked and does nothing.
#[derive(Default)]
struct Asked(Mutex<Vec<Extent>>);

impl Fetch for Asked {
    fn want(&self, absent: &[Extent]) -> Coming {
        self.0.lock().unwrap().extend(absent);
        Coming::Demand
    }

    fn hint(&self, _: &[Extent]) {}
}

#[tokio::test(start_paused = true)]
async fn a_read_asks_once_and_ends_when_its_own_blocks_are_there() {
    let (_dir, cache) = fresh(32 * BLOCK_SIZE);
    let cache = Arc::new(cache);
    let asked = Arc::new(Asked::default());
    let fetch: Arc<dyn Fetch> = asked.clone();
    cache.set_fetch(&fetch);
    cache.insert(4, &block(4)).unwrap();
    let reader = tokio::spawn({
        let cache = Arc::clone(&cache);
        async move {
            let mut bytes = vec![0; 2 * BLOCK_BYTES];
            cache.read(3 * BLOCK_SIZE + 100, &mut bytes).await.map(|()| bytes)
        }
    });
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(*asked.0.lock().unwrap(), [Extent::new(3, 1), Extent::new(5, 1)]);
    cache.insert(3, &block(3)).unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!reader.is_finished());
    cache.insert(5, &block(5)).unwrap();
    let expected: Vec<u8> = (3..6).flat_map(block).skip(100).take(2 * BLOCK_BYTES).collect();
    assert_eq!(reader.await.unwrap().unwrap(), expected);
    assert!(cache.wanted().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_deadline_ends_a_read_only_for_who_asks_for_one() {
    let (_dir, cache) = fresh(BLOCK_SIZE);
    let cache = cache.with_deadline(Some(Duration::from_secs(30)));
    let began = Instant::now();
    let error = cache.read(0, &mut [0; 512]).await.unwrap_err();
    assert_eq!((error.kind(), began.elapsed().as_secs()), (io::ErrorKind::TimedOut, 30));
}

#[test]
fn bits_that_are_saved_while_others_write_always_have_their_data() {
    let size = 4096 * BLOCK_SIZE;
    let (dir, cache) = fresh(size);
    std::thread::scope(|scope| {
        for part in 0..4 {
            let cache = &cache;
            scope.spawn(move || {
                for index in part * 1024..(part + 1) * 1024 {
                    cache.insert(index, &block(index)).unwrap();
                }
            });
        }
        for _ in 0..20 {
            cache.save(true).unwrap();
            let Ok(saved) = saved::load(&dir.path().join("present"), ROOT, size) else { break };
            for index in saved.iter().map(u64::from) {
                let mut bytes = [0; BLOCK_BYTES];
                cache.file.read_exact_at(&mut bytes, index * BLOCK_SIZE).unwrap();
                assert_eq!(bytes[..], block(index));
            }
        }
    });
    assert!(cache.is_complete());
}
