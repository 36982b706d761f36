//! The kernel's NBD client, asked over generic netlink.
//!
//! The kernel takes sockets that are past the handshake. When the last of them dies it keeps the device, and its
//! requests, until it is given new ones ([`Kernel::reconfigure`]) or [`Setup::dead_connection_timeout`] has passed.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use futures_util::StreamExt;
use genetlink::{GenetlinkError, GenetlinkHandle};
use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_generic::GenlMessage;

use super::message::{Attribute, Command, Message};

/// Disconnecting waits for requests that are under way.
const DEADLINE: Duration = Duration::from_secs(30);

/// After this long the kernel takes a request's connection for dead and sends it on another one. A request that was
/// under way when a server died is only sent again then, so a longer time would be a longer pause after each restart. A
/// read that waits longer for its image is asked for again, on a connection that the keeper brings, and finds what has
/// come meanwhile.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// What the kernel did not do, and why.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// There is no NBD client in this kernel.
    #[error(
        "this kernel has no NBD client: load it with `modprobe nbd`, \
         or do without it: guests reach their disk by Unix socket too"
    )]
    NoModule,
    /// All devices are taken, or the one that was named is.
    #[error("{0}")]
    Busy(String),
    /// Not root.
    #[error("only root may attach block devices")]
    NotPermitted,
    /// It does not answer.
    #[error("the kernel did not answer within {DEADLINE:?}")]
    TimedOut,
    /// Anything else.
    #[error("the kernel's NBD client: {0}")]
    Io(#[from] io::Error),
}

impl KernelError {
    /// The device that was named is taken, or all are.
    pub(super) fn busy(index: Option<u32>) -> Self {
        Self::Busy(match index {
            Some(index) => format!(
                "/dev/nbd{index} is in use: `bootcache attached` shows what is; or leave the choice to the kernel"
            ),
            None => {
                "every NBD device is in use: detach one, or load the module with a larger nbds_max".into()
            }
        })
    }
}

/// What the kernel is to make of a connected export.
#[derive(Debug, Clone)]
pub(super) struct Setup {
    /// X of `/dev/nbdX`; the kernel chooses a free one if `None`.
    pub(super) index: Option<u32>,
    /// Bytes.
    pub(super) size: u64,
    /// Bytes; 512 to 4096.
    pub(super) block_size: u32,
    /// Transmission flags of the NBD specification.
    pub(super) flags: u16,
    /// How long requests wait for a new connection when all are dead.
    pub(super) dead_connection_timeout: Duration,
    /// Text that names the export in `/sys/block/nbdX/backend`, and that must be repeated to reconnect.
    pub(super) backend: String,
}

impl Setup {
    /// Whether the server takes writes.
    pub(super) fn is_writable(&self) -> bool {
        self.flags & bootcache_nbd::consts::flag::READ_ONLY == 0
    }
}

/// A connection to the kernel's NBD client.
#[derive(Debug)]
pub(super) struct Kernel {
    handle: GenetlinkHandle,
    pump: tokio::task::JoinHandle<()>,
}

impl Drop for Kernel {
    fn drop(&mut self) {
        self.pump.abort();
    }
}

impl Kernel {
    /// Opens a netlink socket and looks for the `nbd` family.
    pub(super) async fn open() -> Result<Self, KernelError> {
        let (connection, handle, _) = genetlink::new_connection()?;
        let kernel = Self { handle, pump: tokio::spawn(connection) };
        let found = tokio::time::timeout(DEADLINE, kernel.handle.resolve_family::<Message>());
        match found.await {
            Err(_) => Err(KernelError::TimedOut),
            Ok(Err(_)) => Err(KernelError::NoModule),
            Ok(Ok(_)) => Ok(kernel),
        }
    }

