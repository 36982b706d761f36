//! The overlay over a diff that is slow, and cannot do all that others can.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::io::Errno;
use tokio::runtime::Builder;

use super::tests::{MemoryBase, ROOT, read, runtime, write};
use super::*;

const SIZE: usize = 8 * 4096;

/// A diff that gives space back when it may, on a file system that makes zeroes only by writing them.
#[derive(Debug)]
struct OddDiff {
    diff: FileDiff,
    punching: Arc<Mutex<()>>,
}

impl DiffFile for OddDiff {
    fn try_read_at(&self, buf: &mut [u8], offset: u64) -> Attempt {
        self.diff.try_read_at(buf, offset)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.diff.read_at(buf, offset)
    }

    fn write_at(&self, parts: [&[u8]; 3], offset: u64) -> io::Result<()> {
        self.diff.write_at(parts, offset)
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        let _held = self.punching.lock().unwrap_or_else(PoisonError::into_inner);
        self.diff.punch(offset, length)
    }

    fn allocate_zeroes(&self, offset: u64, length: u64, fast: bool) -> io::Result<()> {
        if fast {
            return Err(Errno::OPNOTSUPP.into());
        }
        self.diff.allocate_zeroes(offset, length, false)
    }

    fn sync(&self) -> io::Result<()> {
        self.diff.sync()
    }

    fn read_ahead(&self, offset: u64, length: u64) -> io::Result<()> {
        self.diff.read_ahead(offset, length)
    }
}

/// An overlay over such a diff, and what holds its punches up.
fn odd(dir: &Path) -> (Overlay, Arc<Mutex<()>>) {
    Overlay::create(dir, ROOT, SIZE as u64).unwrap();
    let log = FileLog::open(&dir.join(INDEX_FILE)).unwrap();
    let punching = Arc::<Mutex<()>>::default();
    let diff =
        OddDiff { diff: FileDiff::open(&dir.join(DIFF_FILE)).unwrap(), punching: Arc::clone(&punching) };
    let base = MemoryBase::patterned(SIZE);
    (Overlay::from_files(Arc::new(log), Arc::new(diff), base).unwrap(), punching)
}

/// Once, each of them took a thread to wait on: no disk of the node could be flushed, or read from a device.
#[test]
fn trims_that_wait_for_each_other_leave_threads_for_other_overlays() {
    let mut runtime = Builder::new_multi_thread();
    let runtime = runtime.worker_threads(2).max_blocking_threads(TURNS + 2).enable_time().build().unwrap();
    let dirs = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let ((slow, punching), (other, _)) = (odd(dirs.0.path()), odd(dirs.1.path()));
    runtime.block_on(async {
        write(&slow, 0, &[1; 4096], false).await.unwrap();
        write(&other, 0, &[1; 4096], false).await.unwrap();
    });
    let held = punching.lock().unwrap();
    let flushed = runtime.block_on(async {
        for _ in 0..64 {
            let slow = slow.clone();
            tokio::spawn(async move { slow.trim(0, SIZE as u64, false).await });
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        tokio::time::timeout(Duration::from_secs(5), other.flush()).await
    });
    drop(held);
    flushed.expect("one overlay has all threads").unwrap();
}

#[test]
fn fast_zeroes_that_would_have_to_be_written_are_refused_before_anything_is_done() {
    let dir = tempfile::tempdir().unwrap();
    let (overlay, _) = odd(dir.path());
    runtime().block_on(async {
        write(&overlay, 0, &[1; SIZE], false).await.unwrap();
        // Parts of two blocks, and a whole one between them.
        let zero = |no_hole, fast| overlay.zero(100, 8192, ZeroFlags { no_hole, fast }, false);
        let refused = zero(true, true).await.unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(Errno::OPNOTSUPP.raw_os_error()));
        assert_eq!(read(&overlay, 0, SIZE).await, [1; SIZE]);
        for (no_hole, fast) in [(true, false), (false, true)] {
            write(&overlay, 0, &[1; SIZE], false).await.unwrap();
            zero(no_hole, fast).await.unwrap();
            let expected = [&[1; 100][..], &[0; 8192], &[1; SIZE - 8292]].concat();
            assert_eq!(read(&overlay, 0, SIZE).await, expected, "no hole: {no_hole}, fast: {fast}");
        }
    });
}
