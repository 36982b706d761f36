//! Power loss at every step, on a storage whose cache is volatile.
//!
//! The simulated files keep two contents, what a reader sees and what is durable, in sectors of 512 bytes. A crash makes
//! every sector that was written since the last sync either one of its versions, at random, and cuts the log anywhere
//! between its lengths. Each sector of the disk must then hold what was last flushed or something written since.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;

use proptest::prelude::*;
use rustix::io::Errno;

use super::tests::{MemoryBase, ROOT, read, runtime, write};
use super::*;

const SECTOR: usize = 512;
const SIZE: usize = 12 * 4096 + 1024;

/// Fails every step from the chosen one on, as a machine without power does.
#[derive(Debug)]
struct Power {
    steps: AtomicUsize,
    off_at: usize,
    /// The step that fails alone, and how.
    fault: Option<(usize, Errno)>,
}

impl Power {
    fn new(off_at: usize, fault: Option<(usize, Errno)>) -> Arc<Self> {
        Arc::new(Self { steps: AtomicUsize::new(0), off_at, fault })
    }

    /// Whether a step has failed.
    fn failed(&self) -> bool {
        let steps = self.steps.load(Ordering::SeqCst);
        steps > self.off_at || self.fault.is_some_and(|(at, _)| steps > at)
    }

    fn step(&self) -> io::Result<()> {
        let step = self.steps.fetch_add(1, Ordering::SeqCst);
        if step >= self.off_at {
            return Err(Errno::IO.into());
        }
        match self.fault {
            Some((at, errno)) if at == step => Err(errno.into()),
            _ => Ok(()),
        }
    }
}

#[derive(Debug)]
struct VolatileDiff {
    power: Arc<Power>,
    state: Mutex<DiffState>,
}

#[derive(Debug)]
struct DiffState {
    seen: Vec<u8>,
    durable: Vec<u8>,
    versions: BTreeMap<usize, Vec<Vec<u8>>>,
}

impl DiffState {
    fn put(&mut self, at: usize, data: &[u8]) {
        self.seen[at..at + data.len()].copy_from_slice(data);
        for sector in at / SECTOR..(at + data.len()).div_ceil(SECTOR) {
            let start = sector * SECTOR;
            let bytes = self.seen[start..(start + SECTOR).min(self.seen.len())].to_vec();
            self.versions.entry(sector).or_default().push(bytes);
        }
    }
}

impl VolatileDiff {
    fn new(power: Arc<Power>, content: Vec<u8>) -> Arc<Self> {
        let state = DiffState { seen: content.clone(), durable: content, versions: BTreeMap::new() };
        Arc::new(Self { power, state: Mutex::new(state) })
    }

    /// What is there after the power was lost.
    fn crash(&self, random: &mut Random) -> Vec<u8> {
        let state = self.state.lock().unwrap();
        let mut bytes = state.durable.clone();
        for (sector, versions) in &state.versions {
            if let Some(version) = random.below(versions.len() + 1).checked_sub(1) {
                bytes[sector * SECTOR..][..versions[version].len()].copy_from_slice(&versions[version]);
            }
        }
        bytes
    }
}

fn index(offset: u64) -> usize {
    usize::try_from(offset).unwrap()
}

impl DiffFile for VolatileDiff {
    fn try_read_at(&self, _: &mut [u8], _: u64) -> Attempt {
        Attempt::WouldBlock
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let state = self.state.lock().unwrap();
        buf.copy_from_slice(&state.seen[index(offset)..][..buf.len()]);
        Ok(())
    }

    fn write_at(&self, parts: [&[u8]; 3], offset: u64) -> io::Result<()> {
        let data = parts.concat();
        let mut state = self.state.lock().unwrap();
        if let Err(error) = self.power.step() {
            // A write that fails leaves its first half behind, in whole sectors as devices do.
            state.put(index(offset), &data[..data.len() / 2 / SECTOR * SECTOR]);
            return Err(error);
        }
        state.put(index(offset), &data);
        Ok(())
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        self.power.step()?;
        self.state.lock().unwrap().put(index(offset), &vec![0; index(length)]);
        Ok(())
    }

    fn allocate_zeroes(&self, offset: u64, length: u64, _: bool) -> io::Result<()> {
        self.punch(offset, length)
    }

    fn sync(&self) -> io::Result<()> {
        self.power.step()?;
        let mut state = self.state.lock().unwrap();
        state.durable = state.seen.clone();
        state.versions.clear();
        Ok(())
    }

    fn read_ahead(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Debug)]
struct VolatileLog {
    power: Arc<Power>,
    state: Mutex<LogState>,
}

#[derive(Debug)]
struct LogState {
    seen: Vec<u8>,
    durable: Vec<u8>,
    /// Where that begins which the next sync writes.
    dirty_from: usize,
}

