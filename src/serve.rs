//! A node's data plane: the process that guests' disks come from.
//!
//! [`Node`] owns what is open; [`run`] gives it sockets: the NBD sockets that guests read from, one per VM and one
//! for people, and the control socket. Nothing here needs a controller.

mod daemon;
mod exports;
mod local;
mod metrics;
mod node;
mod overlay_meta;
mod report;
mod vm_socket;

pub use daemon::{Options, ServeError, run};
pub use node::{Node, NodeError};

/// The control socket's name within the store.
pub const CONTROL_SOCKET: &str = "control.sock";
/// The NBD socket's name within the store.
pub const NBD_SOCKET: &str = "nbd.sock";
