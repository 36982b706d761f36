//! Readers that wait for blocks, each woken by its own.
//!
//! When nobody waits, a write costs one load. A waiter registers first and looks at the bits again afterwards; a
//! writer sets bits first and looks for waiters afterwards; the fences between make one of the two see the other.

use std::sync::atomic::{AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::block::Extent;

#[derive(Debug)]
struct Waiter {
    extent: Extent,
    wake: Arc<Notify>,
    /// When it came, or got the last of its blocks so far.
    since: Instant,
}

/// The readers of one image that wait.
#[derive(Debug, Default)]
pub(super) struct Waiters {
    count: AtomicUsize,
    list: Mutex<Vec<Waiter>>,
}

/// A place among the waiters; given up when dropped.
#[derive(Debug)]
pub(super) struct Waiting<'a> {
    waiters: &'a Waiters,
    wake: Arc<Notify>,
}

impl Waiters {
    fn list(&self) -> MutexGuard<'_, Vec<Waiter>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers interest in `extent`. The caller looks whether it is present after this, and before it waits.
    pub(super) fn register(&self, extent: Extent) -> Waiting<'_> {
        let wake = Arc::new(Notify::new());
        self.list().push(Waiter { extent, wake: Arc::clone(&wake), since: Instant::now() });
        self.count.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        Waiting { waiters: self, wake }
    }

    /// Wakes those whose blocks are among `extent`. The bits have been set before.
    pub(super) fn wake(&self, extent: Extent) {
        fence(Ordering::SeqCst);
        if self.count.load(Ordering::SeqCst) == 0 {
            return;
        }
        for waiter in self.list().iter_mut() {
            if waiter.extent.start < extent.end() && extent.start < waiter.extent.end() {
                waiter.since = Instant::now();
                waiter.wake.notify_one();
            }
        }
    }

    /// Whether a reader waits that came, or got a block, less than `limit` ago.
    pub(super) fn any_since(&self, limit: Duration) -> bool {
        self.count.load(Ordering::SeqCst) > 0
            && self.list().iter().any(|waiter| waiter.since.elapsed() < limit)
    }

    /// The extents that are waited for now, in the order in which the readers came.
    pub(super) fn wanted(&self) -> Vec<Extent> {
        if self.count.load(Ordering::SeqCst) == 0 {
            return Vec::new();
        }
        self.list().iter().map(|waiter| waiter.extent).collect()
    }
}

impl Waiting<'_> {
    /// Ends when some block of the extent has come since the last call, or since registration.
    pub(super) async fn woken(&self) {
        self.wake.notified().await;
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut list = self.waiters.list();
        if let Some(at) = list.iter().position(|waiter| Arc::ptr_eq(&waiter.wake, &self.wake)) {
            list.remove(at);
            self.waiters.count.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_reader_is_woken_by_its_own_blocks_and_by_no_others() {
        let waiters = Waiters::default();
        let waiting = waiters.register(Extent::new(10, 5));
        waiters.wake(Extent::new(0, 10));
        waiters.wake(Extent::new(15, 1));
        assert!(tokio::time::timeout(Duration::from_secs(1), waiting.woken()).await.is_err());
        waiters.wake(Extent::new(14, 1));
        waiting.woken().await;
        assert_eq!(waiters.wanted(), [Extent::new(10, 5)]);
        drop(waiting);
        assert!(waiters.wanted().is_empty());
    }
    #[tokio::test(start_paused = true)]
    async fn a_reader_to_whom_nothing_comes_is_told_from_one_who_is_served() {
        let (waiters, limit) = (Waiters::default(), Duration::from_secs(5));
        assert!(!waiters.any_since(limit));
        let _waiting = waiters.register(Extent::new(10, 5));
        tokio::time::advance(Duration::from_secs(4)).await;
        waiters.wake(Extent::new(12, 1));
        tokio::time::advance(Duration::from_secs(4)).await;
        assert!(waiters.any_since(limit), "it got a block");
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(!waiters.any_since(limit));
        let _another = waiters.register(Extent::new(10, 5));
        assert!(waiters.any_since(limit));
    }
}
