//! The simulator against the clock: its parameters are fixed from the boots of one node alone, then it says how long
//! three and sixteen nodes take, and some of them with a slow one.

use std::path::Path;

use bootcache::choose::{Weights, by_name};
use bootcache::simulate::{Profile, Scenario, simulate};

use super::boot::Boot;
use super::golden::golden;
use super::plan::Step;
use super::results::Results;
use super::rows::Rows;
use super::setting::Setting;
use super::statistics::median;
use super::ways::{BOOTCACHE, SLOW_NODE};

/// The goal, in per cent.
const GOAL: f64 = 15.0;
/// The order of nodes is drawn anew by each; the middle result counts.
const SEEDS: u64 = 15;

/// What is predicted: nodes and way.
pub(crate) const CASES: [(usize, &str); 4] =
    [(3, BOOTCACHE), (16, BOOTCACHE), (3, SLOW_NODE), (16, SLOW_NODE)];

/// What must be measured for it.
pub(crate) fn steps(one: &Setting, rounds: usize) -> Vec<Step> {
    let step = |nodes, way: &str| Step::asked(Setting { nodes, ..one.clone() }, rounds, &[way.to_owned()]);
    std::iter::once(step(1, BOOTCACHE)).chain(CASES.iter().map(|(nodes, way)| step(*nodes, way))).collect()
}

/// What one node alone tells of the machine; times are those of its clock, in ms.
struct Fixed {
    /// Payload bytes a second.
    goodput: u64,
    /// From the order until the guest sends its first read.
    guest_ms: f64,
    /// By how much the stream begins before that.
    lead_ms: f64,
}

/// Prints the table of errors; nothing if one node was not measured.
pub(crate) fn print(folder: &Path, one: &Setting) {
    let results = Results::open(folder, one);
    let (Some(head), Some(rows)) = (&results.head, Rows::of(&results)) else { return };
    let slow = f64::from(one.slow);
    let store = golden(&one.guest);
    let entry = bootcache::store::Store::open(&store)
        .and_then(|store| store.resolve(&"golden".parse().expect("a name")))
        .expect("the golden store has the image");
    let cache =
        bootcache::boot_cache::BootCache::open(&entry.boot_path(), entry.root).expect("a sound boot cache");
    let profile = stretched(&Profile::of(cache.heads()), one.clock_speed());
    let boots: Vec<&Boot> = results.boots(BOOTCACHE).into_iter().map(|(_, boot)| boot).collect();
    if boots.is_empty() {
        return;
    }
    let fixed = fix(&boots, head.local_ms, rows.goodput_mbit * 125_000.0 / slow, &profile);
    println!("the simulator against the clock: {}", one.title());
    println!(
        "fixed from one node alone: goodput {:.1} Mbit/s, the guest's first read {:.2} s after the order, the stream's\n\
         first frame asked for {:.2} s before that (times divided by {slow})",
        rows.goodput_mbit,
        fixed.guest_ms / 1000.0 / slow,
        fixed.lead_ms / 1000.0 / slow,
    );
    println!("{:<34} {:>9} {:>10} {:>8} {:>9}", "last boot", "measured", "predicted", "error", "busy");
    let cases = std::iter::once((1, BOOTCACHE)).chain(CASES);
    for (nodes, way) in cases {
        let measured = Results::open(folder, &Setting { nodes, ..one.clone() });
        let boots = measured.boots(way);
        if boots.is_empty() {
            println!("{:<34} {:>9}", format!("{nodes}: {way}"), "-");
            continue;
        }
        let clock = median(&boots.iter().map(|(_, boot)| boot.last()).collect::<Vec<_>>()) / slow;
        let busy = median(&boots.iter().map(|(_, boot)| boot.busy).collect::<Vec<_>>());
        let said = predict(&fixed, &profile, nodes, way == SLOW_NODE) / 1000.0 / slow;
        let error = (said / clock - 1.0) * 100.0;
        let verdict = if nodes == 1 {
            "fixed by it"
        } else if error.abs() <= GOAL {
            ""
        } else {
            "beyond the goal"
        };
        println!(
            "{:<34} {clock:>8.2}s {said:>9.2}s {error:>+7.1}% {:>8.0}%  {verdict}",
            format!("{nodes}: {way}"),
            busy * 100.0
        );
    }
    println!("goal: within {GOAL} %; the middle of {SEEDS} seeds\n");
}

/// The recorded boot on a clock on which it thinks `speed` times as fast.
fn stretched(profile: &Profile, speed: f64) -> Profile {
    let scale = |ms: u64| whole(ms as f64 / speed);
    let steps = profile
        .steps
        .iter()
        .map(|step| bootcache::simulate::profile::Step { due_ms: scale(step.due_ms), ..*step });
    Profile { steps: steps.collect(), end_ms: scale(profile.end_ms) }
}

/// One scalar is fitted, the stream's lead: the simulated boot of one node is then as long as the measured one.
fn fix(boots: &[&Boot], local_ms: f64, goodput: f64, profile: &Profile) -> Fixed {
    let last_ms = median(&boots.iter().map(|boot| boot.last() * 1000.0).collect::<Vec<_>>());
    let waited_ms = median(&boots.iter().filter_map(|boot| boot.waiting_ms).collect::<Vec<_>>());
    let guest_ms = (last_ms - local_ms - waited_ms).max(0.0);
    let with = |lead_ms| Fixed { goodput: whole(goodput), guest_ms, lead_ms };
    // The more the stream leads, the sooner it is over: halve until a ms is left.
    let (mut low, mut high) = (0.0, guest_ms);
    while high - low > 1.0 {
        let middle = f64::midpoint(low, high);
        if predict(&with(middle), profile, 1, false) > last_ms { low = middle } else { high = middle }
    }
    with(f64::midpoint(low, high))
}

/// When the last of `nodes` has booted, in ms after the order.
fn predict(fixed: &Fixed, profile: &Profile, nodes: usize, slow_node: bool) -> f64 {
    let chooser = by_name("least-load", &Weights::default()).expect("the default chooser");
    let last: Vec<f64> = (1..=SEEDS)
        .map(|seed| {
            let scenario = Scenario {
                nodes: u32::try_from(nodes).expect("some nodes"),
                seed,
                link: fixed.goodput,
                origin_link: fixed.goodput,
                stagger_ms: 0,
                guest_after_ms: whole(fixed.lead_ms),
                slow: if slow_node { 1.0 / nodes as f64 } else { 0.0 },
                ..Scenario::default()
            };
            simulate(&scenario, profile, chooser.as_ref()).last_ms
        })
        .collect();
    median(&last) + fixed.guest_ms - fixed.lead_ms
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "milliseconds and bytes a second"
)]
fn whole(value: f64) -> u64 {
    value.max(0.0).round() as u64
}
