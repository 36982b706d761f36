//! What each request is answered with. Nothing in a request is believed beyond the limits that were checked.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::block::{BLOCK_SIZE, Extent};
use crate::choose::{Ledger, PeerKey, Relay, relay};
use crate::digest::Digest;
use crate::image::tree::TreeError;
use crate::peer::fault::{self, Fate};
use crate::peer::holding::{Holding, KnownTree};
use crate::peer::message::{
    Answer, Ask, HEARTBEAT, Have, PAGES_LENGTH_MAX, Peer, Reply, Request, Wanted, from_wire, to_wire,
};

use super::session::{Class, Outgoing, Queues, Session};
use super::{Lack, Server};

/// How often news of a watched image are told at most.
const WATCH_INTERVAL: Duration = Duration::from_millis(50);
/// Larger pieces are compressed on a thread of their own.
const PACK_INLINE_MAX: usize = 16 << 10;
const PACK_LEVEL: i32 = 1;

type Answered = (Answer, Vec<u8>);

const ABSENT: Answered = (Answer::Absent, Vec::new());

/// What is said of an image of which nothing is given.
fn lacking(lack: Lack) -> Answered {
    match lack {
        Lack::Absent => ABSENT,
        Lack::Unreadable => {
            (Answer::Refused("it has the image, but cannot read it: see its log".to_owned()), Vec::new())
        }
    }
}

/// Answers one request into the queue of its class.
pub(super) async fn answer(server: &Server, session: &Session, queues: &Queues, request: Request) {
    let Request { id, ask } = request;
    if !ask.is_within_limits() {
        server.counters.refused.fetch_add(1, Ordering::Relaxed);
        let refused = Answer::Refused("the request is larger than the protocol allows".to_owned());
        return send(queues, Class::Life, id, (refused, Vec::new()), Fate::Send).await;
    }
    if let Ask::Watch { root } = ask {
        return watch(server, session, queues, id, &Wanted::Root(root)).await;
    }
    let class = class(&ask);
    let uplink = &server.options.uplink;
    let mut promise = None;
    if let Ask::Frame { root, index, wait: true } = ask
        && let Ok(holding) = session.image(server, &Wanted::Root(root)).await
    {
        let there_is = holding.frames().is_some_and(|frames| (index as usize) < frames.count());
        if there_is && let Some(other) = elsewhere(server, session, &holding, index) {
            return send(queues, class, id, (Answer::Elsewhere(other), Vec::new()), Fate::Send).await;
        }
        promise =
            holding.frames().map(|frames| frames.length(index as usize)).map(|bytes| uplink.promise(bytes));
        holding.wait_frame(index as usize).await;
    }
    // A place in the queue and a share of the memory first, the data into memory after it.
    let Ok(place) = queues.of(class).reserve().await else { return };
    let mut share = match bytes_of(server, session, &ask).await {
        0 => None,
        bytes => Some(session.member.share(bytes, matches!(class, Class::Demand | Class::Other)).await),
    };
    let fault = server.options.faults.as_ref().and_then(|faults| faults.next(&ask));
    let asked = if fault == Some(fault::Fault::WrongPlace) { fault::elsewhere(&ask) } else { ask };
    let (mut answer, mut bulk) = find(server, session, asked, fault).await;
    let fate = match (&server.options.faults, fault) {
        (Some(faults), Some(fault)) => faults.spoil(fault, &mut answer, &mut bulk),
        _ => Fate::Send,
    };
    if matches!(answer, Answer::Absent | Answer::Refused(_)) {
        server.counters.refused.fetch_add(1, Ordering::Relaxed);
    }
    // What was promised, and charged, is now what is there.
    let bytes = bulk.len() as u64;
    if let Some(share) = &mut share {
        share.shrink(bytes);
    }
    promise = Some(uplink.promise(bytes)).filter(|_| bytes > 0).or(promise);
    let reply = Reply { id, answer };
    place.send(Outgoing { class, reply, bulk, fate, _promise: promise, _share: share });
}

async fn send(queues: &Queues, class: Class, id: u32, answered: Answered, fate: Fate) {
    // The writer is gone only when the connection is.
    let _ = queues.of(class).send(outgoing(class, id, answered, fate)).await;
}

/// A short answer.
fn outgoing(class: Class, id: u32, (answer, bulk): Answered, fate: Fate) -> Outgoing {
    Outgoing { class, reply: Reply { id, answer }, bulk, fate, _promise: None, _share: None }
}

const fn class(ask: &Ask) -> Class {
    match ask {
        Ask::Frame { .. } => Class::Stream,
        Ask::Blocks { urgent: true, .. } => Class::Demand,
        Ask::Blocks { urgent: false, .. } => Class::Fill,
        Ask::Heads { .. } | Ask::Top { .. } => Class::Other,
        Ask::Describe(_) | Ask::Full { .. } | Ask::Watch { .. } | Ask::Cancel { .. } => Class::Life,
    }
}

