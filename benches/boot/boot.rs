//! One way, run once: every node fetches what it needs and boots, on the clock, and what that cost.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::lab::{Lab, Server};
use super::support::guest::wait_for_boot;
use super::support::process::Process;
use super::support::store::{bootcache, uri};

/// What a node boots from.
pub(crate) enum Drive {
    /// A raw file on the node.
    Raw(PathBuf),
    /// An export on a Unix socket of the node.
    Unix(PathBuf, String),
    /// The empty export name of a server on TCP, port 10809.
    Tcp(String),
    /// QEMU's own words; cannot be replayed.
    Qemu(String),
}

/// Who boots.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Player {
    /// A guest in QEMU.
    Guest,
    /// The recorded boot, with the thinking divided by this.
    Replay(f64),
}

/// A node's part, on the clock: from nothing to a drive that can be read.
pub(crate) type Fetch = Box<dyn Fn(&Lab, usize) -> Drive + Sync>;

/// A way that is ready to start.
pub(crate) struct Prepared {
    pub(crate) servers: Vec<Server>,
    pub(crate) fetch: Fetch,
    /// Bootcache's stores, those of the nodes that boot first: to ask how long reads waited, and to remove.
    pub(crate) stores: Vec<PathBuf>,
}

/// What one run came to, over all nodes.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Boot {
    /// From the start of everything to the guest's report; one for each node.
    pub(crate) seconds: Vec<f64>,
    /// Of them, until there was a drive to boot from; of the slowest node.
    pub(crate) ready_seconds: f64,
    /// In which at least one read of the guest had no answer; the longest of the nodes. None for a real guest on what
    /// does not count it.
    pub(crate) waiting_ms: Option<f64>,
    /// Over the links of all nodes but the origin's, both directions, headers included.
    pub(crate) wire_bytes: u64,
    /// Of them, what came in the background and nobody waited for.
    pub(crate) fill_bytes: u64,
    /// Sent by the origin.
    pub(crate) origin_bytes: u64,
    /// Of the tools, not of the guest: servers at the origin and on the nodes, and fetching when one node fetches.
    pub(crate) cpu_seconds: f64,
    /// Most resident memory of a server on a node.
    pub(crate) memory_bytes: u64,
    /// Read by the replayer and not as in the image; must be 0.
    pub(crate) wrong_bytes: u64,
}

impl Boot {
    /// Of the last node.
    pub(crate) fn last(&self) -> f64 {
        self.seconds.iter().copied().fold(0.0, f64::max)
    }
}

/// Runs it on nodes `1..=nodes`, all at once.
pub(crate) fn run(lab: &Lab, prepared: &Prepared, player: Player) -> Boot {
    let nodes: Vec<usize> = (1..=lab.nodes).collect();
    let wire = || nodes.iter().map(|node| lab.net.traffic(*node)).map(|(sent, got)| sent + got).sum::<u64>();
    let before = (wire(), lab.net.traffic(0).0, servers_cpu(prepared));
    let began = Instant::now();
    let booted: Vec<One> = std::thread::scope(|scope| {
        let running: Vec<_> =
            nodes.iter().map(|node| scope.spawn(|| one(lab, *node, prepared, player, began))).collect();
        running.into_iter().map(|node| node.join().expect("a node that fails has said why")).collect()
    });
    let at_node = prepared.servers.iter().filter(|server| server.host > 0);
    let fetching = if nodes.len() == 1 { booted[0].fetch_cpu } else { Duration::ZERO };
    let wire_bytes = wire() - before.0;
    let told: Vec<Told> =
        prepared.stores.iter().take(nodes.len()).map(|store| Told::by(lab, store)).collect();
    let counted = told.iter().filter_map(|told| told.blocked_ms).reduce(f64::max);
    let replayed = booted.iter().filter_map(|one| one.waiting_ms).reduce(f64::max);
    Boot {
        seconds: booted.iter().map(|one| one.seconds).collect(),
        ready_seconds: booted.iter().map(|one| one.ready_seconds).fold(0.0, f64::max),
        waiting_ms: replayed.or(counted),
        wire_bytes,
        fill_bytes: told.iter().map(|told| told.fill_bytes).sum(),
        origin_bytes: lab.net.traffic(0).0 - before.1,
        cpu_seconds: (servers_cpu(prepared) - before.2 + fetching).as_secs_f64(),
        memory_bytes: at_node.map(|server| server.process.memory("VmHWM")).max().unwrap_or(0),
        wrong_bytes: booted.iter().map(|one| one.wrong_bytes).sum(),
    }
}

struct One {
    seconds: f64,
    ready_seconds: f64,
    waiting_ms: Option<f64>,
    wrong_bytes: u64,
    fetch_cpu: Duration,
}

