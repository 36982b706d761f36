//! Replies: headers of simple replies, structured chunks and extended chunks (NBD specification, "Reply message").
//!
//! Pure: everything is appended to a buffer that the connection owns and reuses.

use crate::consts::{
    EXTENDED_REPLY_MAGIC, Errno, REPLY_FLAG_DONE, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk,
};
use crate::disk::StatusExtent;

/// Bytes of the longest header, with the offset of a data chunk.
pub const HEADER_MAX: usize = 32 + 8;

/// How a connection answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// Simple replies only.
    Simple,
    /// Structured replies were negotiated.
    Structured,
    /// Extended headers were negotiated.
    Extended,
}

/// The request that is answered.
#[derive(Debug, Clone, Copy)]
pub struct Answer {
    /// How.
    pub style: Style,
    /// The request's cookie.
    pub cookie: u64,
    /// The request's offset, which extended headers repeat.
    pub offset: u64,
}

impl Answer {
    /// Success, without data.
    pub fn done(self, out: &mut Vec<u8>) {
        match self.style {
            // A command without data may be answered simply even when structured replies were negotiated.
            Style::Simple | Style::Structured => self.simple(out, 0),
            Style::Extended => self.header(out, REPLY_FLAG_DONE, chunk::NONE, 0),
        }
    }

    /// Success of a request for no bytes. A chunk of data has one at least, and where there are chunks a read has no other
    /// reply: it is the empty chunk.
    pub fn nothing(self, out: &mut Vec<u8>) {
        match self.style {
            Style::Simple => self.simple(out, 0),
            Style::Structured | Style::Extended => self.header(out, REPLY_FLAG_DONE, chunk::NONE, 0),
        }
    }

    /// Failure. `message` is for people, and is sent where the style has room for it.
    pub fn error(self, out: &mut Vec<u8>, errno: Errno, message: &str) {
        if self.style == Style::Simple {
            return self.simple(out, errno as u32);
        }
        let message = self::message(message);
        self.header(out, REPLY_FLAG_DONE, chunk::ERROR, 6 + message.len() as u64);
        out.extend_from_slice(&(errno as u32).to_be_bytes());
        out.extend_from_slice(&u16::try_from(message.len()).expect("it is short").to_be_bytes());
        out.extend_from_slice(message);
    }

    /// What stands before `length` bytes of data read at `offset`.
    pub fn data(self, out: &mut Vec<u8>, offset: u64, length: usize, last: bool) {
        if self.style == Style::Simple {
            return self.simple(out, 0);
        }
        self.header(out, done_if(last), chunk::OFFSET_DATA, 8 + length as u64);
        out.extend_from_slice(&offset.to_be_bytes());
    }

    /// `length` bytes at `offset` that read as zeroes. Not for [`Style::Simple`].
    pub fn hole(self, out: &mut Vec<u8>, offset: u64, length: u32, last: bool) {
        self.header(out, done_if(last), chunk::OFFSET_HOLE, 12);
        out.extend_from_slice(&offset.to_be_bytes());
        out.extend_from_slice(&length.to_be_bytes());
    }

    /// Status of a range in the context that was given number `context`. Not for [`Style::Simple`].
    pub fn status(self, out: &mut Vec<u8>, context: u32, extents: &[StatusExtent], last: bool) {
        if self.style == Style::Extended {
            self.header(out, done_if(last), chunk::BLOCK_STATUS_EXT, 8 + 16 * extents.len() as u64);
            out.extend_from_slice(&context.to_be_bytes());
            out.extend_from_slice(&u32::try_from(extents.len()).expect("bounded").to_be_bytes());
            for extent in extents {
                out.extend_from_slice(&extent.length.to_be_bytes());
                out.extend_from_slice(&u64::from(extent.flags).to_be_bytes());
            }
        } else {
            self.header(out, done_if(last), chunk::BLOCK_STATUS, 4 + 8 * extents.len() as u64);
            out.extend_from_slice(&context.to_be_bytes());
            for extent in extents {
                let length = u32::try_from(extent.length).expect("cut to 32 bits for these headers");
                out.extend_from_slice(&length.to_be_bytes());
                out.extend_from_slice(&extent.flags.to_be_bytes());
            }
        }
    }