impl LogState {
    fn clean(content: Vec<u8>) -> Self {
        Self { seen: content.clone(), durable: content, dirty_from: usize::MAX }
    }
}

impl VolatileLog {
    fn new(power: Arc<Power>, content: Vec<u8>) -> Arc<Self> {
        Arc::new(Self { power, state: Mutex::new(LogState::clean(content)) })
    }

    fn crash(&self, random: &mut Random) -> Vec<u8> {
        let LogState { seen, durable, .. } = &*self.state.lock().unwrap();
        let (short, long) = (seen.len().min(durable.len()), seen.len().max(durable.len()));
        let mut bytes = vec![0; short + random.below(long - short + 1)];
        for start in (0..bytes.len()).step_by(SECTOR) {
            let end = (start + SECTOR).min(bytes.len());
            let source = if random.below(2) == 0 { seen } else { durable };
            let source = source.get(start..end.min(source.len())).unwrap_or_default();
            bytes[start..start + source.len()].copy_from_slice(source);
        }
        bytes
    }
}

impl LogFile for VolatileLog {
    fn load(&self) -> io::Result<Vec<u8>> {
        Ok(self.state.lock().unwrap().seen.clone())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        let failed = self.power.step();
        let bytes = if failed.is_err() { &bytes[..bytes.len() / 2] } else { bytes };
        let (start, end) = (index(offset), index(offset) + bytes.len());
        let length = state.seen.len().max(end);
        state.seen.resize(length, 0);
        state.seen[start..end].copy_from_slice(bytes);
        state.dirty_from = state.dirty_from.min(start);
        failed
    }

    fn truncate(&self, length: u64) -> io::Result<()> {
        self.power.step()?;
        self.state.lock().unwrap().seen.truncate(index(length));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let LogState { seen, durable, dirty_from } = &mut *self.state.lock().unwrap();
        // As the kernel has it: what a sync could not write, the next one does not write either.
        let from = std::mem::replace(dirty_from, usize::MAX).min(seen.len());
        self.power.step()?;
        durable.resize(seen.len(), 0);
        durable[from..].copy_from_slice(&seen[from..]);
        Ok(())
    }

    fn replace(&self, bytes: &[u8]) -> Result<(), ReplaceError> {
        self.power.step().map_err(ReplaceError::Unchanged)?;
        *self.state.lock().unwrap() = LogState::clean(bytes.to_vec());
        self.power.step().map_err(ReplaceError::InDoubt)
    }
}

/// A small generator, so that a case is its seed.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ z >> 31) % limit as u64).unwrap()
    }
}

/// What each sector may hold: the last value flushed, and those written since. A write that failed may have been
/// done or not, so it is allowed without putting an end to what was before.
struct Model(Vec<Vec<Version>>);

struct Version {
    bytes: Vec<u8>,
    answered: bool,
}

impl Model {
    fn new(content: &[u8]) -> Self {
        let version = |sector: &[u8]| vec![Version { bytes: sector.to_vec(), answered: true }];
        Self(content.chunks(SECTOR).map(version).collect())
    }

    fn put(&mut self, sectors: std::ops::Range<usize>, byte: u8, result: &io::Result<()>) {
        for allowed in &mut self.0[sectors] {
            allowed.push(Version { bytes: vec![byte; SECTOR], answered: result.is_ok() });
        }
    }

    fn flushed(&mut self, result: &io::Result<()>) {
        if result.is_ok() {
            for allowed in &mut self.0 {
                let last = allowed.iter().rposition(|version| version.answered).expect("the first one was");
                allowed.drain(..last);
            }
        }
    }

    /// After a crash what was found is what there is.
    fn check(&self, found: &[u8], what: &str) {
        for (sector, (bytes, allowed)) in found.chunks(SECTOR).zip(&self.0).enumerate() {
            assert!(
                allowed.iter().any(|version| version.bytes == bytes),
                "{what}: sector {sector} holds {:?}",
                &bytes[..4]
            );
        }
    }
}

/// What an overlay of these files shows while the power stays on.
async fn shown(log: Vec<u8>, diff: Vec<u8>) -> Vec<u8> {
    let quiet = Power::new(usize::MAX, None);
    let (log, diff) = (VolatileLog::new(quiet.clone(), log), VolatileDiff::new(quiet, diff));
    read(&Overlay::from_files(log, diff, MemoryBase::patterned(SIZE)).unwrap(), 0, SIZE).await
}