fn one(lab: &Lab, node: usize, prepared: &Prepared, player: Player, began: Instant) -> One {
    let before = children_cpu();
    let drive = (prepared.fetch)(lab, node);
    let ready_seconds = began.elapsed().as_secs_f64();
    let fetch_cpu = children_cpu().saturating_sub(before);
    match player {
        Player::Guest => {
            let mut guest = Command::new("qemu-system-x86_64");
            guest.args(["-accel", "tcg", "-m", "512", "-smp", "1", "-display", "none", "-monitor", "none"]);
            guest.args(["-nic", "none", "-no-reboot", "-serial", "stdio", "-drive", &drive.for_qemu()]);
            let guest = Process::start(&mut lab.net.on(node, &guest));
            wait_for_boot(&guest);
            let seconds = began.elapsed().as_secs_f64();
            One { seconds, ready_seconds, waiting_ms: None, wrong_bytes: 0, fetch_cpu }
        }
        Player::Replay(speed) => {
            // A file is read through a server too: a local boot by the replayer is one from nbdkit on the node.
            let (uri, _server) = drive.for_replay(lab, node);
            let mut replay = Command::new(bootcache());
            replay.args(["--json", "replay", "--speed", &speed.to_string(), "--verify"]).arg(&lab.raw);
            replay.arg("--recording").arg(&lab.recording_path).arg(uri);
            let said = super::support::run(&mut lab.net.on(node, &replay));
            let seconds = began.elapsed().as_secs_f64();
            let report: serde_json::Value = serde_json::from_str(&said).expect("replay prints JSON");
            let wrong_bytes = report["wrong_bytes"].as_u64().expect("a count");
            One { seconds, ready_seconds, waiting_ms: report["waiting_ms"].as_f64(), wrong_bytes, fetch_cpu }
        }
    }
}

impl Drive {
    fn for_qemu(&self) -> String {
        let nbd = "if=virtio,driver=raw,snapshot=on,file.driver=nbd";
        match self {
            Self::Raw(path) => format!("if=virtio,file={},format=raw", path.display()),
            Self::Unix(socket, export) if export.is_empty() => {
                format!("{nbd},file.server.type=unix,file.server.path={}", socket.display())
            }
            Self::Unix(socket, export) => {
                format!("if=virtio,{}", super::support::guest::nbd_drive(socket, export))
            }
            Self::Tcp(host) => {
                format!("{nbd},file.server.type=inet,file.server.host={host},file.server.port=10809")
            }
            Self::Qemu(words) => format!("if=virtio,{words}"),
        }
    }

    fn for_replay(&self, lab: &Lab, node: usize) -> (String, Option<Server>) {
        match self {
            Self::Raw(path) => {
                let socket = lab.fresh("raw.sock");
                let (at, file) =
                    (socket.to_str().expect("our own path"), path.to_str().expect("our own path"));
                let server =
                    lab.socket_server(node, &socket, "nbdkit", &["-f", "-r", "-U", at, "file", file]);
                (uri(&socket, ""), Some(server))
            }
            Self::Unix(socket, export) => (uri(socket, export), None),
            Self::Tcp(host) => (format!("nbd://{host}:10809/"), None),
            Self::Qemu(words) => panic!("only QEMU understands {words}"),
        }
    }
}

fn servers_cpu(prepared: &Prepared) -> Duration {
    prepared.servers.iter().map(|server| server.process.cpu()).sum()
}

/// Of this process's children that have ended.
fn children_cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("Linux");
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks: u64 = fields[13..15].iter().map(|ticks| ticks.parse::<u64>().expect("a number")).sum();
    Duration::from_millis(ticks * 10)
}

/// What a node's daemon says at the end.
struct Told {
    /// In which at least one read of a VM waited for what was not there.
    blocked_ms: Option<f64>,
    fill_bytes: u64,
}

impl Told {
    fn by(lab: &Lab, store: &Path) -> Self {
        let status = lab.bootcache(1, store, &["--json", "status"]);
        let status: serde_json::Value = serde_json::from_str(&status).expect("JSON from bootcache status");
        let list = |name: &str| status[name].as_array().cloned().unwrap_or_default();
        let blocked =
            list("overlays").iter().filter_map(|vm| vm["waits"]["blocked_ms"].as_f64()).reduce(f64::max);
        let fill = list("images").iter().filter_map(|image| image["transfer"]["bytes"][2].as_u64()).sum();
        Self { blocked_ms: blocked, fill_bytes: fill }
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        self.servers.clear(); // before their stores go
        for store in &self.stores {
            let _what_is_left_goes_with_the_folder = std::fs::remove_dir_all(store);
        }
    }
}
