//! Two clients' random operations against a vector of bytes, over a real socket.
//!
//! For `BOOTCACHE_MODEL_SECONDS`: 10 unless set, 120 in CI, and `make soak` takes half an hour. `BOOTCACHE_MODEL_SEED`
//! has the operations of another run again.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bootcache_nbd::chunk::Style;
use bootcache_nbd::client::{Address, Client, Policy};
use bootcache_nbd::consts::flag::{SEND_CACHE, SEND_FAST_ZERO};
use bootcache_nbd::disk::STATE_ZERO;
use bootcache_nbd::layers::{FileDisk, MemoryDisk};
use bootcache_nbd::{Attempt, BoxFuture, Disk, Export, Features, Limits, Server, SharedDisk, Tls, ZeroFlags};
use rustix::fs::{FallocateFlags, fallocate};
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;

const SIZE: u32 = 1 << 20;

/// A small generator (SplitMix64): the seed is printed, so that a failure can be had again.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u32) -> u32 {
        u32::try_from(self.next() % u64::from(bound)).unwrap()
    }

    /// A range: mostly short, sometimes long, on block borders and off them.
    fn range(&mut self, base: u32, size: u32) -> (u32, u32) {
        let start = self.below(size - 1);
        let longest = if self.below(8) == 0 { size - start } else { (size - start).min(9000) };
        let (mut start, mut length) = (start, 1 + self.below(longest));
        if self.below(3) == 0 {
            start &= !4095;
            length = length.next_multiple_of(4096).min(size - start);
        }
        (base + start, length)
    }

    /// Up to eight parts of `size` bytes that do not overlap, as (start, size): some of a few bytes, some long.
    fn parts(&mut self, size: u32) -> Vec<(u32, u32)> {
        let mut cuts: Vec<u32> = (0..self.below(8)).map(|_| self.below(size)).collect();
        cuts.extend([0, size]);
        cuts.sort_unstable();
        let parts = cuts.windows(2).map(|pair| (pair[0], pair[1] - pair[0]));
        parts.filter(|(_, size)| *size > 1).collect()
    }
}

async fn serve(disk: SharedDisk, path: &Path) -> CancellationToken {
    let cancel = CancellationToken::new();
    let listener = UnixListener::bind(path).unwrap();
    let server = Server::new(Arc::new(Export::new("disk", disk)), Limits::default(), Tls::Off);
    let until = cancel.clone();
    tokio::spawn(async move { server.serve_unix(listener, until).await });
    cancel
}

/// What a trimmed range reads as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trimmed {
    /// Zeroes: on memory, and in a file on a file system that can punch holes.
    Zeroes,
    /// What it was before: in a file on one that cannot.
    Untouched,
}

/// One request, on a range that no other in flight touches.
struct Ask {
    what: What,
    offset: u32,
    length: u32,
}

enum What {
    Write { data: Vec<u8>, fua: bool },
    Zero { how: ZeroFlags, fua: bool },
    Trim { fua: bool },
    Flush,
    Cache,
    Status { one: bool },
    Read { whole: bool },
}

impl Ask {
    fn random(random: &mut Random, (offset, length): (u32, u32)) -> Self {
        let what = match random.below(14) {
            0..=3 => What::Write {
                data: (0..length).map(|_| random.next().to_le_bytes()[0]).collect(),
                fua: random.below(20) == 0,
            },
            4 => What::Zero {
                how: ZeroFlags { no_hole: random.below(2) == 0, fast: random.below(2) == 0 },
                fua: random.below(20) == 0,
            },
            5..=6 => What::Trim { fua: random.below(20) == 0 },
            7 => What::Flush,
            8 => What::Cache,
            9 => What::Status { one: random.below(2) == 0 },
            _ => What::Read { whole: random.below(4) == 0 },
        };
        Self { what, offset, length }
    }

