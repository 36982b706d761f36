//! The trace file, as it is in memory: a page of header, then records. Integers are native; a trace is read on the
//! machine that made it.
//!
//! ```text
//!    0  "bootcache trace\0"
//!   16  u32 version              20  u32 bytes in the header
//!   24  u64 capacity, records
//!   32  u64 device of the image  40  u64 inode of the image
//!   48  u64 CLOCK_MONOTONIC when the file was made, ns
//!   56  u32 processes that attached (atomic)
//!   60  u32 flags (atomic)
//!   64  u64 records claimed (atomic); more than the capacity when it was full
//! 4096  records of 32 bytes:
//!       u64 offset   u64 length   u64 ns that the read took, 0 = not known
//!       u64 CLOCK_MONOTONIC when it was asked for, ns; stored last, so 0 = not (wholly) written
//! ```

use std::mem::offset_of;
use std::sync::atomic::{AtomicU32, AtomicU64};

/// The first bytes of a trace.
pub const MAGIC: [u8; 16] = *b"bootcache trace\0";
/// The version written and accepted.
pub const VERSION: u32 = 1;
/// Bytes before the first record.
pub const HEADER_BYTES: usize = 4096;
/// Bytes in a record.
pub const RECORD_BYTES: usize = 32;
/// Records in a trace that the tracer makes itself: 32 MiB.
pub const CAPACITY_DEFAULT: u64 = 1 << 20;
/// Most records in a trace that it accepts.
pub const CAPACITY_MAX: u64 = 1 << 24;

/// There were more reads than the trace has room for.
pub const OVERFLOW: u32 = 1;
/// The image was read through io_uring.
pub const IO_URING: u32 = 1 << 1;
/// An io_uring was used in a way that does not show which files are read.
pub const IO_URING_UNKNOWN: u32 = 1 << 2;
/// The image was mapped into memory.
pub const MAPPED: u32 = 1 << 3;
/// The image was opened by stdio, or read by POSIX aio.
pub const UNSEEN: u32 = 1 << 4;

/// The header's fields; the rest of its page is zero.
#[derive(Debug)]
#[repr(C)]
pub struct Header {
    pub magic: [u8; 16],
    pub version: u32,
    pub header_bytes: u32,
    pub capacity: u64,
    pub device: u64,
    pub inode: u64,
    pub start_ns: u64,
    pub attached: AtomicU32,
    pub flags: AtomicU32,
    pub claimed: AtomicU64,
}

/// One read.
#[derive(Debug)]
#[repr(C)]
pub struct Record {
    pub offset: AtomicU64,
    pub length: AtomicU64,
    pub took_ns: AtomicU64,
    pub time_ns: AtomicU64,
}

const _: () = {
    assert!(offset_of!(Header, capacity) == 24);
    assert!(offset_of!(Header, start_ns) == 48);
    assert!(offset_of!(Header, attached) == 56);
    assert!(offset_of!(Header, flags) == 60);
    assert!(offset_of!(Header, claimed) == 64);
    assert!(size_of::<Header>() <= HEADER_BYTES);
    assert!(size_of::<Record>() == RECORD_BYTES);
};
