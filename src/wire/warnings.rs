//! Warnings of what arrives on a listener and makes no sense: one a second at most, so that a flood of it cannot fill
//! the log. Those that were not told are counted in the next one.

use std::fmt::Display;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::warn;

/// The time between two warnings.
const PAUSE: Duration = Duration::from_secs(1);
/// The most of a warning that is told, in characters; strangers choose some of them.
const LENGTH_MAX: usize = 240;

/// The warnings of one listener.
#[derive(Debug, Default)]
pub struct Warnings {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    last: Option<Instant>,
    untold: u64,
}

impl Warnings {
    /// Tells it, or counts it.
    pub fn tell(&self, what: impl Display) {
        match self.allow(Instant::now()) {
            None => {}
            Some(0) => warn!("{}", printable(&what)),
            Some(untold) => warn!("{} ({untold} more since the last warning)", printable(&what)),
        }
    }

    /// Whether to tell one now, and how many were not told since the last.
    fn allow(&self, now: Instant) -> Option<u64> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.last.is_some_and(|last| now.saturating_duration_since(last) < PAUSE) {
            state.untold += 1;
            return None;
        }
        state.last = Some(now);
        Some(std::mem::take(&mut state.untold))
    }
}

/// One line of bounded length, without control characters.
fn printable(what: &impl Display) -> String {
    let text = what.to_string();
    text.chars().take(LENGTH_MAX).map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_one_warning_a_second_and_counted() {
        let warnings = Warnings::default();
        let began = Instant::now();
        assert_eq!(warnings.allow(began), Some(0));
        for ms in 1..1000 {
            assert_eq!(warnings.allow(began + Duration::from_millis(ms)), None);
        }
        assert_eq!(warnings.allow(began + PAUSE), Some(999));
        assert_eq!(warnings.allow(began + 2 * PAUSE), Some(0));
    }

    #[test]
    fn what_strangers_chose_is_one_short_line() {
        let text = printable(&format!("a\nb\x1b[2J{}", "x".repeat(10_000)));
        assert!(text.starts_with("a?b?[2Jx") && text.len() == LENGTH_MAX, "{text}");
    }
}
