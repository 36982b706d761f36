//! The transmission phase of one connection.
//!
//! One task reads requests and answers at once what needs no waiting: those replies gather in one buffer and leave in
//! one system call when no further request has arrived yet. What has to wait for the disk is answered by a task of
//! its own, out of order. Both write through one lock. A client that does not read its replies is not read from, and
//! what waits for it is bounded by its byte budget.

mod budget;
mod guard;
mod output;
mod replies;

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncReadExt, ReadHalf};
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use budget::{Budget, Share};
use guard::{attempt, guarded};
use output::Output;
pub(crate) use output::Pieces;
use replies::{EXTENTS_MAX, Patience, Replies, Writer, is_zero};

use crate::chunk::{Answer, HEADER_MAX, Style};
use crate::consts::Errno;
use crate::disk::{Attempt, BoxFuture, Disk, ZeroFlags};
use crate::limits::PIECE_BYTES;
use crate::negotiate::{Agreed, Stream};
use crate::request::{Action, COMPACT_BYTES, EXTENDED_BYTES, Request, Terms, check};
use crate::server::{ExportStats, Shared};

/// Requests are read into a buffer of this size.
const INPUT_BYTES: usize = 64 << 10;
/// Replies gather up to this size; what is longer is sent by itself.
const GATHER_BYTES: usize = 64 << 10;

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
    let replies = Arc::new(Replies {
        disk,
        style: agreed.style,
        contexts: agreed.contexts,
        pieces: shared.pieces.clone(),
        patience: Patience {
            stall: shared.limits.stall_timeout,
            bytes_in_all: Arc::clone(&shared.bytes),
            scarce: shared.limits.bytes / 2,
        },
        writer: Mutex::new(Writer::new(writer)),
        broken: cancel.child_token(),
    });
    let mut connection = Connection {
        reader,
        input: BytesMut::with_capacity(INPUT_BYTES),
        out: Output::default(),
        terms,
        replies: Arc::clone(&replies),
        budget: Budget::new(&shared.limits, &shared.bytes),
        tasks: TaskTracker::new(),
        gone: CancellationToken::new(),
        stats: Arc::clone(&agreed.export.stats),
    };
    let result = tokio::select! {
        () = replies.broken.cancelled() => Ok(()),
        () = agreed.export.closed.cancelled() => Ok(()),
        result = connection.run() => result,
    };
    connection.drain(shared.limits.drain_timeout).await;
    result
}

