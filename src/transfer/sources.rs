//! The nodes that may be asked for one image, and which of them is asked for what.
//!
//! Finds more of them by asking those it knows. What is eligible and what is best is decided in `crate::choose`; here
//! is only what that needs to know of each. When nothing is to be fetched but what guests miss, few stay connected
//! ([`Sources::rest`]): each node of a burst would otherwise keep the others of it for ever.

use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use roaring::RoaringBitmap;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::choose::{
    Asker, Candidate, Chooser, Draw, Has, Item, Load, Need, PeerKey, Relay, Roster, Seen, eligible, relay,
};
use crate::digest::Digest;
use crate::image::manifest::Manifest;
use crate::peer::connection::{Answered, CallError, ConnectError, Connection};
use crate::peer::holding::Holding;
use crate::peer::message::{Answer, Ask, Have, Hello, Peer, Wanted};
use crate::peer::transport::Security;
use crate::peer::uplink::Uplink;

use super::request::Why;
use super::source::{Link, Source};

/// Pause between attempts to reach a source that does not answer; it doubles, up to a limit.
pub(super) const RETRY: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_millis(1500);
/// A source that does not answer a simple question, and brings nothing else for so long, is connected to anew.
const PING_TIMEOUT: Duration = Duration::from_secs(2);
/// And whatever it brings, when it does not answer for so long.
const PING_MAX: Duration = Duration::from_secs(120);
const PING_INTERVAL: Duration = Duration::from_secs(1);
/// As above, for the connection that carries bulk: a frame on a slow link takes its time.
const SILENCE_MAX: Duration = Duration::from_secs(5);
/// Sources that were named and are never forgotten; each order names some. Further ones count as found.
const CONFIGURED_MAX: usize = 64;
/// Sources found by asking others, beside those that were named.
const FOUND_MAX: usize = 256;
/// Sources that are asked in one turn for what nobody is known to have.
const GUESSES_MAX: usize = 8;
/// Attempts to reach a source that was only found.
const FOUND_ATTEMPTS: u32 = 10;
/// Sources that stay connected at rest: a second one for when the first breaks or is late.
const AT_REST: usize = 2;
/// How often it is looked at rest whether those are still there.
const AT_REST_INTERVAL: Duration = Duration::from_secs(1);
/// What a person is told of the others.
const NOT_NEEDED: &str = "not needed now";

/// The nodes that may be asked, and the choice among them.
pub(super) struct Sources {
    root: Digest,
    /// The boot cache that is being fetched, by the digest of its heads.
    boot: Option<Digest>,
    hello: Hello,
    security: Security,
    list: Mutex<Vec<Arc<Source>>>,
    /// Held while sources' states are looked at, so never taken while one of them is held.
    choice: Mutex<Choice>,
    changed: Notify,
    /// Only few sources are needed. Changed while `list` is held.
    resting: AtomicBool,
    /// When last more was asked for than those gave.
    stirred: watch::Sender<Instant>,
    epoch: Instant,
    uplink: Arc<Uplink>,
    stop: CancellationToken,
}

struct Choice {
    relay: Relay,
    roster: Roster,
    chooser: Arc<dyn Chooser>,
    draw: Draw,
    seen: BTreeMap<PeerKey, Seen>,
}

/// Longest reason of a source that is shown.
const REASON_MAX: usize = 200;

/// Why a source could not be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum SourceError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(transparent)]
    Call(#[from] CallError),
    #[error("it does not answer")]
    Silent,
    #[error("it does not have the image")]
    Absent,
    /// What it says, as it may be shown.
    #[error("{0}")]
    Refused(String),
    #[error("it describes another image, or none")]
    OtherImage,
}

impl SourceError {
    /// What `answer` means, which is none that was asked for.
    pub(super) fn of(answer: &Answer) -> Self {
        match answer {
            Answer::Refused(reason) => {
                Self::Refused(reason.chars().filter(|c| !c.is_control()).take(REASON_MAX).collect())
            }
            Answer::Absent => Self::Absent,
            _ => Self::OtherImage,
        }
    }

