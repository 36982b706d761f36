//! Limits that servers are given: what several have together, what changes with them, and values that make no sense.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bootcache_nbd::client::{Address, Client, Policy};
use bootcache_nbd::consts::reply::{ERR_POLICY, ERR_SHUTDOWN, ERR_TOO_BIG, ERR_UNKNOWN, ERR_UNSUP};
use bootcache_nbd::layers::{Gate, Gated, MemoryDisk, Operation};
use bootcache_nbd::{BoxFuture, Export, Exports, Limits, OpenError, Server, SharedDisk, SharedLimits, Tls};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;

/// The most that one request takes of a budget at once.
const PIECE: u32 = 256 << 10;

/// Serves `disk` on a socket in `dir`, for as long as the test lasts.
fn serve(dir: &Path, name: &str, disk: SharedDisk, limits: impl Into<SharedLimits>) -> PathBuf {
    let path = dir.join(name);
    let listener = UnixListener::bind(&path).unwrap();
    let server = Server::new(Arc::new(Export::new("disk", disk)), limits, Tls::Off);
    tokio::spawn(async move { server.serve_unix(listener, CancellationToken::new()).await });
    path
}

/// A connection by hand, if the server keeps it: it answers a read.
async fn kept(path: &Path) -> Option<UnixStream> {
    let mut stream = UnixStream::connect(path).await.unwrap();
    stream.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x04disk").await.unwrap();
    stream.read_exact(&mut [0; 18]).await.unwrap();
    // There is no other way to refuse than to close.
    stream.read_exact(&mut [0; 10]).await.ok()?;
    let mut request = 0x2560_9513_u32.to_be_bytes().to_vec();
    request.resize(24, 0);
    request.extend(16_u32.to_be_bytes());
    let _ = stream.write_all(&request).await;
    stream.read_exact(&mut [0; 16 + 16]).await.ok().map(|_| stream)
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

fn held() -> Arc<Gated<Held>> {
    Arc::new(Gated::new(Arc::new(MemoryDisk::new(4 << 20)), Held::default()))
}

/// Whether so many requests have come to the disk within `time`.
async fn came(disk: &Gated<Held>, count: usize, time: Duration) -> bool {
    let arrive = async {
        while disk.gate().came.load(Ordering::SeqCst) < count {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(time, arrive).await.is_ok()
}

/// Asks for `count` pieces at once.
async fn ask(path: &Path, count: u64) -> tokio::task::JoinHandle<()> {
    let client = Client::connect(Address::Unix(path.to_owned()), "disk", Policy::default()).await.unwrap();
    tokio::spawn(async move {
        let reads = (0..count).map(|number| client.read(number * u64::from(PIECE), PIECE));
        assert!(futures_util::future::join_all(reads).await.iter().all(Result::is_ok));
    })
}

const LONG: Duration = Duration::from_secs(20);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_of_shared_limits_have_so_many_connections_together() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits { connections: 3, ..Limits::default() };
    let shared = SharedLimits::from(limits);
    let disk = || Arc::new(MemoryDisk::new(4096));
    let first = serve(dir.path(), "first", disk(), shared.clone());
    let second = serve(dir.path(), "second", disk(), shared);
    let other = serve(dir.path(), "other", disk(), limits);

    let _two = (kept(&first).await.unwrap(), kept(&first).await.unwrap());
    let third = kept(&second).await.unwrap();
    assert!(kept(&first).await.is_none() && kept(&second).await.is_none(), "a fourth is kept");
    kept(&other).await.expect("it has limits of its own");
    drop(third);
    let place = async { while kept(&first).await.is_none() {} };
    tokio::time::timeout(LONG, place).await.expect("the place is not free again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_of_shared_limits_have_so_many_bytes_in_flight_together() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits { bytes: 4 * PIECE as usize, ..Limits::default() };
    let shared = SharedLimits::from(limits);
    let (greedy, modest, alone) = (held(), held(), held());
    let first = serve(dir.path(), "first", Arc::clone(&greedy) as SharedDisk, shared.clone());
    let second = serve(dir.path(), "second", Arc::clone(&modest) as SharedDisk, shared);
    let other = serve(dir.path(), "other", Arc::clone(&alone) as SharedDisk, limits);

    // One on the connection's reserve, and all that there is.
    let all = ask(&first, 1 + 4).await;
    assert!(came(&greedy, 5, LONG).await);
    let two = ask(&second, 2).await;
    assert!(came(&modest, 1, LONG).await, "a connection has its reserve");
    assert!(!came(&modest, 2, Duration::from_millis(500)).await, "the bytes are the first server's");
    let unhindered = ask(&other, 2).await;
    assert!(came(&alone, 2, LONG).await, "it has limits of its own");

    greedy.gate().open.cancel();
    assert!(came(&modest, 2, LONG).await, "the bytes are free again");
    modest.gate().open.cancel();
    alone.gate().open.cancel();
    for reads in [all, two, unhindered] {
        tokio::time::timeout(LONG, reads).await.unwrap().unwrap();
    }
}

/// Once, a connection's reserve was looked at only when a request came, and whoever found it in use waited for the bytes
/// in all, even after the reserve was free again: an image whose origin was dead held up the VMs of every other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_wait_for_ever_hold_up_no_other_servers_clients() {
    let dir = tempfile::tempdir().unwrap();
    let shared = SharedLimits::from(Limits { bytes: 4 * PIECE as usize, ..Limits::default() });
    let dead = held();
    let first = serve(dir.path(), "dead", Arc::clone(&dead) as SharedDisk, shared.clone());
    let all = ask(&first, 1 + 4).await;
    assert!(came(&dead, 5, LONG).await);

    let well = held();
    well.gate().open.cancel();
    let second = serve(dir.path(), "well", well, shared);
    let client = Client::connect(Address::Unix(second), "disk", Policy::default()).await.unwrap();
    for length in [4096, 64 << 10, PIECE] {
        for _ in 0..10 {
            let reads = (0..16).map(|number| client.read(number * u64::from(length), length));
            let reads = tokio::time::timeout(LONG, futures_util::future::join_all(reads)).await;
            assert!(reads.expect("they wait for the dead image's").iter().all(Result::is_ok));
        }
    }
    dead.gate().open.cancel();
    tokio::time::timeout(LONG, all).await.unwrap().unwrap();
}

/// Once, the piece of a long write that waits for the disk took no share of any budget.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_write_waits_for_its_share_as_others_do() {
    let dir = tempfile::tempdir().unwrap();
    let disk = held();
    let limits = Limits { requests: 1, ..Limits::default() };
    let path = serve(dir.path(), "nbd.sock", Arc::clone(&disk) as SharedDisk, limits);
    let client = Client::connect(Address::Unix(path), "disk", Policy::default()).await.unwrap();
    let reader = client.clone();
    let read = tokio::spawn(async move { reader.read(0, 4096).await });
    assert!(came(&disk, 1, LONG).await);
    let write = tokio::spawn(async move { client.write(0, &[7; 2 * PIECE as usize], false).await });
    assert!(!came(&disk, 2, Duration::from_millis(300)).await, "one request may wait for the disk");
    disk.gate().open.cancel();
    tokio::time::timeout(LONG, read).await.unwrap().unwrap().unwrap();
    tokio::time::timeout(LONG, write).await.unwrap().unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_of_nothing_serve_a_client_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let nothing = Limits {
        connections: 0,
        connections_per_export: 0,
        handshakes: 0,
        handshake_timeout: Duration::ZERO,
        // The client's own handshake needs some, and there is no least number that every client does with.
        options: 8,
        option_bytes: 0,
        queries: 1,
        payload: 0,
        requests: 0,
        bytes_per_connection: 0,
        bytes: 0,
        stall_timeout: Duration::ZERO,
        drain_timeout: Duration::ZERO,
    };
    let disk = held();
    disk.gate().open.cancel();
    let path = serve(dir.path(), "nothing", disk, nothing);
    let client = Client::connect(Address::Unix(path.clone()), "disk", Policy::default()).await.unwrap();
    // Several at once, which wait for each other's budget.
    let reads = (0..8).map(|number| client.read(number * 65536, 65536));
    let reads = tokio::time::timeout(LONG, futures_util::future::join_all(reads)).await.expect("they hang");
    assert!(reads.iter().all(Result::is_ok));
    assert!(kept(&path).await.is_none(), "a second connection is kept");
}

/// Once, GO was acknowledged, and the connection closed behind that: the client could not know why.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_finds_no_place_is_told_before_it_is_served_and_may_come_again() {
    let dir = tempfile::tempdir().unwrap();
    let disk = || Arc::new(MemoryDisk::new(4096));
    let in_all = serve(dir.path(), "all", disk(), Limits { connections: 2, ..Limits::default() });
    let export =
        serve(dir.path(), "export", disk(), Limits { connections_per_export: 2, ..Limits::default() });
    for path in [in_all, export] {
        let connect = |connections| {
            let policy = Policy { connections, ..Policy::default() };
            Client::connect(Address::Unix(path.clone()), "disk", policy)
        };
        let first = connect(8).await.expect("two places are enough");
        assert_eq!(first.read(0, 4).await.unwrap(), [0; 4]);
        let refused = connect(1).await.unwrap_err().to_string();
        assert!(refused.contains("no place for another connection"), "{refused}");
        first.close().await;
        let place = async { while connect(1).await.is_err() {} };
        tokio::time::timeout(LONG, place).await.expect("the place is not free again");
    }
}

