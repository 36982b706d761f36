//! `kill -9` of a node's daemon, and of the origin, while an image comes: the cache is kept, reads go on, and no byte is
//! ever wrong.
//!
//! Ten rounds of the one and three of the other; the full numbers are `BOOTCACHE_ROUNDS=100` (`make soak-transfer`).

#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails with the reason")]

mod nodes;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bootcache::choose::{Weights, by_name};
use bootcache::control::{Client, Reply, Request};
use bootcache::serve::{CONTROL_SOCKET, NBD_SOCKET};
use bootcache::transfer::Options;
use bootcache_nbd::client::{Address, Client as NbdClient, Policy};
use nodes::{Node, Sample, SlowLink};

/// A daemon that dies with the test.
struct Daemon(Child);

impl Daemon {
    fn start(store: &Path) -> Self {
        let child = Command::new(env!("CARGO_BIN_EXE_bootcache"))
            .arg("--store")
            .arg(store)
            .arg("serve")
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self(child)
    }

    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn call(store: &Path, request: &Request) -> Reply {
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        if let Ok(mut client) = Client::connect(&store.join(CONTROL_SOCKET)).await
            && let Ok(reply) = client.call(request).await
        {
            return reply;
        }
        assert!(Instant::now() < until, "the daemon does not answer");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Bytes of the image that are here, and whether that is all.
async fn present(store: &Path) -> (u64, bool) {
    let Reply::Status(status) = call(store, &Request::Status).await else { panic!("another answer") };
    let image = status.images.first().unwrap();
    match &image.transfer {
        Some(transfer) => (transfer.present, image.present == image.allocated),
        None => (image.size, image.present == image.allocated),
    }
}

fn rounds() -> u64 {
    std::env::var("BOOTCACHE_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(10)
}

/// Reads here and there through the daemon's socket for ever, over its deaths, and checks every byte.
async fn read_on(socket: PathBuf, sample: Arc<Sample>, reads: Arc<AtomicU64>) {
    let policy = Policy { reconnect: Duration::from_secs(60), ..Policy::default() };
    let client = NbdClient::connect(Address::Unix(socket), sample.name.as_str(), policy).await.unwrap();
    let mut seed = 7_u64;
    loop {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let offset = (seed >> 20) % (sample.disk.len() as u64 - 20_000);
        let bytes = client.read(offset, 20_000).await.unwrap();
        assert!(bytes == sample.bytes(offset, 20_000), "wrong bytes in {offset}+20000");
        reads.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_is_killed_keeps_its_cache_and_never_has_a_wrong_byte() {
    let rounds = rounds();
    let sample = Arc::new(Sample::new(48 << 20, 31));
    let origin = Node::origin(&sample, None).await;
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    let mut daemon = Daemon::start(&store);
    let pull = Request::Pull {
        name: sample.name.clone(),
        root: None,
        boot: bootcache::transfer::Pin::Any,
        sources: vec![origin.address],
        fill: true,
        // Slow enough that it is still coming when the last round is over.
        fill_rate: 20_000_000 / (rounds + 5),
    };
    assert!(matches!(call(&store, &pull).await, Reply::Image { .. }));
    let reads = Arc::new(AtomicU64::new(0));
    let guest = tokio::spawn(read_on(store.join(NBD_SOCKET), Arc::clone(&sample), Arc::clone(&reads)));
    let mut before = 0;
    for round in 0..rounds {
        tokio::time::sleep(Duration::from_millis(100 + round * 137 % 900)).await;
        let (now, _) = present(&store).await;
        assert!(now >= before, "round {round}: {now} bytes are here, {before} were");
        before = now;
        daemon.kill();
        daemon = Daemon::start(&store);
        assert!(!guest.is_finished(), "round {round}: {:?}", guest.await);
    }
    let read = reads.load(Ordering::Relaxed);
    eprintln!("{rounds} kills, {read} reads, all right");
    assert!(read > rounds, "only {read} reads in {rounds} rounds");
    let faster = Request::Pull {
        name: sample.name.clone(),
        root: None,
        boot: bootcache::transfer::Pin::Any,
        sources: vec![origin.address],
        fill: true,
        fill_rate: u64::MAX,
    };
    call(&store, &faster).await;
    let until = Instant::now() + Duration::from_secs(180);
    while !present(&store).await.1 {
        assert!(Instant::now() < until, "the image does not come to an end");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(!guest.is_finished(), "{:?}", guest.await);
    guest.abort();
    daemon.kill();
    let store = bootcache::store::Store::open(&store).unwrap();
    let entry = store.resolve(&sample.name).unwrap();
    assert!(entry.is_complete());
    assert!(std::fs::read(entry.disk_path()).unwrap() == sample.disk);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_boot_goes_on_when_the_origin_dies_in_it_and_a_peer_has_a_part() {
    let sample = Sample::new(24 << 20, 37);
    for round in 0..rounds().div_ceil(10) * 3 {
        let percent = [20, 50, 80][usize::try_from(round % 3).unwrap()];
        let mut origin = Node::origin(&sample, None).await;
        // The peer has the boot set, and nothing of the rest.
        let peer = Node::empty(None).await;
        let hidden = |options: &mut Options| (options.fill, options.listen) = (false, None);
        let peer_engine = peer.pull(&[origin.address], hidden).await;
        peer_engine.boot_complete().await;
        // The boot set takes seconds: its death is noticed in time.
        let link = SlowLink::new(origin.address, 512 << 10).await;
        let slow_peer = SlowLink::new(peer.address, 512 << 10).await;
        let node = Node::empty(None).await;
        let engine = node
            .pull(&[link.address], |options| {
                hidden(options);
                // The origin as long as it is there, so that its death is felt.
                options.chooser = Arc::from(by_name("origin-only", &Weights::default()).unwrap());
            })
            .await;
        let disk = engine.disk();
        let boot = async {
            for block in &sample.boot_blocks {
                let mut bytes = vec![0; 4096];
                disk.read(block * 4096, &mut bytes).await.unwrap();
                assert!(bytes == sample.bytes(block * 4096, 4096), "wrong bytes in block {block}");
            }
        };
        let death = async {
            let mut alone = true;
            loop {
                let progress = engine.progress();
                // The peer comes later, or the whole stream may be its own.
                if alone && progress.frames > 0 {
                    engine.add_source(slow_peer.address);
                    alone = false;
                }
                if progress.frames_total > 0 && progress.frames * 100 >= progress.frames_total * percent {
                    break progress;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let boot = async { tokio::time::timeout(Duration::from_secs(60), boot).await };
        let death = async {
            let at = death.await;
            link.kill();
            origin.stop_serving().await;
            at
        };
        let (booted, at) = tokio::join!(boot, death);
        assert!(booted.is_ok(), "round {round}: the boot did not end, {:?}", engine.progress());
        assert!(at.frames < at.frames_total, "the origin died too late: {at:?}");
        let bytes: Vec<u64> = engine.progress().sources.iter().map(|source| source.bytes).collect();
        assert!(bytes.iter().all(|bytes| *bytes > 50_000), "{bytes:?}");
        engine.stop().await;
    }
}
