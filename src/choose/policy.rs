//! The choosers: of several sources that can all give what is needed, one.
//!
//! The rules that hold for every chooser – who is eligible at all – are not here but in [`super::relay`] and
//! [`eligible`]; a chooser only weighs. The default is the least weighted load, corrected by what the node sees
//! itself, of two drawn at random: with reports that are seconds old, many nodes that all took the lowest would all
//! take the same one.

use super::{Candidate, Draw, Has, Need, Weights};

/// Picks a source. Pure: what it remembers is in the [`Draw`].
pub trait Chooser: std::fmt::Debug + Send + Sync {
    /// The name by which it is asked for.
    fn name(&self) -> &'static str;

    /// The index of one of `candidates`, all of which are eligible; none only when there are none.
    fn choose(&self, need: Need, candidates: &[&Candidate], draw: &mut Draw) -> Option<usize>;

    /// Whether nodes that relay are asked at all; if not, only the origin, as long as it can be.
    fn relays(&self) -> bool {
        true
    }

    /// Puts the pages of the fill into the order in which they are to be fetched. `holders` says how many sources are
    /// known to have a page. By default as they lie on the disk.
    fn order(&self, pages: &mut [u64], holders: &dyn Fn(u64) -> usize, draw: &mut Draw) {
        let _ = (holders, draw);
        pages.sort_unstable();
    }
}

/// Names that [`by_name`] knows, the default first.
pub const NAMES: [&str; 7] =
    ["least-load", "least-load-reported", "round-robin", "random", "rarest-first", "tree", "origin-only"];

/// The chooser called `name`, with `weights` where it has a use for them.
pub fn by_name(name: &str, weights: &Weights) -> Option<Box<dyn Chooser>> {
    let weights = weights.clone();
    Some(match name {
        "least-load" => Box::new(LeastLoad { weights }),
        "least-load-reported" => Box::new(LeastLoadReported { weights }),
        "round-robin" => Box::new(RoundRobin),
        "random" => Box::new(Random),
        "rarest-first" => Box::new(RarestFirst),
        "tree" => Box::new(Tree),
        "origin-only" => Box::new(OriginOnly),
        _ => return None,
    })
}

/// The sources that `chooser` is to be offered for `need` at `now_ms`: those that have it and are not resting, the
/// origin only when no other is – or the other way round for a chooser that does not relay.
pub fn eligible<'c>(
    need: Need,
    candidates: impl IntoIterator<Item = &'c Candidate>,
    now_ms: u64,
    chooser: &dyn Chooser,
) -> Vec<&'c Candidate> {
    let ready = |c: &&Candidate| c.has.covers(need) && c.seen.is_ready(now_ms);
    let is_last = |c: &&Candidate| c.origin == chooser.relays();
    let (last, first): (Vec<_>, Vec<_>) = candidates.into_iter().filter(ready).partition(is_last);
    if first.is_empty() { last } else { first }
}

/// Least weighted load, corrected by the node's own observations, of two drawn at random.
#[derive(Debug, Clone)]
pub struct LeastLoad {
    /// What counts how much.
    pub weights: Weights,
}

impl LeastLoad {
    fn cost(&self, candidate: &Candidate) -> f32 {
        self.weights.score_aged(&candidate.load, candidate.load_age_ms) + candidate.seen.cost()
    }
}

impl Chooser for LeastLoad {
    fn name(&self) -> &'static str {
        NAMES[0]
    }

    fn choose(&self, _need: Need, candidates: &[&Candidate], draw: &mut Draw) -> Option<usize> {
        match candidates.len() {
            0 => None,
            1 => Some(0),
            count => {
                let one = draw.below(count);
                let other = (one + 1 + draw.below(count - 1)) % count;
                let better = self.cost(candidates[other]) < self.cost(candidates[one]);
                Some(if better { other } else { one })
            }
        }
    }
}

/// Least weighted load as reported, of all: the rule of the thesis, to compare with.
#[derive(Debug, Clone)]
pub struct LeastLoadReported {
    /// What counts how much.
    pub weights: Weights,
}

impl Chooser for LeastLoadReported {
    fn name(&self) -> &'static str {
        NAMES[1]
    }

    fn choose(&self, _need: Need, candidates: &[&Candidate], _draw: &mut Draw) -> Option<usize> {
        let score = |index: &usize| self.weights.score(&candidates[*index].load);
        (0..candidates.len()).min_by(|a, b| score(a).total_cmp(&score(b)))
    }
}

