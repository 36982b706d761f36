//! The relay topology: who asks whom for which frame of the boot stream when many nodes start at once.
//!
//! # The problem
//!
//! N nodes want the same stream, in order, now; at first only the origin has it, and every link carries B in each
//! direction. Whoever takes the least loaded source that *has* a frame builds a star: only the origin has anything. A
//! tree over whole streams leaves the links of its leaves unused, halves the rate at each fork of two, and hangs
//! everybody below a slow node. A chain adds up its hops. To give all nodes the stream at rate B while the origin sends
//! it once, every node must send as much as it receives, all the time.
//!
//! # The topology
//!
//! Frames are dealt onto [`Relay::stripes`] stripes (frame modulo stripes), and every stripe has a tree of its own. For
//! each stripe, the nodes that take part are put in the order of a hash of (stripe, node): rendezvous hashing, so that
//! all nodes come to the same order without talking about it, and a node that joins or leaves moves only its own
//! neighbours. Ranks form a heap of fan-out [`Relay::fan_out`]: rank p asks rank (p − 1) ÷ fan-out; rank 0 asks the
//! origin. As the order differs from stripe to stripe, each node is a leaf in some trees and inside others, and all
//! links are used. The origin sends each frame once; a frame is log(N) hops away from everybody.
//!
//! A node asks its parent *before* the parent has the frame: the parent answers as soon as it has it. So nothing needs
//! to be announced, and a hop costs a frame's time on the link, not a round trip more.
//!
//! # What keeps it sound
//!
//! * **No circles.** A node waits only for a node before it in that stripe's order, or asks one that already has the
//!   frame. The order does not depend on who else is known, so nodes with different views never wait in a circle.
//! * **Never behind.** A node that fell more than [`Relay::lag_max`] frames behind the asker, rests after a failure, or
//!   is not known is passed over for its siblings, then for their parents. A slow node loses its children.
//! * **Late comers** find nodes that have what they want: their parents by rank, or, at rank 0, any other node. The
//!   origin is asked only when nobody else will do.
//! * **Load** decides among the parent and its siblings ([`Relay::alternates`]), by the [`Chooser`].
//! * **Full.** A node whose backlog takes a quarter of a second says so in its load ([`backlog_load`]) and is passed over,
//!   by its children and by the origin's [`Ledger`]: one slow node near the root would otherwise hold up everybody.
//! * **Slow.** A relay that says it has a frame and does not send it within [`sending_max`] is left alone for a while by
//!   who waits for it: on a slow link a few frames are a long time, and far from a full backlog. One that has not got
//!   the frame itself is not to blame, and is waited for with [`patience`].
//! * **Failover** ([`Relay::again`]) asks only those that *have* the frame, the origin last, never who was tried.
//! * **At the origin**, [`Ledger`] sends a frame that several claim at once (their views differ in the first moments of
//!   a burst) to one of them and points the others there.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use super::policy::eligible;
use super::{Candidate, Chooser, Draw, Item, Need, PeerKey, mix};

/// The nodes that take part in the relay of one image, in the order of each stripe.
///
/// Everybody who is receiving the image or has received it, this node included, without the origin.
#[derive(Debug, Clone)]
pub struct Roster {
    orders: Vec<Vec<(u64, PeerKey)>>,
}

impl Roster {
    /// Nobody yet, for the stripes of `relay`.
    pub fn new(relay: &Relay) -> Self {
        Self { orders: vec![Vec::new(); relay.stripes.max(1) as usize] }
    }

    /// Adds a node; nothing happens when it is there.
    pub fn insert(&mut self, peer: PeerKey) {
        for (stripe, order) in self.orders.iter_mut().enumerate() {
            let place = placed(stripe, peer);
            if let Err(at) = order.binary_search(&place) {
                order.insert(at, place);
            }
        }
    }

    /// Adds many nodes at the cost of one sort.
    pub fn extend(&mut self, peers: impl IntoIterator<Item = PeerKey> + Clone) {
        for (stripe, order) in self.orders.iter_mut().enumerate() {
            order.extend(peers.clone().into_iter().map(|peer| placed(stripe, peer)));
            order.sort_unstable();
            order.dedup();
        }
    }

    /// Takes a node out.
    pub fn remove(&mut self, peer: PeerKey) {
        for (stripe, order) in self.orders.iter_mut().enumerate() {
            if let Ok(at) = order.binary_search(&placed(stripe, peer)) {
                order.remove(at);
            }
        }
    }

