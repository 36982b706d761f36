//! Tables for the terminal and for Markdown, and what the goals say of them.

use super::results::Results;
use super::rows::{Row, Rows};
use super::ways::{BOOTCACHE, HAS_IMAGE, LOCAL, WAYS};

/// One table; `markdown` for documents.
pub(crate) fn table(results: &Results, markdown: bool) {
    let Some(rows) = Rows::of(results) else { return };
    if markdown {
        in_markdown(&rows)
    } else {
        in_terminal(&rows)
    }
    failures(results);
    println!();
}

fn in_terminal(rows: &Rows) {
    println!("{}", rows.title);
    println!("{}", setting(rows));
    println!(
        "{:<23} {:>7} {:>12} {:>6} {:>6} {:>7} {:>7} {:>5} {:>4} {:>4}",
        "way", "time", "min-max", "ready", "reads", "wire", "origin", "CPU", "RSS", "busy"
    );
    for row in &rows.rows {
        println!(
            "{:<23} {:>6.2}s {:>12} {:>5.2}s {:>6} {:>7.1} {:>7.1} {:>5.2} {:>4} {:>3.0}%",
            row.way,
            row.seconds,
            format!("{:.2}-{:.2}", row.least, row.most),
            row.ready,
            reads(row),
            row.wire_mb,
            row.origin_mb,
            row.cpu_s,
            memory(row),
            row.busy * 100.0
        );
    }
    pairs(rows);
    goals(rows);
}

fn in_markdown(rows: &Rows) {
    println!("**{}** ({})\n", rows.title, setting(rows));
    println!(
        "| way | time | min–max | ready | reads waited | wire MB | of it fill | origin MB | CPU s | RSS MB | busy | rounds |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|---|");
    for row in &rows.rows {
        let way = if row.way == BOOTCACHE { format!("**{}**", row.way) } else { row.way.clone() };
        println!(
            "| {way} | {:.2} s | {:.2}–{:.2} | {:.2} s | {} | {:.1} | {:.1} | {:.1} | {:.2} | {} | {:.0} % | {} |",
            row.seconds,
            row.least,
            row.most,
            row.ready,
            reads(row),
            row.wire_mb,
            row.fill_mb,
            row.origin_mb,
            row.cpu_s,
            memory(row),
            row.busy * 100.0,
            row.rounds
        );
    }
    println!();
    as_it_is(true, || {
        pairs(rows);
        goals(rows);
    });
}

/// What `text` prints is laid out for a terminal: fenced in Markdown.
pub(crate) fn as_it_is(markdown: bool, text: impl FnOnce()) {
    let fence = || {
        if markdown {
            println!("```");
        }
    };
    fence();
    text();
    fence();
}

fn setting(rows: &Rows) -> String {
    let slow = if rows.slow == 1 { String::new() } else { format!("; all times divided by {}", rows.slow) };
    format!(
        "goodput {:.1} Mbit/s; local boot {:.2} s in the recording, must wait {:.2} s{slow}",
        rows.goodput_mbit, rows.local, rows.bound
    )
}

fn reads(row: &Row) -> String {
    row.reads.map_or_else(|| "-".to_owned(), |seconds| format!("{seconds:.2}s"))
}

fn memory(row: &Row) -> String {
    if row.memory_mb > 0.0 { format!("{:.0}", row.memory_mb) } else { "-".to_owned() }
}

/// Differences within a round, when there are enough of them.
fn pairs(rows: &Rows) {
    let pairs: Vec<String> = rows
        .rows
        .iter()
        .filter_map(|row| {
            let (mean, half) = row.over.filter(|(_, half)| half.is_finite() && row.rounds > 2)?;
            Some(format!("{} {mean:+.2} s ± {half:.2}", row.way))
        })
        .collect();
    if !pairs.is_empty() {
        println!("over the local boot of the same round, mean and 95 % interval of pairs:");
        for pair in pairs.chunks(3) {
            println!("  {}", pair.join("; "));
        }
    }
}

/// The goals of one node, and who was beaten in time waited.
///
/// The bound is of the link alone, so that what is held against it is how long reads waited for what was not there. The
/// replayer's clock has besides what every answer takes, also of an image that is here.
fn goals(rows: &Rows) {
    let Some(ours) = rows.row(BOOTCACHE) else { return };
    let (Some(reads), Some(waited)) = (ours.reads, ours.waited()) else { return };
    if rows.nodes == 1 {
        let allowed = if rows.goodput_mbit > 300.0 { 0.1 } else { 0.25 };
        let blocked = ours.blocked.unwrap_or(reads);
        let over = blocked - rows.bound;
        let verdict = if over <= allowed { "met" } else { "MISSED" };
        println!(
            "goal: reads wait for bytes at most {allowed} s over the bound: {blocked:.2} s, {over:+.2} s, {verdict}"
        );
        if let Some(here) = rows.row(HAS_IMAGE).and_then(|row| row.reads) {
            println!("  for answers in all {reads:.2} s; with the image here {here:.2} s");
        }
    }
    let rivals = || rows.rows.iter().filter(|row| !row.way.starts_with(BOOTCACHE) && row.way != LOCAL);
    let better: Vec<String> = rivals()
        .filter(|row| row.waited().is_some_and(|theirs| theirs < waited))
        .map(|row| format!("{} by {:.2} s", row.way, waited - row.waited().unwrap_or(waited)))
        .collect();
    print!("time waited (ready and reads): {waited:.2} s");
    if rivals().next().is_none() {
        println!("; no alternative was measured here");
    } else if rivals().all(|row| row.waited().is_none()) {
        println!("; nobody counts it for real guests of the alternatives");
        by_the_clock(ours, rivals());
    } else if better.is_empty() {
        println!(", less than every alternative measured here");
    } else {
        println!("; NOT beaten: {}", better.join(", "));
    }
}

/// Who was quicker than `ours`, where the clock is all there is, and how far apart the boots of one way are.
fn by_the_clock<'a>(ours: &'a Row, rivals: impl Iterator<Item = &'a Row> + Clone) {
    let spread = rivals.clone().chain([ours]).map(|row| row.most - row.least).fold(0.0, f64::max);
    let quicker: Vec<String> = rivals
        .filter(|row| row.seconds < ours.seconds)
        .map(|row| format!("{} by {:.2} s", row.way, ours.seconds - row.seconds))
        .collect();
    match quicker.is_empty() {
        true => println!("by the clock less than every alternative measured here"),
        false => println!(
            "by the clock NOT beaten: {}; boots of one way are up to {spread:.2} s apart",
            quicker.join(", ")
        ),
    }
}

fn failures(results: &Results) {
    for record in results.records.iter().filter(|record| record.boot.is_none()) {
        println!("failed: {}: {}", record.way, record.error.as_deref().unwrap_or("for no reason told"));
    }
}

/// Programs, their versions and the command lines of each way, as they ran.
pub(crate) fn commands(all: &[Results]) {
    let Some(head) = all.iter().find_map(|results| results.head.as_ref()) else { return };
    println!("machine: {}", head.machine);
    for version in &head.versions {
        println!("  {version}");
    }
    println!("\ncommand lines (GOLDEN: the raw disk, STORE: the origin's store, TMP: a temporary folder):");
    for way in &WAYS {
        let ran = |results: &Results| results.of(way.name).find(|record| record.boot.is_some()).cloned();
        let Some(record) = all.iter().find_map(ran) else { continue };
        println!("\n{}", way.name);
        for line in &record.commands {
            println!("  {line}");
        }
    }
}
