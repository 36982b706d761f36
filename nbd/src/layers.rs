//! Disks to serve ([`mod@file`], [`memory`]), and layers to put over any disk: [`delay`], [`error`], [`stats`],
//! and others behind a [`gate`]. [`inline`] is for disks that write files.

pub mod delay;
pub mod error;
pub mod file;
pub mod gate;
pub mod inline;
pub mod memory;
pub mod stats;

pub use delay::{DelayDisk, Delays};
pub use error::{ErrorDisk, Errors, Fault};
pub use file::FileDisk;
pub use gate::{Gate, Gated};
pub use inline::InlineWrites;
pub use memory::MemoryDisk;
pub use stats::StatsDisk;

/// What a disk can be asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Operation {
    Read,
    Write,
    Flush,
    Trim,
    Zero,
    Status,
    Prefetch,
}

impl Operation {
    /// Each of them once.
    pub const ALL: [Self; 7] =
        [Self::Read, Self::Write, Self::Flush, Self::Trim, Self::Zero, Self::Status, Self::Prefetch];
}
