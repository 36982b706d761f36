//! Reads and writes: inline where the disk has it so, else in a task that holds a share of the budgets.

use std::io;
use std::sync::Arc;

use super::guard::{attempt, guarded};
use super::replies::is_zero;
use super::{Connection, GATHER_BYTES, from_disk};
use crate::chunk::{Answer, Style};
use crate::disk::Attempt;
use crate::limits::PIECE_BYTES;

/// From how many bytes on it costs less to send the page cache's pages than to copy them.
const SPLICED_MIN: usize = 64 << 10;

impl Connection {
    /// Answers a read from the page cache right here, or hands it to a task: one that has to wait, and a long one, whose
    /// copying then goes on beside that of the next.
    pub(super) async fn read(
        &mut self,
        answer: Answer,
        offset: u64,
        length: usize,
        whole: bool,
    ) -> io::Result<()> {
        if (SPLICED_MIN..=PIECE_BYTES).contains(&length) && self.replies.pipes.is_some() {
            self.flush().await?;
            if self.replies.read_cached(answer, offset, length).await? {
                return Ok(());
            }
        }
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
        let short = GATHER_BYTES < length && length <= PIECE_BYTES;
        if !short || !self.replies.read_now(answer, offset, length).await? {
            self.spawn(share, &self.gone, move |replies| async move {
                replies.read(answer, offset, length, whole).await
            });
        }
        Ok(())
    }

    /// Takes a write's payload in pieces. Only one that is short may be carried out beside the next request.
    pub(super) async fn write(
        &mut self,
        answer: Answer,
        offset: u64,
        length: usize,
        fua: bool,
    ) -> io::Result<()> {
        if length <= PIECE_BYTES {
            self.fill(length).await?;
            if !fua && let Attempt::Ready(result) = self.try_write(offset, length) {
                self.input.advance(length);
                self.finish(answer, result);
                return Ok(());
            }
            let share = self.share(length).await?;
            let payload = self.input.take(length);
            self.carry_out(answer, share, from_disk, move |disk| {
                Box::pin(async move { disk.write(offset, &payload, fua).await })
            });
            return Ok(());
        }
        let mut result = Ok(());
        let mut done = 0;
        while done < length {
            let piece = (length - done).min(PIECE_BYTES);
            self.fill(piece).await?;
            let at = offset + done as u64;
            done += piece;
            if result.is_ok()
                && let Attempt::Ready(now) = self.try_write(at, piece)
            {
                result = now;
            } else if result.is_ok() {
                let _share = self.share(piece).await?;
                let (payload, disk) = (self.input.take(piece), Arc::clone(&self.replies.disk));
                result = self.while_here(guarded(|| disk.write(at, &payload, false))).await?;
                continue;
            }
            self.input.advance(piece);
        }
        if fua && result.is_ok() {
            let disk = Arc::clone(&self.replies.disk);
            result = self.while_here(guarded(|| disk.flush())).await?;
        }
        self.finish(answer, result);
        Ok(())
    }

    /// Tries to write the next `length` bytes of the input.
    fn try_write(&self, offset: u64, length: usize) -> Attempt {
        attempt(|| self.replies.disk.try_write(offset, &self.input.rest()[..length]))
    }
}