/// Each in turn.
#[derive(Debug, Clone, Copy)]
pub struct RoundRobin;

impl Chooser for RoundRobin {
    fn name(&self) -> &'static str {
        NAMES[2]
    }

    fn choose(&self, _need: Need, candidates: &[&Candidate], draw: &mut Draw) -> Option<usize> {
        let count = candidates.len() as u64;
        draw.turn().checked_rem(count).map(|index| usize::try_from(index).expect("less than a length"))
    }
}

/// Any.
#[derive(Debug, Clone, Copy)]
pub struct Random;

impl Chooser for Random {
    fn name(&self) -> &'static str {
        NAMES[3]
    }

    fn choose(&self, _need: Need, candidates: &[&Candidate], draw: &mut Draw) -> Option<usize> {
        (!candidates.is_empty()).then(|| draw.below(candidates.len()))
    }
}

/// Any source, but the pages that fewest have first, so that no page stays with one source alone. Of the boot stream,
/// whose order is the guest's, it changes nothing but to prefer the source that has least.
#[derive(Debug, Clone, Copy)]
pub struct RarestFirst;

impl Chooser for RarestFirst {
    fn name(&self) -> &'static str {
        NAMES[4]
    }

    fn choose(&self, _need: Need, candidates: &[&Candidate], draw: &mut Draw) -> Option<usize> {
        let amount = |candidate: &Candidate| match candidate.has {
            Has::Stream(position) => position,
            Has::Answer(_) => u32::MAX - 1,
            Has::Complete => u32::MAX,
        };
        let least = candidates.iter().map(|candidate| amount(candidate)).min()?;
        let poorest: Vec<usize> = (0..candidates.len()).filter(|i| amount(candidates[*i]) == least).collect();
        Some(poorest[draw.below(poorest.len())])
    }

    fn order(&self, pages: &mut [u64], holders: &dyn Fn(u64) -> usize, draw: &mut Draw) {
        for end in (1..pages.len()).rev() {
            pages.swap(end, draw.below(end + 1));
        }
        pages.sort_by_cached_key(|page| holders(*page));
    }
}

/// The first that is offered: with [`super::Relay::tree`], which offers the parent first, a fixed tree.
#[derive(Debug, Clone, Copy)]
pub struct Tree;

impl Chooser for Tree {
    fn name(&self) -> &'static str {
        NAMES[5]
    }

    fn choose(&self, _need: Need, candidates: &[&Candidate], _draw: &mut Draw) -> Option<usize> {
        (!candidates.is_empty()).then_some(0)
    }
}

/// The origin, as without any relay; another only when the origin cannot be asked.
#[derive(Debug, Clone, Copy)]
pub struct OriginOnly;

