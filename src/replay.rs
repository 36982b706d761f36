//! A recorded boot played against an NBD export, as a guest that needs no processor: the same offsets and lengths, with
//! the think times between them.
//!
//! A closed loop: a read is sent when everything that had been answered before it in the recording has been answered
//! now, and the guest has then thought for as long as it did. Reads that overlapped in the recording overlap again.
//! Works with any server; every byte can be checked against the image, beside the replay, which does not wait for it.

pub mod report;
pub mod uri;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use bootcache_nbd::client::Client;
use tokio::runtime::Handle;

use crate::boot_cache::recording::{Read, Recording};

pub use report::Report;
pub use uri::Uri;

/// Longest piece of a read that is asked for at once: no server has to take more.
const PIECE_MAX: u64 = 32 << 20;

/// How to replay.
#[derive(Debug, Clone)]
pub struct Options {
    /// Think times are divided by this, to stand for a faster processor.
    pub speed: f64,
    /// The image as a raw disk, to check every byte against.
    pub image: Option<Arc<File>>,
}

/// A replay that could not be finished.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The export cannot hold what was recorded.
    #[error("the export has {size} bytes, but the recording reads up to byte {end}: is it another image?")]
    TooSmall {
        /// Of the export.
        size: u64,
        /// Where the furthest read ends.
        end: u64,
    },
    /// The server answered a read with an error, or is gone.
    #[error("reading {length} bytes at {offset}: {error}")]
    Read {
        /// Byte offset.
        offset: u64,
        /// In bytes.
        length: u64,
        /// What went wrong.
        error: io::Error,
    },
    /// The image to check against cannot be read.
    #[error("the image to check against: {0}")]
    Image(io::Error),
}

/// An answer, or why there is none.
struct Done {
    index: usize,
    sent: Instant,
    ended: Instant,
    outcome: Result<Vec<Piece>, ReplayError>,
}

/// Bytes that came, and their offset.
type Piece = (u64, Vec<u8>);

/// Plays the boot in `recording`, up to its end, against the export that `client` is connected to. Blocks this thread,
/// which sleeps more exactly than a task could; the reads run on `runtime`.
///
/// # Errors
/// [`ReplayError`]. That bytes differ from the image is none: it is in the report.
pub fn replay(
    runtime: &Handle,
    client: &Client,
    recording: &Recording,
    options: &Options,
) -> Result<Report, ReplayError> {
    let reads: Vec<Read> =
        recording.reads.iter().copied().filter(|read| read.time_ns <= recording.end_ns).collect();
    let end = reads.iter().map(|read| read.offset + read.length).max().unwrap_or(0);
    if end > client.size() {
        return Err(ReplayError::TooSmall { size: client.size(), end });
    }
    let (answers, inbox) = channel();
    let (unchecked, pieces) = channel();
    let image = options.image.clone();
    let check = thread::spawn(move || count_wrong(image.as_deref(), &pieces));
    let started = Instant::now();
    let mut guest = Guest {
        speed: options.speed,
        pending: Vec::new(),
        inbox,
        base: started,
        base_ns: 0,
        done: Vec::new(),
        unchecked,
    };
    for (index, read) in reads.iter().enumerate() {
        guest.wait_for_what_ended_before(read.time_ns)?;
        guest.think_until(read.time_ns);
        guest.pending.push((index, read.time_ns + read.took_ns));
        let (client, answers, read) = (client.clone(), Sender::clone(&answers), *read);
        runtime.spawn(async move { perform(index, read, &client, &answers).await });
    }
    guest.wait_for_what_ended_before(recording.end_ns)?;
    guest.think_until(recording.end_ns);
    let took = started.elapsed();
    guest.wait_for_what_ended_before(u64::MAX)?;
    let answered = guest.finish();
    let wrong_bytes = check.join().expect("it does not panic").map_err(ReplayError::Image)?;
    let local = scaled(recording.end_ns, options.speed);
    let bytes = reads.iter().map(|read| read.length).sum();
    Ok(Report::of(&answered, started, took, local, bytes, wrong_bytes))
}

/// The recorded guest: what it waits for, and when it goes on.
struct Guest {
    speed: f64,
    /// Reads without an answer, with the time at which they were answered in the recording.
    pending: Vec<(usize, u64)>,
    inbox: Receiver<Done>,
    /// The guest goes on from here …
    base: Instant,
    /// … which is this time of the recording.
    base_ns: u64,
    done: Vec<report::Answered>,
    /// To the thread that checks.
    unchecked: Sender<Piece>,
}

impl Guest {
    fn wait_for_what_ended_before(&mut self, time_ns: u64) -> Result<(), ReplayError> {
        while self.pending.iter().any(|(_, ended_ns)| *ended_ns <= time_ns) {
            let done = self.inbox.recv().expect("every read that was sent is answered");
            for piece in done.outcome? {
                // The checker ends early only when the image cannot be read, which it says itself.
                let _ = self.unchecked.send(piece);
            }
            let at = self.pending.iter().position(|(index, _)| *index == done.index).expect("it was sent");
            let (_, ended_ns) = self.pending.swap_remove(at);
            self.done.push(report::Answered { sent: done.sent, ended: done.ended });
            self.base = self.base.max(done.ended);
            self.base_ns = self.base_ns.max(ended_ns);
        }
        Ok(())
    }

    fn think_until(&self, time_ns: u64) {
        let due = self.base + scaled(time_ns.saturating_sub(self.base_ns), self.speed);
        thread::sleep(due.saturating_duration_since(Instant::now()));
    }

    /// What was answered; nothing more comes to the checker.
    fn finish(self) -> Vec<report::Answered> {
        self.done
    }
}

fn scaled(time_ns: u64, speed: f64) -> Duration {
    Duration::from_nanos(time_ns).div_f64(speed)
}

async fn perform(index: usize, read: Read, client: &Client, answers: &Sender<Done>) {
    let sent = Instant::now();
    let mut pieces = Vec::new();
    let mut failed = None;
    let mut offset = read.offset;
    while offset < read.offset + read.length && failed.is_none() {
        let length = (read.offset + read.length - offset).min(PIECE_MAX);
        match client.read(offset, u32::try_from(length).expect("at most PIECE_MAX")).await {
            Ok(data) => pieces.push((offset, data)),
            Err(error) => failed = Some(ReplayError::Read { offset, length, error }),
        }
        offset += length;
    }
    let ended = Instant::now();
    let outcome = failed.map_or(Ok(pieces), Err);
    // Nobody listens any more when another read has failed.
    let _ = answers.send(Done { index, sent, ended, outcome });
}

/// Bytes of `pieces` that differ from the image, until there are no more; beyond its end only zeroes are right.
fn count_wrong(image: Option<&File>, pieces: &Receiver<Piece>) -> io::Result<u64> {
    let Some(image) = image else {
        pieces.iter().for_each(drop);
        return Ok(0);
    };
    let size = image.metadata()?.len();
    let mut wrong = 0;
    for (offset, data) in pieces {
        let mut expected = vec![0; data.len()];
        let within = usize::try_from(size.saturating_sub(offset)).unwrap_or(usize::MAX).min(data.len());
        image.read_exact_at(&mut expected[..within], offset)?;
        if expected != data {
            wrong += data.iter().zip(&expected).filter(|(got, expected)| got != expected).count() as u64;
        }
    }
    Ok(wrong)
}

#[cfg(test)]
mod tests;
