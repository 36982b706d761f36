//! The transmission phase of one connection.
//!
//! One task reads requests and answers at once what needs no waiting: those replies gather in one buffer and leave in
//! one system call when no further request has arrived yet. What has to wait for the disk is answered by a task of
//! its own, out of order. Both write through one lock. A client that does not read its replies is not read from, and
//! what waits for it is bounded by its byte budget.

mod budget;
mod guard;
mod input;
mod output;
mod pipe;
mod replies;
mod sides;
mod transfers;

use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use budget::{Budget, Share};
use guard::guarded;
use input::{INPUT_BYTES, Input};
use output::Output;
pub(crate) use output::Pieces;
pub(crate) use pipe::Pipes;
use replies::{EXTENTS_MAX, Patience, Replies, Writer};
use sides::Incoming;

use crate::chunk::{Answer, HEADER_MAX, Style};
use crate::consts::{Errno, command};
use crate::disk::{BoxFuture, Disk, ZeroFlags};
use crate::negotiate::{Agreed, Stream};
use crate::request::{Action, COMPACT_BYTES, EXTENDED_BYTES, Request, Terms, check};
use crate::server::{ExportStats, Shared};

/// Replies gather up to this size; what is longer is sent by itself.
const GATHER_BYTES: usize = 64 << 10;

/// Serves requests until the client leaves, breaks the protocol, or `cancel`.
pub(crate) async fn serve(
    stream: Box<dyn Stream>,
    agreed: Agreed,
    shared: &Shared,
    cancel: CancellationToken,
) -> io::Result<()> {
    let _place = agreed.place;
    let disk = Arc::clone(&agreed.export.disk);
    let (reader, writer) = sides::split(stream);
    let terms = Terms {
        size: disk.size(),
        features: disk.features().sound(),
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
        pipes: writer.is_socket().then(|| shared.pipes.clone()),
        patience: Patience {
            stall: shared.limits.stall_timeout,
            bytes_in_all: Arc::clone(&shared.bytes),
            scarce: shared.limits.bytes / 2,
        },
        writer: Mutex::new(Writer::new(writer)),
        broken: cancel.child_token(),
        leaving: AtomicBool::new(false),
    });
    let gone = CancellationToken::new();
    let mut connection = Connection {
        reader,
        input: Input::new(),
        out: Output::default(),
        terms,
        replies: Arc::clone(&replies),
        budget: Arc::new(Budget::new(&shared.limits, &shared.bytes)),
        tasks: TaskTracker::new(),
        drain_timeout: shared.limits.drain_timeout,
        leaves_by: None,
        changes: gone.child_token(),
        gone,
        stats: Arc::clone(&agreed.export.stats),
    };
    let ended = tokio::select! {
        () = replies.broken.cancelled() => Ok(if cancel.is_cancelled() { End::Ours } else { End::Lost }),
        () = agreed.export.closed.cancelled() => Ok(End::Ours),
        ended = connection.run() => ended,
    };
    if !matches!(ended, Ok(End::Ours)) {
        connection.changes.cancel();
    }
    connection.drain().await;
    ended.map(drop)
}

/// What a disk's error is on the wire.
type ErrnoOf = fn(&io::Error) -> Errno;

fn from_disk(error: &io::Error) -> Errno {
    Errno::from(error)
}

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The client said goodbye, or the server wants it so: what is under way is carried out.
    Ours,
    /// The client is gone without a word. It may send again, on another connection, what it has no answer to, and then
    /// newer writes to the same place: what waits to change the disk must not come behind those.
    Lost,
}

struct Connection {
    reader: Incoming,
    input: Input,
    /// Replies that have not been written yet.
    out: Output,
    terms: Terms,
    replies: Arc<Replies>,
    budget: Arc<Budget>,
    tasks: TaskTracker,
    drain_timeout: Duration,
    /// Until when requests are waited for that stand before the goodbye of a client that sends no more.
    leaves_by: Option<Instant>,
    /// Ends the tasks that had not finished when the time to do so was over.
    gone: CancellationToken,
    /// Ends those that would change the disk: with `gone`, or at once when the client is lost.
    changes: CancellationToken,
    stats: Arc<ExportStats>,
}

impl Connection {
    async fn run(&mut self) -> io::Result<End> {
        let size = if self.terms.extended { EXTENDED_BYTES } else { COMPACT_BYTES };
        loop {
            while let Some(request) =
                Request::parse(self.input.rest(), self.terms.extended).map_err(io::Error::other)?
            {
                self.input.advance(size);
                if self.handle(&request).await? {
                    return Ok(End::Ours);
                }
                if self.out.len() >= GATHER_BYTES {
                    self.flush().await?;
                }
            }
            self.flush().await?;
            if self.input.read(&mut self.reader, INPUT_BYTES).await? == 0 {
                return Ok(End::Lost);
            }
        }
    }

