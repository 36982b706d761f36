//! Real guests, booted every way in turn and again: seconds to the guest's report and bytes on the wire.
//!
//! `cargo bench --bench guests -- [--pairs N] [--guest NAME] [--rate MBIT] [--ways a,b,…]` (`make bench-boot`). Every
//! round boots each way once, the first way being the local boot that the others are compared with: the difference is
//! taken within a round, so that a noisy machine moves both, and its mean stands with a 95 % interval. Root: two hosts
//! are network namespaces, the link between them is shaped in both directions.

#[path = "../../tests/support/mod.rs"]
mod support;

mod statistics;
mod ways;

use std::path::PathBuf;
use std::process::Command;

use statistics::{median, paired_interval};
use support::net::{Net, Rate};
use ways::{Bench, Boot, WAYS, Way};

struct Options {
    pairs: usize,
    guest: String,
    megabits: u32,
    ways: Vec<String>,
}

fn options() -> Options {
    let mut options = Options { pairs: 10, guest: "fast".to_owned(), megabits: 100, ways: Vec::new() };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().unwrap_or_else(|| panic!("{argument} wants a value"));
        match argument.as_str() {
            "--pairs" => options.pairs = value().parse().expect("--pairs is a number"),
            "--guest" => options.guest = value(),
            "--rate" => options.megabits = value().parse().expect("--rate is Mbit/s"),
            "--ways" => options.ways = value().split(',').map(str::to_owned).collect(),
            "--bench" => {} // cargo's
            _ => panic!("unknown option {argument}"),
        }
    }
    options
}

fn main() {
    let options = options();
    let programs = ["qemu-system-x86_64", "qemu-nbd", "nbdkit", "nbdcopy", "ip", "tc", "curl"];
    if !support::require(&programs) || !support::require_root() {
        return;
    }
    let ways: Vec<&Way> = WAYS
        .iter()
        .filter(|way| {
            way.name == "local" || options.ways.is_empty() || options.ways.iter().any(|name| name == way.name)
        })
        .collect();
    let raw = support::guest::disk(&options.guest);
    let net = Net::new(2, Rate::Megabits(options.megabits));
    let goodput = net.goodput(0, 1, 8 << 20);
    println!(
        "guest {}, {} rounds, link {} Mbit/s, goodput of a TCP copy {goodput:.1} Mbit/s",
        options.guest, options.pairs, options.megabits
    );
    print_versions();
    let mut bench = Bench::new(net, raw);
    let mut boots: Vec<Vec<Boot>> = ways.iter().map(|_| Vec::new()).collect();
    for round in 0..=options.pairs {
        for (way, boots) in ways.iter().zip(&mut boots) {
            let boot = (way.boot)(&mut bench);
            eprintln!(
                "round {round}: {} {:.2} s, {:.1} MB",
                way.name,
                boot.seconds,
                boot.wire_bytes as f64 / 1e6
            );
            if round > 0 {
                boots.push(boot); // round 0 warms the page cache
            }
        }
    }
    print_table(&ways, &boots);
    let path = write_json(&options, goodput, &ways, &boots);
    println!("\nall boots: {}", path.display());
}

fn print_versions() {
    for program in ["qemu-system-x86_64", "qemu-nbd", "nbdkit", "nbdcopy"] {
        let text = support::run(Command::new(program).arg("--version"));
        println!("  {}", text.lines().next().unwrap_or_default());
    }
    println!();
}

fn print_table(ways: &[&Way], boots: &[Vec<Boot>]) {
    println!("{:<26} {:>7} {:>13} {:>24} {:>8}", "way", "median", "min-max", "over local, 95 %", "wire MB");
    let seconds = |boots: &[Boot]| boots.iter().map(|boot| boot.seconds).collect::<Vec<_>>();
    let local = seconds(&boots[0]);
    for (way, boots) in ways.iter().zip(boots) {
        let times = seconds(boots);
        let least = times.iter().copied().fold(f64::INFINITY, f64::min);
        let most = times.iter().copied().fold(0.0, f64::max);
        let over = if way.name == "local" {
            String::new()
        } else {
            let relative: Vec<f64> =
                times.iter().zip(&local).map(|(time, local)| (time / local - 1.0) * 100.0).collect();
            let (mean, half) = paired_interval(&relative);
            format!("{mean:+.1} % [{:+.1}, {:+.1}]", mean - half, mean + half)
        };
        let wire = median(&boots.iter().map(|boot| boot.wire_bytes as f64 / 1e6).collect::<Vec<_>>());
        println!(
            "{:<26} {:>6.2}s {:>13} {over:>24} {wire:>8.1}",
            way.name,
            median(&times),
            format!("{least:.2}-{most:.2}s"),
        );
    }
}

fn write_json(options: &Options, goodput: f64, ways: &[&Way], boots: &[Vec<Boot>]) -> PathBuf {
    let rows: Vec<serde_json::Value> = ways
        .iter()
        .zip(boots)
        .map(|(way, boots)| {
            let seconds: Vec<f64> = boots.iter().map(|boot| boot.seconds).collect();
            let wire: Vec<u64> = boots.iter().map(|boot| boot.wire_bytes).collect();
            serde_json::json!({ "way": way.name, "seconds": seconds, "wire_bytes": wire })
        })
        .collect();
    let all = serde_json::json!({
        "guest": options.guest, "link_mbit": options.megabits, "goodput_mbit": goodput, "ways": rows,
    });
    let path =
        support::checkout("target").join(format!("bench-guests-{}-{}.json", options.guest, options.megabits));
    std::fs::write(&path, serde_json::to_vec_pretty(&all).expect("numbers and names"))
        .expect("target is writable");
    path
}
