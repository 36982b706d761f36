//! Processor use from the counters that hypervisors keep: nanoseconds that an instance has used so far.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Instant;

use crate::name::HostName;

/// What the counters said at the last look, one entry for each instance that was looked at.
#[derive(Debug, Default)]
pub(super) struct CpuUse(Mutex<HashMap<HostName, (Instant, u64)>>);

impl CpuUse {
    /// Processors in use on average since the last look; 0 at the first, and after a restart of the instance.
    pub(super) fn since_last(&self, name: &HostName, now: Instant, used_ns: u64) -> f64 {
        let before = self.looks().insert(name.clone(), (now, used_ns));
        let Some((at, then)) = before else { return 0.0 };
        let elapsed = now.saturating_duration_since(at).as_secs_f64();
        if elapsed <= 0.0 || used_ns < then {
            return 0.0;
        }
        #[expect(clippy::cast_precision_loss, reason = "a share, not a count")]
        let used = (used_ns - then) as f64 / 1e9;
        used / elapsed
    }

    /// Forgets an instance.
    pub(super) fn forget(&self, name: &HostName) {
        self.looks().remove(name);
    }

    fn looks(&self) -> std::sync::MutexGuard<'_, HashMap<HostName, (Instant, u64)>> {
        self.0.lock().expect("nobody panics with the table")
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn use_is_what_was_added_since_the_last_look() {
        let (cpu, name, began) = (CpuUse::default(), "vm".parse().unwrap(), Instant::now());
        let look = |seconds, used_ns| cpu.since_last(&name, began + Duration::from_secs(seconds), used_ns);
        assert_eq!(look(0, 5_000_000_000), 0.0);
        assert_eq!(look(4, 7_000_000_000), 0.5);
        assert_eq!(look(4, 8_000_000_000), 0.0, "no time has passed");
        assert_eq!(look(5, 1_000_000_000), 0.0, "it was started again");
        cpu.forget(&name);
        assert_eq!(look(6, 2_000_000_000), 0.0);
    }
}
