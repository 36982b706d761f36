//! Whether writes that were answered and not flushed may have been lost with a server.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

/// The changes that a client has been answered.
#[derive(Debug, Default)]
pub(super) struct Changes {
    answered: AtomicU64,
    /// So many of them are durable, or their loss has been told.
    settled: AtomicU64,
    /// How often a connection has been made again.
    generation: AtomicU64,
    /// Some that were not settled came before a connection that was made again.
    lost: AtomicBool,
}

impl Changes {
    /// Connections that are made from now on belong to a later one.
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(SeqCst)
    }

    /// A change that was sent in `generation` has been answered.
    pub(super) fn answered(&self, generation: u64) {
        self.answered.fetch_add(1, SeqCst);
        if self.generation() != generation {
            self.lost.store(true, SeqCst);
        }
    }

    /// A connection takes the place of a broken one: it may lead to a server that knows nothing of the last one's page
    /// cache.
    pub(super) fn connected_again(&self) {
        self.generation.fetch_add(1, SeqCst);
        if self.answered.load(SeqCst) > self.settled.load(SeqCst) {
            self.lost.store(true, SeqCst);
        }
    }

    /// What a flush that is sent now will cover.
    pub(super) fn count(&self) -> u64 {
        self.answered.load(SeqCst)
    }

    /// A flush that was to cover the first `count` has been answered.
    pub(super) fn flushed(&self, count: u64) -> io::Result<()> {
        self.settled.fetch_max(count, SeqCst);
        if self.lost.swap(false, SeqCst) {
            return Err(io::Error::other(
                "the connection to the NBD server was made again behind writes that had not been flushed",
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_not_flushed_before_a_new_connection_is_told_and_once() {
        let changes = Changes::default();
        let change = || changes.answered(changes.generation());
        changes.connected_again();
        change();
        changes.flushed(changes.count()).unwrap();
        changes.connected_again();
        changes.flushed(changes.count()).unwrap();
        change();
        changes.connected_again();
        change();
        assert!(changes.flushed(changes.count()).is_err());
        changes.flushed(changes.count()).unwrap();
    }

    #[test]
    fn a_change_that_is_answered_while_a_connection_is_made_again_counts_as_older() {
        let changes = Changes::default();
        let generation = changes.generation();
        changes.connected_again();
        changes.answered(generation);
        assert!(changes.flushed(changes.count()).is_err());
    }
}
