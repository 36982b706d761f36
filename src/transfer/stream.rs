//! The stream: the boot cache's frames in order, many asked for ahead, each checked, written and passed on as it comes.
//!
//! Frames are dealt to sources by `crate::choose::relay`; a source may be asked for a frame that it does not have yet,
//! and answers when it has. A source that is late, breaks or lies is replaced for the frames that it owes.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::block::Extent;
use crate::boot_cache::BootCache;
use crate::choose::{PeerKey, relay};
use crate::peer::holding::Frames;
use crate::peer::message::{Answer, Ask};

use super::counters::Kind;
use super::demand::fetch;
use super::engine::Shared;
use super::receive::{self, Wrong};
use super::request::{Terms, Why};

/// Compressed bytes asked for ahead while it is not known whether other images here have the blocks.
const PROBE_WINDOW: u64 = 256 << 10;
/// How long that may take to be found out.
const PROBE_PATIENCE: Duration = Duration::from_secs(1);
/// How long a node that the origin points to may take to be reached, before the origin is asked again.
const REACH_PATIENCE: Duration = Duration::from_secs(1);
/// For how long nobody may get further with the boot cache, while there are sources with another one, before the stream is
/// given up.
const OTHER_BOOT_PATIENCE: Duration = Duration::from_secs(5);
/// A stream that has brought nothing for so long has stalled; what guests wait for is then fetched by itself.
const STALLED_MIN: Duration = Duration::from_millis(400);
/// However slow it was before.
const STALLED_MAX: Duration = Duration::from_secs(2);

/// How the stream is doing.
#[derive(Debug)]
pub(super) struct StreamState {
    epoch: Instant,
    /// When the last frame came, in ms since `epoch`.
    last_ms: AtomicU64,
    /// Mean time between frames in ms.
    pace_ms: AtomicU64,
    /// Mean time to an answer of those who may have had to wait for the frame themselves, in µs.
    relayed_us: AtomicU64,
    /// Bytes of frames that came over the network.
    bytes: AtomicU64,
    /// When the first frames were asked for, and when the last came, in µs since `epoch`.
    asked_us: OnceLock<u64>,
    came_us: AtomicU64,
    /// No source gives the boot cache: the stream goes on without it.
    given_up: AtomicBool,
    over: AtomicBool,
    ended: Notify,
}

