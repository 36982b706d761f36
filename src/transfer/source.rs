//! One node that may be asked for an image: its connections, what it has, and how it has behaved.
//!
//! A task of its own connects, and connects again within two seconds for as long as the source is needed, so that reads
//! that wait go on soon after it is back.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use roaring::RoaringBitmap;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::choose::Has;
use crate::peer::connection::Connection;
use crate::peer::message::{HEARTBEAT, Have};

use super::counters::{Kind, PerKind};

/// Latency that is assumed of a source before it has answered anything.
const LATENCY_UNKNOWN: Duration = Duration::from_millis(150);
/// Who watches is told something at every [`HEARTBEAT`]; what is not heard for longer than that is silent.
const SILENT: Duration = HEARTBEAT.saturating_add(Duration::from_millis(250));
/// An answer is lost when it is late, and so many requests of its kind that were asked after it are answered.
const LOST_BEHIND: u64 = 4;
/// The least time after which an answer counts as late.
const LATE_MIN: Duration = Duration::from_millis(20);
/// A connection on which calls wait and nothing comes for so long stands still. Longer than a `HEARTBEAT`, so that one
/// where frames are waited for that its source does not have yet is not taken for it.
const STANDS_STILL: Duration = Duration::from_millis(600);

/// The connections to a source that is up. Guests' requests do not queue behind the stream's bytes.
#[derive(Debug, Clone)]
pub(super) struct Link {
    pub(super) urgent: Connection,
    pub(super) bulk: Connection,
}

impl Link {
    /// The connection for requests of `kind`.
    pub(super) const fn for_kind(&self, kind: Kind) -> &Connection {
        match kind {
            Kind::Demand | Kind::Tree => &self.urgent,
            Kind::Stream | Kind::Fill => &self.bulk,
        }
    }

    pub(super) fn close(&self) {
        self.urgent.close();
        self.bulk.close();
    }
}

/// What is known of a source now.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) link: Option<Link>,
    pub(super) key: Option<u64>,
    pub(super) node: String,
    pub(super) have: Have,
    pub(super) pages: RoaringBitmap,
    pub(super) banned_until: Option<Instant>,
    pub(super) demoted_until: Option<Instant>,
    /// The last attempt to connect to it failed.
    pub(super) unreachable: bool,
    /// Why it cannot be asked, for a person; none before it was tried, and while it can.
    pub(super) error: Option<String>,
    /// Its boot cache of the image is another one: of it, only blocks are of use.
    pub(super) other_boot: bool,
    latency: Option<Latency>,
    /// The best rate seen lately, in bytes a second.
    rate: f64,
}

/// Mean and deviation of the time to an answer, as TCP keeps its round-trip time (RFC 6298), in seconds.
#[derive(Debug, Clone, Copy)]
struct Latency {
    mean: f64,
    deviation: f64,
}

/// A node that may be asked.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) address: SocketAddr,
    /// Named by a person or the controller, and so never forgotten.
    pub(super) configured: AtomicBool,
    /// Whether it should be connected.
    needed: watch::Sender<bool>,
    state: Mutex<State>,
    /// Bytes that came from it.
    pub(super) bytes: PerKind,
    /// Bytes asked for and not come.
    pub(super) outstanding: AtomicU64,
    /// Requests without an answer.
    pub(super) requests: AtomicU32,
    /// Lies it was caught in.
    pub(super) corrupt: AtomicU64,
    order: [Order; Kind::ALL.len()],
}

/// In which order requests of one kind are answered.
#[derive(Debug, Default)]
struct Order {
    asked: AtomicU64,
    /// The last of those that were answered.
    answered: AtomicU64,
}

