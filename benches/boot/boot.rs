//! One way, run once: every node fetches what it needs and boots, on the clock, and what that cost.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::drive::Drive;
use super::lab::{Lab, Server};
use super::setting::{Play, Setting};
use super::support::guest::wait_for_boot;
use super::support::process::Process;
use super::support::store::bootcache;

/// A node's part, on the clock: from nothing to a drive that can be read.
pub(crate) type Fetch = Box<dyn Fn(&Lab, usize) -> Drive + Sync>;

/// A way that is ready to start.
pub(crate) struct Prepared {
    pub(crate) servers: Vec<Server>,
    pub(crate) fetch: Fetch,
    /// Bootcache's stores, those of the nodes that boot first: to ask how long reads waited, and to remove.
    pub(crate) stores: Vec<PathBuf>,
}

/// What one run came to, over all nodes. Times are those of the machine's clock, whatever the slow motion.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Boot {
    /// From the start of everything to the guest's report; one for each node.
    pub(crate) seconds: Vec<f64>,
    /// Of them, until there was a drive to boot from; of the slowest node.
    pub(crate) ready_seconds: f64,
    /// In which at least one read of the replayed guest had no answer; the longest of the nodes.
    pub(crate) waiting_ms: Option<f64>,
    /// The same as bootcache counts it, which it does for real guests too: reads of what was not there yet.
    pub(crate) blocked_ms: Option<f64>,
    /// Over the links of all nodes but the origin's, both directions, headers included.
    pub(crate) wire_bytes: u64,
    /// Of them, what came in the background and nobody waited for.
    pub(crate) fill_bytes: u64,
    /// Sent by the origin.
    pub(crate) origin_bytes: u64,
    /// Of the tools, not of the guest: servers at the origin and on the nodes, and fetching when one node fetches.
    pub(crate) cpu_seconds: f64,
    /// Most resident memory of a server on a node; 0 where there is none.
    pub(crate) memory_bytes: u64,
    /// Share of all the machine's processor time that was in use, by anybody: near 1, the processors were the limit.
    pub(crate) busy: f64,
    /// Of that, what the host of this machine gave to others (`steal`): times beside much of it are the host's.
    #[serde(default)]
    pub(crate) stolen: f64,
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
pub(crate) fn run(lab: &Lab, prepared: &Prepared, setting: &Setting) -> Boot {
    lab.warm().expect("a golden store that can be read");
    let nodes: Vec<usize> = (1..=lab.nodes).collect();
    let wire = || nodes.iter().map(|node| lab.net.traffic(*node)).map(|(sent, got)| sent + got).sum::<u64>();
    let before = (wire(), lab.net.traffic(0).0, servers_cpu(prepared), Machine::now());
    let began = Instant::now();
    let booted: Vec<One> = std::thread::scope(|scope| {
        let running: Vec<_> =
            nodes.iter().map(|node| scope.spawn(|| one(lab, *node, prepared, setting, began))).collect();
        let ended: Vec<_> = running.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
        ended.into_iter().map(|node| node.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    });
    let (busy, stolen) = Machine::now().shares_since(&before.3);
    let at_node = prepared.servers.iter().filter(|server| server.host > 0);
    let fetching = if nodes.len() == 1 { booted[0].fetch_cpu } else { Duration::ZERO };
    let wire_bytes = wire() - before.0;
    let told: Vec<Told> =
        prepared.stores.iter().take(nodes.len()).map(|store| Told::by(lab, store)).collect();
    Boot {
        seconds: booted.iter().map(|one| one.seconds).collect(),
        ready_seconds: booted.iter().map(|one| one.ready_seconds).fold(0.0, f64::max),
        waiting_ms: booted.iter().filter_map(|one| one.waiting_ms).reduce(f64::max),
        blocked_ms: told.iter().filter_map(|told| told.blocked_ms).reduce(f64::max),
        wire_bytes,
        fill_bytes: told.iter().map(|told| told.fill_bytes).sum(),
        origin_bytes: lab.net.traffic(0).0 - before.1,
        cpu_seconds: (servers_cpu(prepared) - before.2 + fetching).as_secs_f64(),
        memory_bytes: at_node.map(|server| server.process.memory("VmHWM")).max().unwrap_or(0),
        busy,
        stolen,
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

fn one(lab: &Lab, node: usize, prepared: &Prepared, setting: &Setting, began: Instant) -> One {
    let before = children_cpu();
    let drive = (prepared.fetch)(lab, node);
    let ready_seconds = began.elapsed().as_secs_f64();
    let fetch_cpu = children_cpu().saturating_sub(before);
    match setting.play {
        Play::Guest => {
            let mut guest = Command::new("qemu-system-x86_64");
            guest.args(["-accel", "tcg", "-m", "512", "-smp", "1", "-display", "none", "-monitor", "none"]);
            guest.args(["-nic", "none", "-no-reboot", "-serial", "stdio", "-drive", &drive.for_qemu()]);
            let guest = Process::start(&mut lab.on(node, &guest));
            wait_for_boot(&guest);
            let seconds = began.elapsed().as_secs_f64();
            One { seconds, ready_seconds, waiting_ms: None, wrong_bytes: 0, fetch_cpu }
        }
        Play::Replay => {
            let (uri, server) = drive.for_replay(lab, node);
            let mut replay = Command::new(bootcache());
            replay.args(["--json", "replay", "--speed", &setting.clock_speed().to_string(), "--verify"]);
            replay.arg(&lab.raw).arg("--recording").arg(&lab.recording_path).arg(uri);
            let said = lab.run(node, &replay);
            let seconds = began.elapsed().as_secs_f64();
            let report: serde_json::Value = serde_json::from_str(&said).expect("replay prints JSON");
            let wrong_bytes = report["wrong_bytes"].as_u64().expect("a count");
            let client_cpu = match drive {
                Drive::Qemu { .. } => server.as_ref().map_or(Duration::ZERO, |server| server.process.cpu()),
                _ => Duration::ZERO,
            };
            let fetch_cpu = fetch_cpu + client_cpu;
            One { seconds, ready_seconds, waiting_ms: report["waiting_ms"].as_f64(), wrong_bytes, fetch_cpu }
        }
    }
}

fn servers_cpu(prepared: &Prepared) -> Duration {
    prepared.servers.iter().map(|server| server.process.cpu() + below(server.process.id())).sum()
}

/// Of the processes that a server started, such as the NFS server below the `unshare` that it runs in.
fn below(pid: u32) -> Duration {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let cpu = |child: u32| {
        let stat = std::fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
        let after_name = stat.rsplit(')').next().unwrap_or_default();
        let ticks =
            after_name.split_whitespace().skip(11).take(2).filter_map(|ticks| ticks.parse::<u64>().ok());
        Duration::from_millis(ticks.sum::<u64>() * 10) + below(child)
    };
    children.split_whitespace().filter_map(|child| child.parse().ok()).map(cpu).sum()
}

/// Of this process's children that have ended.
fn children_cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("Linux");
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks: u64 = fields[13..15].iter().map(|ticks| ticks.parse::<u64>().expect("a number")).sum();
    Duration::from_millis(ticks * 10)
}

/// The machine's processor time so far, in ticks.
struct Machine {
    busy: u64,
    stolen: u64,
    all: u64,
}

impl Machine {
    fn now() -> Self {
        let stat = std::fs::read_to_string("/proc/stat").expect("Linux");
        let first = stat.lines().next().unwrap_or_default();
        // user nice system idle iowait irq softirq steal; the two for guests are part of the first.
        let ticks: Vec<u64> =
            first.split_whitespace().skip(1).take(8).filter_map(|ticks| ticks.parse().ok()).collect();
        let all = ticks.iter().sum();
        Self { busy: all - ticks[3] - ticks[4], stolen: ticks[7], all }
    }

    /// Of all the time since: what was in use, and what of that was stolen.
    fn shares_since(&self, before: &Self) -> (f64, f64) {
        let all = (self.all - before.all).max(1) as f64;
        ((self.busy - before.busy) as f64 / all, (self.stolen - before.stolen) as f64 / all)
    }
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