/// Most bytes that the answer to `ask` will have in memory. Those that are always short, signs of life among them, count
/// nothing, and wait for nobody.
async fn bytes_of(server: &Server, session: &Session, ask: &Ask) -> u64 {
    let image = async |root: &Digest| session.image(server, &Wanted::Root(*root)).await;
    match ask {
        Ask::Blocks { extents, groups, pages, .. } => {
            let blocks: u64 = extents.iter().map(|(_, count)| u64::from(*count)).sum();
            (blocks + groups.len() as u64 + pages.len() as u64) * BLOCK_SIZE
        }
        Ask::Frame { root, index, .. } => {
            let image = image(root).await;
            image.ok().and_then(|image| Some(image.frames()?.length(*index as usize))).unwrap_or(0)
        }
        Ask::Heads { root } => {
            let image = image(root).await;
            image.ok().and_then(|image| Some(image.frames()?.heads_bytes().len() as u64)).unwrap_or(0)
        }
        Ask::Top { root } => image(root).await.map_or(0, |image| image.tree.top().len() as u64),
        Ask::Describe(_) | Ask::Full { .. } | Ask::Watch { .. } | Ask::Cancel { .. } => 0,
    }
}

async fn find(server: &Server, session: &Session, ask: Ask, fault: Option<fault::Fault>) -> Answered {
    let wanted = match &ask {
        Ask::Describe(wanted) => wanted.clone(),
        Ask::Heads { root } | Ask::Top { root } | Ask::Frame { root, .. } | Ask::Blocks { root, .. } => {
            Wanted::Root(*root)
        }
        Ask::Full { root, full } => {
            note_full(server, session, *root, *full);
            return (Answer::Data, Vec::new());
        }
        Ask::Watch { .. } | Ask::Cancel { .. } => return ABSENT,
    };
    let holding = match session.image(server, &wanted).await {
        Ok(holding) => holding,
        Err(lack) => return lacking(lack),
    };
    match ask {
        Ask::Describe(_) => {
            let peers = session.come(server, holding.root());
            if let Some(peer) = session.peer {
                holding.met(peer);
            }
            let have = Have { load: server.load(), ..holding.have() };
            (Answer::Described { have, peers }, holding.manifest.to_bytes())
        }
        Ask::Heads { .. } => {
            holding.frames().map_or(ABSENT, |frames| (Answer::Data, frames.heads_bytes().to_vec()))
        }
        Ask::Top { .. } => (Answer::Data, holding.tree.top().to_vec()),
        Ask::Frame { index, .. } => frame(&holding, index as usize).await,
        Ask::Blocks { extents, groups, pages, pack, .. } => {
            let extents: Vec<Extent> = extents.into_iter().map(from_wire).collect();
            let elsewhere = fault == Some(fault::Fault::WrongPlace);
            blocks(&holding, &extents, (&groups, &pages), pack, elsewhere).await.unwrap_or_else(|error| {
                tracing::error!(image = %holding.root().short(), %error, "cannot read a block for a peer");
                (Answer::Refused("it cannot be read".to_owned()), Vec::new())
            })
        }
        Ask::Full { .. } | Ask::Watch { .. } | Ask::Cancel { .. } => ABSENT,
    }
}

/// Notes what a node that serves image `root` says of itself.
fn note_full(server: &Server, session: &Session, root: Digest, full: bool) {
    let mut ledgers = server.ledgers.lock().unwrap_or_else(PoisonError::into_inner);
    if let (Some(peer), Some(ledger)) = (session.peer, ledgers.get_mut(&root)) {
        ledger.set_full(PeerKey(peer.key), full);
    }
}

async fn frame(holding: &Arc<Holding>, index: usize) -> Answered {
    if !holding.frames().is_some_and(|frames| frames.has(index)) {
        return ABSENT;
    }
    let holding = Arc::clone(holding);
    let read = move || holding.frames().map(|frames| frames.read(index));
    match tokio::task::spawn_blocking(read).await {
        Ok(Some(Ok(bytes))) => (Answer::Data, bytes),
        Ok(Some(Err(error))) => {
            tracing::error!(index, %error, "cannot give a boot frame to a peer");
            ABSENT
        }
        _ => ABSENT,
    }
}

