//! What the relay promises, at the scale at which it is used; each with its seed.

use super::*;
use crate::choose::{Weights, by_name};

fn run(scenario: &Scenario, profile: &Profile, chooser: &str) -> Report {
    simulate(scenario, profile, by_name(chooser, &Weights::default()).unwrap().as_ref())
}

/// The fast Debian of the measurements: 16 MB on the wire, 4.6 s.
fn debian() -> Profile {
    Profile::synthetic(16_300_000, 4600)
}

fn at_100_megabits(nodes: u32) -> Scenario {
    Scenario { nodes, link: payload(100), origin_link: payload(100), stagger_ms: 20, ..Scenario::default() }
}

#[test]
fn the_same_seed_gives_the_same_result_and_another_seed_another() {
    let scenario = Scenario { slow: 0.1, dying: 0.1, ..at_100_megabits(20) };
    let report = run(&scenario, &debian(), "least-load");
    assert_eq!(report, run(&scenario, &debian(), "least-load"));
    assert_ne!(report, run(&Scenario { seed: 2, ..scenario }, &debian(), "least-load"));
}

#[test]
fn one_node_waits_no_longer_than_it_must() {
    let report = run(&at_100_megabits(1), &debian(), "least-load");
    assert!(report.last_ms < report.bound_ms + 50.0, "{report:?}");
    assert!((report.origin_copies - 1.0).abs() < 1e-9);
}

#[test]
fn three_and_sixteen_nodes_at_once_are_nearly_as_quick_as_one() {
    for (nodes, allowed) in [(3, 1.15), (16, 1.25)] {
        let report = run(&at_100_megabits(nodes), &debian(), "least-load");
        let one = run(&at_100_megabits(1), &debian(), "least-load");
        assert!(report.max_ms < one.max_ms * allowed, "{nodes}: {report:?}");
        assert!(report.origin_copies < 1.3, "{nodes}: {report:?}");
    }
}

#[test]
fn a_hundred_nodes_with_slow_and_dying_ones_among_them_all_boot() {
    let profile = Profile::synthetic(100_000_000, 3000);
    // With this seed a slow node was the only one beside the origin to have some frames, while nobody asked the origin
    // again that had pointed to it: 1.63 times the bound, and 7.4 with a thousand nodes of seed 1.
    let scenario = Scenario { nodes: 100, slow: 0.05, dying: 0.05, seed: 3, ..Scenario::default() };
    let report = run(&scenario, &profile, "least-load");
    assert_eq!(report.stuck, 0, "{report:?}");
    assert!(report.died > 0 && report.last_ms < report.bound_ms * 1.6, "{report:?}");
    assert!(report.origin_copies < 2.0, "{report:?}");
}

#[test]
fn a_thousand_nodes_take_little_longer_than_one_and_cost_the_origin_about_one_copy() {
    let profile = Profile::synthetic(40_000_000, 3000);
    let report = run(&Scenario::default(), &profile, "least-load");
    assert_eq!((report.booted, report.stuck), (1000, 0), "{report:?}");
    assert!(report.last_ms < report.bound_ms * 1.3 && report.origin_copies < 2.0, "{report:?}");
    let scenario = Scenario { slow: 0.05, ..Scenario::default() };
    let report = run(&scenario, &profile, "least-load");
    assert!(report.last_ms < report.bound_ms * 1.6 && report.origin_copies < 2.0, "{report:?}");
}

/// Two others waited for a node that sends at a tenth for every third frame, each of them several times as long as it
/// takes to get a frame elsewhere: 1.4 times the boot without it when measured, 2.1 in one of three rounds.
#[test]
fn a_slow_node_among_three_is_soon_left_alone() {
    for link in [25, 100, 1000] {
        for seed in 1..=8 {
            let (link, origin_link) = (payload(link), payload(link));
            let scenario = Scenario {
                nodes: 3,
                slow: 0.34,
                seed,
                link,
                origin_link,
                stagger_ms: 20,
                ..Scenario::default()
            };
            let bytes = link / 2 * 3;
            let report = run(&scenario, &Profile::synthetic(bytes, 5000), "least-load");
            assert!(report.last_ms < report.bound_ms * 1.5, "seed {seed}: {report:?}");
            assert!(report.origin_copies < 2.5, "seed {seed}: {report:?}");
        }
    }
}

#[test]
fn without_relay_the_origin_sends_a_copy_to_each() {
    let report = run(&at_100_megabits(4), &debian(), "origin-only");
    assert!(report.origin_copies >= 4.0 && report.last_ms > 1.3 * report.bound_ms, "{report:?}");
}

#[test]
fn when_the_origin_falls_silent_nobody_gets_a_frame_that_nobody_has() {
    let scenario = Scenario { origin_dies_ms: Some(300), ..at_100_megabits(3) };
    let report = simulate_briefly(&scenario);
    assert_eq!((report.booted, report.stuck), (0, 3));
}

fn simulate_briefly(scenario: &Scenario) -> Report {
    run(scenario, &Profile::synthetic(8_000_000, 1000), "least-load")
}

#[test]
fn a_stream_that_leads_its_guest_is_waited_for_that_much_less() {
    let profile = Profile::synthetic(30_000_000, 2000);
    let with = |guest_after_ms| {
        let scenario = Scenario { guest_after_ms, ..at_100_megabits(1) };
        run(&scenario, &profile, "least-load").max_ms
    };
    assert!(with(0) > 2400.0 && (with(300) - with(0)).abs() < 20.0, "both wait for the same frame");
    assert!((with(3000) - 5000.0).abs() < 20.0, "nothing is left to wait for: {}", with(3000));
}
