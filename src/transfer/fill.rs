//! The fill: everything that neither the stream nor a guest has brought, in the background.
//!
//! Yields to both: it starts when the stream is over, and pauses while a guest waits, or boots from what is already here,
//! since what it does to bytes takes processor time too (see [`super::guests`]). Beyond that it keeps so much under way
//! that an answer takes about [`TARGET`] longer than an empty link needs: a guest's miss never queues
//! behind more than that. Zero blocks are never asked for. What nobody has, be it that a guest waits for it, does not keep
//! it from the rest.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::block::Extent;
use crate::choose::Draw;
use crate::image::page::PAGE_BLOCKS;
use crate::image::tree::GROUP_PAGES;
use crate::peer::message::{Answer, Ask, BLOCKS_MAX};

use super::counters::Kind;
use super::demand::{fetch, frame_of};
use super::engine::Shared;
use super::guests::guest_waits;
use super::receive;
use super::request::Terms;

/// How much longer than on an empty link an answer may take.
const TARGET: Duration = Duration::from_millis(3);
/// The same as a share of what it takes there, where that is more: a far link has moods of its own.
const TARGET_SHARE: f64 = 0.125;
/// The same, in seconds, at most for what answers differ by of themselves.
const NOISE_MAX: f64 = 0.02;
/// Of how many answers the quickest counts.
const RECENT: usize = 4;
/// By which share of itself the window grows per round trip, at least and at most; between them by the round trip's own
/// share of this many seconds.
const GROW_MIN: f64 = 1.0 / 32.0;
const GROW_MAX: f64 = 0.25;
const GROW_FAR: f64 = 0.03;
/// Blocks under way, at least and at most.
const UNDER_WAY_MIN: f64 = 8.0;
const UNDER_WAY_MAX: f64 = 4096.0;
/// Requests under way at most.
const REQUESTS_MAX: usize = 16;
/// Pages whose digests are asked for at once: 4 KiB each, which a miss may have to wait behind as well.
const PAGES_AHEAD: u64 = 8;
/// Pause while others fetch, or a guest waits.
const YIELD: Duration = Duration::from_millis(5);
/// How long one request waits for guests of other images.
const OTHERS_WAIT: Duration = Duration::from_millis(100);
/// Pages that are fetched in one order at least: 4 MiB.
const STRETCH_MIN: usize = 8;
/// Places of which the one is begun at that fewest others have.
const STARTS: usize = 3;
/// Pause before what nobody had is looked for again.
const AGAIN: Duration = Duration::from_secs(1);

/// How often it looks whether it may go on, or at another rate.
const LOOK: Duration = Duration::from_millis(100);
/// For how long it pauses for boots, all together: an image has to become complete on a node whose guests always boot.
const BOOTS_MAX: Duration = Duration::from_secs(60);

/// A request that has ended.
#[derive(Debug, Clone, Copy)]
struct Asked {
    page: u64,
    blocks: u64,
    /// Whether there was no place for another beside it.
    is_full: bool,
    /// None when its blocks did not come.
    took: Option<Duration>,
}

/// How many blocks may be under way, from how long answers take: as many as keep an answer no more than a little longer
/// than on an idle link, whatever the link's own time (as LEDBAT does, RFC 6817 section 2.4.2).
#[derive(Debug)]
struct Window {
    blocks: f64,
    /// The quickest answer since as little as possible was under way, in seconds a request, whatever its size.
    quickest: f64,
    /// What the last answers took: the quickest of them tells of a queue, the others of the link's moods too.
    recent: [f64; RECENT],
    answers: usize,
    /// What answers take longer than the quickest of a few, on average, with as little as possible under way; in seconds.
    noise: f64,
}

impl Window {
    const fn new() -> Self {
        Self {
            blocks: 16.0,
            quickest: f64::INFINITY,
            recent: [f64::INFINITY; RECENT],
            answers: 0,
            noise: 0.0,
        }
    }

