//! The properties that the topology promises, each over many nodes.

use super::super::{Has, Load, Weights, by_name};
use super::*;

const ORIGIN: PeerKey = PeerKey(0);

/// `count` nodes that have the stream up to `position`, and an origin.
struct Burst {
    relay: Relay,
    roster: Roster,
    candidates: BTreeMap<PeerKey, Candidate>,
    nodes: Vec<PeerKey>,
}

impl Burst {
    fn of(count: u64, position: u32) -> Self {
        let relay = Relay::default();
        let nodes: Vec<PeerKey> = (1..=count).map(|node| PeerKey(mix(node))).collect();
        let mut roster = Roster::new(&relay);
        roster.extend(nodes.iter().copied());
        let mut candidates: BTreeMap<PeerKey, Candidate> =
            nodes.iter().map(|node| (*node, Candidate::new(*node, Has::Stream(position), false))).collect();
        candidates.insert(ORIGIN, Candidate::new(ORIGIN, Has::Complete, true));
        Self { relay, roster, candidates, nodes }
    }

    fn set(&mut self, node: PeerKey, has: Has) {
        self.candidates.get_mut(&node).unwrap().has = has;
    }

    /// Whom `me` asks for each of `frames`, knowing everybody.
    fn assign(&self, me: PeerKey, position: u32, frames: &[u32]) -> Vec<Assignment> {
        let chooser = by_name("least-load", &Weights::default()).unwrap();
        let mut candidates = self.candidates.clone();
        let asker = Asker { me, position, roster: &self.roster, now_ms: 0 };
        self.relay.assign(asker, frames, &mut candidates, chooser.as_ref(), &mut Draw::new(me.0))
    }

    fn parent(&self, me: PeerKey, position: u32, frame: u32) -> PeerKey {
        self.assign(me, position, &[frame])[0].source
    }
}

#[test]
fn in_a_burst_the_origin_sends_each_frame_once_and_every_node_is_reached() {
    for count in [1, 3, 16, 200] {
        let burst = Burst::of(count, 0);
        for frame in 0..64 {
            let mut parents: BTreeMap<PeerKey, PeerKey> = BTreeMap::new();
            for node in &burst.nodes {
                parents.insert(*node, burst.parent(*node, 0, frame));
            }
            let from_origin = parents.values().filter(|parent| **parent == ORIGIN).count();
            assert_eq!(from_origin, 1, "{count} nodes, frame {frame}");
            for node in &burst.nodes {
                let hops = std::iter::successors(Some(*node), |at| parents.get(at).copied()).take(40).count();
                let depth_max = 4 + 2 * count.ilog2() as usize;
                assert!(hops <= depth_max, "{hops} hops of {count} nodes: a circle or a chain");
            }
        }
    }
}

#[test]
fn every_node_sends_about_as_much_as_it_receives() {
    let burst = Burst::of(100, 0);
    let frames: Vec<u32> = (0..640).collect();
    let mut sent: BTreeMap<PeerKey, usize> = BTreeMap::new();
    for node in &burst.nodes {
        for assignment in burst.assign(*node, 0, &frames) {
            *sent.entry(assignment.source).or_default() += 1;
        }
    }
    assert_eq!(sent.remove(&ORIGIN), Some(640));
    let most = sent.values().max().unwrap();
    assert!(*most < 640 * 2, "{most} of a mean of {}", 640 * 99 / 100);
    assert!(sent.len() >= 99);
}

#[test]
fn nodes_that_know_different_others_never_wait_in_a_circle() {
    let burst = Burst::of(30, 0);
    for frame in 0..64 {
        let mut waits: BTreeMap<PeerKey, PeerKey> = BTreeMap::new();
        for (at, me) in burst.nodes.iter().enumerate() {
            let mut view = Burst::of(30, 0);
            for (other_at, other) in burst.nodes.iter().enumerate() {
                if other != me && (at * 7 + other_at * 3) % 4 == 0 {
                    view.roster.remove(*other);
                    view.candidates.remove(other);
                }
            }
            waits.insert(*me, view.parent(*me, 0, frame));
        }
        for node in &burst.nodes {
            let end = std::iter::successors(Some(*node), |at| waits.get(at).copied()).take(100).last();
            assert_eq!(end, Some(ORIGIN), "frame {frame}");
        }
    }
}

