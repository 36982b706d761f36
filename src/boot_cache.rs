//! The boot cache: the extents that a boot reads, in the order in which it first reads them, with their data.
//!
//! A [`recording`] is what was seen of one boot; [`merge`] makes of one or several of them the order of blocks;
//! [`Builder`] cuts and compresses their data into frames and writes the file ([`BootCache`]). Whoever boots over a
//! network gets the [`Heads`] first, which say where everything is (the boot map), and then frame after frame, each
//! checked, stored and passed on as it comes.
//!
//! Nothing here knows where a recording came from, nor how frames travel. Nothing here is believed about an image's
//! bytes either: a frame that matches its digest is what the recording host sent, and the image's digest tree still
//! has the last word on every block.
//!
//! Every length is bounded before it is used, and any byte changed is noticed.

mod format;
mod frames;
mod heads;
pub mod kept;
mod map;
pub mod merge;
pub mod recording;
mod varint;

use std::io;

pub use format::{BootCache, Builder, LEVEL_DEFAULT, TooScattered, Written};
pub use frames::{FrameBlocks, ReadBlocks, check_frame, decode_frame};
pub use heads::{FRAME_BLOCKS_MAX, FRAME_LENGTH_MAX, Frame, HEADS_LENGTH_MAX, Heads, Run};

use crate::digest::Digest;

/// What can be wrong with a boot cache.
#[derive(Debug, thiserror::Error)]
pub enum BootCacheError {
    /// Something else, or of a version that this program does not know.
    #[error("not a boot cache of this version: record the image again")]
    NotABootCache,
    /// Sound as far as can be seen, but of another image.
    #[error("the boot cache is of image {}: record this image again", found.short())]
    OtherImage {
        /// The image that it is of.
        found: Digest,
    },
    /// Not usable at all.
    #[error("the boot cache is damaged ({0}): record the image again")]
    Damaged(&'static str),
    /// One frame is absent or not what its digest says.
    #[error("frame {0} of the boot cache is damaged or absent: record the image again")]
    BadFrame(usize),
    /// The file could not be read or written.
    #[error("the boot cache cannot be accessed: {0}")]
    Io(#[from] io::Error),
}

#[cfg(test)]
mod tests;
