//! One connection of the server: greets, reads requests, and writes replies in the order of their urgency.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::{AbortHandle, Abortable, FutureExt};
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::io::{AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::digest::Digest;
use crate::peer::fault::Fate;
use crate::peer::holding::Holding;
use crate::peer::message::{Answer, Ask, Hello, PROTOCOL_VERSION, Peer, Reply, Request, Wanted};
use crate::peer::transport::Transport;
use crate::peer::uplink::Promise;
use crate::wire::frame::{self, FrameError, FrameType};
use crate::wire::io::{WireError, read_frame, write_message};

use super::members::{Member, Share};
use super::{Lack, Server, answer};

const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// A peer that was greeted and asks nothing for so long is dropped. One that has asked may be silent: it watches.
const FIRST_REQUEST_TIMEOUT: Duration = Duration::from_secs(60);
/// A peer that takes no bytes for so long is dropped.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// And so is one that takes a reply at fewer bytes a second than these, after as long.
const WRITE_RATE_MIN: u64 = 16 << 10;
const REQUESTS_MAX: usize = 256;
const REQUEST_BYTES_MAX: usize = 64 << 10;
const WRITE_PIECE: usize = 64 << 10;
/// Images that one connection has asked about and that are kept at hand.
const IMAGES_MAX: usize = 64;

/// How urgent a reply is; also what its bytes count as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// A sign of life: always short, and never behind what is long.
    Life,
    Other,
    Demand,
    Stream,
    Fill,
}

/// A reply that is ready to be sent.
pub(super) struct Outgoing {
    pub(super) class: Class,
    pub(super) reply: Reply,
    pub(super) bulk: Vec<u8>,
    pub(super) fate: Fate,
    /// Kept until it is sent.
    pub(super) _promise: Option<Promise>,
    /// As the promise.
    pub(super) _share: Option<Share>,
}

/// The queues into the writer. Few places: who has data in memory waits for one first.
#[derive(Clone)]
pub(super) struct Queues {
    life: mpsc::Sender<Outgoing>,
    urgent: mpsc::Sender<Outgoing>,
    stream: mpsc::Sender<Outgoing>,
    fill: mpsc::Sender<Outgoing>,
}

impl Queues {
    pub(super) fn of(&self, class: Class) -> &mpsc::Sender<Outgoing> {
        match class {
            Class::Life => &self.life,
            Class::Other | Class::Demand => &self.urgent,
            Class::Stream => &self.stream,
            Class::Fill => &self.fill,
        }
    }
}

/// What the requests of one connection share.
pub(super) struct Session {
    pub(super) id: u64,
    /// The other side, if it serves peers itself.
    pub(super) peer: Option<Peer>,
    pub(super) member: Member,
    images: Mutex<HashMap<Digest, Arc<Holding>>>,
    /// The image that was described last, and until which of its comers the other side was told of them.
    told: Mutex<Option<(Digest, u64)>>,
}

impl Session {
    /// Notes that the other side came for image `root`; others that did, of whom it was not told, and a few of the rest.
    pub(super) fn come(&self, server: &Server, root: Digest) -> Vec<Peer> {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let after = told.filter(|(of, _)| *of == root).map_or(0, |(_, after)| after);
        let (peers, until) = server.tracker.come(root, self.id, self.peer, after);
        *told = Some((root, until));
        peers
    }

    /// The image `root`, from what was asked for before or from the provider.
    pub(super) async fn image(&self, server: &Server, wanted: &Wanted) -> Result<Arc<Holding>, Lack> {
        if let Wanted::Root(root) = wanted {
            let known = self.images.lock().unwrap_or_else(PoisonError::into_inner).get(root).cloned();
            if let Some(holding) = known {
                return Ok(holding);
            }
        }
        let holding = Arc::clone(&server.provider).find(wanted.clone()).await?;
        let mut images = self.images.lock().unwrap_or_else(PoisonError::into_inner);
        if images.len() >= IMAGES_MAX {
            images.clear();
        }
        images.insert(holding.root(), Arc::clone(&holding));
        Ok(holding)
    }
}