#[test]
fn a_node_that_is_behind_is_never_waited_for() {
    let mut burst = Burst::of(20, 500);
    let slow = burst.nodes[3];
    burst.set(slow, Has::Stream(100));
    for me in burst.nodes.iter().filter(|node| **node != slow) {
        let frames: Vec<u32> = (500..600).collect();
        assert!(burst.assign(*me, 500, &frames).iter().all(|assignment| assignment.source != slow));
    }
}

#[test]
fn a_late_comer_costs_the_origin_nothing() {
    let mut burst = Burst::of(20, 500);
    let late = burst.nodes[7];
    burst.set(late, Has::Stream(0));
    let frames: Vec<u32> = (0..128).collect();
    let assignments = burst.assign(late, 0, &frames);
    assert_eq!(assignments.len(), 128);
    assert!(assignments.iter().all(|assignment| assignment.source != ORIGIN && assignment.source != late));
    let sources: std::collections::BTreeSet<PeerKey> = assignments.iter().map(|a| a.source).collect();
    assert!(sources.len() > 10, "spread over those who have it");
}

#[test]
fn without_relay_everybody_asks_the_origin() {
    let burst = Burst::of(5, 10);
    let chooser = by_name("origin-only", &Weights::default()).unwrap();
    let asker = Asker { me: burst.nodes[0], position: 0, roster: &burst.roster, now_ms: 0 };
    let mut candidates = burst.candidates.clone();
    let assignments =
        burst.relay.assign(asker, &[0, 1, 2], &mut candidates, chooser.as_ref(), &mut Draw::new(1));
    assert!(assignments.iter().all(|assignment| assignment.source == ORIGIN) && assignments.len() == 3);
}

#[test]
fn a_source_that_rests_loses_its_children_to_its_siblings() {
    let mut burst = Burst::of(20, 0);
    let me = burst.nodes[5];
    let before = burst.parent(me, 0, 9);
    assert_ne!(before, ORIGIN);
    burst.candidates.get_mut(&before).unwrap().seen.failed(0);
    let after = burst.parent(me, 0, 9);
    assert!(after != before && after != me);
}

#[test]
fn a_node_that_says_it_is_full_is_passed_over_by_its_children_and_by_the_ledger() {
    let mut burst = Burst::of(20, 0);
    let me = burst.nodes[5];
    let before = burst.parent(me, 0, 9);
    burst.candidates.get_mut(&before).unwrap().load =
        Load::new([(Item::NETWORK, backlog_load(30 << 20, 100 << 20))]);
    assert_ne!(burst.parent(me, 0, 9), before);
    let mut ledger = Ledger::new(&burst.relay);
    ledger.ask(9, before);
    ledger.set_full(before, true);
    assert_eq!(ledger.ask(9, me), Answer::Send);
    ledger.set_full(before, false);
    assert!(matches!(ledger.ask(9, PeerKey(77)), Answer::Ask(_)));
}

#[test]
fn a_backlog_is_a_load_relative_to_what_the_link_carries() {
    let fast = 100 << 20;
    assert_eq!(backlog_load(0, fast), 0.0);
    assert_eq!(backlog_load(fast / 8, fast), 0.5);
    assert!(is_full_load(backlog_load(fast / 4, fast)) && !is_full_load(backlog_load(fast / 4, 10 * fast)));
    // On a slow link the windows of those who ask take longer than that, and are not too much.
    let slow = 3 << 20;
    assert!(
        !is_full_load(backlog_load(window(slow), slow)) && is_full_load(backlog_load(2 * window(slow), slow))
    );
    assert_eq!((window(11_760_000), window(117_600_000)), (2 << 20, 4_200_000));
}