/// Opens an overlay and runs a workload until the power goes, then opens what is left, and gives it.
async fn one_life(seed: u64, power: Arc<Power>, log: Vec<u8>, diff: Vec<u8>) -> (Vec<u8>, Vec<u8>) {
    let mut model = Model::new(&shown(log.clone(), diff.clone()).await);
    let log = VolatileLog::new(power.clone(), log);
    let diff = VolatileDiff::new(power.clone(), diff);
    let mut random = Random(seed);
    // Opening cuts a torn end off the log, for which there may be no power already.
    match Overlay::from_files(log.clone(), diff.clone(), MemoryBase::patterned(SIZE)) {
        Ok(overlay) => work(&overlay, &mut model, &mut random).await,
        Err(error) => assert!(power.failed(), "seed {seed}: {error}"),
    }
    let left = (log.crash(&mut random), diff.crash(&mut random));
    let what = format!("seed {seed}, power off at step {}", power.off_at);
    model.check(&shown(left.0.clone(), left.1.clone()).await, &what);
    left
}

async fn work(overlay: &Overlay, model: &mut Model, random: &mut Random) {
    for round in 0..60u8 {
        let first = random.below(SIZE / SECTOR);
        let last = (first + 1 + random.below(20)).min(SIZE / SECTOR);
        let (at, length) = ((first * SECTOR) as u64, ((last - first) * SECTOR) as u64);
        match random.below(8) {
            0..4 => {
                let fua = random.below(4) == 0;
                let result = write(overlay, at, &vec![round + 100; index(length)], fua).await;
                model.put(first..last, round + 100, &result);
                if fua {
                    model.flushed(&result);
                }
            }
            4 => {
                let flags = ZeroFlags { no_hole: random.below(2) == 0, fast: false };
                model.put(first..last, 0, &overlay.zero(at, length, flags, false).await);
            }
            5 => {
                let (start, end) = (at.div_ceil(4096), (at + length) / 4096);
                if start < end {
                    let result = overlay.trim(start * 4096, (end - start) * 4096, false).await;
                    model.put(index(start) * 8..index(end) * 8, 0, &result);
                }
            }
            6 => {
                overlay.0.flusher.progress_for_test().await.log.compact_always();
                model.flushed(&overlay.flush().await);
            }
            _ => model.flushed(&overlay.flush().await),
        }
    }
}

fn empty_log() -> Vec<u8> {
    Header { base: ROOT, size: SIZE as u64 }.encode().to_vec()
}

#[test]
fn power_lost_at_every_step_keeps_what_was_flushed() {
    runtime().block_on(async {
        for seed in 0..4 {
            let counter = Power::new(usize::MAX, None);
            one_life(seed, counter.clone(), empty_log(), vec![0; SIZE]).await;
            let steps = counter.steps.load(Ordering::SeqCst);
            assert!(steps > 50, "the workload does something");
            for off_at in 0..steps {
                one_life(seed, Power::new(off_at, None), empty_log(), vec![0; SIZE]).await;
            }
        }
    });
}

#[test]
fn a_step_that_fails_alone_loses_nothing_whatever_the_error() {
    runtime().block_on(async {
        for errno in [Errno::NOSPC, Errno::IO] {
            for at in 0..150 {
                one_life(at as u64, Power::new(usize::MAX, Some((at, errno))), empty_log(), vec![0; SIZE])
                    .await;
            }
        }
    });
}

#[test]
fn power_lost_while_an_overlay_is_opened_leaves_it_as_it_was() {
    runtime().block_on(async {
        let mut refused = 0;
        for off_at in 0..200 {
            let (log, diff) = one_life(7, Power::new(off_at, None), empty_log(), vec![0; SIZE]).await;
            let power = Power::new(0, None);
            one_life(0, power.clone(), log.clone(), diff.clone()).await;
            let log = VolatileLog::new(power.clone(), log);
            let opened =
                Overlay::from_files(log, VolatileDiff::new(power, diff), MemoryBase::patterned(SIZE));
            refused += usize::from(opened.is_err());
        }
        assert!(refused > 0, "no log had a torn end");
    });
}

