//! A VM's own socket: one export, no list of others, open to the user that QEMU runs as.
//!
//! That a VM has a socket is recorded in its folder, so that a daemon that starts again opens it again and the guest
//! reconnects.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bootcache_nbd::{Export, Server, SharedLimits, Tls};
use futures_util::future::join_all;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::net::UnixListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::control::{Owner, VmInfo};
use crate::name::HostName;
use crate::store::atomic::sync_dir;
use crate::store::write_atomic;

const SOCKET_FILE: &str = "nbd.sock";
const RECORD_FILE: &str = "socket.json";
/// The longest path that a Unix socket can have, in bytes (`unix(7)`).
const ADDRESS_MAX: usize = 107;

/// A VM's socket, being served.
pub(super) struct VmSocket {
    path: PathBuf,
    export: String,
    cancel: CancellationToken,
    server: JoinHandle<()>,
}

impl VmSocket {
    /// Opens the socket in the VM's folder `dir`, and records that it is open. Blocks.
    pub(super) fn open(
        dir: &Path,
        export: Export,
        owner: Option<Owner>,
        limits: SharedLimits,
    ) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o711).create(dir)?;
        let path = dir.join(SOCKET_FILE);
        let listener = bind(&path, owner)?;
        write_atomic(&dir.join(RECORD_FILE), &serde_json::to_vec(&owner)?)?;
        let name = export.name.clone();
        let server = Server::new(Arc::new(export), limits, Tls::Off);
        let cancel = CancellationToken::new();
        let until = cancel.clone();
        let server = tokio::spawn(async move { server.serve_unix(listener, until).await });
        Ok(Self { path, export: name, cancel, server })
    }

    /// Who the socket in the VM's folder belongs to, if there was one open.
    pub(super) fn recorded(dir: &Path) -> io::Result<Option<Option<Owner>>> {
        match fs::read(dir.join(RECORD_FILE)) {
            Ok(text) => Ok(Some(serde_json::from_slice(&text)?)),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Where it is.
    pub(super) fn info(&self, name: &HostName) -> VmInfo {
        VmInfo { name: name.clone(), socket: self.path.clone(), export: self.export.clone() }
    }

    /// Makes sure that no later daemon opens the socket in the VM's folder, be it after a power loss. Blocks.
    pub(super) fn forget(dir: &Path) -> io::Result<()> {
        match fs::remove_file(dir.join(RECORD_FILE)) {
            Ok(()) => sync_dir(dir),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Ends its connections. The requests under way are carried out, if they are no longer about it than the server waits.
    pub(super) async fn close(self) {
        self.cancel.cancel();
        // Before anything is waited for: by then the path may be another socket's.
        let _ = fs::remove_file(&self.path);
        let _ = self.server.await;
    }

    /// Closes many, all at once: it takes no longer than the slowest.
    pub(super) async fn close_all(sockets: impl IntoIterator<Item = Self>) {
        join_all(sockets.into_iter().map(Self::close)).await;
    }
}

/// Binds a socket at `path` that only this user, and `owner` if given, may open. What a dead process left is replaced.
///
/// # Errors
/// [`io::ErrorKind::AddrInUse`] when somebody listens there, [`io::ErrorKind::AlreadyExists`] when it is no socket.
pub(super) fn bind(path: &Path, owner: Option<Owner>) -> io::Result<UnixListener> {
    // Bound under another name first: it gets its final name once it has its owner and mode.
    let mut hidden = path.as_os_str().to_owned();
    hidden.push(".new");
    let hidden = PathBuf::from(hidden);
    check_dead(path)?;
    check_dead(&hidden)?;
    match fs::remove_file(&hidden) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    if hidden.as_os_str().len() > ADDRESS_MAX {
        let most = ADDRESS_MAX - (hidden.as_os_str().len() - path.as_os_str().len());
        let said = format!(
            "a socket's path may have {most} bytes: take a shorter name, or a store with a shorter path"
        );
        return Err(io::Error::new(io::ErrorKind::InvalidInput, said));
    }
    let listener = UnixListener::bind(&hidden)?;
    fs::set_permissions(&hidden, fs::Permissions::from_mode(0o600))?;
    if let Some(owner) = owner {
        std::os::unix::fs::chown(&hidden, Some(owner.uid), Some(owner.gid))?;
    }
    fs::rename(&hidden, path)?;
    Ok(listener)
}

/// Refuses what is at `path` unless it is a socket that nobody listens on, or nothing.
fn check_dead(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
        Ok(found) if !found.file_type().is_socket() => {
            let what = format!("{} is there and is not a socket", path.display());
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, what));
        }
        Ok(_) => {}
    }
    // Without waiting: whoever listens may not accept.
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&socket, &SocketAddrUnix::new(path)?) {
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(()),
        _ => Err(io::ErrorKind::AddrInUse.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;
    use std::time::Duration;

    use bootcache_nbd::Limits;
    use bootcache_nbd::client::{Address, Client, Policy};
    use bootcache_nbd::layers::{DelayDisk, Delays, MemoryDisk};
    use tokio::time::Instant;

    #[tokio::test]
    async fn sockets_whose_reads_wait_are_closed_together() {
        let dir = tempfile::tempdir().unwrap();
        let mut sockets = Vec::new();
        let mut reads = tokio::task::JoinSet::new();
        for name in ["a", "b", "c", "d"] {
            // As one whose origin is dead.
            let disk =
                DelayDisk::new(Arc::new(MemoryDisk::new(4096)), Delays::all(Duration::from_secs(3600)));
            let export = Export::new(name, Arc::new(disk));
            let stats = Arc::clone(&export.stats);
            let folder = dir.path().join(name);
            sockets.push(VmSocket::open(&folder, export, None, Limits::default().into()).unwrap());
            let address = Address::Unix(folder.join(SOCKET_FILE));
            let client = Client::connect(address, name, Policy::default()).await.unwrap();
            reads.spawn(async move { client.read(0, 4096).await });
            while stats.reads.load(std::sync::atomic::Ordering::Relaxed) == 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        tokio::time::pause();
        let start = Instant::now();
        VmSocket::close_all(sockets).await;
        let one = Limits::default().drain_timeout;
        assert!(start.elapsed() >= one && start.elapsed() < one * 2, "{:?}", start.elapsed());
        assert!(!dir.path().join("a").join(SOCKET_FILE).exists());
    }

    /// Once, the path was taken for as long as a read was waited for, or the old socket took the new one's file with it.
    #[tokio::test]
    async fn a_socket_is_opened_again_while_it_closes() {
        let dir = tempfile::tempdir().unwrap();
        let held = DelayDisk::new(Arc::new(MemoryDisk::new(4096)), Delays::all(Duration::from_secs(3600)));
        let export = Export::new("vm", Arc::new(held));
        let open = || VmSocket::open(dir.path(), export.clone(), None, Limits::default().into()).unwrap();
        let address = Address::Unix(dir.path().join(SOCKET_FILE));
        let first = open();
        let client = Client::connect(address.clone(), "vm", Policy::default()).await.unwrap();
        let read = tokio::spawn(async move { client.read(0, 4096).await });
        while export.stats.reads.load(std::sync::atomic::Ordering::Relaxed) == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let closing = tokio::spawn(first.close());
        while dir.path().join(SOCKET_FILE).exists() {
            tokio::task::yield_now().await;
        }
        let second = open();
        assert!(!closing.is_finished());
        closing.await.unwrap();
        assert!(read.await.unwrap().is_err());
        drop(Client::connect(address, "vm", Policy::default()).await.unwrap());
        second.close().await;
    }

    #[tokio::test]
    async fn replaces_what_a_dead_process_left_and_is_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nbd.sock");
        drop(bind(&path, None).unwrap());
        let _listener = bind(&path, None).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        tokio::net::UnixStream::connect(&path).await.unwrap();
    }
}
