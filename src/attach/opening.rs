//! Connections to the server that are past the handshake, so that the kernel can be given them.
//!
//! Only what the kernel's client understands is agreed: simple replies, no contexts, no TLS.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use bootcache_nbd::chunk::Style;
use bootcache_nbd::client::{ExportDescription, HandshakeError, handshake};

/// The longest wait for the server.
const DEADLINE: Duration = Duration::from_secs(10);

/// Why a server did not open an export.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is no server.
    #[error("no server listens there; start one with `bootcache serve`")]
    NoServer,
    /// It did not answer in time.
    #[error("the server does not answer")]
    Silent,
    /// The connection broke, it refused, or it does not speak the protocol.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
}

/// An export that was opened.
#[derive(Debug)]
pub(super) struct Opened {
    /// Past the handshake; the next byte is a request. A blocking one, as the kernel wants.
    pub(super) socket: UnixStream,
    /// What the server says of it.
    pub(super) description: ExportDescription,
}

/// Opens export `name` at the server's Unix socket, within 10 s.
pub(super) async fn open(path: &Path, name: &str) -> Result<Opened, OpenError> {
    tokio::time::timeout(DEADLINE, agree(path, name)).await.unwrap_or(Err(OpenError::Silent))
}

async fn agree(path: &Path, name: &str) -> Result<Opened, OpenError> {
    let mut stream = tokio::net::UnixStream::connect(path).await.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => OpenError::NoServer,
        _ => HandshakeError::Io(error).into(),
    })?;
    let description = handshake(&mut stream, name, Style::Simple).await?;
    let socket = stream.into_std().map_err(HandshakeError::Io)?;
    socket.set_nonblocking(false).map_err(HandshakeError::Io)?;
    Ok(Opened { socket, description })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bootcache_nbd::layers::MemoryDisk;
    use bootcache_nbd::{Export, Limits, Server, Tls};
    use tokio_util::sync::CancellationToken;

    use super::*;

    #[tokio::test]
    async fn an_opened_export_is_ready_for_a_blocking_request_and_a_missing_one_says_why() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("nbd.sock");
        assert!(matches!(open(&path, "disk").await.unwrap_err(), OpenError::NoServer));
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let export = Export::new("disk", Arc::new(MemoryDisk::from(vec![7; 4096])));
        let server = Server::new(Arc::new(export), Limits::default(), Tls::Off);
        tokio::spawn(async move { server.serve_unix(listener, CancellationToken::new()).await });

        let refused = open(&path, "other").await.unwrap_err().to_string();
        assert!(refused.starts_with("the server says: "), "{refused}");
        let Opened { socket, description } = open(&path, "disk").await.unwrap();
        assert_eq!(description.size, 4096);
        let read = tokio::task::spawn_blocking(move || {
            use std::io::{Read, Write};
            let mut request = vec![0x25, 0x60, 0x95, 0x13];
            request.resize(24, 0);
            request.extend(16_u32.to_be_bytes());
            (&socket).write_all(&request).unwrap();
            let mut reply = [0; 16 + 16];
            (&socket).read_exact(&mut reply).unwrap();
            reply[16..].to_vec()
        });
        assert_eq!(read.await.unwrap(), [7; 16]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_says_nothing_is_not_waited_for_without_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("nbd.sock");
        let _listener = tokio::net::UnixListener::bind(&path).unwrap();
        assert!(matches!(open(&path, "disk").await.unwrap_err(), OpenError::Silent));
    }
}