    /// Asks, and compares the answer with what the range's bytes are `expected` to be.
    async fn carry_out(&self, client: &Client, expected: &[u8]) {
        let (offset, length) = (u64::from(self.offset), u64::from(self.length));
        match &self.what {
            What::Write { data, fua } => client.write(offset, data, *fua).await.unwrap(),
            What::Zero { how, fua } => {
                let offered = client.description().flags & SEND_FAST_ZERO != 0;
                let mut how = *how;
                if how.fast {
                    match client.zero(offset, length, how, *fua).await {
                        Ok(()) => return,
                        Err(error) if offered => assert_eq!(error.raw_os_error(), Some(95)),
                        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::Unsupported),
                    }
                    how.fast = false;
                }
                client.zero(offset, length, how, *fua).await.unwrap();
            }
            What::Trim { fua } => client.trim(offset, length, *fua).await.unwrap(),
            What::Flush => client.flush().await.unwrap(),
            // Nothing changes, whether the disk can do it or not.
            What::Cache => {
                let can = client.description().flags & SEND_CACHE != 0;
                assert_eq!(client.prefetch(offset, length).await.is_ok(), can);
            }
            What::Status { one } => {
                let extents = if *one {
                    vec![client.status_one(offset, length).await.unwrap()]
                } else {
                    client.status(offset, length).await.unwrap()
                };
                let mut at = 0;
                for extent in extents {
                    let end = (at + usize::try_from(extent.length).unwrap()).min(expected.len());
                    let zero = extent.flags & STATE_ZERO != 0;
                    assert!(!zero || expected[at..end].iter().all(|byte| *byte == 0), "not zero");
                    at = end;
                }
            }
            What::Read { whole } => {
                let data = if *whole {
                    client.read_unfragmented(offset, self.length).await
                } else {
                    client.read(offset, self.length).await
                };
                let data = data.unwrap();
                assert!(data == expected, "{length} bytes at {offset} differ");
            }
        }
    }

    /// What the answered request has made of the range's bytes.
    fn apply(&self, bytes: &mut [u8], trimmed: Trimmed) {
        match &self.what {
            What::Write { data, .. } => bytes.copy_from_slice(data),
            What::Zero { .. } => bytes.fill(0),
            What::Trim { .. } if trimmed == Trimmed::Zeroes => bytes.fill(0),
            What::Trim { .. } | What::Flush | What::Cache | What::Status { .. } | What::Read { .. } => {}
        }
    }
}

/// One client's operations on its half of the disk, up to eight at once, against its own vector.
async fn hammer(client: Client, base: u32, size: u32, trimmed: Trimmed, seed: u64, until: Instant) -> u64 {
    let mut random = Random(seed);
    let mut model = vec![0_u8; size as usize];
    let mut operations = 0;
    while Instant::now() < until {
        let asks: Vec<Ask> = random
            .parts(size)
            .into_iter()
            .map(|(start, size)| {
                let range = random.range(base + start, size);
                Ask::random(&mut random, range)
            })
            .collect();
        let local = |ask: &Ask| (ask.offset - base) as usize..(ask.offset - base + ask.length) as usize;
        let answers = asks.iter().map(|ask| ask.carry_out(&client, &model[local(ask)]));
        futures_util::future::join_all(answers).await;
        for ask in &asks {
            ask.apply(&mut model[local(ask)], trimmed);
        }
        operations += asks.len() as u64;
    }
    operations
}