    /// Lets what is under way end, so that a write that was being carried out is.
    async fn drain(&mut self) {
        let within = self.drain_timeout;
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

    /// Runs what answers a request in a task of its own, until `given_up`.
    fn spawn<R>(&self, share: Share, given_up: &CancellationToken, run: impl FnOnce(Arc<Replies>) -> R)
    where
        R: Future<Output = io::Result<()>> + Send + 'static,
    {
        let (replies, given_up) = (Arc::clone(&self.replies), given_up.clone());
        let sending = run(Arc::clone(&replies));
        self.tasks.spawn(async move {
            let _share = share;
            given_up.run_until_cancelled(replies.answer(sending)).await;
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
            Ok(Action::Flush) => self.later(answer, from_disk, |disk| disk.flush()).await?,
            Ok(Action::Trim { offset, length, fua }) => {
                self.later(answer, from_disk, move |disk| disk.trim(offset, length, fua)).await?;
            }
            Ok(Action::Zero { offset, length, fua, no_hole, fast }) => {
                let flags = ZeroFlags { no_hole, fast };
                let errno: ErrnoOf = if fast { Errno::of_fast_zero } else { from_disk };
                self.later(answer, errno, move |disk| disk.zero(offset, length, flags, fua)).await?;
            }
            Ok(Action::Cache { offset, length }) => {
                self.later(answer, from_disk, move |disk| disk.prefetch(offset, length)).await?;
            }
            Ok(Action::Status { offset, length, one }) => {
                // As the disk gives them, and as they are sent.
                let share = self.share(EXTENTS_MAX * 16 * 2).await?;
                self.spawn(share, &self.gone, move |replies| async move {
                    replies.status(answer, offset, length, one).await
                });
            }
        }
        Ok(false)
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
    async fn later<F>(&mut self, answer: Answer, errno: ErrnoOf, run: F) -> io::Result<()>
    where
        F: for<'a> FnOnce(&'a dyn Disk) -> BoxFuture<'a, io::Result<()>> + Send + 'static,
    {
        let share = self.share(0).await?;
        self.carry_out(answer, share, errno, run);
        Ok(())
    }

    /// The same, for what has its share.
    fn carry_out<F>(&self, answer: Answer, share: Share, errno: ErrnoOf, run: F)
    where
        F: for<'a> FnOnce(&'a dyn Disk) -> BoxFuture<'a, io::Result<()>> + Send + 'static,
    {
        self.spawn(share, &self.changes, move |replies| async move {
            let result = guarded(|| run(&*replies.disk)).await;
            let mut out = Vec::with_capacity(HEADER_MAX);
            match result {
                Ok(()) => answer.done(&mut out),
                Err(error) => answer.error(&mut out, errno(&error), &error.to_string()),
            }
            replies.send(&out).await
        });
    }

    /// Waits for a share of the budgets. What is ready is sent first: the client may wait for just that.
    async fn share(&mut self, bytes: usize) -> io::Result<Share> {
        self.flush().await?;
        let share = Arc::clone(&self.budget).share(bytes);
        self.while_here(share).await
    }

    /// Waits for `work`, and reads on a little meanwhile: that is how a client's leaving is noticed. One that has said
    /// goodbye, behind requests that wait, gets them carried out, within the time to drain.
    ///
    /// # Errors
    ///
    /// The client has left without a goodbye, or that time is over.
    async fn while_here<T>(&mut self, work: impl Future<Output = T>) -> io::Result<T> {
        let mut work = pin!(work);
        let leaves_by = loop {
            if let Some(leaves_by) = self.leaves_by {
                break leaves_by;
            }
            tokio::select! {
                biased;
                done = &mut work => return Ok(done),
                read = self.input.read(&mut self.reader, 1), if self.input.has_room() => match read {
                    Ok(1..) => {}
                    _ if self.ends_with_goodbye() => {
                        self.replies.leaving.store(true, Ordering::Release);
                        self.leaves_by = Some(Instant::now() + self.drain_timeout);
                    }
                    Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                    Err(error) => return Err(error),
                }
            }
        };
        Ok(tokio::time::timeout_at(leaves_by, work).await?)
    }

    /// Whether the last thing that has come looks like a goodbye. A payload may end like one; then the end of the
    /// input is met again where the next request should be, and the client counts as lost after all.
    fn ends_with_goodbye(&self) -> bool {
        let rest = self.input.rest();
        let size = if self.terms.extended { EXTENDED_BYTES } else { COMPACT_BYTES };
        let Some(start) = rest.len().checked_sub(size) else { return false };
        let last = Request::parse(&rest[start..], self.terms.extended);
        matches!(last, Ok(Some(request)) if request.command == command::DISC)
    }

    /// Reads until `length` bytes are in the input buffer.
    async fn fill(&mut self, length: usize) -> io::Result<()> {
        if self.input.len() < length {
            self.flush().await?;
        }
        while self.input.len() < length {
            if self.input.read(&mut self.reader, length - self.input.len()).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(())
    }

    /// Reads a payload away.
    async fn skip(&mut self, length: u64) -> io::Result<()> {
        let mut left = length;
        while left > 0 {
            if self.input.len() == 0 {
                self.fill(1).await?;
            }
            let here = usize::try_from(left).unwrap_or(usize::MAX).min(self.input.len());
            self.input.advance(here);
            left -= here as u64;
        }
        Ok(())
    }
}
