//! `kill -9` of a node's daemon while an image comes to it: the cache is kept, and no byte is ever wrong.
//!
//! Ten rounds; the full number is `BOOTCACHE_ROUNDS=100`.

#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails with the reason")]

mod nodes;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bootcache::control::{Client, Reply, Request};
use bootcache::serve::CONTROL_SOCKET;
use nodes::{Node, Sample};

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

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_is_killed_keeps_its_cache_and_never_has_a_wrong_byte() {
    let rounds: u64 = std::env::var("BOOTCACHE_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(10);
    let sample = Sample::new(48 << 20, 31);
    let origin = Node::origin(&sample, None).await;
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    let mut daemon = Daemon::start(&store);
    let pull = Request::Pull {
        name: sample.name.clone(),
        root: None,
        sources: vec![origin.address],
        fill: true,
        // Slow enough that it is still coming when the last round is over.
        fill_rate: 20_000_000 / (rounds + 5),
    };
    assert!(matches!(call(&store, &pull).await, Reply::Image { .. }));
    let mut before = 0;
    for round in 0..rounds {
        tokio::time::sleep(Duration::from_millis(100 + round * 137 % 900)).await;
        let (now, _) = present(&store).await;
        assert!(now >= before, "round {round}: {now} bytes are here, {before} were");
        before = now;
        daemon.kill();
        daemon = Daemon::start(&store);
    }
    let faster = Request::Pull {
        name: sample.name.clone(),
        root: None,
        sources: vec![origin.address],
        fill: true,
        fill_rate: 0,
    };
    call(&store, &faster).await;
    let until = Instant::now() + Duration::from_secs(60);
    while !present(&store).await.1 {
        assert!(Instant::now() < until, "the image does not come to an end");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    daemon.kill();
    let store = bootcache::store::Store::open(&store).unwrap();
    let entry = store.resolve(&sample.name).unwrap();
    assert!(entry.is_complete());
    assert!(std::fs::read(entry.disk_path()).unwrap() == sample.disk);
}
