//! What a node itself sees of a source: how much it has asked and not got, how quick the answers were, what failed.
//!
//! A report is seconds old and the same for everybody, so that a herd follows the lowest number. This is fresh and each
//! node's own. Plain data: its owner calls it at each request, answer and failure.

/// What was seen of one source.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Seen {
    /// Requests without an answer yet.
    pub outstanding: u32,
    /// Mean time to an answer in ms, the recent ones counting most; 0 before the first.
    pub latency_ms: f32,
    /// Failures that no success has made good: resets, refusals, deadlines missed.
    pub failures: u32,
    /// Not to be chosen before this time, in ms of the owner's clock: it stalled, or is banned.
    pub resting_until_ms: u64,
}

/// How much the newest answer counts in the mean.
const NEWEST: f32 = 0.2;
/// What a request in the queue costs, in units of the load score.
const OUTSTANDING_COST: f32 = 0.1;
/// The latency that costs as much as a whole load score.
const LATENCY_FULL_MS: f32 = 500.0;
/// What a failure costs, in units of the load score.
const FAILURE_COST: f32 = 0.5;
/// The rest after a first failure; it doubles with each further one after that.
const REST_MS: u64 = 250;
const REST_DOUBLINGS_MAX: u32 = 7;

impl Seen {
    /// A request was sent.
    pub fn asked(&mut self) {
        self.outstanding += 1;
    }

    /// A good answer came after `took_ms`.
    pub fn answered(&mut self, took_ms: f32) {
        self.outstanding = self.outstanding.saturating_sub(1);
        self.failures /= 2;
        let first = self.latency_ms == 0.0;
        self.latency_ms = if first { took_ms } else { self.latency_ms * (1.0 - NEWEST) + took_ms * NEWEST };
    }

    /// A request failed or was given up at `now_ms`: the source rests for 250 ms, doubling to 32 s. What fails while it
    /// rests has the same cause, as when a connection breaks with many requests on it, and counts no more.
    pub fn failed(&mut self, now_ms: u64) {
        self.outstanding = self.outstanding.saturating_sub(1);
        if self.is_ready(now_ms) {
            self.rest(now_ms, REST_MS << self.failures.min(REST_DOUBLINGS_MAX));
            self.failures += 1;
        }
    }

    /// The source is not to be chosen for `duration_ms` from `now_ms` on: a ban, or it asked for it.
    pub fn rest(&mut self, now_ms: u64, duration_ms: u64) {
        self.resting_until_ms = self.resting_until_ms.max(now_ms.saturating_add(duration_ms));
    }

    /// Whether it may be chosen at `now_ms`.
    pub const fn is_ready(&self, now_ms: u64) -> bool {
        self.resting_until_ms <= now_ms
    }

    /// What is to be added to its load score.
    pub fn cost(&self) -> f32 {
        self.outstanding as f32 * OUTSTANDING_COST
            + (self.latency_ms / LATENCY_FULL_MS).min(4.0)
            + self.failures as f32 * FAILURE_COST
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_that_fails_rests_longer_each_time_and_is_forgiven() {
        let mut seen = Seen::default();
        seen.asked();
        seen.failed(1000);
        assert!(!seen.is_ready(1249) && seen.is_ready(1250));
        seen.failed(2000);
        assert!(!seen.is_ready(2499) && seen.is_ready(2500));
        let bad = seen.cost();
        seen.answered(1.0);
        seen.answered(1.0);
        assert!(seen.cost() < bad && seen.failures == 0);
        let mut now_ms = 10_000;
        for _ in 0..100 {
            seen.failed(now_ms);
            assert!(seen.resting_until_ms <= now_ms + (REST_MS << REST_DOUBLINGS_MAX));
            now_ms = seen.resting_until_ms;
        }
    }

    /// A broken connection with eight requests on it cost its source half a minute.
    #[test]
    fn what_fails_together_counts_once() {
        let mut seen = Seen::default();
        for _ in 0..20 {
            seen.failed(1000);
        }
        assert!(!seen.is_ready(1249) && seen.is_ready(1250));
        seen.failed(1250);
        assert!(!seen.is_ready(1749) && seen.is_ready(1750));
    }

    #[test]
    fn queue_and_latency_cost() {
        let quick = Seen { latency_ms: 2.0, ..Seen::default() };
        let slow = Seen { latency_ms: 300.0, ..Seen::default() };
        let queued = Seen { outstanding: 5, ..quick };
        assert!(quick.cost() < queued.cost() && quick.cost() < slow.cost());
    }
}
