//! What clients do that mean harm, or break: the server stays up, stays small, and serves good clients all along, one that
//! is there and others that connect meanwhile.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bootcache_nbd::client::{Address, Client, Policy};
use bootcache_nbd::layers::MemoryDisk;
use bootcache_nbd::{Attempt, BoxFuture, Disk, Export, Features, Limits, Server, SharedDisk, Tls};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

const SIZE: usize = 64 << 20;

/// What this process may grow by in an attack, the attackers' own memory included.
const GROWTH_MAX: u64 = 256 << 20;

/// One attack at a time: they are measured.
static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// A server under attack, and a good client that reads for as long as it lasts.
struct Attacked {
    address: SocketAddr,
    name: &'static str,
    before: u64,
    over: CancellationToken,
    /// Good clients that connected meanwhile, and tries of theirs that failed.
    clients: AtomicUsize,
    refused: AtomicUsize,
    beside: tokio::task::JoinHandle<Beside>,
    _server: tokio_util::sync::DropGuard,
    _turn: tokio::sync::MutexGuard<'static, ()>,
}

/// What the good client met.
struct Beside {
    took: Vec<Duration>,
    resident_max: u64,
}

impl Attacked {
    /// Starts a server of memory.
    async fn start(name: &'static str) -> Self {
        // It is there before the attack: what grows is the server.
        let mut content = vec![1; SIZE];
        content.fill(0);
        Self::start_with(name, Arc::new(MemoryDisk::from(content))).await
    }

