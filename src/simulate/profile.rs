//! The boot that every node makes: the frames of its stream and when a local boot first asks for each.

use crate::boot_cache::Heads;

/// A frame of the simulated stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// Bytes on the wire.
    pub length: u32,
    /// When a local boot asks for it, in ms since its start; never less than the step before.
    pub due_ms: u64,
}

/// A boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    /// In stream order.
    pub steps: Vec<Step>,
    /// When a local boot is over, in ms since its start.
    pub end_ms: u64,
}

impl Profile {
    /// The recorded boot of a boot cache.
    pub fn of(heads: &Heads) -> Self {
        let mut due_ms = 0;
        let steps = heads.frames().iter().filter(|frame| frame.length > 0).map(|frame| {
            due_ms = due_ms.max(u64::from(frame.due_ms));
            Step { length: frame.length, due_ms }
        });
        let steps = steps.collect();
        Self { steps, end_ms: u64::from(heads.end_ms()).max(due_ms) }
    }

    /// A made-up boot of `end_ms` whose stream has `bytes` on the wire: as a Linux guest does, it asks for nearly half
    /// of them (kernel and initramfs) within a tenth of the time, and for the rest evenly.
    pub fn synthetic(bytes: u64, end_ms: u64) -> Self {
        let mut steps = Vec::new();
        let mut before = 0;
        while before < bytes {
            let length = match before {
                0..0x20_0000 => 64 << 10,
                0x20_0000..0x80_0000 => 128 << 10,
                _ => 256 << 10,
            };
            let length = (bytes - before).min(length);
            let share = before as f64 / bytes as f64;
            let part =
                if share < 0.45 { 0.05 + share / 0.45 * 0.1 } else { 0.15 + (share - 0.45) / 0.55 * 0.8 };
            let due_ms = (end_ms as f64 * part).round();
            steps.push(Step { length: u32::try_from(length).expect("a frame"), due_ms: as_ms(due_ms) });
            before += length;
        }
        Self { steps, end_ms }
    }

    /// Bytes on the wire.
    pub fn bytes(&self) -> u64 {
        self.steps.iter().map(|step| u64::from(step.length)).sum()
    }

    /// The least time for which a boot must wait over a link of `goodput` bytes a second, in ms: the stream begins with
    /// the boot and never pauses.
    pub fn waiting_min_ms(&self, goodput: u64) -> f64 {
        let mut sent = 0;
        let late = self.steps.iter().map(|step| {
            sent += u64::from(step.length);
            sent as f64 * 1000.0 / goodput.max(1) as f64 - step.due_ms as f64
        });
        late.fold(0.0, f64::max)
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "milliseconds of a boot")]
fn as_ms(value: f64) -> u64 {
    value as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_synthetic_boot_has_the_bytes_asked_for_in_order() {
        let profile = Profile::synthetic(100_000_000, 5000);
        assert_eq!(profile.bytes(), 100_000_000);
        assert!(profile.steps.windows(2).all(|pair| pair[0].due_ms <= pair[1].due_ms));
        assert!(profile.steps.last().unwrap().due_ms <= 5000);
        assert!(profile.waiting_min_ms(payload_of(100)) > 3000.0);
        assert_eq!(profile.waiting_min_ms(u64::MAX), 0.0);
    }

    fn payload_of(megabits: u64) -> u64 {
        super::super::payload(megabits)
    }
}
