//! `bootcache simulate`: a burst of boots on a network that is not there.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, bail};
use bootcache::boot_cache::BootCache;
use bootcache::choose::policy::NAMES;
use bootcache::choose::{Relay, Weights, by_name};
use bootcache::name::ImageName;
use bootcache::simulate::{Profile, Report, Scenario, payload, simulate};
use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use comfy_table::{CellAlignment, Table};
use serde_json::json;

use super::Globals;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Boot this image as it was recorded [default: a made-up boot, see --boot-set and --boot-seconds]
    image: Option<ImageName>,
    /// Nodes that boot at once
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    nodes: u32,
    /// Decides all that is random: the same seed gives the same result
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How a source is chosen; may be repeated, or 'all'
    #[arg(long, value_name = "NAME", default_value = "least-load")]
    chooser: Vec<String>,
    /// Each node's link, full duplex
    #[arg(long, default_value_t = 1000, value_name = "MBIT/S", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    link: u64,
    /// The origin's link [default: as --link]
    #[arg(long, value_name = "MBIT/S", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    origin_link: Option<u64>,
    /// Round trip between two nodes
    #[arg(long, default_value_t = 200, value_name = "US", value_parser = clap::value_parser!(u64).range(0..=10_000_000))]
    round_trip: u64,
    /// Nodes begin at random within this time
    #[arg(long, default_value_t = 500, value_name = "MS", value_parser = clap::value_parser!(u64).range(0..=86_400_000))]
    stagger: u64,
    /// Racks that the nodes are in; their links to the core are shared
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    racks: u32,
    /// By how much a rack's nodes exceed its link to the core
    #[arg(long, default_value_t = 4.0, value_name = "FACTOR")]
    oversubscription: f64,
    /// Share of nodes that send at a tenth of their link
    #[arg(long, default_value_t = 0.0, value_name = "SHARE", value_parser = share)]
    slow: f64,
    /// Share of nodes that fall silent in the first half of the boot
    #[arg(long, default_value_t = 0.0, value_name = "SHARE", value_parser = share)]
    dying: f64,
    /// The origin falls silent after this time
    #[arg(long, value_name = "MS")]
    origin_dies: Option<u64>,
    /// Age of the oldest loads that a choice is made by
    #[arg(long, default_value_t = 50, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..=3_600_000))]
    report: u64,
    /// Compressed size of the made-up boot's stream
    #[arg(long, default_value_t = 100, value_name = "MB", value_parser = clap::value_parser!(u64).range(1..=10_000))]
    boot_set: u64,
    /// Time of a local made-up boot
    #[arg(long, default_value_t = 5.0, value_name = "S")]
    boot_seconds: f64,
    /// How much a node has asked for and not got, at most
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=1024))]
    window: Option<u64>,
    /// Children of a node in one tree of the relay
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    fan_out: Option<u32>,
    /// Trees of the relay
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    stripes: Option<u32>,
}