/// Serves one connection of `member`, which has been greeted, until it closes.
pub(super) async fn run(
    server: &Server,
    stream: Box<dyn Transport>,
    hello: &Hello,
    member: Member,
    address: SocketAddr,
    id: u64,
) -> Result<(), WireError> {
    let session = Session {
        id,
        peer: hello.listen.map(|port| Peer { address: SocketAddr::new(address.ip(), port), key: hello.key }),
        member,
        images: Mutex::new(HashMap::new()),
        told: Mutex::new(None),
    };
    let (reader, writer) = tokio::io::split(stream);
    let (life, life_queue) = mpsc::channel(8);
    let (urgent, urgent_queue) = mpsc::channel(8);
    let (stream, stream_queue) = mpsc::channel(2);
    let (fill, fill_queue) = mpsc::channel(2);
    let queues = Queues { life, urgent, stream, fill };
    let (requests, taken) = mpsc::channel(8);
    tokio::select! {
        result = read_requests(reader, requests) => result,
        () = work(server, &session, taken, &queues) => Ok(()),
        result = write_replies(server, writer, [life_queue, urgent_queue, stream_queue, fill_queue]) => result,
    }
}

/// Exchanges greetings; none with who speaks another version, or something else.
pub(super) async fn greet(
    server: &Server,
    stream: &mut Box<dyn Transport>,
) -> Result<Option<Hello>, WireError> {
    let greet = async {
        let hello = match read_frame(stream, REQUEST_BYTES_MAX).await? {
            Some((FrameType::PEER_HELLO, payload)) => frame::decode::<Hello>(&payload)?,
            _ => return Ok(None),
        };
        let (node, key) = (server.options.node.clone(), server.options.key);
        let ours = Hello { version: PROTOCOL_VERSION, node, key, listen: None };
        write_message(stream, FrameType::PEER_HELLO, &ours).await?;
        Ok((hello.version == PROTOCOL_VERSION).then_some(hello))
    };
    let greeted = tokio::time::timeout(HELLO_TIMEOUT, greet).await;
    greeted.unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::TimedOut).into()))
}

async fn read_requests(
    mut reader: ReadHalf<Box<dyn Transport>>,
    requests: mpsc::Sender<Request>,
) -> Result<(), WireError> {
    let mut take = async || -> Result<bool, WireError> {
        while let Some((frame_type, payload)) = read_frame(&mut reader, REQUEST_BYTES_MAX).await? {
            if frame_type == FrameType::PEER_REQUEST {
                // The other end lives as long as this future.
                let _ = requests.send(frame::decode(&payload)?).await;
                return Ok(true);
            }
        }
        Ok(false)
    };
    let first = tokio::time::timeout(FIRST_REQUEST_TIMEOUT, take()).await;
    let mut is_open = first.unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::TimedOut).into()))?;
    while is_open {
        is_open = take().await?;
    }
    Ok(())
}

/// Has up to [`REQUESTS_MAX`] requests answered at a time; never ends by itself.
async fn work(server: &Server, session: &Session, mut taken: mpsc::Receiver<Request>, queues: &Queues) {
    let mut cancels: HashMap<u32, AbortHandle> = HashMap::new();
    let mut running = FuturesUnordered::new();
    loop {
        let request = tokio::select! {
            Some(request) = taken.recv(), if running.len() < REQUESTS_MAX => request,
            Some((id, _)) = running.next(), if !running.is_empty() => {
                cancels.remove(&id);
                continue;
            }
            else => std::future::pending().await,
        };
        if let Ask::Cancel { id } = request.ask {
            if let Some(cancel) = cancels.remove(&id) {
                cancel.abort();
            }
            continue;
        }
        let id = request.id;
        let (cancel, registration) = AbortHandle::new_pair();
        cancels.insert(id, cancel);
        let answer = Abortable::new(answer::answer(server, session, queues, request), registration);
        running.push(answer.map(move |result| (id, result)));
    }
}

