//! What clients may ask of a server, all of them together and each alone.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;

use crate::connection::{Pieces, Pipes};
use crate::consts::STRING_MAX;

/// Bounds that hold whatever clients do. [`Limits::default`] is right for a host's VMs. A value with which no client could
/// be served, such as zero connections, counts as the least with which one can, and an absurd one as the greatest.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Connections that have reached transmission, in all.
    pub connections: usize,
    /// Connections to one export.
    pub connections_per_export: usize,
    /// Connections that are still in the handshake; one more ends the oldest that has sent nothing, else the oldest.
    pub handshakes: usize,
    /// Time to reach transmission.
    pub handshake_timeout: Duration,
    /// Options that a client may send.
    pub options: usize,
    /// Longest option that is read, in bytes: 8 KiB to 1 MiB. One of up to 1 MiB is read away and refused, and a longer one
    /// ends the connection.
    pub option_bytes: usize,
    /// Queries in an option about metadata contexts, at most 1024.
    pub queries: usize,
    /// Largest payload of a read or write, in bytes: 64 KiB to 1 GiB.
    pub payload: u32,
    /// Requests of one connection that may wait for the disk at once.
    pub requests: usize,
    /// Bytes of requests and replies that one connection may have in flight.
    pub bytes_per_connection: usize,
    /// The same for all connections together, beyond a reserve of [`PIECE_BYTES`] that each has for itself.
    pub bytes: usize,
    /// Time that a client may leave a reply of at most [`PIECE_BYTES`] unread while less than half of `bytes` is free;
    /// then its connection ends. While memory is plenty it may take as long as it likes: its VM may be paused.
    pub stall_timeout: Duration,
    /// Time for the requests under way to end when their connection does; what then waits for the disk is given up.
    pub drain_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 1024,
            connections_per_export: 16,
            handshakes: 64,
            handshake_timeout: Duration::from_secs(10),
            options: 32,
            option_bytes: 64 << 10,
            queries: 16,
            payload: 32 << 20,
            requests: 128,
            bytes_per_connection: 8 << 20,
            bytes: 96 << 20,
            stall_timeout: Duration::from_secs(30),
            drain_timeout: Duration::from_secs(5),
        }
    }
}

impl Limits {
    /// The same, with each value between the least that serves a client and the greatest that is of use.
    fn bounded(self) -> Self {
        let permits = |count: usize, least: usize| count.clamp(least, Semaphore::MAX_PERMITS);
        Self {
            connections: permits(self.connections, 1),
            connections_per_export: self.connections_per_export.max(1),
            handshakes: self.handshakes.max(1),
            handshake_timeout: self.handshake_timeout.clamp(Duration::from_secs(1), TIME_MAX),
            options: self.options.max(1),
            option_bytes: self.option_bytes.clamp(2 * STRING_MAX, OPTION_SKIP_MAX),
            queries: self.queries.min(1024),
            // The largest block that an export may want requests to be multiples of.
            payload: self.payload.clamp(64 << 10, PAYLOAD_MAX),
            requests: permits(self.requests, 1),
            // A request's share is a piece at most: with less in all it would wait for ever.
            bytes_per_connection: permits(self.bytes_per_connection, PIECE_BYTES),
            bytes: permits(self.bytes, PIECE_BYTES),
            stall_timeout: self.stall_timeout.clamp(Duration::from_millis(10), TIME_MAX),
            drain_timeout: self.drain_timeout.min(TIME_MAX),
        }
    }
}

/// [`Limits`] of which `connections` and `bytes` hold for several servers together, those of its clones, and all others
/// for each server by itself: who opens an export often on one socket does not shut others out of another.
#[derive(Debug, Clone)]
pub struct SharedLimits {
    pub(crate) limits: Limits,
    pub(crate) connections: Arc<Semaphore>,
    /// What all connections together may have in flight, in bytes.
    pub(crate) bytes: Arc<Semaphore>,
    pub(crate) pieces: Pieces,
    pub(crate) pipes: Pipes,
}

impl From<Limits> for SharedLimits {
    fn from(limits: Limits) -> Self {
        let limits = limits.bounded();
        Self {
            connections: Arc::new(Semaphore::new(limits.connections)),
            bytes: Arc::new(Semaphore::new(limits.bytes)),
            pieces: Pieces::default(),
            pipes: Pipes::default(),
            limits,
        }
    }
}

/// Payloads are moved in pieces of at most this many bytes.
pub const PIECE_BYTES: usize = 256 << 10;
/// With its header, the data of an unfragmented read has to fit a length of 32 bits.
const PAYLOAD_MAX: u32 = 1 << 30;
/// Ten years: as good as for ever, and an instant that far away can be told, which it cannot be for `Duration::MAX`.
pub(crate) const TIME_MAX: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);
/// Longest option data that is read away to answer that it is too long.
pub(crate) const OPTION_SKIP_MAX: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_of_nearly_4_gib_is_taken_for_one_that_a_reply_can_hold() {
        let limits = Limits { payload: u32::MAX, ..Limits::default() }.bounded();
        let length = usize::try_from(limits.payload).unwrap();
        let answer = crate::chunk::Answer { style: crate::chunk::Style::Structured, cookie: 0, offset: 0 };
        answer.data(&mut Vec::new(), 0, length, true);
    }
}
