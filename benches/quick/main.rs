//! Instructions per operation of what every byte goes through, counted by valgrind: the same whatever else the machine
//! does, so that a regression fails a build and a busy neighbour does not.
//!
//! `make bench-quick` (`cargo bench --profile dev --bench quick`) counts each workload and compares with
//! `benches/quick/expected`; a count that is more than 8 % off, either way, is an error, or 30 % with another compiler
//! than the one named there. `-- --accept` writes the counts there instead. A workload runs in a process of its own,
//! once with no operations and once with many; the difference counts. It is the profile of the tests, so that CI has
//! built nearly all of it already: our own code is not optimised in it, so the counts tell a change, not a speed.

#[path = "../../tests/support/mod.rs"]
mod support;

mod workloads;

use std::collections::BTreeMap;
use std::process::{Command, ExitCode};

use workloads::WORKLOADS;

const TOLERANCE: f64 = 0.08;
/// With another compiler.
const TOLERANCE_ELSEWHERE: f64 = 0.3;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["run", name, operations] => {
            let workload = WORKLOADS.iter().find(|workload| workload.name == name).expect("one of ours");
            (workload.run)(operations.parse().expect("a number"));
            ExitCode::SUCCESS
        }
        [] | ["--accept"] if !support::require(&["valgrind"]) => ExitCode::SUCCESS,
        [] => compare(&count_all()),
        ["--accept"] => {
            let lines: Vec<String> =
                count_all().iter().map(|(name, count)| format!("{name} {count}\n")).collect();
            std::fs::write(expected_path(), format!("{}\n{}", compiler(), lines.concat()))
                .expect("the checkout is writable");
            ExitCode::SUCCESS
        }
        _ => panic!("no argument, or --accept"),
    }
}

fn expected_path() -> std::path::PathBuf {
    support::checkout("benches/quick/expected")
}

/// `rustc 1.95.0`.
fn compiler() -> String {
    let said = support::run(Command::new("rustc").arg("--version"));
    said.split_whitespace().take(2).collect::<Vec<_>>().join(" ")
}

/// Instructions per operation by name.
fn count_all() -> BTreeMap<&'static str, u64> {
    let count = |workload: &workloads::Workload| {
        let (none, all) = (instructions(workload.name, 0), instructions(workload.name, workload.operations));
        (all.saturating_sub(none)) / u64::from(workload.operations)
    };
    WORKLOADS.iter().map(|workload| (workload.name, count(workload))).collect()
}

/// What callgrind says a process that does so many operations executes.
fn instructions(name: &str, operations: u32) -> u64 {
    let mut command = Command::new("valgrind");
    command.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]);
    command.arg(std::env::current_exe().expect("a running program has a path"));
    command.args(["run", name, &operations.to_string()]);
    let output = command.output().expect("valgrind was found");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name}: {said}");
    let counted = said.lines().find_map(|line| line.split_once("Collected :")?.1.trim().parse().ok());
    counted.unwrap_or_else(|| panic!("{name}: no count in\n{said}"))
}

fn compare(counts: &BTreeMap<&str, u64>) -> ExitCode {
    let text = std::fs::read_to_string(expected_path()).expect("benches/quick/expected is in the checkout");
    let (stored_by, text) = text.split_once('\n').expect("its first line names a compiler");
    let tolerance = if stored_by == compiler() { TOLERANCE } else { TOLERANCE_ELSEWHERE };
    println!("stored by {stored_by}, this is {}: {:.0} % may differ", compiler(), tolerance * 100.0);
    let expected: BTreeMap<&str, u64> = text
        .lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(name, count)| (name, count.parse().expect("a number")))
        .collect();
    let mut good = true;
    println!("{:<26} {:>14} {:>14}", "instructions of", "counted", "expected");
    for (name, &count) in counts {
        let verdict = match expected.get(name) {
            None => "  new: run with --accept".to_owned(),
            Some(&before) => {
                let change = count as f64 / before as f64 - 1.0;
                if change.abs() <= tolerance { String::new() } else { format!("  {:+.1} %", change * 100.0) }
            }
        };
        good &= verdict.is_empty();
        println!("{name:<26} {count:>14} {:>14}{verdict}", expected.get(name).copied().unwrap_or_default());
    }
    if good {
        return ExitCode::SUCCESS;
    }
    println!(
        "`cargo bench --profile dev --bench quick -- --accept` takes the new counts; say why in the commit"
    );
    ExitCode::FAILURE
}
