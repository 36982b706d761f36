//! Disks to serve, and to put over other disks.

pub mod file;
pub mod memory;

pub use file::FileDisk;
pub use memory::MemoryDisk;