pub(crate) fn run(globals: &Globals, args: &Args) -> anyhow::Result<ExitCode> {
    let profile = profile(globals, args)?;
    let mut results = Vec::new();
    for name in names(args)? {
        let scenario = scenario(args, name);
        let chooser = by_name(name, &Weights::default()).expect("names were checked");
        let started = Instant::now();
        let report = simulate(&scenario, &profile, chooser.as_ref());
        results.push((report, started.elapsed().as_secs_f64()));
    }
    if globals.json {
        let reports: Vec<_> = results.iter().map(|(report, _)| report).collect();
        println!("{}", serde_json::to_string_pretty(&json!({ "seed": args.seed, "results": reports }))?);
    } else {
        print(args, &profile, &results);
    }
    let all_booted = results.iter().all(|(report, _)| report.stuck == 0);
    Ok(if all_booted { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(value) if (0.0..=1.0).contains(&value) => Ok(value),
        _ => Err("a share is from 0 to 1".to_owned()),
    }
}

fn names(args: &Args) -> anyhow::Result<Vec<&str>> {
    if args.chooser.iter().any(|name| name == "all") {
        return Ok(NAMES.to_vec());
    }
    if let Some(name) = args.chooser.iter().find(|name| !NAMES.contains(&name.as_str())) {
        bail!("there is no chooser '{name}': use {} or all", NAMES.join(", "));
    }
    Ok(args.chooser.iter().map(String::as_str).collect())
}

fn profile(globals: &Globals, args: &Args) -> anyhow::Result<Profile> {
    let Some(name) = &args.image else {
        if !(0.1..=3600.0).contains(&args.boot_seconds) {
            bail!("--boot-seconds is from 0.1 to 3600");
        }
        let boot = std::time::Duration::from_secs_f64(args.boot_seconds);
        return Ok(Profile::synthetic(args.boot_set * 1_000_000, u64::try_from(boot.as_millis())?));
    };
    let entry = globals.existing_store()?.resolve(name)?;
    let boot_cache = BootCache::open(&entry.boot_path(), entry.root)
        .with_context(|| format!("'{name}' has no usable boot cache: run 'bootcache record {name}'"))?;
    Ok(Profile::of(boot_cache.heads()))
}

fn scenario(args: &Args, chooser: &str) -> Scenario {
    let usual = Scenario::default();
    let mut relay = if chooser == "tree" { Relay::tree(2) } else { Relay::default() };
    relay.fan_out = args.fan_out.unwrap_or(relay.fan_out);
    relay.stripes = args.stripes.unwrap_or(relay.stripes);
    Scenario {
        nodes: args.nodes,
        seed: args.seed,
        link: payload(args.link),
        origin_link: payload(args.origin_link.unwrap_or(args.link)),
        round_trip_us: args.round_trip,
        stagger_ms: args.stagger,
        racks: args.racks,
        oversubscription: args.oversubscription,
        slow: args.slow,
        dying: args.dying,
        origin_dies_ms: args.origin_dies,
        report_ms: args.report,
        window: args.window.map(|mebibytes| mebibytes << 20),
        relay,
        ..usual
    }
}

fn print(args: &Args, profile: &Profile, results: &[(Report, f64)]) {
    println!(
        "{} nodes, {} Mbit/s, seed {}: {:.1} MB each, {:.2} s locally",
        args.nodes,
        args.link,
        args.seed,
        profile.bytes() as f64 / 1e6,
        profile.end_ms as f64 / 1000.0,
    );
    println!("{}", compared(results));
    if let Some((first, _)) = results.first() {
        println!("lower bound of the last boot: {:.2} s; origin: in boot sets", first.bound_ms / 1000.0);
        let lost: Vec<String> = results
            .iter()
            .filter(|(report, _)| report.died + report.stuck > 0)
            .map(|(report, _)| format!("{}: {} died, {} stuck", report.chooser, report.died, report.stuck))
            .collect();
        if !lost.is_empty() {
            println!("{}", lost.join("\n"));
        }
    }
}

/// One row a chooser, within 80 columns.
fn compared(results: &[(Report, f64)]) -> Table {
    let mut table = Table::new();
    table.load_preset(UTF8_HORIZONTAL_ONLY);
    table.set_header(["chooser", "last", "÷bound", "p50", "p99", "origin", "waste", "fair", "failed", "ran"]);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 0));
    }
    for (report, ran) in results {
        let seconds = |ms: f64| format!("{}s", narrow(ms / 1000.0));
        table.add_row([
            report.chooser.to_owned(),
            seconds(report.last_ms),
            narrow(report.last_ms / report.bound_ms),
            seconds(report.p50_ms),
            seconds(report.p99_ms),
            format!("{}x", narrow(report.origin_copies)),
            format!("{:.1}%", report.wasted * 100.0),
            format!("{:.2}", report.fairness),
            report.failovers.to_string(),
            format!("{ran:.1}s"),
        ]);
    }
    table
}

/// With as many digits as five columns have room for.
fn narrow(value: f64) -> String {
    let digits = if value < 99.995 {
        2
    } else if value < 999.95 {
        1
    } else {
        0
    };
    format!("{value:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_results_fit_on_a_terminal() {
        let report = simulate(
            &Scenario { nodes: 2, ..Scenario::default() },
            &Profile::synthetic(1_000_000, 1000),
            by_name("least-load-reported", &Weights::default()).unwrap().as_ref(),
        );
        let report = Report {
            last_ms: 998_765.4,
            bound_ms: 1000.0,
            p50_ms: 998_765.4,
            p99_ms: 998_765.4,
            origin_copies: 1000.0,
            wasted: 1.0,
            failovers: 123_456,
            ..report
        };
        let table = compared(&[(report, 123.4)]).to_string();
        assert!(table.contains("998.8s") && table.contains("1000x"), "{table}");
        assert!(table.lines().all(|line| line.chars().count() <= 80), "{table}");
    }

    #[test]
    fn digits_go_as_numbers_grow() {
        assert_eq!([1.0, 99.99, 99.999, 1234.4].map(narrow), ["1.00", "99.99", "100.0", "1234"]);
    }
}
