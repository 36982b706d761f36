//! An image's bytes from its export, in order, some requests ahead of whoever reads them.
//!
//! They end when all of them have come. Whatever cuts them short is an error, since the end of a stream is that of an
//! archive to whoever unpacks it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bootcache_nbd::client::Client;
use bytes::{Buf, Bytes};
use futures_util::StreamExt;
use tokio::io::{AsyncRead, ReadBuf};
use tokio::sync::mpsc;

/// Bytes that are asked for at once, and how many such requests are under way.
const READ_BYTES: u32 = 256 << 10;
const READS_AHEAD: usize = 8;

/// The first bytes of an export. Nothing is read any more when it is dropped.
pub(super) struct ImageBytes {
    pieces: mpsc::Receiver<io::Result<Vec<u8>>>,
    /// What has come and was not taken yet.
    piece: Bytes,
    /// How many have still to come.
    left: u64,
}

impl ImageBytes {
    /// The first `size` bytes of the export that `client` has open.
    pub(super) fn new(client: Client, size: u64) -> Self {
        let (sender, pieces) = mpsc::channel(1);
        tokio::spawn(async move {
            tokio::select! {
                () = sender.closed() => {}
                () = send(client, size, &sender) => {}
            }
        });
        Self { pieces, piece: Bytes::new(), left: size }
    }
}

async fn send(client: Client, size: u64, sender: &mpsc::Sender<io::Result<Vec<u8>>>) {
    let client = &client;
    let starts = futures_util::stream::iter((0..size).step_by(READ_BYTES as usize));
    let reads = starts.map(|start| async move {
        let length = u32::try_from((size - start).min(u64::from(READ_BYTES))).expect("at most READ_BYTES");
        client.read(start, length).await
    });
    let mut reads = reads.buffered(READS_AHEAD);
    while let Some(piece) = reads.next().await {
        let broken = piece.is_err();
        if sender.send(piece).await.is_err() || broken {
            return;
        }
    }
}

impl AsyncRead for ImageBytes {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.piece.is_empty() && this.left > 0 {
            let Some(piece) = ready!(this.pieces.poll_recv(context)) else {
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            };
            this.piece = Bytes::from(piece?);
            this.left = this.left.saturating_sub(this.piece.len() as u64);
        }
        let count = this.piece.len().min(buffer.remaining());
        buffer.put_slice(&this.piece[..count]);
        this.piece.advance(count);
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use bootcache_nbd::client::{Address, Policy};
    use bootcache_nbd::layers::{ErrorDisk, Errors, Fault, MemoryDisk, Operation};
    use bootcache_nbd::{Export, Limits, Server, SharedDisk, Tls};
    use tokio::io::AsyncReadExt;
    use tokio_util::sync::CancellationToken;

    use super::*;

    const SIZE: usize = 64 * READ_BYTES as usize + 77;

    fn content() -> Vec<u8> {
        (0..=250).cycle().take(SIZE).collect()
    }

    async fn open(dir: &Path, disk: SharedDisk, until: CancellationToken) -> ImageBytes {
        let path = dir.join("nbd.sock");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let server = Server::new(Arc::new(Export::new("image", disk)), Limits::default(), Tls::Off);
        tokio::spawn(async move { server.serve_unix(listener, until).await });
        let client = Client::connect(Address::Unix(path), "image", Policy::default()).await.unwrap();
        ImageBytes::new(client, SIZE as u64)
    }

    #[tokio::test]
    async fn all_bytes_come_in_order_and_then_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Arc::new(MemoryDisk::from(content()));
        let mut bytes = open(dir.path(), disk, CancellationToken::new()).await;
        let mut found = Vec::new();
        bytes.read_to_end(&mut found).await.unwrap();
        assert!(found == content());
    }

    #[tokio::test]
    async fn a_read_that_fails_and_a_server_that_goes_are_no_end() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Arc::new(ErrorDisk::new(Arc::new(MemoryDisk::from(content())), Errors::default()));
        disk.gate().fail(&[Operation::Read], 20, Fault::Errno(5));
        let mut bytes = open(dir.path(), disk, CancellationToken::new()).await;
        let mut found = Vec::new();
        bytes.read_to_end(&mut found).await.unwrap_err();
        assert!(found.len() < SIZE && content().starts_with(&found));
        bytes.read_to_end(&mut found).await.unwrap_err();

        let dir = tempfile::tempdir().unwrap();
        let until = CancellationToken::new();
        let mut bytes = open(dir.path(), Arc::new(MemoryDisk::from(content())), until.clone()).await;
        bytes.read_exact(&mut [0; 100]).await.unwrap();
        until.cancel();
        bytes.read_to_end(&mut Vec::new()).await.unwrap_err();
    }
}
