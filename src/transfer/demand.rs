//! What guests wait for and the stream does not bring: fetched at once, ahead of everything.
//!
//! The readers that wait are the only list there is: at each wake, and while somebody waits every [`LOOK_AGAIN`], what
//! they lack is looked at again. So a block that was to come by a stream that has stalled becomes a demand, and one
//! whose reader has gone is forgotten.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::task::TaskTracker;

use crate::block::Extent;
use crate::image::page::PAGE_BLOCKS;
use crate::image::tree::GROUP_PAGES;
use crate::local_cache::{Coming, Fetch};
use crate::peer::message::{Ask, BLOCKS_MAX, EXTENTS_MAX, to_wire};

use super::counters::Kind;
use super::engine::Shared;
use super::receive;
use super::request::Terms;
use super::sources::RETRY;

/// How often what is waited for is looked at again.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// Blocks that prefetch hints may leave to be fetched; more are dropped. 16 MiB.
const HINT_BLOCKS_MAX: u64 = 4096;
/// Blocks in one demand request.
const DEMAND_BLOCKS_MAX: usize = 64;

impl Fetch for Shared {
    fn want(&self, absent: &[Extent]) -> Coming {
        // Also for what the stream is to bring: whether it still comes is looked at while somebody waits.
        self.demand_wake.notify_one();
        if absent.iter().flat_map(|extent| extent.blocks()).all(|block| self.is_on_its_way(block)) {
            return Coming::Stream;
        }
        let foreseen =
            |block| self.holding.frames().is_some_and(|frames| frames.heads().position(block).is_some());
        if absent.iter().flat_map(|extent| extent.blocks()).all(foreseen) {
            return Coming::Demand;
        }
        self.missed.note(absent.iter().flat_map(|extent| extent.blocks()).filter(|block| !foreseen(*block)));
        Coming::Miss
    }

    fn hindrance(&self) -> Option<String> {
        self.keeping.trouble()
    }

    fn hint(&self, absent: &[Extent]) {
        let mut hints = self.hints.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut room = HINT_BLOCKS_MAX.saturating_sub(hints.iter().map(|hint| hint.count).sum());
        for extent in absent {
            let count = extent.count.min(room);
            room -= count;
            if count > 0 {
                hints.push_back(Extent { count, ..*extent });
            }
        }
        self.sources.stir();
        self.demand_wake.notify_one();
    }
}

/// Fetches what is waited for until the engine stops.
pub(super) async fn run(shared: &Arc<Shared>, tasks: &TaskTracker) {
    loop {
        let again = if shared.cache.counters().waiting() > 0 { LOOK_AGAIN } else { 10 * LOOK_AGAIN };
        let _ = tokio::time::timeout(again, shared.demand_wake.notified()).await;
        let hints: Vec<Extent> =
            shared.hints.lock().unwrap_or_else(std::sync::PoisonError::into_inner).drain(..).collect();
        let wanted = shared.cache.wanted();
        let blocks = wanted.into_iter().chain(hints).flat_map(|extent| shared.cache.absent(extent));
        let due: Vec<Extent> = blocks
            .flat_map(Extent::blocks)
            .filter(|block| !shared.is_on_its_way(*block))
            .map(|block| Extent::new(block, 1))
            .collect();
        // In parts, since each look at what is under way begins at the front.
        let flights = due.chunks(DEMAND_BLOCKS_MAX);
        for flight in
            flights.filter_map(|due| shared.flights.take(due.iter().copied(), DEMAND_BLOCKS_MAX as u64, true))
        {
            let shared = Arc::clone(shared);
            tasks.spawn(async move {
                tokio::select! {
                    () = fetch(&shared, &flight.extents, Kind::Demand) => {}
                    () = shared.stop.cancelled() => {}
                }
            });
        }
    }
}

