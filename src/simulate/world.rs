//! The course of a simulation: one event after another.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use super::events::{Event, Events};
use super::links::Links;
use super::node::{Ask, Life, Node};
use super::report::{Report, jain, percentile};
use super::{Profile, Scenario};
use crate::choose::relay::{Answer, backlog_load, is_full_load, sending_max, window};
use crate::choose::{Asker, Candidate, Chooser, Draw, Has, Item, Ledger, Load, PeerKey, Roster};

const ORIGIN: u32 = 0;
/// No boot that goes on at all takes longer.
const END_NS: u64 = 3_600_000_000_000;
/// An answer is lost when it is so many times as late as one that is late, and not before this time; this and what follows
/// is as in `transfer::request`.
const LOST_FACTOR: u32 = 4;
const LOST_MIN_NS: u64 = 3_000_000_000;
/// Hedges that are allowed beyond one to so many requests.
const HEDGES_FREE: u64 = 4;
const HEDGE_SHARE: u64 = 20;
/// A node that is gone is known to be silent after this time.
const SILENT_NS: u64 = 750_000_000;
/// Nodes looked at, at random, when somebody is wanted who has a frame.
const SAMPLE: usize = 8;

/// Owns everything that changes.
pub(super) struct World<'a> {
    scenario: &'a Scenario,
    profile: &'a Profile,
    chooser: &'a dyn Chooser,
    /// Bytes that a node has asked for and not got, at most.
    window: u64,
    events: Events,
    links: Links,
    nodes: Vec<Node>,
    by_key: HashMap<PeerKey, u32>,
    roster: Roster,
    ledger: Ledger,
    booted: u32,
    silent: u32,
    wasted: u64,
    failovers: u64,
    choices: u64,
}

impl<'a> World<'a> {
    pub(super) fn new(scenario: &'a Scenario, profile: &'a Profile, chooser: &'a dyn Chooser) -> Self {
        let mut draw = Draw::new(scenario.seed);
        let count = scenario.nodes as usize + 1;
        let key = |node: usize| PeerKey::of(&format!("{}/{node}", scenario.seed));
        let frames = profile.steps.len();
        let nodes: Vec<Node> = (0..count)
            .map(|node| Node::new(key(node), frames, scenario.seed ^ (node as u64) << 20))
            .collect();
        let mut slow = vec![false; count];
        for node in drawn(count, scenario.slow, &mut draw) {
            slow[node] = true;
        }
        let mut world = Self {
            scenario,
            profile,
            chooser,
            window: scenario.window.unwrap_or_else(|| window(scenario.link)),
            events: Events::default(),
            links: Links::new(scenario, &slow),
            by_key: nodes.iter().zip(0..).map(|(node, number)| (node.key, number)).collect(),
            nodes,
            roster: Roster::new(&scenario.relay),
            ledger: Ledger::new(&scenario.relay),
            booted: 0,
            silent: 0,
            wasted: 0,
            failovers: 0,
            choices: 0,
        };
        world.plan(&mut draw);
        world
    }

    /// Everything that happens whatever the nodes do.
    fn plan(&mut self, draw: &mut Draw) {
        let scenario = self.scenario;
        let origin = &mut self.nodes[ORIGIN as usize];
        origin.life = Life::Up;
        for frame in 0..self.profile.steps.len() {
            origin.have.insert(number(frame));
        }
        for node in 1..=scenario.nodes {
            let start_us = draw.below(usize::try_from(scenario.stagger_ms * 1000 + 1).expect("milliseconds"));
            self.events.at(start_us as u64 * 1000, Event::Start(node));
        }
        let half_ms = usize::try_from(self.profile.end_ms / 2 + 1).expect("milliseconds");
        for node in drawn(self.nodes.len(), scenario.dying, draw) {
            let after_ms = scenario.stagger_ms + draw.below(half_ms) as u64;
            self.events.at(after_ms * 1_000_000, Event::Dies(number(node)));
        }
        if let Some(at_ms) = scenario.origin_dies_ms {
            self.events.at(at_ms * 1_000_000, Event::Dies(ORIGIN));
        }
        self.events.at(0, Event::Positions);
        self.events.at(0, Event::Loads);
    }

    pub(super) fn run(mut self) -> Report {
        while let Some(event) = self.events.next() {
            if self.booted + self.silent >= self.scenario.nodes || self.events.now_ns() > END_NS {
                break;
            }
            match event {
                Event::Start(node) => self.start(node),
                Event::LinkFree(node) => self.send_next(node),
                Event::Arrived { node, frame, from } => self.arrived(node, frame, from),
                Event::Pointed { node, frame, to } => self.pointed(node, frame, to),
                Event::Dies(node) => self.dies(node),
                Event::Positions => self.tell_positions(),
                Event::Loads => self.report_loads(),
            }
        }
        self.report()
    }

