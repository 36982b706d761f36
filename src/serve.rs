//! A node's data plane: the process that guests' disks come from.
//!
//! [`Node`] owns what is open; [`run`] gives it sockets: the NBD sockets that guests read from, one per VM and one
//! for people, and the control socket. Nothing here needs a controller.

use std::path::Path;

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

/// The URI of an export on a Unix socket, as other programs take it (doc/uri.md of the NBD project): whatever bytes the
/// path has.
pub(crate) fn nbd_uri(export: &str, socket: &Path) -> String {
    use std::fmt::Write;
    let mut uri = format!("nbd+unix:///{export}?socket=");
    for byte in std::os::unix::ffi::OsStrExt::as_bytes(socket.as_os_str()) {
        if byte.is_ascii_alphanumeric() || b"/._-".contains(byte) {
            uri.push(char::from(*byte));
        } else {
            write!(uri, "%{byte:02X}").expect("writing to a string cannot fail");
        }
    }
    uri
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sockets_path_is_safe_in_a_uri() {
        assert_eq!(nbd_uri("image", Path::new("/a b/é,x")), "nbd+unix:///image?socket=/a%20b/%C3%A9%2Cx");
    }
}