    /// Number of nodes.
    pub fn len(&self) -> usize {
        self.orders[0].len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The order of the stripe that `frame` is in.
    fn order_of(&self, frame: u32) -> (usize, &[(u64, PeerKey)]) {
        let stripe = frame as usize % self.orders.len();
        (stripe, &self.orders[stripe])
    }
}

fn placed(stripe: usize, peer: PeerKey) -> (u64, PeerKey) {
    (mix(peer.0 ^ mix(stripe as u64 + 1)), peer)
}

/// The shape of the relay. The default is what the simulator found best over 3 to 1,000 nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relay {
    /// Stripes of the stream, each with a tree of its own; bounds the number of parents, and so of connections.
    pub stripes: u32,
    /// Children of a node in one tree.
    pub fan_out: u32,
    /// Nodes at the parent's place that the chooser may choose among, the parent included.
    pub alternates: usize,
    /// Frames by which a parent may be behind its child.
    pub lag_max: u32,
}

impl Default for Relay {
    fn default() -> Self {
        Self { stripes: 64, fan_out: 2, alternates: 3, lag_max: 32 }
    }
}

/// Time that a node's backlog may take before it counts as full.
const BACKLOG_MAX_MS: u64 = 250;
/// Bytes of backlog that are never too many: as much as those ask ahead who ask this node, and half as much again.
const BACKLOG_MIN: u64 = WINDOW_MIN / 2 * 3;
/// The load of the link from which a node counts as full.
const FULL: f32 = 0.99;

/// The load of its link ([`Item::NETWORK`]) that a node reports which has promised to send `backlog` bytes and can send
/// `rate` bytes a second: 1 when that takes a quarter of a second or longer, and is more than the least windows of those
/// who ask it. In a burst every link is in use all the time; what tells a slow node from the others is how far it is behind.
pub fn backlog_load(backlog: u64, rate: u64) -> f32 {
    let allowed = (rate.saturating_mul(BACKLOG_MAX_MS) / 1000).max(BACKLOG_MIN);
    (backlog as f32 / allowed as f32).min(1.0)
}

/// The least [`window`].
const WINDOW_MIN: u64 = 2 << 20;

/// The least and the longest [`patience`].
const PATIENCE_MIN: Duration = Duration::from_millis(600);
const PATIENCE_MAX: Duration = Duration::from_secs(5);
/// The least [`sending_max`].
const SENDING_MIN: Duration = Duration::from_millis(250);

/// Bytes of frames that a node asks for ahead of their arrival when its link carries `rate` bytes a second: enough to
/// cover the hops of the relay and a slow node among them, not so much that a node which begins a moment before the
/// others has asked for everything before it knows of them.
pub fn window(rate: u64) -> u64 {
    (rate / 28).clamp(WINDOW_MIN, 8 << 20)
}

/// For how long a node waits for a frame from one that may not have it yet, when frames took `mean` lately, 0 before one
/// came: four times that. A relay is asked for what comes a window ahead, and may be as far from it: on a slow link that
/// takes long, and a frame that is asked of the origin again leaves it even less for the others.
pub fn patience(mean: Duration) -> Duration {
    (mean * 4).clamp(PATIENCE_MIN, PATIENCE_MAX)
}

/// For how long a relay that has a frame may take to send it to a node that gets `rate` bytes a second: half a window.
/// Where all are slow that is long; who takes longer is slow among others.
pub fn sending_max(rate: u64) -> Duration {
    Duration::from_secs_f64(window(rate) as f64 / rate.max(1) as f64 / 2.0).clamp(SENDING_MIN, PATIENCE_MAX)
}

/// Which source to ask for which frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Assignment {
    /// Frame of the boot stream.
    pub frame: u32,
    /// Whom to ask. It may not have the frame yet, and answers when it has.
    pub source: PeerKey,
}

/// The node that asks, and what it knows.
#[derive(Debug, Clone, Copy)]
pub struct Asker<'a> {
    /// Itself.
    pub me: PeerKey,
    /// The first frame that it lacks.
    pub position: u32,
    /// Who takes part.
    pub roster: &'a Roster,
    /// Milliseconds of the clock that [`super::Seen`] is kept in.
    pub now_ms: u64,
}

impl Relay {
    /// One tree for the whole stream, as VMThunder and others build, to compare with.
    pub const fn tree(fan_out: u32) -> Self {
        Self { stripes: 1, fan_out, alternates: 1, lag_max: u32::MAX }
    }

