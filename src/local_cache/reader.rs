//! Where the time of reads went: counted for the image as a whole, and for each VM by a [`Reader`] of its own.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bootcache_nbd::disk::{Attempt, BoxFuture, Disk, Features, FileRange, StatusExtent};
use tokio::time::Instant;

use super::{Coming, LocalCache};

/// Where the time and the bytes of reads went. Times are in microseconds.
#[derive(Debug, Default)]
pub struct ReadCounters {
    /// Reads that found all their blocks here.
    pub hits: AtomicU64,
    /// Reads that waited for the stream.
    pub stream_waits: AtomicU64,
    /// How long they waited, summed over reads.
    pub stream_wait_us: AtomicU64,
    /// Reads that waited for a fetch of their own, misses included.
    pub demand_waits: AtomicU64,
    /// How long they waited, summed over reads.
    pub demand_wait_us: AtomicU64,
    /// Reads that the boot cache did not foresee.
    pub misses: AtomicU64,
    /// How long reads took from this node's own disk after their blocks were here, summed over reads.
    pub local_us: AtomicU64,
    /// Bytes read.
    pub bytes: AtomicU64,
    blocked: Mutex<Blocked>,
}

/// The time in which at least one read waited.
#[derive(Debug, Default)]
struct Blocked {
    waiting: u64,
    since: Option<Instant>,
    before: Duration,
}

impl ReadCounters {
    fn blocked(&self) -> MutexGuard<'_, Blocked> {
        self.blocked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads that wait now.
    pub fn waiting(&self) -> u64 {
        self.blocked().waiting
    }

    /// How long at least one read was waiting for absent blocks: what a guest that reads one thing after the other
    /// lost.
    pub fn blocked_for(&self) -> Duration {
        let blocked = self.blocked();
        blocked.before + blocked.since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// A read waits until the guard is dropped.
    pub(super) fn begin_wait(&self) -> WaitGuard<'_> {
        let mut blocked = self.blocked();
        blocked.waiting += 1;
        blocked.since.get_or_insert_with(Instant::now);
        WaitGuard(self)
    }

    /// Counts one read of `bytes` that `waited`.
    pub(super) fn count(&self, bytes: usize, waited: Option<(Coming, Duration)>) {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        let Some((coming, time)) = waited else {
            self.hits.fetch_add(1, Ordering::Relaxed);
            return;
        };
        let (number, sum) = match coming {
            Coming::Stream => (&self.stream_waits, &self.stream_wait_us),
            Coming::Demand | Coming::Miss => (&self.demand_waits, &self.demand_wait_us),
        };
        number.fetch_add(1, Ordering::Relaxed);
        sum.fetch_add(micros(time), Ordering::Relaxed);
        if coming == Coming::Miss {
            self.misses.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// A read that waits.
#[derive(Debug)]
pub(super) struct WaitGuard<'a>(&'a ReadCounters);

impl Drop for WaitGuard<'_> {
    fn drop(&mut self) {
        let mut blocked = self.0.blocked();
        blocked.waiting -= 1;
        if blocked.waiting == 0
            && let Some(since) = blocked.since.take()
        {
            blocked.before += since.elapsed();
        }
    }
}

/// The cache as one VM reads it: the same blocks, and where the time of this VM's reads went.
#[derive(Debug)]
pub struct Reader {
    cache: Arc<LocalCache>,
    counters: ReadCounters,
}

impl Reader {
    /// A reader that has read nothing yet.
    pub fn new(cache: Arc<LocalCache>) -> Self {
        Self { cache, counters: ReadCounters::default() }
    }

    /// Where the time of this reader's reads went.
    pub const fn counters(&self) -> &ReadCounters {
        &self.counters
    }
}

impl Disk for Reader {
    fn size(&self) -> u64 {
        self.cache.size
    }

    fn features(&self) -> Features {
        self.cache.features()
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Attempt {
        let attempt = self.cache.try_read(offset, buf);
        if matches!(attempt, Attempt::Ready(Ok(()))) {
            self.counters.count(buf.len(), None);
        }
        attempt
    }

    fn in_file(&self, offset: u64, length: usize) -> Option<FileRange> {
        self.cache.in_file(offset, length)
    }

    fn note_read(&self, offset: u64, length: usize) {
        self.cache.note_read(offset, length);
        self.counters.count(length, None);
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async move {
            let waited = {
                let _waiting = self.counters.begin_wait();
                self.cache.wait_for(offset, buf.len() as u64).await?
            };
            self.counters.count(buf.len(), waited);
            let began = Instant::now();
            self.cache.read_present(offset, buf).await?;
            self.counters.local_us.fetch_add(micros(began.elapsed()), Ordering::Relaxed);
            Ok(())
        })
    }

    fn contexts(&self) -> &'static [&'static str] {
        self.cache.contexts()
    }

    fn status(
        &self,
        context: &str,
        offset: u64,
        length: u64,
        extents_max: usize,
    ) -> BoxFuture<'_, io::Result<Vec<StatusExtent>>> {
        self.cache.status(context, offset, length, extents_max)
    }

    fn prefetch(&self, offset: u64, length: u64) -> BoxFuture<'_, io::Result<()>> {
        self.cache.prefetch(offset, length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn time_in_which_two_reads_wait_is_counted_once() {
        let counters = ReadCounters::default();
        let pause = |ms| tokio::time::sleep(Duration::from_millis(ms));
        let first = counters.begin_wait();
        pause(100).await;
        let second = counters.begin_wait();
        pause(50).await;
        drop(first);
        pause(30).await;
        assert_eq!((counters.waiting(), counters.blocked_for().as_millis()), (1, 180));
        drop(second);
        pause(1000).await;
        let _third = counters.begin_wait();
        pause(20).await;
        assert_eq!(counters.blocked_for().as_millis(), 200);
    }
}
