//! The nodes that may be asked for one image, and which of them is asked for what.
//!
//! Finds more of them by asking those it knows. What is eligible and what is best is decided in `crate::choose`; here
//! is only what that needs to know of each.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use roaring::RoaringBitmap;
use tokio::sync::Notify;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::choose::{
    Asker, Candidate, Chooser, Draw, Has, Item, Load, Need, PeerKey, Relay, Roster, Seen, eligible, relay,
};
use crate::digest::Digest;
use crate::image::manifest::Manifest;
use crate::peer::connection::{CallError, ConnectError, Connection};
use crate::peer::holding::Holding;
use crate::peer::message::{Answer, Ask, Hello, Peer, Wanted};
use crate::peer::transport::Security;
use crate::peer::uplink::Uplink;

use super::request::Why;
use super::source::{Link, Source};

/// Pause between attempts to reach a source that does not answer.
pub(super) const RETRY: Duration = Duration::from_millis(200);
/// A source that does not answer a simple question for so long is connected to anew.
const PING_TIMEOUT: Duration = Duration::from_secs(2);
const PING_INTERVAL: Duration = Duration::from_secs(1);
/// As above, for the connection that carries bulk: a frame on a slow link takes its time.
const SILENCE_MAX: Duration = Duration::from_secs(5);
/// Sources found by asking others, beside those that were named.
const FOUND_MAX: usize = 256;
/// Sources that are asked in one turn for what nobody is known to have.
const GUESSES_MAX: usize = 8;
/// Attempts to reach a source that was only found.
const FOUND_ATTEMPTS: u32 = 25;

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
            let found = list.iter().filter(|source| !source.configured).count();
            if list.iter().any(|source| source.address == address) {
                return true;
            }
            if !configured && found >= FOUND_MAX {
                return false;
            }
            let source = Source::new(address, configured);
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
            link.urgent.close();
            link.bulk.close();
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

    /// Connects to `source` whenever it is not, until it is no longer wanted.
    async fn keep(self: &Arc<Self>, source: &Arc<Source>) {
        let mut failures = 0;
        while source.configured || failures < FOUND_ATTEMPTS {
            if source.is_banned() {
                tokio::time::sleep(RETRY).await;
                continue;
            }
            match self.connect(source).await {
                Ok(link) => {
                    failures = 0;
                    let error = self.supervise(source, &link).await;
                    link.urgent.close();
                    link.bulk.close();
                    {
                        let mut state = source.state();
                        state.link = None;
                        state.error = Some(error.as_state());
                    }
                    tracing::info!(source = %source.address, image = %self.root.short(), %error, "lost a source");
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
            tokio::time::sleep(RETRY).await;
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
        let ask = Ask::Describe(Wanted::Root(self.root));
        let answered = tokio::time::timeout(PING_TIMEOUT, connection.call(ask))
            .await
            .map_err(|_| SourceError::Silent)??;
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
        for Peer { address, key } in peers {
            if *key != self.hello.key && self.all().iter().all(|known| known.state().key != Some(*key)) {
                self.add(*address, false);
            }
        }
        Ok(())
    }

    /// Follows what the source has for as long as it answers; says why no longer.
    async fn supervise(self: &Arc<Self>, source: &Arc<Source>, link: &Link) -> SourceError {
        let mut have = match link.bulk.watch(self.root).await {
            Ok(have) => have,
            Err(error) => return error.into(),
        };
        let mut told_full = false;
        let mut ping = tokio::time::interval(PING_INTERVAL);
        ping.tick().await;
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
                _ = ping.tick() => {
                    if let Err(error) = self.describe(source, &link.urgent).await {
                        return error;
                    }
                    let full = self.uplink.is_full();
                    if full != told_full && self.hello.listen.is_some() {
                        let tell = link.urgent.call(Ask::Full { root: self.root, full });
                        match tokio::time::timeout(PING_TIMEOUT, tell).await {
                            Ok(Ok(_)) => told_full = full,
                            Ok(Err(error)) => return error.into(),
                            Err(_) => return SourceError::Silent,
                        }
                    }
                    if link.bulk.silence() > SILENCE_MAX {
                        return SourceError::Silent;
                    }
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
        if why == Why::Late {
            candidates.retain(|_, candidate| !relay::is_full(candidate));
        }
        let asker = Asker { me: PeerKey(self.hello.key), position, roster, now_ms: self.now_ms() };
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

#[cfg(test)]
mod tests;
