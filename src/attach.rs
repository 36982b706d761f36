//! `/dev/nbdX`: an export of `serve` as a block device of this host, by the kernel's NBD client.
//!
//! The kernel is given sockets that are past the handshake ([`opening`]), by generic netlink ([`netlink`]) or, where
//! that is missing, by ioctl ([`ioctl`]). For each device there is a *keeper*, a process that gives the kernel new sockets
//! when the server has been restarted ([`keeper`]); requests wait meanwhile. With ioctl there is no such way: a restart of
//! the server breaks the device, which is why it is the fallback. What is attached where stands in the store ([`table`]).
//! Whoever wants a device starts a keeper that outlives it ([`start`], [`ensure`]) and says when it is done with it
//! ([`detach`], [`forget`]).
//!
//! Not the server, and no part of `serve`: it goes through the export's socket as any client does.

pub mod device;
mod ioctl;
mod keeper;
mod message;
mod netlink;
mod opening;
mod process;
pub mod table;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::name::HostName;

pub use device::Device;
pub use keeper::{detach, forget, keep};
pub use netlink::KernelError;
pub use opening::OpenError;
pub use process::{MAY_PASS, ensure, start};
pub use table::{Entry, Table};

/// How long requests wait for a server that is gone, unless it is said otherwise: as long as QEMU's own client does.
pub const PATIENCE: Duration = Duration::from_secs(3600);

/// How the kernel is talked to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// Generic netlink, Linux 4.12 and later.
    Netlink,
    /// Ioctls on the device.
    Ioctl,
}

/// What is to be attached, and how.
#[derive(Debug, Clone)]
pub struct Options {
    /// Name of the export: a VM or an image.
    pub name: String,
    /// The server's Unix socket.
    pub socket: PathBuf,
    /// The device; the kernel chooses a free one if `None`.
    pub device: Option<Device>,
    /// Connections to the server, from 1 to 15; one where the server cannot take several. An export has places for 16, and
    /// a keeper that takes the device over needs one for itself.
    pub connections: usize,
    /// How long requests wait for a server that is gone; then they fail.
    pub patience: Duration,
    /// The way to take; netlink where there is such, if `None`.
    pub way: Option<Way>,
    /// Only take over what is attached and has lost its keeper: no new device is made.
    pub again: bool,
}

impl Options {
    /// How the disk of a VM is attached, of which this is the own socket.
    pub fn of_vm(vm: &HostName, socket: PathBuf) -> Self {
        Self {
            name: vm.to_string(),
            socket,
            device: None,
            connections: 2,
            patience: PATIENCE,
            way: None,
            again: false,
        }
    }
}

/// Why something is not attached, or not detached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// It is attached already.
    #[error("'{name}' is attached as {device}")]
    Attached { name: String, device: Device },
    /// Somebody else is attaching it at this moment.
    #[error("'{0}' is being attached by another process")]
    Attaching(String),
    /// Nothing of that name is attached.
    #[error("'{0}' is not attached: `bootcache attached` shows what is")]
    NotAttached(String),
    /// The device is in use.
    #[error("{device} is in use by {by}: unmount it or stop that first")]
    Busy { device: Device, by: String },
    /// The kernel did not do it.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The server did not agree.
    #[error("cannot open export '{name}' at {socket}: {error}")]
    Server { name: String, socket: String, error: OpenError },
    /// A device that did not become ready, or quiet.
    #[error("{device} did not become {state} within {seconds} s: see the kernel's log")]
    Stuck { device: Device, state: &'static str, seconds: u64 },
    /// The table cannot be read or written.
    #[error("{path}: {error}")]
    Table { path: String, error: io::Error },
    /// A device file cannot be used.
    #[error("{device}: {error}")]
    Device { device: Device, error: io::Error },
    /// The process that was to look after it cannot be started.
    #[error("cannot start {program}, which is to look after the device: {error}")]
    Program { program: String, error: io::Error },
    /// The process that was to look after it has ended.
    #[error("{reason}")]
    Ended { reason: String, may_pass: bool },
    /// The process that was to look after it says nothing.
    #[error("'{name}' was not attached within {seconds} s: see {log}")]
    Late { name: String, seconds: u64, log: String },
}

impl AttachError {
    /// Whether the same may go well later, without anybody doing anything about it: a server may be starting again, and
    /// another keeper may be about to end.
    pub const fn may_pass(&self) -> bool {
        match self {
            Self::Attached { .. } | Self::Attaching(_) | Self::Server { .. } | Self::Late { .. } => true,
            Self::Ended { may_pass, .. } => *may_pass,
            _ => false,
        }
    }
}