/// Brings `extents`, at most [`BLOCKS_MAX`] blocks, from whoever has them; ends when they are here. For the fill, also when
/// nobody gives them: it has others to bring, and comes again.
pub(super) async fn fetch(shared: &Arc<Shared>, extents: &[Extent], kind: Kind) {
    if shared.similar().is_some() {
        let (copier, extents) = (Arc::clone(shared), extents.to_vec());
        // A panic there leaves the blocks absent, and they are fetched.
        let _ = shared.work.spawn_blocking(move || copier.copy_similar(&extents)).await;
    }
    let mut tried = Vec::new();
    // Nobody is known to have it. Who has parts of its page may: a guest does not wait before they were asked.
    let mut guesses = false;
    loop {
        shared.keeping.well().await;
        let absent: Vec<Extent> =
            extents.iter().flat_map(|extent| shared.cache.absent(*extent)).take(EXTENTS_MAX).collect();
        let Some(first) = absent.first() else { return };
        let blocks: u64 = absent.iter().map(|extent| extent.count).sum();
        debug_assert!(blocks <= BLOCKS_MAX, "callers cut what they ask for");
        let (groups, pages) = unknown_parts(shared, &absent);
        let ask = Ask::Blocks {
            root: shared.holding.root(),
            extents: absent.iter().copied().map(to_wire).collect(),
            groups,
            pages,
            urgent: kind == Kind::Demand,
            pack: shared.packing_pays(),
        };
        let page = first.start / PAGE_BLOCKS;
        let frame = frame_of(shared, first.start);
        let pick = |tried: &[_], _| {
            let known = shared.sources.for_page(page, frame, tried);
            known.or_else(|| guesses.then(|| shared.sources.guess(tried)).flatten())
        };
        let terms = Terms { kind, bytes: blocks * 2048, relayed: None };
        let Some(reply) = shared.request(terms, &mut tried, &pick, &ask).await else {
            if kind == Kind::Fill {
                return;
            }
            shared.sources.stir();
            if kind == Kind::Demand && !guesses {
                guesses = true;
            } else {
                match guesses && !tried.is_empty() {
                    // Not anew with every word of a source.
                    true => tokio::time::sleep(RETRY).await,
                    false => shared.sources.changed().await,
                }
                guesses = false;
            }
            tried.clear();
            continue;
        };
        let work = {
            let shared = Arc::clone(shared);
            let answered = reply.answered;
            move || receive::blocks(&shared.holding, &shared.cache, &ask, &answered.answer, answered.bulk())
        };
        match shared.keep(work).await {
            Some(Ok(0)) => {}
            Some(Ok(_)) => {
                tried.clear();
                guesses = false;
            }
            Some(Err(what)) => shared.caught(&reply.source, what),
            None => return,
        }
    }
}

/// The boot frame with `block`, if its digest is known: who has the frame has the block, and not yet its digest.
pub(super) fn frame_of(shared: &Shared, block: u64) -> Option<usize> {
    let frames = shared.holding.frames().filter(|_| shared.holding.tree.knows_page(block / PAGE_BLOCKS))?;
    frames.heads().position(block)
}

/// The groups and pages of the tree that are needed to check `extents` and are not known.
fn unknown_parts(shared: &Shared, extents: &[Extent]) -> (Vec<u32>, Vec<u32>) {
    let tree = &shared.holding.tree;
    let number = |index: u64| u32::try_from(index).expect("an image has fewer than 2^32 pages");
    let touched = extents.iter().flat_map(|e| e.start / PAGE_BLOCKS..=(e.end() - 1) / PAGE_BLOCKS);
    let mut pages: Vec<u32> = touched.filter(|page| !tree.knows_page(*page)).map(number).collect();
    pages.dedup();
    pages.truncate(crate::peer::message::PAGES_MAX);
    let group = |page: &u32| u64::from(*page) / GROUP_PAGES;
    let mut groups: Vec<u32> =
        pages.iter().map(group).filter(|group| !tree.knows_group(*group)).map(number).collect();
    groups.dedup();
    (groups, pages)
}
