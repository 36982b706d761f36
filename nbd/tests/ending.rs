//! A server that ends in the middle of a reply: the client gets a first part of the truth, and nothing else.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::time::Duration;

use bootcache_nbd::layers::MemoryDisk;
use bootcache_nbd::{Export, Limits, Server, Tls};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;

const LENGTH: usize = 256 << 10;

/// Any four bytes tell where they are, so that bytes in a wrong place are noticed.
fn content() -> Vec<u8> {
    (0..u32::try_from(LENGTH / 4).unwrap()).flat_map(u32::to_be_bytes).collect()
}

/// Once, what was waiting to be sent was sent again from its start behind the part that had left already: the client
/// took reply headers and shifted bytes for the rest of its data.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reply_that_is_cut_short_is_followed_by_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nbd.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let disk = Arc::new(MemoryDisk::from(content()));
    let server = Server::new(Arc::new(Export::new("disk", disk)), Limits::default(), Tls::Off);
    let cancel = CancellationToken::new();
    let until = cancel.clone();
    let serving = tokio::spawn(async move { server.serve_unix(listener, until).await });

    let mut client = UnixStream::connect(&path).await.unwrap();
    let mut greeting = [0; 18];
    client.read_exact(&mut greeting).await.unwrap();
    // Fixed newstyle, no zeroes, NBD_OPT_EXPORT_NAME.
    client.write_all(&[0, 0, 0, 3]).await.unwrap();
    client.write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\x04disk").await.unwrap();
    let mut export = [0; 10];
    client.read_exact(&mut export).await.unwrap();

    let length = u32::try_from(LENGTH).unwrap();
    let mut requests = Vec::new();
    for cookie in 0_u64..8 {
        requests.extend_from_slice(&0x2560_9513_u32.to_be_bytes());
        requests.extend_from_slice(&[0; 4]);
        requests.extend_from_slice(&cookie.to_be_bytes());
        requests.extend_from_slice(&0_u64.to_be_bytes());
        requests.extend_from_slice(&length.to_be_bytes());
    }
    client.write_all(&requests).await.unwrap();
    // The socket holds less than one reply: the server is now in the middle of it.
    tokio::time::sleep(Duration::from_millis(300)).await;
    cancel.cancel();
    tokio::time::sleep(Duration::from_millis(100)).await;

    let mut got = Vec::new();
    let _ = tokio::time::timeout(Duration::from_secs(20), client.read_to_end(&mut got)).await.unwrap();
    assert!(!got.is_empty());
    let content = content();
    for reply in got.chunks(16 + LENGTH) {
        let header = reply.len().min(16);
        assert_eq!(&reply[..header.min(8)], &[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0][..header.min(8)]);
        let data = &reply[header..];
        assert!(data == &content[..data.len()], "bytes that are not the disk's");
    }
    serving.await.unwrap();
}
