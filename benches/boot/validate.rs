//! The replayer against real guests on the same link: does a replayed boot wait as long as the boot that it stands for?
//!
//! What both can be asked is how long bootcache let a read wait; and how much longer than a local boot each way took,
//! which for real guests is as noisy as their processor time.

use super::results::Results;
use super::rows::Rows;
use super::setting::Play;
use super::ways::LOCAL;

/// The goal: within this share of the real guest's, or this many seconds.
const SHARE: f64 = 0.05;
const SECONDS: f64 = 0.05;

/// Prints every setting in which both were measured.
pub(crate) fn print(all: &[Results]) {
    for real in all {
        let Some(head) = &real.head else { continue };
        if head.setting.play == Play::Guest {
            let mut wanted = head.setting.clone();
            wanted.play = Play::Replay;
            let replayed =
                all.iter().find(|other| other.head.as_ref().is_some_and(|head| head.setting == wanted));
            if let (Some(real), Some(replayed)) = (Rows::of(real), replayed.and_then(Rows::of)) {
                compare(&real, &replayed);
            }
        }
    }
}

fn compare(real: &Rows, replayed: &Rows) {
    println!("the replayer against {}", real.title);
    println!("{:<26} {:>22} {:>24}", "", "reads waited", "longer than local");
    println!("{:<26} {:>7} {:>7} {:>7} {:>8} {:>7}", "way", "real", "replay", "error", "real", "replay");
    for row in &real.rows {
        let Some(other) = replayed.row(&row.way).filter(|_| row.way != LOCAL) else { continue };
        let waits = row.blocked.zip(other.blocked).map(|(real, replay)| {
            let error = replay - real;
            let verdict = if error.abs() <= SECONDS.max(SHARE * real) { "" } else { " !" };
            format!("{real:>6.2}s {replay:>6.2}s {error:>+6.2}s{verdict}")
        });
        let longer = |rows: &Rows, seconds: f64| rows.row(LOCAL).map_or(0.0, |local| seconds - local.seconds);
        println!(
            "{:<26} {:<24} {:>+6.2}s {:>+6.2}s",
            row.way,
            waits.unwrap_or_else(|| format!("{:>7} {:>7} {:>7}", "-", "-", "-")),
            longer(real, row.seconds),
            longer(replayed, other.seconds)
        );
    }
    println!("goal: within {:.0} % or {SECONDS} s of waiting; ! is beyond it\n", SHARE * 100.0);
}
