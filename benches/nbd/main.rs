//! NBD servers side by side: `cargo bench --bench nbd -- [--seconds N] [--rounds N] [--only TEXT] [--settings]
//! [--json FILE]` (`make bench-nbd`).
//!
//! bootcache, qemu-nbd and nbdkit serve the same cached file, in turn within each round, to fio's NBD engine. The client
//! is the limit for short requests: fio tops out somewhere above 100,000 requests a second, so the server's CPU time per
//! request stands beside the rates. Each figure is the median of the rounds.

#[allow(dead_code, reason = "the other bench uses the rest of it")]
#[path = "../boot/statistics.rs"]
mod statistics;
#[path = "../../tests/support/mod.rs"]
mod support;

mod client;
mod servers;
mod settings;
mod workloads;

use std::collections::BTreeMap;
use std::path::PathBuf;

use client::Measured;
use servers::{Server, Transport};
use settings::{NBDKIT, QEMU};
use statistics::median;
use workloads::{WORKLOADS, Workload};

struct Options {
    seconds: u32,
    rounds: usize,
    only: String,
    /// Every setting of the other servers, not only those of the table.
    settings: bool,
    json: Option<PathBuf>,
}

fn options() -> Options {
    let mut options = Options { seconds: 3, rounds: 3, only: String::new(), settings: false, json: None };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().unwrap_or_else(|| panic!("{argument} wants a value"));
        match argument.as_str() {
            "--seconds" => options.seconds = value().parse().expect("--seconds is a number"),
            "--rounds" => options.rounds = value().parse().expect("--rounds is a number"),
            "--only" => options.only = value(),
            "--settings" => options.settings = true,
            "--json" => options.json = Some(value().into()),
            "--bench" => {} // cargo's
            _ => panic!("unknown option {argument}"),
        }
    }
    options
}

fn main() {
    if servers::serve_if_told_to() {
        return;
    }
    let options = options();
    if !support::require(&["fio", "qemu-nbd", "qemu-img", "nbdkit"]) {
        return;
    }
    let folder = tempfile::Builder::new().prefix("bootcache-bench-nbd-").tempdir().expect("a folder");
    let disk = servers::Disks::new(folder.path());
    let mut rows = Vec::new();
    settings::explain(options.settings);
    println!("{:>53} {:>8} {:>8} {:>8} {:>9} {:>8}", "requests", "MB", "p50", "p99", "CPU µs a", "CPU s a");
    println!(
        "{:<29}over  server               a second a second       µs       µs   request       GB  against the better other",
        "workload"
    );
    for transport in [Transport::Unix, Transport::Tcp] {
        for workload in WORKLOADS {
            if format!("{} {transport}", workload.name).contains(&options.only) {
                rows.extend(compare(&disk, workload, transport, &options));
            }
        }
    }
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&rows).expect("plain data");
        std::fs::write(path, text + "\n").unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}

/// A line of the table.
#[derive(serde::Serialize)]
struct Row {
    workload: &'static str,
    transport: String,
    server: &'static str,
    #[serde(flatten)]
    measured: Measured,
}

/// Ours, and those that it is compared with.
fn servers(workload: &Workload, all: bool) -> Vec<Server> {
    let qemu = QEMU.iter().take(if all { QEMU.len() } else { settings::QEMU_USED });
    if workload.overlay {
        return std::iter::once(Server::BootcacheOverlay).chain(qemu.map(Server::QemuOverlay)).collect();
    }
    let nbdkit = NBDKIT.iter().take(if all { NBDKIT.len() } else { settings::NBDKIT_USED });
    std::iter::once(Server::Bootcache)
        .chain(qemu.map(Server::Qemu))
        .chain(nbdkit.map(Server::Nbdkit))
        .collect()
}

/// One workload on each server in turn, as often as there are rounds; prints the medians.
fn compare(disks: &servers::Disks, workload: &Workload, transport: Transport, options: &Options) -> Vec<Row> {
    let servers = servers(workload, options.settings);
    let mut runs: BTreeMap<usize, Vec<Measured>> = BTreeMap::new();
    for round in 0..options.rounds {
        // Each begins in turn: what one leaves behind, as dirty pages, the next one has to live with.
        for place in (0..servers.len()).map(|place| (place + round) % servers.len()) {
            let server = servers[place];
            disks.warm(server);
            let running = server.start(disks, transport);
            runs.entry(place).or_default().push(client::run(&running, workload, options.seconds));
        }
    }
    let medians: Vec<Measured> = runs.values().map(|runs| Measured::median(runs)).collect();
    let best = |value: fn(&Measured) -> f64, better: fn(f64, f64) -> f64| {
        medians[1..].iter().map(value).reduce(better).expect("there are others")
    };
    let rate = medians[0].requests / best(|m| m.requests, f64::max);
    let cpu = medians[0].cpu_us / best(|m| m.cpu_us, f64::min);
    let mut rows = Vec::new();
    for (place, (server, measured)) in servers.iter().zip(medians).enumerate() {
        let against =
            if place == 0 { format!("{rate:.2} × the rate, {cpu:.2} × the CPU") } else { String::new() };
        println!(
            "{:<28} {:<5} {:<18} {:>9.0} {:>8.0} {:>8.0} {:>8.0} {:>9.2} {:>8.2}  {against}",
            if place == 0 { workload.name } else { "" },
            if place == 0 { transport.to_string() } else { String::new() },
            server.name(),
            measured.requests,
            measured.megabytes,
            measured.p50_us,
            measured.p99_us,
            measured.cpu_us,
            measured.cpu_seconds_per_gb,
        );
        rows.push(Row {
            workload: workload.name,
            transport: transport.to_string(),
            server: server.name(),
            measured,
        });
    }
    rows
}

impl Measured {
    fn median(runs: &[Self]) -> Self {
        let of = |value: fn(&Self) -> f64| median(&runs.iter().map(value).collect::<Vec<_>>());
        Self {
            requests: of(|m| m.requests),
            megabytes: of(|m| m.megabytes),
            p50_us: of(|m| m.p50_us),
            p99_us: of(|m| m.p99_us),
            cpu_us: of(|m| m.cpu_us),
            cpu_seconds_per_gb: of(|m| m.cpu_seconds_per_gb),
        }
    }
}
