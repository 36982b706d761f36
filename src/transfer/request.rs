//! One request, to as many sources as it takes: accounting, deadlines, hedging and failover.
//!
//! A request that is late by what its source was seen to need is sent to a second source as well, and the first
//! answer wins (at most 5 % extra requests). A source that breaks is replaced at once. An answer that is late and was
//! passed by those to later requests, or that is late beyond doubt, may be lost: the request is sent again, to another
//! source or to the same, and what comes first counts. A relay is waited for while it may not have the frame itself; once
//! it says that it has it and sends nothing, or is silent, others are asked for what it owes, as far as that is next in
//! the stream, however many hedges there were. A source that was overtaken is not the first choice for a while,
//! and if its connection then stands still, it is made anew, so that the rest is not waited for there.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::time::Instant;

use crate::choose::PeerKey;
use crate::peer::connection::{Answered, CallError};
use crate::peer::message::{Answer, Ask};

use super::counters::{Counters, Kind};
use super::engine::Shared;
use super::source::Source;

/// Hedges that are allowed beyond their share.
const HEDGES_FREE: u64 = 4;
/// One hedge to so many requests.
const HEDGE_SHARE: u64 = 20;

/// How often it is looked again whether a late answer may be hedged.
const LATE_AGAIN: Duration = Duration::from_millis(50);

/// The least time after which an answer counts as lost; each further one is waited for twice as long, up to a limit, so
/// that a link that is slow beyond belief still brings the first.
const LOST_MIN: Duration = Duration::from_secs(3);
const LOST_MAX: Duration = Duration::from_secs(10);
/// By how much later than late an answer is lost.
const LOST_FACTOR: u32 = 4;
/// Requests for one thing under way at most, but to sources that were not asked for it before.
const AGAIN_MAX: usize = 6;

/// What came of a request.
pub(super) struct Reply {
    pub(super) answered: Answered,
    pub(super) source: Arc<Source>,
}

/// Why a source is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Why {
    /// The first, or instead of one that failed.
    Needed,
    /// Beside one whose answer is late.
    Late,
}

/// Names a source that can be asked now, given those that were tried and why one is wanted.
pub(super) type Pick<'a> = dyn Fn(&[PeerKey], Why) -> Option<Arc<Source>> + Sync + 'a;

/// What a request is for, and how it is judged.
#[derive(Debug, Clone, Copy)]
pub(super) struct Terms {
    pub(super) kind: Kind,
    /// Bytes that the answer is expected to have.
    pub(super) bytes: u64,
    /// The boot frame that is asked for, when the source may have to wait for it itself.
    pub(super) relayed: Option<u32>,
}

/// How it stands with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    InTime,
    /// Another may be asked as well, if not too many were.
    Late,
    /// A relay that was late with other frames, or has the frame and does not send it, is not waited for.
    Owed,
    /// Nothing at all comes from those that were asked.
    Silent,
    /// Those that were asked have answered later requests.
    Lost,
}

/// A source that was asked and has not answered.
struct Asked {
    source: Arc<Source>,
    /// Which of the requests to it this was; see [`Source::note_asked`].
    number: u64,
    at: Instant,
    /// Since when it is known to have the frame, if it is a relay.
    there: Option<Instant>,
}