    /// Assigns `frames`, in stream order, to sources; each is noted as asked in `candidates`. Frames that nobody can
    /// give now are left out: ask again when something has changed.
    pub fn assign(
        &self,
        asker: Asker<'_>,
        frames: &[u32],
        candidates: &mut BTreeMap<PeerKey, Candidate>,
        chooser: &dyn Chooser,
        draw: &mut Draw,
    ) -> Vec<Assignment> {
        let mut assignments = Vec::with_capacity(frames.len());
        for &frame in frames {
            let offer = if chooser.relays() {
                self.offer(asker, frame, candidates, draw)
            } else {
                eligible(Need::Frame(frame), candidates.values(), asker.now_ms, chooser)
            };
            let Some(index) = chooser.choose(Need::Frame(frame), &offer, draw) else { continue };
            let source = offer[index].peer;
            if let Some(candidate) = candidates.get_mut(&source) {
                candidate.seen.asked();
            }
            assignments.push(Assignment { frame, source });
        }
        assignments
    }

    /// Whom to ask for `frame` instead, when those in `tried` failed, stalled, or are slow: only who has it, the origin
    /// last. Noted as asked. None when nobody is left.
    pub fn again(
        &self,
        asker: Asker<'_>,
        frame: u32,
        tried: &[PeerKey],
        candidates: &mut BTreeMap<PeerKey, Candidate>,
        chooser: &dyn Chooser,
        draw: &mut Draw,
    ) -> Option<PeerKey> {
        let untried = candidates.values().filter(|c| !tried.contains(&c.peer) && c.peer != asker.me);
        let offer = eligible(Need::Frame(frame), untried, asker.now_ms, chooser);
        let source = offer[chooser.choose(Need::Frame(frame), &offer, draw)?].peer;
        candidates.get_mut(&source)?.seen.asked();
        Some(source)
    }

    /// The nodes whose candidates [`Relay::assign`] looks at for `frame` before it looks for anybody else: the places
    /// of the parent, its parent and so on. For who keeps the whole roster and tells a node only what it needs.
    pub fn relevant<'r>(
        &'r self,
        roster: &'r Roster,
        me: PeerKey,
        frame: u32,
    ) -> impl Iterator<Item = PeerKey> + 'r {
        let (stripe, order) = roster.order_of(frame);
        let own = rank(stripe, order, me);
        self.levels(own).flat_map(move |level| self.level_ranks(level, own)).map(|at| order[at].1)
    }

    /// The eligible sources for `frame`: all at the nearest place above this node that has any.
    fn offer<'c>(
        &self,
        asker: Asker<'_>,
        frame: u32,
        candidates: &'c BTreeMap<PeerKey, Candidate>,
        draw: &mut Draw,
    ) -> Vec<&'c Candidate> {
        let (stripe, order) = asker.roster.order_of(frame);
        let own = rank(stripe, order, asker.me);
        let keeps_up = |candidate: &&Candidate| {
            has(candidate, frame, asker.now_ms)
                || (candidate.seen.is_ready(asker.now_ms) && self.is_near(candidate, asker.position))
        };
        let mut full = Vec::new();
        for level in self.levels(own) {
            let at_level = self.level_ranks(level, own).filter_map(|at| candidates.get(&order[at].1));
            let (at_limit, offer): (Vec<&Candidate>, Vec<_>) =
                at_level.filter(keeps_up).partition(|c| is_full(c));
            if !offer.is_empty() {
                return offer;
            }
            if full.is_empty() {
                full = at_limit;
            }
        }
        let holders = self.offer_holders(asker, frame, candidates, draw);
        if holders.is_empty() { full } else { holders }
    }

    /// Anybody who has `frame`, the origin last. Of many, a few drawn together.
    fn offer_holders<'c>(
        &self,
        asker: Asker<'_>,
        frame: u32,
        candidates: &'c BTreeMap<PeerKey, Candidate>,
        draw: &mut Draw,
    ) -> Vec<&'c Candidate> {
        let usable = |c: &&Candidate| has(c, frame, asker.now_ms) && c.peer != asker.me;
        let (origins, mut holders): (Vec<&Candidate>, Vec<_>) =
            candidates.values().filter(usable).partition(|c| c.origin);
        holders.retain(|c| !is_full(c));
        if holders.is_empty() {
            return origins;
        }
        let first = draw.below(holders.len());
        holders.rotate_left(first);
        holders.truncate(self.alternates.max(1));
        holders
    }

    fn is_near(&self, candidate: &Candidate, position: u32) -> bool {
        match candidate.has {
            super::Has::Stream(theirs) => theirs.saturating_add(self.lag_max) >= position,
            super::Has::Complete => true,
            super::Has::Answer(_) => false,
        }
    }

    /// The ranks of the parent, the parent's parent, and so on to 0.
    fn levels(&self, own: usize) -> impl Iterator<Item = usize> {
        let fan_out = self.fan_out.max(1) as usize;
        std::iter::successors(Some(own), move |rank| rank.checked_sub(1).map(|before| before / fan_out))
            .skip(1)
    }

    /// `rank` and the ranks beside it, all before `own`.
    fn level_ranks(&self, rank: usize, own: usize) -> impl Iterator<Item = usize> {
        let beside = (1..).flat_map(move |step: usize| [rank.checked_add(step), rank.checked_sub(step)]);
        let near = std::iter::once(Some(rank)).chain(beside);
        let reach = 2 * self.alternates + 1;
        near.take(reach).flatten().filter(move |at| *at < own).take(self.alternates.max(1))
    }
}

