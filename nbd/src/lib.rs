//! An asynchronous NBD server and client.

pub mod disk;

pub use disk::{Attempt, BoxFuture, Disk, Features, SharedDisk, StatusExtent, ZeroFlags};
