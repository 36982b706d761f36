//! The boot cache: the extents that a boot reads, in the order in which it first reads them, with their data.
//!
//! A [`recording`] is what was seen of one boot.

pub mod recording;
