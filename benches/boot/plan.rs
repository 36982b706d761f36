//! All that `make bench-boot` measures, the most telling first, and how long that takes.

use std::collections::HashSet;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use super::measure;
use super::results::Results;
use super::setting::{Play, Setting};
use super::ways::{self, BOOTCACHE, LOCAL, Moves, Way};

/// A part of the plan: so many rounds of these ways.
pub(crate) struct Step {
    pub(crate) setting: Setting,
    pub(crate) ways: Vec<(&'static Way, usize)>,
}

impl Step {
    fn new(setting: Setting, rounds: usize, names: &[&str]) -> Self {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let ways = ways::chosen(&names, setting.nodes);
        let rounds_of = |way: &Way| match way.moves {
            // Copying first takes longest and varies least.
            Moves::Disk | Moves::DiskCompressed => rounds.div_ceil(3),
            // By the replayer it is the same for any number of nodes.
            Moves::Nothing if way.name == LOCAL && setting.slow > 1 => 1,
            _ => rounds,
        };
        Self { ways: ways.iter().map(|way| (*way, rounds_of(way))).collect(), setting }
    }

    /// With the same settings, for `--table`.
    pub(crate) fn asked(setting: Setting, rounds: usize, names: &[String]) -> Self {
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        Self::new(setting, rounds, &names)
    }