async fn write_replies(
    server: &Server,
    mut writer: WriteHalf<Box<dyn Transport>>,
    [mut life, mut urgent, mut stream, mut fill]: [mpsc::Receiver<Outgoing>; 4],
) -> Result<(), WireError> {
    loop {
        let next = tokio::select! {
            biased;
            next = life.recv() => next,
            next = urgent.recv() => next,
            next = stream.recv() => next,
            next = fill.recv() => next,
        };
        // The senders live as long as this future.
        let Some(mut outgoing) = next else { return Ok(()) };
        let pieces = match outgoing.fate {
            Fate::Send => (WRITE_PIECE, Duration::ZERO),
            Fate::Slowly(piece, pause) => (piece, pause),
            Fate::Drop => continue,
            Fate::Close => return Ok(()),
        };
        let head = head(&mut outgoing)?;
        let bytes = head.len() + outgoing.bulk.len();
        count(server, outgoing.class, bytes);
        let deadline = Instant::now() + WRITE_TIMEOUT + Duration::from_secs(bytes as u64 / WRITE_RATE_MIN);
        in_time(deadline, writer.write_all(&head)).await?;
        for piece in outgoing.bulk.chunks(pieces.0) {
            in_time(deadline, writer.write_all(piece)).await?;
            server.options.uplink.sent(piece.len() as u64);
            if !pieces.1.is_zero() {
                in_time(deadline, writer.flush()).await?;
                tokio::time::sleep(pieces.1).await;
            }
        }
        in_time(deadline, writer.flush()).await?;
    }
}

/// The head of `outgoing`. An answer that is longer than a reply may be is refused: the connection would end with it, and
/// end again whenever it is asked for.
fn head(outgoing: &mut Outgoing) -> Result<Vec<u8>, FrameError> {
    match frame::encode_bulk(FrameType::PEER_REPLY, &outgoing.reply, outgoing.bulk.len()) {
        Err(FrameError::TooLong { length, .. }) => {
            tracing::error!(length, "an answer to a peer is longer than a reply may be");
            outgoing.bulk = Vec::new();
            outgoing.reply.answer = Answer::Refused("the answer is longer than a reply may be".to_owned());
            frame::encode_bulk(FrameType::PEER_REPLY, &outgoing.reply, 0)
        }
        head => head,
    }
}

