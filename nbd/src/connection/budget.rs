//! What one connection may have in flight, and all of them together.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::limits::{Limits, PIECE_BYTES};

const NEVER: &str = "the semaphores are never closed";

/// The budgets of one connection.
#[derive(Debug)]
pub(super) struct Budget {
    requests: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
    bytes_max: usize,
    /// Bytes that are this connection's alone: whatever others hold, and for how long, it goes on with these.
    reserve: Arc<Semaphore>,
    bytes_in_all: Arc<Semaphore>,
}

/// A request's share of the budgets, given back when it is answered.
#[derive(Debug)]
pub(super) struct Share {
    _request: OwnedSemaphorePermit,
    _bytes: OwnedSemaphorePermit,
    _reserve_or_in_all: OwnedSemaphorePermit,
}

impl Budget {
    pub(super) fn new(limits: &Limits, bytes_in_all: &Arc<Semaphore>) -> Self {
        Self {
            requests: Arc::new(Semaphore::new(limits.requests)),
            bytes: Arc::new(Semaphore::new(limits.bytes_per_connection)),
            bytes_max: limits.bytes_per_connection,
            reserve: Arc::new(Semaphore::new(PIECE_BYTES)),
            bytes_in_all: Arc::clone(bytes_in_all),
        }
    }

    /// Waits for a share of at most [`PIECE_BYTES`]: of the reserve or of what there is in all, whichever is free first.
    pub(super) async fn share(self: Arc<Self>, bytes: usize) -> Share {
        debug_assert!(bytes <= PIECE_BYTES, "more than the reserve holds would wait for ever");
        let request = Arc::clone(&self.requests).acquire_owned().await.expect(NEVER);
        let bytes = u32::try_from(bytes.min(self.bytes_max)).unwrap_or(u32::MAX);
        let own = Arc::clone(&self.bytes).acquire_many_owned(bytes).await.expect(NEVER);
        let reserve_or_in_all = tokio::select! {
            biased;
            reserve = Arc::clone(&self.reserve).acquire_many_owned(bytes) => reserve,
            in_all = Arc::clone(&self.bytes_in_all).acquire_many_owned(bytes) => in_all,
        };
        Share { _request: request, _bytes: own, _reserve_or_in_all: reserve_or_in_all.expect(NEVER) }
    }
}
