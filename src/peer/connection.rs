//! The asking side of one connection: many requests in flight, answers in any order.
//!
//! Two tasks own the socket; [`Connection`] is the handle that reads like functions. Dropping a call cancels it at
//! the server. When the connection breaks, every call in flight ends with [`CallError::Closed`].

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::digest::Digest;
use crate::wire::frame::{self, BULK_PAYLOAD_MAX, CONTROL_PAYLOAD_MAX, FrameType};
use crate::wire::io::{WireError, ended, read_frame, write_message};

use super::message::{Answer, Ask, Have, Hello, NODE_NAME_MAX, PROTOCOL_VERSION, Reply, Request};
use super::pace::{Meter, Paced};
use super::transport::{Security, Transport};

const HELLO_TIMEOUT: Duration = Duration::from_secs(2);
/// Requests that wait for the socket; more make the caller wait.
const QUEUE: usize = 64;

/// Why a connection was not made.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nobody there, or not to be spoken to.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Something else than bootcache.
    #[error("it does not answer as a node does: {0}")]
    Wire(#[from] WireError),
    /// Another version.
    #[error("it speaks version {theirs} of the peer protocol, this node {PROTOCOL_VERSION}: use one release")]
    Version {
        /// What the other side speaks.
        theirs: u16,
    },
}

/// Why a call has no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// The connection is gone.
    #[error("the connection broke")]
    Closed,
    /// The request is too large to send: a bug.
    #[error("the request cannot be sent")]
    Unsendable,
}

/// An answer, and the bytes beside it.
#[derive(Debug)]
pub struct Answered {
    /// The head.
    pub answer: Answer,
    payload: Vec<u8>,
    bulk_at: usize,
}

impl Answered {
    /// The bulk bytes.
    pub fn bulk(&self) -> &[u8] {
        &self.payload[self.bulk_at..]
    }
}

enum Pending {
    Once { sender: oneshot::Sender<Answered>, asked: Instant },
    Watch(watch::Sender<Have>),
}

/// A connection to a peer. Cloning gives another handle; the last one that is dropped closes it.
#[derive(Debug, Clone)]
pub struct Connection {
    shared: Arc<Shared>,
}

struct Shared {
    address: SocketAddr,
    node: String,
    key: u64,
    requests: mpsc::Sender<Vec<u8>>,
    pending: Arc<Mutex<HashMap<u32, Pending>>>,
    next: AtomicU32,
    meter: Arc<Meter>,
    closed: CancellationToken,
    _close: DropGuard,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Connection {
    /// Connects to the node at `address`, as `hello`, and greets it.
    ///
    /// # Errors
    /// [`ConnectError`]; within some seconds.
    pub async fn open(address: SocketAddr, security: &Security, hello: &Hello) -> Result<Self, ConnectError> {
        let mut stream = security.connect(address).await?;
        let greet = async {
            write_message(&mut stream, FrameType::PEER_HELLO, hello).await?;
            match read_frame(&mut stream, CONTROL_PAYLOAD_MAX).await? {
                Some((FrameType::PEER_HELLO, payload)) => Ok(frame::decode::<Hello>(&payload)?),
                Some(_) => Err(io::Error::from(io::ErrorKind::InvalidData).into()),
                None => Err(ended().into()),
            }
        };
        let timed_out = |_| io::Error::from(io::ErrorKind::TimedOut);
        let theirs: Result<Hello, WireError> =
            tokio::time::timeout(HELLO_TIMEOUT, greet).await.map_err(timed_out)?;
        let theirs = theirs?;
        if theirs.version != PROTOCOL_VERSION {
            return Err(ConnectError::Version { theirs: theirs.version });
        }
        let node = theirs.node.chars().filter(|c| !c.is_control()).take(NODE_NAME_MAX).collect();
        Ok(Self::start(stream, address, node, theirs.key))
    }

    fn start(stream: Box<dyn Transport>, address: SocketAddr, node: String, key: u64) -> Self {
        let meter = Arc::new(Meter::new());
        let (reader, writer) = tokio::io::split(Paced::new(stream, Arc::clone(&meter)));
        let (requests, queue) = mpsc::channel(QUEUE);
        let closed = CancellationToken::new();
        let pending = Arc::new(Mutex::new(HashMap::new()));
        tokio::spawn(write_requests(writer, queue, closed.clone()));
        tokio::spawn(read_replies(reader, Arc::clone(&meter), Arc::clone(&pending), closed.clone()));
        let close = closed.clone().drop_guard();
        let next = AtomicU32::new(1);
        let shared = Shared { address, node, key, requests, pending, next, meter, closed, _close: close };
        Self { shared: Arc::new(shared) }
    }

    /// Where it goes.
    pub fn address(&self) -> SocketAddr {
        self.shared.address
    }

    /// What the other side calls itself.
    pub fn node(&self) -> &str {
        &self.shared.node
    }

    /// What stands for the other side in the order of the relay.
    pub fn key(&self) -> u64 {
        self.shared.key
    }

    /// When it last brought something, or was made. On a slow link a reply may be long in coming: its bytes count as well,
    /// unless there are hardly any.
    pub fn last_brought(&self) -> Instant {
        self.shared.meter.last()
    }

    /// How long ago that is.
    pub fn silence(&self) -> Duration {
        self.last_brought().elapsed()
    }

    /// For how long calls have waited without anything coming; none while nobody waits for an answer.
    pub fn stands_still(&self) -> Option<Duration> {
        let oldest = {
            let pending = self.shared.pending.lock().unwrap_or_else(PoisonError::into_inner);
            let asked = pending.values().filter_map(|pending| match pending {
                Pending::Once { asked, .. } => Some(*asked),
                Pending::Watch(_) => None,
            });
            asked.min()?
        };
        Some(oldest.elapsed().min(self.silence()))
    }

    /// Whether it is gone.
    pub fn is_closed(&self) -> bool {
        self.shared.closed.is_cancelled()
    }

    /// Ends when the connection has.
    pub async fn closed(&self) {
        self.shared.closed.cancelled().await;
    }

    /// Ends the connection; every call in flight fails.
    pub fn close(&self) {
        self.shared.closed.cancel();
    }

    fn register(&self, pending: Pending) -> u32 {
        let mut map = self.shared.pending.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let id = self.shared.next.fetch_add(1, Ordering::Relaxed);
            if let std::collections::hash_map::Entry::Vacant(entry) = map.entry(id) {
                entry.insert(pending);
                return id;
            }
        }
    }