/// Whether a node that reports this load of its link is to be passed over.
pub fn is_full_load(network: f32) -> bool {
    network >= FULL
}

/// Whether a node says that it has as much to send as it can.
pub fn is_full(candidate: &Candidate) -> bool {
    candidate.load.get(Item::NETWORK).is_some_and(is_full_load)
}

fn has(candidate: &Candidate, frame: u32, now_ms: u64) -> bool {
    candidate.seen.is_ready(now_ms) && candidate.has.covers(Need::Frame(frame))
}

/// The rank of `peer`; after everybody when it does not take part.
fn rank(stripe: usize, order: &[(u64, PeerKey)], peer: PeerKey) -> usize {
    match order.binary_search(&placed(stripe, peer)) {
        Ok(at) => at,
        Err(_) => order.len(),
    }
}

/// What a source does with a request for a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Send it.
    Send,
    /// Point to this node: it has the frame or is about to.
    Ask(PeerKey),
}

/// Kept by the origin: to whom each frame was sent, so that it is sent about once.
///
/// Of those who ask for one frame only the first is served. Each other is pointed to one who asked before it, the one
/// to which fewest were pointed of a few: the first nodes of a burst would otherwise feed all the others. Who asks for
/// the same frame again is served: whom it was pointed to has failed it, and is pointed to less.
#[derive(Debug, Clone)]
pub struct Ledger {
    sample: usize,
    askers: HashMap<u32, Vec<Claim>>,
    /// How often each was pointed to; who failed counts as if it had been that much more often.
    pointed: HashMap<PeerKey, u64>,
    full: HashSet<PeerKey>,
}

/// A node that asked for a frame.
#[derive(Debug, Clone, Copy)]
struct Claim {
    by: PeerKey,
    /// Whom it was pointed to and has not come back from.
    to: Option<PeerKey>,
}

/// As how many nodes that were pointed to it one counts whom it has failed.
const FAILURE_COST: u64 = 16;

impl Ledger {
    /// Nothing sent yet.
    pub fn new(relay: &Relay) -> Self {
        Self {
            sample: relay.alternates.max(2),
            askers: HashMap::new(),
            pointed: HashMap::new(),
            full: HashSet::new(),
        }
    }

    /// `peer` asks for `frame`.
    pub fn ask(&mut self, frame: u32, peer: PeerKey) -> Answer {
        let claims = self.askers.entry(frame).or_default();
        if let Some(claim) = claims.iter_mut().find(|claim| claim.by == peer) {
            if let Some(failed) = claim.to.take() {
                *self.pointed.entry(failed).or_default() += FAILURE_COST;
            }
            return Answer::Send;
        }
        let pointed = &self.pointed;
        let count = claims.len() as u64;
        let drawn = (0..self.sample as u64).map(|at| mix(mix(peer.0 ^ u64::from(frame)) ^ at) % count.max(1));
        let few = drawn.filter_map(|at| Some(claims.get(usize::try_from(at).ok()?)?.by));
        let least = few
            .filter(|other| !self.full.contains(other))
            .min_by_key(|other| pointed.get(other).copied().unwrap_or(0));
        claims.push(Claim { by: peer, to: least });
        let Some(other) = least else { return Answer::Send };
        *self.pointed.entry(other).or_default() += 1;
        Answer::Ask(other)
    }

    /// `peer` has, or has no longer, as much to send as it can: until then nobody is pointed to it.
    pub fn set_full(&mut self, peer: PeerKey, full: bool) {
        if full {
            self.full.insert(peer);
        } else {
            self.full.remove(&peer);
        }
    }

    /// `peer` is gone: nobody is pointed to it any more.
    pub fn forget(&mut self, peer: PeerKey) {
        self.askers.retain(|_, claims| {
            claims.retain(|claim| claim.by != peer);
            !claims.is_empty()
        });
        self.pointed.remove(&peer);
        self.full.remove(&peer);
    }
}

#[cfg(test)]
mod tests;
