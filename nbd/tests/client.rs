//! The client: what becomes of requests when connections break, servers end, or servers do not keep to the protocol.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bootcache_nbd::chunk::{Answer, Style};
use bootcache_nbd::client::{Address, Client, Policy};
use bootcache_nbd::consts::{Errno, flag, info, option, reply};
use bootcache_nbd::disk::BASE_ALLOCATION;
use bootcache_nbd::handshake::{greeting, option_reply};
use bootcache_nbd::layers::{Gate, Gated, MemoryDisk, Operation};
use bootcache_nbd::{BoxFuture, Export, Limits, Server, SharedDisk, StatusExtent, Tls, ZeroFlags};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future).await.expect("it takes too long")
}

/// Serves `disk` on `nbd.sock` in `dir`, for as long as the test lasts.
fn serve(dir: &Path, disk: SharedDisk) -> PathBuf {
    serve_until(dir, disk, CancellationToken::new()).0
}

fn serve_until(dir: &Path, disk: SharedDisk, until: CancellationToken) -> (PathBuf, JoinHandle<()>) {
    let path = dir.join("nbd.sock");
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    let server = Server::new(Arc::new(Export::new("disk", disk)), Limits::default(), Tls::Off);
    (path, tokio::spawn(async move { server.serve_unix(listener, until).await }))
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_answer_to_a_read_that_was_given_up_is_thrown_away_and_no_other() {
    let dir = tempfile::tempdir().unwrap();
    for style in [Style::Simple, Style::Structured, Style::Extended] {
        let disk = Arc::new(Gated::new(Arc::new(MemoryDisk::from(vec![7; 4 << 20])), Slow));
        let path = dir.path().join("nbd.sock");
        let _ = std::fs::remove_file(&path);
        let path = serve(dir.path(), disk);
        let client = connect(&path, Policy { style, ..Policy::default() }).await;
        for round in 0..4_u32 {
            let given_up = client.read(0, 1 << 20);
            assert!(tokio::time::timeout(Duration::from_millis(10), given_up).await.is_err());
            let length = 4096 << round;
            assert_eq!(soon(client.read(4096, length)).await.unwrap(), vec![7; length as usize]);
        }
    }
}

/// Lets every request pass after a while.
#[derive(Debug)]
struct Slow;

impl Gate for Slow {
    fn pass(&self, _: Operation) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async {
            tokio::time::sleep(Duration::from_millis(300)).await;
            Ok(())
        })
    }
}

/// Once, a broken connection had the fewest requests in flight, and so got the next ones.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_go_to_the_connections_that_are_left() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(dir.path(), Arc::new(MemoryDisk::from(vec![7; 1 << 20])));
    let path = dir.path().join("between.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let between = tokio::spawn(async move {
        let mut carriers = Vec::new();
        for _ in 0..4 {
            let (mut near, _) = listener.accept().await.unwrap();
            let mut far = UnixStream::connect(&server).await.unwrap();
            carriers.push(tokio::spawn(async move {
                let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
            }));
        }
        carriers
    });
    let client = connect(&path, Policy { connections: 4, ..Policy::default() }).await;
    let carriers = soon(between).await.unwrap();
    for carrier in &carriers[..3] {
        carrier.abort();
        for number in 0..50 {
            assert_eq!(soon(client.read(number * 4096, 4096)).await.unwrap(), [7; 4096]);
        }
    }
    carriers[3].abort();
    assert!(soon(client.read(0, 4096)).await.is_err(), "no connection is left");
}

/// A server that does what a test says. Its connections are past the handshake, with simple replies.
struct Odd {
    listener: UnixListener,
    flags: u16,
}

const SIZE: u64 = 1 << 20;

impl Odd {
    fn new(dir: &Path, flags: u16) -> (Self, PathBuf) {
        let path = dir.join("odd.sock");
        (Self { listener: UnixListener::bind(&path).unwrap(), flags: flags | flag::HAS_FLAGS }, path)
    }

    async fn accept(&self) -> UnixStream {
        self.agree(greeting().to_vec(), 4).await
    }

    /// The same, with structured replies and `base:allocation` as context 1.
    async fn accept_structured(&self) -> UnixStream {
        let mut said = greeting().to_vec();
        option_reply(&mut said, option::STRUCTURED_REPLY, reply::ACK, &[]);
        let context = [&[0, 0, 0, 1], BASE_ALLOCATION.as_bytes()].concat();
        option_reply(&mut said, option::SET_META_CONTEXT, reply::META_CONTEXT, &context);
        option_reply(&mut said, option::SET_META_CONTEXT, reply::ACK, &[]);
        self.agree(said, 4 + 16 + (16 + 4 + 4 + 4 + 4 + BASE_ALLOCATION.len())).await
    }

