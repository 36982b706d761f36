//! Disks that fail, panic, hang or are slow, and clients that do not read: each costs its own request or its own
//! connection, and no more.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bootcache_nbd::chunk::Style;
use bootcache_nbd::client::{Address, Client, Policy};
use bootcache_nbd::layers::{DelayDisk, Delays, ErrorDisk, Errors, Fault, MemoryDisk, Operation, StatsDisk};
use bootcache_nbd::{Attempt, BoxFuture, Disk, Export, Features, Limits, Server, SharedDisk, Tls, ZeroFlags};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;

const SIZE: usize = 4 << 20;

/// A server in this process; ends with it.
struct Served {
    dir: tempfile::TempDir,
    cancel: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl Served {
    fn new(disk: SharedDisk, limits: Limits) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("nbd.sock")).unwrap();
        let server = Server::new(Arc::new(Export::new("disk", disk)), limits, Tls::Off);
        let cancel = CancellationToken::new();
        let until = cancel.clone();
        let task = tokio::spawn(async move { server.serve_unix(listener, until).await });
        Self { dir, cancel, task }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("nbd.sock")
    }

    async fn client(&self) -> Client {
        Client::connect(Address::Unix(self.path()), "disk", Policy::default()).await.unwrap()
    }
}

async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future).await.expect("it takes too long")
}

/// Opens the export by hand, with simple replies.
async fn open(path: &Path) -> UnixStream {
    let mut stream = UnixStream::connect(path).await.unwrap();
    stream.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x04disk").await.unwrap();
    stream.read_exact(&mut [0; 18 + 10]).await.unwrap();
    stream
}

