//! One connection of a client: requests go out under a lock, a task of its own hands the replies out.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, BufReader, ReadHalf, WriteHalf};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::call::Call;
use super::negotiation::ExportDescription;
use crate::chunk::{HEADER_MAX, Header, Style};
use crate::consts::{REPLY_FLAG_DONE, chunk, command, command_flag};
use crate::disk::StatusExtent;
use crate::negotiate::Stream;
use crate::request::{EXTENDED_BYTES, Request};

/// Longest structured chunk that is not data: a message, or extents.
const CHUNK_MAX: usize = 1 << 20;
/// Time for a goodbye to be sent.
const GOODBYE: Duration = Duration::from_secs(1);
/// Most extents that are kept of one answer.
const EXTENTS_MAX: usize = 64 << 10;

/// What came back.
#[derive(Debug, Default)]
pub(super) struct Answer {
    pub(super) data: Vec<u8>,
    pub(super) extents: Vec<StatusExtent>,
}

/// A request that waits for its reply.
#[derive(Debug)]
struct Waiting {
    command: u16,
    offset: u64,
    length: u64,
    /// Its buffer is empty once nobody waits any more: what then comes of a read is thrown away.
    answer: Answer,
    /// Bytes of a read that have come, or that extents cover.
    filled: u64,
    error: Option<io::Error>,
    done: oneshot::Sender<io::Result<Answer>>,
}

type Table = Mutex<HashMap<u64, Waiting>>;

/// One connection.
pub(super) struct Link {
    writer: tokio::sync::Mutex<Writer>,
    waiting: Arc<Table>,
    broken: Arc<AtomicBool>,
    extended: bool,
    cookie: AtomicU64,
    in_flight: AtomicUsize,
    reader: JoinHandle<()>,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("in_flight", &self.in_flight).finish_non_exhaustive()
    }
}

/// Counts a request for as long as somebody waits for it. Whoever gives up leaves no buffer behind.
struct Asked<'a> {
    link: &'a Link,
    cookie: u64,
    /// All of it was sent.
    sent: bool,
}

impl<'a> Asked<'a> {
    fn count(link: &'a Link, cookie: u64) -> Self {
        link.in_flight.fetch_add(1, Ordering::Relaxed);
        Self { link, cookie, sent: false }
    }
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        self.link.in_flight.fetch_sub(1, Ordering::Relaxed);
        if !self.sent {
            self.link.table().remove(&self.cookie);
            return;
        }
        // The server may answer still: the cookie has to be known until then.
        if let Some(waiting) = self.link.table().get_mut(&self.cookie) {
            waiting.answer = Answer::default();
        }
    }
}

/// The side of a connection that writes.
struct Writer {
    stream: WriteHalf<Box<dyn Stream>>,
    /// A request has begun and not ended. Whoever finds this true must send nothing: the server would take it for the rest
    /// of that request's payload. It stays true when the sender is cancelled or fails half-way.
    torn: bool,
}

/// Sends a request. Marks the connection broken if it is dropped before all of it was sent, and before the next one that
/// waits may write.
struct Sending<'a> {
    link: &'a Link,
    writer: tokio::sync::MutexGuard<'a, Writer>,
}

impl Sending<'_> {
    async fn send(&mut self, header: &[u8], payload: &[u8]) -> io::Result<()> {
        // Until a byte of it is taken, the request can be given up without a trace.
        let begun = self.writer.stream.write(header).await;
        self.writer.torn = true;
        self.writer.stream.write_all(&header[begun?..]).await?;
        self.writer.stream.write_all(payload).await?;
        self.writer.stream.flush().await?;
        self.writer.torn = false;
        Ok(())
    }
}

