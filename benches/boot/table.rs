//! The results as a table for a person and as JSON for a program.

use std::io;
use std::path::PathBuf;

use super::Options;
use super::boot::Boot;
use super::lab::Lab;
use super::statistics::{median, paired_interval};
use super::support;
use super::ways::Way;

/// One way's line.
pub(crate) struct Row {
    pub(crate) way: &'static str,
    /// Of the last node, the median of all rounds.
    pub(crate) seconds: f64,
    pub(crate) least: f64,
    pub(crate) most: f64,
    /// Over the local boot of the same round, in per cent: the mean and half its 95 % interval; none for few rounds.
    over: Option<(f64, f64)>,
    pub(crate) waiting_s: Option<f64>,
    wire_mb: f64,
    fill_mb: f64,
    origin_mb: f64,
    cpu_s: f64,
    memory_mb: f64,
}

impl Row {
    pub(crate) fn of(way: &'static str, boots: &[Boot], local: &[Boot]) -> Self {
        let of = |what: &dyn Fn(&Boot) -> f64| boots.iter().map(what).collect::<Vec<_>>();
        let times = of(&Boot::last);
        let over: Vec<f64> =
            times.iter().zip(local).map(|(time, local)| (time / local.last() - 1.0) * 100.0).collect();
        let waits: Vec<f64> = boots.iter().filter_map(|boot| boot.waiting_ms).collect();
        Self {
            way,
            seconds: median(&times),
            least: times.iter().copied().fold(f64::INFINITY, f64::min),
            most: times.iter().copied().fold(0.0, f64::max),
            over: (over.len() > 1 && way != "local").then(|| paired_interval(&over)),
            waiting_s: (!waits.is_empty()).then(|| median(&waits) / 1000.0),
            wire_mb: median(&of(&|boot| boot.wire_bytes as f64 / 1e6)),
            fill_mb: median(&of(&|boot| boot.fill_bytes as f64 / 1e6)),
            origin_mb: median(&of(&|boot| boot.origin_bytes as f64 / 1e6)),
            cpu_s: median(&of(&|boot| boot.cpu_seconds)),
            memory_mb: median(&of(&|boot| boot.memory_bytes as f64 / 1e6)),
        }
    }
}

/// Prints it; "fill" is the part of "wire" that came in the background.
pub(crate) fn print(rows: &[Row]) {
    println!(
        "{:<26} {:>7} {:>13} {:>22} {:>7} {:>7} {:>6} {:>7} {:>6} {:>6}",
        "way",
        "median",
        "min-max",
        "over local, 95 %",
        "waited",
        "wire MB",
        "fill",
        "origin",
        "CPU s",
        "RSS MB"
    );
    for row in rows {
        let over = row.over.map_or(String::new(), |(mean, half)| {
            format!("{mean:+.1} % [{:+.1}, {:+.1}]", mean - half, mean + half)
        });
        let waited = row.waiting_s.map_or(String::new(), |seconds| format!("{seconds:.2}s"));
        println!(
            "{:<26} {:>6.2}s {:>13} {over:>22} {waited:>7} {:>7.1} {:>6.1} {:>7.1} {:>6.2} {:>6.0}",
            row.way,
            row.seconds,
            format!("{:.2}-{:.2}s", row.least, row.most),
            row.wire_mb,
            row.fill_mb,
            row.origin_mb,
            row.cpu_s,
            row.memory_mb,
        );
    }
}

/// Writes every boot; returns the path without its extension.
pub(crate) fn write(options: &Options, lab: &Lab, ways: &[&Way], boots: &[Vec<Boot>]) -> io::Result<PathBuf> {
    let rows: Vec<serde_json::Value> = ways
        .iter()
        .zip(boots)
        .map(|(way, boots)| serde_json::json!({ "way": way.name, "boots": boots }))
        .collect();
    let all = serde_json::json!({
        "title": options.title(),
        "nodes": options.nodes,
        "link_mbit": options.megabits,
        "goodput_bytes_per_s": lab.goodput,
        "local_ms": lab.local_ms(options.speed()),
        "waiting_min_ms": lab.bound_ms(options.speed()),
        "stream_bytes": lab.heads.frames_length(),
        "ways": rows,
    });
    let folder = support::checkout("target/bench");
    std::fs::create_dir_all(&folder)?;
    let name: String = options.title().chars().map(|c| if c.is_alphanumeric() { c } else { '-' }).collect();
    let base = folder.join(name);
    std::fs::write(base.with_extension("json"), serde_json::to_vec_pretty(&all)?)?;
    Ok(base)
}
