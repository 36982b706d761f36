//! What clients do that mean harm, or break: the server stays up, stays small, and serves a good client all along.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bootcache_nbd::client::{Address, Client, Policy};
use bootcache_nbd::layers::MemoryDisk;
use bootcache_nbd::{Export, Limits, Server, Tls};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

const SIZE: usize = 64 << 20;

/// A server with a short patience for handshakes, so that the tests need not wait long.
async fn server() -> (SocketAddr, CancellationToken) {
    let limits = Limits {
        handshake_timeout: Duration::from_secs(2),
        connections_per_export: 400,
        ..Limits::default()
    };
    let disk = Arc::new(MemoryDisk::new(SIZE));
    let server = Server::new(Arc::new(Export::new("disk", disk)), limits, Tls::Off);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let cancel = CancellationToken::new();
    let until = cancel.clone();
    tokio::spawn(async move { server.serve_tcp(listener, until).await });
    (address, cancel)
}

/// Memory of this process in bytes.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

/// A good client beside an attack: every read is answered, also of one that connects only now.
async fn good_client_is_served(address: SocketAddr) {
    let deadline = Duration::from_secs(10);
    let served = async {
        let client = Client::connect(Address::Tcp(address), "disk", Policy::default()).await.unwrap();
        for number in 0..50_u64 {
            client.write(number * 4096, &[7; 4096], false).await.unwrap();
            assert_eq!(client.read(number * 4096, 4096).await.unwrap(), [7; 4096]);
        }
        client.close().await;
    };
    tokio::time::timeout(deadline, served).await.expect("a good client was not served");
}

/// A good client that reads and writes for as long as an attack lasts, and others that connect meanwhile.
struct Beside {
    stop: CancellationToken,
    task: tokio::task::JoinHandle<Vec<Duration>>,
}