    /// An answer with `blocks` took `took`; with it there was as much under way as there may be, or not. If not, as after
    /// a pause for a guest, it was quick for want of others and says nothing of a window that was not used (as RFC 7661
    /// has it of TCP's).
    fn note(&mut self, blocks: u64, took: Duration, is_full: bool) {
        if !is_full {
            self.quickest = self.quickest.min(took.as_secs_f64());
            return;
        }
        self.recent[self.answers % RECENT] = took.as_secs_f64();
        self.answers += 1;
        let recent = &self.recent[..self.answers.min(RECENT)];
        let took = recent.iter().copied().fold(f64::INFINITY, f64::min);
        if self.blocks <= UNDER_WAY_MIN {
            // With as little under way as there can be, the time is the link's own, which may have become slower, and so
            // is what answers differ by.
            self.quickest = took;
            let differ = recent.iter().sum::<f64>() / recent.len() as f64 - took;
            self.noise += (differ - self.noise) / RECENT as f64;
        }
        self.quickest = self.quickest.min(took);
        // By how much of the target it may be longer: the nearer, the smaller the step, or the window swings, and a
        // guest's miss behind its peaks waits twice as long.
        let noise = (2.0 * self.noise).min(NOISE_MAX);
        let target = TARGET.as_secs_f64().max(self.quickest * TARGET_SHARE).max(noise);
        let off = (1.0 - (took - self.quickest) / target).clamp(-1.0, 1.0);
        // Per round trip up by a share of itself, the larger the farther the link is, and down by half: a near one has
        // thousands of round trips for what it gains, and one step too many is behind what a guest's miss waits.
        let grow = (self.quickest / GROW_FAR).clamp(GROW_MIN, GROW_MAX);
        self.blocks += blocks as f64 * off * if off > 0.0 { grow } else { 0.5 };
        self.blocks = self.blocks.clamp(UNDER_WAY_MIN, UNDER_WAY_MAX);
    }

    /// As [`Self::note`], unless the blocks did not come, which says nothing of the link. Whether they came.
    fn note_if_came(&mut self, asked: Asked) -> bool {
        asked.took.map(|took| self.note(asked.blocks, took, asked.is_full)).is_some()
    }

    /// Whether a request of `blocks` has no place beside `requests` that ask for `under_way` blocks together.
    fn is_full(&self, requests: usize, under_way: u64, blocks: u64) -> bool {
        requests >= REQUESTS_MAX || (under_way + blocks) as f64 > self.blocks
    }

    /// Blocks that one request should have: two or more are under way.
    fn request(&self) -> u64 {
        [8_u64, 16, 32, 64, 128].into_iter().rev().find(|size| (*size * 2) as f64 <= self.blocks).unwrap_or(4)
    }
}

/// Brings everything; ends when nothing is missing.
pub(super) async fn run(shared: &Arc<Shared>) {
    let mut draw = Draw::new(shared.options.key ^ 0x5eed);
    let mut window = Window::new();
    let mut allowance = Allowance::new();
    while !(shared.cache.is_complete() && shared.holding.tree.is_complete()) {
        if !shared.sources.any_up() {
            shared.sources.changed().await;
            continue;
        }
        let everything_came = pass(shared, &mut draw, &mut window, &mut allowance).await;
        // What is left is being fetched for guests: without a pause this would be a loop that lets nobody else run.
        let in_vain = !everything_came && shared.sources.any_up();
        tokio::time::sleep(if in_vain { AGAIN } else { YIELD }).await;
    }
}

/// The pages that are not here, in the order in which to fetch them: each node begins anywhere, rather where few others
/// have something, so that nodes that fill at the same time have something to give each other.
fn order(shared: &Shared, draw: &mut Draw) -> Vec<u64> {
    let holding = &shared.holding;
    let missing = |page: &u64| !holding.tree.knows_page(*page) || !shared.cache.has(extent_of(shared, *page));
    let mut pages: Vec<u64> = (0..holding.tree.pages()).filter(missing).collect();
    let holders = shared.sources.holders();
    let count = |page: u64| {
        holders.iter().filter(|pages| u32::try_from(page).is_ok_and(|p| pages.contains(p))).count()
    };
    shared.options.chooser.order(&mut pages, &count, draw);
    if !pages.is_empty() {
        let starts: [usize; STARTS] = std::array::from_fn(|_| draw.below(pages.len()));
        let first = starts.into_iter().min_by_key(|at| count(pages[*at])).unwrap_or(0);
        pages.rotate_left(first);
    }
    pages
}

