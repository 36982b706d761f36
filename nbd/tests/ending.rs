//! Ends of connections: what was begun is finished or given up, and a client never gets more than a first part of the truth.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bootcache_nbd::client::{Address, Client, Policy};
use bootcache_nbd::layers::{Gate, Gated, MemoryDisk, Operation};
use bootcache_nbd::{BoxFuture, Export, Limits, Server, Tls};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UnixListener, UnixStream};
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

/// Holds every request until it is opened, and counts those that came.
#[derive(Debug, Default)]
struct Held {
    came: AtomicUsize,
    open: CancellationToken,
}

impl Gate for Held {
    fn pass(&self, _: Operation) -> BoxFuture<'_, io::Result<()>> {
        self.came.fetch_add(1, Ordering::SeqCst);
        Box::pin(async {
            self.open.cancelled().await;
            Ok(())
        })
    }
}

/// A disk that holds requests, its memory, and the export that shows it.
struct HeldExport {
    disk: Arc<Gated<Held>>,
    memory: Arc<MemoryDisk>,
    export: Export,
    path: PathBuf,
}

impl HeldExport {
    fn serve(dir: &Path, limits: Limits) -> Self {
        let memory = Arc::new(MemoryDisk::new(1 << 20));
        let disk = Arc::new(Gated::new(Arc::clone(&memory) as Arc<_>, Held::default()));
        let export = Export::new("disk", Arc::clone(&disk) as Arc<_>);
        let path = dir.join("nbd.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let server = Server::new(Arc::new(export.clone()), limits, Tls::Off);
        tokio::spawn(async move { server.serve_unix(listener, CancellationToken::new()).await });
        Self { disk, memory, export, path }
    }

    async fn connect(&self) -> UnixStream {
        let mut stream = UnixStream::connect(&self.path).await.unwrap();
        stream.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x04disk").await.unwrap();
        stream.read_exact(&mut [0; 18 + 10]).await.unwrap();
        stream
    }

    /// Waits until so many requests have come to the disk.
    async fn came(&self, count: usize) {
        until(|| self.disk.gate().came.load(Ordering::SeqCst) >= count).await;
    }

    /// Waits until nobody is connected.
    async fn left(&self) {
        until(|| self.export.stats.connections.load(Ordering::SeqCst) == 0).await;
    }
}

async fn until(reached: impl Fn() -> bool) {
    let reach = async {
        while !reached() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), reach).await.expect("it takes too long");
}

