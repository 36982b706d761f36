//! What a simulation came to.

use serde::Serialize;

/// The result of one run. Times are in ms since the first node began.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// The chooser's name.
    pub chooser: &'static str,
    /// Nodes that booted.
    pub booted: usize,
    /// Nodes that fell silent before.
    pub died: usize,
    /// Nodes that neither booted nor died: no source was left.
    pub stuck: usize,
    /// When the last guest was up.
    pub last_ms: f64,
    /// The least that this can be: the last start, a local boot, and the waiting that the link makes unavoidable.
    pub bound_ms: f64,
    /// Time from a node's start until its guest was up: half of the nodes took no longer.
    pub p50_ms: f64,
    /// 99 of 100 took no longer.
    pub p99_ms: f64,
    /// The longest.
    pub max_ms: f64,
    /// Bytes that the origin sent, in boot sets.
    pub origin_copies: f64,
    /// Bytes sent that were there already, as a share of all bytes that were needed.
    pub wasted: f64,
    /// Jain's index of the bytes that nodes sent: 1 when all sent the same.
    pub fairness: f64,
    /// Times that a node gave up on a source.
    pub failovers: u64,
    /// Times that a source was chosen.
    pub choices: u64,
}

/// `(Σx)² ÷ n·Σx²`; 1 for nothing.
pub(super) fn jain(values: &[f64]) -> f64 {
    let sum: f64 = values.iter().sum();
    let squares: f64 = values.iter().map(|value| value * value).sum();
    if squares == 0.0 { 1.0 } else { sum * sum / (values.len() as f64 * squares) }
}

/// The value that `percent` of the sorted `values` do not exceed; 0 for none.
pub(super) fn percentile(values: &[f64], percent: usize) -> f64 {
    let rank = (values.len() * percent).div_ceil(100).max(1);
    values.get(rank - 1).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fairness_and_percentiles() {
        assert_eq!(jain(&[2.0, 2.0, 2.0]), 1.0);
        assert_eq!(jain(&[1.0, 0.0, 0.0, 0.0]), 0.25);
        let values: Vec<f64> = (1..=200).map(f64::from).collect();
        assert_eq!([50, 99, 100].map(|percent| percentile(&values, percent)), [100.0, 198.0, 200.0]);
        assert_eq!(percentile(&[], 50), 0.0);
    }
}
