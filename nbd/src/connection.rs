//! The transmission phase of one connection.
//!
//! One task reads requests and answers at once what needs no waiting: those replies gather in one buffer and leave in
//! one system call when no further request has arrived yet. What has to wait for the disk is answered by a task of
//! its own, out of order. Both write through one lock. A client that does not read its replies is not read from, and
//! what waits for it is bounded by its byte budget.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::chunk::{Answer, HEADER_MAX, Style};
use crate::consts::Errno;
use crate::disk::{Attempt, SharedDisk, StatusExtent, ZeroFlags};
use crate::limits::PIECE_BYTES;
use crate::negotiate::{Agreed, Stream};
use crate::request::{Action, COMPACT_BYTES, EXTENDED_BYTES, Request, Terms, check};
use crate::server::{ExportStats, Shared};

/// Requests are read into a buffer of this size.
const INPUT_BYTES: usize = 64 << 10;
/// Most extents in the answer to one status request, in one context.
const EXTENTS_MAX: usize = 4096;
/// How long requests under way may take once the connection is to end.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// Serves requests until the client leaves, breaks the protocol, or `cancel`.
pub(crate) async fn serve(
    stream: Box<dyn Stream>,
    agreed: Agreed,
    shared: &Shared,
    cancel: CancellationToken,
) -> io::Result<()> {
    let disk = Arc::clone(&agreed.export.disk);
    let (reader, writer) = tokio::io::split(stream);
    let terms = Terms {
        size: disk.size(),
        features: disk.features(),
        structured: agreed.style != Style::Simple,
        extended: agreed.style == Style::Extended,
        contexts: !agreed.contexts.is_empty(),
        payload_max: shared.limits.payload,
    };
    let work = Arc::new(Work {
        disk,
        style: agreed.style,
        contexts: agreed.contexts,
        writer: Mutex::new(Writer { stream: writer, torn: false }),
    });
    let mut connection = Connection {
        reader,
        input: BytesMut::with_capacity(INPUT_BYTES),
        out: Vec::with_capacity(INPUT_BYTES),
        terms,
        work,
        requests: Arc::new(Semaphore::new(shared.limits.requests)),
        bytes: Arc::new(Semaphore::new(shared.limits.bytes_per_connection)),
        bytes_max: shared.limits.bytes_per_connection,
        bytes_in_all: Arc::clone(&shared.bytes),
        tasks: TaskTracker::new(),
        stats: Arc::clone(&agreed.export.stats),
    };
    let result = tokio::select! {
        () = cancel.cancelled() => Ok(()),
        () = agreed.export.closed.cancelled() => Ok(()),
        result = connection.run() => result,
    };
    connection.drain().await;
    result
}

struct Connection {
    reader: ReadHalf<Box<dyn Stream>>,
    input: BytesMut,
    /// Replies that have not been written yet.
    out: Vec<u8>,
    terms: Terms,
    work: Arc<Work>,
    requests: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
    bytes_max: usize,
    bytes_in_all: Arc<Semaphore>,
    tasks: TaskTracker,
    stats: Arc<ExportStats>,
}

/// What the tasks of a connection share.
struct Work {
    disk: SharedDisk,
    style: Style,
    contexts: Vec<&'static str>,
    writer: Mutex<Writer>,
}

/// The sending side of a connection.
struct Writer {
    stream: WriteHalf<Box<dyn Stream>>,
    /// A reply has begun and not ended. Whoever finds this true must send nothing: the client would take it for the
    /// rest of that reply's data. It stays true when the sender is cancelled, fails or panics half-way.
    torn: bool,
}

impl Writer {
    /// Marks a reply as begun.
    fn begin(&mut self) -> io::Result<()> {
        if self.torn {
            return Err(io::Error::new(io::ErrorKind::BrokenPipe, "an earlier reply was cut short"));
        }
        self.torn = true;
        Ok(())
    }

    /// Sends what is left in buffers; what was begun is whole.
    async fn end(&mut self) -> io::Result<()> {
        self.stream.flush().await?;
        self.torn = false;
        Ok(())
    }
}

/// A request's share of the budgets, given back when it is answered.
struct Share {
    _request: OwnedSemaphorePermit,
    _bytes: OwnedSemaphorePermit,
    _bytes_in_all: Option<OwnedSemaphorePermit>,
}