impl Source {
    pub(super) fn new(address: SocketAddr, configured: bool, needed: bool) -> Arc<Self> {
        Arc::new(Self {
            address,
            configured: AtomicBool::new(configured),
            needed: watch::Sender::new(needed),
            state: Mutex::new(State::default()),
            bytes: PerKind::default(),
            outstanding: AtomicU64::new(0),
            requests: AtomicU32::new(0),
            corrupt: AtomicU64::new(0),
            order: Default::default(),
        })
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn link(&self) -> Option<Link> {
        self.state().link.clone()
    }

    /// Whether it was late or is silent, so that it is asked only when nobody else will do.
    pub(super) fn is_in_doubt(&self) -> bool {
        let state = self.state();
        state.is_demoted() || state.is_silent()
    }

    /// Whether it is a relay, and says that it has boot frame `frame` by now.
    pub(super) fn has_relayed(&self, frame: u32) -> bool {
        let state = self.state();
        !state.have.complete && state.have.frames > frame
    }

    /// Whether nothing comes from it, not even the signs of life that it gives by itself: it has stalled, or is gone.
    pub(super) fn is_silent(&self) -> bool {
        self.state().is_silent()
    }

    pub(super) fn is_configured(&self) -> bool {
        self.configured.load(Ordering::Relaxed)
    }

    /// Says whether it should be connected.
    pub(super) fn need(&self, needed: bool) {
        self.needed.send_if_modified(|before| std::mem::replace(before, needed) != needed);
    }

    /// Ends when it should be connected, or should not be.
    pub(super) async fn until_needed(&self, needed: bool) {
        // The sender lives as long as this.
        let _ = self.needed.subscribe().wait_for(|now| *now == needed).await;
    }

    /// After which an answer of `bytes` to a request sent now is late: twice what is to be expected at the most, given
    /// what is queued before it.
    pub(super) fn late_after(&self, bytes: u64) -> Duration {
        let queued = (self.outstanding.load(Ordering::Relaxed) + bytes) as f64;
        let state = self.state();
        let Some(latency) = state.latency else { return 2 * LATENCY_UNKNOWN };
        let transfer = if state.rate > 0.0 { queued / state.rate } else { 0.0 };
        let expected = latency.mean + 3.0 * latency.deviation + transfer;
        Duration::from_secs_f64((2.0 * expected).min(60.0)).max(LATE_MIN)
    }

    /// Notes an answer of `bytes` that took `took`, with `queued` bytes before it.
    pub(super) fn note_answer(&self, bytes: u64, queued: u64, took: Duration) {
        let mut state = self.state();
        let took = took.as_secs_f64();
        if bytes >= 16 << 10 && took > 0.0 {
            // What was queued before it came over the same link in that time.
            let rate = (bytes + queued) as f64 / took;
            state.rate = if rate > state.rate { rate } else { state.rate * 0.98 + rate * 0.02 };
        }
        let transfer = if state.rate > 0.0 { (bytes + queued) as f64 / state.rate } else { 0.0 };
        let own = (took - transfer).max(0.0);
        state.latency = Some(match state.latency {
            None => Latency { mean: own, deviation: own / 2.0 },
            Some(Latency { mean, deviation }) => Latency {
                mean: mean + (own - mean) / 8.0,
                deviation: deviation + ((own - mean).abs() - deviation) / 4.0,
            },
        });
    }

    /// Notes that a request of `kind` is asked; its number, for [`Source::note_answered`] and [`Source::has_passed`].
    pub(super) fn note_asked(&self, kind: Kind) -> u64 {
        self.order[kind as usize].asked.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Notes that the request is answered.
    pub(super) fn note_answered(&self, kind: Kind, number: u64) {
        self.order[kind as usize].answered.fetch_max(number, Ordering::Relaxed);
    }

    /// Whether the request was passed by others that were asked after it.
    pub(super) fn has_passed(&self, kind: Kind, number: u64) -> bool {
        self.order[kind as usize].answered.load(Ordering::Relaxed) >= number + LOST_BEHIND
    }

    /// Watches the connection for `kind` until something comes, and makes it anew if it stands still: what else was
    /// asked on it is asked elsewhere then. One late answer is no reason: both connections end, and all that is asked.
    pub(super) fn hang_up_if_still(&self, kind: Kind) {
        let Some(link) = self.link() else { return };
        let (connection, address) = (link.for_kind(kind).clone(), self.address);
        let brought = connection.last_brought();
        tokio::spawn(async move {
            while connection.last_brought() == brought
                && let Some(still) = connection.stands_still()
            {
                if still >= STANDS_STILL {
                    tracing::info!(source = %address, seconds = still.as_secs_f32(), "a source stands still: connecting anew");
                    return connection.close();
                }
                tokio::time::sleep(STANDS_STILL - still).await;
            }
        });
    }

    /// Not to be used before others for `time`: it was slow.
    pub(super) fn demote(&self, time: Duration) {
        self.state().demoted_until = Some(Instant::now() + time);
    }

    /// Not to be used at all for `time`: it lied.
    pub(super) fn ban(&self, time: Duration) {
        let mut state = self.state();
        state.banned_until = Some(Instant::now() + time);
        if let Some(link) = state.link.take() {
            link.close();
        }
    }

    /// Whether it is of no use to wait for it: it cannot be reached, is banned, or has another boot cache.
    pub(super) fn cannot_be_asked(&self) -> bool {
        let state = self.state();
        state.unreachable
            || state.other_boot
            || state.banned_until.is_some_and(|until| until > Instant::now())
    }

    /// For how long it may not be spoken to.
    pub(super) fn banned_for(&self) -> Option<Duration> {
        let left = self.state().banned_until?.saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(left)
    }

    /// Whether it may not be spoken to.
    pub(super) fn is_banned(&self) -> bool {
        self.banned_for().is_some()
    }
}

impl State {
    pub(super) fn is_demoted(&self) -> bool {
        self.demoted_until.is_some_and(|until| until > Instant::now())
    }

    /// See [`Source::is_silent`].
    pub(super) fn is_silent(&self) -> bool {
        self.link.as_ref().is_some_and(|link| link.bulk.silence() > SILENT)
    }

    /// What it has of `page`; who has boot frame `frame` of the boot cache that is being fetched has blocks of it.
    pub(super) fn has_page(&self, page: u64, frame: Option<usize>) -> Has {
        let in_bitmap = u32::try_from(page).is_ok_and(|page| self.pages.contains(page));
        let in_frame = frame.is_some_and(|frame| !self.other_boot && frame < self.have.frames as usize);
        match self.have.complete {
            true => Has::Complete,
            false => Has::Answer(in_bitmap || in_frame),
        }
    }

    /// Takes what the source says it has. A bitmap that is not one counts as empty.
    pub(super) fn set_have(&mut self, have: Have) {
        if let Some(pages) = &have.pages {
            self.pages = match pages.is_empty() {
                true => RoaringBitmap::new(),
                false => RoaringBitmap::deserialize_from(&pages[..]).unwrap_or_default(),
            };
        }
        self.have = Have { pages: None, ..have };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_kept_until_others_are_told_and_what_is_no_bitmap_is_none() {
        let mut bytes = Vec::new();
        RoaringBitmap::from_iter([1, 2, 700]).serialize_into(&mut bytes).unwrap();
        let mut state = State::default();
        state.set_have(Have { pages: Some(bytes.clone()), frames: 1, ..Have::default() });
        state.set_have(Have { frames: 2, ..Have::default() });
        assert!(state.pages.contains(700) && state.have.frames == 2);
        bytes.truncate(bytes.len() - 1);
        state.set_have(Have { pages: Some(bytes), ..Have::default() });
        assert!(state.pages.is_empty());
        state.set_have(Have { pages: Some(Vec::new()), complete: true, ..Have::default() });
        assert!(state.pages.is_empty());
    }
}
