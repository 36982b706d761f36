//! What guests do with the images that arrive at a node: the fill of each image makes way for the guests of all.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::time::Instant;

use super::engine::Shared;

/// A guest to whom nothing came for so long waits for what nobody gives: the fills go on beside it.
const WAIT_MAX: Duration = Duration::from_secs(5);
/// A guest that has read nothing of the boot cache for so long does not boot; it had come near the boot cache's end.
const BOOT_GAP: Duration = Duration::from_secs(1);
/// The same, when it had not: on a busy host a guest computes for seconds between two reads.
const BOOT_PAUSE: Duration = Duration::from_secs(5);
/// Near the end: this share of the boot cache's frames.
const NEAR_END: f64 = 0.9;
/// How long what was seen of all images holds: every fill asks for each of its requests.
const LOOK: Duration = Duration::from_millis(5);

/// The guests that read images which arrive at this node; one for all its transfers.
#[derive(Debug, Default)]
pub struct Guests(Mutex<Seen>);

#[derive(Debug, Default)]
struct Seen {
    images: Vec<Weak<Shared>>,
    at: Option<Instant>,
    waits: bool,
    boots: bool,
}

impl Guests {
    /// The guests of `image` count too, as long as there is its transfer.
    pub(super) fn add(&self, image: &Arc<Shared>) {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        seen.images.retain(|image| image.strong_count() > 0);
        seen.images.push(Arc::downgrade(image));
    }

    /// Whether one waits for what somebody may give.
    pub(super) fn wait(&self) -> bool {
        self.look(|seen| seen.waits)
    }

    /// Whether one boots.
    pub(super) fn boot(&self) -> bool {
        self.look(|seen| seen.boots)
    }

    fn look(&self, of: impl Fn(&Seen) -> bool) -> bool {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if seen.at.is_none_or(|at| now.duration_since(at) >= LOOK) {
            let (mut waits, mut boots) = (false, false);
            seen.images.retain(|image| {
                let Some(image) = image.upgrade() else { return false };
                waits |= guest_waits(&image);
                boots |= image.boot.lock().unwrap_or_else(PoisonError::into_inner).look(&image, now);
                true
            });
            (seen.at, seen.waits, seen.boots) = (Some(now), waits, boots);
        }
        of(&seen)
    }
}

/// Whether a guest of `image` waits for what somebody may give.
pub(super) fn guest_waits(image: &Shared) -> bool {
    image.cache.waits_since(WAIT_MAX) && image.sources.any_up()
}

/// Whether a guest boots from an image: it reads blocks that the boot cache foresaw. One that has booted has them in its
/// memory.
#[derive(Debug, Default)]
pub(super) struct Boot {
    /// Bytes that guests had read when last looked.
    bytes: u64,
    last: Option<Instant>,
    /// How far into the boot cache a guest has come since it began to boot, 0 to 1.
    furthest: f64,
}

impl Boot {
    fn look(&mut self, image: &Shared, now: Instant) -> bool {
        let bytes = image.cache.counters().bytes.load(std::sync::atomic::Ordering::Relaxed);
        let reads = std::mem::replace(&mut self.bytes, bytes) != bytes;
        let foreseen = || {
            let heads = image.holding.frames()?.heads();
            let frame = heads.position(image.cache.last_read())?;
            Some((frame + 1) as f64 / heads.frames().len() as f64)
        };
        self.note(now, if reads { foreseen() } else { None })
    }

    /// At `now` a guest has just read what the boot cache foresaw, so far into it, or nothing of it. Whether one boots.
    fn note(&mut self, now: Instant, reached: Option<f64>) -> bool {
        if let Some(reached) = reached {
            self.last = Some(now);
            self.furthest = self.furthest.max(reached);
        }
        let pause = if self.furthest < NEAR_END { BOOT_PAUSE } else { BOOT_GAP };
        let boots = self.last.is_some_and(|last| now.duration_since(last) < pause);
        if !boots {
            self.furthest = 0.0;
        }
        boots
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_guest_boots_while_it_reads_what_was_foreseen() {
        let now = Instant::now();
        let at = |seconds: f64| now + Duration::from_secs_f64(seconds);
        let mut boot = Boot::default();
        assert!(!boot.note(at(0.0), None), "nobody has read");
        assert!(boot.note(at(0.1), Some(0.1)));
        assert!(boot.note(at(4.9), None), "it computes");
        assert!(boot.note(at(5.0), Some(0.95)));
        assert!(boot.note(at(5.9), None), "a pause of a boot");
        assert!(!boot.note(at(6.2), None), "it has booted");
        assert!(boot.note(at(10.0), Some(0.2)), "another one");
        assert!(!boot.note(at(15.1), None), "it was ended");
    }
}
