//! The server: accepts connections, leads each through the handshake, and hands it to its transmission loop.
//!
//! A connection has a task of its own; whatever ends it, an error or a panic, ends nothing else. What clients may ask
//! for is bounded by [`Limits`].

mod handshakes;
mod place;

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use crate::connection;
use crate::disk::{BoxFuture, SharedDisk};
use crate::limits::{Limits, SharedLimits};
use crate::negotiate::{self, Stream};
use crate::tcp;
use handshakes::{Handshake, Handshakes};
pub(crate) use place::Place;

/// What clients have asked of an export so far, all connections together.
#[derive(Debug, Default)]
pub struct ExportStats {
    /// Connections that have it open now.
    pub connections: AtomicU32,
    /// Read requests.
    pub reads: AtomicU64,
    /// Bytes that they asked for.
    pub read_bytes: AtomicU64,
    /// Write requests.
    pub writes: AtomicU64,
    /// Bytes that they brought.
    pub written_bytes: AtomicU64,
}

/// One thing that clients may open.
#[derive(Clone)]
pub struct Export {
    /// Its name on the wire.
    pub name: String,
    /// For people; may be empty.
    pub description: String,
    /// What is behind it.
    pub disk: SharedDisk,
    /// Ends the export's connections when it is cancelled, for instance because the disk goes away.
    pub closed: CancellationToken,
    /// What was asked of it.
    pub stats: Arc<ExportStats>,
}

impl std::fmt::Debug for Export {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Export").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Export {
    /// An export that stays until the server ends.
    pub fn new(name: impl Into<String>, disk: SharedDisk) -> Self {
        let (name, description) = (name.into(), String::new());
        Self { name, description, disk, closed: CancellationToken::new(), stats: Arc::default() }
    }
}

/// Why an export is not opened: a message for the client's person.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// There is none of that name.
    #[error("{0}")]
    Unknown(String),
    /// There is one, and it is not to be had: somebody else uses it, or it is damaged.
    #[error("{0}")]
    Refused(String),
    /// The server ends; another may have it soon.
    #[error("{0}")]
    Shutdown(String),
}

/// Where a server finds its exports. They may come and go while it runs.
pub trait Exports: Send + Sync + 'static {
    /// The export of that name; the empty name is the default export.
    fn open<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Export, OpenError>>;

    /// Names and descriptions of what there is; empty if clients are not to be told.
    fn list(&self) -> BoxFuture<'_, Vec<(String, String)>>;
}

/// A server of one export, which is also the default one, and which is not listed.
impl Exports for Export {
    fn open<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Export, OpenError>> {
        let found = name.is_empty() || name == self.name;
        let unknown = || OpenError::Unknown("there is no export of that name".to_owned());
        let answer = found.then(|| self.clone()).ok_or_else(unknown);
        Box::pin(async { answer })
    }

    fn list(&self) -> BoxFuture<'_, Vec<(String, String)>> {
        Box::pin(async { Vec::new() })
    }
}

/// Whether connections are encrypted.
#[derive(Debug, Clone, Default)]
pub enum Tls {
    /// Never.
    #[default]
    Off,
    /// When the client asks for it.
    #[cfg(feature = "tls")]
    Allowed(Arc<rustls::ServerConfig>),
    /// Always: nothing but STARTTLS is answered before it.
    #[cfg(feature = "tls")]
    Required(Arc<rustls::ServerConfig>),
}

/// An NBD server. Cheap to clone; clones share exports and limits.
#[derive(Clone)]
pub struct Server {
    shared: Arc<Shared>,
    tls: Tls,
}

pub(crate) struct Shared {
    pub(crate) exports: Arc<dyn Exports>,
    pub(crate) limits: Limits,
    /// As in [`SharedLimits`], which other servers may have too.
    pub(crate) bytes: Arc<Semaphore>,
    pub(crate) pieces: connection::Pieces,
    pub(crate) pipes: connection::Pipes,
    connections: Arc<Semaphore>,
    per_export: Mutex<HashMap<String, usize>>,
    handshakes: Arc<Handshakes>,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("limits", &self.shared.limits).finish_non_exhaustive()
    }
}

