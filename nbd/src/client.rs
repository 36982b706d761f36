//! An asynchronous client: many requests in flight on a connection, several connections, reconnecting.
//!
//! [`Client`] is one or more connections to one export. A request goes to the connection with the fewest in flight of
//! those that are whole; when that breaks, the request is sent again on another, or on a new one, as [`Policy`] says. Two
//! things follow that the protocol leaves open. A write whose connection broke may have been carried out, or be carried out
//! later than it was sent again: that first copy has no answer, so no flush waits for it, and it may land on top of
//! a newer write to the same place. How late depends on the server; this crate's gives up what had not begun. And a server
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
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::OwnedMutexGuard;
use tokio::time::Instant;

use call::Call;
use link::Link;
use lost::Changes;
pub use negotiation::{ExportDescription, HandshakeError, handshake};

use crate::chunk::Style;
use crate::consts::{command, command_flag};
use crate::disk::{StatusExtent, ZeroFlags};
use crate::limits::TIME_MAX;
use crate::negotiate::Stream;
use crate::tcp;

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
    /// How long a request may wait, from when its connection broke, for one to be made again; zero never reconnects, and
    /// `Duration::MAX` waits for ever. Connections that break while others are whole are made again beside the requests.
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
    target: Arc<Target>,
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
    remaking: Arc<tokio::sync::Mutex<()>>,
}

impl Slot {
    fn get(&self) -> Arc<Link> {
        Arc::clone(&self.lock())
    }

    fn is_broken(&self) -> bool {
        self.lock().is_broken()
    }

    fn lock(&self) -> MutexGuard<'_, Arc<Link>> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner)
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
        let target = Arc::new(Target { address, export: export.to_owned(), policy, security });
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
        let slot = |link| Slot { link: Mutex::new(Arc::new(link)), remaking: Arc::default() };
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

    /// Reads `length` bytes at `offset`.
    ///
    /// Dropping the future abandons the request, this one and every other; the connection stays usable, unless part of the
    /// request had been sent and not all of it: nothing can follow that, and others that wait there are sent again as
    /// after any break. For what has no payload that is rare. Nothing limits the time that a server takes, which may be
    /// long for good reasons: who wants a limit sets one, with `tokio::time::timeout` for instance. A server whose host is
    /// gone is noticed by TCP.
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
    ///
    /// Dropping the future may leave any part of it written, and ends the connection if `data` had been sent in part: likely
    /// for a long write to a server that is busy. Who shares a client should let writes end.
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

    /// Says goodbye on every connection. A server that does not read waits in vain for it, and for no longer than a second.
    pub async fn close(self) {
        let links: Vec<_> = self.shared.links.iter().map(Slot::get).collect();
        futures_util::future::join_all(links.iter().map(|link| link.disconnect())).await;
    }

    /// Sends a request until it is answered, as often as the policy allows.
    async fn send(&self, call: &Call<'_>) -> io::Result<link::Answer> {
        let Shared { target, description, changes, .. } = &*self.shared;
        call.check(description)?;
        let patience = || Instant::now() + target.policy.reconnect.min(TIME_MAX);
        let (mut broken, mut pause, mut deadline) = (0, PAUSE, None);
        let mut last = io::Error::from(io::ErrorKind::NotConnected);
        loop {
            let (slot, link) = self.choose();
            if link.is_broken() {
                if target.policy.reconnect.is_zero() {
                    return Err(last);
                }
                self.remake(slot, *deadline.get_or_insert_with(patience)).await?;
                continue;
            }
            self.mend();
            let generation = changes.generation();
            last = match link.call(call).await {
                Err(error) if error.raw_os_error() == Some(SHUTDOWN) => {
                    link.retire().await;
                    error
                }
                Err(error) if link.is_broken() => {
                    broken += 1;
                    deadline = Some(patience());
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
                if Instant::now() + pause > *deadline.get_or_insert_with(patience) {
                    return Err(last);
                }
                target.rest(&mut pause).await;
            }
        }
    }

    /// The connection for the next request: one that is whole if there is such, with the fewest requests in flight.
    fn choose(&self) -> (&Slot, Arc<Link>) {
        let links = self.shared.links.iter().map(|slot| (slot, slot.get()));
        links.min_by_key(|(_, link)| (link.is_broken(), link.in_flight())).expect("there is one at least")
    }

    /// Replaces a broken connection, or waits while somebody else does.
    async fn remake(&self, slot: &Slot, deadline: Instant) -> io::Result<()> {
        let attempts = async {
            let _alone = slot.remaking.lock().await;
            let mut pause = PAUSE;
            while slot.is_broken() && !self.shared.reconnect(slot).await? {
                self.shared.target.rest(&mut pause).await;
            }
            Ok(())
        };
        tokio::time::timeout_at(deadline, attempts).await.unwrap_or_else(|_| {
            Err(io::Error::new(io::ErrorKind::TimedOut, "the NBD server did not come back"))
        })
    }

    /// Has broken connections made again while others carry the requests, so that all carry them in the end.
    fn mend(&self) {
        if self.shared.target.policy.reconnect.is_zero() {
            return;
        }
        for (place, slot) in self.shared.links.iter().enumerate().filter(|(_, slot)| slot.is_broken()) {
            if let Ok(alone) = Arc::clone(&slot.remaking).try_lock_owned() {
                tokio::spawn(mend(Arc::downgrade(&self.shared), place, alone));
            }
        }
    }
}

/// Makes a connection again for as long as there are a client, and others that are whole: when all are broken, the requests
/// see to it themselves, and have to be told why it cannot be done.
async fn mend(shared: Weak<Shared>, place: usize, _alone: OwnedMutexGuard<()>) {
    let mut pause = PAUSE;
    while let Some(shared) = shared.upgrade() {
        let slot = &shared.links[place];
        let all_are_broken = shared.links.iter().all(Slot::is_broken);
        if all_are_broken || !slot.is_broken() || matches!(shared.reconnect(slot).await, Ok(true)) {
            return;
        }
        let target = Arc::clone(&shared.target);
        drop(shared);
        target.rest(&mut pause).await;
    }
}

impl Shared {
    /// Tries once to put a new connection in the place of a broken one; false if the server is not back.
    async fn reconnect(&self, slot: &Slot) -> io::Result<bool> {
        match self.target.link().await {
            Ok((_, other)) if !self.description.is_kept_by(&other) => {
                Err(io::Error::other("the export is not what it was"))
            }
            Ok((link, _)) => {
                self.changes.connected_again();
                *slot.lock() = Arc::new(link);
                Ok(true)
            }
            Err(error) => {
                tracing::debug!("the NBD server is not back yet: {error}");
                Ok(false)
            }
        }
    }
}

/// `ESHUTDOWN`: the server ends, and wants its clients to leave.
const SHUTDOWN: i32 = rustix::io::Errno::SHUTDOWN.raw_os_error();

const fn fua_flag(fua: bool) -> u16 {
    if fua { command_flag::FUA } else { 0 }
}

impl Target {
    /// Waits before the next attempt.
    async fn rest(&self, pause: &mut Duration) {
        tokio::time::sleep(*pause).await;
        *pause = (*pause * 2).min(self.policy.pause_max);
    }

    /// Connects and leads the handshake.
    async fn link(&self) -> io::Result<(Link, ExportDescription)> {
        let connect = async {
            let stream: Box<dyn Stream> = match &self.address {
                Address::Unix(path) => Box::new(tokio::net::UnixStream::connect(path).await?),
                Address::Tcp(address) => {
                    let stream = tokio::net::TcpStream::connect(address).await?;
                    tcp::prepare(&stream)?;
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