impl Beside {
    async fn start(address: SocketAddr) -> Self {
        let client = Client::connect(Address::Tcp(address), "disk", Policy::default()).await.unwrap();
        let stop = CancellationToken::new();
        let until = stop.clone();
        let task = tokio::spawn(async move {
            let mut took = Vec::new();
            while !until.is_cancelled() {
                let began = Instant::now();
                let read = tokio::time::timeout(Duration::from_secs(10), client.read(60 << 20, 4096));
                assert_eq!(read.await.expect("a good client waits").unwrap(), [0; 4096]);
                took.push(began.elapsed());
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            took
        });
        Self { stop, task }
    }

    /// The attack is over: every read was answered. How soon is printed; the bench has the figures.
    async fn served(self, attack: &str) {
        self.stop.cancel();
        let mut took = self.task.await.expect("the good client was not served");
        took.sort();
        let p99 = took.len() * 99 / 100;
        println!("{attack}: {} reads beside it, p99 {:?}", took.len(), took.get(p99).or_else(|| took.last()));
        assert!(!took.is_empty());
    }
}

/// How many: fewer in the tests, all that the reliability goals name with `BOOTCACHE_ATTACK=full`.
fn many(few: usize, full: usize) -> usize {
    if std::env::var_os("BOOTCACHE_ATTACK").is_some_and(|word| word == "full") { full } else { few }
}

/// Opens the export by hand and returns the raw connection, in transmission with simple replies.
fn open(address: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream.write_all(&[0, 0, 0, 3]).unwrap();
    stream.write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\x04disk").unwrap();
    let mut greeting = [0; 18 + 10];
    stream.read_exact(&mut greeting).unwrap();
    stream
}

fn request(command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = vec![0x25, 0x60, 0x95, 0x13, 0, 0];
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_connections_shut_nobody_out_and_are_dropped() {
    let (address, _cancel) = server().await;
    let beside = Beside::start(address).await;
    let mut silent = blocking(move || {
        (0..many(200, 1000)).map(|_| TcpStream::connect(address).unwrap()).collect::<Vec<_>>()
    })
    .await;
    good_client_is_served(address).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let dropped = blocking(move || {
        silent.iter_mut().all(|stream| {
            stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            let mut rest = Vec::new();
            stream.read_to_end(&mut rest).is_ok() || !rest.is_empty()
        })
    });
    assert!(dropped.await, "a silent connection is still open");
    beside.served("silent connections").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handshakes_of_one_byte_a_second_are_dropped() {
    let (address, _cancel) = server().await;
    let beside = Beside::start(address).await;
    let slow = blocking(move || {
        let mut streams: Vec<_> = (0..many(50, 200)).map(|_| TcpStream::connect(address).unwrap()).collect();
        let began = Instant::now();
        for byte in b"\0\0\0\x03IHAVEOPT\0\0\0\x03\0\0\0\0" {
            streams.retain_mut(|stream| stream.write_all(&[*byte]).is_ok());
            if streams.is_empty() {
                break;
            }
            std::thread::sleep(Duration::from_millis(500));
        }
        began.elapsed()
    });
    good_client_is_served(address).await;
    assert!(slow.await < Duration::from_secs(8), "they were served for as long as they liked");
    beside.served("slow handshakes").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_ask_for_everything_and_never_read_cost_little() {
    let (address, _cancel) = server().await;
    let before = resident();
    let beside = Beside::start(address).await;
    let greedy = blocking(move || {
        let mut streams = Vec::new();
        for _ in 0..8 {
            let mut stream = open(address);
            stream.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
            for cookie in 0..200 {
                if stream.write_all(&request(0, cookie, 0, 32 << 20)).is_err() {
                    break;
                }
            }
            streams.push(stream);
        }
        streams
    });
    let streams = greedy.await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    good_client_is_served(address).await;
    let grown = resident().saturating_sub(before);
    assert!(grown < 256 << 20, "grew by {} MiB", grown >> 20);
    drop(streams);
    good_client_is_served(address).await;
    beside.served("clients that never read").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_sent_writes_and_resets_with_reads_pending_end_nothing_else() {
    let (address, _cancel) = server().await;
    let before = resident();
    let beside = Beside::start(address).await;
    let half = blocking(move || {
        let mut streams = Vec::new();
        for cookie in 0..many(50, 100) as u64 {
            let mut stream = open(address);
            stream.write_all(&request(1, cookie, 0, 32 << 20)).unwrap();
            stream.write_all(&[1; 1000]).unwrap();
            streams.push(stream);
        }
        streams
    })
    .await;
    good_client_is_served(address).await;
    blocking(move || {
        for cookie in 0..many(100, 1000) as u64 {
            let mut stream = open(address);
            for number in 0..20 {
                stream.write_all(&request(0, cookie + number, 0, 1 << 20)).unwrap();
            }
            // Closing with unread replies makes the kernel reset the connection.
            drop(stream);
        }
    })
    .await;
    good_client_is_served(address).await;
    drop(half);
    let grown = resident().saturating_sub(before);
    assert!(grown < 256 << 20, "grew by {} MiB", grown >> 20);
    beside.served("half-sent writes and resets").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_connects_and_floods_of_whole_disk_requests_are_survived() {
    let (address, _cancel) = server().await;
    let beside = Beside::start(address).await;
    let floods = blocking(move || {
        for _ in 0..many(1000, 10_000) {
            drop(TcpStream::connect(address).unwrap());
        }
        let mut stream = open(address);
        let reader = stream.try_clone().unwrap();
        let drain = std::thread::spawn(move || {
            let mut sink = [0; 4096];
            let mut reader = reader;
            let mut answers = 0;
            while answers < 300 * 16 {
                answers += reader.read(&mut sink).unwrap();
            }
        });
        for cookie in 0..100 {
            for command in [4, 6, 3] {
                let length = if command == 3 { 0 } else { u32::try_from(SIZE).unwrap() };
                stream.write_all(&request(command, cookie, 0, length)).unwrap();
            }
        }
        drain.join().unwrap();
    });
    floods.await;
    beside.served("connects, whole-disk trims and zeroes").await;
    let client = Client::connect(Address::Tcp(address), "disk", Policy::default()).await.unwrap();
    assert_eq!(client.read(0, 4).await.unwrap(), [0; 4]);
}

/// Status of the whole disk, asked for again and again by clients that do not read, costs what their budgets allow.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn floods_of_block_status_are_survived() {
    let (address, _cancel) = server().await;
    let before = resident();
    let beside = Beside::start(address).await;
    let streams = blocking(move || {
        let mut streams = Vec::new();
        for _ in 0..many(4, 16) {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            let query = b"\0\0\0\x04disk\0\0\0\x01\0\0\0\x0fbase:allocation";
            let opening = [
                b"\0\0\0\x03IHAVEOPT\0\0\0\x08\0\0\0\0IHAVEOPT\0\0\0\x0a\0\0\0\x1f".as_slice(),
                query,
                b"IHAVEOPT\0\0\0\x07\0\0\0\x0a\0\0\0\x04disk\0\0",
            ];
            stream.write_all(&opening.concat()).unwrap();
            // Greeting; ACK; context and ACK; sizes, export and ACK.
            stream.read_exact(&mut [0; 18 + 20 + (24 + 15 + 20) + (20 + 14) + (20 + 12) + 20]).unwrap();
            stream.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
            for cookie in 0..many(20_000, 200_000) as u64 {
                if stream.write_all(&request(7, cookie, 0, u32::try_from(SIZE).unwrap())).is_err() {
                    break;
                }
            }
            streams.push(stream);
        }
        streams
    })
    .await;
    good_client_is_served(address).await;
    let grown = resident().saturating_sub(before);
    assert!(grown < 256 << 20, "grew by {} MiB", grown >> 20);
    beside.served("block status").await;
    drop(streams);
    good_client_is_served(address).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lengths_that_lie_end_the_connection_or_get_an_error() {
    let (address, _cancel) = server().await;
    blocking(move || {
        // An option of 4 GiB.
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        stream.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x07\xff\xff\xff\xff").unwrap();
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        assert_eq!(rest.len(), 18, "only the greeting is expected");
        // A metadata query that is far too long, within an option that is just taken.
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut bytes = b"\0\0\0\x03IHAVEOPT\0\0\0\x08\0\0\0\0IHAVEOPT\0\0\0\x0a".to_vec();
        let query = vec![b'x'; 60_000];
        bytes.extend(u32::try_from(4 + 4 + 4 + 4 + query.len()).unwrap().to_be_bytes());
        bytes.extend(4_u32.to_be_bytes());
        bytes.extend(b"disk");
        bytes.extend(1_u32.to_be_bytes());
        bytes.extend(u32::try_from(query.len()).unwrap().to_be_bytes());
        bytes.extend(&query);
        stream.write_all(&bytes).unwrap();
        let mut replies = [0; 18 + 20 + 20];
        stream.read_exact(&mut replies).unwrap();
        assert_eq!(&replies[18 + 20 + 12..18 + 20 + 16], [0x80, 0, 0, 3], "ERR_INVALID is expected");
        // Offsets that overflow.
        let mut stream = open(address);
        for (offset, length) in [(u64::MAX, 4096), (u64::MAX - 100, u32::MAX), (1 << 63, 1)] {
            stream.write_all(&request(0, 1, offset, length)).unwrap();
            let mut reply = [0; 16];
            stream.read_exact(&mut reply).unwrap();
            assert_eq!(&reply[4..8], [0, 0, 0, 22], "EINVAL is expected");
        }
        // Bytes that are no request end the connection.
        stream.write_all(&[0xff; 28]).unwrap();
        assert_eq!(stream.read(&mut [0; 16]).unwrap_or(0), 0);
    })
    .await;
    good_client_is_served(address).await;
}
