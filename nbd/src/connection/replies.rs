//! The sending side of a connection, and the work of the tasks that answer out of order.

use std::io;
use std::ops::ControlFlow;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::Duration;

use futures_util::poll;
use tokio::io::AsyncWriteExt;
use tokio::sync::{Mutex, Semaphore};
use tokio_util::sync::CancellationToken;

use super::guard::{aside, attempt, guarded};
use super::output::{Output, Pieces};
use super::pipe::{Content, Pipe, Pipes, is_cached};
use super::sides::Outgoing;
use crate::chunk::{Answer, HEADER_MAX, Style};
use crate::consts::Errno;
use crate::disk::{Attempt, FileRange, SharedDisk, StatusExtent};
use crate::limits::PIECE_BYTES;

/// Most extents in the answer to one status request, in one context.
pub(super) const EXTENTS_MAX: usize = 4096;

/// What the tasks of a connection share.
pub(super) struct Replies {
    pub(super) disk: SharedDisk,
    pub(super) style: Style,
    pub(super) contexts: Vec<&'static str>,
    pub(super) pieces: Pieces,
    /// For what a file has, if the connection takes it as it is.
    pub(super) pipes: Option<Pipes>,
    pub(super) patience: Patience,
    pub(super) writer: Mutex<Writer>,
    /// Ends the connection: a reply could not be sent.
    pub(super) broken: CancellationToken,
    /// The client has said goodbye and sends no more. Whether it still reads is its own affair: what it asked for is
    /// carried out.
    pub(super) leaving: AtomicBool,
}

/// How long a client may leave a reply unread.
#[derive(Debug)]
pub(super) struct Patience {
    /// Time for one buffer of at most two pieces.
    pub(super) stall: Duration,
    /// What all connections together may have in flight; while most of it is free, nobody is hurt by one that waits.
    pub(super) bytes_in_all: Arc<Semaphore>,
    /// Half of it.
    pub(super) scarce: usize,
}

impl Patience {
    /// Waits for `write`, for as long as it likes while memory is plenty.
    async fn wait(&self, write: impl Future<Output = io::Result<()>>) -> io::Result<()> {
        let mut write = pin!(write);
        // Nearly always there is room in the socket: no timer then.
        if let Poll::Ready(result) = poll!(&mut write) {
            return result;
        }
        loop {
            match tokio::time::timeout(self.stall, &mut write).await {
                Ok(result) => return result,
                Err(_) if self.bytes_in_all.available_permits() >= self.scarce => {}
                Err(_) => {
                    let reason = "the client does not read, and others need the memory";
                    return Err(io::Error::new(io::ErrorKind::TimedOut, reason));
                }
            }
        }
    }
}

/// The socket, and whether it can still be used.
pub(super) struct Writer {
    stream: Outgoing,
    /// A reply has begun and not ended. Whoever finds this true must send nothing: the client would take it for the
    /// rest of that reply's data. It stays true when the sender is cancelled, fails or panics half-way.
    torn: bool,
}

impl Writer {
    pub(super) const fn new(stream: Outgoing) -> Self {
        Self { stream, torn: false }
    }

    /// Marks a reply as begun.
    fn begin(&mut self) -> io::Result<()> {
        if self.torn {
            return Err(io::Error::new(io::ErrorKind::BrokenPipe, "an earlier reply was cut short"));
        }
        self.torn = true;
        Ok(())
    }

    async fn put(&mut self, bytes: &[u8], patience: &Patience) -> io::Result<()> {
        patience.wait(self.stream.bytes().write_all(bytes)).await
    }

    /// Sends what is left in buffers; what was begun is whole.
    async fn end(&mut self, patience: &Patience) -> io::Result<()> {
        patience.wait(self.stream.bytes().flush()).await?;
        self.torn = false;
        Ok(())
    }

    pub(super) async fn shutdown(&mut self) -> io::Result<()> {
        self.stream.bytes().shutdown().await
    }
}

impl Replies {
    /// Sends whole replies.
    pub(super) async fn send(&self, bytes: &[u8]) -> io::Result<()> {
        match self.send_to_reader(bytes).await {
            Err(_) if self.leaving.load(Ordering::Acquire) => Ok(()),
            sent => sent,
        }
    }

    async fn send_to_reader(&self, bytes: &[u8]) -> io::Result<()> {
        let mut writer = self.writer.lock().await;
        writer.begin()?;
        writer.put(bytes, &self.patience).await?;
        writer.end(&self.patience).await
    }

    /// Waits for what answers a request in a task of its own; a failure to send ends the connection.
    pub(super) async fn answer(&self, sending: impl Future<Output = io::Result<()>>) {
        if sending.await.is_err() && !self.leaving.load(Ordering::Acquire) {
            self.broken.cancel();
        }
    }

