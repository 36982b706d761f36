//! Whether a file may be written inline, on the task of a connection, or should be by a thread that may block.
//!
//! A write into the page cache takes microseconds until something makes it wait: too many dirty pages, the lock of a file
//! in which a long range is just being zeroed, a page that has to be read first. The kernel can be asked beforehand
//! on few file systems only (`RWF_NOWAIT`; ext4 refuses it for buffered writes). So what is known to take long is counted,
//! and a file that was slow is taken for slow a little longer, so that it holds worker threads up once in [`PAUSE`] at most.

use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::disk::Attempt;

/// A write that took longer than this has waited for something.
const SLOW: Duration = Duration::from_millis(5);
/// For so long after such a write, none is tried inline.
const PAUSE: Duration = Duration::from_millis(100);

/// Inline writes to one file.
#[derive(Debug)]
pub struct InlineWrites {
    began: Instant,
    /// Operations that run now and keep writes waiting.
    long: AtomicUsize,
    /// Microseconds after `began`.
    pause_until: AtomicU64,
}

impl Default for InlineWrites {
    fn default() -> Self {
        Self { began: Instant::now(), long: AtomicUsize::new(0), pause_until: AtomicU64::new(0) }
    }
}

/// An operation that keeps writes waiting, for as long as this lives.
#[derive(Debug)]
pub struct LongOperation<'a>(&'a InlineWrites);

impl Drop for LongOperation<'_> {
    fn drop(&mut self) {
        self.0.long.fetch_sub(1, Ordering::Release);
    }
}

impl InlineWrites {
    /// Carries `write` out, unless it is likely to wait.
    pub fn attempt(&self, write: impl FnOnce() -> io::Result<()>) -> Attempt {
        let start = self.began.elapsed();
        if self.would_wait(start) {
            return Attempt::WouldBlock;
        }
        let result = write();
        self.note(start, self.began.elapsed());
        Attempt::Ready(result)
    }

    /// Begins an operation that holds the file's lock for long: punching or zeroing a range.
    pub fn long(&self) -> LongOperation<'_> {
        self.long.fetch_add(1, Ordering::Acquire);
        LongOperation(self)
    }

    fn would_wait(&self, now: Duration) -> bool {
        self.long.load(Ordering::Acquire) > 0 || micros(now) < self.pause_until.load(Ordering::Relaxed)
    }

    fn note(&self, start: Duration, end: Duration) {
        if end - start > SLOW {
            self.pause_until.store(micros(end + PAUSE), Ordering::Relaxed);
        }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_written_inline_while_a_long_operation_runs() {
        let inline = InlineWrites::default();
        let (first, second) = (inline.long(), inline.long());
        let write = || unreachable!("it would wait");
        assert!(matches!(inline.attempt(write), Attempt::WouldBlock));
        drop(first);
        assert!(matches!(inline.attempt(write), Attempt::WouldBlock));
        drop(second);
        assert!(matches!(inline.attempt(|| Ok(())), Attempt::Ready(Ok(()))));
    }

    #[test]
    fn a_slow_write_keeps_others_away_for_a_while() {
        let (inline, at) = (InlineWrites::default(), Duration::from_millis);
        inline.note(at(10), at(14));
        assert!(!inline.would_wait(at(14)));
        inline.note(at(20), at(30));
        assert!(inline.would_wait(at(30)) && inline.would_wait(at(129)));
        assert!(!inline.would_wait(at(130)));
    }
}
