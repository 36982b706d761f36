//! The virtual clock: events in order of time, those of one time in the order in which they were made.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// What happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Event {
    /// A node begins to boot.
    Start(u32),
    /// A node's link has sent a frame and can send the next.
    LinkFree(u32),
    /// A frame has come, and was checked and stored.
    Arrived { node: u32, frame: u32, from: u32 },
    /// A node was pointed to another for a frame.
    Pointed { node: u32, frame: u32, to: u32 },
    /// A node falls silent.
    Dies(u32),
    /// Positions are told, deadlines looked at.
    Positions,
    /// Loads are reported.
    Loads,
}

/// Events to come.
#[derive(Debug, Default)]
pub(super) struct Events {
    heap: BinaryHeap<Reverse<(u64, u64, Event)>>,
    made: u64,
    now_ns: u64,
}

impl Events {
    pub(super) fn now_ns(&self) -> u64 {
        self.now_ns
    }

    /// `event` will happen at `at_ns`, or now when that is past.
    pub(super) fn at(&mut self, at_ns: u64, event: Event) {
        self.made += 1;
        self.heap.push(Reverse((at_ns.max(self.now_ns), self.made, event)));
    }

    /// The next event; the clock moves to it.
    pub(super) fn next(&mut self) -> Option<Event> {
        let Reverse((at_ns, _, event)) = self.heap.pop()?;
        self.now_ns = at_ns;
        Some(event)
    }
}
