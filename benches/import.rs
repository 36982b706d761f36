//! `image add` beside what it cannot do without: `cargo bench --bench import`.
//!
//! A disk of 2 GiB with 400 MB of data, in each format, is imported in turn with `qemu-img convert` to a raw file and
//! `b3sum` of that. Promised is at most 1.3 times their time. An import is durable and leaves a digest tree too, so a
//! third column syncs what `qemu-img` wrote. `--rounds N` [5]; `--folder DIR` for the files [the temporary one].

#[path = "../tests/support/mod.rs"]
mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use support::store::bootcache;

const DISK_BYTES: u64 = 2 << 30;
const DATA_BYTES: usize = 400_000_000;
/// Data and holes take turns, a hundred times.
const PIECES: usize = 100;
const RATIO_MAX: f64 = 1.3;

/// Wall clock and processor time, of a command and all that it started.
#[derive(Clone, Copy)]
struct Cost {
    seconds: f64,
    cpu_seconds: f64,
}

fn main() -> ExitCode {
    let (mut rounds, mut folder) = (5, std::env::temp_dir());
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().unwrap_or_else(|| panic!("{argument} wants a value"));
        match argument.as_str() {
            "--rounds" => rounds = value().parse().expect("--rounds is a number"),
            "--folder" => folder = PathBuf::from(value()),
            "--bench" => {} // cargo's
            _ => panic!("unknown option {argument}: see the head of benches/import.rs"),
        }
    }
    if !support::require(&["qemu-img", "b3sum", "sync"]) {
        return ExitCode::FAILURE;
    }
    let folder = tempfile::Builder::new()
        .prefix("bootcache-bench-")
        .tempdir_in(folder)
        .expect("a folder for the files");
    let raw = folder.path().join("disk.raw");
    write_disk(&raw);
    println!(
        "a disk of 2 GiB with 400 MB of data, {rounds} rounds; medians of seconds, and of processor time\n"
    );
    println!(
        "source              image add      qemu-img convert, b3sum     ratio    the same, synced    ratio"
    );
    let mut slow = false;
    for (label, format, options) in
        [("raw", "raw", None), ("qcow2", "qcow2", None), ("qcow2, compressed", "qcow2", Some("-c"))]
    {
        let source = folder.path().join(format!("source.{format}"));
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-f", "raw", "-O", format]).args(options).arg(&raw).arg(&source);
        support::run(&mut convert);
        slow |= compare(label, format, &source, folder.path(), rounds) > RATIO_MAX;
    }
    if slow { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// Prints a line, and gives the median of the rounds' ratios. The round before the first warms the page cache.
fn compare(label: &str, format: &str, source: &Path, folder: &Path, rounds: usize) -> f64 {
    let (mut ours, mut theirs, mut synced) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..=rounds {
        let (store, target) = (folder.join("store"), folder.join("target.raw"));
        let mut add = Command::new(bootcache());
        add.args(["--store", path(&store), "image", "add", "disk", path(source), "--format", format]);
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-f", format, "-O", "raw", path(source), path(&target)]);
        let mut hash = Command::new("b3sum");
        hash.arg(&target);
        let mut sync = Command::new("sync");
        sync.arg(&target);
        // Neither pays for what the other left to the disk.
        support::run(&mut Command::new("sync"));
        let import = cost(&mut add);
        support::run(&mut Command::new("sync"));
        let both = cost(&mut convert) + cost(&mut hash);
        let durable = both + cost(&mut sync);
        std::fs::remove_dir_all(&store).expect("the store was made");
        std::fs::remove_file(&target).expect("the target was made");
        if round > 0 {
            ours.push(import);
            theirs.push(both);
            synced.push(durable);
        }
    }
    let ratio = |others: &[Cost]| {
        median(ours.iter().zip(others).map(|(ours, other)| ours.seconds / other.seconds).collect())
    };
    println!(
        "{label:<19} {}   {}          {:5.2}    {}       {:5.2}",
        shown(&ours),
        shown(&theirs),
        ratio(&theirs),
        shown(&synced),
        ratio(&synced)
    );
    ratio(&theirs)
}

/// Pieces of bytes that do not compress, with holes between them.
fn write_disk(path: &Path) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::create(path).expect("a file");
    file.set_len(DISK_BYTES).expect("a sparse file");
    for index in 0..PIECES {
        let at = DISK_BYTES / PIECES as u64 * index as u64 / 4096 * 4096;
        let piece = support::noise(index as u64 + 1, DATA_BYTES / PIECES);
        file.write_all_at(&piece, at).expect("room for it");
    }
}

fn path(path: &Path) -> &str {
    path.to_str().expect("our own path")
}

fn cost(command: &mut Command) -> Cost {
    let (began, before) = (Instant::now(), children_cpu());
    support::run(command);
    Cost { seconds: began.elapsed().as_secs_f64(), cpu_seconds: children_cpu() - before }
}

/// Of this process's children that have ended, and theirs; seconds.
fn children_cpu() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("Linux");
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    fields[13..15].iter().map(|ticks| ticks.parse::<f64>().expect("a number")).sum::<f64>() / 100.0
}

fn shown(costs: &[Cost]) -> String {
    let seconds = median(costs.iter().map(|cost| cost.seconds).collect());
    format!("{seconds:5.2} ({:5.2})", median(costs.iter().map(|cost| cost.cpu_seconds).collect()))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    f64::midpoint(values[(values.len() - 1) / 2], values[values.len() / 2])
}

impl std::ops::Add for Cost {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { seconds: self.seconds + other.seconds, cpu_seconds: self.cpu_seconds + other.cpu_seconds }
    }
}