    fn start(&mut self, node: u32) {
        let now_ns = self.events.now_ns();
        let this = &mut self.nodes[node as usize];
        if this.life == Life::NotStarted {
            this.start(self.profile, now_ns, now_ns + self.scenario.guest_after_ms * 1_000_000);
            self.roster.insert(this.key);
            self.fill_window(node);
        }
    }

    fn dies(&mut self, node: u32) {
        let this = &mut self.nodes[node as usize];
        if node != ORIGIN && this.booted_ns.is_none() {
            self.silent += 1;
        }
        this.life = Life::Silent;
        this.died_ns = self.events.now_ns();
        this.queue.clear();
        this.waiting.clear();
        this.backlog = 0;
    }

    /// Asks for every frame that the window lets it ask for.
    fn fill_window(&mut self, node: u32) {
        loop {
            let this = &mut self.nodes[node as usize];
            let Some(step) = self.profile.steps.get(this.next as usize) else { return };
            if this.ahead > 0 && this.ahead + u64::from(step.length) > self.window {
                return;
            }
            let frame = this.next;
            let Some(source) = self.choose(node, frame, &[]) else { return };
            let this = &mut self.nodes[node as usize];
            this.next += 1;
            this.ahead += u64::from(step.length);
            let tried = vec![self.nodes[source as usize].key];
            self.ask(
                node,
                Ask { frame, source, second: None, at_ns: self.events.now_ns(), there_ns: None, tried },
            );
        }
    }

    fn ask(&mut self, node: u32, ask: Ask) {
        let (frame, source) = (ask.frame, ask.source);
        self.nodes[node as usize].asks.push(ask);
        if source != ORIGIN || !self.chooser.relays() {
            return self.request(node, frame, source);
        }
        match self.ledger.ask(frame, self.nodes[node as usize].key) {
            Answer::Send => self.request(node, frame, source),
            Answer::Ask(peer) => {
                let to = self.by_key[&peer];
                let at_ns = self.events.now_ns() + self.scenario.round_trip_us * 1000;
                self.events.at(at_ns, Event::Pointed { node, frame, to });
            }
        }
    }

    /// The origin pointed `node` to another. If that one was late before, the origin is asked again, and sends it.
    fn pointed(&mut self, node: u32, frame: u32, to: u32) {
        let now_ns = self.events.now_ns();
        let keys = (self.nodes[to as usize].key, self.nodes[ORIGIN as usize].key);
        let this = &mut self.nodes[node as usize];
        let insists = this.rests(to, now_ns);
        let Some(ask) = this.asks.iter_mut().find(|ask| ask.frame == frame) else { return };
        ask.at_ns = now_ns;
        if insists {
            self.ledger.ask(frame, self.nodes[node as usize].key);
            return self.request(node, frame, ORIGIN);
        }
        (ask.source, ask.there_ns) = (to, None);
        // Who points to another has not failed: when that one does, it is asked again.
        ask.tried.retain(|tried| *tried != keys.1);
        ask.tried.push(keys.0);
        self.request(node, frame, to);
    }

    /// The request reaches `source`, which sends the frame when it has it.
    fn request(&mut self, node: u32, frame: u32, source: u32) {
        self.nodes[node as usize].asked += 1;
        let peer = &mut self.nodes[source as usize];
        if peer.life != Life::Up {
            return;
        }
        peer.backlog += u64::from(self.profile.steps[frame as usize].length);
        if peer.have.contains(frame) {
            peer.queue.insert((frame, node));
            if !peer.sending {
                self.send_next(source);
            }
        } else {
            peer.waiting.push((frame, node));
        }
    }

    fn send_next(&mut self, node: u32) {
        let now_ns = self.events.now_ns();
        let this = &mut self.nodes[node as usize];
        this.sending = false;
        let Some((frame, to)) = this.queue.pop_first() else { return };
        let length = self.profile.steps[frame as usize].length;
        this.sending = true;
        this.sent += u64::from(length);
        this.backlog -= u64::from(length);
        let (free_ns, out_ns) = self.links.send(node as usize, to as usize, length, now_ns);
        self.events.at(free_ns, Event::LinkFree(node));
        let storing_ns = u64::from(length) * 1_000_000_000 / self.scenario.storing;
        let at_ns = out_ns + self.scenario.round_trip_us * 1000 + storing_ns;
        self.events.at(at_ns, Event::Arrived { node: to, frame, from: node });
    }