    /// Starts a server with a short patience for handshakes, so that the tests need not wait long.
    async fn start_with(name: &'static str, disk: SharedDisk) -> Self {
        let turn = TURN.lock().await;
        let limits = Limits {
            handshake_timeout: Duration::from_secs(2),
            connections_per_export: 400,
            ..Limits::default()
        };
        let server = Server::new(Arc::new(Export::new("disk", disk)), limits, Tls::Off);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let cancel = CancellationToken::new();
        let until = cancel.clone();
        tokio::spawn(async move { server.serve_tcp(listener, until).await });

        let client = connect(address).await.unwrap();
        let before = resident();
        let over = CancellationToken::new();
        let until = over.clone();
        let beside = tokio::spawn(async move {
            let mut beside = Beside { took: Vec::new(), resident_max: 0 };
            while !until.is_cancelled() {
                let began = Instant::now();
                let read = tokio::time::timeout(Duration::from_secs(10), client.read(60 << 20, 4096));
                assert!(read.await.expect("a good client waits").unwrap() == [0; 4096], "other bytes");
                beside.took.push(began.elapsed());
                beside.resident_max = beside.resident_max.max(resident());
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            beside
        });
        let _server = cancel.drop_guard();
        let (clients, refused) = (AtomicUsize::new(0), AtomicUsize::new(0));
        Self { address, name, before, over, clients, refused, beside, _server, _turn: turn }
    }

    /// Runs an attack; good clients come and go meanwhile, and one more comes behind it.
    async fn run<T: Send + 'static>(&self, attack: impl FnOnce(SocketAddr) -> T + Send + 'static) -> T {
        let address = self.address;
        let attack = tokio::task::spawn_blocking(move || attack(address));
        while !attack.is_finished() {
            self.good_client_is_served().await;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.good_client_is_served().await;
        attack.await.unwrap()
    }

    /// Every request of a client that connects only now is answered. It tries again when its place in the handshake was
    /// needed for newer connections before it could say a word.
    async fn good_client_is_served(&self) {
        let served = async {
            self.clients.fetch_add(1, Ordering::Relaxed);
            let client = loop {
                match connect(self.address).await {
                    Ok(client) => break client,
                    Err(_) => self.refused.fetch_add(1, Ordering::Relaxed),
                };
                tokio::time::sleep(Duration::from_millis(5)).await;
            };
            for number in 0..50_u64 {
                client.write(number * 4096, &[7; 4096], false).await.unwrap();
                assert!(client.read(number * 4096, 4096).await.unwrap() == [7; 4096], "other bytes");
            }
            client.close().await;
        };
        tokio::time::timeout(Duration::from_secs(10), served).await.expect("a good client was not served");
    }

    /// The attack is over: every read beside it was answered, and the process has stayed small.
    async fn survived(self) {
        self.good_client_is_served().await;
        self.over.cancel();
        let Beside { mut took, resident_max } = self.beside.await.expect("the good client was not served");
        took.sort();
        let (Some(p50), Some(p99)) = (took.get(took.len() / 2), took.get(took.len() * 99 / 100)) else {
            panic!("no read beside the attack");
        };
        let grown = resident_max.max(resident()).saturating_sub(self.before);
        let (clients, refused) = (self.clients.into_inner(), self.refused.into_inner());
        let (name, count, mib) = (self.name, took.len(), grown >> 20);
        println!(
            "{name}: {count} reads beside it, p50 {p50:.1?}, p99 {p99:.1?}; {clients} more clients, {refused} tries \
             refused; grew by {mib} MiB"
        );
        assert!(grown < GROWTH_MAX, "grew by {mib} MiB");
    }
}

async fn connect(address: SocketAddr) -> std::io::Result<Client> {
    Client::connect(Address::Tcp(address), "disk", Policy::default()).await
}

/// Memory of this process in bytes.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_connections_shut_nobody_out_and_are_dropped() {
    let attacked = Attacked::start("silent connections").await;
    let count = many(200, 1000);
    let silent = move |address| (0..count).map(|_| TcpStream::connect(address).unwrap()).collect::<Vec<_>>();
    let mut silent = attacked.run(silent).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let all_dropped = attacked.run(move |_| {
        silent.iter_mut().all(|stream| {
            stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            let mut rest = Vec::new();
            stream.read_to_end(&mut rest).is_ok() || !rest.is_empty()
        })
    });
    assert!(all_dropped.await, "a silent connection is still open");
    attacked.survived().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handshakes_of_one_byte_a_second_are_dropped() {
    let attacked = Attacked::start("slow handshakes").await;
    let slow = attacked.run(|address| {
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
    assert!(slow.await < Duration::from_secs(8), "they were served for as long as they liked");
    attacked.survived().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_ask_for_everything_and_never_read_cost_little() {
    let attacked = Attacked::start("clients that never read").await;
    let greedy = attacked.run(|address| {
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
        std::thread::sleep(Duration::from_secs(1));
        streams
    });
    drop(greedy.await);
    attacked.survived().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_sent_writes_and_resets_with_reads_pending_end_nothing_else() {
    let attacked = Attacked::start("half-sent writes and resets").await;
    let half = attacked.run(|address| {
        let mut streams = Vec::new();
        for cookie in 0..many(50, 100) as u64 {
            let mut stream = open(address);
            stream.write_all(&request(1, cookie, 0, 32 << 20)).unwrap();
            stream.write_all(&[1; 1000]).unwrap();
            streams.push(stream);
        }
        streams
    });
    let half = half.await;
    let resets = attacked.run(|address| {
        for cookie in 0..many(100, 1000) as u64 {
            let mut stream = open(address);
            for number in 0..20 {
                stream.write_all(&request(0, cookie + number, 0, 1 << 20)).unwrap();
            }
            // Closing with unread replies makes the kernel reset the connection.
            drop(stream);
        }
    });
    resets.await;
    drop(half);
    attacked.survived().await;
}

/// Memory on which nothing ever becomes durable.
struct NeverDurable(MemoryDisk);

impl Disk for NeverDurable {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn features(&self) -> Features {
        self.0.features()
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Attempt {
        self.0.try_read(offset, buf)
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> BoxFuture<'a, std::io::Result<()>> {
        self.0.read(offset, buf)
    }

    fn try_write(&self, offset: u64, data: &[u8]) -> Attempt {
        self.0.try_write(offset, data)
    }

    fn write<'a>(&'a self, _: u64, _: &'a [u8], _: bool) -> BoxFuture<'a, std::io::Result<()>> {
        Box::pin(std::future::pending())
    }
}

/// Once, a byte that waited for the disk kept the whole buffer alive that it had come in, and was charged for a byte.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn short_writes_that_wait_behind_long_ones_hold_what_they_are_charged_for() {
    let mut content = vec![1; SIZE];
    content.fill(0);
    let disk = NeverDurable(MemoryDisk::from(content));
    let attacked = Attacked::start_with("writes that wait behind long ones", Arc::new(disk)).await;
    let pairs = attacked.run(|address| {
        let fua = |cookie| {
            let mut bytes = request(1, cookie, 8 << 20, 1);
            bytes[5] = 1;
            bytes.push(7);
            bytes
        };
        let mut pair = request(1, 0, 16 << 20, 256 << 10);
        pair.resize(28 + (256 << 10), 7);
        pair.extend(fua(1));
        let streams: Vec<_> = (0..16).map(|_| open(address)).collect();
        for mut stream in &streams {
            for _ in 0..100 {
                stream.write_all(&pair).unwrap();
                stream.read_exact(&mut [0; 16]).unwrap();
            }
        }
        streams
    });
    let streams = pairs.await;
    attacked.good_client_is_served().await;
    drop(streams);
    attacked.survived().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_connects_and_floods_of_whole_disk_requests_are_survived() {
    let attacked = Attacked::start("connects, whole-disk trims and zeroes").await;
    let floods = attacked.run(|address| {
        for _ in 0..many(1000, 10_000) {
            drop(TcpStream::connect(address).unwrap());
        }
        let mut stream = open(address);
        let mut reader = stream.try_clone().unwrap();
        let drain = std::thread::spawn(move || {
            let mut sink = [0; 4096];
            let mut answers = 0;
            while answers < 300 * 16 {
                let got = reader.read(&mut sink).unwrap();
                assert!(got > 0, "the connection has ended");
                answers += got;
            }
        });
        // All but what good clients write to.
        let start = 1 << 20;
        for cookie in 0..100 {
            for command in [4, 6, 3] {
                let (offset, length) = if command == 3 { (0, 0) } else { (start, SIZE - start) };
                let (offset, length) = (offset as u64, u32::try_from(length).unwrap());
                stream.write_all(&request(command, cookie, offset, length)).unwrap();
            }
        }
        drain.join().unwrap();
    });
    floods.await;
    attacked.survived().await;
}

/// Status of the whole disk, asked for again and again by clients that do not read, costs what their budgets allow.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn floods_of_block_status_are_survived() {
    let attacked = Attacked::start("block status").await;
    let floods = attacked.run(|address| {
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
    });
    let streams = floods.await;
    attacked.good_client_is_served().await;
    drop(streams);
    attacked.survived().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lengths_that_lie_end_the_connection_or_get_an_error() {
    let attacked = Attacked::start("lengths that lie").await;
    let lies = attacked.run(|address| {
        // An option of 4 GiB.
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        stream.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x07\xff\xff\xff\xff").unwrap();
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        assert_eq!(rest.len(), 18, "only the greeting is expected");
        for _ in 0..1000 {
            ask_with_a_query_that_is_too_long(address);
        }
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
    });
    lies.await;
    attacked.survived().await;
}

/// A metadata query that is far too long, within an option that is just taken.
fn ask_with_a_query_that_is_too_long(address: SocketAddr) {
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
}
