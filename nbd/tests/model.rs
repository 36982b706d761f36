//! Two clients' random operations against a vector of bytes, over a real socket.
//!
//! For `BOOTCACHE_MODEL_SECONDS`: 10 unless set, 120 in CI, and `make soak` takes half an hour.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bootcache_nbd::chunk::Style;
use bootcache_nbd::client::{Address, Client, Policy};
use bootcache_nbd::layers::{FileDisk, MemoryDisk};
use bootcache_nbd::{Export, Limits, Server, SharedDisk, Tls};
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
}

async fn serve(disk: SharedDisk, path: &Path) -> CancellationToken {
    let cancel = CancellationToken::new();
    let listener = UnixListener::bind(path).unwrap();
    let server = Server::new(Arc::new(Export::new("disk", disk)), Limits::default(), Tls::Off);
    let until = cancel.clone();
    tokio::spawn(async move { server.serve_unix(listener, until).await });
    cancel
}

/// One client's operations on its half of the disk, against its own vector.
async fn hammer(client: Client, base: u32, size: u32, seed: u64, until: Instant) -> u64 {
    let mut random = Random(seed);
    let mut model = vec![0_u8; size as usize];
    let mut operations = 0;
    while Instant::now() < until {
        operations += 1;
        let (offset, length) = random.range(base, size);
        let local = (offset - base) as usize..(offset - base + length) as usize;
        match random.below(10) {
            0..=3 => {
                let data: Vec<u8> = (0..length).map(|_| random.next().to_le_bytes()[0]).collect();
                client.write(offset.into(), &data, random.below(20) == 0).await.unwrap();
                model[local].copy_from_slice(&data);
            }
            4 => {
                client.zero(offset.into(), length.into(), random.below(2) == 0).await.unwrap();
                model[local].fill(0);
            }
            5 => client.flush().await.unwrap(),
            6 => {
                let extents = client.status(offset.into(), length.into()).await.unwrap();
                let mut at = (offset - base) as usize;
                for extent in extents {
                    let end = (at + usize::try_from(extent.length).unwrap()).min(model.len());
                    let zero = extent.flags & bootcache_nbd::disk::STATE_ZERO != 0;
                    assert!(!zero || model[at..end].iter().all(|byte| *byte == 0), "seed {seed}: not zero");
                    at = end;
                }
            }
            _ => {
                let data = client.read(offset.into(), length).await.unwrap();
                assert!(data == model[local], "seed {seed}: {length} bytes at {offset} differ");
            }
        }
    }
    operations
}

async fn two_clients(disk: SharedDisk) {
    let usual = if std::env::var_os("CI").is_some() { 120 } else { 10 };
    let seconds = std::env::var("BOOTCACHE_MODEL_SECONDS").ok().and_then(|text| text.parse().ok());
    let seconds = seconds.unwrap_or(usual);
    let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nbd.sock");
    let cancel = serve(disk, &path).await;
    let until = Instant::now() + Duration::from_secs(seconds);
    let mut clients = tokio::task::JoinSet::new();
    for half in 0..2 {
        let style = if half == 1 { Style::Structured } else { Style::Extended };
        let policy = Policy { connections: 1 + usize::from(half == 1), style, ..Policy::default() };
        let client = Client::connect(Address::Unix(path.clone()), "disk", policy).await.unwrap();
        clients.spawn(hammer(client, half * (SIZE / 2), SIZE / 2, seed + u64::from(half), until));
    }
    let operations: u64 = clients.join_all().await.iter().sum();
    assert!(operations > 100, "only {operations} operations");
    println!("{operations} operations, seed {seed}");
    cancel.cancel();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_clients_on_memory_agree_with_a_vector_of_bytes() {
    two_clients(Arc::new(MemoryDisk::new(SIZE as usize))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_clients_on_a_file_agree_with_a_vector_of_bytes() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(SIZE.into()).unwrap();
    two_clients(Arc::new(FileDisk::new(file, false).unwrap())).await;
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
