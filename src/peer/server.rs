//! The answering side: takes connections from other nodes and serves what this one holds, complete or not.
//!
//! One task a connection reads requests, one writes replies, and each request in flight has a short task between
//! them. Replies for guests that wait go first, then the stream, then fill. Everything is bounded, for each peer and in all:
//! connections, requests in flight, replies that are in memory. A peer that does not read, or hardly, is dropped, and so is
//! one that asks nothing. Who has not been greeted yet waits in a hall, apart from the places of those who have.

mod answer;
mod members;
mod session;

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bootcache_nbd::disk::BoxFuture;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::choose::{Ledger, PeerKey};
use crate::digest::Digest;

use super::fault::Faults;
use super::holding::Holding;
use super::message::{Load, Wanted};
use super::tracker::Tracker;
use super::transport::Security;
use super::uplink::Uplink;
use crate::wire::hall::{Hall, Place};
use crate::wire::io::WireError;
use members::{CONNECTIONS_OF_ONE_MAX, Members};

/// Two for each node of a burst; more nodes are turned away, and come again.
const CONNECTIONS_MAX: usize = 4096;
/// Connections that have not been greeted yet; with more, the oldest leaves.
const STRANGERS_MAX: usize = 256;
/// Of those, from one address: half, so that nobody has the hall alone.
const STRANGERS_OF_ONE_MAX: usize = STRANGERS_MAX / 2;

/// Why a node gives nothing of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lack {
    /// It does not have it, and is not getting it.
    Absent,
    /// It has it, and cannot read it.
    Unreadable,
}

/// Where the server finds images.
pub trait Provider: Send + Sync + 'static {
    /// The image that is meant, if this node has it or is getting it. Very many may wait for it at once.
    fn find(self: Arc<Self>, wanted: Wanted) -> BoxFuture<'static, Result<Arc<Holding>, Lack>>;

    /// This node's load, as it is told to peers.
    fn load(&self) -> Load {
        Load::default()
    }
}

/// What a server is told.
#[derive(Debug, Default)]
pub struct ServerOptions {
    /// What protects connections.
    pub security: Security,
    /// What this node calls itself.
    pub node: String,
    /// What stands for this node in the order of the relay.
    pub key: u64,
    /// What this node has promised to send.
    pub uplink: Arc<Uplink>,
    /// What is done to answers; for tests.
    pub faults: Option<Arc<Faults>>,
}

/// Bytes sent and requests taken, by kind.
#[derive(Debug, Default)]
pub struct ServerCounters {
    /// Bytes of boot frames.
    pub stream_bytes: AtomicU64,
    /// Bytes of blocks for which a guest waited.
    pub demand_bytes: AtomicU64,
    /// Bytes of other blocks.
    pub fill_bytes: AtomicU64,
    /// Bytes of everything else: manifests, heads, trees, and what is held.
    pub other_bytes: AtomicU64,
    /// Requests answered.
    pub requests: AtomicU64,
    /// Requests refused: too large, or for what is not here.
    pub refused: AtomicU64,
    /// Connections open now.
    pub connections: AtomicU64,
}

/// The peer server of a node. Cheap to share; serves any number of listeners.
pub struct Server {
    provider: Arc<dyn Provider>,
    options: ServerOptions,
    tracker: Tracker,
    ledgers: Mutex<HashMap<Digest, Ledger>>,
    counters: Arc<ServerCounters>,
    next_connection: AtomicU64,
    hall: Arc<Hall>,
    places: Semaphore,
    members: Arc<Members>,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("options", &self.options).finish_non_exhaustive()
    }
}

impl Server {
    /// A server of what `provider` finds.
    pub fn new(provider: Arc<dyn Provider>, options: ServerOptions) -> Arc<Self> {
        Arc::new(Self {
            provider,
            options,
            tracker: Tracker::default(),
            ledgers: Mutex::new(HashMap::new()),
            counters: Arc::new(ServerCounters::default()),
            next_connection: AtomicU64::new(1),
            hall: Hall::new(STRANGERS_MAX, STRANGERS_OF_ONE_MAX),
            places: Semaphore::new(CONNECTIONS_MAX),
            members: Members::new(),
        })
    }

    /// What was served so far.
    pub fn counters(&self) -> &Arc<ServerCounters> {
        &self.counters
    }

    /// Listens on `address`, and says on which one in the end.
    ///
    /// # Errors
    /// Those of the socket, and a refusal to listen in the clear beyond loopback.
    pub async fn listen(&self, address: SocketAddr) -> io::Result<(TcpListener, SocketAddr)> {
        self.options
            .security
            .check(address)
            .map_err(|error| io::Error::new(io::ErrorKind::PermissionDenied, error))?;
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        Ok((listener, address))
    }

