//! Where it is measured: an origin (host 0) with the golden image, published, nodes (hosts 1 to N) on shaped links, and one
//! more host that does not boot.
//!
//! The golden store is made once for each guest and kept below the cache folder, because recording takes a boot.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use bootcache::boot_cache::recording::Recording;
use bootcache::boot_cache::{BootCache, Heads, kept};
use bootcache::store;

use super::support;
use super::support::net::{Net, Rate};
use super::support::process::Process;
use super::support::store::bootcache;

const PEER_PORT: u16 = 4600;
const SERVER_DEADLINE: Duration = Duration::from_secs(20);

/// A server of the way that is measured, on one of the hosts.
pub(crate) struct Server {
    pub(crate) host: usize,
    pub(crate) process: Process,
}

/// The hosts, and the golden image in the forms that the ways start from.
pub(crate) struct Lab {
    pub(crate) net: Net,
    pub(crate) nodes: usize,
    /// The golden raw disk.
    pub(crate) raw: PathBuf,
    /// The golden disk, as the origin's store has it.
    pub(crate) golden: PathBuf,
    pub(crate) heads: Heads,
    /// The recorded boot that is replayed.
    pub(crate) recording: Recording,
    pub(crate) recording_path: PathBuf,
    /// Payload bytes a second of a plain TCP copy over the link.
    pub(crate) goodput: u64,
    folder: tempfile::TempDir,
    count: AtomicU32,
    rate: Rate,
}

impl Lab {
    /// `guest` is one of `scripts/guest`, or the path of a store that has the image `golden`, recorded.
    pub(crate) fn new(guest: &str, nodes: usize, megabits: u32) -> Self {
        let golden = if guest.contains('/') { PathBuf::from(guest) } else { golden(guest) };
        let entry = store::Store::open(&golden)
            .and_then(|store| store.resolve(&"golden".parse().expect("a name")))
            .expect("the golden store has the image");
        let kept = kept::recordings(&entry.dir).expect("a readable store");
        let (_, recording_path) = kept.into_iter().next_back().expect("the image was recorded");
        let (_, recording) = kept::read(&recording_path).expect("a sound recording");
        let cache = BootCache::open(&entry.boot_path(), entry.root).expect("a sound boot cache");
        let rate = Rate::Megabits(megabits);
        let net = Net::new(nodes + 2, rate);
        let goodput = net.goodput(0, 1, if megabits > 300 { 64 << 20 } else { 8 << 20 });
        Self {
            net,
            nodes,
            raw: entry.disk_path(),
            golden,
            heads: cache.heads().clone(),
            recording,
            recording_path,
            goodput: bytes_a_second(goodput),
            folder: tempfile::Builder::new().prefix("bcbench-").tempdir().expect("a temporary folder"),
            count: AtomicU32::new(0),
            rate,
        }
    }

    /// A path of its own for each call.
    pub(crate) fn fresh(&self, name: &str) -> PathBuf {
        self.folder.path().join(format!("{name}-{}", self.count.fetch_add(1, Ordering::Relaxed)))
    }

    /// Does `work` while no link is shaped: what a user would have done long before.
    pub(crate) fn quickly<T>(&self, work: impl FnOnce() -> T) -> T {
        let shape = |rate| (0..=self.nodes + 1).for_each(|host| self.net.shape(host, rate));
        shape(Rate::Unlimited);
        let done = work();
        shape(self.rate);
        done
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn origin(&self) -> String {
        self.net.address(0).to_string()
    }

    /// Where a node, or the origin, answers its peers.
    pub(crate) fn peer(&self, host: usize) -> String {
        format!("{}:{PEER_PORT}", self.net.address(host))
    }

    /// Starts a server on a host and gives it a moment to listen.
    pub(crate) fn server(&self, host: usize, program: &str, arguments: &[&str]) -> Server {
        let process = Process::start(&mut self.net.on(host, Command::new(program).args(arguments)));
        std::thread::sleep(Duration::from_millis(300));
        Server { host, process }
    }

    /// Starts a server that makes a Unix socket, and waits for that.
    pub(crate) fn socket_server(
        &self,
        host: usize,
        socket: &Path,
        program: &str,
        arguments: &[&str],
    ) -> Server {
        let process = Process::start(&mut self.net.on(host, Command::new(program).args(arguments)));
        let began = Instant::now();
        while !socket.exists() {
            assert!(began.elapsed() < SERVER_DEADLINE, "{program} does not listen: {}", process.said());
            std::thread::sleep(Duration::from_millis(5));
        }
        Server { host, process }
    }

    /// `bootcache serve` of a store on a host; others can fetch from it if `relays`.
    pub(crate) fn daemon(&self, host: usize, store: &Path, relays: bool) -> Server {
        let mut command = Command::new(bootcache());
        command.arg("--store").arg(store).args(["serve", "--plain", "--node-name", &format!("node-{host}")]);
        if relays {
            command.args(["--peer-listen", &self.peer(host)]);
        }
        let process = Process::start(&mut self.net.on(host, &command));
        process.wait_for("ready", SERVER_DEADLINE);
        Server { host, process }
    }

    /// `bootcache --store STORE …` on a host, to its end.
    pub(crate) fn bootcache(&self, host: usize, store: &Path, arguments: &[&str]) -> String {
        let mut command = Command::new(bootcache());
        command.arg("--store").arg(store).args(arguments);
        support::run(&mut self.net.on(host, &command))
    }

    /// The recorded boot's own time, in ms, with the thinking divided by `speed`.
    pub(crate) fn local_ms(&self, speed: f64) -> f64 {
        self.recording.end_ns as f64 / 1e6 / speed
    }

    /// How long a boot must wait at least on this link, in ms: the compressed stream in order, from the first moment,
    /// at the goodput of a plain TCP copy.
    pub(crate) fn bound_ms(&self, speed: f64) -> f64 {
        let late = self.heads.frames().iter().map(|frame| {
            let sent = frame.offset + u64::from(frame.length);
            sent as f64 * 1000.0 / self.goodput as f64 - f64::from(frame.due_ms) / speed
        });
        late.fold(0.0, f64::max)
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate of a link")]
fn bytes_a_second(megabits: f64) -> u64 {
    (megabits * 125_000.0) as u64
}

/// A store with the guest imported and its boot recorded; made on first use.
fn golden(guest: &str) -> PathBuf {
    let raw = support::guest::disk(guest);
    let name = raw.file_stem().expect("it has a name");
    let cache = raw.parent().and_then(Path::parent).expect("it is in the cache folder").join("bench");
    let dir = cache.join(name);
    if dir.join("store").is_dir() {
        return dir.join("store");
    }
    eprintln!("importing {guest} and recording its boot (kept in {})", dir.display());
    let making = cache.join(format!("{}.{}", name.display(), std::process::id()));
    std::fs::create_dir_all(&making).expect("the cache folder is writable");
    let store = making.join("store");
    let run = |arguments: &[&std::ffi::OsStr]| {
        support::run(Command::new(bootcache()).arg("--store").arg(&store).args(arguments));
    };
    run(&["image".as_ref(), "add".as_ref(), "golden".as_ref(), raw.as_os_str()]);
    run(&["record", "golden", "--until", "serial:BOOTED-OK", "--memory", "512"].map(AsRef::as_ref));
    std::fs::rename(&making, &dir).expect("a rename within the cache folder");
    dir.join("store")
}
