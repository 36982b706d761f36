//! The client: what becomes of requests when connections break, servers end, or servers do not keep to the protocol.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bootcache_nbd::client::{Address, Client, Policy};
use bootcache_nbd::layers::{Gate, Gated, MemoryDisk, Operation};
use bootcache_nbd::{BoxFuture, Export, Limits, Server, SharedDisk, Tls};
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;

async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future).await.expect("it takes too long")
}

/// Serves `disk` on `nbd.sock` in `dir`, for as long as the test lasts.
fn serve(dir: &Path, disk: SharedDisk) -> PathBuf {
    let path = dir.join("nbd.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let server = Server::new(Arc::new(Export::new("disk", disk)), Limits::default(), Tls::Off);
    tokio::spawn(async move { server.serve_unix(listener, CancellationToken::new()).await });
    path
}

async fn connect(path: &Path, policy: Policy) -> Client {
    Client::connect(Address::Unix(path.to_owned()), "disk", policy).await.unwrap()
}

/// Never lets a request pass, and counts those that came.
#[derive(Debug, Default)]
struct Closed(AtomicUsize);

impl Gate for Closed {
    fn pass(&self, _: Operation) -> BoxFuture<'_, io::Result<()>> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Box::pin(std::future::pending())
    }
}

/// Once, the task that hands replies out was ended with the connection, and nobody told those that waited for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_that_is_given_up_half_sent_ends_every_request_of_its_connection() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Arc::new(Gated::new(Arc::new(MemoryDisk::new(32 << 20)), Closed::default()));
    let path = serve(dir.path(), Arc::clone(&disk) as SharedDisk);
    let client = connect(&path, Policy::default()).await;
    let reads: Vec<_> = (0..16)
        .map(|number| {
            let client = client.clone();
            tokio::spawn(async move { client.read(number * 4096, 4096).await })
        })
        .collect();
    soon(async {
        while disk.gate().0.load(Ordering::SeqCst) < 16 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    // More than the sockets hold: the disk takes none of it.
    let payload = vec![1; 32 << 20];
    let write = client.write(0, &payload, false);
    assert!(tokio::time::timeout(Duration::from_millis(200), write).await.is_err(), "it was sent");
    for read in reads {
        assert_eq!(soon(read).await.unwrap().unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
