//! A connection of the control plane, from either end: requests of [`super::cluster`] and their replies.
//!
//! A reply must carry the id of its request, and every wait has a deadline: a connection on which either fails is
//! not used again. On the answering side, what is not understood is answered with a clear error; what is not even a
//! frame, or is longer than [`CONTROL_PAYLOAD_MAX`], ends the connection.

use std::io;
use std::time::Duration;

use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::cluster::{AnyRequest, Body, Fault, FaultCode, PROTOCOL_VERSION, Reply, Request};
use super::frame::{self, CONTROL_PAYLOAD_MAX, FrameType};
use super::io::{WireError, ended, read_frame, write_message};
use crate::peer::transport::Transport;

/// How long a connection may be silent before its answering side closes it.
const IDLE_MAX: Duration = Duration::from_secs(120);
/// How long a reply may take to be taken.
const FRAME_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a request that is being carried out is still waited for when its side is to end.
const LAST_ANSWER: Duration = Duration::from_secs(5);

/// Why a call was not answered, or was refused.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The other side said no.
    #[error(transparent)]
    Refused(#[from] Fault),
    /// The connection broke, or carried nonsense.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// There was no answer in time.
    #[error("no answer within {0:?}")]
    TimedOut(Duration),
    /// The answer was to something else.
    #[error("the answer does not belong to the request")]
    OutOfTurn,
}

impl From<io::Error> for CallError {
    fn from(error: io::Error) -> Self {
        Self::Wire(error.into())
    }
}

/// The asking end of a connection.
pub struct Link {
    stream: Box<dyn Transport>,
    last_id: u64,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("last_id", &self.last_id).finish_non_exhaustive()
    }
}

impl Link {
    /// Speaks over `stream`, on which nothing has been said yet.
    pub fn new(stream: Box<dyn Transport>) -> Self {
        Self { stream, last_id: 0 }
    }

    /// Sends a request and waits for its answer, `limit` at most.
    ///
    /// After any error but [`CallError::Refused`], and when the future is dropped, the link must not be used again; the
    /// request may have been carried out.
    pub async fn call<B: Body>(&mut self, body: &B, limit: Duration) -> Result<B::Answer, CallError> {
        self.last_id += 1;
        let id = self.last_id;
        let version = (id == 1).then_some(PROTOCOL_VERSION);
        let exchange = async {
            write_message(&mut self.stream, B::TYPE, &Request { id, version, body }).await?;
            let (frame_type, payload) =
                read_frame(&mut self.stream, CONTROL_PAYLOAD_MAX).await?.ok_or_else(ended)?;
            if frame_type != FrameType::REPLY {
                return Err(CallError::OutOfTurn);
            }
            let reply: Reply<B::Answer> = frame::decode(&payload).map_err(WireError::from)?;
            match (reply.id == id, reply.ok, reply.error) {
                (true, Some(answer), None) => Ok(answer),
                (true, None, Some(fault)) => Err(CallError::Refused(fault)),
                // What could not be read has no id to give back.
                (false, None, Some(fault)) if reply.id == 0 => Err(CallError::Refused(fault)),
                _ => Err(CallError::OutOfTurn),
            }
        };
        tokio::time::timeout(limit, exchange).await.unwrap_or(Err(CallError::TimedOut(limit)))
    }
}

/// A request that has arrived and is still encoded; [`Arrived::body`] opens it.
#[derive(Debug)]
pub struct Arrived {
    /// What it is.
    pub frame_type: FrameType,
    id: u64,
    payload: Vec<u8>,
}

/// An encoded reply.
pub type Answer = Result<Vec<u8>, Fault>;

impl Arrived {
    /// The body, as the frame type has it.
    ///
    /// # Errors
    /// [`FaultCode::Malformed`].
    pub fn body<B: Body>(&self) -> Result<B, Fault> {
        match frame::decode::<Request<B>>(&self.payload) {
            Ok(request) => Ok(request.body),
            Err(error) => Err(Fault::new(FaultCode::Malformed, error.to_string())),
        }
    }