    async fn send(&self, id: u32, ask: Ask) -> Result<(), CallError> {
        let bytes = frame::encode(FrameType::PEER_REQUEST, &Request { id, ask })
            .map_err(|_| CallError::Unsendable)?;
        tokio::select! {
            sent = self.shared.requests.send(bytes) => sent.map_err(|_| CallError::Closed),
            () = self.shared.closed.cancelled() => Err(CallError::Closed),
        }
    }

    /// Asks, and waits for the answer; has no deadline of its own. Dropping the future cancels the request.
    ///
    /// # Errors
    /// [`CallError::Closed`] when the connection breaks first.
    pub async fn call(&self, ask: Ask) -> Result<Answered, CallError> {
        let (sender, receiver) = oneshot::channel();
        let id = self.register(Pending::Once { sender, asked: Instant::now() });
        let _cancel = Cancel { connection: self, id };
        self.send(id, ask).await?;
        tokio::select! {
            biased;
            answered = receiver => answered.map_err(|_| CallError::Closed),
            () = self.shared.closed.cancelled() => Err(CallError::Closed),
        }
    }

    /// Follows what the peer has of image `root`, for as long as the connection lives.
    ///
    /// # Errors
    /// [`CallError::Closed`].
    pub async fn watch(&self, root: Digest) -> Result<watch::Receiver<Have>, CallError> {
        let (sender, receiver) = watch::channel(Have::default());
        let id = self.register(Pending::Watch(sender));
        self.send(id, Ask::Watch { root }).await?;
        Ok(receiver)
    }
}

/// Takes a call that has ended out of the table, and cancels it if it was not answered.
struct Cancel<'a> {
    connection: &'a Connection,
    id: u32,
}

impl Drop for Cancel<'_> {
    fn drop(&mut self) {
        let shared = &self.connection.shared;
        let unanswered =
            shared.pending.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id).is_some();
        if unanswered
            && let Ok(bytes) =
                frame::encode(FrameType::PEER_REQUEST, &Request { id: 0, ask: Ask::Cancel { id: self.id } })
        {
            // A full queue only means that the server does the work in vain.
            let _ = shared.requests.try_send(bytes);
        }
    }
}

async fn write_requests(
    mut writer: WriteHalf<Paced>,
    mut queue: mpsc::Receiver<Vec<u8>>,
    closed: CancellationToken,
) {
    let write = async {
        while let Some(mut bytes) = queue.recv().await {
            // What waits goes out in one piece.
            while let Ok(more) = queue.try_recv() {
                bytes.extend_from_slice(&more);
            }
            writer.write_all(&bytes).await?;
            writer.flush().await?;
        }
        io::Result::Ok(())
    };
    tokio::select! {
        _ = write => {}
        () = closed.cancelled() => {}
    }
    closed.cancel();
}

async fn read_replies(
    mut reader: ReadHalf<Paced>,
    meter: Arc<Meter>,
    pending: Arc<Mutex<HashMap<u32, Pending>>>,
    closed: CancellationToken,
) {
    let read = async {
        while let Some((frame_type, payload)) = read_frame(&mut reader, BULK_PAYLOAD_MAX).await? {
            if frame_type != FrameType::PEER_REPLY {
                continue;
            }
            meter.note_reply();
            let (reply, bulk) = frame::decode_bulk::<Reply>(&payload)?;
            let bulk_at = payload.len() - bulk.len();
            let mut pending = pending.lock().unwrap_or_else(PoisonError::into_inner);
            if let (Some(Pending::Watch(sender)), Answer::Have(have)) =
                (pending.get(&reply.id), &reply.answer)
            {
                sender.send_replace(have.clone());
            } else if let Some(Pending::Once { sender, .. }) = pending.remove(&reply.id) {
                // Whoever asked may have stopped waiting.
                let _ = sender.send(Answered { answer: reply.answer, payload, bulk_at });
            }
        }
        Result::<(), WireError>::Ok(())
    };
    tokio::select! {
        result = read => if let Err(error) = result {
            tracing::debug!(%error, "a peer connection ended");
        },
        () = closed.cancelled() => {}
    }
    closed.cancel();
    pending.lock().unwrap_or_else(PoisonError::into_inner).clear();
}
