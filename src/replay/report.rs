//! What a replay came to.

use std::time::{Duration, Instant};

use serde::Serialize;

/// A read that was answered.
#[derive(Debug, Clone, Copy)]
pub(super) struct Answered {
    pub(super) sent: Instant,
    pub(super) ended: Instant,
}

/// The result of one replay. Times are in ms.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Reads played.
    pub reads: usize,
    /// Bytes read.
    pub bytes: u64,
    /// From the first moment until the boot was over.
    pub took_ms: f64,
    /// The same in the recording, at this speed.
    pub local_ms: f64,
    /// Time during which at least one read was waited for.
    pub waiting_ms: f64,
    /// Time to an answer: half of the reads took no longer.
    pub p50_ms: f64,
    /// 99 of 100 took no longer.
    pub p99_ms: f64,
    /// The longest.
    pub max_ms: f64,
    /// Bytes that were not those of the image.
    pub wrong_bytes: u64,
}

impl Report {
    pub(super) fn of(
        answered: &[Answered],
        started: Instant,
        took: Duration,
        local: Duration,
        bytes: u64,
        wrong_bytes: u64,
    ) -> Self {
        let mut times: Vec<f64> = answered.iter().map(|read| milliseconds(read.ended - read.sent)).collect();
        times.sort_by(f64::total_cmp);
        let percentile = |percent: usize| {
            let rank = (times.len() * percent).div_ceil(100).max(1);
            times.get(rank - 1).copied().unwrap_or(0.0)
        };
        Self {
            reads: answered.len(),
            bytes,
            took_ms: milliseconds(took),
            local_ms: milliseconds(local),
            waiting_ms: milliseconds(waiting(answered, started)),
            p50_ms: percentile(50),
            p99_ms: percentile(99),
            max_ms: percentile(100),
            wrong_bytes,
        }
    }
}

/// The length of the union of the times between question and answer.
fn waiting(answered: &[Answered], started: Instant) -> Duration {
    let mut spans: Vec<(Instant, Instant)> = answered.iter().map(|read| (read.sent, read.ended)).collect();
    spans.sort();
    let mut total = Duration::ZERO;
    let mut until = started;
    for (sent, ended) in spans {
        total += ended.saturating_duration_since(sent.max(until));
        until = until.max(ended);
    }
    total
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_counts_overlapping_reads_once() {
        let zero = Instant::now();
        let at = |ms| zero + Duration::from_millis(ms);
        let read = |sent, ended| Answered { sent: at(sent), ended: at(ended) };
        let reads = [read(10, 30), read(20, 25), read(50, 60), read(55, 70)];
        assert_eq!(waiting(&reads, zero), Duration::from_millis(40));
        let report = Report::of(&reads, zero, Duration::from_millis(80), Duration::from_millis(40), 9, 5);
        assert_eq!((report.reads, report.wrong_bytes, report.p99_ms), (4, 5, 20.0));
    }
}
