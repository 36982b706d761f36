//! What the tracer adds to a read: `cargo bench --bench tracer`. Promised is at most 2 µs.
//!
//! The bench runs itself with and without the tracer, in turn, and compares the fastest of each: a million reads of
//! the image, and of another file.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Instant;

const READS: u32 = 1_000_000;
const ROUNDS: usize = 5;
const ADDED_NS_MAX: f64 = 2000.0;

fn main() -> ExitCode {
    if let Some(path) = std::env::var_os("BENCH_TRACER_READ") {
        println!("{}", read(Path::new(&path)));
        return ExitCode::SUCCESS;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (image, other) = (dir.path().join("image"), dir.path().join("other"));
    for path in [&image, &other] {
        std::fs::write(path, vec![1; 1 << 20]).expect("a file");
    }
    let mut slow = false;
    for (label, path) in [("of the image", &image), ("of another file", &other)] {
        let (mut plain, mut traced) = (f64::INFINITY, f64::INFINITY);
        for _ in 0..ROUNDS {
            plain = plain.min(run(path, None));
            traced = traced.min(run(path, Some((&image, &dir.path().join("trace")))));
        }
        let added = traced - plain;
        println!(
            "pread of 4 KiB {label:<16} {plain:7.0} ns, with the tracer {traced:7.0} ns: {added:+6.0} ns"
        );
        slow |= added > ADDED_NS_MAX;
    }
    if slow { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// Runs this program once more; ns a read.
fn run(path: &Path, traced: Option<(&Path, &Path)>) -> f64 {
    let program = std::env::current_exe().expect("a running program");
    let mut command = Command::new(&program);
    command.env("BENCH_TRACER_READ", path);
    if let Some((image, trace)) = traced {
        let _ = std::fs::remove_file(trace);
        let library = program.with_file_name("libbootcache_tracer.so");
        assert!(library.is_file(), "{} is made by cargo bench", library.display());
        command.env("LD_PRELOAD", library);
        command.env("BOOTCACHE_TRACE_IMAGE", image).env("BOOTCACHE_TRACE_OUT", trace);
    }
    let output = command.output().expect("this program runs");
    if let (Some((image, trace)), true) = (traced, output.status.success()) {
        let seen = bootcache::trace::Trace::open(trace).and_then(|trace| trace.reads());
        let expected = if path == image { u64::from(READS) } else { 0 };
        assert_eq!(seen.ok(), Some(expected), "every read was noted, and no other");
    }
    String::from_utf8_lossy(&output.stdout).trim().parse().expect("it prints a number")
}

/// A million reads of 4 KiB in the page cache; ns a read.
fn read(path: &Path) -> f64 {
    let file = File::open(path).expect("the file is there");
    let mut buffer = [0; 4096];
    let start = Instant::now();
    for index in 0..READS {
        file.read_exact_at(&mut buffer, u64::from(index % 256) * 4096).expect("the file is as long");
    }
    start.elapsed().as_secs_f64() * 1e9 / f64::from(READS)
}