    /// Says `said` and what belongs to GO, whose request comes behind `heard` bytes.
    async fn agree(&self, mut said: Vec<u8>, heard: usize) -> UnixStream {
        let (mut stream, _) = self.listener.accept().await.unwrap();
        let mut export = info::EXPORT.to_be_bytes().to_vec();
        export.extend(SIZE.to_be_bytes());
        export.extend(self.flags.to_be_bytes());
        option_reply(&mut said, option::GO, reply::INFO, &export);
        option_reply(&mut said, option::GO, reply::ACK, &[]);
        stream.write_all(&said).await.unwrap();
        // GO with its name and one kind of information.
        stream.read_exact(&mut vec![0; heard + 16 + 4 + 4 + 2 + 2]).await.unwrap();
        stream
    }
}

fn simple(reconnect: Duration) -> Policy {
    Policy { style: Style::Simple, reconnect, ..Policy::default() }
}

/// Once, it was sent again without pause for as long as the policy allowed, and ended the others' connections.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_breaks_every_connection_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let (odd, path) = Odd::new(dir.path(), 0);
    let accepted = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&accepted);
    tokio::spawn(async move {
        loop {
            let mut stream = odd.accept().await;
            count.fetch_add(1, Ordering::SeqCst);
            let _ = stream.read_exact(&mut [0; 28]).await;
        }
    });
    let client = connect(&path, simple(Duration::from_secs(600))).await;
    soon(client.read(0, 4096)).await.unwrap_err();
    assert_eq!(accepted.load(Ordering::SeqCst), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_ends_is_left_for_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let (odd, path) = Odd::new(dir.path(), 0);
    let serving = tokio::spawn(async move {
        let mut first = odd.accept().await;
        let mut request = [0; 28];
        first.read_exact(&mut request).await.unwrap();
        let cookie = u64::from_be_bytes(request[8..16].try_into().unwrap());
        let answer = Answer { style: Style::Simple, cookie, offset: 0 };
        let mut bytes = Vec::new();
        answer.error(&mut bytes, Errno::Shutdown, "");
        first.write_all(&bytes).await.unwrap();
        first.read_exact(&mut request).await.unwrap();
        assert_eq!(request[6..8], [0, 2], "a goodbye is expected");

        let mut second = odd.accept().await;
        second.read_exact(&mut request).await.unwrap();
        let cookie = u64::from_be_bytes(request[8..16].try_into().unwrap());
        let mut bytes = Vec::new();
        Answer { cookie, ..answer }.data(&mut bytes, 0, 4, true);
        bytes.extend(b"next");
        second.write_all(&bytes).await.unwrap();
        second
    });
    let client = connect(&path, simple(Duration::from_secs(20))).await;
    assert_eq!(soon(client.read(0, 4)).await.unwrap(), b"next");
    drop(soon(serving).await.unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_is_asked_for_nothing_that_it_does_not_offer() {
    let dir = tempfile::tempdir().unwrap();
    let (odd, path) = Odd::new(dir.path(), 0);
    let serving = tokio::spawn(async move {
        let mut stream = odd.accept().await;
        let mut asked = Vec::new();
        stream.read_to_end(&mut asked).await.unwrap();
        asked
    });
    let client = connect(&path, simple(Duration::ZERO)).await;
    let fast = ZeroFlags { fast: true, ..ZeroFlags::default() };
    let answers = [
        client.flush().await,
        client.write(0, b"x", true).await,
        client.trim(0, 4096, false).await,
        client.zero(0, 4096, ZeroFlags::default(), false).await,
        client.zero(0, 4096, fast, false).await,
        client.prefetch(0, 4096).await,
        client.status(0, 4096).await.map(drop),
        client.read_unfragmented(0, 4096).await.map(drop),
    ];
    for (place, answer) in answers.into_iter().enumerate() {
        assert_eq!(answer.unwrap_err().kind(), io::ErrorKind::Unsupported, "answer {place}");
    }
    assert_eq!(client.read(SIZE, 1).await.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    client.close().await;
    assert_eq!(soon(serving).await.unwrap().len(), 28, "only the goodbye is expected");
}

/// Who walks along a disk by its extents must get on, and not past what was asked for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_that_says_nothing_or_too_much_is_an_error() {
    type Say = fn(Answer, &mut Vec<u8>);
    fn extents(answer: Answer, out: &mut Vec<u8>, lengths: &[u64]) {
        let extents: Vec<_> =
            lengths.iter().map(|length| StatusExtent { length: *length, flags: 0 }).collect();
        answer.status(out, 1, &extents, true);
    }
    let sound: Say = |answer, out| extents(answer, out, &[4096, 1 << 20]);
    let unsound: [Say; 4] = [
        |answer, out| answer.nothing(out),
        |answer, out| answer.done(out),
        |answer, out| extents(answer, out, &[8192, 4096]),
        |answer, out| extents(answer, out, &[4096, 0]),
    ];
    for (place, (say, one, is_sound)) in unsound
        .into_iter()
        .map(|say| (say, false, false))
        .chain([(sound, false, true), (sound, true, false)])
        .enumerate()
    {
        let dir = tempfile::tempdir().unwrap();
        let (odd, path) = Odd::new(dir.path(), flag::SEND_DF);
        tokio::spawn(async move {
            let mut stream = odd.accept_structured().await;
            let mut request = [0; 28];
            stream.read_exact(&mut request).await.unwrap();
            let cookie = u64::from_be_bytes(request[8..16].try_into().unwrap());
            let mut bytes = Vec::new();
            say(Answer { style: Style::Structured, cookie, offset: 0 }, &mut bytes);
            stream.write_all(&bytes).await.unwrap();
            let _ = stream.read_exact(&mut request).await;
        });
        let client = connect(&path, Policy { style: Style::Structured, ..Policy::default() }).await;
        let answer = if one {
            soon(client.status_one(0, 8192)).await.map(|_| 1)
        } else {
            soon(client.status(0, 8192)).await.map(|extents| extents.len())
        };
        assert_eq!(answer.is_ok(), is_sound, "answer {place}: {answer:?}");
    }
}

/// What a server has not made durable may be gone with it, and a flush by the next one says nothing of that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flush_fails_once_behind_writes_that_a_server_may_have_taken_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let until = CancellationToken::new();
    let (path, first) = serve_until(dir.path(), Arc::new(MemoryDisk::new(1 << 16)), until.clone());
    let client = connect(&path, Policy { reconnect: Duration::from_secs(20), ..Policy::default() }).await;
    client.write(0, b"durable", true).await.unwrap();
    client.write(0, b"flushed", false).await.unwrap();
    client.flush().await.unwrap();
    until.cancel();
    first.await.unwrap();
    let until = CancellationToken::new();
    let (_, second) = serve_until(dir.path(), Arc::new(MemoryDisk::new(1 << 16)), until.clone());
    soon(client.flush()).await.unwrap();
    client.write(0, b"lost", false).await.unwrap();
    until.cancel();
    second.await.unwrap();
    let _third = serve(dir.path(), Arc::new(MemoryDisk::new(1 << 16)));
    assert!(soon(client.flush()).await.is_err(), "it was lost, and nobody was told");
    client.write(0, b"again", false).await.unwrap();
    client.flush().await.unwrap();
}

/// Once, one connection was made again and carried all requests from then on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_connection_is_back_after_a_server_has_started_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nbd.sock");
    let export = Export::new("disk", Arc::new(MemoryDisk::new(1 << 16)));
    let start = || {
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        let server = Server::new(Arc::new(export.clone()), Limits::default(), Tls::Off);
        let cancel = CancellationToken::new();
        let until = cancel.clone();
        (cancel, tokio::spawn(async move { server.serve_unix(listener, until).await }))
    };
    let connected = || export.stats.connections.load(Ordering::SeqCst);
    let (cancel, first) = start();
    // For ever: once, a deadline that far away was no instant, and every request panicked.
    let policy = Policy { connections: 4, reconnect: Duration::MAX, ..Policy::default() };
    let client = connect(&path, policy).await;
    client.read(0, 4096).await.unwrap();
    assert_eq!(connected(), 4);
    cancel.cancel();
    soon(first).await.unwrap();
    assert_eq!(connected(), 0);
    let (_cancel, _second) = start();
    soon(async {
        while connected() < 4 {
            client.read(0, 4096).await.unwrap();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// Once, the time to reconnect counted from when a request was made: one that took longer than that, and whose connection
/// broke then, failed at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_time_to_reconnect_begins_when_the_connection_breaks() {
    const RECONNECT: Duration = Duration::from_secs(4);
    let dir = tempfile::tempdir().unwrap();
    let (odd, path) = Odd::new(dir.path(), 0);
    let serving = tokio::spawn(async move {
        let mut first = odd.accept().await;
        first.read_exact(&mut [0; 28]).await.unwrap();
        tokio::time::sleep(RECONNECT + Duration::from_millis(100)).await;
        drop(first);
        let mut second = odd.accept().await;
        let mut request = [0; 28];
        second.read_exact(&mut request).await.unwrap();
        let cookie = u64::from_be_bytes(request[8..16].try_into().unwrap());
        let mut bytes = Vec::new();
        Answer { style: Style::Simple, cookie, offset: 0 }.data(&mut bytes, 0, 4, true);
        bytes.extend(b"late");
        second.write_all(&bytes).await.unwrap();
        second
    });
    let client = connect(&path, simple(RECONNECT)).await;
    assert_eq!(soon(client.read(0, 4)).await.unwrap(), b"late");
    drop(soon(serving).await.unwrap());
}