    fn arrived(&mut self, node: u32, frame: u32, from: u32) {
        let now_ns = self.events.now_ns();
        let this = &mut self.nodes[node as usize];
        if this.life != Life::Up {
            return;
        }
        let ask = this.take_ask(frame);
        if let Some(ask) = &ask {
            this.answered(from, now_ns - ask.at_ns);
            if ask.second == Some(from) && ask.there_ns.is_some() {
                this.demote(ask.source, now_ns);
            }
        }
        let was_booting = this.booted_ns.is_none();
        if !this.store(self.profile, frame, now_ns) {
            self.wasted += u64::from(self.profile.steps[frame as usize].length);
            return;
        }
        self.booted += u32::from(was_booting && this.booted_ns.is_some());
        let mut at = 0;
        while at < this.waiting.len() {
            if this.waiting[at].0 == frame {
                let (_, child) = this.waiting.swap_remove(at);
                this.queue.insert((frame, child));
            } else {
                at += 1;
            }
        }
        if !self.nodes[node as usize].sending {
            self.send_next(node);
        }
        let others = ask.iter().flat_map(|ask| [Some(ask.source), ask.second]).flatten();
        for other in others.filter(|other| *other != from) {
            self.cancel(node, frame, other);
        }
        self.fill_window(node);
    }

    fn tell_positions(&mut self) {
        for node in 1..=self.scenario.nodes {
            let this = &mut self.nodes[node as usize];
            if this.life == Life::Up {
                this.told_position = this.position;
                self.check_deadlines(node);
                self.fill_window(node);
            }
        }
        let next_ns = self.events.now_ns() + self.scenario.position_ms * 1_000_000;
        self.events.at(next_ns, Event::Positions);
    }

    fn report_loads(&mut self) {
        for (number, node) in self.nodes.iter_mut().enumerate() {
            node.told_load = backlog_load(node.backlog, self.links.rate(number));
            self.ledger.set_full(node.key, is_full_load(node.told_load));
        }
        let next_ns = self.events.now_ns() + self.scenario.report_ms * 1_000_000;
        self.events.at(next_ns, Event::Loads);
    }

    /// Turns to other sources for the frames whose sources are taking too long.
    fn check_deadlines(&mut self, node: u32) {
        let now_ns = self.events.now_ns();
        let patience_ns = nanos(self.nodes[node as usize].patience());
        let lost_ns = LOST_MIN_NS.max(patience_ns * u64::from(LOST_FACTOR));
        let asks = &self.nodes[node as usize].asks;
        let lost = asks.iter().filter(|ask| now_ns - ask.at_ns > lost_ns).map(|ask| ask.frame);
        for frame in lost.collect::<Vec<u32>>() {
            self.replace(node, frame);
        }
        let there =
            |ask: &Ask| ask.source != ORIGIN && self.nodes[ask.source as usize].told_position > ask.frame;
        let told: Vec<bool> = self.nodes[node as usize].asks.iter().map(there).collect();
        let this = &mut self.nodes[node as usize];
        for (ask, _) in this.asks.iter_mut().zip(told).filter(|(ask, told)| *told && ask.there_ns.is_none()) {
            ask.there_ns = Some(now_ns);
        }
        let head = this.position;
        if let Some(ask) = this.asks.iter().find(|ask| ask.frame == head).cloned() {
            self.ask_beside(node, &ask, patience_ns);
        }
    }