    /// Gives the kernel connected `sockets`; returns X of the `/dev/nbdX` that it made of them.
    ///
    /// The kernel keeps its own references: the caller may close its descriptors afterwards.
    pub(super) async fn connect(
        &mut self,
        setup: &Setup,
        sockets: &[BorrowedFd<'_>],
    ) -> Result<u32, KernelError> {
        let mut attributes: Vec<_> = setup.index.map(Attribute::Index).into_iter().collect();
        attributes.extend([
            Attribute::SizeBytes(setup.size),
            Attribute::BlockSizeBytes(setup.block_size.into()),
            Attribute::Timeout(REQUEST_TIMEOUT.as_secs()),
            Attribute::ServerFlags(setup.flags.into()),
            Attribute::ClientFlags(0),
            Attribute::DeadConnectionTimeout(setup.dead_connection_timeout.as_secs()),
            numbers(sockets),
            Attribute::Backend(setup.backend.clone()),
        ]);
        let answers = self.ask(Command::Connect, attributes).await;
        let answers =
            answers.map_err(|error| if is_busy(&error) { KernelError::busy(setup.index) } else { error })?;
        let index =
            answers.iter().flat_map(|message| &message.attributes).find_map(|attribute| match attribute {
                Attribute::Index(index) => Some(*index),
                _ => None,
            });
        index.or(setup.index).ok_or_else(|| io::Error::other("it did not say which device it took").into())
    }

    /// Gives a device whose connections are dead new ones; what waited goes on.
    pub(super) async fn reconfigure(
        &mut self,
        index: u32,
        setup: &Setup,
        sockets: &[BorrowedFd<'_>],
    ) -> Result<(), KernelError> {
        let attributes = vec![
            Attribute::Index(index),
            Attribute::DeadConnectionTimeout(setup.dead_connection_timeout.as_secs()),
            numbers(sockets),
            Attribute::Backend(setup.backend.clone()),
        ];
        self.ask(Command::Reconfigure, attributes).await.map(drop)
    }

    /// Takes a device's connections away and ends it.
    pub(super) async fn disconnect(&mut self, index: u32) -> Result<(), KernelError> {
        self.ask(Command::Disconnect, vec![Attribute::Index(index)]).await.map(drop)
    }

    /// Sends one request; returns the kernel's answers once it has acknowledged.
    async fn ask(
        &mut self,
        command: Command,
        attributes: Vec<Attribute>,
    ) -> Result<Vec<Message>, KernelError> {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | NLM_F_ACK;
        let message = GenlMessage::from_payload(Message { command, attributes });
        let exchange = async {
            let mut stream =
                self.handle.request(NetlinkMessage::new(header, message.into())).await.map_err(wire)?;
            let mut answers = Vec::new();
            while let Some(answer) = stream.next().await {
                match answer.map_err(io::Error::other)?.payload {
                    NetlinkPayload::InnerMessage(answer) => answers.push(answer.payload),
                    NetlinkPayload::Error(error) => match error.code {
                        None => return Ok(answers),
                        Some(_) => return Err(kernel_error(error.to_io())),
                    },
                    _ => {}
                }
            }
            Ok(answers)
        };
        tokio::time::timeout(DEADLINE, exchange).await.map_err(|_| KernelError::TimedOut)?
    }
}

fn numbers(sockets: &[BorrowedFd<'_>]) -> Attribute {
    Attribute::Sockets(sockets.iter().map(|fd| fd.as_raw_fd().cast_unsigned()).collect())
}

fn wire(error: GenetlinkError) -> KernelError {
    KernelError::Io(io::Error::other(error))
}

fn kernel_error(error: io::Error) -> KernelError {
    match error.kind() {
        io::ErrorKind::PermissionDenied => KernelError::NotPermitted,
        _ => KernelError::Io(error),
    }
}

fn is_busy(error: &KernelError) -> bool {
    use rustix::io::Errno;
    matches!(error, KernelError::Io(error) if [Errno::BUSY, Errno::NODEV, Errno::NOSPC]
        .iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error())))
}
