//! Connections that have not reached transmission: so many, and those that have said nothing leave first.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::{CancellationToken, WaitForCancellationFuture};

/// The handshakes of a server, oldest first.
#[derive(Debug)]
pub(super) struct Handshakes {
    max: usize,
    waiting: Mutex<VecDeque<Arc<Entry>>>,
}

#[derive(Debug, Default)]
struct Entry {
    /// It has sent its flags: a client, and not somebody who only connects.
    spoke: AtomicBool,
    evicted: CancellationToken,
}

/// A connection's handshake, for as long as this lives: however it ends, it makes place.
#[derive(Debug)]
pub(super) struct Handshake {
    all: Arc<Handshakes>,
    entry: Arc<Entry>,
}

impl Handshakes {
    pub(super) const fn new(max: usize) -> Self {
        Self { max, waiting: Mutex::new(VecDeque::new()) }
    }

    /// Counts a connection in. When there are too many, the oldest that has said nothing leaves, else the oldest.
    pub(super) fn enter(self: &Arc<Self>) -> Handshake {
        let entry = Arc::new(Entry::default());
        let mut waiting = self.lock();
        if waiting.len() >= self.max {
            let silent = waiting.iter().position(|other| !other.spoke.load(Ordering::Relaxed));
            if let Some(other) = waiting.remove(silent.unwrap_or(0)) {
                other.evicted.cancel();
            }
        }
        waiting.push_back(Arc::clone(&entry));
        Handshake { all: Arc::clone(self), entry }
    }

    /// Whether the next one makes another leave.
    pub(super) fn are_full(&self) -> bool {
        self.lock().len() >= self.max
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Arc<Entry>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Handshake {
    /// Notes that it is a client's.
    pub(super) fn has_spoken(&self) {
        self.entry.spoke.store(true, Ordering::Relaxed);
    }

    /// Ends when a newer one needs the place.
    pub(super) fn evicted(&self) -> WaitForCancellationFuture<'_> {
        self.entry.evicted.cancelled()
    }
}

impl Drop for Handshake {
    fn drop(&mut self) {
        self.all.lock().retain(|other| !Arc::ptr_eq(other, &self.entry));
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use crate::disk::BoxFuture;
    use crate::server::{Export, Exports, OpenError, Server, Tls};
    use crate::{Limits, layers::MemoryDisk};

    use super::*;

    #[test]
    fn the_silent_leave_first_and_then_the_oldest() {
        let all = Arc::new(Handshakes::new(2));
        let (client, silent) = (all.enter(), all.enter());
        client.has_spoken();
        let third = all.enter();
        assert!(silent.evicted().now_or_never().is_some() && client.evicted().now_or_never().is_none());
        third.has_spoken();
        let _fourth = all.enter();
        assert!(client.evicted().now_or_never().is_some());
        drop((client, silent));
        assert!(all.are_full(), "who has left leaves once");
    }

    /// Finds no export without a bug.
    struct Panicking;

    impl Exports for Panicking {
        fn open<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Result<Export, OpenError>> {
            panic!("told to panic")
        }

        fn list(&self) -> BoxFuture<'_, Vec<(String, String)>> {
            Box::pin(async { Vec::new() })
        }
    }

    /// Once, their places were never free again, and clients in the handshake were ended to make place for others.
    #[tokio::test]
    async fn connections_that_panic_or_are_dropped_leave_their_places() {
        let server = Server::new(Arc::new(Panicking), Limits::default(), Tls::Off);
        let (mut client, stream) = tokio::io::duplex(1 << 16);
        let serving = tokio::spawn({
            let server = server.clone();
            async move { server.serve_stream(stream, CancellationToken::new()).await }
        });
        client.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x04disk").await.unwrap();
        assert!(serving.await.unwrap_err().is_panic());
        assert!(server.shared.handshakes.lock().is_empty());

        let export = Export::new("disk", Arc::new(MemoryDisk::new(4096)));
        let server = Server::new(Arc::new(export), Limits::default(), Tls::Off);
        let (mut client, stream) = tokio::io::duplex(1 << 16);
        let serving = tokio::spawn({
            let server = server.clone();
            async move { server.serve_stream(stream, CancellationToken::new()).await }
        });
        client.read_exact(&mut [0; 18]).await.unwrap();
        assert_eq!(server.shared.handshakes.lock().len(), 1);
        serving.abort();
        assert!(serving.await.unwrap_err().is_cancelled());
        assert!(server.shared.handshakes.lock().is_empty());
    }
}
