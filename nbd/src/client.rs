//! An asynchronous client: many requests in flight on a connection, several connections, reconnecting.
//!
//! [`Client`] is one or more connections to one export. A request goes to the connection with the fewest in flight;
//! when that breaks, the request is sent again on another, or on a new one, as [`Policy`] says. That is harmless:
//! every NBD command may be repeated.
//!
//! The server is not trusted: every length, offset and cookie that it sends is checked, and what does not fit ends
//! the connection with an error.

mod link;
mod negotiation;

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use link::Link;
pub use negotiation::{ExportDescription, HandshakeError, handshake};

use crate::chunk::Style;
use crate::consts::{command, command_flag};
use crate::disk::StatusExtent;
use crate::negotiate::Stream;

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// TCP.
    Tcp(SocketAddr),
}

/// What a client does about connections.
#[derive(Debug, Clone, Copy)]
pub struct Policy {
    /// How many connections; more than one only if the server says that it allows it.
    pub connections: usize,
    /// Time for a connection and its handshake.
    pub connect_timeout: Duration,
    /// How long a request may wait for a broken connection to be made again; zero never reconnects.
    pub reconnect: Duration,
    /// Longest pause between two attempts; the first is 50 ms, each further one twice as long.
    pub pause_max: Duration,
    /// The most modern replies to ask for; the server may know older ones only. Lengths of 4 GiB and more, for what
    /// carries no data, need [`Style::Extended`].
    pub style: Style,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            connections: 1,
            connect_timeout: Duration::from_secs(10),
            reconnect: Duration::ZERO,
            pause_max: Duration::from_secs(2),
            style: Style::Extended,
        }
    }
}

/// How connections are protected.
#[derive(Debug, Clone, Default)]
pub enum Security {
    /// Not at all.
    #[default]
    Plain,
    /// By TLS, always: a server that does not offer it, or is not of that name, is refused.
    #[cfg(feature = "tls")]
    Tls(Arc<rustls::ClientConfig>, rustls::pki_types::ServerName<'static>),
}

/// An open export. Cheap to clone; clones share the connections.
#[derive(Debug, Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    target: Target,
    description: ExportDescription,
    links: Vec<Slot>,
}

/// Whom to connect to, and how.
#[derive(Debug)]
struct Target {
    address: Address,
    export: String,
    policy: Policy,
    security: Security,
}

/// A place for a connection; remade by one task at a time when it breaks.
#[derive(Debug)]
struct Slot {
    link: Mutex<Arc<Link>>,
    remaking: tokio::sync::Mutex<()>,
}