fn read_request(cookie: u64, length: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(0_u64.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_request_that_fails_gets_the_nearest_error_and_the_connection_lives() {
    let disk = Arc::new(ErrorDisk::new(Arc::new(MemoryDisk::new(SIZE)), Errors::default()));
    let served = Served::new(Arc::clone(&disk) as SharedDisk, Limits::default());
    let client = served.client().await;
    for (number, told) in [(28, 28), (5, 5), (30, 1), (122, 28), (71, 5)] {
        disk.gate().fail(&Operation::ALL, 1, Fault::Errno(number));
        let answers = [
            client.read(0, 4096).await.map(drop),
            client.read(0, 1 << 20).await.map(drop),
            client.write(0, &[1; 4096], false).await,
            client.write(0, &vec![1; 1 << 20], true).await,
            client.flush().await,
            client.trim(0, 4096, false).await,
            client.zero(0, 4096, ZeroFlags::default(), false).await,
            client.status(0, 4096).await.map(drop),
        ];
        for (place, answer) in answers.into_iter().enumerate() {
            assert_eq!(answer.unwrap_err().raw_os_error(), Some(told), "answer {place} to {number}");
        }
    }
    disk.gate().heal();
    client.write(0, b"well again", true).await.unwrap();
    assert_eq!(client.read(0, 10).await.unwrap(), b"well again");
}

/// Once, a request whose task panicked was never answered, and its client waited for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_layer_that_panics_costs_the_request_that_met_it() {
    let disk = Arc::new(ErrorDisk::new(Arc::new(MemoryDisk::new(SIZE)), Errors::default()));
    let served = Served::new(Arc::clone(&disk) as SharedDisk, Limits::default());
    let client = served.client().await;
    client.write(0, b"before", false).await.unwrap();
    disk.gate().fail(&Operation::ALL, 1, Fault::Panic);
    let answers = soon(async {
        [
            client.read(0, 4096).await.map(drop),
            client.read(0, 1 << 20).await.map(drop),
            client.write(0, &[1; 4096], true).await,
            client.write(0, &vec![1; 1 << 20], false).await,
            client.flush().await,
            client.zero(0, 4096, ZeroFlags::default(), false).await,
            client.status(0, 4096).await.map(drop),
        ]
    });
    for (place, answer) in answers.await.into_iter().enumerate() {
        assert_eq!(answer.unwrap_err().raw_os_error(), Some(5), "answer {place}");
    }
    disk.gate().heal();
    assert_eq!(soon(client.read(0, 6)).await.unwrap(), b"before");
}

/// Panics where there is no future to catch it in.
struct Panicking;

impl Disk for Panicking {
    fn size(&self) -> u64 {
        SIZE as u64
    }

    fn features(&self) -> Features {
        Features::WRITABLE
    }

    fn try_read(&self, offset: u64, _: &mut [u8]) -> Attempt {
        assert!(offset >= 4096, "told to panic");
        Attempt::Ready(Ok(()))
    }

    fn read<'a>(&'a self, _: u64, _: &'a mut [u8]) -> BoxFuture<'a, std::io::Result<()>> {
        unreachable!("try_read never blocks")
    }

    fn try_write(&self, _: u64, _: &[u8]) -> Attempt {
        panic!("told to panic")
    }

    fn flush(&self) -> BoxFuture<'_, std::io::Result<()>> {
        panic!("told to panic")
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_panic_in_the_synchronous_forms_is_an_error_too() {
    let served = Served::new(Arc::new(Panicking), Limits::default());
    let client = served.client().await;
    let answers = soon(async {
        [
            client.read(0, 4096).await.map(drop),
            client.read(0, 1 << 20).await.map(drop),
            client.write(0, &[1; 512], false).await,
            client.write(0, &vec![1; 1 << 20], false).await,
            client.flush().await,
        ]
    });
    for answer in answers.await {
        assert_eq!(answer.unwrap_err().raw_os_error(), Some(5));
    }
    soon(client.read(4096, 4096)).await.unwrap();
}

/// Says of its blocks what the protocol does not allow.
struct Odd(u32, u32);

impl Disk for Odd {
    fn size(&self) -> u64 {
        SIZE as u64
    }

    fn features(&self) -> Features {
        Features { block_min: self.0, block_preferred: self.1, ..Features::READ_ONLY }
    }

    fn read<'a>(&'a self, _: u64, _: &'a mut [u8]) -> BoxFuture<'a, std::io::Result<()>> {
        Box::pin(async { Ok(()) })
    }
}

/// Once, blocks of no bytes ended every connection at its first request.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn block_sizes_that_make_no_sense_are_taken_for_the_nearest_that_do() {
    for ((least, preferred), told) in [
        ((0, 0), (1, 1)),
        ((512, 0), (512, 512)),
        ((3, 5000), (4, 8192)),
        ((u32::MAX, u32::MAX), (64 << 10, 32 << 20)),
    ] {
        let served = Served::new(Arc::new(Odd(least, preferred)), Limits::default());
        let client = served.client().await;
        let (least, preferred, _) = client.description().block_sizes;
        assert_eq!((least, preferred), told);
        soon(client.read(0, 64 << 10)).await.unwrap();
    }
}

/// Memory of which all but the first 256 KiB are not there until somebody has waited for them, or are never.
struct Patchy {
    memory: MemoryDisk,
    arrived: CancellationToken,
    lost: bool,
}

const THERE: u64 = 256 << 10;

impl Disk for Patchy {
    fn size(&self) -> u64 {
        SIZE as u64
    }

    fn features(&self) -> Features {
        Features::READ_ONLY
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Attempt {
        let there = offset + buf.len() as u64 <= THERE || (self.arrived.is_cancelled() && !self.lost);
        if there { self.memory.try_read(offset, buf) } else { Attempt::WouldBlock }
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> BoxFuture<'a, std::io::Result<()>> {
        Box::pin(async move {
            self.arrived.cancelled().await;
            if self.lost { Err(std::io::Error::other("lost")) } else { self.memory.read(offset, buf).await }
        })
    }
}

/// Simple replies, which are all that the kernel knows, have one header. Once it was sent before the later pieces were
/// there: meanwhile nothing else was answered, and an error could only end the connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_read_with_one_header_waits_and_fails_before_it_is_sent() {
    for lost in [false, true] {
        let (arrived, until) = (CancellationToken::new(), CancellationToken::new());
        let disk = Patchy { memory: MemoryDisk::from(vec![7; SIZE]), arrived: arrived.clone(), lost };
        let served = Served::new(Arc::new(disk), Limits::default());
        let policy = Policy { style: Style::Simple, ..Policy::default() };
        let client = Client::connect(Address::Unix(served.path()), "disk", policy).await.unwrap();
        let long = async {
            let answer = client.read(0, 1 << 20).await;
            assert!(until.is_cancelled(), "it was answered too early");
            answer
        };
        let others = async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            for number in 0..10 {
                assert_eq!(soon(client.read(number * 4096, 4096)).await.unwrap(), [7; 4096]);
            }
            until.cancel();
            arrived.cancel();
        };
        let (long, ()) = soon(async { tokio::join!(long, others) }).await;
        match long {
            Ok(data) => assert!(!lost && data == vec![7; 1 << 20]),
            Err(error) => assert!(lost && error.raw_os_error() == Some(5), "{error}"),
        }
        assert_eq!(soon(client.read(0, 4096)).await.unwrap(), [7; 4096]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_requests_wait_side_by_side_and_are_answered_as_they_are_done() {
    let delays = Delays { read: Duration::from_millis(300), ..Delays::default() };
    let slow = Arc::new(DelayDisk::new(Arc::new(MemoryDisk::new(SIZE)), delays));
    let stats = Arc::new(StatsDisk::new(slow));
    let served = Served::new(Arc::clone(&stats) as SharedDisk, Limits::default());
    let client = served.client().await;
    let began = Instant::now();
    let reads = futures_util::future::join_all((0..100).map(|number| client.read(number * 4096, 4096)));
    let overtaken = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        client.write(0, b"x", false).await.unwrap();
        began.elapsed()
    };
    let (reads, write) = tokio::join!(reads, overtaken);
    assert!(reads.iter().all(Result::is_ok));
    let all = began.elapsed();
    assert!(write < all, "the write waited for the reads");
    // One after the other they would take 30 s.
    assert!(all < Duration::from_secs(15), "{all:?}");
    let count = stats.count(Operation::Read);
    assert_eq!((count.requests, count.bytes, count.errors), (100, 100 * 4096, 0));
    assert!(count.time >= Duration::from_secs(30));
}

/// Whether the server closes a connection whose client asks and does not read, within three seconds.
async fn is_dropped(limits: Limits) -> bool {
    // Reads that wait for the disk hold a share each; those that do not, one a connection.
    let memory = Arc::new(MemoryDisk::from(vec![7; SIZE]));
    let served = Served::new(Arc::new(DelayDisk::new(memory, Delays::all(Duration::from_millis(1)))), limits);
    let mut streams = Vec::new();
    for _ in 0..4 {
        let mut stream = open(&served.path()).await;
        for cookie in 0..40 {
            stream.write_all(&read_request(cookie, 2 << 20)).await.unwrap();
        }
        streams.push(stream);
    }
    // A good client is served meanwhile, whatever the greedy hold.
    let client = served.client().await;
    assert_eq!(soon(client.read(0, 4096)).await.unwrap(), [7; 4096]);
    let sending = async {
        // Requests that nobody reads fill the socket; only a closed one fails.
        while streams[0].write_all(&read_request(99, 4096)).await.is_ok() {}
    };
    let dropped = tokio::time::timeout(Duration::from_secs(3), sending).await.is_ok();
    assert_eq!(soon(client.read(0, 4096)).await.unwrap(), [7; 4096]);
    dropped
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_read_is_dropped_when_memory_is_scarce_and_only_then() {
    let plenty = Limits { stall_timeout: Duration::from_millis(300), ..Limits::default() };
    assert!(!is_dropped(plenty).await);
    assert!(is_dropped(Limits { bytes_per_connection: 1 << 20, bytes: 1 << 20, ..plenty }).await);
}

/// A disk that never answers must not keep the server from ending, nor the client's end of the socket open.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_hangs_does_not_hold_the_server() {
    let disk = Arc::new(ErrorDisk::new(Arc::new(MemoryDisk::new(SIZE)), Errors::default()));
    disk.gate().fail(&[Operation::Read], 1, Fault::Hang);
    let served = Served::new(disk, Limits::default());
    let mut stream = open(&served.path()).await;
    stream.write_all(&read_request(1, 4096)).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    served.cancel.cancel();
    let Served { task, dir, .. } = served;
    soon(task).await.unwrap();
    let mut rest = Vec::new();
    soon(stream.read_to_end(&mut rest)).await.unwrap();
    assert!(rest.is_empty());
    drop(dir);
}
