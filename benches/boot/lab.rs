//! Where it is measured: an origin (host 0) with the golden image, published, nodes (hosts 1 to N) on shaped links, and one
//! more host that does not boot.
//!
//! Every command goes through here, so that it is written down for the results and cannot run for ever.

use std::fs::File;
use std::io;
use std::net::TcpStream;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use bootcache::boot_cache::recording::Recording;
use bootcache::boot_cache::{BootCache, Heads, kept};
use bootcache::store;

use super::golden::golden;
use super::setting::Setting;
use super::support;
use super::support::net::{Net, Rate};
use super::support::process::Process;
use super::support::store::bootcache;

const PEER_PORT: u16 = 4600;
const SERVER_DEADLINE: Duration = Duration::from_secs(30);
/// No command of a way takes longer: a rival that hangs costs a row, not the run.
const COMMAND_DEADLINE_S: &str = "900";

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
    boot_cache: PathBuf,
    /// The recorded boot that is replayed.
    pub(crate) recording: Recording,
    pub(crate) recording_path: PathBuf,
    /// Payload bytes a second of a plain TCP copy over the link.
    pub(crate) goodput: u64,
    folder: tempfile::TempDir,
    count: AtomicU32,
    rate: Rate,
    /// Command lines since they were last taken.
    said: Mutex<Vec<String>>,
}

impl Lab {
    pub(crate) fn new(setting: &Setting) -> Self {
        let (nodes, megabits) = (setting.nodes, setting.clock_megabits());
        let golden = golden(&setting.guest);
        let entry = store::Store::open(&golden)
            .and_then(|store| store.resolve(&"golden".parse().expect("a name")))
            .expect("the golden store has the image");
        let kept = kept::recordings(&entry.dir).expect("a readable store");
        let (_, recording_path) = kept.into_iter().next_back().expect("the image was recorded");
        let (_, recording) = kept::read(&recording_path).expect("a sound recording");
        let cache = BootCache::open(&entry.boot_path(), entry.root).expect("a sound boot cache");
        let rate = Rate::Megabits(megabits);
        let net = Net::new(nodes + 2, rate);
        let second = megabits as usize * 125_000;
        let goodput = net.goodput(0, 1, second);
        Self {
            net,
            nodes,
            raw: entry.disk_path(),
            golden,
            heads: cache.heads().clone(),
            boot_cache: entry.boot_path(),
            recording,
            recording_path,
            goodput: bytes_a_second(goodput),
            folder: tempfile::Builder::new().prefix("bcbench-").tempdir().expect("a temporary folder"),
            count: AtomicU32::new(0),
            rate,
            said: Mutex::default(),
        }
    }

    /// Has what the boot reads in the page cache, on the local disk and at the origin, which serves it all day: the kernel
    /// may have taken it out, and whichever way comes first would be the only one that waits for a disk.
    pub(crate) fn warm(&self) -> io::Result<()> {
        let disk = File::open(&self.raw)?;
        let mut piece = vec![0; 1 << 20];
        for read in &self.recording.reads {
            let (mut at, end) = (read.offset, read.offset + read.length);
            while at < end {
                let length = (end - at).min(piece.len() as u64);
                disk.read_exact_at(&mut piece[..usize::try_from(length).expect("a piece")], at)?;
                at += length;
            }
        }
        io::copy(&mut File::open(&self.boot_cache)?, &mut io::sink())?;
        Ok(())
    }

    /// A path of its own for each call.
    pub(crate) fn fresh(&self, name: &str) -> PathBuf {
        self.folder.path().join(format!("{name}-{}", self.count.fetch_add(1, Ordering::Relaxed)))
    }

    /// Does `work` while no link is shaped: what a user would have done long before.
    pub(crate) fn quickly<T>(&self, work: impl FnOnce() -> T) -> T {
        (0..=self.nodes + 1).for_each(|host| self.net.shape(host, Rate::Unlimited));
        let done = work();
        self.shape_all();
        done
    }

