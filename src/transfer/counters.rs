//! What the transfer of one image has done, counted where it happens.

use std::sync::atomic::{AtomicU64, Ordering};

/// What bytes were fetched for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The boot cache, in order.
    Stream,
    /// A guest waits.
    Demand,
    /// The rest.
    Fill,
    /// Manifest, heads and digest tree.
    Tree,
}

impl Kind {
    /// Every kind, in the order of its number.
    pub const ALL: [Self; 4] = [Self::Stream, Self::Demand, Self::Fill, Self::Tree];

    /// Its name in metrics and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Stream => "stream",
            Self::Demand => "demand",
            Self::Fill => "fill",
            Self::Tree => "tree",
        }
    }
}

/// One number for each [`Kind`].
#[derive(Debug, Default)]
pub struct PerKind([AtomicU64; 4]);

impl PerKind {
    /// Adds to the number of `kind`.
    pub fn add(&self, kind: Kind, amount: u64) {
        self.0[kind as usize].fetch_add(amount, Ordering::Relaxed);
    }

    /// The number of `kind`.
    pub fn get(&self, kind: Kind) -> u64 {
        self.0[kind as usize].load(Ordering::Relaxed)
    }

    /// Of all kinds together.
    pub fn total(&self) -> u64 {
        Kind::ALL.into_iter().map(|kind| self.get(kind)).sum()
    }
}

/// Counters of one image's transfer; waits and hits are counted by its `LocalCache`.
#[derive(Debug, Default)]
pub struct Counters {
    /// Bytes that came over the network.
    pub bytes: PerKind,
    /// Of these, from where the image was published.
    pub origin_bytes: PerKind,
    /// Requests sent.
    pub requests: PerKind,
    /// Requests sent to a second source because the first was slow.
    pub hedges: AtomicU64,
    /// Requests sent again because a source broke, stalled, or did not have it.
    pub failovers: AtomicU64,
    /// Answers that were not what the image's digests say: each is a peer that lies or is broken.
    pub corrupt: AtomicU64,
    /// Sources banned for a corrupt answer.
    pub bans: AtomicU64,
    /// Blocks that were found in other images on this node instead of being fetched.
    pub similar_blocks: AtomicU64,
}

impl Counters {
    pub(super) fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}
