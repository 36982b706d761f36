//! An asynchronous client: many requests in flight on a connection, several connections, reconnecting.
//!
//! [`Client`] is one or more connections to one export. A request goes to the connection with the fewest in flight of
//! those that are whole; when that breaks, the request is sent again on another, or on a new one, as [`Policy`] says. Two
//! things follow that the protocol leaves open. A write whose connection broke may have been carried out, or be carried out
//! still while it is sent again: only when it has been answered, and a flush behind it too, is it settled. And a server
//! that comes back may have lost writes that were answered and not flushed: the next [`Client::flush`] fails then.
//!
//! The server is not trusted: every length, offset and cookie that it sends is checked, and what does not fit ends
//! the connection with an error.

mod call;
mod link;
mod lost;
mod negotiation;

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use call::Call;
use link::Link;
use lost::Changes;
pub use negotiation::{ExportDescription, HandshakeError, handshake};

use crate::chunk::Style;
use crate::consts::{command, command_flag};
use crate::disk::{StatusExtent, ZeroFlags};
use crate::negotiate::Stream;

/// A request that breaks so many connections, one after the other, is not sent again: it may be what breaks them.
const BROKEN_MAX: u32 = 3;
/// Pause before a connection is tried again; each further one is twice as long.
const PAUSE: Duration = Duration::from_millis(50);

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
    /// How many connections; more than one only if the server says that it allows it, and has a place for them.
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
    changes: Changes,
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
            // A server may have no place for as many: then it is those that it has.
            let Ok((next, other)) = target.link().await else { break };
            if other.size != description.size {
                return Err(io::Error::other("the server shows the export in two sizes"));
            }
            links.push(next);
        }
        let slot = |link| Slot { link: Mutex::new(Arc::new(link)), remaking: tokio::sync::Mutex::default() };
        let links = links.into_iter().map(slot).collect();
        Ok(Self { shared: Arc::new(Shared { target, description, links, changes: Changes::default() }) })
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
        self.send(&Call { length, ..Call::new(command::READ, offset) }).await.map(|answer| answer.data)
    }

    /// The same, answered as one (`NBD_CMD_FLAG_DF`): an error leaves nothing of it.
    pub async fn read_unfragmented(&self, offset: u64, length: u32) -> io::Result<Vec<u8>> {
        let call =
            Call { flags: command_flag::DF, length: length.into(), ..Call::new(command::READ, offset) };
        self.send(&call).await.map(|answer| answer.data)
    }

    /// Writes `data` at `offset`; durable when it returns if `fua`.
    pub async fn write(&self, offset: u64, data: &[u8], fua: bool) -> io::Result<()> {
        let length = data.len() as u64;
        let call = Call { flags: fua_flag(fua), length, payload: data, ..Call::new(command::WRITE, offset) };
        self.send(&call).await.map(drop)
    }

    /// Makes all answered writes durable.
    ///
    /// # Errors
    ///
    /// Besides the server's: connections were made again behind writes that had not been flushed. If the server was
    /// another one by then, those are lost; they have to be written again. A second flush covers what came behind them.
    pub async fn flush(&self) -> io::Result<()> {
        let before = self.shared.changes.count();
        self.send(&Call::new(command::FLUSH, 0)).await?;
        self.shared.changes.flushed(before)
    }

    /// Tells that a range is not needed; with `fua`, what becomes of it is durable.
    pub async fn trim(&self, offset: u64, length: u64, fua: bool) -> io::Result<()> {
        self.send(&Call { flags: fua_flag(fua), length, ..Call::new(command::TRIM, offset) }).await.map(drop)
    }

    /// Makes a range read as zeroes; durable when it returns if `fua`.
    pub async fn zero(&self, offset: u64, length: u64, how: ZeroFlags, fua: bool) -> io::Result<()> {
        let no_hole = if how.no_hole { command_flag::NO_HOLE } else { 0 };
        let fast = if how.fast { command_flag::FAST_ZERO } else { 0 };
        let flags = fua_flag(fua) | no_hole | fast;
        self.send(&Call { flags, length, ..Call::new(command::WRITE_ZEROES, offset) }).await.map(drop)
    }

    /// Asks for a range to be read ahead.
    pub async fn prefetch(&self, offset: u64, length: u64) -> io::Result<()> {
        self.send(&Call { length, ..Call::new(command::CACHE, offset) }).await.map(drop)
    }

    /// Status of a range in `base:allocation`: one extent at least. They cover the range, or the first part of it; the last
    /// may reach past it.
    pub async fn status(&self, offset: u64, length: u64) -> io::Result<Vec<StatusExtent>> {
        let call = Call { length, ..Call::new(command::BLOCK_STATUS, offset) };
        self.send(&call).await.map(|answer| answer.extents)
    }

    /// The first extent of a range in `base:allocation`, cut to the range (`NBD_CMD_FLAG_REQ_ONE`).
    pub async fn status_one(&self, offset: u64, length: u64) -> io::Result<StatusExtent> {
        let flags = command_flag::REQ_ONE;
        let answer = self.send(&Call { flags, length, ..Call::new(command::BLOCK_STATUS, offset) }).await?;
        match answer.extents[..] {
            [one] if one.length <= length => Ok(one),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the NBD server gave more than one extent")),
        }
    }

    /// Says goodbye on every connection.
    pub async fn close(self) {
        for slot in &self.shared.links {
            slot.get().disconnect().await;
        }
    }

    /// Sends a request until it is answered, as often as the policy allows.
    async fn send(&self, call: &Call<'_>) -> io::Result<link::Answer> {
        let Shared { target, description, changes, .. } = &*self.shared;
        call.check(description)?;
        let deadline = tokio::time::Instant::now() + target.policy.reconnect;
        let (mut broken, mut pause) = (0, PAUSE);
        let mut last = io::Error::from(io::ErrorKind::NotConnected);
        loop {
            let (slot, link) = self.choose();
            if link.is_broken() {
                if target.policy.reconnect.is_zero() {
                    return Err(last);
                }
                self.remake(slot, &link, deadline).await?;
                continue;
            }
            let generation = changes.generation();
            last = match link.call(call).await {
                Err(error) if error.raw_os_error() == Some(SHUTDOWN) => {
                    link.retire().await;
                    error
                }
                Err(error) if link.is_broken() => {
                    broken += 1;
                    error
                }
                answer => {
                    if answer.is_ok() && call.leaves_changes() {
                        changes.answered(generation);
                    }
                    return answer;
                }
            };
            if broken == BROKEN_MAX {
                return Err(last);
            }
            // The first break may be any connection's end. After more of them, and for a server that ends, there is a pause.
            if !target.policy.reconnect.is_zero() && broken != 1 {
                if tokio::time::Instant::now() + pause > deadline {
                    return Err(last);
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(target.policy.pause_max);
            }
        }
    }

    /// The connection for the next request: one that is whole if there is such, with the fewest requests in flight.
    fn choose(&self) -> (&Slot, Arc<Link>) {
        let links = self.shared.links.iter().map(|slot| (slot, slot.get()));
        links.min_by_key(|(_, link)| (link.is_broken(), link.in_flight())).expect("there is one at least")
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
            let mut pause = PAUSE;
            while Arc::ptr_eq(&slot.get(), broken) {
                let Shared { target, description, changes, .. } = &*self.shared;
                match target.link().await {
                    Ok((_, other)) if !description.is_kept_by(&other) => {
                        return Err(io::Error::other("the export is not what it was"));
                    }
                    Ok((link, _)) => {
                        changes.connected_again();
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

/// `ESHUTDOWN`: the server ends, and wants its clients to leave.
const SHUTDOWN: i32 = rustix::io::Errno::SHUTDOWN.raw_os_error();

const fn fua_flag(fua: bool) -> u16 {
    if fua { command_flag::FUA } else { 0 }
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