    /// Asks another for the frame that holds up `node` as well, if whom it asked is late.
    fn ask_beside(&mut self, node: u32, ask: &Ask, patience_ns: u64) {
        let now_ns = self.events.now_ns();
        let this = &self.nodes[node as usize];
        let sources = || [Some(ask.source), ask.second].into_iter().flatten();
        let is_silent = sources().all(|source| self.is_silent(source));
        let sending_max_ns = nanos(sending_max(self.scenario.link));
        let is_slow = ask.there_ns.is_some_and(|since| now_ns - since > sending_max_ns);
        let is_owed = is_silent || is_slow || this.rests(ask.source, now_ns);
        let is_late = now_ns - ask.at_ns > patience_ns;
        let may_hedge = this.hedges * HEDGE_SHARE <= this.asked + HEDGES_FREE * HEDGE_SHARE;
        if !(is_silent || ask.second.is_none() && (is_owed || is_late && may_hedge)) {
            return;
        }
        let Some(source) = self.choose(node, ask.frame, &ask.tried) else { return };
        if is_full_load(self.nodes[source as usize].told_load) {
            return;
        }
        self.failovers += 1;
        let is_to_blame = ask.there_ns.is_some() || is_silent;
        let key = self.nodes[source as usize].key;
        let this = &mut self.nodes[node as usize];
        this.hedges += u64::from(!is_owed);
        let Some(now) = this.asks.iter_mut().find(|now| now.frame == ask.frame) else { return };
        now.tried.push(key);
        now.second = Some(source);
        if is_silent {
            this.demote(ask.source, now_ns);
        }
        if source == ORIGIN
            && self.chooser.relays()
            && let Answer::Ask(peer) = self.ledger.ask(ask.frame, self.nodes[node as usize].key)
        {
            // The first is not waited for any more: the answer is to ask another.
            self.cancel(node, ask.frame, ask.source);
            let this = &mut self.nodes[node as usize];
            if is_to_blame {
                this.demote(ask.source, now_ns);
            }
            if let Some(now) = this.asks.iter_mut().find(|now| now.frame == ask.frame) {
                (now.source, now.second) = (ORIGIN, None);
            }
            let at_ns = now_ns + self.scenario.round_trip_us * 1000;
            return self.events.at(at_ns, Event::Pointed { node, frame: ask.frame, to: self.by_key[&peer] });
        }
        self.request(node, ask.frame, source);
    }

    fn is_silent(&self, node: u32) -> bool {
        let node = &self.nodes[node as usize];
        node.life == Life::Silent && self.events.now_ns() - node.died_ns > SILENT_NS
    }

    /// `node` does not wait for `frame` from `source` any more.
    fn cancel(&mut self, node: u32, frame: u32, source: u32) {
        self.nodes[source as usize].cancel(frame, node, self.profile.steps[frame as usize].length);
    }

    /// The answer with `frame` is lost: another source is asked, or all may be asked anew.
    fn replace(&mut self, node: u32, frame: u32) {
        let now_ns = self.events.now_ns();
        let this = &mut self.nodes[node as usize];
        let Some(mut ask) = this.take_ask(frame) else { return };
        for source in [Some(ask.source), ask.second].into_iter().flatten() {
            this.seen.entry(source).or_default().failed(now_ns / 1_000_000);
            this.demote(source, now_ns);
        }
        ask.at_ns = now_ns;
        ask.there_ns = None;
        let Some(source) = self.choose(node, frame, &ask.tried) else {
            ask.tried.clear();
            self.nodes[node as usize].asks.push(ask);
            return;
        };
        self.failovers += 1;
        ask.tried.push(self.nodes[source as usize].key);
        (ask.source, ask.second) = (source, None);
        self.nodes[node as usize].asks.push(ask);
        self.request(node, frame, source);
    }

    /// Calls the code under test, with what `node` would know.
    fn choose(&mut self, node: u32, frame: u32, tried: &[PeerKey]) -> Option<u32> {
        self.choices += 1;
        let mut draw = self.nodes[node as usize].draw.clone();
        let sample: [u32; SAMPLE] =
            std::array::from_fn(|_| number(1 + draw.below(self.scenario.nodes as usize)));
        let source = if tried.is_empty() {
            self.choose_near(node, frame, &mut draw).or_else(|| {
                let mut known = self.known_to(node, frame, true, &sample);
                self.assign(node, frame, &mut known, &mut draw)
            })
        } else {
            let mut known = self.known_to(node, frame, false, &sample);
            let relay = &self.scenario.relay;
            relay.again(self.asker(node), frame, tried, &mut known, self.chooser, &mut draw)
        };
        let source = source.map(|key| self.by_key[&key]);
        let this = &mut self.nodes[node as usize];
        this.draw = draw;
        if let Some(source) = source {
            this.seen.entry(source).or_default().asked();
        }
        source
    }

    /// The choice among the nearest places alone, which is that among all when it falls on a node that is not full:
    /// the relay looks at the nearest first. Most choices end here, at a tenth of the cost.
    fn choose_near(&self, node: u32, frame: u32, draw: &mut Draw) -> Option<PeerKey> {
        if !self.chooser.relays() {
            return None;
        }
        let places = self.scenario.relay.relevant(&self.roster, self.nodes[node as usize].key, frame);
        let near = places.take(self.scenario.relay.alternates).map(|key| self.by_key[&key]);
        let mut known: BTreeMap<PeerKey, Candidate> = near
            .filter(|near| *near != node)
            .map(|near| (self.nodes[near as usize].key, self.candidate(node, near)))
            .collect();
        let mut after = draw.clone();
        let key = self.assign(node, frame, &mut known, &mut after)?;
        if is_full_load(self.nodes[self.by_key[&key] as usize].told_load) {
            return None;
        }
        *draw = after;
        Some(key)
    }

