//! What clients may ask of a server, all of them together and each alone.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;

use crate::connection::Pieces;

/// Bounds that hold whatever clients do. [`Limits::default`] is right for a host's VMs.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Connections that have reached transmission, in all.
    pub connections: usize,
    /// Connections to one export.
    pub connections_per_export: usize,
    /// Connections that are still in the handshake; one more ends the oldest of them.
    pub handshakes: usize,
    /// Time to reach transmission.
    pub handshake_timeout: Duration,
    /// Options that a client may send.
    pub options: usize,
    /// Largest payload of a read or write, in bytes.
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
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 1024,
            connections_per_export: 16,
            handshakes: 64,
            handshake_timeout: Duration::from_secs(10),
            options: 32,
            payload: 32 << 20,
            requests: 128,
            bytes_per_connection: 8 << 20,
            bytes: 96 << 20,
            stall_timeout: Duration::from_secs(30),
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
}

impl From<Limits> for SharedLimits {
    fn from(limits: Limits) -> Self {
        Self {
            connections: Arc::new(Semaphore::new(limits.connections)),
            bytes: Arc::new(Semaphore::new(limits.bytes)),
            pieces: Pieces::default(),
            limits,
        }
    }
}

/// Payloads are moved in pieces of at most this many bytes.
pub const PIECE_BYTES: usize = 256 << 10;
