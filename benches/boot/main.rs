//! A boot every way, in turn and again: seconds to the guest's report, and what they cost.
//!
//! `cargo bench --bench boot` replays one recorded boot on a node that has nothing, over 100 Mbit/s, and prints its time,
//! the lower bound, and the bytes. With options it is one table of `make bench-boot`:
//!
//! ```text
//! --table            all ways instead of one boot
//! --guest NAME       of scripts/guest, or the path of a store with a recorded image `golden` [fast]
//! --rate MBIT        each link, both directions [100]
//! --nodes N          boot at once [1]
//! --rounds N         of each way, after one that is not counted unless N is 1 [5]
//! --ways A,B         those of these names, or with one of these in their name; the local boot always
//! --play guest|replay   real guests in QEMU, or their recorded reads [guest]
//! --speed FACTOR     divides the replayed guest's thinking, to stand for a faster processor [1]
//! ```
//!
//! Every round boots each way once, the local boot first: differences are taken within a round, so that a noisy machine
//! moves both. Root: hosts are network namespaces. Tables go to the terminal, `target/bench/*.json` and `*.svg`.

#[path = "../../tests/support/mod.rs"]
mod support;

mod boot;
mod lab;
mod plot;
mod statistics;
mod table;
mod ways;

use std::process::Command;

use boot::{Boot, Player};
use lab::Lab;
use ways::{WAYS, Way};

/// What is measured.
pub(crate) struct Options {
    table: bool,
    pub(crate) guest: String,
    pub(crate) megabits: u32,
    pub(crate) nodes: usize,
    pub(crate) rounds: usize,
    ways: Vec<String>,
    replay: bool,
    speed: f64,
}

fn options() -> Options {
    let mut options = Options {
        table: false,
        guest: "fast".to_owned(),
        megabits: 100,
        nodes: 1,
        rounds: 5,
        ways: Vec::new(),
        replay: false,
        speed: 1.0,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().unwrap_or_else(|| panic!("{argument} wants a value"));
        match argument.as_str() {
            "--table" => options.table = true,
            "--guest" => options.guest = value(),
            "--rate" => options.megabits = value().parse().expect("--rate is Mbit/s"),
            "--nodes" => options.nodes = value().parse().expect("--nodes is a number"),
            "--rounds" => options.rounds = value().parse().expect("--rounds is a number"),
            "--ways" => options.ways = value().split(',').map(str::to_owned).collect(),
            "--play" => options.replay = value() == "replay",
            "--speed" => options.speed = value().parse().expect("--speed is a factor"),
            "--bench" => {} // cargo's
            _ => panic!("unknown option {argument}: see the head of benches/boot/main.rs"),
        }
    }
    options
}

impl Options {
    pub(crate) fn player(&self) -> Player {
        if self.replay { Player::Replay(self.speed) } else { Player::Guest }
    }

    /// The replayer's speed; 1 for a real guest.
    pub(crate) fn speed(&self) -> f64 {
        if self.replay { self.speed } else { 1.0 }
    }

    pub(crate) fn title(&self) -> String {
        let who = match self.player() {
            Player::Guest if self.nodes == 1 => "a real guest".to_owned(),
            Player::Guest => format!("{} real guests at once", self.nodes),
            Player::Replay(_) if self.nodes == 1 => "a replayed boot".to_owned(),
            Player::Replay(_) => format!("{} replayed boots at once", self.nodes),
        };
        let speed =
            if self.speed() == 1.0 { String::new() } else { format!(", thinking ÷ {}", self.speed()) };
        let guest = self.guest.rsplit("bench/").next().unwrap_or_default();
        format!("{who} of {guest}, {} Mbit/s{speed}", self.megabits)
    }

    fn takes(&self, way: &Way) -> bool {
        let named = |part: &String| WAYS.iter().any(|way| way.name == *part);
        let meant =
            |part: &String| if named(part) { way.name == *part } else { way.name.contains(part.as_str()) };
        let wanted = self.ways.is_empty() || self.ways.iter().any(meant);
        let can = (self.nodes == 1 || !way.one_node) && !(self.replay && way.guest_only);
        way.name == "local" || (wanted && can)
    }
}