fn extent_of(shared: &Shared, page: u64) -> Extent {
    let start = page * PAGE_BLOCKS;
    Extent::new(start, PAGE_BLOCKS.min(shared.holding.block_count() - start))
}

/// Brings what somebody has; whether nothing was left out that nobody gave.
async fn pass(shared: &Arc<Shared>, draw: &mut Draw, window: &mut Window, allowance: &mut Allowance) -> bool {
    // Tasks of their own: what has come is kept at once, whatever is waited for here. They end with this.
    let mut running: JoinSet<Asked> = JoinSet::new();
    let mut under_way = 0_u64;
    let mut everything_came = true;
    // What was asked for and did not come is left to the next pass, which comes after a pause.
    let mut failed = HashSet::new();
    let mut pages = order(shared, draw);
    let mut at = 0;
    // Pages until there is another order: meanwhile others have come to have some.
    let mut stretch = stretch_of(&pages);
    while let Some(page) = pages.get(at).copied() {
        at += 1;
        // There may be very many pages of which nothing is asked.
        tokio::task::coop::consume_budget().await;
        if !is_offered(shared, page) {
            everything_came = false;
            continue;
        }
        if !shared.holding.tree.knows_page(page) {
            let end = pages.len().min(at - 1 + usize::try_from(PAGES_AHEAD).unwrap_or(1));
            fetch_pages(shared, &pages[at - 1..end]).await;
        }
        let start = page * PAGE_BLOCKS;
        let mut next = start;
        let mut took = false;
        let end = (start + PAGE_BLOCKS).min(shared.holding.block_count());
        while next < end {
            let size = window.request().min(BLOCKS_MAX);
            let part = Extent::new(next, size.min(end - next));
            next = part.end();
            while !running.is_empty() && window.is_full(running.len(), under_way, part.count) {
                if let Some(Ok(asked)) = running.join_next().await {
                    under_way -= asked.blocks;
                    if !window.note_if_came(asked) {
                        failed.insert(asked.page);
                    }
                }
            }
            make_way(shared).await;
            allowance.spend(shared).await;
            // A guest that needs these blocks now does not wait for what was not yet asked for.
            let absent = shared.cache.absent(part);
            let Some(flight) = shared.flights.take(absent, BLOCKS_MAX, false) else { continue };
            took = true;
            let blocks: u64 = flight.extents.iter().map(|extent| extent.count).sum();
            under_way += blocks;
            let is_full = window.is_full(running.len() + 1, under_way, window.request());
            let work = {
                let shared = Arc::clone(shared);
                async move {
                    let began = Instant::now();
                    fetch(&shared, &flight.extents, Kind::Fill).await;
                    let came = flight.extents.iter().all(|extent| shared.cache.has(*extent));
                    Asked { page, blocks, is_full, took: came.then(|| began.elapsed()) }
                }
            };
            running.spawn(shared.work.track_future(work));
        }
        shared.holding.note_page(page);
        // What is on its way counts for nothing, or this would go round in it.
        stretch -= usize::from(took);
        if stretch == 0 {
            pages = order(shared, draw);
            pages.retain(|page| !failed.contains(page));
            (at, stretch) = (0, stretch_of(&pages));
        }
    }
    while let Some(ended) = running.join_next().await {
        if let Ok(asked) = ended
            && !window.note_if_came(asked)
        {
            failed.insert(asked.page);
        }
    }
    everything_came && failed.is_empty()
}

/// How many of the `pages` that are missing are fetched in one order.
fn stretch_of(pages: &[u64]) -> usize {
    (pages.len() / 64).max(STRETCH_MIN)
}

