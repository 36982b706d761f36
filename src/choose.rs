//! From whom to fetch: the choice of a source, and the relay topology of a burst.
//!
//! Pure. Loads, positions, time and randomness come in as arguments, so that the transfer engine, the controller and
//! the simulator run the same code, and so that a choice that went wrong can be repeated from its seed.
//!
//! * [`load`] – the weighted score of the load items that nodes report.
//! * [`seen`] – what a node itself sees of a source: requests outstanding, latency, failures.
//! * [`policy`] – the [`Chooser`]s: of several eligible sources, one.
//! * [`relay`] – which sources are eligible for which part of the stream, so that a burst of nodes costs the origin
//!   about one copy; the topology and why it is so are explained there.

pub mod load;
pub mod policy;
pub mod relay;
pub mod seen;

pub use load::{Item, Load, Weights, WeightsError};
pub use policy::{Chooser, by_name, eligible};
pub use relay::{Asker, Assignment, Ledger, Relay, Roster};
pub use seen::Seen;

/// Who a source is: stable while it lives, different for every node, and spread over all 64 bits (a digest's first
/// bytes, not an address), because the relay order is made from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerKey(pub u64);

impl PeerKey {
    /// The key of the node called `name`.
    pub fn of(name: &str) -> Self {
        let digest = crate::digest::Digest::of(name.as_bytes());
        let (first, _) = digest.0.split_first_chunk().expect("a digest has 32 bytes");
        Self(u64::from_le_bytes(*first))
    }
}

/// What is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Frame of the boot stream, by its index.
    Frame(u32),
    /// A block that a guest waits for, and that the stream does not bring.
    Block(u64),
    /// A page of the image (128 blocks), for the fill.
    Page(u64),
}

/// What a source has of the image, as far as is known here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Has {
    /// All of it.
    Complete,
    /// The boot stream up to this frame, it excluded, and more is coming to it. It may have other blocks too.
    Stream(u32),
    /// It was asked for what is needed, or told which blocks it has: it has it, or it has not.
    Answer(bool),
}

impl Has {
    /// Whether the source is known to have `need` already.
    pub const fn covers(self, need: Need) -> bool {
        match (self, need) {
            (Self::Complete | Self::Answer(true), _) => true,
            (Self::Stream(position), Need::Frame(frame)) => frame < position,
            (Self::Stream(_), _) | (Self::Answer(false), _) => false,
        }
    }
}

/// A source that may be chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// Who it is.
    pub peer: PeerKey,
    /// What it has.
    pub has: Has,
    /// Where the image was published: what no other can give comes from there, and as little else as possible.
    pub origin: bool,
    /// The load that it reported.
    pub load: Load,
    /// How old that report is, in ms.
    pub load_age_ms: u32,
    /// What this node sees itself.
    pub seen: Seen,
}

impl Candidate {
    /// A source of which nothing is known but what it has.
    pub fn new(peer: PeerKey, has: Has, origin: bool) -> Self {
        Self { peer, has, origin, load: Load::default(), load_age_ms: 0, seen: Seen::default() }
    }
}

/// What a chooser may remember between calls: a seeded generator and a count. One owner; the seed decides everything.
#[derive(Debug, Clone)]
pub struct Draw {
    state: u64,
    turn: u64,
}

impl Draw {
    /// From a seed.
    pub const fn new(seed: u64) -> Self {
        Self { state: seed, turn: 0 }
    }

    /// A number below `bound`, which must not be 0.
    pub fn below(&mut self, bound: usize) -> usize {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let wide = u128::from(mix(self.state)) * bound as u128;
        usize::try_from(wide >> 64).expect("less than bound")
    }

    /// The number of calls before this one.
    pub fn turn(&mut self) -> u64 {
        self.turn += 1;
        self.turn - 1
    }
}

/// The finalizer of splitmix64: every bit of the input stirs every bit of the output.
const fn mix(mut value: u64) -> u64 {
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}
