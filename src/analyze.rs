//! What a recorded boot read of its image: the thesis' tables and figures, and how alike two boots are.
//!
//! [`summary`] counts, [`compare`] compares two recordings, [`picture`] draws. Pure but for the drawing, which writes
//! the file it is told to.

pub mod compare;
pub mod picture;
pub mod summary;

pub use compare::Comparison;
pub use summary::Summary;