impl Server {
    /// A server of `exports` within `limits`: [`Limits`] of its own, or [`SharedLimits`] with others.
    pub fn new(exports: Arc<dyn Exports>, limits: impl Into<SharedLimits>, tls: Tls) -> Self {
        let SharedLimits { limits, connections, bytes, pieces, pipes } = limits.into();
        let shared = Shared {
            exports,
            limits,
            bytes,
            pieces,
            pipes,
            connections,
            per_export: Mutex::default(),
            handshakes: Arc::new(Handshakes::new(limits.handshakes)),
        };
        Self { shared: Arc::new(shared), tls }
    }

    /// The same server for sockets that are protected otherwise; exports and limits are shared.
    #[must_use]
    pub fn with_tls(&self, tls: Tls) -> Self {
        Self { shared: Arc::clone(&self.shared), tls }
    }

    /// Serves a Unix socket until `cancel`, which closes it; returns when its connections have ended.
    pub async fn serve_unix(&self, listener: UnixListener, cancel: CancellationToken) {
        self.serve(Listener::Unix(listener), cancel).await;
    }

    /// Serves a TCP socket until `cancel`, which closes it; returns when its connections have ended.
    pub async fn serve_tcp(&self, listener: TcpListener, cancel: CancellationToken) {
        self.serve(Listener::Tcp(listener), cancel).await;
    }

    async fn serve(&self, listener: Listener, cancel: CancellationToken) {
        let tasks = TaskTracker::new();
        loop {
            let accepted = tokio::select! {
                () = cancel.cancelled() => break,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok(stream) => {
                    if self.shared.handshakes.are_full() {
                        // Those that have left, or have sent what they have to, are seen before one is ended.
                        tokio::task::yield_now().await;
                    }
                    let (server, cancel) = (self.clone(), cancel.child_token());
                    // Here and not in the task: tasks start in any order, and the oldest is the one to leave.
                    let handshake = self.shared.handshakes.enter();
                    tasks.spawn(async move { server.connection(stream, handshake, cancel).await });
                }
                Err(error) => {
                    // Out of descriptors, as a rule: connections that end will free some.
                    warn!("cannot accept an NBD connection: {error}");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
        // Who connects from now on is refused, or served by the next server, instead of being dropped by this one.
        drop(listener);
        tasks.close();
        tasks.wait().await;
    }

    /// Serves one client on a stream that somebody else has accepted, until it leaves or `cancel`.
    ///
    /// Dropping the future ends the connection; requests under way may have been carried out or not.
    pub async fn serve_stream<S>(&self, stream: S, cancel: CancellationToken)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let handshake = self.shared.handshakes.enter();
        self.connection(Box::new(stream), handshake, cancel).await;
    }

    /// One connection, from greeting to end.
    async fn connection(&self, mut stream: Box<dyn Stream>, handshake: Handshake, cancel: CancellationToken) {
        let negotiation = async {
            let flags = negotiate::greet(&mut stream).await?;
            handshake.has_spoken();
            negotiate::server(stream, flags, &self.shared, &self.tls).await
        };
        let negotiated = tokio::select! {
            () = cancel.cancelled() => Err(io::Error::other("the server ends")),
            () = handshake.evicted() => Err(io::Error::other("newer connections needed the place")),
            result = tokio::time::timeout(self.shared.limits.handshake_timeout, negotiation) =>
                result.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())),
        };
        drop(handshake);
        let (stream, agreed) = match negotiated {
            Ok(Some(agreed)) => agreed,
            Ok(None) => return,
            Err(error) => return debug!("a handshake failed: {error}"),
        };
        let name = agreed.export.name.clone();
        if let Err(error) = connection::serve(stream, agreed, &self.shared, cancel).await {
            debug!("a connection to '{name}' ended: {error}");
        }
    }
}

/// Where clients come from.
enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    async fn accept(&self) -> io::Result<Box<dyn Stream>> {
        Ok(match self {
            Self::Unix(listener) => Box::new(listener.accept().await?.0),
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                tcp::prepare(&stream)?;
                Box::new(stream)
            }
        })
    }
}