impl Slot {
    fn get(&self) -> Arc<Link> {
        Arc::clone(&self.link.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Client {
    /// Opens `export` on the server at `address`.
    ///
    /// # Errors
    ///
    /// The server cannot be reached, refuses the export, or breaks the protocol.
    pub async fn connect(address: Address, export: &str, policy: Policy) -> io::Result<Self> {
        Self::connect_securely(address, export, policy, Security::Plain).await
    }

    /// The same, protected as `security` says.
    ///
    /// # Errors
    ///
    /// As for [`Client::connect`]; and the server is not who it should be, or offers no protection.
    pub async fn connect_securely(
        address: Address,
        export: &str,
        policy: Policy,
        security: Security,
    ) -> io::Result<Self> {
        let target = Target { address, export: export.to_owned(), policy, security };
        let (first, description) = target.link().await?;
        let mut links = vec![first];
        let more = if description.can_multi_conn() { policy.connections } else { 1 };
        while links.len() < more {
            let (next, other) = target.link().await?;
            if other.size != description.size {
                return Err(io::Error::other("the server shows the export in two sizes"));
            }
            links.push(next);
        }
        let slot = |link| Slot { link: Mutex::new(Arc::new(link)), remaking: tokio::sync::Mutex::default() };
        let links = links.into_iter().map(slot).collect();
        Ok(Self { shared: Arc::new(Shared { target, description, links }) })
    }

    /// What the server says of the export.
    pub fn description(&self) -> &ExportDescription {
        &self.shared.description
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.shared.description.size
    }

    /// Reads `length` bytes at `offset`. Dropping the future abandons the read; the connection stays usable.
    pub async fn read(&self, offset: u64, length: u32) -> io::Result<Vec<u8>> {
        let length = length.into();
        self.send(link::Call { command: command::READ, flags: 0, offset, length, payload: &[] })
            .await
            .map(|answer| answer.data)
    }

    /// Writes `data` at `offset`; durable when it returns if `fua`.
    pub async fn write(&self, offset: u64, data: &[u8], fua: bool) -> io::Result<()> {
        let length = data.len() as u64;
        let flags = if fua { command_flag::FUA } else { 0 };
        self.send(link::Call { command: command::WRITE, flags, offset, length, payload: data })
            .await
            .map(drop)
    }

    /// Makes all answered writes durable.
    pub async fn flush(&self) -> io::Result<()> {
        self.plain(command::FLUSH, 0, 0, 0).await
    }

    /// Tells that a range is not needed.
    pub async fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        self.plain(command::TRIM, 0, offset, length).await
    }

    /// Makes a range read as zeroes; it stays allocated if `no_hole`.
    pub async fn zero(&self, offset: u64, length: u64, no_hole: bool) -> io::Result<()> {
        let flags = if no_hole { command_flag::NO_HOLE } else { 0 };
        self.plain(command::WRITE_ZEROES, flags, offset, length).await
    }

    /// Asks for a range to be read ahead.
    pub async fn prefetch(&self, offset: u64, length: u64) -> io::Result<()> {
        self.plain(command::CACHE, 0, offset, length).await
    }

    /// Status of a range in `base:allocation`; covers at least the first part of it.
    pub async fn status(&self, offset: u64, length: u64) -> io::Result<Vec<StatusExtent>> {
        let call = link::Call { command: command::BLOCK_STATUS, flags: 0, offset, length, payload: &[] };
        self.send(call).await.map(|answer| answer.extents)
    }

    /// Says goodbye on every connection.
    pub async fn close(self) {
        for slot in &self.shared.links {
            slot.get().disconnect().await;
        }
    }

    async fn plain(&self, command: u16, flags: u16, offset: u64, length: u64) -> io::Result<()> {
        self.send(link::Call { command, flags, offset, length, payload: &[] }).await.map(drop)
    }

    async fn send(&self, call: link::Call<'_>) -> io::Result<link::Answer> {
        let end = call.offset.checked_add(call.length);
        if end.is_none_or(|end| end > self.shared.description.size) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the range leaves the export"));
        }
        let slots = &self.shared.links;
        let slot = slots.iter().min_by_key(|slot| slot.get().in_flight()).expect("there is one at least");
        let deadline = tokio::time::Instant::now() + self.shared.target.policy.reconnect;
        loop {
            let link = slot.get();
            match link.call(&call).await {
                Err(error) if link.is_broken() => {
                    if self.shared.target.policy.reconnect.is_zero() {
                        return Err(error);
                    }
                    self.remake(slot, &link, deadline).await?;
                }
                other => return other,
            }
        }
    }

    /// Replaces a broken connection, or waits while somebody else does.
    async fn remake(
        &self,
        slot: &Slot,
        broken: &Arc<Link>,
        deadline: tokio::time::Instant,
    ) -> io::Result<()> {
        let attempt = async {
            let _alone = slot.remaking.lock().await;
            let mut pause = Duration::from_millis(50);
            while Arc::ptr_eq(&slot.get(), broken) {
                let Shared { target, description, .. } = &*self.shared;
                match target.link().await {
                    Ok((_, other)) if other.size != description.size => {
                        return Err(io::Error::other("the export has another size now"));
                    }
                    Ok((link, _)) => {
                        *slot.link.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(link);
                    }
                    Err(error) => {
                        tracing::debug!("the NBD server is not back yet: {error}");
                        tokio::time::sleep(pause).await;
                        pause = (pause * 2).min(target.policy.pause_max);
                    }
                }
            }
            Ok(())
        };
        tokio::time::timeout_at(deadline, attempt).await.unwrap_or_else(|_| {
            Err(io::Error::new(io::ErrorKind::TimedOut, "the NBD server did not come back"))
        })
    }
}

impl Target {
    /// Connects and leads the handshake.
    async fn link(&self) -> io::Result<(Link, ExportDescription)> {
        let connect = async {
            let stream: Box<dyn Stream> = match &self.address {
                Address::Unix(path) => Box::new(tokio::net::UnixStream::connect(path).await?),
                Address::Tcp(address) => {
                    let stream = tokio::net::TcpStream::connect(address).await?;
                    stream.set_nodelay(true)?;
                    Box::new(stream)
                }
            };
            let (stream, description) =
                negotiation::client(stream, &self.export, self.policy.style, &self.security).await?;
            Ok((Link::new(stream, &description), description))
        };
        let timeout = self.policy.connect_timeout;
        tokio::time::timeout(timeout, connect).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }
}