/// Whether anybody has what lacks of `page`.
fn is_offered(shared: &Shared, page: u64) -> bool {
    let offered_with = |frame| shared.sources.have_page(page, frame);
    let frame_of_rest = || {
        let absent = shared.cache.absent(extent_of(shared, page));
        absent.first().and_then(|first| frame_of(shared, first.start))
    };
    offered_with(None) || frame_of_rest().is_some_and(|frame| offered_with(Some(frame)))
}

/// Waits while a guest does, of this image or of another, unless nobody gives what it waits for. For guests of other images,
/// which may have other sources and always wait, not for long.
async fn make_way(shared: &Shared) {
    let began = Instant::now();
    while guest_waits(shared) || shared.options.guests.wait() && began.elapsed() < OTHERS_WAIT {
        tokio::time::sleep(YIELD).await;
    }
}

/// Asks for the digests of those of `pages` that are not known; returns when some have come.
pub(super) async fn fetch_pages(shared: &Arc<Shared>, pages: &[u64]) {
    let tree = &shared.holding.tree;
    let number = |index: u64| u32::try_from(index).expect("an image has fewer than 2^32 pages");
    let Some(first) = pages.first() else { return };
    let mut groups: Vec<u64> = pages.iter().map(|page| page / GROUP_PAGES).collect();
    groups.dedup();
    groups.retain(|group| !tree.knows_group(*group));
    // Which pages are zero is known with their group: those are not asked for.
    if !groups.is_empty() {
        ask_parts(shared, *first, groups.iter().copied().map(number).collect(), Vec::new()).await;
    }
    let askable = |page: &&u64| !tree.knows_page(**page) && tree.knows_group(**page / GROUP_PAGES);
    let unknown: Vec<u32> = pages.iter().filter(askable).copied().map(number).collect();
    if !unknown.is_empty() && !tree.knows_page(*first) {
        ask_parts(shared, *first, Vec::new(), unknown).await;
    }
}

async fn ask_parts(shared: &Arc<Shared>, page: u64, groups: Vec<u32>, pages: Vec<u32>) {
    let bytes = 4096 * (groups.len() + pages.len()) as u64;
    let (root, extents) = (shared.holding.root(), Vec::new());
    let ask = Ask::Blocks { root, extents, groups, pages, urgent: false, pack: false };
    let pick = |tried: &[_], _| shared.sources.for_page(page, None, tried);
    let terms = Terms { kind: Kind::Tree, bytes, relayed: None };
    let mut tried = Vec::new();
    while let Some(reply) = shared.request(terms, &mut tried, &pick, &ask).await {
        let got = match &reply.answered.answer {
            Answer::Blocks { groups, pages, .. } => groups.len() + pages.len(),
            _ => 0,
        };
        let work = {
            let (shared, ask) = (Arc::clone(shared), ask.clone());
            let answered = reply.answered;
            move || receive::blocks(&shared.holding, &shared.cache, &ask, &answered.answer, answered.bulk())
        };
        match shared.keep(work).await {
            Some(Ok(_)) if got > 0 => return,
            Some(Ok(_)) => {}
            Some(Err(what)) => shared.caught(&reply.source, what),
            None => return,
        }
    }
    shared.sources.changed().await;
}

/// Keeps the fill from guests that boot, and within the rate that it may take.
#[derive(Debug)]
struct Allowance {
    since: Instant,
    bytes: u64,
    rate: u64,
    looked: Instant,
    /// For how long guests have booted meanwhile.
    boots: Duration,
}

impl Allowance {
    fn new() -> Self {
        let now = Instant::now();
        Self { since: now, bytes: 0, rate: 0, looked: now, boots: Duration::ZERO }
    }