/// The kind of the reply to an unknown option with so many bytes of data.
async fn refused_as(path: &Path, length: usize) -> u32 {
    let mut stream = UnixStream::connect(path).await.unwrap();
    stream.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x63").await.unwrap();
    stream.write_all(&u32::try_from(length).unwrap().to_be_bytes()).await.unwrap();
    stream.write_all(&vec![0; length]).await.unwrap();
    let mut reply = [0; 18 + 20];
    stream.read_exact(&mut reply).await.unwrap();
    u32::from_be_bytes(reply[18 + 12..18 + 16].try_into().unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn options_are_read_up_to_the_limit_and_read_away_beyond() {
    let dir = tempfile::tempdir().unwrap();
    let disk = || Arc::new(MemoryDisk::new(4096));
    let usual = serve(dir.path(), "usual", disk(), Limits::default());
    let long = Limits { option_bytes: 128 << 10, ..Limits::default() };
    let long = serve(dir.path(), "long", disk(), long);
    assert_eq!(refused_as(&usual, 64 << 10).await, ERR_UNSUP);
    assert_eq!(refused_as(&usual, (64 << 10) + 1).await, ERR_TOO_BIG);
    assert_eq!(refused_as(&long, 128 << 10).await, ERR_UNSUP);
    assert_eq!(refused_as(&long, (128 << 10) + 1).await, ERR_TOO_BIG);
}

/// Opens nothing, for the reason that a name asks for.
struct Refusing;

impl Exports for Refusing {
    fn open<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Export, OpenError>> {
        let reason = "\u{e9}".repeat(2000);
        let error = match name {
            "used" => OpenError::Refused(reason),
            "late" => OpenError::Shutdown(reason),
            _ => OpenError::Unknown(reason),
        };
        Box::pin(async { Err(error) })
    }

    fn list(&self) -> BoxFuture<'_, Vec<(String, String)>> {
        Box::pin(async { Vec::new() })
    }
}

#[tokio::test]
async fn why_an_export_is_not_opened_is_told_in_whole_characters() {
    let server = Server::new(Arc::new(Refusing), Limits::default(), Tls::Off);
    let (mut client, stream) = tokio::io::duplex(1 << 16);
    tokio::spawn(async move { server.serve_stream(stream, CancellationToken::new()).await });
    client.write_all(b"\0\0\0\x03").await.unwrap();
    client.read_exact(&mut [0; 18]).await.unwrap();
    for (name, kind) in [(b"used", ERR_POLICY), (b"late", ERR_SHUTDOWN), (b"none", ERR_UNKNOWN)] {
        let go = [&b"IHAVEOPT\0\0\0\x07\0\0\0\x0a\0\0\0\x04"[..], name, &[0, 0]].concat();
        client.write_all(&go).await.unwrap();
        let mut header = [0; 20];
        client.read_exact(&mut header).await.unwrap();
        assert_eq!(u32::from_be_bytes(header[12..16].try_into().unwrap()), kind);
        let mut reason = vec![0; u32::from_be_bytes(header[16..].try_into().unwrap()) as usize];
        client.read_exact(&mut reason).await.unwrap();
        assert!(!reason.is_empty() && std::str::from_utf8(&reason).is_ok());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_hangs_is_given_up_after_the_time_to_drain() {
    let disk = held();
    let shown = Arc::clone(&disk) as SharedDisk;
    let limits = Limits { drain_timeout: Duration::from_millis(50), ..Limits::default() };
    let server = Server::new(Arc::new(Export::new("disk", shown)), limits, Tls::Off);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nbd.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let cancel = CancellationToken::new();
    let until = cancel.clone();
    let task = tokio::spawn(async move { server.serve_unix(listener, until).await });
    let client = Client::connect(Address::Unix(path), "disk", Policy::default()).await.unwrap();
    let read = tokio::spawn(async move { client.read(0, 4096).await });
    assert!(came(&disk, 1, LONG).await);
    let began = std::time::Instant::now();
    cancel.cancel();
    tokio::time::timeout(LONG, task).await.unwrap().unwrap();
    assert!(began.elapsed() < Limits::default().drain_timeout, "{:?}", began.elapsed());
    assert!(read.await.unwrap().is_err());
}

/// Once, the deadline for a goodbye behind requests that wait was no instant, and the connection's task panicked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn times_without_end_are_as_good_as_long_ones() {
    let dir = tempfile::tempdir().unwrap();
    let disk = held();
    let time = Duration::MAX;
    let limits = Limits {
        requests: 1,
        handshake_timeout: time,
        stall_timeout: time,
        drain_timeout: time,
        ..Limits::default()
    };
    let path = serve(dir.path(), "nbd.sock", Arc::clone(&disk) as SharedDisk, limits);
    let mut stream = UnixStream::connect(&path).await.unwrap();
    stream.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x04disk").await.unwrap();
    stream.read_exact(&mut [0; 18 + 10]).await.unwrap();
    let request = |command: u8, length: u8| {
        let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
        bytes.extend([0, 0, 0, command]);
        bytes.resize(27, 0);
        bytes.push(length);
        bytes
    };
    stream.write_all(&[request(0, 16), request(0, 16), request(2, 0)].concat()).await.unwrap();
    assert!(came(&disk, 1, LONG).await);
    stream.shutdown().await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    disk.gate().open.cancel();
    let mut answers = Vec::new();
    tokio::time::timeout(LONG, stream.read_to_end(&mut answers)).await.unwrap().unwrap();
    assert_eq!(answers.len(), 2 * (16 + 16), "both reads are answered");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn so_many_options_are_answered_and_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let path = serve(dir.path(), "nbd.sock", Arc::new(MemoryDisk::new(4096)), Limits::default());
    let mut stream = UnixStream::connect(&path).await.unwrap();
    stream.write_all(b"\0\0\0\x03").await.unwrap();
    stream.read_exact(&mut [0; 18]).await.unwrap();
    let mut answered = 0;
    loop {
        let _ = stream.write_all(b"IHAVEOPT\0\0\0\x63\0\0\0\0").await;
        // The header of a reply, and what it says.
        let mut header = [0; 20];
        if tokio::time::timeout(LONG, stream.read_exact(&mut header)).await.unwrap().is_err() {
            break;
        }
        let length = u32::from_be_bytes(header[16..].try_into().unwrap());
        stream.read_exact(&mut vec![0; length as usize]).await.unwrap();
        answered += 1;
    }
    assert_eq!(answered, Limits::default().options);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_of_the_longest_payload_is_taken_and_a_longer_one_ends_the_connection() {
    let dir = tempfile::tempdir().unwrap();
    let most = Limits::default().payload;
    let size = most as usize + 4096;
    let path = serve(dir.path(), "nbd.sock", Arc::new(MemoryDisk::new(size)), Limits::default());
    let client = Client::connect(Address::Unix(path.clone()), "disk", Policy::default()).await.unwrap();
    client.write(1, &vec![7; most as usize], false).await.unwrap();
    assert_eq!(client.read(u64::from(most) - 1, 4).await.unwrap(), [7, 7, 0, 0]);

    let mut stream = kept(&path).await.unwrap();
    let mut request = 0x2560_9513_u32.to_be_bytes().to_vec();
    request.extend([0, 0, 0, 1]);
    request.resize(24, 0);
    request.extend((most + 1).to_be_bytes());
    stream.write_all(&request).await.unwrap();
    let mut rest = Vec::new();
    // Not a byte of the payload has been sent: the server must not wait for it.
    let _ = tokio::time::timeout(LONG, stream.read_to_end(&mut rest)).await.expect("it waits");
    assert!(rest.is_empty(), "{rest:?}");
    assert_eq!(client.read(0, 2).await.unwrap(), [0, 7], "nothing of it was written");
}

/// Once the oldest left whatever it had sent: who only connected, fast enough, shut clients out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_says_nothing_leaves_the_handshake_before_who_does() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits { handshakes: 2, ..Limits::default() };
    let path = serve(dir.path(), "nbd.sock", Arc::new(MemoryDisk::new(4096)), limits);
    let mut client = UnixStream::connect(&path).await.unwrap();
    client.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x63\0\0\0\0").await.unwrap();
    client.read_exact(&mut [0; 18 + 20]).await.unwrap();
    let mut silent = Vec::new();
    for _ in 0..3 {
        let mut stream = UnixStream::connect(&path).await.unwrap();
        stream.read_exact(&mut [0; 18]).await.unwrap();
        silent.push(stream);
    }
    for stream in &mut silent[..2] {
        assert!(!matches!(stream.read(&mut [0; 1]).await, Ok(1..)), "a silent one is still there");
    }
    client.write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\x04disk").await.unwrap();
    client.read_exact(&mut [0; 10]).await.expect("the one that spoke has left");
}