/// Once, the last batch of a process that ended before it was synced, or when the sync had failed, was believed and never
/// written: the next process answered flushes, and power that was lost then took the batch away, or damaged the log.
#[test]
fn what_the_last_process_had_not_synced_is_durable_when_the_next_one_has_flushed() {
    runtime().block_on(async {
        for at in 0.. {
            let power = Power::new(usize::MAX, Some((at, Errno::IO)));
            let log = VolatileLog::new(power.clone(), empty_log());
            let diff = VolatileDiff::new(power.clone(), vec![0; SIZE]);
            let open =
                || Overlay::from_files(log.clone(), diff.clone(), MemoryBase::patterned(SIZE)).unwrap();
            work(&open(), &mut Model::new(&[0; SIZE]), &mut Random(5)).await;
            if !power.failed() {
                assert!(at > 50, "the workload does something");
                break;
            }
            let (next, mut random) = (open(), Random(at as u64));
            for byte in 0..3 {
                next.flush().await.unwrap();
                let left = shown(log.crash(&mut random), diff.crash(&mut random)).await;
                assert!(left == read(&next, 0, SIZE).await, "step {at}, write {byte}");
                write(&next, u64::from(byte) * 4096, &[byte; 4096], false).await.unwrap();
            }
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]
    #[test]
    fn several_crashes_in_a_row_keep_what_was_flushed(lives in proptest::collection::vec((any::<u64>(), 0usize..200), 1..8)) {
        runtime().block_on(async {
            let (mut log, mut diff) = (empty_log(), vec![0; SIZE]);
            for (seed, off_at) in lives {
                (log, diff) = one_life(seed, Power::new(off_at, None), log, diff).await;
            }
        });
    }
}

#[test]
fn every_prefix_of_a_log_opens_as_some_whole_number_of_flushes() {
    runtime().block_on(async {
        let quiet = Power::new(usize::MAX, None);
        let log = VolatileLog::new(quiet.clone(), empty_log());
        let diff = VolatileDiff::new(quiet, vec![0; SIZE]);
        let base = MemoryBase::patterned(SIZE);
        let overlay = Overlay::from_files(log.clone(), diff.clone(), base.clone()).unwrap();
        let mut flushed = vec![overlay.usage()];
        for block in 0..4u64 {
            write(&overlay, block * 3 * 4096, &[1; 4096], false).await.unwrap();
            overlay.trim((block * 3 + 1) * 4096, 4096, true).await.unwrap();
            flushed.push(overlay.usage());
        }
        let whole = log.load().unwrap();
        for length in 0..=whole.len() {
            let quiet = Power::new(usize::MAX, None);
            let log = VolatileLog::new(quiet, whole[..length].to_vec());
            let opened = Overlay::from_files(log, diff.clone(), base.clone());
            if length < empty_log().len() {
                assert!(matches!(opened, Err(IndexError::Header)), "{length}");
            } else {
                let batches = (length - empty_log().len()) / 64;
                assert_eq!(opened.unwrap().usage(), flushed[batches], "{length}");
            }
        }
    });
}

#[test]
fn a_failed_sync_latches_and_a_full_disk_does_not() {
    runtime().block_on(async {
        // Steps: 0 write, 1 sync of the diff, 2 and 3 what was in the index, 4 append, 5 (truncate or) sync of the index.
        for (at, errno, latches) in [
            (0, Errno::NOSPC, false),
            (1, Errno::IO, true),
            (2, Errno::NOSPC, false),
            (3, Errno::IO, true),
            (4, Errno::NOSPC, false),
            (5, Errno::IO, true),
        ] {
            let power = Power::new(usize::MAX, Some((at, errno)));
            let log = VolatileLog::new(power.clone(), empty_log());
            let diff = VolatileDiff::new(power, vec![0; SIZE]);
            let base = MemoryBase::patterned(SIZE);
            let overlay = Overlay::from_files(log, diff, base.clone()).unwrap();
            let error = write(&overlay, 100, &[1; 4096], true).await.unwrap_err();
            assert_eq!(error.raw_os_error(), Some(errno.raw_os_error()), "step {at}");
            if at == 0 {
                assert!(read(&overlay, 0, SIZE).await == base.bytes, "no half block is seen");
            }
            assert_eq!(overlay.is_latched(), latches, "step {at}");
            assert_eq!(write(&overlay, 100, &[1; 4096], true).await.is_err(), latches, "step {at}");
            assert_eq!(overlay.flush().await.is_err(), latches, "step {at}");
        }
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flushes_that_arrive_together_share_a_sync() {
    let power = Power::new(usize::MAX, None);
    let log = VolatileLog::new(power.clone(), empty_log());
    let diff = VolatileDiff::new(power.clone(), vec![0; SIZE]);
    let overlay = Overlay::from_files(log, diff, MemoryBase::patterned(SIZE)).unwrap();
    overlay.flush().await.unwrap();
    write(&overlay, 0, &[1; 4096], false).await.unwrap();
    let progress = overlay.0.flusher.progress_for_test().await;
    let tasks: Vec<_> = (0..32)
        .map(|_| {
            tokio::spawn({
                let overlay = overlay.clone();
                async move { overlay.flush().await }
            })
        })
        .collect();
    tokio::task::yield_now().await;
    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    let before = power.steps.load(Ordering::SeqCst);
    drop(progress);
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    assert_eq!(
        power.steps.load(Ordering::SeqCst) - before,
        3,
        "one sync of the diff, one batch, one sync of the index"
    );
}