impl Connection {
    async fn run(&mut self) -> io::Result<()> {
        let size = if self.terms.extended { EXTENDED_BYTES } else { COMPACT_BYTES };
        loop {
            while let Some(request) =
                Request::parse(&self.input, self.terms.extended).map_err(io::Error::other)?
            {
                self.input.advance(size);
                if self.handle(&request).await? {
                    return Ok(());
                }
                if self.out.len() >= PIECE_BYTES {
                    self.flush().await?;
                }
            }
            self.flush().await?;
            self.input.reserve(INPUT_BYTES);
            if self.reader.read_buf(&mut self.input).await? == 0 {
                return Ok(());
            }
        }
    }

    /// Lets what is under way end, so that a write that was being carried out is.
    async fn drain(&mut self) {
        self.tasks.close();
        let last = async {
            self.tasks.wait().await;
            let _ = self.flush().await;
            let _ = self.work.writer.lock().await.stream.shutdown().await;
        };
        let _ = tokio::time::timeout(DRAIN_TIMEOUT, last).await;
    }

    async fn flush(&mut self) -> io::Result<()> {
        if !self.out.is_empty() {
            self.work.send(&self.out).await?;
            self.out.clear();
        }
        Ok(())
    }

    /// Answers one request, now or later; true when the client says goodbye.
    async fn handle(&mut self, request: &Request) -> io::Result<bool> {
        let answer = Answer { style: self.work.style, cookie: request.cookie, offset: request.offset };
        let action = check(request, &self.terms);
        if request.payload > 0 && !matches!(action, Ok(Action::Write { .. })) {
            if request.payload > u64::from(self.terms.payload_max) {
                return Err(io::Error::other("a payload over the limit"));
            }
            self.skip(request.payload).await?;
        }
        match action {
            Err(errno) => {
                answer.error(&mut self.out, errno, "the request is against the rules of this export")
            }
            Ok(Action::Disconnect) => return Ok(true),
            Ok(Action::Nothing) if request.command == crate::consts::command::READ => {
                answer.data(&mut self.out, request.offset, 0, true);
            }
            Ok(Action::Nothing) => answer.done(&mut self.out),
            Ok(Action::Read { offset, length, dont_fragment }) => {
                self.stats.reads.fetch_add(1, Ordering::Relaxed);
                self.stats.read_bytes.fetch_add(length.into(), Ordering::Relaxed);
                self.read(answer, offset, length as usize, dont_fragment).await?;
            }
            Ok(Action::Write { offset, length, fua }) => {
                self.stats.writes.fetch_add(1, Ordering::Relaxed);
                self.stats.written_bytes.fetch_add(length.into(), Ordering::Relaxed);
                self.write(answer, offset, length as usize, fua).await?;
            }
            Ok(Action::Flush) => self.later(answer, 0, |work| async move { work.disk.flush().await }).await?,
            Ok(Action::Trim { offset, length, fua }) => {
                self.later(answer, 0, move |work| async move { work.disk.trim(offset, length, fua).await })
                    .await?;
            }
            Ok(Action::Zero { offset, length, fua, no_hole, fast }) => {
                let flags = ZeroFlags { no_hole, fast };
                self.later(
                    answer,
                    0,
                    move |work| async move { work.disk.zero(offset, length, flags, fua).await },
                )
                .await?;
            }
            Ok(Action::Cache { offset, length }) => {
                self.later(answer, 0, move |work| async move { work.disk.prefetch(offset, length).await })
                    .await?;
            }
            Ok(Action::Status { offset, length, one }) => {
                let share = self.share(EXTENTS_MAX * 16).await?;
                let work = Arc::clone(&self.work);
                self.tasks.spawn(async move {
                    let _share = share;
                    work.status(answer, offset, length, one).await
                });
            }
        }
        Ok(false)
    }

    /// Answers a read from the page cache right here, or hands it to a task.
    async fn read(&mut self, answer: Answer, offset: u64, length: usize, whole: bool) -> io::Result<()> {
        if length <= PIECE_BYTES {
            let start = self.out.len();
            answer.data(&mut self.out, offset, length, true);
            let data = self.out.len();
            self.out.resize(data + length, 0);
            match self.work.disk.try_read(offset, &mut self.out[data..]) {
                Attempt::Ready(Ok(())) => {
                    if answer.style != Style::Simple && is_zero(&self.out[data..]) {
                        self.out.truncate(start);
                        answer.hole(&mut self.out, offset, u32::try_from(length).expect("a piece"), true);
                    }
                    return Ok(());
                }
                Attempt::Ready(Err(error)) => {
                    self.out.truncate(start);
                    answer.error(&mut self.out, Errno::from(&error), &error.to_string());
                    return Ok(());
                }
                Attempt::WouldBlock => self.out.truncate(start),
            }
        }
        let share = self.share(length.min(PIECE_BYTES)).await?;
        let work = Arc::clone(&self.work);
        self.tasks.spawn(async move {
            let _share = share;
            work.read(answer, offset, length, whole).await
        });
        Ok(())
    }