    /// Answers a read of at most a piece if that needs no waiting for the disk; false if it does.
    pub(super) async fn read_now(&self, answer: Answer, offset: u64, length: usize) -> io::Result<bool> {
        let mut out = self.pieces.take(length);
        out.put(|out| answer.data(out, offset, length, true));
        let buf = out.space(length);
        let Attempt::Ready(result) = attempt(|| self.disk.try_read(offset, buf)) else { return Ok(false) };
        let _ = self.send_piece(answer, (offset, length, true), result, &mut out).await?;
        Ok(true)
    }

    /// Answers a read in pieces, each sent as soon as it is there.
    pub(super) async fn read(
        &self,
        answer: Answer,
        offset: u64,
        length: usize,
        whole: bool,
    ) -> io::Result<()> {
        let mut out = self.pieces.take(length);
        if one_header(answer, length, whole) {
            return self.read_whole(answer, offset, length, &mut out).await;
        }
        for (done, piece) in pieces(length) {
            let (at, last) = (offset + done as u64, done + piece == length);
            if self.read_from_file(answer, (at, piece, last)).await? {
                continue;
            }
            out.truncate(0);
            out.put(|out| answer.data(out, at, piece, last));
            let result = self.fetch(at, out.space(piece)).await;
            if self.send_piece(answer, (at, piece, last), result, &mut out).await?.is_break() {
                break;
            }
        }
        Ok(())
    }

    /// Answers a read of at most a piece with the pages of the file that it is, if they are in the page cache; false, and
    /// nothing is sent, if not.
    pub(super) async fn read_cached(&self, answer: Answer, offset: u64, length: usize) -> io::Result<bool> {
        let Some((pipes, range)) = self.in_file(offset, length) else { return Ok(false) };
        if !is_cached(&*range.file, range.offset, length) {
            return Ok(false);
        }
        let header = data_header(answer, (offset, length, true));
        let Ok(filled) = fill(pipes, &header, &range, length) else { return Ok(false) };
        self.send_filled(answer, (offset, length, true), header, filled).await
    }

    /// Sends a piece as the pages of the file that it is; false, and nothing is sent, if it is no such thing, or cannot be
    /// read: the other way says why.
    async fn read_from_file(
        &self,
        answer: Answer,
        (at, length, last): (u64, usize, bool),
    ) -> io::Result<bool> {
        let Some((pipes, range)) = self.in_file(at, length) else { return Ok(false) };
        let header = data_header(answer, (at, length, last));
        let filled = if is_cached(&*range.file, range.offset, length) {
            fill(pipes, &header, &range, length)
        } else {
            let (pipes, header) = (pipes.clone(), header.clone());
            let blocking = tokio::task::spawn_blocking(move || fill(&pipes, &header, &range, length));
            blocking.await.map_err(io::Error::other).flatten()
        };
        let Ok(filled) = filled else { return Ok(false) };
        self.send_filled(answer, (at, length, last), header, filled).await
    }

    /// Where the disk has a range in a file, if this connection can make use of that.
    fn in_file(&self, offset: u64, length: usize) -> Option<(&Pipes, FileRange)> {
        let pipes = self.pipes.as_ref()?;
        Some((pipes, aside(|| self.disk.in_file(offset, length))?))
    }

    async fn send_filled(
        &self,
        answer: Answer,
        (at, length, last): (u64, usize, bool),
        mut header: Vec<u8>,
        (pipe, content): (Pipe, Content),
    ) -> io::Result<bool> {
        match content {
            Content::Hole if answer.style == Style::Simple => {
                self.give_back(pipe);
                return Ok(false);
            }
            Content::Hole => {
                self.give_back(pipe);
                header.clear();
                let length = u32::try_from(length).expect("a piece is short");
                answer.hole(&mut header, at, length, last);
                self.send(&header).await?;
            }
            Content::Bytes => match self.drain(&pipe, header.len() + length).await {
                Ok(()) => self.give_back(pipe),
                // What is left in the pipe goes with it.
                Err(_) if self.leaving.load(Ordering::Acquire) => {}
                Err(error) => return Err(error),
            },
        }
        aside(|| self.disk.note_read(at, length));
        Ok(true)
    }

    /// Sends the `length` bytes that a pipe holds, whole replies.
    async fn drain(&self, pipe: &Pipe, length: usize) -> io::Result<()> {
        let mut writer = self.writer.lock().await;
        writer.begin()?;
        self.patience.wait(writer.stream.drain(pipe, length)).await?;
        writer.end(&self.patience).await
    }

    fn give_back(&self, pipe: Pipe) {
        if let Some(pipes) = &self.pipes {
            pipes.give_back(pipe);
        }
    }

