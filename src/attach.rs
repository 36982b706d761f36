//! `/dev/nbdX`: an export of `serve` as a block device of this host, by the kernel's NBD client.
//!
//! The kernel is given sockets that are past the handshake ([`opening`]), by generic netlink ([`netlink`]) or, where
//! that is missing, by ioctl ([`ioctl`]). For each device there is a *keeper*, a process that gives the kernel new sockets
//! when the server has been restarted ([`keeper`]); requests wait meanwhile. With ioctl there is no such way: a restart of
//! the server breaks the device, which is why it is the fallback. What is attached where stands in the store ([`table`]).
//!
//! Not the server, and no part of `serve`: it goes through the export's socket as any client does.

pub mod device;
mod ioctl;
mod keeper;
mod message;
mod netlink;
mod opening;
pub mod table;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

pub use device::Device;
pub use keeper::{detach, keep};
pub use netlink::KernelError;
pub use opening::OpenError;
pub use table::{Entry, Table};

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
}