    /// How the source is, as a person is told it.
    fn as_state(&self) -> String {
        match self {
            Self::Connect(error) => format!("does not answer: {error}"),
            Self::Call(error) => format!("does not answer: {error}"),
            Self::Silent => "does not answer".to_owned(),
            Self::Absent => "has not this image".to_owned(),
            Self::Refused(reason) => format!("refuses: {reason}"),
            Self::OtherImage => "describes another image, or none".to_owned(),
        }
    }
}

impl std::fmt::Debug for Sources {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sources").field("root", &self.root.short()).finish_non_exhaustive()
    }
}

impl Sources {
    pub(super) fn new(
        root: Digest,
        boot: Option<Digest>,
        hello: Hello,
        security: Security,
        chooser: Arc<dyn Chooser>,
        uplink: Arc<Uplink>,
        stop: CancellationToken,
    ) -> Arc<Self> {
        let relay = Relay::default();
        let mut roster = Roster::new(&relay);
        if hello.listen.is_some() {
            roster.insert(PeerKey(hello.key));
        }
        let draw = Draw::new(hello.key);
        Arc::new(Self {
            root,
            boot,
            hello,
            security,
            list: Mutex::new(Vec::new()),
            choice: Mutex::new(Choice { relay, roster, chooser, draw, seen: BTreeMap::new() }),
            changed: Notify::new(),
            resting: AtomicBool::new(false),
            stirred: watch::Sender::new(Instant::now()),
            epoch: Instant::now(),
            uplink,
            stop,
        })
    }

    pub(super) fn all(&self) -> Vec<Arc<Source>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn choice(&self) -> MutexGuard<'_, Choice> {
        self.choice.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Ends when something about a source has changed, or after a moment.
    pub(super) async fn changed(&self) {
        let _ = tokio::time::timeout(RETRY, self.changed.notified()).await;
    }

    /// Whether any source can be asked now.
    pub(super) fn any_up(&self) -> bool {
        self.all().iter().any(|source| source.state().link.is_some() && !source.is_banned())
    }

    /// Whether a source that can be asked does not have everything yet.
    pub(super) fn any_partial(&self) -> bool {
        let partial = |state: &super::source::State| state.link.is_some() && !state.have.complete;
        self.all().iter().any(|source| partial(&source.state()))
    }

    /// How far the furthest source is with the boot cache that is being fetched, when none is known to have frame `frame`
    /// of it and a source has another: the image was recorded again, or elsewhere, and those who still have the first may
    /// wait for each other. None while there is hope, or nobody at all.
    pub(super) fn stuck_at(&self, frame: u32) -> Option<u32> {
        let (mut others, mut furthest) = (false, 0);
        for source in self.all() {
            let state = source.state();
            match (&state.link, state.other_boot) {
                (None, _) => {}
                (Some(_), true) => others = true,
                (Some(_), false) if state.have.complete || frame < state.have.frames => return None,
                (Some(_), false) => furthest = furthest.max(state.have.frames),
            }
        }
        others.then_some(furthest)
    }