    /// Answers a read with one header. All pieces are read before it is sent: behind it an error could only end the
    /// connection, and its client would ask the same of the next. What was read once is in the page cache when it is
    /// read to be sent.
    async fn read_whole(
        &self,
        answer: Answer,
        offset: u64,
        length: usize,
        out: &mut Output,
    ) -> io::Result<()> {
        out.put(|out| answer.data(out, offset, length, true));
        let header = out.len();
        for (done, piece) in pieces(length).chain(pieces(length).take(1)) {
            out.truncate(header);
            if let Err(error) = self.fetch(offset + done as u64, out.space(piece)).await {
                return self.send_error(answer, &error, out).await;
            }
        }
        self.send_whole(offset, length, out).await
    }

    /// Sends a piece that stands in `out` behind its header, or the error instead, which ends the reply.
    async fn send_piece(
        &self,
        answer: Answer,
        (at, piece, last): (u64, usize, bool),
        result: io::Result<()>,
        out: &mut Output,
    ) -> io::Result<ControlFlow<()>> {
        if let Err(error) = result {
            self.send_error(answer, &error, out).await?;
            return Ok(ControlFlow::Break(()));
        }
        if answer.style != Style::Simple && is_zero(out.since(out.len() - piece)) {
            out.truncate(0);
            let length = u32::try_from(piece).expect("a piece is short");
            out.put(|out| answer.hole(out, at, length, last));
        }
        self.send(out.filled()).await?;
        Ok(ControlFlow::Continue(()))
    }

    async fn send_error(&self, answer: Answer, error: &io::Error, out: &mut Output) -> io::Result<()> {
        out.truncate(0);
        out.put(|out| answer.error(out, Errno::from(error), &error.to_string()));
        self.send(out.filled()).await
    }

    /// Sends a reply that has one header: `out` holds it and the first piece, the rest is read again as it goes.
    async fn send_whole(&self, offset: u64, length: usize, out: &mut Output) -> io::Result<()> {
        let mut writer = self.writer.lock().await;
        writer.begin()?;
        writer.put(out.filled(), &self.patience).await?;
        for (done, piece) in pieces(length).skip(1) {
            out.truncate(0);
            // The writer stays torn on an error: this connection has said its last, as the specification wants.
            self.fetch(offset + done as u64, out.space(piece)).await?;
            writer.put(out.filled(), &self.patience).await?;
        }
        writer.end(&self.patience).await
    }

    async fn fetch(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        match attempt(|| self.disk.try_read(offset, buf)) {
            Attempt::Ready(result) => result,
            Attempt::WouldBlock => guarded(|| self.disk.read(offset, buf)).await,
        }
    }

    /// Answers a status request in every selected context.
    pub(super) async fn status(&self, answer: Answer, offset: u64, length: u64, one: bool) -> io::Result<()> {
        let mut out = Vec::new();
        let extents_max = if one { 1 } else { EXTENTS_MAX };
        for (number, context) in (1u32..).zip(&self.contexts) {
            match guarded(|| self.disk.status(context, offset, length, extents_max)).await {
                Ok(mut extents) if !extents.is_empty() => {
                    trim_extents(&mut extents, length, one, answer.style);
                    answer.status(&mut out, number, &extents, number as usize == self.contexts.len());
                }
                Ok(_) => {
                    out.clear();
                    answer.error(&mut out, Errno::Io, "the disk does not know its own status");
                    break;
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

fn data_header(answer: Answer, (at, length, last): (u64, usize, bool)) -> Vec<u8> {
    let mut header = Vec::with_capacity(HEADER_MAX);
    answer.data(&mut header, at, length, last);
    header
}

/// Fills a pipe; blocks while the device reads.
fn fill(pipes: &Pipes, header: &[u8], range: &FileRange, length: usize) -> io::Result<(Pipe, Content)> {
    let pipe = pipes.take()?;
    let content = pipe.fill(header, &*range.file, range.offset, length)?;
    Ok((pipe, content))
}

/// The pieces of a read of `length` bytes: where each begins in it, and its size.
fn pieces(length: usize) -> impl Iterator<Item = (usize, usize)> {
    let count = length.div_ceil(PIECE_BYTES);
    (0..count).map(move |number| {
        let done = number * PIECE_BYTES;
        (done, (length - done).min(PIECE_BYTES))
    })
}

/// Whether a read has one header for all its data: simple replies, and those that must not be fragmented.
const fn one_header(answer: Answer, length: usize, whole: bool) -> bool {
    length > PIECE_BYTES && (whole || matches!(answer.style, Style::Simple))
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

/// Whether bytes are worth being sent as a hole.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    // The first word decides almost always.
    let (words, rest) = bytes.as_chunks::<16>();
    bytes.len() >= 512 && words.iter().all(|word| *word == [0; 16]) && rest.iter().all(|byte| *byte == 0)
}
