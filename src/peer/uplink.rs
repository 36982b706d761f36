//! How far a node is behind with what it has promised to send: the load of its link as it tells others.
//!
//! In a burst every link is in use all the time; what tells a slow node from the others is its backlog, in time at the
//! rate that its link has shown (`crate::choose::relay::backlog_load`).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::choose::relay::{backlog_load, is_full_load};

/// Bytes sent are made a rate over so long.
const INTERVAL: Duration = Duration::from_millis(100);
/// A link that only carried little is not slow: the best rate lately counts, so many hundredths of it each interval.
const FADE_PERCENT: u64 = 98;
/// Where utilisation alone stops: a link in use is not yet one that is behind.
const IN_USE_MAX: f32 = 0.98;

/// A node's promises to send, over all connections. Shared by its peer server and those who tell of it.
#[derive(Debug)]
pub struct Uplink {
    backlog: AtomicU64,
    sent: AtomicU64,
    pace: Mutex<Pace>,
}

#[derive(Debug)]
struct Pace {
    at: Instant,
    sent: u64,
    /// Bytes a second.
    rate: u64,
}

/// Bytes that were promised; off the account when dropped, sent or not.
#[derive(Debug)]
pub(super) struct Promise {
    uplink: Arc<Uplink>,
    bytes: u64,
}

impl Default for Uplink {
    fn default() -> Self {
        let pace = Pace { at: Instant::now(), sent: 0, rate: 0 };
        Self { backlog: AtomicU64::new(0), sent: AtomicU64::new(0), pace: Mutex::new(pace) }
    }
}

impl Uplink {
    /// `bytes` are to be sent.
    pub(super) fn promise(self: &Arc<Self>, bytes: u64) -> Promise {
        self.backlog.fetch_add(bytes, Ordering::Relaxed);
        Promise { uplink: Arc::clone(self), bytes }
    }

    /// `bytes` were taken by a socket.
    pub(super) fn sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Ordering::Relaxed);
    }

    /// The load of the link, of which `in_use` is the share that the kernel counted, from 0 to 1.
    pub fn load(&self, in_use: f32) -> f32 {
        let rate = {
            let mut pace = self.pace.lock().unwrap_or_else(PoisonError::into_inner);
            let took = pace.at.elapsed();
            if took >= INTERVAL {
                let sent = self.sent.load(Ordering::Relaxed);
                let took_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(1);
                let now = (sent - pace.sent).saturating_mul(1_000_000) / took_us;
                *pace = Pace { at: Instant::now(), sent, rate: now.max(pace.rate / 100 * FADE_PERCENT) };
            }
            pace.rate
        };
        let in_use = in_use.min(IN_USE_MAX);
        if rate == 0 {
            return in_use;
        }
        in_use.max(backlog_load(self.backlog.load(Ordering::Relaxed), rate))
    }
}

impl Uplink {
    /// Whether others should be asked instead.
    pub fn is_full(&self) -> bool {
        is_full_load(self.load(0.0))
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        self.uplink.backlog.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_node_is_full_when_its_promises_take_a_quarter_of_a_second() {
        let uplink = Arc::new(Uplink::default());
        assert_eq!(uplink.load(0.3), 0.3);
        for _ in 0..10 {
            tokio::time::advance(INTERVAL).await;
            uplink.sent(10_000_000);
            uplink.load(0.0);
        }
        // 100 MB a second: a quarter of a second is 25 MB. However much the link is in use, that alone is not full.
        assert!(!is_full_load(uplink.load(1.0)));
        let first = uplink.promise(12_500_000);
        assert!((0.45..0.6).contains(&uplink.load(0.0)), "{}", uplink.load(0.0));
        let second = uplink.promise(13_000_000);
        assert!(uplink.is_full());
        drop((first, second));
        assert_eq!(uplink.load(0.1), 0.1);
    }
}
