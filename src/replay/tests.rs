//! Replays against this project's own server.

use std::io::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use bootcache_nbd::client::{Address, Policy};
use bootcache_nbd::{BoxFuture, Disk, Export, Features, Limits, Server, Tls};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

use super::*;

/// A disk that is slow, and remembers how many reads it had at once.
struct SlowDisk {
    data: Vec<u8>,
    delay: Duration,
    at_once: AtomicUsize,
    /// At the arrival of each read, itself included, in the order of their arrival.
    seen: Mutex<Vec<usize>>,
}

impl Disk for SlowDisk {
    fn size(&self) -> u64 {
        self.data.len() as u64
    }

    fn features(&self) -> Features {
        Features::READ_ONLY
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async move {
            let at_once = self.at_once.fetch_add(1, Ordering::SeqCst) + 1;
            self.seen.lock().unwrap().push(at_once);
            tokio::time::sleep(self.delay).await;
            self.at_once.fetch_sub(1, Ordering::SeqCst);
            let start = usize::try_from(offset).unwrap();
            buf.copy_from_slice(&self.data[start..start + buf.len()]);
            Ok(())
        })
    }
}

fn data() -> Vec<u8> {
    (0..1_u32 << 20).map(|at| (at / 13 % 251).to_le_bytes()[0]).collect()
}

fn image(data: &[u8]) -> Arc<File> {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(data).unwrap();
    Arc::new(file)
}

struct Served {
    runtime: Runtime,
    client: Client,
    disk: Arc<SlowDisk>,
    _dir: tempfile::TempDir,
}

fn serve(delay: Duration) -> Served {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nbd.sock");
    let disk =
        Arc::new(SlowDisk { data: data(), delay, at_once: AtomicUsize::new(0), seen: Mutex::default() });
    let export = Export::new("disk", disk.clone());
    let server = Server::new(Arc::new(export), Limits::default(), Tls::Off);
    let client = runtime.block_on(async {
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        tokio::spawn(async move { server.serve_unix(listener, CancellationToken::new()).await });
        Client::connect(Address::Unix(path.clone()), "disk", Policy::default()).await.unwrap()
    });
    Served { runtime, client, disk, _dir: dir }
}

/// Times in ms: asked for, and the time that the answer took.
fn recording(reads: &[(u64, u64, u64)], end_ms: u64) -> Recording {
    let read = |&(offset, time_ms, took_ms): &(u64, u64, u64)| Read {
        offset,
        length: 4096,
        time_ns: time_ms * 1_000_000,
        took_ns: took_ms * 1_000_000,
    };
    Recording::new(reads.iter().map(read).collect(), end_ms * 1_000_000)
}

fn play(served: &Served, recording: &Recording, speed: f64, image: Arc<File>) -> Result<Report, ReplayError> {
    let options = Options { speed, image: Some(image) };
    replay(served.runtime.handle(), &served.client, recording, &options)
}

#[test]
fn waits_for_each_answer_and_then_thinks_as_long_as_the_guest_did() {
    let served = serve(Duration::from_millis(30));
    // Three reads one after another, 10 ms of thought between: 3 · 30 + 2 · 10 + 10 before and after.
    let boot = recording(&[(0, 10, 1), (4096, 21, 1), (8192, 32, 1)], 43);
    let report = play(&served, &boot, 1.0, image(&data())).unwrap();
    assert_eq!((report.reads, report.wrong_bytes, report.local_ms), (3, 0, 43.0));
    assert!(report.took_ms >= 130.0 && report.waiting_ms >= 90.0, "{report:?}");
    let quick = play(&served, &boot, 10.0, image(&data())).unwrap();
    assert!(quick.took_ms >= 94.0 && quick.local_ms == 4.3, "{quick:?}");
    assert_eq!(*served.disk.seen.lock().unwrap(), [1; 6], "never two at once");
}

#[test]
fn reads_that_overlapped_overlap_again() {
    let served = serve(Duration::from_millis(500));
    let boot = recording(&[(0, 0, 5), (4096, 1, 5), (8192, 2, 5), (0, 20, 5)], 30);
    let report = play(&served, &boot, 1.0, image(&data())).unwrap();
    assert!(report.waiting_ms >= 1000.0, "{report:?}");
    assert_eq!(*served.disk.seen.lock().unwrap(), [1, 2, 3, 1], "the fourth waits for the others");
}

#[test]
fn a_byte_that_differs_is_counted() {
    let served = serve(Duration::ZERO);
    let mut other = data();
    other[5000] ^= 1;
    other[5002] ^= 1;
    let boot = recording(&[(0, 0, 1), (4096, 2, 1)], 5);
    assert_eq!(play(&served, &boot, 1.0, image(&other)).unwrap().wrong_bytes, 2);
}

#[test]
fn an_export_that_is_too_small_is_refused_before_anything_is_read() {
    let served = serve(Duration::ZERO);
    let boot = recording(&[(0, 0, 1), (1 << 20, 2, 1)], 5);
    let refused = play(&served, &boot, 1.0, image(&data()));
    assert!(matches!(refused, Err(ReplayError::TooSmall { .. })));
    assert!(served.disk.seen.lock().unwrap().is_empty());
}

#[test]
fn what_the_guest_read_after_its_boot_is_not_played() {
    let served = serve(Duration::ZERO);
    let boot = recording(&[(0, 0, 1), (4096, 50, 1)], 5);
    assert_eq!(play(&served, &boot, 1.0, image(&data())).unwrap().reads, 1);
}