    /// Adds the source at `address`, and keeps it connected; whether it is one of the sources now.
    pub(super) fn add(self: &Arc<Self>, address: SocketAddr, configured: bool) -> bool {
        let source = {
            let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
            let named = list.iter().filter(|source| source.is_configured()).count();
            let configured = configured && named < CONFIGURED_MAX;
            if let Some(known) = list.iter().find(|source| source.address == address) {
                known.configured.fetch_or(configured, Ordering::Relaxed);
                return true;
            }
            if !configured && list.len() - named >= FOUND_MAX {
                return false;
            }
            let source = Source::new(address, configured, !self.resting.load(Ordering::Relaxed));
            list.push(Arc::clone(&source));
            source
        };
        let sources = Arc::clone(self);
        let stop = self.stop.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = sources.keep(&source) => {}
                () = stop.cancelled() => {}
            }
            sources.forget(&source);
        });
        true
    }

    fn forget(&self, source: &Arc<Source>) {
        let mut state = source.state();
        if let Some(link) = state.link.take() {
            link.close();
        }
        let key = state.key;
        drop(state);
        self.list.lock().unwrap_or_else(PoisonError::into_inner).retain(|other| !Arc::ptr_eq(other, source));
        if let Some(key) = key {
            let mut choice = self.choice();
            choice.roster.remove(PeerKey(key));
            choice.seen.remove(&PeerKey(key));
        }
    }

    /// Connects to `source` whenever it is needed and not connected, until it is given up.
    async fn keep(self: &Arc<Self>, source: &Arc<Source>) {
        let mut failures = 0;
        while source.is_configured() || failures < FOUND_ATTEMPTS {
            source.until_needed(true).await;
            if source.is_banned() {
                tokio::time::sleep(RETRY).await;
                continue;
            }
            match self.connect(source).await {
                Ok(link) => {
                    failures = 0;
                    let lost = tokio::select! {
                        error = self.supervise(source, &link) => Some(error),
                        () = source.until_needed(false) => None,
                    };
                    link.close();
                    {
                        let mut state = source.state();
                        state.link = None;
                        state.error =
                            Some(lost.as_ref().map_or_else(|| NOT_NEEDED.to_owned(), SourceError::as_state));
                    }
                    if let Some(error) = lost {
                        tracing::info!(source = %source.address, image = %self.root.short(), %error, "lost a source");
                    }
                    self.changed.notify_waiters();
                }
                Err(error) => {
                    if failures == 0 {
                        tracing::info!(source = %source.address, image = %self.root.short(), %error, "cannot use a source");
                    }
                    failures += 1;
                    {
                        let mut state = source.state();
                        state.unreachable = true;
                        state.error = Some(error.as_state());
                    }
                    self.changed.notify_waiters();
                }
            }
            let pause = RETRY * 2_u32.pow(failures.saturating_sub(1).min(8));
            tokio::time::sleep(pause.min(RETRY_MAX)).await;
        }
    }

    /// While nothing is to be fetched but what guests miss: once nobody has stirred for `idle`, only few sources stay
    /// connected, until somebody does. Does not end; when it is dropped, [`Self::need_all`] has to follow.
    pub(super) async fn rest(&self, idle: Duration) {
        let mut stirred = self.stirred.subscribe();
        loop {
            while tokio::time::timeout(idle, stirred.changed()).await.is_ok() {}
            loop {
                self.need_few();
                if tokio::time::timeout(AT_REST_INTERVAL, stirred.changed()).await.is_ok() {
                    break;
                }
            }
            self.need_all();
        }
    }

    /// More is asked for than the sources give that are connected at rest.
    pub(super) fn stir(&self) {
        self.stirred.send_replace(Instant::now());
    }

    /// Connects to all sources.
    pub(super) fn need_all(&self) {
        let list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        self.resting.store(false, Ordering::Relaxed);
        list.iter().for_each(|source| source.need(true));
    }

    /// Lets go of all sources but [`AT_REST`]: of those that were named, the first that are there, and others where too few
    /// are.
    fn need_few(&self) {
        let list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        self.resting.store(true, Ordering::Relaxed);
        let (named, mut found): (Vec<_>, Vec<_>) = list.iter().partition(|source| source.is_configured());
        let mut kept = 0;
        for source in named {
            source.need(kept < AT_REST);
            kept += usize::from(kept < AT_REST && source.link().is_some());
        }
        found.sort_by_cached_key(|source| {
            let state = source.state();
            (state.link.is_none(), state.unreachable)
        });
        for (place, source) in found.into_iter().enumerate() {
            source.need(kept + place < AT_REST);
        }
    }

    async fn connect(self: &Arc<Self>, source: &Arc<Source>) -> Result<Link, SourceError> {
        let (urgent, bulk) = tokio::try_join!(
            Connection::open(source.address, &self.security, &self.hello),
            Connection::open(source.address, &self.security, &self.hello),
        )?;
        self.describe(source, &urgent).await?;
        let link = Link { urgent, bulk };
        {
            let mut state = source.state();
            state.link = Some(link.clone());
            state.unreachable = false;
            state.error = None;
        }
        self.changed.notify_waiters();
        Ok(link)
    }

    /// Asks what the source has, and who else has it.
    async fn describe(
        self: &Arc<Self>,
        source: &Arc<Source>,
        connection: &Connection,
    ) -> Result<(), SourceError> {
        let answered = answer(connection, Ask::Describe(Wanted::Root(self.root))).await?;
        let Answer::Described { have, peers } = &answered.answer else {
            return Err(SourceError::of(&answered.answer));
        };
        let boot = match Manifest::from_bytes(answered.bulk()) {
            Ok(manifest) if manifest.root == self.root => manifest.boot,
            _ => return Err(SourceError::OtherImage),
        };
        let origin = have.origin;
        let key = connection.key();
        {
            let mut state = source.state();
            state.set_have(have.clone());
            state.other_boot = boot.map(|boot| boot.heads_digest) != self.boot;
            state.key = Some(key);
            state.node = connection.node().to_owned();
        }
        if !origin {
            self.choice().roster.insert(PeerKey(key));
        }
        let known: HashSet<u64> = self.all().iter().filter_map(|source| source.state().key).collect();
        for Peer { address, key } in peers {
            if *key != self.hello.key && !known.contains(key) {
                self.add(*address, false);
            }
        }
        Ok(())
    }

    /// Follows what the source has for as long as it answers; says why no longer.
    async fn supervise(self: &Arc<Self>, source: &Arc<Source>, link: &Link) -> SourceError {
        let have = match link.bulk.watch(self.root).await {
            Ok(have) => have,
            Err(error) => return error.into(),
        };
        tokio::select! {
            error = self.follow(source, link, have) => error,
            error = self.ping(source, link) => error,
        }
    }

    /// Notes what the source says it has until the connection that carries bulk brings nothing.
    async fn follow(&self, source: &Source, link: &Link, mut have: watch::Receiver<Have>) -> SourceError {
        let mut look = tokio::time::interval(PING_INTERVAL);
        loop {
            tokio::select! {
                () = link.urgent.closed() => return CallError::Closed.into(),
                () = link.bulk.closed() => return CallError::Closed.into(),
                changed = have.changed() => {
                    if changed.is_err() {
                        return CallError::Closed.into();
                    }
                    let news = have.borrow_and_update().clone();
                    source.state().set_have(news);
                    self.changed.notify_waiters();
                }
                _ = look.tick() => {
                    if link.bulk.silence() > SILENCE_MAX {
                        return SourceError::Silent;
                    }
                }
            }
        }
    }

    /// Asks the source for a sign of life, and tells it whether this node is full, until it does not answer.
    async fn ping(self: &Arc<Self>, source: &Arc<Source>, link: &Link) -> SourceError {
        let mut told_full = false;
        loop {
            tokio::time::sleep(PING_INTERVAL).await;
            if let Err(error) = self.describe(source, &link.urgent).await {
                return error;
            }
            let full = self.uplink.is_full();
            if full != told_full && self.hello.listen.is_some() {
                match answer(&link.urgent, Ask::Full { root: self.root, full }).await {
                    Ok(_) => told_full = full,
                    Err(error) => return error,
                }
            }
        }
    }

    /// Adds everybody who comes to this node for what `holding` holds; never ends.
    pub(super) async fn meet(self: &Arc<Self>, holding: &Holding) {
        let mut comers = holding.comers();
        loop {
            match comers.recv().await {
                Ok(peer) if peer.key != self.hello.key => {
                    self.add(peer.address, false);
                }
                // Who was missed is told of at the next ping.
                Ok(_) | Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => std::future::pending().await,
            }
        }
    }

    /// Connects to `peer`, if it is not; whether it can be asked within `patience`.
    pub(super) async fn reach(self: &Arc<Self>, peer: Peer, patience: Duration) -> bool {
        if !self.add(peer.address, false) {
            return false;
        }
        let until = Instant::now() + patience;
        while self.by_key(peer.key).is_none() {
            let changed = self.changed.notified();
            let in_vain = |source: &Arc<Source>| source.address == peer.address && source.cannot_be_asked();
            if self.all().iter().any(in_vain) {
                return false;
            }
            if self.by_key(peer.key).is_none() && tokio::time::timeout_at(until, changed).await.is_err() {
                return false;
            }
        }
        true
    }

    /// Any source that can be asked, has the boot cache and was not tried.
    pub(super) fn any(&self, tried: &[PeerKey]) -> Option<Arc<Source>> {
        self.all().into_iter().find(|source| {
            let state = source.state();
            let usable = state.link.is_some() && !state.other_boot;
            usable && state.key.is_some_and(|key| !tried.contains(&PeerKey(key)))
        })
    }

    /// What those have who do not have everything, a bitmap of pages each.
    pub(super) fn holders(&self) -> Vec<RoaringBitmap> {
        let partial = |source: &Arc<Source>| {
            let state = source.state();
            (state.link.is_some() && !state.have.complete).then(|| state.pages.clone())
        };
        self.all().iter().filter_map(partial).collect()
    }

    /// The source that goes by `key`, if it can be asked.
    pub(super) fn by_key(&self, key: u64) -> Option<Arc<Source>> {
        self.all().into_iter().find(|source| {
            let state = source.state();
            state.key == Some(key) && state.link.is_some() && !state.other_boot
        })
    }

    /// Whether the source that goes by `key` was late or is silent, so that it is asked only when nobody else will do.
    pub(super) fn is_in_doubt(&self, key: u64) -> bool {
        self.by_key(key).is_some_and(|source| source.is_in_doubt())
    }

    /// The sources that can be asked, as `has` says what each has of what is needed.
    fn candidates(
        &self,
        seen: &BTreeMap<PeerKey, Seen>,
        has: impl Fn(&super::source::State) -> Has,
    ) -> (BTreeMap<PeerKey, Candidate>, BTreeMap<PeerKey, Arc<Source>>) {
        let mut candidates = BTreeMap::new();
        let mut sources = BTreeMap::new();
        let now_ms = self.now_ms();
        for source in self.all() {
            if source.is_banned() {
                continue;
            }
            let state = source.state();
            let (Some(key), Some(_)) = (state.key.map(PeerKey), &state.link) else { continue };
            let mut candidate = Candidate::new(key, has(&state), state.have.origin);
            let load = state.have.load;
            candidate.load = Load::new([
                (Item::CPU, load.cpu),
                (Item::MEMORY, load.memory),
                (Item::DISK, load.disk),
                (Item::NETWORK, load.network),
            ]);
            candidate.seen = seen.get(&key).copied().unwrap_or_default();
            candidate.seen.outstanding = source.requests.load(Ordering::Relaxed);
            if state.is_demoted() {
                candidate.seen.rest(now_ms, 1);
            }
            drop(state);
            candidates.insert(key, candidate);
            sources.insert(key, source);
        }
        (candidates, sources)
    }

    /// Whom to ask for boot frame `frame`, by a node that lacks the frame `position` and has `tried` some in vain.
    /// It may not have the frame yet. Beside a source that is late nobody is asked who has enough to do: least of all
    /// the origin of a burst, whose link is what all wait for.
    pub(super) fn for_frame(
        &self,
        frame: u32,
        position: u32,
        tried: &[PeerKey],
        why: Why,
    ) -> Option<Arc<Source>> {
        let mut choice = self.choice();
        let Choice { relay, roster, chooser, draw, seen } = &mut *choice;
        let has = |state: &super::source::State| match state.have.complete {
            true => Has::Complete,
            false => Has::Stream(state.have.frames),
        };
        let (mut candidates, mut sources) = self.candidates(seen, has);
        sources.retain(|_, source| !source.state().other_boot);
        candidates.retain(|key, _| sources.contains_key(key));
        let now_ms = self.now_ms();
        for (key, candidate) in &mut candidates {
            if sources.get(key).is_some_and(|source| source.is_silent()) {
                candidate.seen.rest(now_ms, 1);
            }
        }
        if why == Why::Late {
            candidates.retain(|_, candidate| !relay::is_full(candidate));
        }
        let asker = Asker { me: PeerKey(self.hello.key), position, roster, now_ms };
        let chosen = if tried.is_empty() {
            let assigned = relay.assign(asker, &[frame], &mut candidates, &**chooser, draw);
            assigned.first().map(|assignment| assignment.source)
        } else {
            relay.again(asker, frame, tried, &mut candidates, &**chooser, draw)
        };
        let rest = || self.rather_than_nobody(Need::Frame(frame), &candidates, tried);
        sources.get(&chosen.or_else(rest)?).cloned()
    }

    /// Whether [`Sources::for_page`] would name somebody, if nobody was tried.
    pub(super) fn have_page(&self, page: u64, frame: Option<usize>) -> bool {
        let has = |source: &Arc<Source>| {
            let state = source.state();
            state.link.is_some() && state.has_page(page, frame).covers(Need::Page(page))
        };
        let list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        list.iter().any(|source| !source.is_banned() && has(source))
    }

    /// Whom to ask for blocks of `page`, of which those that have boot frame `frame` of the boot cache that is being fetched
    /// have them too.
    pub(super) fn for_page(&self, page: u64, frame: Option<usize>, tried: &[PeerKey]) -> Option<Arc<Source>> {
        let mut choice = self.choice();
        let Choice { chooser, draw, seen, .. } = &mut *choice;
        let (candidates, sources) = self.candidates(seen, |state| state.has_page(page, frame));
        let need = Need::Page(page);
        let untried = candidates.values().filter(|candidate| !tried.contains(&candidate.peer));
        let offer = eligible(need, untried, self.now_ms(), &**chooser);
        let chosen = chooser.choose(need, &offer, draw).map(|index| offer[index].peer);
        let rest = || self.rather_than_nobody(need, &candidates, tried);
        sources.get(&chosen.or_else(rest)?).cloned()
    }

    /// One of those that do not have everything and were not `tried`, whatever it has told of: pages that are not all there
    /// are not told of. None after [`GUESSES_MAX`].
    pub(super) fn guess(&self, tried: &[PeerKey]) -> Option<Arc<Source>> {
        let mut choice = self.choice();
        let Choice { draw, seen, .. } = &mut *choice;
        let (candidates, sources) = self.candidates(seen, |state| Has::Answer(!state.have.complete));
        let partial = |c: &&Candidate| c.has == Has::Answer(true) && !tried.contains(&c.peer);
        let untried: Vec<PeerKey> = candidates.values().filter(partial).map(|c| c.peer).collect();
        if untried.is_empty() || tried.len() >= GUESSES_MAX {
            return None;
        }
        sources.get(&untried[draw.below(untried.len())]).cloned()
    }

    /// One that rests after a failure, when nobody else has what is needed.
    fn rather_than_nobody(
        &self,
        need: Need,
        candidates: &BTreeMap<PeerKey, Candidate>,
        tried: &[PeerKey],
    ) -> Option<PeerKey> {
        let usable = candidates.values().filter(|c| c.has.covers(need) && !tried.contains(&c.peer));
        usable.min_by_key(|c| c.seen.resting_until_ms).map(|candidate| candidate.peer)
    }

    /// Notes a good answer.
    pub(super) fn answered(&self, source: &Source, took: Duration) {
        let key = source.state().key.map(PeerKey);
        if let Some(key) = key {
            let mut choice = self.choice();
            choice.seen.entry(key).or_default().answered(took.as_secs_f32() * 1000.0);
        }
    }

    /// Notes a failure.
    pub(super) fn failed(&self, source: &Source) {
        let key = source.state().key.map(PeerKey);
        if let Some(key) = key {
            let now_ms = self.now_ms();
            self.choice().seen.entry(key).or_default().failed(now_ms);
        }
    }
}

/// The answer to a simple question. On a slow link it may stand behind what guests wait for: as long as that comes, the
/// source is there.
async fn answer(connection: &Connection, ask: Ask) -> Result<Answered, SourceError> {
    let asked = Instant::now();
    let mut call = std::pin::pin!(connection.call(ask));
    let mut look = asked + PING_TIMEOUT;
    loop {
        if let Ok(answered) = tokio::time::timeout_at(look, &mut call).await {
            return Ok(answered?);
        }
        let waited = asked.elapsed();
        let silent = connection.silence().min(waited);
        if silent >= PING_TIMEOUT || waited >= PING_MAX {
            return Err(SourceError::Silent);
        }
        look = Instant::now() + (PING_TIMEOUT - silent);
    }
}

#[cfg(test)]
mod tests;