fn request(command: u8, length: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
    bytes.extend([0, 0, 0, command]);
    bytes.resize(24, 0);
    bytes.extend(length.to_be_bytes());
    bytes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_that_waits_when_its_client_says_goodbye_is_carried_out_and_answered() {
    let dir = tempfile::tempdir().unwrap();
    let held = HeldExport::serve(dir.path(), Limits::default());
    let mut client = held.connect().await;
    let write = [&request(1, 4)[..], b"kept", &request(2, 0)].concat();
    client.write_all(&write).await.unwrap();
    held.came(1).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    held.disk.gate().open.cancel();
    let mut answers = Vec::new();
    client.read_to_end(&mut answers).await.unwrap();
    assert_eq!(answers, [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(held.memory.to_vec()[..4], *b"kept");
}

/// The same, to another place of the disk.
fn write_to(offset: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = request(1, u32::try_from(payload.len()).unwrap());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// Once, the end of what such a client sends was noticed before its goodbye was, and it was taken for lost: what waited
/// was given up, or half of a long write was.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_stands_before_a_goodbye_is_carried_out_however_long_it_waits() {
    const LONG: usize = 512 << 10;
    let short = [write_to(0, b"first"), write_to(LONG as u64 - 4, b"last"), request(2, 0)].concat();
    let several = [write_to(0, b"?????").repeat(4), short.clone()].concat();
    let mut payload = vec![0; LONG];
    payload[..5].copy_from_slice(b"first");
    payload[LONG - 4..].copy_from_slice(b"last");
    let long = [write_to(0, &payload), request(2, 0)].concat();
    for stays in [true, false] {
        for (writes, asked) in [(2, &short), (6, &several), (1, &long)] {
            let dir = tempfile::tempdir().unwrap();
            let held = HeldExport::serve(dir.path(), Limits { requests: 1, ..Limits::default() });
            let mut client = held.connect().await;
            client.write_all(asked).await.unwrap();
            held.came(1).await;
            client.shutdown().await.unwrap();
            let mut reader = stays.then_some(client);
            tokio::time::sleep(Duration::from_millis(100)).await;
            assert_eq!(held.export.stats.connections.load(Ordering::SeqCst), 1, "{writes} are given up");
            held.disk.gate().open.cancel();
            if let Some(client) = &mut reader {
                let mut answers = Vec::new();
                client.read_to_end(&mut answers).await.unwrap();
                assert_eq!(answers.len(), 16 * writes, "each is answered");
            }
            held.left().await;
            let memory = held.memory.to_vec();
            assert_eq!((&memory[..5], &memory[LONG - 4..LONG]), (&b"first"[..], &b"last"[..]), "{writes}");
        }
    }
}

/// A disk that hangs must not keep a client's place for ever, however politely that left.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_goodbye_behind_requests_that_hang_is_waited_for_no_longer_than_it_takes_to_drain() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits { requests: 1, drain_timeout: Duration::from_millis(50), ..Limits::default() };
    let held = HeldExport::serve(dir.path(), limits);
    let mut client = held.connect().await;
    client.write_all(&[write_to(0, b"1"), write_to(0, b"2"), request(2, 0)].concat()).await.unwrap();
    held.came(1).await;
    client.shutdown().await.unwrap();
    held.left().await;
}

/// Once, a server that ended took connections for as long as the last request took, and dropped them; and its address was
/// not free.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_drains_listens_no_more() {
    let limits = Limits { drain_timeout: Duration::from_secs(60), ..Limits::default() };
    let disk = Arc::new(Gated::new(Arc::new(MemoryDisk::new(1 << 20)), Held::default()));
    let export = Export::new("disk", Arc::clone(&disk) as Arc<_>);
    let server = Server::new(Arc::new(export.clone()), limits, Tls::Off);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let cancel = CancellationToken::new();
    let stop = cancel.clone();
    let serving = tokio::spawn(async move { server.serve_tcp(listener, stop).await });
    let client = Client::connect(Address::Tcp(address), "disk", Policy::default()).await.unwrap();
    let read = tokio::spawn(async move { client.read(0, 4).await });
    until(|| disk.gate().came.load(Ordering::SeqCst) == 1).await;
    cancel.cancel();
    until(|| std::net::TcpStream::connect(address).is_err()).await;
    let _next = TcpListener::bind(address).await.unwrap();
    assert!(!serving.is_finished() && export.stats.connections.load(Ordering::SeqCst) == 1);
    disk.gate().open.cancel();
    assert_eq!(read.await.unwrap().unwrap(), [0; 4], "what was under way is answered");
    tokio::time::timeout(Duration::from_secs(20), serving).await.unwrap().unwrap();
}

/// It may send again what it has no answer to, on another connection, and then write anew to the same place.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_that_waits_when_its_client_is_lost_never_lands() {
    let dir = tempfile::tempdir().unwrap();
    let held = HeldExport::serve(dir.path(), Limits::default());
    let mut client = held.connect().await;
    client.write_all(&[&request(1, 4)[..], b"lost"].concat()).await.unwrap();
    held.came(1).await;
    drop(client);
    // The connection does not take its time to end what is under way, as it does when the client says goodbye.
    let _ = tokio::time::timeout(Duration::from_secs(2), held.left()).await;
    held.disk.gate().open.cancel();
    let mut second = held.connect().await;
    second.write_all(&[&request(1, 1)[..], b"2"].concat()).await.unwrap();
    second.read_exact(&mut [0; 16]).await.unwrap();
    assert_eq!(held.memory.to_vec()[..4], *b"2\0\0\0");
}

/// Once, a connection that waited for its budget, or for a long write, did not look whether its client was there, and
/// kept its place among those of the export.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_while_its_requests_wait_is_noticed() {
    let long = [&request(1, 1 << 20)[..], &[7; 256 << 10]].concat();
    let behind = [&request(0, 4096)[..], &request(1, 256 << 10), &[7; 256 << 10]].concat();
    for (requests, asked) in [(1, request(0, 4096).repeat(3)), (1, behind), (128, long)] {
        let dir = tempfile::tempdir().unwrap();
        let limits = Limits { requests, drain_timeout: Duration::from_millis(50), ..Limits::default() };
        let held = HeldExport::serve(dir.path(), limits);
        let mut client = held.connect().await;
        client.write_all(&asked).await.unwrap();
        held.came(1).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        drop(client);
        held.left().await;
    }
}
