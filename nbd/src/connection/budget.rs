//! What one connection may have in flight, and all of them together.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::limits::Limits;

const NEVER: &str = "the semaphores are never closed";

/// The budgets of one connection.
#[derive(Debug)]
pub(super) struct Budget {
    requests: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
    bytes_max: usize,
    bytes_in_all: Arc<Semaphore>,
}

/// A request's share of the budgets, given back when it is answered.
#[derive(Debug)]
pub(super) struct Share {
    _request: OwnedSemaphorePermit,
    _bytes: OwnedSemaphorePermit,
    _bytes_in_all: Option<OwnedSemaphorePermit>,
}

impl Budget {
    pub(super) fn new(limits: &Limits, bytes_in_all: &Arc<Semaphore>) -> Self {
        Self {
            requests: Arc::new(Semaphore::new(limits.requests)),
            bytes: Arc::new(Semaphore::new(limits.bytes_per_connection)),
            bytes_max: limits.bytes_per_connection,
            bytes_in_all: Arc::clone(bytes_in_all),
        }
    }

    /// Waits for a share.
    pub(super) async fn share(&self, bytes: usize) -> Share {
        let request = Arc::clone(&self.requests).acquire_owned().await.expect(NEVER);
        let idle = self.bytes.available_permits() == self.bytes_max;
        let bytes = u32::try_from(bytes.min(self.bytes_max)).unwrap_or(u32::MAX);
        let own = Arc::clone(&self.bytes).acquire_many_owned(bytes).await.expect(NEVER);
        // A connection with nothing in flight has its reserve: others cannot starve it.
        let in_all = if idle {
            None
        } else {
            Some(Arc::clone(&self.bytes_in_all).acquire_many_owned(bytes).await.expect(NEVER))
        };
        Share { _request: request, _bytes: own, _bytes_in_all: in_all }
    }
}