impl Shared {
    /// Asks the sources that `pick` names until one answers, once that can be kept. None when `pick` has no more. The sources tried are added
    /// to `tried`.
    pub(super) async fn request(
        &self,
        terms: Terms,
        tried: &mut Vec<PeerKey>,
        pick: &Pick<'_>,
        ask: &Ask,
    ) -> Option<Reply> {
        type Asking<'a> = BoxFuture<'a, (Arc<Source>, u64, Result<Answered, CallError>)>;
        let mut running: FuturesUnordered<Asking<'_>> = FuturesUnordered::new();
        let mut asked: Vec<Asked> = Vec::new();
        let start = |source: Arc<Source>, asked: &mut Vec<Asked>, tried: &mut Vec<PeerKey>| -> Asking<'_> {
            tried.extend(source.state().key.map(PeerKey));
            let number = source.note_asked(terms.kind);
            asked.push(Asked { source: Arc::clone(&source), number, at: Instant::now(), there: None });
            let ask = ask.clone();
            Box::pin(async move {
                let result = self.ask_one(&source, terms, number, ask).await;
                (source, number, result)
            })
        };
        self.keeping.well().await;
        let mut late = Instant::now();
        let mut lost_after = LOST_MIN;
        let mut lost = late;
        // When the answer was lost there was nobody else: who comes then is asked at once.
        let mut alone = false;
        loop {
            if running.is_empty() {
                let source = pick(tried, Why::Needed)?;
                let late_after = match terms.relayed {
                    Some(_) => LATE_AGAIN,
                    None => source.late_after(terms.bytes),
                };
                late = Instant::now() + late_after;
                lost_after = LOST_MIN.max(late_after * LOST_FACTOR);
                lost = Instant::now() + lost_after;
                alone = false;
                running.push(start(source, &mut asked, tried));
            }
            tokio::select! {
                Some((source, number, result)) = running.next() => match result {
                    Ok(answered) => {
                        // Whom it overtook, not who was asked after it and had no time.
                        let is_it = |other: &Asked| other.number == number && Arc::ptr_eq(&other.source, &source);
                        let before = asked.iter().take_while(|other| !is_it(other));
                        for other in before.filter(|other| !Arc::ptr_eq(&other.source, &source)) {
                            other.overtaken(self, terms);
                        }
                        return Some(Reply { answered, source });
                    }
                    Err(_) => {
                        self.sources.failed(&source);
                        asked.retain(|other| other.number != number || !Arc::ptr_eq(&other.source, &source));
                        if running.is_empty() {
                            // Now, or by the caller, who asks anew when there is a source again.
                            Counters::count(&self.counters.failovers);
                        }
                    }
                },
                () = tokio::time::sleep_until(late), if running.len() < AGAIN_MAX => {
                    late = Instant::now() + LATE_AGAIN;
                    let standing = self.standing(terms, &mut asked);
                    let source = match standing {
                        Standing::Silent => pick(tried, Why::Late),
                        _ if running.len() >= 2 => None,
                        Standing::Lost => pick(tried, Why::Needed),
                        Standing::Owed => pick(tried, Why::Late),
                        Standing::Late if self.may_hedge() => pick(tried, Why::Late),
                        Standing::Late | Standing::InTime => None,
                    };
                    if let Some(source) = source {
                        let is_hedge = standing == Standing::Late;
                        Counters::count(if is_hedge { &self.counters.hedges } else { &self.counters.failovers });
                        running.push(start(source, &mut asked, tried));
                    }
                }
                () = tokio::time::sleep_until(lost) => {
                    let patience = self.stream.patience() * LOST_FACTOR;
                    if terms.relayed.is_some() && asked.iter().any(|asked| asked.at.elapsed() < patience) {
                        lost = Instant::now() + LATE_AGAIN;
                        continue;
                    }
                    lost_after = (lost_after * 2).min(LOST_MAX.max(lost_after));
                    lost = Instant::now() + lost_after;
                    for Asked { source: silent, .. } in &asked {
                        self.sources.failed(silent);
                        silent.demote(self.options.demotion);
                    }
                    let other = pick(tried, Why::Needed);
                    alone = other.is_none();
                    if alone {
                        self.sources.stir();
                    }
                    let again = || asked.first().map(|first| Arc::clone(&first.source));
                    let fits = |source: &Arc<Source>| running.len() < AGAIN_MAX || is_new(source, tried);
                    if let Some(source) = other.or_else(again).filter(fits) {
                        Counters::count(&self.counters.failovers);
                        running.push(start(source, &mut asked, tried));
                    }
                }
                () = self.sources.changed(), if alone => {
                    if let Some(source) = pick(tried, Why::Needed) {
                        alone = false;
                        Counters::count(&self.counters.failovers);
                        running.push(start(source, &mut asked, tried));
                    }
                }
            }
        }
    }

    /// How it stands with a request that has been waited for until it may be late.
    fn standing(&self, terms: Terms, asked: &mut [Asked]) -> Standing {
        let Some(frame) = terms.relayed else {
            let passed = |asked: &Asked| asked.source.has_passed(terms.kind, asked.number);
            return if asked.iter().all(passed) { Standing::Lost } else { Standing::Late };
        };
        for asked in asked.iter_mut().filter(|asked| asked.there.is_none() && asked.source.has_relayed(frame))
        {
            asked.there = Some(Instant::now());
        }
        let sending_max = self.stream.sending_max();
        let is_slow = |asked: &Asked| asked.there.is_some_and(|since| since.elapsed() > sending_max);
        if asked.iter().all(|asked| asked.source.is_silent()) {
            Standing::Silent
        } else if asked.iter().all(|asked| is_slow(asked) || asked.source.is_in_doubt()) {
            Standing::Owed
        } else if asked.iter().all(|asked| asked.at.elapsed() > self.stream.patience()) {
            Standing::Late
        } else {
            Standing::InTime
        }
    }

    fn may_hedge(&self) -> bool {
        let hedges = self.counters.hedges.load(Ordering::Relaxed);
        hedges * HEDGE_SHARE <= self.counters.requests.total() + HEDGES_FREE * HEDGE_SHARE
    }

    /// One request to one source, with everything that is counted; `number` is what [`Source::note_asked`] gave it.
    async fn ask_one(
        &self,
        source: &Source,
        terms: Terms,
        number: u64,
        ask: Ask,
    ) -> Result<Answered, CallError> {
        let link = source.link().ok_or(CallError::Closed)?;
        let connection = link.for_kind(terms.kind);
        let queued = source.outstanding.fetch_add(terms.bytes, Ordering::Relaxed);
        source.requests.fetch_add(1, Ordering::Relaxed);
        let _accounts = Accounts { source, bytes: terms.bytes };
        self.counters.requests.add(terms.kind, 1);
        let began = Instant::now();
        let answered = connection.call(ask).await?;
        source.note_answered(terms.kind, number);
        let bytes = answered.bulk().len() as u64;
        source.bytes.add(terms.kind, bytes);
        self.counters.bytes.add(terms.kind, bytes);
        if source.state().have.origin {
            self.counters.origin_bytes.add(terms.kind, bytes);
        }
        match answered.answer {
            Answer::Data if terms.relayed.is_some() => self.stream.relayed(began.elapsed()),
            Answer::Data | Answer::Blocks { .. } => {
                let took = began.elapsed();
                source.note_answer(bytes, queued, took);
                self.sources.answered(source, took);
            }
            // Answered at once, it would seem to be the one with the least to do, and be asked first each time.
            Answer::Refused(_) => self.sources.failed(source),
            Answer::Absent if source.state().have.complete => self.sources.failed(source),
            _ => {}
        }
        Ok(answered)
    }

    /// Drops a source that has sent what is not the image.
    pub(super) fn caught(&self, source: &Source, what: &str) {
        Counters::count(&self.counters.corrupt);
        Counters::count(&self.counters.bans);
        source.corrupt.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(
            source = %source.address, node = %source.state().node, image = %self.holding.root().short(), what,
            seconds = self.options.ban.as_secs(), "a peer sent wrong bytes: not used for a while"
        );
        source.ban(self.options.ban);
    }
}

/// Whether `source` is not among those that were `tried`.
fn is_new(source: &Source, tried: &[PeerKey]) -> bool {
    source.state().key.is_none_or(|key| !tried.contains(&PeerKey(key)))
}

impl Asked {
    /// Another answered that was asked later. A relay that had not got the frame itself is not to blame.
    fn overtaken(&self, shared: &Shared, terms: Terms) {
        if self.source.requests.load(Ordering::Relaxed) == 0 {
            return;
        }
        if terms.relayed.is_none() || self.there.is_some() || self.source.is_silent() {
            self.source.demote(shared.options.demotion);
        }
        if terms.relayed.is_none() {
            self.source.hang_up_if_still(terms.kind);
        }
    }
}

/// Takes a request off its source's account when it ends, however it ends.
struct Accounts<'a> {
    source: &'a Source,
    bytes: u64,
}

impl Drop for Accounts<'_> {
    fn drop(&mut self) {
        self.source.outstanding.fetch_sub(self.bytes, Ordering::Relaxed);
        self.source.requests.fetch_sub(1, Ordering::Relaxed);
    }
}