    /// Takes a write's payload in pieces. Only one that is short may be carried out beside the next request.
    async fn write(&mut self, answer: Answer, offset: u64, length: usize, fua: bool) -> io::Result<()> {
        if length <= PIECE_BYTES {
            self.fill(length).await?;
            let payload = self.input.split_to(length);
            if !fua {
                match self.work.disk.try_write(offset, &payload) {
                    Attempt::Ready(Ok(())) => {
                        answer.done(&mut self.out);
                        return Ok(());
                    }
                    Attempt::Ready(Err(error)) => {
                        answer.error(&mut self.out, Errno::from(&error), &error.to_string());
                        return Ok(());
                    }
                    Attempt::WouldBlock => {}
                }
            }
            let run = move |work: Arc<Work>| async move { work.disk.write(offset, &payload, fua).await };
            return self.later(answer, length, run).await;
        }
        let mut result = Ok(());
        let mut done = 0;
        while done < length {
            let piece = (length - done).min(PIECE_BYTES);
            self.fill(piece).await?;
            let payload = self.input.split_to(piece);
            if result.is_ok() {
                let at = offset + done as u64;
                result = match self.work.disk.try_write(at, &payload) {
                    Attempt::Ready(result) => result,
                    Attempt::WouldBlock => self.work.disk.write(at, &payload, false).await,
                };
            }
            done += piece;
        }
        if fua && result.is_ok() {
            result = self.work.disk.flush().await;
        }
        match result {
            Ok(()) => answer.done(&mut self.out),
            Err(error) => answer.error(&mut self.out, Errno::from(&error), &error.to_string()),
        }
        Ok(())
    }

    /// Runs what has to wait in a task of its own, which then answers.
    async fn later<F, R>(&mut self, answer: Answer, bytes: usize, run: F) -> io::Result<()>
    where
        F: FnOnce(Arc<Work>) -> R + Send + 'static,
        R: Future<Output = io::Result<()>> + Send,
    {
        let share = self.share(bytes).await?;
        let work = Arc::clone(&self.work);
        self.tasks.spawn(async move {
            let _share = share;
            let result = run(Arc::clone(&work)).await;
            let mut out = Vec::with_capacity(HEADER_MAX);
            match result {
                Ok(()) => answer.done(&mut out),
                Err(error) => answer.error(&mut out, Errno::from(&error), &error.to_string()),
            }
            // The reader notices a broken connection by itself.
            let _ = work.send(&out).await;
        });
        Ok(())
    }

    /// Waits for a share of the budgets. What is ready is sent first: the client may wait for just that.
    async fn share(&mut self, bytes: usize) -> io::Result<Share> {
        self.flush().await?;
        let permits = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let never = "the semaphores are never closed";
        let request = Arc::clone(&self.requests).acquire_owned().await.expect(never);
        let idle = self.bytes.available_permits() == self.bytes_max;
        let bytes = permits(bytes.min(self.bytes_max));
        let own = Arc::clone(&self.bytes).acquire_many_owned(bytes).await.expect(never);
        // A connection with nothing in flight has its reserve: others cannot starve it.
        let in_all = if idle {
            None
        } else {
            Some(Arc::clone(&self.bytes_in_all).acquire_many_owned(bytes).await.expect(never))
        };
        Ok(Share { _request: request, _bytes: own, _bytes_in_all: in_all })
    }

    /// Reads until `length` bytes are in the input buffer.
    async fn fill(&mut self, length: usize) -> io::Result<()> {
        if self.input.len() < length {
            self.flush().await?;
            self.input.reserve(length - self.input.len());
        }
        while self.input.len() < length {
            if self.reader.read_buf(&mut self.input).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(())
    }

    /// Reads a payload away.
    async fn skip(&mut self, length: u64) -> io::Result<()> {
        let mut left = length;
        while left > 0 {
            if self.input.is_empty() {
                self.fill(1).await?;
            }
            let here = usize::try_from(left).unwrap_or(usize::MAX).min(self.input.len());
            self.input.advance(here);
            left -= here as u64;
        }
        Ok(())
    }
}

impl Work {
    async fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let mut writer = self.writer.lock().await;
        writer.begin()?;
        writer.stream.write_all(bytes).await?;
        writer.end().await
    }

