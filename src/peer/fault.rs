//! A layer that makes a peer server lie, stall or break, on purpose: for tests of everything that must notice.
//!
//! A server without one answers truthfully. What is done to an answer is decided here, by kind and count, and
//! carried out by the server's writer; the number that was really done is counted.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::message::{Answer, Ask};

/// What may be done to an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// One bit is changed.
    Flip,
    /// The data is zeroes.
    Zero,
    /// Two blocks change places; of a frame, its halves.
    Swap,
    /// The end is missing, and the head does not say so.
    Truncate,
    /// The blocks or the frame of another place are sent.
    WrongPlace,
    /// No answer comes, while the connection stays open.
    Stall,
    /// The connection is closed instead.
    Reset,
    /// The answer comes at 4 KiB a second.
    Trickle,
}

impl Fault {
    /// Every kind.
    pub const ALL: [Self; 8] = [
        Self::Flip,
        Self::Zero,
        Self::Swap,
        Self::Truncate,
        Self::WrongPlace,
        Self::Stall,
        Self::Reset,
        Self::Trickle,
    ];

    /// Whether the bytes are wrong, rather than late or missing.
    pub const fn is_lie(self) -> bool {
        matches!(self, Self::Flip | Self::Zero | Self::Swap | Self::Truncate | Self::WrongPlace)
    }
}

/// Which answers get which fault.
#[derive(Debug)]
pub struct Faults {
    kinds: Vec<Fault>,
    every: u64,
    most: u64,
    seen: AtomicU64,
    done: AtomicU64,
}

/// What the writer does with an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    Send,
    Drop,
    Close,
    /// So many bytes at a time, with this pause between.
    Slowly(usize, Duration),
}

impl Faults {
    /// Of every `every` answers with data one is spoilt, by `kinds` in turn, `most` at most.
    pub fn new(kinds: &[Fault], every: u64, most: u64) -> Self {
        assert!(!kinds.is_empty() && every > 0, "a fault layer has faults");
        let (seen, done) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { kinds: kinds.to_vec(), every, most, seen, done }
    }

    /// Answers that were spoilt so far.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// The place to answer from instead of the one that was asked for, and what else is done.
    pub(super) fn next(&self, ask: &Ask) -> Option<Fault> {
        if !matches!(ask, Ask::Frame { .. } | Ask::Blocks { .. }) {
            return None;
        }
        let seen = self.seen.fetch_add(1, Ordering::Relaxed);
        if !seen.is_multiple_of(self.every) || self.done.load(Ordering::Relaxed) >= self.most {
            return None;
        }
        let turn = usize::try_from(seen / self.every).unwrap_or(0) % self.kinds.len();
        Some(self.kinds[turn])
    }

    /// Spoils `bulk` by `fault`. Answers that it cannot change are left alone and not counted.
    pub(super) fn spoil(&self, fault: Fault, answer: &mut Answer, bulk: &mut Vec<u8>) -> Fate {
        if !matches!(answer, Answer::Data | Answer::Blocks { .. }) || bulk.is_empty() {
            return Fate::Send;
        }
        let from = data_start(answer).min(bulk.len() - 1);
        if let Answer::Blocks { packed: packed @ true, .. } = answer {
            // The blocks themselves are to be wrong, not their packing.
            if let Ok(plain) = zstd::bulk::decompress(&bulk[from..], 2 << 20) {
                bulk.truncate(from);
                bulk.extend_from_slice(&plain);
                *packed = false;
            }
        }
        let before = bulk.clone();
        let data = &mut bulk[from..];
        let fate = match fault {
            Fault::Flip => {
                let middle = data.len() / 2;
                data[middle] ^= 0x20;
                Fate::Send
            }
            Fault::Zero => {
                data.fill(0);
                Fate::Send
            }
            Fault::Swap => {
                let half = (data.len() / 2).min(4096);
                let (first, second) = data.split_at_mut(half);
                first.swap_with_slice(&mut second[..half]);
                Fate::Send
            }
            Fault::Truncate => {
                let length = bulk.len();
                bulk.truncate(length - (length - from).min(777));
                Fate::Send
            }
            Fault::WrongPlace => Fate::Send,
            Fault::Stall => Fate::Drop,
            Fault::Reset => Fate::Close,
            Fault::Trickle => Fate::Slowly(1024, Duration::from_millis(250)),
        };
        if fate != Fate::Send || *bulk != before || fault == Fault::WrongPlace {
            self.done.fetch_add(1, Ordering::Relaxed);
        }
        fate
    }
}

/// The question that is answered instead of `ask` when the answer is to be for the wrong place.
pub(super) fn elsewhere(ask: &Ask) -> Ask {
    match ask.clone() {
        Ask::Frame { root, index, wait } => Ask::Frame { root, index: index ^ 1, wait },
        other => other,
    }
}

fn data_start(answer: &Answer) -> usize {
    match answer {
        Answer::Blocks { groups, pages, .. } => {
            groups.iter().chain(pages).map(|(_, length)| *length as usize).sum()
        }
        _ => 0,
    }
}