    fn simple(self, out: &mut Vec<u8>, errno: u32) {
        out.extend_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
        out.extend_from_slice(&errno.to_be_bytes());
        out.extend_from_slice(&self.cookie.to_be_bytes());
    }

    fn header(self, out: &mut Vec<u8>, flags: u16, kind: u16, length: u64) {
        let magic = if self.style == Style::Extended { EXTENDED_REPLY_MAGIC } else { STRUCTURED_REPLY_MAGIC };
        out.extend_from_slice(&magic.to_be_bytes());
        out.extend_from_slice(&flags.to_be_bytes());
        out.extend_from_slice(&kind.to_be_bytes());
        out.extend_from_slice(&self.cookie.to_be_bytes());
        if self.style == Style::Extended {
            out.extend_from_slice(&self.offset.to_be_bytes());
            out.extend_from_slice(&length.to_be_bytes());
        } else {
            let length = u32::try_from(length).expect("chunks are bounded far below 4 GiB");
            out.extend_from_slice(&length.to_be_bytes());
        }
    }
}

/// What stands before everything that a server sends in transmission.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Header {
    /// A simple reply; behind a read's that succeeded stand the data.
    Simple { errno: u32, cookie: u64 },
    /// A chunk, structured or extended, with `length` bytes behind it.
    Chunk { flags: u16, kind: u16, cookie: u64, length: u64 },
}

impl Header {
    /// Bytes of the header that begins with `magic`, the magic included; `None` if `style` has no such header.
    pub const fn size(magic: u32, style: Style) -> Option<usize> {
        match (magic, style) {
            (SIMPLE_REPLY_MAGIC, Style::Simple | Style::Structured) => Some(16),
            (STRUCTURED_REPLY_MAGIC, Style::Structured) => Some(20),
            (EXTENDED_REPLY_MAGIC, Style::Extended) => Some(32),
            _ => None,
        }
    }

    /// Reads a header from exactly as many bytes as [`Header::size`] says.
    pub fn parse(bytes: &[u8], style: Style) -> Option<Self> {
        let magic = u32::from_be_bytes(*bytes.first_chunk()?);
        if Self::size(magic, style)? != bytes.len() {
            return None;
        }
        let u64_at = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let u32_at = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let cookie = u64_at(8);
        if magic == SIMPLE_REPLY_MAGIC {
            return Some(Self::Simple { errno: u32_at(4), cookie });
        }
        let length = if style == Style::Extended { u64_at(24) } else { u32_at(16).into() };
        let (flags, kind) =
            (u16::from_be_bytes([bytes[4], bytes[5]]), u16::from_be_bytes([bytes[6], bytes[7]]));
        Some(Self::Chunk { flags, kind, cookie, length })
    }
}

/// As much of a text for people as is sent: whole characters, and at most 1 KiB.
pub(crate) fn message(text: &str) -> &[u8] {
    let end = (0..=text.len().min(1024)).rev().find(|end| text.is_char_boundary(*end));
    &text.as_bytes()[..end.unwrap_or(0)]
}

const fn done_if(last: bool) -> u16 {
    if last { REPLY_FLAG_DONE } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes() {
        let answer = Answer { style: Style::Structured, cookie: 0x0102, offset: 4096 };
        let mut out = Vec::new();
        answer.data(&mut out, 4096, 2, true);
        assert_eq!(
            out,
            [
                0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 10, 0, 0, 0, 0, 0, 0,
                0x10, 0
            ]
        );
        out.clear();
        Answer { style: Style::Simple, ..answer }.error(&mut out, Errno::Inval, "no");
        assert_eq!(out, [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 22, 0, 0, 0, 0, 0, 0, 1, 2]);
        out.clear();
        Answer { style: Style::Extended, ..answer }.done(&mut out);
        assert_eq!(out.len(), 32);
    }

    #[test]
    fn a_long_message_ends_with_a_whole_character() {
        assert_eq!(message("short"), b"short");
        assert_eq!(message(&"a".repeat(2000)), [b'a'; 1024]);
        assert_eq!(message(&format!("a{}", "\u{e9}".repeat(2000))).len(), 1023);
    }
}