    /// Reads in pieces, each sent as soon as it is there.
    ///
    /// A simple reply, and one that must not be fragmented, has one header: an error behind it ends the connection,
    /// as the specification wants.
    async fn read(&self, answer: Answer, offset: u64, length: usize, whole: bool) -> io::Result<()> {
        if length > PIECE_BYTES && (whole || answer.style == Style::Simple) {
            return self.read_whole(answer, offset, length).await;
        }
        let mut out = Vec::with_capacity(HEADER_MAX + length.min(PIECE_BYTES));
        let mut done = 0;
        while done < length {
            let piece = (length - done).min(PIECE_BYTES);
            let (at, last) = (offset + done as u64, done + piece == length);
            out.clear();
            answer.data(&mut out, at, piece, last);
            let data = out.len();
            out.resize(data + piece, 0);
            if let Err(error) = self.read_now(at, &mut out[data..]).await {
                out.clear();
                answer.error(&mut out, Errno::from(&error), &error.to_string());
                return self.send(&out).await;
            }
            if answer.style != Style::Simple && is_zero(&out[data..]) {
                out.clear();
                answer.hole(&mut out, at, u32::try_from(piece).expect("a piece"), last);
            }
            self.send(&out).await?;
            done += piece;
        }
        Ok(())
    }

    async fn read_whole(&self, answer: Answer, offset: u64, length: usize) -> io::Result<()> {
        let mut out = Vec::with_capacity(HEADER_MAX + PIECE_BYTES);
        out.resize(PIECE_BYTES.min(length), 0);
        if let Err(error) = self.read_now(offset, &mut out).await {
            out.clear();
            answer.error(&mut out, Errno::from(&error), &error.to_string());
            return self.send(&out).await;
        }
        let mut header = Vec::with_capacity(HEADER_MAX);
        answer.data(&mut header, offset, length, true);
        let mut writer = self.writer.lock().await;
        writer.begin()?;
        writer.stream.write_all(&header).await?;
        let mut done = 0;
        loop {
            writer.stream.write_all(&out).await?;
            done += out.len();
            if done == length {
                return writer.end().await;
            }
            out.resize((length - done).min(PIECE_BYTES), 0);
            if let Err(error) = self.read_now(offset + done as u64, &mut out).await {
                writer.stream.shutdown().await?;
                return Err(error);
            }
        }
    }

    async fn read_now(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        match self.disk.try_read(offset, buf) {
            Attempt::Ready(result) => result,
            Attempt::WouldBlock => self.disk.read(offset, buf).await,
        }
    }

    async fn status(&self, answer: Answer, offset: u64, length: u64, one: bool) -> io::Result<()> {
        let mut out = Vec::new();
        for (number, context) in (1u32..).zip(&self.contexts) {
            let extents_max = if one { 1 } else { EXTENTS_MAX };
            match self.disk.status(context, offset, length, extents_max).await {
                Ok(mut extents) => {
                    trim_extents(&mut extents, length, one, answer.style);
                    answer.status(&mut out, number, &extents, number as usize == self.contexts.len());
                }
                Err(error) => {
                    out.clear();
                    answer.error(&mut out, Errno::from(&error), &error.to_string());
                    break;
                }
            }
        }
        self.send(&out).await
    }
}

/// Cuts extents to what may be sent: one within the request for REQ_ONE, and no length that the headers cannot hold.
fn trim_extents(extents: &mut Vec<StatusExtent>, length: u64, one: bool, style: Style) {
    const COMPACT_MAX: u64 = u32::MAX as u64 & !4095;
    if one {
        extents.truncate(1);
        if let Some(first) = extents.first_mut() {
            first.length = first.length.min(length);
        }
    }
    if style != Style::Extended
        && let Some(long) = extents.iter().position(|extent| extent.length > COMPACT_MAX)
    {
        extents[long].length = COMPACT_MAX;
        extents.truncate(long + 1);
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    // The first word decides almost always.
    let (words, rest) = bytes.as_chunks::<16>();
    bytes.len() >= 512 && words.iter().all(|word| *word == [0; 16]) && rest.iter().all(|byte| *byte == 0)
}