async fn blocks(
    holding: &Arc<Holding>,
    extents: &[Extent],
    (groups, pages): (&[u32], &[u32]),
    packs: bool,
    elsewhere: bool,
) -> io::Result<Answered> {
    let Parts { groups, pages, mut bulk } = if groups.is_empty() && pages.is_empty() {
        Parts::default()
    } else {
        let (holding, groups, pages) = (Arc::clone(holding), groups.to_vec(), pages.to_vec());
        let read = move || Parts::read(&holding.tree, &groups, &pages);
        tokio::task::spawn_blocking(read).await.map_err(io::Error::other)?.map_err(io::Error::other)?
    };
    let mut extent_heads = Vec::new();
    let mut data = Vec::new();
    let end = holding.block_count();
    for extent in extents.iter().filter(|extent| !extent.is_empty() && extent.end() <= end) {
        for run in holding.present(*extent) {
            let from = match elsewhere {
                true if run.end() < end => Extent::new(run.start + 1, run.count),
                true if run.start > 0 => Extent::new(run.start - 1, run.count),
                _ => run,
            };
            extent_heads.push(to_wire(run));
            data.extend(holding.read(from).await?);
        }
    }
    let data_length = data.len();
    let (data, packed) = if packs { pack(data).await? } else { (data, false) };
    debug_assert!(data.len() <= data_length, "packed data is kept only when it is shorter");
    bulk.extend_from_slice(&data);
    Ok((Answer::Blocks { groups, pages, extents: extent_heads, packed }, bulk))
}

/// Parts of a digest tree, as they are sent: their numbers and lengths, and their bytes one after the other.
#[derive(Default)]
struct Parts {
    groups: Vec<(u32, u32)>,
    pages: Vec<(u32, u32)>,
    bulk: Vec<u8>,
}

impl Parts {
    /// Those of `groups` and `pages` that are known. Blocks.
    fn read(tree: &KnownTree, groups: &[u32], pages: &[u32]) -> Result<Self, TreeError> {
        let length = |bytes: &[u8]| u32::try_from(bytes.len()).expect("a part of the tree is short");
        let mut parts = Self::default();
        for group in groups {
            if let Some(bytes) = tree.group(u64::from(*group))? {
                parts.groups.push((*group, length(&bytes)));
                parts.bulk.extend_from_slice(&bytes);
            }
        }
        for page in pages {
            if let Some(page_digests) = tree.page(u64::from(*page))? {
                let bytes = page_digests.to_bytes();
                parts.pages.push((*page, length(&bytes)));
                parts.bulk.extend_from_slice(&bytes);
            }
        }
        Ok(parts)
    }
}

/// The node that the other side should ask for the frame, because this one, the origin, has just sent it there.
fn elsewhere(server: &Server, session: &Session, holding: &Holding, index: u32) -> Option<Peer> {
    let asker = session.peer.filter(|_| holding.is_origin())?;
    let mut ledgers = server.ledgers.lock().unwrap_or_else(PoisonError::into_inner);
    let ledger = ledgers.entry(holding.root()).or_insert_with(|| Ledger::new(&Relay::default()));
    match ledger.ask(index, PeerKey(asker.key)) {
        relay::Answer::Send => None,
        relay::Answer::Ask(other) => server.tracker.find(holding.root(), other.0),
    }
}

/// `data` compressed, if that makes it shorter by an eighth.
async fn pack(data: Vec<u8>) -> io::Result<(Vec<u8>, bool)> {
    if (data.len() as u64) < BLOCK_SIZE {
        return Ok((data, false));
    }
    let small = data.len() <= PACK_INLINE_MAX;
    let work = move || -> io::Result<(Vec<u8>, bool)> {
        let packed = zstd::bulk::compress(&data, PACK_LEVEL)?;
        Ok(if packed.len() < data.len() / 8 * 7 { (packed, true) } else { (data, false) })
    };
    if small { work() } else { tokio::task::spawn_blocking(work).await.map_err(io::Error::other)? }
}

/// Tells what is held: when there are more boot frames, and as a sign of life. Which pages there are, a
/// longer message, only with the latter: a hundred nodes that fill tell each other all the time.
async fn watch(server: &Server, session: &Session, queues: &Queues, id: u32, wanted: &Wanted) {
    let holding = match session.image(server, wanted).await {
        Ok(holding) => holding,
        Err(lack) => return send(queues, Class::Life, id, lacking(lack), Fate::Send).await,
    };
    let mut beat = Instant::now();
    let mut told = None;
    loop {
        // What waits for a place is not in memory yet.
        let Ok(place) = queues.of(Class::Life).reserve().await else { return };
        let mut have = Have { load: server.load(), ..holding.have() };
        if Instant::now() >= beat {
            beat = Instant::now() + HEARTBEAT;
            let version = Some(holding.version());
            if told != version {
                told = version;
                have.pages = Some(holding.pages()).filter(|pages| pages.len() <= PAGES_LENGTH_MAX);
            }
        }
        let before = (have.frames, have.complete);
        place.send(outgoing(Class::Life, id, (Answer::Have(have), Vec::new()), Fate::Send));
        tokio::time::sleep(WATCH_INTERVAL).await;
        loop {
            let mut more = std::pin::pin!(holding.more_frames());
            more.as_mut().enable();
            let now = holding.have();
            if (now.frames, now.complete) != before || Instant::now() >= beat {
                break;
            }
            let _ = tokio::time::timeout_at(beat, more).await;
        }
    }
}
