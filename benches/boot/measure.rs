//! Measures what a table lacks: every round boots each way once, in turn, so that a noisy machine moves all of them.

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use super::boot;
use super::lab::Lab;
use super::results::{Head, Record, Results};
use super::setting::Setting;
use super::support;
use super::support::store::bootcache;
use super::ways::Way;

/// Rounds `1..=rounds` of `ways`, as far as they are missing and `until` is not past. Returns whether all are there.
pub(crate) fn complete(
    folder: &Path,
    setting: &Setting,
    ways: &[(&Way, usize)],
    until: Option<Instant>,
) -> io::Result<bool> {
    let mut results = Results::open(folder, setting);
    if results.head.as_ref().is_some_and(|head| head.build == build()) && missing(&results, ways).is_empty() {
        return Ok(true);
    }
    let lab = Lab::new(setting);
    results.begin(head(setting, &lab))?;
    for (way, round) in missing(&results, ways) {
        if until.is_some_and(|until| Instant::now() > until) {
            return Ok(false);
        }
        let began = Instant::now();
        lab.take_commands();
        lab.shape_all();
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            let prepared = (way.prepare)(&lab);
            boot::run(&lab, &prepared, setting)
        }));
        let (boot, error) = match outcome {
            Ok(boot) if boot.wrong_bytes > 0 => {
                (None, Some(format!("{} bytes differed from the image", boot.wrong_bytes)))
            }
            Ok(boot) => (Some(boot), None),
            Err(panic) => (None, Some(reason(panic.as_ref()))),
        };
        let all_seconds = began.elapsed().as_secs_f64();
        let said = boot.as_ref().map_or_else(
            || format!("FAILED: {}", error.as_deref().unwrap_or_default()),
            |boot| {
                let stolen = match boot.stolen * 100.0 {
                    stolen if stolen >= 1.0 => format!(", {stolen:.0} % by other machines of its host"),
                    _ => String::new(),
                };
                format!("{:.2} s, processors {:.0} % busy{stolen}", boot.last(), boot.busy * 100.0)
            },
        );
        eprintln!("  round {round}, {}: {said} ({all_seconds:.0} s with its setting up)", way.name);
        results.add(Record {
            way: way.name.to_owned(),
            round,
            goodput: lab.goodput,
            bound_ms: lab.bound_ms(setting.clock_speed()),
            all_seconds,
            commands: lab.take_commands(),
            boot,
            error,
        })?;
    }
    Ok(true)
}

/// What is not measured yet, round by round.
pub(crate) fn missing<'a>(results: &Results, ways: &[(&'a Way, usize)]) -> Vec<(&'a Way, usize)> {
    let rounds = ways.iter().map(|(_, rounds)| *rounds).max().unwrap_or(0);
    (1..=rounds)
        .flat_map(|round| {
            ways.iter().filter(move |(_, rounds)| round <= *rounds).map(move |(way, _)| (*way, round))
        })
        .filter(|(way, round)| !results.has(way.name, *round))
        .collect()
}

/// The digest of the program, in short.
pub(crate) fn build() -> String {
    let program = std::fs::read(bootcache()).expect("cargo has built it");
    blake3::hash(&program).to_hex()[..16].to_owned()
}

fn head(setting: &Setting, lab: &Lab) -> Head {
    Head {
        setting: setting.clone(),
        build: build(),
        versions: versions(),
        machine: machine(),
        local_ms: lab.local_ms(setting.clock_speed()),
        stream_bytes: lab.heads.frames_length(),
        read_bytes: lab.recording.bytes_requested(),
        disk_bytes: std::os::unix::fs::MetadataExt::blocks(
            &std::fs::metadata(&lab.raw).expect("the disk is there"),
        ) * 512,
    }
}

/// The first line of what each rival says of itself.
fn versions() -> Vec<String> {
    let mut versions = Vec::new();
    for (program, option) in [
        ("qemu-system-x86_64", "--version"),
        ("qemu-nbd", "--version"),
        ("nbdkit", "--version"),
        ("nbdcopy", "--version"),
        ("ganesha.nfsd", "-v"),
        ("zstd", "--version"),
        ("curl", "--version"),
        ("uname", "-sr"),
    ] {
        let said = support::run(Command::new(program).arg(option));
        let first = said.lines().find(|line| !line.trim().is_empty()).unwrap_or_default();
        versions.push(format!("{program}: {}", first.chars().take(70).collect::<String>().trim()));
    }
    versions
}

fn machine() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let names: Vec<&str> = info
        .lines()
        .filter_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map(|pair| pair.1)
        .collect();
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kilobytes: u64 = memory
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse().ok())
        .unwrap_or(0);
    format!("{} x {}, {} GB", names.len(), names.first().unwrap_or(&"?"), kilobytes / 1_000_000)
}

fn reason(panic: &(dyn Any + Send)) -> String {
    let text =
        panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("it panicked").chars().take(600).collect()
}