    /// Seconds that what is missing of it will take; steps before it have measured what is `planned`.
    fn seconds_left(&self, folder: &Path, planned: &mut HashSet<(String, &'static str, usize)>) -> f64 {
        let mut results = Results::open(folder, &self.setting);
        if results.head.as_ref().is_some_and(|head| head.build != measure::build()) {
            results.records.clear();
        }
        let key = self.setting.key();
        let mut left = measure::missing(&results, &self.ways);
        left.retain(|(way, round)| planned.insert((key.clone(), way.name, *round)));
        let lab = if left.is_empty() { 0.0 } else { 3.0 + self.setting.nodes as f64 * 0.15 };
        lab + left.iter().map(|(way, _)| self.guess(way, &results)).sum::<f64>()
    }

    /// Seconds of one boot: as long as the last, or by what it moves.
    fn guess(&self, way: &Way, results: &Results) -> f64 {
        if let Some(last) = results.of(way.name).last() {
            return last.all_seconds;
        }
        let (local, stream, read, disk) = known(&self.setting.guest);
        let nodes = self.setting.nodes as f64;
        let megabytes = match way.moves {
            Moves::Nothing => 0.0,
            Moves::Stream => stream,
            Moves::StreamEach => stream * nodes,
            Moves::ReadsEach => read * nodes,
            Moves::Disk => disk,
            Moves::DiskCompressed => disk / 3.0,
        };
        let moving = megabytes / (f64::from(self.setting.clock_megabits()) / 8.0 * 0.94);
        let crowd = if self.setting.play == Play::Guest { (nodes / 2.0).max(1.0) } else { 1.0 };
        2.0 + nodes * 0.3 + local * crowd / self.setting.clock_speed() + moving
    }
}

/// Seconds of a local boot under TCG, MB of its stream, of its reads, and of the disk's data; roughly.
fn known(guest: &str) -> (f64, f64, f64, f64) {
    match guest {
        "fast" => (5.5, 16.0, 32.0, 391.0),
        "windows-like" => (12.0, 134.0, 200.0, 400.0),
        _ => (20.0, 40.0, 74.0, 420.0),
    }
}

/// The whole run: first a little of everything, then more rounds of it.
pub(crate) fn all() -> Vec<Step> {
    let one = |guest: &str, rate, play, rounds, names: &[&str]| {
        Step::new(Setting::new(guest, rate, 1, play), rounds, names)
    };
    let several =
        |nodes, rate, rounds, names: &[&str]| Step::new(several_at_once(nodes, rate), rounds, names);
    let quick_processor = |guest: &str, rate, rounds, names: &[&str]| {
        let setting = Setting { speed: 4.0, ..Setting::new(guest, rate, 1, Play::Replay) };
        Step::new(setting, rounds, names)
    };
    let guests = |nodes, rounds, names: &[&str]| {
        Step::new(Setting::new("fast", 100, nodes, Play::Guest), rounds, names)
    };
    let at_once = [BOOTCACHE, RELAY_OFF, "qemu-nbd"];
    vec![
        // One node, every way: the thesis' tables 4-5 and 4-6.
        one("fast", 100, Play::Replay, 3, &[]),
        one("fast", 100, Play::Guest, 3, &[]),
        // Many nodes at once, table 4-8, and what the simulator is held against.
        several(1, 100, 3, &at_once),
        several(3, 100, 3, &[BOOTCACHE, RELAY_OFF, "qemu-nbd", ways::SLOW_NODE]),
        several(16, 100, 2, &[BOOTCACHE, RELAY_OFF, ways::SLOW_NODE]),
        one("fast", 1000, Play::Replay, 3, &[]),
        several(4, 100, 1, &at_once),
        several(32, 100, 1, &[BOOTCACHE, RELAY_OFF]),
        several(16, 100, 1, &["qemu-nbd"]),
        quick_processor("fast", 1000, 3, &[]),
        one("stock", 100, Play::Replay, 1, &[]),
        one("windows-like", 100, Play::Replay, 1, &MAIN),
        one("windows-like", 1000, Play::Replay, 1, &MAIN),
        one(OTHER_RELEASE, 100, Play::Replay, 1, &MAIN),
        guests(3, 2, &at_once),
        several(1, 1000, 2, &at_once),
        several(3, 1000, 2, &at_once),
        several(4, 1000, 1, &at_once),
        several(16, 1000, 1, &at_once),
        several(32, 1000, 1, &at_once),
        one("stock", 100, Play::Guest, 1, &MAIN),
        one(OTHER_RELEASE, 100, Play::Guest, 1, &MAIN),
        one("fast", 1000, Play::Guest, 2, &MAIN),
        quick_processor("fast", 100, 2, &MAIN),
        // Ten alternating pairs of real guests, local against present blocks.
        guests(1, 10, &[ways::HAS_IMAGE]),
        // More rounds.
        one("fast", 100, Play::Replay, 5, &[]),
        one("fast", 1000, Play::Replay, 5, &[]),
        one("fast", 100, Play::Guest, 5, &[]),
        several(4, 100, 3, &at_once),
        several(16, 100, 3, &[BOOTCACHE, RELAY_OFF, ways::SLOW_NODE]),
        several(16, 1000, 3, &at_once),
        several(32, 100, 2, &[BOOTCACHE]),
        several(32, 1000, 2, &at_once),
        several(32, 100, 1, &["qemu-nbd"]),
        one("stock", 100, Play::Replay, 3, &[]),
        one("stock", 100, Play::Guest, 3, &MAIN),
        one(OTHER_RELEASE, 100, Play::Guest, 3, &MAIN),
        one("windows-like", 100, Play::Replay, 3, &MAIN),
        quick_processor("stock", 1000, 2, &MAIN),
    ]
}

/// One of each kind.
const MAIN: [&str; 10] = [
    ways::HAS_IMAGE,
    BOOTCACHE,
    "bootcache, booted once",
    "qemu-nbd",
    "nbdkit on node",
    "nbdkit cow-on-read",
    "qcow2 copy-on-read",
    "NFS",
    "copy: zstd over HTTP",
    "copy: nbdcopy",
];
const RELAY_OFF: &str = "bootcache, relay off";

/// Replayed boots at once, in slow motion.
pub(crate) fn several_at_once(nodes: usize, rate: u32) -> Setting {
    Setting { slow: SLOW, ..Setting::new("fast", rate, nodes, Play::Replay) }
}

/// Results in the order of the plan, those of other tables last.
pub(crate) fn in_order(all: &[Results]) -> Vec<&Results> {
    let places: Vec<String> = self::all().iter().map(|step| step.setting.key()).collect();
    let place = |results: &&Results| {
        let key = results.head.as_ref().map(|head| head.setting.key());
        places.iter().position(|place| Some(place) == key.as_ref()).unwrap_or(places.len())
    };
    let mut sorted: Vec<&Results> = all.iter().collect();
    sorted.sort_by_key(place);
    sorted
}

/// Slow motion of boots at once: a machine with two processors plays 33 hosts.
const SLOW: u32 = 4;
/// A Debian of another release than the others'.
const OTHER_RELEASE: &str = "stock-trixie";

/// Says what is left and how long it takes.
pub(crate) fn announce(steps: &[Step], folder: &Path) {
    let (mut sum, mut planned) = (0.0, HashSet::new());
    for step in steps {
        let seconds = step.seconds_left(folder, &mut planned);
        sum += seconds;
        if seconds > 0.0 {
            let rounds = step.ways.iter().map(|(_, rounds)| *rounds).max().unwrap_or(0);
            let what = format!("{} ways, {rounds} rounds", step.ways.len());
            println!("{:>4.0} min {:>4.0}  {}: {what}", seconds / 60.0, sum / 60.0, step.setting.title());
        }
    }
    println!("{:>4.0} min left in all", (sum / 60.0).ceil());
}

/// Measures what is missing, for at most `limit`; what cannot be written down is said and passed over.
pub(crate) fn run(steps: &[Step], folder: &Path, limit: Option<Duration>, shown: impl Fn(&Results)) {
    let until = limit.map(|limit| Instant::now() + limit);
    for step in steps {
        let minutes = step.seconds_left(folder, &mut HashSet::new()) / 60.0;
        if minutes > 0.0 {
            eprintln!("\n{}: about {minutes:.1} min", step.setting.title());
        }
        let complete = || measure::complete(folder, &step.setting, &step.ways, until);
        let outcome = catch_unwind(AssertUnwindSafe(complete));
        match outcome.unwrap_or_else(|_| Err(io::Error::other("the lab could not be built"))) {
            Ok(true) if minutes > 0.0 => shown(&Results::open(folder, &step.setting)),
            Ok(true) => {}
            Ok(false) => {
                eprintln!("the time is over; the same command goes on from here");
                return;
            }
            Err(error) => eprintln!("{}: {error}", step.setting.title()),
        }
    }
}
