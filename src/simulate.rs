//! A burst of boots, simulated: many nodes, the real relay and choosers, a virtual clock.
//!
//! A deterministic discrete-event model at the level of frames: links are queues that serve in order, a node asks for
//! the frames in its window, its guest goes through the stream as the recorded boot did and waits where it has to.
//! What is *not* modelled: packets and congestion control, the fill, reads that the boot cache did not foresee, and
//! the time between a decision and its first byte beyond one round trip.
//!
//! The code under test is [`crate::choose`], called as the transfer engine calls it. One seed, one result.

mod events;
mod links;
mod node;
pub mod profile;
pub mod report;
mod world;

pub use profile::Profile;
pub use report::Report;

use crate::choose::{Chooser, Relay};

/// What is simulated.
#[derive(Debug, Clone, PartialEq)]
pub struct Scenario {
    /// Nodes that boot.
    pub nodes: u32,
    /// Decides everything that is random.
    pub seed: u64,
    /// Payload bytes a second of a node's link, in each direction.
    pub link: u64,
    /// Payload bytes a second of the origin's link.
    pub origin_link: u64,
    /// Round trip in µs.
    pub round_trip_us: u64,
    /// Nodes begin within so many ms, evenly at random.
    pub stagger_ms: u64,
    /// A node asks for its first frame so many ms before its guest starts.
    pub guest_after_ms: u64,
    /// Racks; 1 is a network without a core.
    pub racks: u32,
    /// By how much the links of a rack's nodes exceed the rack's own.
    pub oversubscription: f64,
    /// Bytes a second that a node checks and stores.
    pub storing: u64,
    /// Share of nodes that send at a tenth of their link's rate; which ones is drawn.
    pub slow: f64,
    /// Share of nodes that fall silent at some time in the first half of the boot.
    pub dying: f64,
    /// When the origin falls silent, in ms; never if none.
    pub origin_dies_ms: Option<u64>,
    /// How often positions are told to others, in ms.
    pub position_ms: u64,
    /// How often loads are reported, in ms; nodes that are connected tell each other as often as their positions.
    pub report_ms: u64,
    /// Bytes that a node has asked for and not got, at most; as [`crate::choose::relay::window`] says if none.
    pub window: Option<u64>,
    /// The relay's shape.
    pub relay: Relay,
}

impl Default for Scenario {
    /// 1,000 nodes on 1 Gbit/s (941 Mbit/s of payload), one origin.
    fn default() -> Self {
        Self {
            nodes: 1000,
            seed: 1,
            link: payload(1000),
            origin_link: payload(1000),
            round_trip_us: 200,
            stagger_ms: 500,
            guest_after_ms: 0,
            racks: 1,
            oversubscription: 1.0,
            storing: 400_000_000,
            slow: 0.0,
            dying: 0.0,
            origin_dies_ms: None,
            position_ms: 50,
            report_ms: 50,
            window: None,
            relay: Relay::default(),
        }
    }
}

/// Payload bytes a second of a link of `megabits` a second: 94.1 %, as measured through TBF.
pub const fn payload(megabits: u64) -> u64 {
    megabits * 941_000 / 8
}

/// Runs `scenario` with the boot `profile` and `chooser` to its end.
pub fn simulate(scenario: &Scenario, profile: &Profile, chooser: &dyn Chooser) -> Report {
    world::World::new(scenario, profile, chooser).run()
}

#[cfg(test)]
mod tests;