    /// The reply with `answer`, encoded.
    pub fn reply<B: Body>(&self, answer: B::Answer) -> Answer {
        encoded(&Reply { id: self.id, ok: Some(answer), error: None })
    }

    /// The fault for a frame type that this side does not take.
    pub fn unknown(&self) -> Fault {
        let message = format!("frames of type {:#04x} are not known here", self.frame_type.0);
        Fault::new(FaultCode::UnknownType, message)
    }
}

fn encoded<T: Serialize>(reply: &Reply<T>) -> Answer {
    frame::encode(FrameType::REPLY, reply)
        .map_err(|error| Fault::new(FaultCode::Failed, format!("the answer cannot be sent: {error}")))
}

/// Answers the requests of one connection with `handler` until the other side leaves, is silent for two minutes, breaks
/// the protocol, or `cancel`. Requests that are not understood go to `nonsense` too.
///
/// What `handler` does is dropped after `limit`, since whoever asked has given up by then: it would keep a connection's
/// place for as long as something behind it hangs.
pub async fn answer<H, F>(
    stream: &mut Box<dyn Transport>,
    cancel: &CancellationToken,
    limit: Duration,
    nonsense: impl Fn(&Fault),
    handler: H,
) -> Result<(), WireError>
where
    H: Fn(Arrived) -> F,
    F: Future<Output = Answer>,
{
    use tokio::io::AsyncWriteExt;
    let mut spoken = false;
    loop {
        let frame = tokio::select! {
            () = cancel.cancelled() => return Ok(()),
            frame = tokio::time::timeout(IDLE_MAX, read_frame(stream, CONTROL_PAYLOAD_MAX)) => frame,
        };
        let frame = frame.map_err(|_| WireError::Io(io::ErrorKind::TimedOut.into()))?;
        let Some((frame_type, payload)) = frame? else { return Ok(()) };
        let (id, checked) = check(frame_type, payload, &mut spoken);
        let answer = match checked {
            Ok(arrived) => tokio::select! {
                answer = tokio::time::timeout(limit, handler(arrived)) => answer.unwrap_or_else(|_| Err(late(limit))),
                () = ending(cancel) => return Ok(()),
            },
            Err(fault) => Err(fault),
        };
        if let Err(fault) = &answer
            && matches!(fault.code, FaultCode::UnknownType | FaultCode::Malformed | FaultCode::Version)
        {
            nonsense(fault);
        }
        let bytes = match answer {
            Ok(bytes) => bytes,
            Err(fault) => frame::encode(FrameType::REPLY, &Reply::<()> { id, ok: None, error: Some(fault) })?,
        };
        let sent = async {
            stream.write_all(&bytes).await?;
            stream.flush().await
        };
        tokio::time::timeout(FRAME_TIMEOUT, sent)
            .await
            .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    }
}

fn late(limit: Duration) -> Fault {
    Fault::new(FaultCode::Failed, format!("it was not done within {limit:?}"))
}

/// Returns some time after `cancel`.
async fn ending(cancel: &CancellationToken) {
    cancel.cancelled().await;
    tokio::time::sleep(LAST_ANSWER).await;
}