async fn two_clients(disk: SharedDisk, trimmed: Trimmed) {
    let usual = if std::env::var_os("CI").is_some() { 120 } else { 10 };
    let seconds = std::env::var("BOOTCACHE_MODEL_SECONDS").ok().and_then(|text| text.parse().ok());
    let seconds = seconds.unwrap_or(usual);
    let now = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let seed = std::env::var("BOOTCACHE_MODEL_SEED").map_or_else(|_| now(), |text| text.parse().unwrap());
    // First: a failed assertion in a task tells no seed.
    println!("seed {seed}");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nbd.sock");
    let cancel = serve(disk, &path).await;
    let until = Instant::now() + Duration::from_secs(seconds);
    let mut clients = tokio::task::JoinSet::new();
    for half in 0..2 {
        let style = if half == 1 { Style::Structured } else { Style::Extended };
        let policy = Policy { connections: 1 + usize::from(half == 1), style, ..Policy::default() };
        let client = Client::connect(Address::Unix(path.clone()), "disk", policy).await.unwrap();
        clients.spawn(hammer(client, half * (SIZE / 2), SIZE / 2, trimmed, seed + u64::from(half), until));
    }
    let operations: u64 = clients.join_all().await.iter().sum();
    assert!(operations > 100, "only {operations} operations");
    println!("{operations} operations");
    cancel.cancel();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_clients_on_memory_agree_with_a_vector_of_bytes() {
    two_clients(Arc::new(MemoryDisk::new(SIZE as usize)), Trimmed::Zeroes).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_clients_on_a_file_agree_with_a_vector_of_bytes() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(SIZE.into()).unwrap();
    let punch = fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, SIZE.into());
    let trimmed = if punch.is_ok() { Trimmed::Zeroes } else { Trimmed::Untouched };
    two_clients(Arc::new(FileDisk::new(file, false).unwrap()), trimmed).await;
}

/// Memory that remembers what is durable: what had been written when it was last flushed.
struct Volatile {
    memory: MemoryDisk,
    durable: Mutex<Vec<u8>>,
}

impl Disk for Volatile {
    fn size(&self) -> u64 {
        self.memory.size()
    }

    fn features(&self) -> Features {
        Features { multi_conn: true, ..Features::WRITABLE }
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> BoxFuture<'a, io::Result<()>> {
        self.memory.read(offset, buf)
    }

    fn try_write(&self, offset: u64, data: &[u8]) -> Attempt {
        self.memory.try_write(offset, data)
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8], fua: bool) -> BoxFuture<'a, io::Result<()>> {
        self.memory.write(offset, data, fua)
    }

    fn flush(&self) -> BoxFuture<'_, io::Result<()>> {
        *self.durable.lock().unwrap() = self.memory.to_vec();
        Box::pin(async { Ok(()) })
    }
}

/// What CAN_MULTI_CONN promises.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flush_on_one_connection_covers_what_was_answered_on_another() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nbd.sock");
    let disk = Arc::new(Volatile { memory: MemoryDisk::new(1 << 20), durable: Mutex::default() });
    let cancel = serve(Arc::clone(&disk) as SharedDisk, &path).await;
    let connect = || Client::connect(Address::Unix(path.clone()), "disk", Policy::default());
    let (writer, flusher) = (connect().await.unwrap(), connect().await.unwrap());
    assert!(flusher.description().can_multi_conn());
    for round in 1..100_u8 {
        // Short and long ones are written in different ways.
        let length = if round % 2 == 0 { 4096 } else { 300 << 10 };
        writer.write(0, &vec![round; length], false).await.unwrap();
        flusher.flush().await.unwrap();
        assert!(disk.durable.lock().unwrap()[..length].iter().all(|byte| *byte == round), "round {round}");
    }
    cancel.cancel();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_outlives_a_restart_of_its_server() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nbd.sock");
    let disk: SharedDisk = Arc::new(MemoryDisk::new(1 << 16));
    let first = serve(Arc::clone(&disk), &path).await;
    let policy = Policy { reconnect: Duration::from_secs(10), ..Policy::default() };
    let client = Client::connect(Address::Unix(path.clone()), "disk", policy).await.unwrap();
    client.write(0, b"before", false).await.unwrap();
    first.cancel();
    let waiting = tokio::spawn({
        let client = client.clone();
        async move {
            // The first calls may still meet the old server.
            for _ in 0..20 {
                client.read(0, 6).await.unwrap();
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            client.read(0, 6).await.unwrap()
        }
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    std::fs::remove_file(&path).unwrap();
    let _second = serve(disk, &path).await;
    assert_eq!(waiting.await.unwrap(), b"before");
}