impl Chooser for OriginOnly {
    fn name(&self) -> &'static str {
        NAMES[6]
    }

    fn relays(&self) -> bool {
        false
    }

    fn choose(&self, _need: Need, candidates: &[&Candidate], _draw: &mut Draw) -> Option<usize> {
        (!candidates.is_empty()).then_some(0)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Item, Load, PeerKey, Seen};
    use super::*;

    fn with_load(peer: u64, value: f32) -> Candidate {
        let load = Load::new((0..4).map(|item| (Item(item), value)));
        Candidate { load, ..Candidate::new(PeerKey(peer), Has::Complete, false) }
    }

    /// How often each of `candidates` is chosen by 1,000 nodes that know nothing but the reports.
    fn herd(chooser: &dyn Chooser, candidates: &[Candidate]) -> Vec<usize> {
        let offered: Vec<&Candidate> = candidates.iter().collect();
        let mut counts = vec![0; candidates.len()];
        for node in 0..1000 {
            counts[chooser.choose(Need::Block(0), &offered, &mut Draw::new(node)).unwrap()] += 1;
        }
        counts
    }

    #[test]
    fn a_herd_follows_the_lowest_report_but_not_the_corrected_score() {
        let candidates: Vec<Candidate> =
            (0_u8..10).map(|n| with_load(n.into(), f32::from(n) / 10.0)).collect();
        let reported = by_name("least-load-reported", &Weights::default()).unwrap();
        assert_eq!(herd(reported.as_ref(), &candidates)[0], 1000);
        let corrected = by_name("least-load", &Weights::default()).unwrap();
        let counts = herd(corrected.as_ref(), &candidates);
        assert!(counts.iter().max() < Some(&260), "{counts:?}");
        assert!(counts[0] > 3 * counts[8], "the load must still count: {counts:?}");
    }

    #[test]
    fn own_observations_outweigh_a_report() {
        let mut idle_by_report = with_load(0, 0.0);
        idle_by_report.seen = Seen { outstanding: 12, latency_ms: 80.0, ..Seen::default() };
        let busy_by_report = with_load(1, 0.8);
        let chooser = LeastLoad { weights: Weights::default() };
        let offered = [&idle_by_report, &busy_by_report];
        for seed in 0..20 {
            assert_eq!(chooser.choose(Need::Block(1), &offered, &mut Draw::new(seed)), Some(1));
        }
    }

    #[test]
    fn only_who_has_it_and_is_not_resting_is_eligible_and_the_origin_last() {
        let mut candidates = vec![
            Candidate::new(PeerKey(0), Has::Complete, true),
            Candidate::new(PeerKey(1), Has::Stream(5), false),
            Candidate::new(PeerKey(2), Has::Stream(6), false),
            Candidate::new(PeerKey(3), Has::Answer(false), false),
        ];
        let peers = |candidates: &[Candidate], need| -> Vec<u64> {
            eligible(need, candidates, 100, &Random).iter().map(|c| c.peer.0).collect()
        };
        assert_eq!(peers(&candidates, Need::Frame(5)), [2]);
        assert_eq!(peers(&candidates, Need::Frame(4)), [1, 2]);
        assert_eq!(peers(&candidates, Need::Page(4)), [0]);
        candidates[2].seen.rest(50, 51);
        assert_eq!(peers(&candidates, Need::Frame(5)), [0]);
        let without_relay = eligible(Need::Frame(1), &candidates, 100, &OriginOnly);
        assert_eq!(without_relay.iter().map(|c| c.peer.0).collect::<Vec<_>>(), [0]);
    }

    #[test]
    fn every_chooser_is_found_by_its_name_and_chooses_among_what_is_offered() {
        let candidates: Vec<Candidate> = (0..5).map(|n| with_load(n, 0.5)).collect();
        let offered: Vec<&Candidate> = candidates.iter().collect();
        for name in NAMES {
            let chooser = by_name(name, &Weights::default()).unwrap();
            assert_eq!(chooser.name(), name);
            let mut draw = Draw::new(7);
            assert!(chooser.choose(Need::Page(3), &offered, &mut draw).unwrap() < 5, "{name}");
            assert_eq!(chooser.choose(Need::Page(3), &[], &mut draw), None, "{name}");
        }
        assert!(by_name("best", &Weights::default()).is_none());
    }

    #[test]
    fn the_same_seed_makes_the_same_choices() {
        let candidates: Vec<Candidate> = (0..9).map(|n| with_load(n, 0.5)).collect();
        let offered: Vec<&Candidate> = candidates.iter().collect();
        for name in NAMES {
            let chooser = by_name(name, &Weights::default()).unwrap();
            let choices = || -> Vec<_> {
                let mut draw = Draw::new(42);
                (0..50).map(|at| chooser.choose(Need::Page(at), &offered, &mut draw)).collect()
            };
            assert_eq!(choices(), choices(), "{name}");
        }
    }

    #[test]
    fn round_robin_takes_each_in_turn_and_rarest_first_the_rare() {
        let candidates: Vec<Candidate> = (0..3).map(|n| with_load(n, 0.5)).collect();
        let offered: Vec<&Candidate> = candidates.iter().collect();
        let mut draw = Draw::new(0);
        let taken: Vec<_> =
            (0..6).filter_map(|_| RoundRobin.choose(Need::Page(0), &offered, &mut draw)).collect();
        assert_eq!(taken, [0, 1, 2, 0, 1, 2]);
        let mut pages = [1, 2, 3, 4, 5];
        RarestFirst.order(&mut pages, &|page| if page == 4 { 1 } else { 3 }, &mut draw);
        assert_eq!(pages[0], 4);
    }
}