/// The id of a request, and the request if its version is right.
fn check(frame_type: FrameType, payload: Vec<u8>, spoken: &mut bool) -> (u64, Result<Arrived, Fault>) {
    let request: AnyRequest = match rmp_serde::from_slice(&payload) {
        Ok(request) => request,
        Err(error) => return (0, Err(Fault::new(FaultCode::Malformed, error.to_string()))),
    };
    let right = match request.version {
        Some(version) => version == PROTOCOL_VERSION,
        None => *spoken,
    };
    if !right {
        let said = request.version.map_or_else(|| "none".to_owned(), |version| version.to_string());
        let message = format!("the protocol's version here is {PROTOCOL_VERSION}, the request's is {said}");
        return (request.id, Err(Fault::new(FaultCode::Version, message)));
    }
    *spoken = true;
    (request.id, Ok(Arrived { frame_type, id: request.id, payload }))
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::wire::cluster::{Deployed, Done, End, EndPart};

    async fn serve(mut stream: Box<dyn Transport>) -> Result<(), WireError> {
        let nonsense = |fault: &Fault| assert_ne!(fault.code, FaultCode::NotFound);
        answer(
            &mut stream,
            &CancellationToken::new(),
            LIMIT,
            nonsense,
            async |request: Arrived| match request.frame_type {
                FrameType::END => {
                    let end: End = request.body()?;
                    if end.task == 8 {
                        std::future::pending::<()>().await;
                    }
                    if end.task == 7 {
                        return Err(Fault::new(FaultCode::NotFound, "there is no task 7"));
                    }
                    request.reply::<End>(Done {})
                }
                _ => Err(request.unknown()),
            },
        )
        .await
    }

    fn pair() -> (Link, tokio::task::JoinHandle<Result<(), WireError>>) {
        let (near, far) = tokio::io::duplex(1 << 16);
        (Link::new(Box::new(near)), tokio::spawn(serve(Box::new(far))))
    }

    const LIMIT: Duration = Duration::from_secs(5);

    #[tokio::test]
    async fn requests_are_answered_one_after_the_other() {
        let (mut link, _server) = pair();
        assert_eq!(link.call(&End { task: 1 }, LIMIT).await.unwrap(), Done {});
        let error = link.call(&End { task: 7 }, LIMIT).await.unwrap_err();
        assert_eq!(error.to_string(), "there is no task 7");
        let error = link.call(&EndPart { cluster: "c".into(), task: 1 }, LIMIT).await.unwrap_err();
        assert!(matches!(error, CallError::Refused(Fault { code: FaultCode::UnknownType, .. })), "{error}");
        assert_eq!(link.call(&End { task: 2 }, LIMIT).await.unwrap(), Done {});
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_hangs_is_given_up_and_the_connection_goes_on() {
        let (mut link, _server) = pair();
        let error = link.call(&End { task: 8 }, 2 * LIMIT).await.unwrap_err();
        assert!(matches!(&error, CallError::Refused(Fault { code: FaultCode::Failed, .. })), "{error}");
        assert_eq!(link.call(&End { task: 1 }, LIMIT).await.unwrap(), Done {});
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_hangs_keeps_nobody_from_ending() {
        let (near, far) = tokio::io::duplex(1 << 16);
        let (cancel, (told, begun)) = (CancellationToken::new(), tokio::sync::oneshot::channel());
        let (stop, told) = (cancel.clone(), std::sync::Mutex::new(Some(told)));
        let serving = tokio::spawn(async move {
            let mut stream: Box<dyn Transport> = Box::new(far);
            let hangs = async |_: Arrived| {
                told.lock().unwrap().take().unwrap().send(()).unwrap();
                std::future::pending().await
            };
            answer(&mut stream, &stop, Duration::from_secs(600), |_| {}, hangs).await
        });
        let mut link = Link::new(Box::new(near));
        let asking = tokio::spawn(async move { link.call(&End { task: 1 }, Duration::from_secs(900)).await });
        begun.await.unwrap();
        cancel.cancel();
        tokio::time::timeout(2 * LAST_ANSWER, serving).await.expect("it hangs").unwrap().unwrap();
        assert!(matches!(asking.await.unwrap(), Err(CallError::Wire(_))));
    }

    async fn raw(bytes: &[u8]) -> Vec<u8> {
        let (mut near, far) = tokio::io::duplex(1 << 16);
        let server = tokio::spawn(serve(Box::new(far)));
        near.write_all(bytes).await.unwrap();
        near.shutdown().await.unwrap();
        let mut answers = Vec::new();
        near.read_to_end(&mut answers).await.unwrap();
        let _ = server.await.unwrap();
        answers
    }

    fn request(id: u64, version: Option<u16>) -> Vec<u8> {
        frame::encode(FrameType::END, &Request { id, version, body: End { task: 1 } }).unwrap()
    }

    #[tokio::test]
    async fn a_first_request_without_the_right_version_is_refused() {
        for version in [None, Some(2)] {
            let answers = raw(&request(3, version)).await;
            let reply: Reply<Done> = frame::decode(&answers[8..]).unwrap();
            assert_eq!((reply.id, reply.error.unwrap().code), (3, FaultCode::Version));
        }
        let reply: Reply<Done> = frame::decode(&raw(&request(3, Some(1))).await[8..]).unwrap();
        assert_eq!(reply.ok, Some(Done {}));
    }

    #[tokio::test]
    async fn nonsense_ends_the_connection_or_gets_an_error() {
        assert!(raw(b"GET / HTTP/1.1\r\n\r\n").await.is_empty());
        assert!(raw(b"MFD\x04\xff\xff\xff\xff").await.is_empty());
        for end in 0..request(1, Some(1)).len() {
            raw(&request(1, Some(1))[..end]).await;
        }
        let reply: Reply<Done> = frame::decode(&raw(b"MFD\x04\0\0\0\x01\xc1").await[8..]).unwrap();
        assert_eq!((reply.id, reply.error.unwrap().code), (0, FaultCode::Malformed));
    }

    #[test]
    fn the_bytes_of_the_documentation_are_those_that_are_sent() {
        let text = include_str!("../../docs/protocol.md");
        let documented = |bytes: &[u8]| {
            let hex: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            let squeezed = text.split_whitespace().collect::<Vec<_>>().join(" ");
            assert!(squeezed.contains(&hex[..17].join(" ")), "{}", hex.join(" "));
        };
        let end = Request { id: 1, version: Some(1), body: End { task: 7 } };
        documented(&frame::encode(FrameType::END, &end).unwrap());
        documented(
            &frame::encode(FrameType::REPLY, &Reply { id: 1, ok: Some(Done {}), error: None }).unwrap(),
        );
        let fault = Fault::new(FaultCode::NotFound, "there is no task 7");
        let reply = Reply::<Done> { id: 1, ok: None, error: Some(fault) };
        documented(&frame::encode(FrameType::REPLY, &reply).unwrap());
    }

    #[tokio::test]
    async fn an_end_that_speaks_tls_or_says_nothing_is_told() {
        const ALERT: [u8; 7] = [0x15, 3, 3, 0, 2, 2, 0x32];
        for (bytes, told) in
            [(&ALERT[..], "give --tls-dir"), (&[], "ended the connection"), (b"MFD", "ended")]
        {
            let (near, mut far) = tokio::io::duplex(1 << 16);
            far.write_all(bytes).await.unwrap();
            far.shutdown().await.unwrap();
            let error = Link::new(Box::new(near)).call(&End { task: 1 }, LIMIT).await.unwrap_err();
            assert!(error.to_string().contains(told), "{error}");
        }
    }

    #[tokio::test]
    async fn an_answer_to_something_else_is_an_error() {
        let (near, mut far) = tokio::io::duplex(1 << 16);
        let mut link = Link::new(Box::new(near));
        let reply = Reply { id: 9, ok: Some(Deployed { task: 1 }), error: None };
        far.write_all(&frame::encode(FrameType::REPLY, &reply).unwrap()).await.unwrap();
        assert!(matches!(
            link.call(&End { task: 1 }, LIMIT).await,
            Err(CallError::Wire(_) | CallError::OutOfTurn)
        ));
    }

    #[tokio::test(start_paused = true)]
    async fn silence_has_an_end_on_both_sides() {
        let (near, _far) = tokio::io::duplex(64);
        let mut link = Link::new(Box::new(near));
        assert!(matches!(link.call(&End { task: 1 }, LIMIT).await, Err(CallError::TimedOut(_))));
        let (_near, far) = tokio::io::duplex(64);
        assert!(serve(Box::new(far)).await.is_err());
    }
}