#[test]
fn failover_asks_only_who_has_it_and_never_who_was_tried() {
    let mut burst = Burst::of(4, 10);
    let [me, one, two, three] = burst.nodes[..] else { unreachable!() };
    burst.set(one, Has::Stream(12));
    burst.set(two, Has::Stream(11));
    burst.set(three, Has::Answer(false));
    let chooser = by_name("least-load", &Weights::default()).unwrap();
    let mut again = |tried: &[PeerKey]| {
        let asker = Asker { me, position: 10, roster: &burst.roster, now_ms: 0 };
        burst.relay.again(asker, 11, tried, &mut burst.candidates, chooser.as_ref(), &mut Draw::new(1))
    };
    assert_eq!(again(&[]), Some(one));
    assert_eq!(again(&[one]), Some(ORIGIN));
    assert_eq!(again(&[one, ORIGIN]), None);
}

#[test]
fn a_node_that_joins_moves_only_its_own_neighbours() {
    let burst = Burst::of(50, 0);
    let mut grown = Burst::of(50, 0);
    let new = PeerKey(mix(1_000_000));
    grown.roster.insert(new);
    grown.candidates.insert(new, Candidate::new(new, Has::Stream(0), false));
    for stripe in 0..64 {
        let order =
            |b: &Burst| -> Vec<PeerKey> { b.roster.orders[stripe].iter().map(|(_, peer)| *peer).collect() };
        let without: Vec<PeerKey> = order(&grown).into_iter().filter(|peer| *peer != new).collect();
        assert_eq!(without, order(&burst));
    }
    grown.roster.remove(new);
    assert_eq!(grown.roster.len(), 50);
}

#[test]
fn what_is_relevant_is_enough_to_choose_a_parent() {
    let burst = Burst::of(300, 0);
    for me in burst.nodes.iter().take(40) {
        for frame in [0, 13, 63] {
            let relevant: Vec<PeerKey> = burst.relay.relevant(&burst.roster, *me, frame).collect();
            assert!(relevant.len() < 40 && !relevant.contains(me));
            let mut view = Burst::of(300, 0);
            view.candidates.retain(|peer, _| relevant.contains(peer) || *peer == ORIGIN);
            assert_eq!(view.parent(*me, 0, frame), burst.parent(*me, 0, frame));
        }
    }
}

#[test]
fn the_origin_sends_a_frame_once_and_again_only_to_who_insists() {
    let mut ledger = Ledger::new(&Relay::default());
    let peer = PeerKey;
    assert_eq!(ledger.ask(4, peer(1)), Answer::Send);
    for n in 2..=30 {
        let Answer::Ask(PeerKey(other)) = ledger.ask(4, peer(n)) else { panic!("{n} was served") };
        assert!(other < n, "{n} was pointed to {other}, which asked later");
    }
    assert_eq!(ledger.ask(5, peer(2)), Answer::Send);
    assert_eq!(ledger.ask(4, peer(3)), Answer::Send);
    ledger.forget(peer(1));
    assert!((100..200).all(|n| ledger.ask(4, peer(n)) != Answer::Ask(peer(1))));
}

/// A slow node that was pointed to for every third frame held up two others, each of which came back for each of them.
#[test]
fn the_origin_points_less_to_who_failed_others() {
    let mut ledger = Ledger::new(&Relay::default());
    let (slow, good, asks) = (PeerKey(1), PeerKey(2), PeerKey(3));
    let mut pointed = 0;
    for frame in 0..300 {
        ledger.ask(frame, slow);
        ledger.ask(frame, good);
        if ledger.ask(frame, asks) == Answer::Ask(slow) {
            pointed += 1;
            assert_eq!(ledger.ask(frame, asks), Answer::Send);
        }
    }
    assert!((1..100).contains(&pointed), "{pointed}");
}

#[test]
fn the_origin_points_to_everybody_about_equally_though_some_always_ask_first() {
    let mut ledger = Ledger::new(&Relay::default());
    let mut pointed = [0_u32; 16];
    for frame in 0..300 {
        for n in 0..16 {
            if let Answer::Ask(PeerKey(other)) = ledger.ask(frame, PeerKey(n)) {
                pointed[usize::try_from(other).unwrap()] += 1;
            }
        }
    }
    // The last to ask is never pointed to.
    assert!(pointed[..13].iter().max() < Some(&(300 * 3 / 2)), "{pointed:?}");
}