impl Drop for Sending<'_> {
    fn drop(&mut self) {
        if self.writer.torn {
            self.link.broken.store(true, Ordering::Release);
            self.link.reader.abort();
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// Belongs to the task that reads. When that ends, by an error of its own or because it was aborted, nobody is left to
/// answer: the connection is broken, and whoever waits is told.
struct Ending {
    waiting: Arc<Table>,
    broken: Arc<AtomicBool>,
    reason: io::Error,
}

impl Ending {
    async fn of(mut self, replies: Replies) {
        self.reason = replies.run().await;
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.broken.store(true, Ordering::Release);
        for (_, waiting) in self.waiting.lock().unwrap_or_else(PoisonError::into_inner).drain() {
            let _ = waiting.done.send(Err(io::Error::new(self.reason.kind(), self.reason.to_string())));
        }
    }
}

impl Link {
    pub(super) fn new(stream: Box<dyn Stream>, description: &ExportDescription) -> Self {
        let (reader, stream) = tokio::io::split(stream);
        let waiting = Arc::<Table>::default();
        let broken = Arc::new(AtomicBool::new(false));
        let replies = Replies {
            reader: BufReader::with_capacity(64 << 10, reader),
            waiting: Arc::clone(&waiting),
            style: description.style,
            allocation: description.allocation,
        };
        let ending = Ending {
            waiting: Arc::clone(&waiting),
            broken: Arc::clone(&broken),
            reason: io::Error::new(io::ErrorKind::BrokenPipe, "a request of this connection was cut short"),
        };
        let reader = tokio::spawn(ending.of(replies));
        Self {
            writer: tokio::sync::Mutex::new(Writer { stream, torn: false }),
            waiting,
            broken,
            extended: description.style == Style::Extended,
            cookie: AtomicU64::new(1),
            in_flight: AtomicUsize::new(0),
            reader,
        }
    }

    /// Requests that have not been answered.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Whether the connection has ended.
    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    /// Sends one request and waits for its answer.
    pub(super) async fn call(&self, call: &Call<'_>) -> io::Result<Answer> {
        let cookie = self.cookie.fetch_add(1, Ordering::Relaxed);
        let (done, answer) = oneshot::channel();
        let length = if call.command == command::READ { call.length } else { 0 };
        let data = vec![0; usize::try_from(length).map_err(|_| io::ErrorKind::InvalidInput)?];
        let waiting = Waiting {
            command: call.command,
            offset: call.offset,
            length: call.length,
            answer: Answer { data, extents: Vec::new() },
            filled: 0,
            error: None,
            done,
        };
        self.table().insert(cookie, waiting);
        if self.is_broken() {
            self.table().remove(&cookie);
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let mut asked = Asked::count(self, cookie);
        self.write(cookie, call).await?;
        asked.sent = true;
        answer.await.unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()))
    }

    async fn write(&self, cookie: u64, call: &Call<'_>) -> io::Result<()> {
        let payload =
            if self.extended && call.command == command::WRITE { command_flag::PAYLOAD_LEN } else { 0 };
        let request = Request {
            flags: call.flags | payload,
            command: call.command,
            cookie,
            offset: call.offset,
            length: call.length,
            payload: call.payload.len() as u64,
        };
        let mut header = Vec::with_capacity(EXTENDED_BYTES);
        if !request.encode(&mut header, self.extended) {
            let reason = "lengths of 4 GiB need a server with extended headers";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
        }
        let writer = self.writer.lock().await;
        // Much may have happened since the caller looked. Only a goodbye goes to a server that is being left.
        let retired = call.command != command::DISC && self.is_broken();
        if writer.torn || retired {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        Sending { link: self, writer }.send(&header, call.payload).await
    }

    /// Takes no more requests, after the server has said that it ends; those under way may still be answered.
    pub(super) async fn retire(&self) {
        if !self.broken.swap(true, Ordering::AcqRel) {
            self.disconnect().await;
        }
    }

    fn table(&self) -> MutexGuard<'_, HashMap<u64, Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says goodbye, if that can be sent soon; the server carries out what it has, and closes.
    pub(super) async fn disconnect(&self) {
        let call = Call { command: command::DISC, flags: 0, offset: 0, length: 0, payload: &[] };
        let _ = tokio::time::timeout(GOODBYE, self.write(0, &call)).await;
    }
}

/// The side of a connection that reads.
struct Replies {
    reader: BufReader<ReadHalf<Box<dyn Stream>>>,
    waiting: Arc<Table>,
    style: Style,
    allocation: Option<u32>,
}

impl Replies {
    /// Hands replies out until the connection ends; returns why it did.
    async fn run(mut self) -> io::Error {
        loop {
            if let Err(error) = self.next().await {
                return error;
            }
        }
    }

    async fn next(&mut self) -> io::Result<()> {
        let mut header = [0; HEADER_MAX];
        self.reader.read_exact(&mut header[..4]).await?;
        let magic = u32::from_be_bytes(*header.first_chunk().expect("longer than a magic"));
        let size = Header::size(magic, self.style).ok_or_else(|| violation("a reply without its magic"))?;
        self.reader.read_exact(&mut header[4..size]).await?;
        match Header::parse(&header[..size], self.style).expect("it is as long as its magic says") {
            Header::Simple { errno, cookie } => {
                let mut waiting = self.take(cookie)?;
                if errno != 0 {
                    waiting.error = Some(io::Error::from_raw_os_error(errno.cast_signed()));
                } else if waiting.command == command::READ {
                    if self.style != Style::Simple {
                        return Err(violation("a simple reply to a read"));
                    }
                    let data = &mut waiting.answer.data;
                    fill(&mut self.reader, (!data.is_empty()).then_some(data), waiting.length).await?;
                    waiting.filled = waiting.length;
                }
                finish(waiting);
                Ok(())
            }
            Header::Chunk { flags, kind, cookie, length } => {
                let length =
                    usize::try_from(length).map_err(|_| violation("a chunk of impossible length"))?;
                self.chunk(flags, kind, cookie, length).await
            }
        }
    }

    async fn chunk(&mut self, flags: u16, kind: u16, cookie: u64, length: usize) -> io::Result<()> {
        let mut waiting = self.take(cookie)?;
        match kind {
            chunk::NONE if length == 0 => {}
            chunk::OFFSET_DATA if length > 8 && waiting.command == command::READ => {
                let at = self.reader.read_u64().await?;
                let length = length as u64 - 8;
                fill(&mut self.reader, part(&mut waiting, at, length)?, length).await?;
            }
            chunk::OFFSET_HOLE if length == 12 && waiting.command == command::READ => {
                let at = self.reader.read_u64().await?;
                let hole = self.reader.read_u32().await?;
                if let Some(data) = part(&mut waiting, at, hole.into())? {
                    data.fill(0);
                }
            }
            chunk::BLOCK_STATUS if waiting.command == command::BLOCK_STATUS && length % 8 == 4 => {
                self.extents(&mut waiting, (length - 4) / 8).await?;
            }
            chunk::BLOCK_STATUS_EXT if waiting.command == command::BLOCK_STATUS && length % 16 == 8 => {
                self.wide_extents(&mut waiting, (length - 8) / 16).await?;
            }
            _ if kind & 0x8000 != 0 && (6..=CHUNK_MAX).contains(&length) => {
                let errno = self.reader.read_u32().await?;
                let mut rest = vec![0; length - 4];
                self.reader.read_exact(&mut rest).await?;
                waiting.error = Some(io::Error::from_raw_os_error(errno.cast_signed()));
            }
            _ => return Err(violation("a chunk that does not fit its request")),
        }
        if flags & REPLY_FLAG_DONE != 0 {
            finish(waiting);
        } else {
            if waiting.done.is_closed() {
                waiting.answer = Answer::default();
            }
            self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(cookie, waiting);
        }
        Ok(())
    }

    async fn extents(&mut self, waiting: &mut Waiting, count: usize) -> io::Result<()> {
        self.begin_extents(waiting, count).await?;
        for _ in 0..count {
            let length = self.reader.read_u32().await?.into();
            let flags = self.reader.read_u32().await?;
            push(waiting, length, flags)?;
        }
        Ok(())
    }

    /// Extents of 64 bits; flags beyond 32 are no server's yet, and refused.
    async fn wide_extents(&mut self, waiting: &mut Waiting, count: usize) -> io::Result<()> {
        self.begin_extents(waiting, count).await?;
        if self.reader.read_u32().await? as usize != count {
            return Err(violation("a count of extents that is not theirs"));
        }
        for _ in 0..count {
            let length = self.reader.read_u64().await?;
            let flags = u32::try_from(self.reader.read_u64().await?);
            push(waiting, length, flags.map_err(|_| violation("status flags that nobody has defined"))?)?;
        }
        Ok(())
    }

    /// Reads the number of the context that extents are of.
    async fn begin_extents(&mut self, waiting: &Waiting, count: usize) -> io::Result<()> {
        let context = self.reader.read_u32().await?;
        let known = waiting.answer.extents.len();
        if Some(context) != self.allocation || count == 0 || count + known > EXTENTS_MAX {
            return Err(violation("extents that were not asked for"));
        }
        Ok(())
    }

    fn take(&self, cookie: u64) -> io::Result<Waiting> {
        let mut table = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        table.remove(&cookie).ok_or_else(|| violation("a reply to nothing"))
    }
}

fn push(waiting: &mut Waiting, length: u64, flags: u32) -> io::Result<()> {
    if length == 0 || waiting.filled >= waiting.length {
        return Err(violation("an extent of no length, or behind what was asked for"));
    }
    waiting.filled = waiting.filled.saturating_add(length);
    waiting.answer.extents.push(StatusExtent { length, flags });
    Ok(())
}

/// Reads `length` bytes: into `data`, which is as long, or away.
async fn fill(
    reader: &mut (impl AsyncRead + Unpin),
    data: Option<impl AsMut<[u8]>>,
    length: u64,
) -> io::Result<()> {
    if let Some(mut data) = data {
        return reader.read_exact(data.as_mut()).await.map(drop);
    }
    match tokio::io::copy(&mut reader.take(length), &mut tokio::io::sink()).await? {
        read if read == length => Ok(()),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// The part of a read's buffer that a chunk is for; `None` if nobody waits for it. Counts its bytes: each must come once.
fn part(waiting: &mut Waiting, at: u64, length: u64) -> io::Result<Option<&mut [u8]>> {
    let start = at.checked_sub(waiting.offset);
    let end = start.and_then(|start| start.checked_add(length));
    waiting.filled = waiting.filled.saturating_add(length);
    match (start, end) {
        (Some(start), Some(end))
            if length > 0 && end <= waiting.length && waiting.filled <= waiting.length =>
        {
            let index = |at: u64| usize::try_from(at).expect("it lies within the buffer");
            let whole = Some(&mut waiting.answer.data).filter(|data| !data.is_empty());
            Ok(whole.map(|data| &mut data[index(start)..index(end)]))
        }
        _ => Err(violation("data outside of what was asked for")),
    }
}

fn finish(waiting: Waiting) {
    let Waiting { command, length, answer, filled, error, done, .. } = waiting;
    let result = match error {
        Some(error) => Err(error),
        None if command == command::READ && filled != length => {
            Err(violation("a read that ended before all its bytes had come"))
        }
        None if command == command::BLOCK_STATUS && answer.extents.is_empty() => {
            Err(violation("status without an extent"))
        }
        None => Ok(answer),
    };
    // Whoever asked may have gone.
    let _ = done.send(result);
}

fn violation(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the NBD server breaks the protocol: {what}"))
}

#[cfg(test)]
mod tests;
