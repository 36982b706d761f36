//! What a node boots from, in the words of QEMU and of the replayer.

use std::path::{Path, PathBuf};

use super::lab::{Lab, Server};
use super::support::guest::nbd_drive;
use super::support::store::uri;

/// What a node boots from.
pub(crate) enum Drive {
    /// A raw file on the node.
    Raw(PathBuf),
    /// An export on a Unix socket of the node.
    Unix(PathBuf, String),
    /// The empty export name of a server on TCP, port 10809.
    Tcp(String),
    /// What only QEMU can read.
    Qemu {
        /// The value of `-drive`, without the interface.
        drive: String,
        /// Arguments of a qemu-nbd that makes an export of it, without the socket.
        export: Vec<String>,
    },
}

impl Drive {
    /// The value of `-drive`. What the guest writes goes to a snapshot on the node, except with an overlay of ours.
    pub(crate) fn for_qemu(&self) -> String {
        let nbd = "if=virtio,driver=raw,snapshot=on,file.driver=nbd";
        match self {
            Self::Raw(path) => format!("if=virtio,file={},format=raw,snapshot=on", path.display()),
            Self::Unix(socket, export) if export.is_empty() => {
                format!("{nbd},file.server.type=unix,file.server.path={}", socket.display())
            }
            Self::Unix(socket, export) => format!("if=virtio,{}", nbd_drive(socket, export)),
            Self::Tcp(host) => {
                format!("{nbd},file.server.type=inet,file.server.host={host},file.server.port=10809")
            }
            Self::Qemu { drive, .. } => format!("if=virtio,{drive}"),
        }
    }

    /// A URI for the replayer; with the server that makes an export of what is none. That of a raw file stands for
    /// QEMU's own reading: a local boot by the replayer is one from nbdkit on the node.
    pub(crate) fn for_replay(&self, lab: &Lab, node: usize) -> (String, Option<Server>) {
        let socket = lab.fresh("drive.sock");
        let at = text(&socket);
        match self {
            Self::Raw(path) => {
                let arguments = ["-f", "-r", "-U", at, "file", text(path)];
                let server = lab.socket_server(node, &socket, "nbdkit", &arguments);
                (uri(&socket, ""), Some(server))
            }
            Self::Unix(socket, export) => (uri(socket, export), None),
            Self::Tcp(host) => (format!("nbd://{host}:10809/"), None),
            Self::Qemu { export, .. } => {
                let mut arguments = vec!["--persistent", "-k", at];
                arguments.extend(export.iter().map(String::as_str));
                let server = lab.socket_server(node, &socket, "qemu-nbd", &arguments);
                (uri(&socket, ""), Some(server))
            }
        }
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("our own path")
}