/// As `write`, a part of a reply or the flush behind it, which is where TLS waits for a peer that takes nothing; `deadline`
/// is that of the whole reply.
async fn in_time(deadline: Instant, write: impl Future<Output = io::Result<()>>) -> io::Result<()> {
    let timed = tokio::time::timeout_at(deadline.min(Instant::now() + WRITE_TIMEOUT), write).await;
    timed.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

fn count(server: &Server, class: Class, bytes: usize) {
    let counters = &server.counters;
    let counter = match class {
        Class::Life | Class::Other => &counters.other_bytes,
        Class::Demand => &counters.demand_bytes,
        Class::Stream => &counters.stream_bytes,
        Class::Fill => &counters.fill_bytes,
    };
    counter.fetch_add(bytes as u64, Ordering::Relaxed);
    counters.requests.fetch_add(1, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;
    use std::task::{Context, Poll};

    use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

    use super::*;
    use crate::peer::server::ServerOptions;
    use crate::peer::server::tests::Nothing;

    /// A peer that reads nothing, as TLS shows it: it takes what fits its buffer, and the flush waits.
    struct Unread;

    impl AsyncRead for Unread {
        fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }
    }

    impl AsyncWrite for Unread {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
            Poll::Ready(Ok(bytes.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }
    }

    impl Transport for Unread {}

    /// Over TLS, short replies to it waited for ever, and it kept its place.
    #[tokio::test(start_paused = true)]
    async fn a_peer_that_reads_nothing_is_dropped_though_its_replies_fit_a_buffer() {
        let server = Server::new(Arc::new(Nothing), ServerOptions::default());
        for fate in [Fate::Send, Fate::Slowly(1, Duration::from_millis(1))] {
            let (_, writer) = tokio::io::split(Box::new(Unread) as Box<dyn Transport>);
            let (_life, life_queue) = mpsc::channel(1);
            let (urgent, urgent_queue) = mpsc::channel(1);
            let (_stream, stream_queue) = mpsc::channel(1);
            let (_fill, fill_queue) = mpsc::channel(1);
            let reply = Reply { id: 7, answer: Answer::Data };
            let outgoing =
                Outgoing { class: Class::Other, reply, bulk: vec![0; 9], fate, _promise: None, _share: None };
            assert!(urgent.send(outgoing).await.is_ok());
            let writing =
                write_replies(&server, writer, [life_queue, urgent_queue, stream_queue, fill_queue]);
            let ended = tokio::time::timeout(2 * WRITE_TIMEOUT, writing).await.expect("it is dropped");
            assert!(matches!(ended, Err(WireError::Io(error)) if error.kind() == io::ErrorKind::TimedOut));
        }
    }

    /// A peer that reads, and so little that no single wait is long.
    struct Dripping(Pin<Box<tokio::time::Sleep>>);

    impl Dripping {
        const PAUSE: Duration = Duration::from_secs(29);

        fn new() -> Self {
            Self(Box::pin(tokio::time::sleep(Self::PAUSE)))
        }
    }

    impl AsyncRead for Dripping {
        fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }
    }

    impl AsyncWrite for Dripping {
        fn poll_write(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            std::task::ready!(self.0.as_mut().poll(cx));
            self.0.as_mut().reset(Instant::now() + Self::PAUSE);
            Poll::Ready(Ok(bytes.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }
    }

    impl Transport for Dripping {}

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_hardly_reads_is_dropped_before_it_has_a_whole_reply() {
        let server = Server::new(Arc::new(Nothing), ServerOptions::default());
        let (_, writer) = tokio::io::split(Box::new(Dripping::new()) as Box<dyn Transport>);
        let (_life, life_queue) = mpsc::channel(1);
        let (urgent, urgent_queue) = mpsc::channel(1);
        let (_stream, stream_queue) = mpsc::channel(1);
        let (_fill, fill_queue) = mpsc::channel(1);
        let reply = Reply { id: 7, answer: Answer::Data };
        let (class, bulk) = (Class::Fill, vec![0; 1 << 20]);
        let outgoing = Outgoing { class, reply, bulk, fate: Fate::Send, _promise: None, _share: None };
        assert!(urgent.send(outgoing).await.is_ok());
        let writing = write_replies(&server, writer, [life_queue, urgent_queue, stream_queue, fill_queue]);
        let most = WRITE_TIMEOUT + Duration::from_secs((1 << 20) / WRITE_RATE_MIN + 1);
        let ended = tokio::time::timeout(most, writing).await.expect("it is dropped");
        assert!(matches!(ended, Err(WireError::Io(error)) if error.kind() == io::ErrorKind::TimedOut));
    }

    #[tokio::test(start_paused = true)]
    async fn who_asks_nothing_is_dropped_and_who_has_asked_may_be_silent() {
        let server = Server::new(Arc::new(Nothing), ServerOptions::default());
        let hello = Hello { version: PROTOCOL_VERSION, node: "n2".to_owned(), key: 2, listen: None };
        let address = SocketAddr::from(([10, 0, 0, 1], 1));
        let start = |far| {
            let member = server.members.enter(&crate::peer::transport::Caller::trusted(), address).unwrap();
            run(&server, Box::new(far) as Box<dyn Transport>, &hello, member, address, 1)
        };
        let (_near, far) = tokio::io::duplex(1 << 10);
        let ended = tokio::time::timeout(2 * FIRST_REQUEST_TIMEOUT, start(far)).await.expect("it is dropped");
        assert!(matches!(ended, Err(WireError::Io(error)) if error.kind() == io::ErrorKind::TimedOut));

        let (mut near, far) = tokio::io::duplex(1 << 10);
        let ask = async {
            let request = Request { id: 1, ask: Ask::Top { root: Digest::of(b"nothing") } };
            for _ in 0..2 {
                write_message(&mut near, FrameType::PEER_REQUEST, &request).await.unwrap();
                let (frame_type, _) = read_frame(&mut near, REQUEST_BYTES_MAX).await.unwrap().unwrap();
                assert_eq!(frame_type, FrameType::PEER_REPLY);
                tokio::time::sleep(10 * FIRST_REQUEST_TIMEOUT).await;
            }
        };
        tokio::select! {
            ended = start(far) => panic!("{ended:?}"),
            () = ask => {}
        }
    }

    #[test]
    fn an_answer_that_is_too_long_is_refused() {
        let reply = Reply { id: 7, answer: Answer::Data };
        let bulk = vec![0; frame::BULK_PAYLOAD_MAX];
        let mut outgoing =
            Outgoing { class: Class::Other, reply, bulk, fate: Fate::Send, _promise: None, _share: None };
        let bytes = head(&mut outgoing).unwrap();
        let (reply, _) = frame::decode_bulk::<Reply>(&bytes[frame::HEADER_BYTES..]).unwrap();
        assert!(reply.id == 7 && matches!(reply.answer, Answer::Refused(_)));
        assert!(outgoing.bulk.is_empty());
    }
}