    /// Waits until no guest boots, and until the bytes that came so far are within the rate, which may change at any time.
    async fn spend(&mut self, shared: &Shared) {
        loop {
            if self.makes_way(shared.options.guests.boot()) {
                tokio::time::sleep(LOOK).await;
                continue;
            }
            let rate = shared.fill_rate.load(Ordering::Relaxed);
            let came = shared.counters.bytes.get(Kind::Fill);
            if rate != self.rate || self.since.elapsed() > Duration::from_secs(1) && self.ahead(came) <= 0.0 {
                // What was not used is not saved up, and what another rate allowed is not made up for.
                (self.since, self.bytes, self.rate) = (Instant::now(), came, rate);
            }
            let ahead = self.ahead(came);
            if rate == 0 || ahead <= 0.0 {
                return;
            }
            let enough = Duration::from_secs_f64(ahead / rate as f64);
            tokio::time::sleep(enough.clamp(Duration::from_millis(1), LOOK)).await;
        }
    }

    /// Whether to wait for a guest, one that boots or none; called again and again.
    fn makes_way(&mut self, boots: bool) -> bool {
        let passed = std::mem::replace(&mut self.looked, Instant::now()).elapsed();
        if boots {
            self.boots += passed.min(AGAIN);
        }
        boots && self.boots < BOOTS_MAX
    }

    /// By how much what `came` is more than the rate allows, in bytes.
    fn ahead(&self, came: u64) -> f64 {
        came.saturating_sub(self.bytes) as f64 - self.since.elapsed().as_secs_f64() * self.rate as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_follows_what_the_link_carries_within_the_target() {
        // A link of 40 MB/s without compression, 1 ms away.
        let mut window = Window::new();
        for _ in 0..2000 {
            let queued = window.blocks;
            let took = Duration::from_secs_f64(0.001 + queued * 4096.0 / 40e6);
            window.note(window.request(), took, true);
        }
        let delay = window.blocks * 4096.0 / 40e6;
        assert!((0.002..0.006).contains(&delay), "{delay}");
        assert!(window.request() >= 16);
    }

    /// Once, the quick answers after each pause made the window of a fill that often makes way several times too large, and
    /// the next miss waited behind that.
    #[test]
    fn the_window_does_not_grow_by_what_it_has_no_use_for() {
        // A link of 12 MB/s, 1 ms away, that is empty again and again.
        let mut window = Window::new();
        for answer in 0..3000 {
            // The first one after a pause is alone.
            let is_full = answer % 6 > 0;
            let blocks = window.request();
            let before_it = if is_full { window.blocks } else { blocks as f64 };
            let took = 0.001 + before_it * 4096.0 / 12e6;
            window.note(blocks, Duration::from_secs_f64(took), is_full);
        }
        let delay = window.blocks * 4096.0 / 12e6;
        assert!(delay < 0.006, "{delay}");
    }

    /// Once, one answer that came a few ms late was taken for a queue, and what is far away never came to have more than
    /// one request under way.
    #[test]
    fn a_far_link_whose_answers_come_now_sooner_now_later_is_used() {
        let mut draw = Draw::new(1);
        let mut noise = |most: f64| draw.below(1000) as f64 / 1000.0 * most;
        for (trip, jitter) in [(0.05, 0.005), (0.02, 0.032), (0.1, 0.01), (0.01, 0.016)] {
            let mut window = Window::new();
            for _ in 0..4000 {
                // 12 MB/s.
                let took = trip + noise(jitter) + (window.blocks * 4096.0 / 12e6 - trip).max(0.0);
                let blocks = window.request();
                window.note(blocks, Duration::from_secs_f64(took), true);
            }
            let carried = trip * 12e6 / 4096.0;
            assert!(window.blocks > carried / 3.0, "{trip} s, {jitter}: {} of {carried}", window.blocks);
            assert!(window.blocks < carried * 3.0, "{trip} s, {jitter}: {} of {carried}", window.blocks);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn guests_that_always_boot_hold_the_fill_up_for_a_minute_at_most() {
        let mut allowance = Allowance::new();
        let mut paused = 0;
        for _ in 0..2000 {
            tokio::time::advance(Duration::from_millis(100)).await;
            paused += u32::from(allowance.makes_way(true));
        }
        assert!((400..700).contains(&paused), "{paused} tenths of a second");
    }
}