    /// Serves `listener` until `stop`; ends when every connection has.
    pub async fn run(self: Arc<Self>, listener: TcpListener, stop: CancellationToken) {
        let tasks = TaskTracker::new();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = stop.cancelled() => break,
            };
            let (stream, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "cannot take a peer's connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let Some(place) = self.hall.enter(address.ip()).await else {
                tracing::debug!(%address, "too many connections of one address say nothing: one is turned away");
                continue;
            };
            let server = Arc::clone(&self);
            let stop = stop.clone();
            tasks.spawn(async move {
                tokio::select! {
                    () = server.connection(stream, address, place) => {}
                    () = stop.cancelled() => {}
                }
            });
        }
        tasks.close();
        tasks.wait().await;
    }

    /// This node's load, as it is told to peers.
    fn load(&self) -> Load {
        let load = self.provider.load();
        Load { network: self.options.uplink.load(load.network), ..load }
    }

    async fn connection(&self, stream: TcpStream, address: SocketAddr, place: Place) {
        let id = self.next_connection.fetch_add(1, Ordering::Relaxed);
        self.counters.connections.fetch_add(1, Ordering::Relaxed);
        if let Err(error) = self.converse(stream, address, id, place).await {
            tracing::debug!(%address, %error, "a peer's connection ended");
        }
        let gone = self.tracker.leave(id);
        let mut ledgers = self.ledgers.lock().unwrap_or_else(PoisonError::into_inner);
        for (root, key) in gone {
            if let Some(ledger) = ledgers.get_mut(&root) {
                ledger.forget(PeerKey(key));
            }
        }
        drop(ledgers);
        self.counters.connections.fetch_sub(1, Ordering::Relaxed);
    }

    async fn converse(
        &self,
        stream: TcpStream,
        address: SocketAddr,
        id: u64,
        hall: Place,
    ) -> Result<(), WireError> {
        let greeted = async {
            let (mut stream, caller) = self.options.security.accept(stream).await?;
            let hello = session::greet(self, &mut stream).await?;
            Ok::<_, WireError>((stream, caller, hello))
        };
        let (stream, caller, hello) = tokio::select! {
            greeted = greeted => greeted?,
            () = hall.evicted() => return Err(io::Error::other("newer connections needed the place").into()),
        };
        drop(hall);
        let Some(hello) = hello else { return Ok(()) };
        let Ok(_place) = self.places.try_acquire() else {
            tracing::warn!(%address, "too many peers are connected: one is turned away");
            return Ok(());
        };
        let Some(member) = self.members.enter(&caller, address) else {
            tracing::warn!(%address, most = CONNECTIONS_OF_ONE_MAX, "a peer has too many connections: one is turned away");
            return Ok(());
        };
        session::run(self, stream, &hello, member, address, id).await
    }
}

#[cfg(test)]
pub(super) mod tests {
    use tokio::io::AsyncReadExt;
    use tokio::net::TcpSocket;

    use super::*;
    use crate::peer::connection::Connection;
    use crate::peer::message::{Hello, PROTOCOL_VERSION};

    /// A node without images.
    pub(in crate::peer) struct Nothing;

    impl Provider for Nothing {
        fn find(self: Arc<Self>, _: Wanted) -> BoxFuture<'static, Result<Arc<Holding>, Lack>> {
            Box::pin(std::future::ready(Err(Lack::Absent)))
        }
    }

    #[tokio::test]
    async fn who_only_connects_keeps_no_node_out() {
        let server = Server::new(Arc::new(Nothing), ServerOptions::default());
        let (listener, address) = server.listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let stop = CancellationToken::new();
        let serving = tokio::spawn(Arc::clone(&server).run(listener, stop.clone()));
        let stranger = async |from: &str| {
            let socket = TcpSocket::new_v4().unwrap();
            socket.bind(from.parse().unwrap()).unwrap();
            socket.connect(address).await.unwrap()
        };
        let mut silent = Vec::new();
        for from in ["127.0.0.2:0", "127.0.0.3:0"] {
            for _ in 0..STRANGERS_OF_ONE_MAX {
                silent.push(stranger(from).await);
            }
            // One more of the same address.
            assert!(matches!(stranger(from).await.read(&mut [0]).await, Ok(0) | Err(_)));
        }
        let hello = Hello { version: PROTOCOL_VERSION, node: "n1".to_owned(), key: 7, listen: None };
        Connection::open(address, &Security::default(), &hello).await.unwrap();
        // The oldest went for it, and no other.
        assert!(matches!(silent.remove(0).read(&mut [0]).await, Ok(0) | Err(_)));
        let waits = |stream: &TcpStream| stream.try_read(&mut [0]).map_err(|error| error.kind());
        assert!(silent.iter().all(|stream| waits(stream) == Err(io::ErrorKind::WouldBlock)));
        stop.cancel();
        serving.await.unwrap();
    }
}
