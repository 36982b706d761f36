//! A boot every way, in turn and again: seconds to the guest's report, and what they cost.
//!
//! `cargo bench --bench boot` replays one recorded boot on a node that has nothing, over 100 Mbit/s, and prints its time,
//! the lower bound, and the bytes. With one of these it is more:
//!
//! ```text
//! --all              everything, the most telling first; says how long it takes. What is there is not measured again,
//!                    so that a run which was cut short goes on
//! --list             what --all has measured and what is left, in minutes
//! --table            one table, of these:
//!   --guest NAME       of scripts/guest, or windows-like, or the path of a store with a recorded `golden` [fast]
//!   --rate MBIT        each link, both directions [100]
//!   --nodes N          boot at once [1]
//!   --rounds N         of each way [5]
//!   --ways A,B         those of these names, or with one of these in their name; the local boot always
//!   --play guest|replay   real guests in QEMU, or their recorded reads [guest]
//!   --speed FACTOR     divides the replayed guest's thinking, to stand for a faster processor [1]
//!   --slow FACTOR      slow motion of a replay: links and thinking slower by this, times divided by it [1]
//! --predict          one, three and sixteen replayed nodes, and what the simulator says of them beforehand
//! --show             all tables of what was measured, and the rivals' versions and command lines
//! --markdown         the same for documents
//! --pictures FOLDER  draws them
//! --minutes N        begin no boot after so many minutes (with --all, --table, --predict)
//! --fresh            forget what was measured, and the recorded boots, which are measurements too
//! --results FOLDER   where it is kept [target/bench/boot]
//! ```
//!
//! Every round boots each way once, the local boot first: differences are taken within a round, so that a noisy machine
//! moves both. Root: hosts are network namespaces.

#[path = "../../tests/support/mod.rs"]
mod support;

mod at_once;
mod boot;
mod drive;
mod golden;
mod lab;
mod measure;
mod picture;
mod plan;
mod predict;
mod print;
mod results;
mod rows;
mod setting;
mod statistics;
mod validate;
mod ways;

use std::path::PathBuf;
use std::time::Duration;

use lab::Lab;
use plan::Step;
use results::Results;
use setting::{Play, Setting};

/// What is to be done.
#[derive(Debug, Clone, PartialEq)]
enum What {
    OneBoot,
    All,
    List,
    Table,
    Predict,
    Show { markdown: bool },
    Pictures(PathBuf),
}

struct Options {
    what: What,
    setting: Setting,
    rounds: Option<usize>,
    ways: Vec<String>,
    minutes: Option<u64>,
    fresh: bool,
    results: PathBuf,
}

fn options() -> Options {
    let mut options = Options {
        what: What::OneBoot,
        setting: Setting::new("fast", 100, 1, Play::Guest),
        rounds: None,
        ways: Vec::new(),
        minutes: None,
        fresh: false,
        results: support::checkout("target/bench/boot"),
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().unwrap_or_else(|| panic!("{argument} wants a value"));
        let setting = &mut options.setting;
        match argument.as_str() {
            "--all" => options.what = What::All,
            "--list" => options.what = What::List,
            "--table" => options.what = What::Table,
            "--predict" => options.what = What::Predict,
            "--show" => options.what = What::Show { markdown: false },
            "--markdown" => options.what = What::Show { markdown: true },
            "--pictures" => options.what = What::Pictures(value().into()),
            "--guest" => setting.guest = value(),
            "--rate" => setting.megabits = value().parse().expect("--rate is Mbit/s"),
            "--nodes" => setting.nodes = value().parse().expect("--nodes is a number"),
            "--speed" => setting.speed = value().parse().expect("--speed is a factor"),
            "--slow" => setting.slow = value().parse().expect("--slow is a whole factor"),
            "--play" => setting.play = if value() == "replay" { Play::Replay } else { Play::Guest },
            "--rounds" => options.rounds = Some(value().parse().expect("--rounds is a number")),
            "--ways" => options.ways = value().split(',').map(str::to_owned).collect(),
            "--minutes" => options.minutes = Some(value().parse().expect("--minutes is a number")),
            "--fresh" => options.fresh = true,
            "--results" => options.results = value().into(),
            "--bench" => {} // cargo's
            _ => panic!("unknown option {argument}: see the head of benches/boot/main.rs"),
        }
    }
    options
}

fn main() {
    let options = options();
    match &options.what {
        What::Show { markdown } => return show(&Results::all(&options.results), *markdown, &options),
        What::Pictures(folder) => {
            let names =
                picture::draw(&Results::all(&options.results), folder).expect("the folder is writable");
            names.iter().for_each(|name| println!("{}", folder.join(name).display()));
            return;
        }
        What::List => return plan::announce(&plan::all(), &options.results),
        _ => {}
    }
    let programs = [
        "qemu-system-x86_64",
        "qemu-nbd",
        "qemu-img",
        "nbdkit",
        "nbdcopy",
        "ip",
        "tc",
        "curl",
        "ganesha.nfsd",
        "rpcbind",
    ];
    if !support::require(&programs) || !support::require_root() {
        return;
    }
    let Some(_alone) = golden::lock() else {
        eprintln!(
            "another bench of boots runs on this machine, and both would be slower: try again when it has ended"
        );
        std::process::exit(1);
    };
    if options.what == What::OneBoot {
        return one_boot();
    }
    if options.fresh {
        let _nothing_was_measured = std::fs::remove_dir_all(&options.results);
        golden::forget();
    }
    let one = Setting {
        nodes: 1,
        play: Play::Replay,
        slow: options.setting.slow.max(4),
        ..options.setting.clone()
    };
    let steps = match options.what {
        What::All => plan::all(),
        What::Predict => predict::steps(&one, options.rounds.unwrap_or(2)),
        _ => vec![Step::asked(options.setting.clone(), options.rounds.unwrap_or(5), &options.ways)],
    };
    plan::announce(&steps, &options.results);
    // A way that fails costs its row; its reason goes to the results, so a line is enough here.
    std::panic::set_hook(Box::new(|panic| eprintln!("  {panic}")));
    let limit = options.minutes.map(|minutes| Duration::from_secs(minutes * 60));
    plan::run(&steps, &options.results, limit, |results| print::table(results, false));
    match options.what {
        What::Predict => predict::print(&options.results, &one),
        What::All => show(&Results::all(&options.results), false, &options),
        _ => print::commands(&[Results::open(&options.results, &options.setting)]),
    }
}

/// The tables, what many nodes take beside one, how true the replayer is, what the simulator says, and the command lines.
fn show(all: &[Results], markdown: bool, options: &Options) {
    for results in plan::in_order(all) {
        print::table(results, markdown);
    }
    print::as_it_is(markdown, || {
        at_once::print(&plan::in_order(all));
        validate::print(all);
        for rate in [100, 1000] {
            predict::print(&options.results, &plan::several_at_once(1, rate));
        }
        print::commands(all);
    });
}

/// The smallest part: one replayed boot.
fn one_boot() {
    let setting = Setting::new("fast", 100, 1, Play::Replay);
    let lab = Lab::new(&setting);
    let way = ways::WAYS.iter().find(|way| way.name == ways::BOOTCACHE).expect("it is one of them");
    let boot = boot::run(&lab, &(way.prepare)(&lab), &setting);
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