    fn assign(
        &self,
        node: u32,
        frame: u32,
        known: &mut BTreeMap<PeerKey, Candidate>,
        draw: &mut Draw,
    ) -> Option<PeerKey> {
        let relay = &self.scenario.relay;
        let assigned = relay.assign(self.asker(node), &[frame], known, self.chooser, draw);
        assigned.first().map(|assignment| assignment.source)
    }

    fn asker(&self, node: u32) -> Asker<'_> {
        let this = &self.nodes[node as usize];
        Asker {
            me: this.key,
            position: this.position,
            roster: &self.roster,
            now_ms: self.events.now_ns() / 1_000_000,
        }
    }

    fn known_to(&self, node: u32, frame: u32, places: bool, sample: &[u32]) -> BTreeMap<PeerKey, Candidate> {
        let mut known = BTreeMap::new();
        let mut add = |number: u32| {
            if number != node {
                known.insert(self.nodes[number as usize].key, self.candidate(node, number));
            }
        };
        add(ORIGIN);
        if places {
            let relevant = self.scenario.relay.relevant(&self.roster, self.nodes[node as usize].key, frame);
            relevant.for_each(|key| add(self.by_key[&key]));
        }
        sample.iter().filter(|at| self.nodes[**at as usize].told_position > frame).for_each(|at| add(*at));
        known
    }

    fn candidate(&self, node: u32, number: u32) -> Candidate {
        let peer = &self.nodes[number as usize];
        let has = if number == ORIGIN { Has::Complete } else { Has::Stream(peer.told_position) };
        Candidate {
            load: Load::new([(Item::NETWORK, peer.told_load)]),
            load_age_ms: u32::try_from(self.scenario.report_ms / 2).unwrap_or(u32::MAX),
            seen: self.nodes[node as usize].seen.get(&number).copied().unwrap_or_default(),
            ..Candidate::new(peer.key, has, number == ORIGIN)
        }
    }

    fn report(&self) -> Report {
        let nodes = &self.nodes[1..];
        let booted = || nodes.iter().filter(|node| node.life == Life::Up);
        let mut took: Vec<f64> =
            booted().filter_map(|node| Some((node.booted_ns? - node.started_ns) as f64 / 1e6)).collect();
        took.sort_by(f64::total_cmp);
        let last_ns = booted().filter_map(|node| node.booted_ns).max().unwrap_or(0);
        let last_start_ns = booted().map(|node| node.started_ns).max().unwrap_or(0);
        let lead_ms = self.scenario.guest_after_ms as f64;
        let waiting_ms = (self.profile.waiting_min_ms(self.scenario.link) - lead_ms).max(0.0);
        let local_ms = lead_ms + self.profile.end_ms as f64 + waiting_ms;
        let sent: Vec<f64> = booted().map(|node| node.sent as f64).collect();
        let bytes = self.profile.bytes().max(1) as f64;
        let died = nodes.iter().filter(|node| node.life == Life::Silent).count();
        Report {
            chooser: self.chooser.name(),
            booted: took.len(),
            died,
            stuck: nodes.len() - died - took.len(),
            last_ms: last_ns as f64 / 1e6,
            bound_ms: last_start_ns as f64 / 1e6 + local_ms,
            p50_ms: percentile(&took, 50),
            p99_ms: percentile(&took, 99),
            max_ms: percentile(&took, 100),
            origin_copies: self.nodes[ORIGIN as usize].sent as f64 / bytes,
            wasted: self.wasted as f64 / (bytes * nodes.len().max(1) as f64),
            fairness: jain(&sent),
            failovers: self.failovers,
            choices: self.choices,
        }
    }
}

/// `share` of the numbers from 1 to below `count`, drawn; as many as that is, to the nearest.
fn drawn(count: usize, share: f64, draw: &mut Draw) -> Vec<usize> {
    let mut numbers: Vec<usize> = (1..count).collect();
    let wanted = (1..count).filter(|taken| (*taken as f64) < share * numbers.len() as f64 + 0.5).count();
    for at in 0..wanted {
        let other = at + draw.below(numbers.len() - at);
        numbers.swap(at, other);
    }
    numbers.truncate(wanted);
    numbers
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn number(index: usize) -> u32 {
    u32::try_from(index).expect("nodes and frames are fewer than 2^32")
}
