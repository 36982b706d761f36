//! What a client has sent and has not been taken yet.
//!
//! One buffer for each connection that never grows beyond a piece and what is read at once, and that nothing else keeps
//! alive: a payload that has to outlive its turn is copied out, so that what a request holds is what it is charged for.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt};

use crate::limits::PIECE_BYTES;
use crate::request::EXTENDED_BYTES;

/// Read at once.
pub(super) const INPUT_BYTES: usize = 64 << 10;

/// Bytes from `start` on have not been taken.
#[derive(Debug)]
pub(super) struct Input {
    bytes: Vec<u8>,
    start: usize,
}

impl Input {
    /// With room to read behind the begin of a request.
    pub(super) fn new() -> Self {
        Self { bytes: Vec::with_capacity(INPUT_BYTES + EXTENDED_BYTES), start: 0 }
    }

    /// What has not been taken.
    pub(super) fn rest(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    /// The number of bytes that have not been taken.
    pub(super) const fn len(&self) -> usize {
        self.bytes.len() - self.start
    }

    /// Whether more can be read without a larger buffer.
    pub(super) const fn has_room(&self) -> bool {
        self.len() < self.bytes.capacity()
    }

    /// Takes `count` bytes, which are there.
    pub(super) fn advance(&mut self, count: usize) {
        self.start += count;
        if self.start >= self.bytes.len() {
            self.bytes.clear();
            self.start = 0;
        }
    }

    /// Takes `count` bytes, which are there, in memory of their own.
    pub(super) fn take(&mut self, count: usize) -> Vec<u8> {
        let taken = self.rest()[..count].to_vec();
        self.advance(count);
        taken
    }

    /// Reads what has come, with room for `room` bytes or more; 0 when the client has left. Nothing is lost when the
    /// future is dropped.
    pub(super) async fn read(
        &mut self,
        reader: &mut (impl AsyncRead + Unpin),
        room: usize,
    ) -> io::Result<usize> {
        if self.bytes.capacity() - self.bytes.len() < room {
            self.bytes.drain(..self.start);
            self.start = 0;
            if self.bytes.capacity() - self.bytes.len() < room {
                self.bytes
                    .reserve_exact(room.max((PIECE_BYTES + INPUT_BYTES).saturating_sub(self.bytes.len())));
            }
        }
        reader.read_buf(&mut self.bytes).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn bytes_come_in_order_and_the_buffer_stays_small_whatever_is_taken() {
        let sent: Vec<u8> = (0..4_u32 << 20).map(|at| (at / 3 % 251).to_le_bytes()[0]).collect();
        let (mut reader, mut input, mut got) = (&sent[..], Input::new(), Vec::new());
        for step in (1..).map(|number: usize| number * 7919 % PIECE_BYTES) {
            while input.len() < step {
                let room = (step - input.len()).max(1);
                if input.read(&mut reader, room).await.unwrap() == 0 {
                    break;
                }
            }
            let count = step.min(input.len());
            got.extend(input.take(count));
            assert!(input.bytes.capacity() <= PIECE_BYTES + INPUT_BYTES, "{}", input.bytes.capacity());
            if count < step {
                break;
            }
        }
        assert!(got == sent);
    }
}