    /// Every link as it should be.
    pub(crate) fn shape_all(&self) {
        (0..=self.nodes + 1).for_each(|host| self.net.shape(host, self.rate));
    }

    /// What a host sends goes at a fraction of its link's rate, until [`Lab::shape_all`]; what it gets does not.
    pub(crate) fn slow_down_sending(&self, host: usize, divisor: u32) {
        let Rate::Megabits(megabits) = self.rate else { return };
        let (namespace, rate) = (self.net.namespace(host), format!("{}kbit", megabits * 1000 / divisor));
        let mut shape = Command::new("/sbin/tc");
        shape.args(["-n", &namespace, "qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", &rate]);
        support::run(shape.args(["burst", "32kb", "latency", "200ms"]));
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

    /// A command that will run on a host, written down.
    pub(crate) fn on(&self, host: usize, command: &Command) -> Command {
        self.write_down(host, command);
        self.net.on(host, command)
    }

    /// Runs a command on a host to its end, and returns what it printed.
    pub(crate) fn run(&self, host: usize, command: &Command) -> String {
        self.write_down(host, command);
        let mut bounded = Command::new("timeout");
        bounded.args(["-k", "5", COMMAND_DEADLINE_S]).arg(command.get_program()).args(command.get_args());
        support::run(&mut self.net.on(host, &bounded))
    }

    /// Starts a server on a host and waits until it listens on a TCP port.
    pub(crate) fn server(&self, host: usize, port: u16, program: &str, arguments: &[&str]) -> Server {
        let process = Process::start(&mut self.on(host, Command::new(program).args(arguments)));
        let address = (self.net.address(host), port).into();
        let began = Instant::now();
        let listens = || TcpStream::connect_timeout(&address, Duration::from_secs(1)).map(drop).is_ok();
        while !self.net.within(host, listens) {
            assert!(began.elapsed() < SERVER_DEADLINE, "{program} does not listen: {}", process.said());
            std::thread::sleep(Duration::from_millis(20));
        }
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
        let process = Process::start(&mut self.on(host, Command::new(program).args(arguments)));
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
        let process = Process::start(&mut self.on(host, &command));
        process.wait_for("ready", SERVER_DEADLINE);
        Server { host, process }
    }

    /// `bootcache --store STORE …` on a host, to its end.
    pub(crate) fn bootcache(&self, host: usize, store: &Path, arguments: &[&str]) -> String {
        let mut command = Command::new(bootcache());
        command.arg("--store").arg(store).args(arguments);
        self.run(host, &command)
    }

    /// The command lines since the last call, each once, for reading: of the origin, the first node and the second
    /// source, with short names for the folders of this run.
    pub(crate) fn take_commands(&self) -> Vec<String> {
        let mut all = std::mem::take(&mut *self.said.lock().expect("nobody panics with it"));
        let mut seen = std::collections::HashSet::new();
        all.retain(|line| seen.insert(line.clone()));
        all
    }

    fn write_down(&self, host: usize, command: &Command) {
        let who = match host {
            0 => "origin",
            1 => "node",
            host if host == self.nodes + 1 => "second",
            _ => return,
        };
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        let line = words.map(|word| quoted(&word.to_string_lossy())).collect::<Vec<_>>().join(" ");
        let short = [
            (self.raw.display().to_string(), "GOLDEN"),
            (self.recording_path.display().to_string(), "RECORDING"),
            (self.golden.display().to_string(), "STORE"),
            (self.folder.path().display().to_string(), "TMP"),
            (bootcache().to_owned(), "bootcache"),
        ];
        let line = short.iter().fold(line, |line, (long, short)| line.replace(long, short));
        let line = format!("{who}$ {line}");
        if !line.ends_with("--json status") {
            self.said.lock().expect("nobody panics with it").push(line);
        }
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

fn quoted(word: &str) -> String {
    if word.contains([' ', ';', '|']) { format!("'{word}'") } else { word.to_owned() }
}