fn main() {
    let options = options();
    let programs = ["qemu-system-x86_64", "qemu-nbd", "qemu-img", "nbdkit", "nbdcopy", "ip", "tc", "curl"];
    if !support::require(&programs) || !support::require_root() {
        return;
    }
    let lab = Lab::new(&options.guest, options.nodes, options.megabits);
    if options.table {
        all_ways(&options, &lab);
    } else {
        one_boot(&lab);
    }
}

/// The smallest part: one replayed boot.
fn one_boot(lab: &Lab) {
    let way = WAYS.iter().find(|way| way.name == "bootcache").expect("it is one of them");
    let boot = boot::run(lab, &(way.prepare)(lab), Player::Replay(1.0));
    let (local, bound) = (lab.local_ms(1.0) / 1000.0, lab.bound_ms(1.0) / 1000.0);
    println!("one replayed boot on a node that has nothing, over 100 Mbit/s");
    println!("  time     {:>7.2} s   at least {:.2} s: {local:.2} s locally", boot.last(), local + bound);
    println!("  ready    {:>7.2} s   until the export could be read", boot.ready_seconds);
    println!("  waiting  {:>7.2} s   at least {bound:.2} s", boot.waiting_ms.unwrap_or(0.0) / 1000.0);
    println!(
        "  bytes    {:>7.1} MB  over the link, {:.1} of them in the background; the boot reads {:.1} MB",
        boot.wire_bytes as f64 / 1e6,
        boot.fill_bytes as f64 / 1e6,
        lab.recording.bytes_requested() as f64 / 1e6
    );
    assert_eq!(boot.wrong_bytes, 0, "bytes differed from the image");
}

fn all_ways(options: &Options, lab: &Lab) {
    print_setting(options, lab);
    let ways: Vec<&Way> = WAYS.iter().filter(|way| options.takes(way)).collect();
    let mut boots: Vec<Vec<Boot>> = ways.iter().map(|_| Vec::new()).collect();
    let first = usize::from(options.rounds == 1); // round 0 warms the page cache
    for round in first..=options.rounds {
        for (way, boots) in ways.iter().zip(&mut boots) {
            let boot = boot::run(lab, &(way.prepare)(lab), options.player());
            eprintln!("round {round}: {} {:.2} s", way.name, boot.last());
            assert_eq!(boot.wrong_bytes, 0, "{}: bytes differed from the image", way.name);
            if round > 0 {
                boots.push(boot);
            }
        }
    }
    let rows: Vec<table::Row> =
        ways.iter().zip(&boots).map(|(way, taken)| table::Row::of(way.name, taken, &boots[0])).collect();
    table::print(&rows);
    let files = table::write(options, lab, &ways, &boots).and_then(|base| {
        std::fs::write(base.with_extension("svg"), plot::draw(options, lab, &rows))?;
        Ok(base)
    });
    println!("\n{}.json, .svg", files.expect("target is writable").display());
}

fn print_setting(options: &Options, lab: &Lab) {
    println!("{}, {} rounds", options.title(), options.rounds);
    println!(
        "goodput of a TCP copy {:.1} Mbit/s; recorded boot {:.2} s, its stream {:.1} MB; lower bound of waiting {:.2} s",
        lab.goodput as f64 * 8e-6,
        lab.local_ms(options.speed()) / 1000.0,
        lab.heads.frames_length() as f64 / 1e6,
        lab.bound_ms(options.speed()) / 1000.0
    );
    for program in ["qemu-system-x86_64", "qemu-nbd", "nbdkit", "nbdcopy", "zstd", "curl"] {
        let text = support::run(Command::new(program).arg("--version"));
        println!("  {}", text.lines().next().unwrap_or_default());
    }
    println!(
        "  command lines: benches/boot/ways.rs. NFS is left out where the kernel has no NFS client: {}\n",
        nfs()
    );
}

fn nfs() -> &'static str {
    let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if known.lines().any(|line| line.trim_start_matches("nodev").trim() == "nfs4") {
        "this one has, measure it by hand"
    } else {
        "this one has none"
    }
}