struct Connection {
    reader: ReadHalf<Box<dyn Stream>>,
    input: BytesMut,
    /// Replies that have not been written yet.
    out: Output,
    terms: Terms,
    replies: Arc<Replies>,
    budget: Budget,
    tasks: TaskTracker,
    /// Ends the tasks that had not finished when the time to do so was over.
    gone: CancellationToken,
    stats: Arc<ExportStats>,
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
                if self.out.len() >= GATHER_BYTES {
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
    async fn drain(&mut self, within: Duration) {
        self.tasks.close();
        let last = async {
            self.tasks.wait().await;
            let _ = self.flush().await;
            let _ = self.replies.writer.lock().await.shutdown().await;
        };
        let _ = tokio::time::timeout(within, last).await;
        self.gone.cancel();
    }

    async fn flush(&mut self) -> io::Result<()> {
        if self.out.len() > 0 {
            self.replies.send(self.out.filled()).await?;
            self.out.truncate(0);
        }
        Ok(())
    }

    /// Runs what answers a request in a task of its own.
    fn spawn<R>(&self, share: Share, run: impl FnOnce(Arc<Replies>) -> R)
    where
        R: Future<Output = io::Result<()>> + Send + 'static,
    {
        let (replies, gone) = (Arc::clone(&self.replies), self.gone.clone());
        let sending = run(Arc::clone(&replies));
        self.tasks.spawn(async move {
            let _share = share;
            gone.run_until_cancelled(replies.answer(sending)).await;
        });
    }

    /// Answers one request, now or later; true when the client says goodbye.
    async fn handle(&mut self, request: &Request) -> io::Result<bool> {
        let answer = Answer { style: self.replies.style, cookie: request.cookie, offset: request.offset };
        let action = check(request, &self.terms);
        if request.payload > 0 && !matches!(action, Ok(Action::Write { .. })) {
            if request.payload > u64::from(self.terms.payload_max) {
                return Err(io::Error::other("a payload over the limit"));
            }
            self.skip(request.payload).await?;
        }
        match action {
            Err(errno) => self
                .out
                .put(|out| answer.error(out, errno, "the request is against the rules of this export")),
            Ok(Action::Disconnect) => return Ok(true),
            Ok(Action::Nothing) => self.out.put(|out| answer.nothing(out)),
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
            Ok(Action::Flush) => self.later(answer, 0, |disk| disk.flush()).await?,
            Ok(Action::Trim { offset, length, fua }) => {
                self.later(answer, 0, move |disk| disk.trim(offset, length, fua)).await?;
            }
            Ok(Action::Zero { offset, length, fua, no_hole, fast }) => {
                let flags = ZeroFlags { no_hole, fast };
                self.later(answer, 0, move |disk| disk.zero(offset, length, flags, fua)).await?;
            }
            Ok(Action::Cache { offset, length }) => {
                self.later(answer, 0, move |disk| disk.prefetch(offset, length)).await?;
            }
            Ok(Action::Status { offset, length, one }) => {
                let share = self.share(EXTENTS_MAX * 16).await?;
                self.spawn(
                    share,
                    move |replies| async move { replies.status(answer, offset, length, one).await },
                );
            }
        }
        Ok(false)
    }

    /// Answers a read from the page cache right here, or hands it to a task.
    async fn read(&mut self, answer: Answer, offset: u64, length: usize, whole: bool) -> io::Result<()> {
        if length <= GATHER_BYTES {
            let start = self.out.len();
            self.out.put(|out| answer.data(out, offset, length, true));
            let data = self.out.len();
            let (disk, buf) = (&self.replies.disk, self.out.space(length));
            match attempt(|| disk.try_read(offset, buf)) {
                Attempt::Ready(Ok(())) => {
                    if answer.style != Style::Simple && is_zero(self.out.since(data)) {
                        self.out.truncate(start);
                        let length = u32::try_from(length).expect("it is short");
                        self.out.put(|out| answer.hole(out, offset, length, true));
                    }
                    return Ok(());
                }
                Attempt::Ready(Err(error)) => {
                    self.out.truncate(start);
                    self.fail(answer, &error);
                    return Ok(());
                }
                Attempt::WouldBlock => self.out.truncate(start),
            }
        }
        let share = self.share(length.min(PIECE_BYTES)).await?;
        let done = if length > GATHER_BYTES {
            self.replies.read_now(answer, offset, length, whole).await?
        } else {
            0
        };
        if done < length {
            self.spawn(share, move |replies| async move {
                replies.read(answer, offset + done as u64, length - done, whole).await
            });
        }
        Ok(())
    }

    /// Takes a write's payload in pieces. Only one that is short may be carried out beside the next request.
    async fn write(&mut self, answer: Answer, offset: u64, length: usize, fua: bool) -> io::Result<()> {
        if length <= PIECE_BYTES {
            self.fill(length).await?;
            let payload = self.input.split_to(length);
            if !fua {
                match attempt(|| self.replies.disk.try_write(offset, &payload)) {
                    Attempt::Ready(result) => {
                        self.finish(answer, result);
                        return Ok(());
                    }
                    Attempt::WouldBlock => {}
                }
            }
            return self
                .later(answer, length, move |disk| {
                    Box::pin(async move { disk.write(offset, &payload, fua).await })
                })
                .await;
        }
        let mut result = Ok(());
        let mut done = 0;
        while done < length {
            let piece = (length - done).min(PIECE_BYTES);
            self.fill(piece).await?;
            let payload = self.input.split_to(piece);
            if result.is_ok() {
                let (at, disk) = (offset + done as u64, &self.replies.disk);
                result = match attempt(|| disk.try_write(at, &payload)) {
                    Attempt::Ready(result) => result,
                    Attempt::WouldBlock => guarded(|| disk.write(at, &payload, false)).await,
                };
            }
            done += piece;
        }
        if fua && result.is_ok() {
            result = guarded(|| self.replies.disk.flush()).await;
        }
        self.finish(answer, result);
        Ok(())
    }

    fn finish(&mut self, answer: Answer, result: io::Result<()>) {
        match result {
            Ok(()) => self.out.put(|out| answer.done(out)),
            Err(error) => self.fail(answer, &error),
        }
    }

    fn fail(&mut self, answer: Answer, error: &io::Error) {
        self.out.put(|out| answer.error(out, Errno::from(error), &error.to_string()));
    }

    /// Runs what has to wait in a task of its own, which then answers.
    async fn later<F>(&mut self, answer: Answer, bytes: usize, run: F) -> io::Result<()>
    where
        F: for<'a> FnOnce(&'a dyn Disk) -> BoxFuture<'a, io::Result<()>> + Send + 'static,
    {
        let share = self.share(bytes).await?;
        self.spawn(share, move |replies| async move {
            let result = guarded(|| run(&*replies.disk)).await;
            let mut out = Vec::with_capacity(HEADER_MAX);
            match result {
                Ok(()) => answer.done(&mut out),
                Err(error) => answer.error(&mut out, Errno::from(&error), &error.to_string()),
            }
            replies.send(&out).await
        });
        Ok(())
    }

    /// Waits for a share of the budgets. What is ready is sent first: the client may wait for just that.
    async fn share(&mut self, bytes: usize) -> io::Result<Share> {
        self.flush().await?;
        Ok(self.budget.share(bytes).await)
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
