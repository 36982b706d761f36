//! A node of the simulation: what it has, what it has asked for, and how far its guest is.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::profile::Profile;
use crate::choose::relay::patience;
use crate::choose::{Draw, PeerKey, Seen};

/// For how long a source that was late is asked only when nobody else will do; as in `transfer::engine`.
const DEMOTION_MS: u64 = 30_000;

/// A request that has not been answered.
#[derive(Debug, Clone)]
pub(super) struct Ask {
    pub(super) frame: u32,
    pub(super) source: u32,
    /// The one that was asked as well, because the first is late.
    pub(super) second: Option<u32>,
    pub(super) at_ns: u64,
    /// Since when the source is known to have it.
    pub(super) there_ns: Option<u64>,
    /// Who was asked before, and now.
    pub(super) tried: Vec<PeerKey>,
}

/// Where a node is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Life {
    NotStarted,
    Up,
    /// Sends and receives nothing, and nobody has told the others.
    Silent,
}

/// A set of frames.
#[derive(Debug, Clone)]
pub(super) struct Frames(Vec<u64>);

impl Frames {
    fn new(count: usize) -> Self {
        Self(vec![0; count.div_ceil(64)])
    }

    pub(super) fn contains(&self, frame: u32) -> bool {
        self.0[frame as usize / 64] >> (frame % 64) & 1 == 1
    }

    /// Whether it was not there before.
    pub(super) fn insert(&mut self, frame: u32) -> bool {
        let word = &mut self.0[frame as usize / 64];
        let new = *word >> (frame % 64) & 1 == 0;
        *word |= 1 << (frame % 64);
        new
    }
}

/// One node. Number 0 is the origin, which has everything and boots nothing.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) key: PeerKey,
    pub(super) life: Life,
    pub(super) started_ns: u64,
    pub(super) have: Frames,
    /// The first frame that is missing.
    pub(super) position: u32,
    /// What the others know of the position.
    pub(super) told_position: u32,
    /// Load of the link, as last reported.
    pub(super) told_load: f32,
    /// The first frame that was never asked for.
    pub(super) next: u32,
    /// Bytes that were asked for and have not come.
    pub(super) ahead: u64,
    pub(super) asks: Vec<Ask>,
    /// Frames to send, with the node each goes to: the lowest goes first, whoever asked for it.
    pub(super) queue: BTreeSet<(u32, u32)>,
    pub(super) sending: bool,
    /// Bytes of the frames in `queue` and `waiting`.
    pub(super) backlog: u64,
    /// Nodes that wait for a frame that is not here yet.
    pub(super) waiting: Vec<(u32, u32)>,
    pub(super) seen: BTreeMap<u32, Seen>,
    pub(super) draw: Draw,
    pub(super) sent: u64,
    /// Requests, and those of them that were hedges.
    pub(super) asked: u64,
    pub(super) hedges: u64,
    /// Mean time to an answer.
    latency_ns: u64,
    pub(super) died_ns: u64,
    /// When the guest will ask for the frame at the position.
    guest_ns: u64,
    /// When the guest was up.
    pub(super) booted_ns: Option<u64>,
}

impl Node {
    pub(super) fn new(key: PeerKey, frames: usize, seed: u64) -> Self {
        Self {
            key,
            life: Life::NotStarted,
            started_ns: 0,
            have: Frames::new(frames),
            position: 0,
            told_position: 0,
            told_load: 0.0,
            next: 0,
            ahead: 0,
            asks: Vec::new(),
            queue: BTreeSet::new(),
            sending: false,
            backlog: 0,
            waiting: Vec::new(),
            seen: BTreeMap::new(),
            draw: Draw::new(seed),
            sent: 0,
            asked: 0,
            hedges: 0,
            latency_ns: 0,
            died_ns: 0,
            guest_ns: 0,
            booted_ns: None,
        }
    }

    /// It begins to fetch now; its guest starts at `guest_ns`.
    pub(super) fn start(&mut self, profile: &Profile, now_ns: u64, guest_ns: u64) {
        self.life = Life::Up;
        self.started_ns = now_ns;
        self.guest_ns = guest_ns + profile.steps.first().map_or(0, |step| step.due_ms * 1_000_000);
    }

    /// Whether `frame` is new here. The position and the guest move on.
    pub(super) fn store(&mut self, profile: &Profile, frame: u32, now_ns: u64) -> bool {
        if !self.have.insert(frame) {
            return false;
        }
        let count = profile.steps.len();
        self.ahead = self.ahead.saturating_sub(u64::from(profile.steps[frame as usize].length));
        while (self.position as usize) < count && self.have.contains(self.position) {
            let step = profile.steps[self.position as usize];
            let next_due_ms =
                profile.steps.get(self.position as usize + 1).map_or(profile.end_ms, |s| s.due_ms);
            self.guest_ns = self.guest_ns.max(now_ns) + (next_due_ms - step.due_ms) * 1_000_000;
            self.position += 1;
        }
        if self.position as usize == count {
            self.booted_ns = Some(self.guest_ns);
        }
        true
    }

    /// Takes back the request for `frame`, which has come.
    pub(super) fn take_ask(&mut self, frame: u32) -> Option<Ask> {
        let at = self.asks.iter().position(|ask| ask.frame == frame)?;
        Some(self.asks.swap_remove(at))
    }

    /// `source` has answered after `took_ns`.
    pub(super) fn answered(&mut self, source: u32, took_ns: u64) {
        self.latency_ns = if self.latency_ns == 0 { took_ns } else { (self.latency_ns * 7 + took_ns) / 8 };
        self.seen.entry(source).or_default().answered(took_ns as f32 / 1e6);
    }

    /// For how long a source is waited for.
    pub(super) fn patience(&self) -> Duration {
        patience(Duration::from_nanos(self.latency_ns))
    }

    /// `source` was late: it is asked when nobody else will do.
    pub(super) fn demote(&mut self, source: u32, now_ns: u64) {
        self.seen.entry(source).or_default().rest(now_ns / 1_000_000, DEMOTION_MS);
    }

    /// Whether `source` was late here lately.
    pub(super) fn rests(&self, source: u32, now_ns: u64) -> bool {
        self.seen.get(&source).is_some_and(|seen| !seen.is_ready(now_ns / 1_000_000))
    }

    /// `node` does not wait for `frame` any more, of `length`, if it is not on its way.
    pub(super) fn cancel(&mut self, frame: u32, node: u32, length: u32) {
        let before = self.waiting.len();
        self.waiting.retain(|waiting| *waiting != (frame, node));
        if self.queue.remove(&(frame, node)) || self.waiting.len() < before {
            self.backlog -= u64::from(length);
        }
    }
}