impl StreamState {
    pub(super) fn new() -> Self {
        Self {
            epoch: Instant::now(),
            last_ms: AtomicU64::new(0),
            pace_ms: AtomicU64::new(0),
            relayed_us: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            asked_us: OnceLock::new(),
            came_us: AtomicU64::new(0),
            given_up: AtomicBool::new(false),
            over: AtomicBool::new(false),
            ended: Notify::new(),
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn progress(&self) {
        let now = self.now_ms();
        let gap = now.saturating_sub(self.last_ms.swap(now, Ordering::Relaxed));
        let pace = self.pace_ms.load(Ordering::Relaxed);
        self.pace_ms.store((pace * 7 + gap) / 8, Ordering::Relaxed);
    }

    /// A frame of `bytes` has come over the network.
    fn came(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.came_us.store(micros(self.epoch.elapsed()), Ordering::Relaxed);
    }

    /// Bytes a second from when the first frames were asked for to the last that came; none before one has.
    pub(super) fn goodput(&self) -> Option<u64> {
        let asked_us = *self.asked_us.get()?;
        let took_us = self.came_us.load(Ordering::Relaxed).saturating_sub(asked_us);
        let bytes = self.bytes.load(Ordering::Relaxed);
        (bytes > 0 && took_us > 0).then(|| bytes.saturating_mul(1_000_000) / took_us)
    }

    /// A relay has answered after `took`.
    pub(super) fn relayed(&self, took: Duration) {
        let (mean, took) = (self.relayed_us.load(Ordering::Relaxed), micros(took));
        let mean = if mean == 0 { took } else { (mean * 7 + took) / 8 };
        self.relayed_us.store(mean, Ordering::Relaxed);
    }

    /// For how long a relay is waited for.
    pub(super) fn patience(&self) -> Duration {
        relay::patience(Duration::from_micros(self.relayed_us.load(Ordering::Relaxed)))
    }

    /// For how long a relay that has a frame may take to send it.
    pub(super) fn sending_max(&self) -> Duration {
        relay::sending_max(self.goodput().unwrap_or(0))
    }

    /// Whether frames are coming: none is owed for longer than usual.
    pub(super) fn is_alive(&self) -> bool {
        let quiet = self.now_ms().saturating_sub(self.last_ms.load(Ordering::Relaxed));
        let usual = Duration::from_millis(8 * self.pace_ms.load(Ordering::Relaxed));
        !self.is_over() && Duration::from_millis(quiet) < usual.clamp(STALLED_MIN, STALLED_MAX)
    }

    /// Whether everything that the stream brings is here.
    pub(super) fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// Whether the boot cache, or the rest of it, will not come.
    pub(super) fn has_given_up(&self) -> bool {
        self.given_up.load(Ordering::Acquire)
    }

    pub(super) fn end(&self) {
        self.over.store(true, Ordering::Release);
        self.ended.notify_waiters();
    }

    /// Ends when the stream is over.
    pub(super) async fn over(&self) {
        let mut ended = std::pin::pin!(self.ended.notified());
        ended.as_mut().enable();
        if !self.is_over() {
            ended.await;
        }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Brings the heads of the boot cache, if the image has one and somebody can give them.
pub(super) async fn prepare(shared: &Arc<Shared>) {
    let mut stuck = Patience::new(OTHER_BOOT_PATIENCE);
    while shared.holding.manifest.boot.is_some() && shared.holding.frames().is_none() {
        if stuck.is_over(shared.sources.stuck_at(0)) {
            return give_up(shared);
        }
        fetch_heads(shared).await;
    }
}

/// For how long something may be stuck at one place.
struct Patience {
    limit: Duration,
    stuck: Option<(u32, Instant)>,
}

impl Patience {
    const fn new(limit: Duration) -> Self {
        Self { limit, stuck: None }
    }

    /// Whether it has been stuck too long, given where it is stuck now, if it is.
    fn is_over(&mut self, place: Option<u32>) -> bool {
        let now = Instant::now();
        self.stuck = match (place, self.stuck) {
            (Some(place), Some((before, since))) if place == before => Some((before, since)),
            (place, _) => place.map(|place| (place, now)),
        };
        self.stuck.is_some_and(|(_, since)| now.duration_since(since) >= self.limit)
    }
}

/// Goes on without the boot cache, or the rest of it; who waits here for frames is told so.
fn give_up(shared: &Shared) {
    if shared.stream.given_up.swap(true, Ordering::AcqRel) {
        return;
    }
    if let Some(frames) = shared.holding.frames() {
        frames.end();
    }
    tracing::warn!(
        image = %shared.holding.root().short(),
        "the sources have another boot cache of this image: going on without it; remove and pull the image to have theirs"
    );
}

/// Brings the boot cache, if the image has one; ends when all of it is here.
pub(super) async fn run(shared: &Arc<Shared>) {
    if shared.holding.manifest.boot.is_none() {
        return;
    }
    prepare(shared).await;
    let Some(frames) = shared.holding.frames() else { return };
    let lengths: Vec<u64> = frames.heads().frames().iter().map(|frame| u64::from(frame.length)).collect();
    let mut missing = (0..frames.count()).filter(|index| !frames.has(*index)).peekable();
    shared.stream.asked_us.get_or_init(|| micros(shared.stream.epoch.elapsed()));
    let mut running = FuturesUnordered::new();
    let mut ahead = 0;
    loop {
        let window = window(shared);
        while let Some(index) =
            missing.next_if(|_| !shared.stream.has_given_up() && (running.is_empty() || ahead < window))
        {
            ahead += lengths[index];
            let length = lengths[index];
            running.push(async move {
                fetch_frame(shared, index, length).await;
                index
            });
        }
        let Some(index) = running.next().await else { return };
        ahead -= lengths[index];
        shared.stream.progress();
    }
}

/// Compressed bytes to ask for ahead.
fn window(shared: &Shared) -> u64 {
    if shared.probing.load(Ordering::Acquire) && shared.stream.epoch.elapsed() < PROBE_PATIENCE {
        return PROBE_WINDOW;
    }
    relay::window(shared.stream.goodput().unwrap_or(0))
}

/// Fetches the heads of the boot cache; returns without them when no source could give them.
async fn fetch_heads(shared: &Arc<Shared>) {
    let Some(boot) = &shared.holding.manifest.boot else { return };
    let ask = Ask::Heads { root: shared.holding.root() };
    let pick =
        |tried: &[_], why| shared.sources.for_frame(0, 0, tried, why).or_else(|| shared.sources.any(tried));
    let terms = Terms { kind: Kind::Tree, bytes: boot.heads_length, relayed: None };
    let mut tried = Vec::new();
    while let Some(reply) = shared.request(terms, &mut tried, &pick, &ask).await {
        if reply.answered.answer != Answer::Data {
            continue;
        }
        let path = shared.dir.join("boot");
        let (root, digest) = (shared.holding.root(), boot.heads_digest);
        let bytes = reply.answered.bulk().to_vec();
        let make = move || BootCache::create(&path, root, bytes.clone(), digest).map_err(Wrong::from);
        let size = shared.holding.manifest.size;
        match shared.keep(make).await {
            Some(Ok(boot)) if boot.heads().size() != size => {
                shared.caught(&reply.source, "the heads of the boot cache are of a disk of another size");
            }
            Some(Ok(boot)) => {
                shared.holding.set_frames(Frames::unchecked(boot, false));
                shared.stream.progress();
                shared.demand_wake.notify_one();
                return;
            }
            Some(Err(_)) => shared.caught(&reply.source, "the heads of the boot cache are not those pinned"),
            None => return,
        }
    }
    shared.sources.changed().await;
}

/// Brings one frame, from whoever gives it.
async fn fetch_frame(shared: &Arc<Shared>, index: usize, bytes: u64) {
    let Some(frames) = shared.holding.frames() else { return };
    let number = u32::try_from(index).expect("a boot cache has fewer than 2^32 frames");
    if shared.copies_boot.load(Ordering::Acquire) {
        let extents: Vec<Extent> = frames.heads().frame_runs(index).iter().map(|run| run.extent).collect();
        let copier = Arc::clone(shared);
        // A panic there leaves the blocks absent, and they are fetched.
        let _ = shared.work.spawn_blocking(move || copier.copy_similar(&extents)).await;
    }
    let runs = frames.heads().frame_runs(index).iter().filter(|run| !run.zero);
    let lacking: Vec<Extent> = runs.flat_map(|run| shared.cache.absent(run.extent)).collect();
    let blocks: u64 = lacking.iter().map(|extent| extent.count).sum();
    // A frame that is here for the most part costs less without it. Others cannot have it from this node then, and are
    // told so at once.
    if blocks > 0 && blocks * 4 < frames.heads().frame_data_blocks(index) * 3 {
        frames.skip(index);
        return fetch(shared, &lacking, Kind::Stream).await;
    }
    let here = |extent: Extent| shared.cache.has(extent);
    if bytes == 0 || frames.heads().frame_runs(index).iter().all(|run| here(run.extent)) {
        // Nothing in it that is not known: blocks that came another way, or an empty frame.
        if bytes > 0 {
            return frames.skip(index);
        }
        let keeper = Arc::clone(shared);
        let keep = move || receive::frame(&keeper.holding, &keeper.cache, index, &[]);
        if let Some(Ok(())) = shared.keep(keep).await {
            return;
        }
    }
    let mut tried: Vec<PeerKey> = Vec::new();
    let mut pointed_to = None;
    // Who points to another node may have to send the frame after all.
    let mut pointed_by = None;
    // A source that has everything has not this frame: its boot cache is damaged.
    let mut damaged = false;
    let mut stuck = Patience::new(OTHER_BOOT_PATIENCE);
    loop {
        if shared.stream.has_given_up() {
            return;
        }
        if stuck.is_over(shared.sources.stuck_at(number)) {
            return give_up(shared);
        }
        let wait = tried.is_empty() || pointed_to.is_some();
        let pick = |tried: &[PeerKey], why| {
            // What comes later in the stream has time, and its hedge would only add to what the first one waits for.
            if why == Why::Late && frames.passed() < number {
                return None;
            }
            let pointed = pointed_to.filter(|key| !tried.contains(&PeerKey(*key)));
            if let Some(source) = pointed.and_then(|key| shared.sources.by_key(key)) {
                return Some(source);
            }
            let tried: Vec<PeerKey> = tried.iter().copied().filter(|key| Some(key.0) != pointed_by).collect();
            shared.sources.for_frame(number, frames.passed(), &tried, why)
        };
        // Who has everything answers at once.
        let relayed = (wait && shared.sources.any_partial()).then_some(number);
        let ask = Ask::Frame { root: shared.holding.root(), index: number, wait };
        let terms = Terms { kind: Kind::Stream, bytes, relayed };
        let Some(reply) = shared.request(terms, &mut tried, &pick, &ask).await else {
            if damaged {
                frames.skip(index);
                return fetch(shared, &lacking, Kind::Stream).await;
            }
            tried.clear();
            (pointed_to, pointed_by) = (None, None);
            shared.sources.changed().await;
            continue;
        };
        match &reply.answered.answer {
            Answer::Data => {}
            Answer::Elsewhere(peer) => {
                pointed_by = reply.source.state().key;
                pointed_to = Some(peer.key);
                let in_doubt = shared.sources.is_in_doubt(peer.key);
                if in_doubt || !shared.sources.reach(*peer, REACH_PATIENCE).await {
                    // Late before, not known here, or not reachable: ask again, and it is sent.
                    tried.retain(|tried| Some(tried.0) != pointed_by);
                    (pointed_to, pointed_by) = (None, None);
                }
                continue;
            }
            _ => {
                let (key, complete) = {
                    let state = reply.source.state();
                    (state.key, state.have.complete)
                };
                damaged |= complete;
                if key == pointed_by {
                    // It was asked again, and does not have it either.
                    pointed_by = None;
                }
                continue;
            }
        }
        let work = {
            let shared = Arc::clone(shared);
            let answered = reply.answered;
            move || receive::frame(&shared.holding, &shared.cache, index, answered.bulk())
        };
        match shared.keep(work).await {
            Some(Ok(())) => {
                shared.stream.came(bytes);
                return;
            }
            Some(Err(what)) => shared.caught(&reply.source, what),
            None => {
                // A panic: the frame is not here, and who waits for it here is told so.
                frames.skip(index);
                return fetch(shared, &lacking, Kind::Stream).await;
            }
        }
    }
}
