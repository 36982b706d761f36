//! A block device as a disk, with alignments that it does not take by itself. Wants root and a loop device.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use bootcache_nbd::client::{Address, Client, Policy};
use bootcache_nbd::layers::FileDisk;
use bootcache_nbd::{Disk, Export, Limits, Server, StatusExtent, Tls, ZeroFlags};
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;

const SIZE: u32 = 1 << 20;

/// A loop device over a file, for as long as this lives.
struct Loop(PathBuf);

impl Loop {
    fn over(file: &Path) -> Option<Self> {
        let output = Command::new("losetup").args(["--find", "--show"]).arg(file).output().ok()?;
        let device = PathBuf::from(String::from_utf8(output.stdout).ok()?.trim());
        (output.status.success() && device.exists()).then_some(Self(device))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

/// Once, its status was an error, although it is what kernels and `nbdcopy` ask for first, and so was a trim of half a sector.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_block_device_is_data_and_takes_trims_and_zeroes_of_any_range() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("disk.raw");
    std::fs::write(&file, vec![7; SIZE as usize]).unwrap();
    let Some(device) = Loop::over(&file) else {
        eprintln!("SKIPPED: no loop device can be made here: it takes root, and losetup");
        return;
    };
    let disk = FileDisk::open(&device.0, false).unwrap();
    assert_eq!(disk.size(), u64::from(SIZE));
    let path = dir.path().join("nbd.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let server = Server::new(Arc::new(Export::new("disk", Arc::new(disk))), Limits::default(), Tls::Off);
    let cancel = CancellationToken::new();
    let until = cancel.clone();
    let serving = tokio::spawn(async move { server.serve_unix(listener, until).await });
    let served = async {
        let client = Client::connect(Address::Unix(path), "disk", Policy::default()).await.unwrap();
        let whole = StatusExtent { length: u64::from(SIZE), flags: 0 };
        assert_eq!(client.status(0, u64::from(SIZE)).await.unwrap(), [whole]);
        client.zero(4096 + 100, 1000, ZeroFlags::default(), false).await.unwrap();
        client.zero(16384, 4096, ZeroFlags { no_hole: true, fast: false }, true).await.unwrap();
        client.trim(8192 + 100, 1000, true).await.unwrap();
        let fast = ZeroFlags { fast: true, ..ZeroFlags::default() };
        let slow = client.zero(100, 1000, fast, false).await.unwrap_err();
        assert_eq!(slow.kind(), std::io::ErrorKind::Unsupported);
        let mut expected = vec![7; SIZE as usize];
        expected[4096 + 100..4096 + 1100].fill(0);
        expected[16384..16384 + 4096].fill(0);
        let found = client.read(0, SIZE).await.unwrap();
        assert!(found[..8192] == expected[..8192] && found[12288..] == expected[12288..]);
        client.close().await;
    };
    tokio::time::timeout(Duration::from_secs(60), served).await.expect("it takes too long");
    cancel.cancel();
    tokio::time::timeout(Duration::from_secs(20), serving).await.unwrap().unwrap();
}
