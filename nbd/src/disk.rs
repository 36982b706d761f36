//! The disk seam: the one table of calls that every layer implements over the layer below.
//!
//! A [`Disk`] is what one NBD export shows. Overlay, cache, trace, fault injection and statistics are layers over
//! the same trait, so that a new feature of the data plane is a layer and not a flag.
//!
//! Each transfer has two forms. The `try_` form is synchronous and is tried first, on the connection's own task: it
//! must never block on a device or a peer, and answers [`Attempt::WouldBlock`] when it would have to. The other form
//! returns a future and may wait. A layer that has no fast path simply inherits the `try_` default.
//!
//! The server has checked every request before a layer sees it: offset + length lies within [`Disk::size`], lengths
//! are not zero, writes reach writable disks only. Layers do not check again; they may assert.

use std::future::Future;
use std::io;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::Arc;

/// A boxed future, as dyn-compatible traits need. The fast path does not allocate one.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A disk that is shared between connections, layers and tasks.
pub type SharedDisk = Arc<dyn Disk>;

/// What a synchronous attempt came to.
#[derive(Debug)]
pub enum Attempt {
    /// The transfer is done, or has failed for good.
    Ready(io::Result<()>),
    /// It would have to wait: call the asynchronous form, with the same arguments, from the start.
    WouldBlock,
}

/// A range of a disk that is a range of a file.
pub struct FileRange {
    /// The file, which supports `splice` or fails at it.
    pub file: Arc<dyn AsFd + Send + Sync>,
    /// Where in the file the range begins, in bytes.
    pub offset: u64,
}

impl std::fmt::Debug for FileRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileRange").field("offset", &self.offset).finish_non_exhaustive()
    }
}

/// What a disk can do. Constant for as long as the disk is exported. A block size that is not as it should be counts as the next
/// one that is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Features {
    /// Writes, trims and zeroes are refused.
    pub read_only: bool,
    /// `flush` means something; a disk without it must be durable at every write.
    pub flush: bool,
    /// `fua` is honoured on writes, trims and zeroes.
    pub fua: bool,
    /// `trim` is honoured.
    pub trim: bool,
    /// `zero` is honoured.
    pub zero: bool,
    /// `zero` with [`ZeroFlags::fast`] either is faster than a write or fails with `EOPNOTSUPP` before it does anything.
    pub fast_zero: bool,
    /// `prefetch` does something.
    pub prefetch: bool,
    /// A flush on one connection covers what every other connection had written and been answered.
    pub multi_conn: bool,
    /// Seeks cost time.
    pub rotational: bool,
    /// Smallest request in bytes; a power of two, at most 65536.
    pub block_min: u32,
    /// Request size in bytes that costs no read-modify-write; a power of two, at least `block_min`.
    pub block_preferred: u32,
}

impl Features {
    /// A read-only disk of bytes.
    pub const READ_ONLY: Self = Self {
        read_only: true,
        flush: true,
        fua: false,
        trim: false,
        zero: false,
        fast_zero: false,
        prefetch: false,
        multi_conn: true,
        rotational: false,
        block_min: 1,
        block_preferred: 4096,
    };

    /// A writable disk that honours everything but fast zeroes and prefetch.
    pub const WRITABLE: Self =
        Self { read_only: false, fua: true, trim: true, zero: true, ..Self::READ_ONLY };

    /// The same, with block sizes as the protocol has them, whatever a disk says.
    pub(crate) fn sound(self) -> Self {
        let block_min = self.block_min.clamp(1, BLOCK_MIN_MAX).next_power_of_two();
        let block_preferred = self.block_preferred.clamp(block_min, BLOCK_PREFERRED_MAX).next_power_of_two();
        Self { block_min, block_preferred, ..self }
    }
}

/// The greatest [`Features::block_min`].
const BLOCK_MIN_MAX: u32 = 64 << 10;
/// The greatest [`Features::block_preferred`]: what the specification has for the largest payload, where none is told.
const BLOCK_PREFERRED_MAX: u32 = 32 << 20;

/// How zeroes are to be written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ZeroFlags {
    /// The range must stay allocated (`NBD_CMD_FLAG_NO_HOLE`).
    pub no_hole: bool,
    /// Fail at once rather than be as slow as a write (`NBD_CMD_FLAG_FAST_ZERO`).
    pub fast: bool,
}

/// The metadata context of `base:allocation` (NBD specification, "Metadata querying").
pub const BASE_ALLOCATION: &str = "base:allocation";
/// `base:allocation`: the range is not allocated.
pub const STATE_HOLE: u32 = 1;
/// `base:allocation`: the range reads as zeroes.
pub const STATE_ZERO: u32 = 2;

/// One run of equal status, as `NBD_REPLY_TYPE_BLOCK_STATUS` reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatusExtent {
    /// Bytes; never zero.
    pub length: u64,
    /// Flags whose meaning the context defines.
    pub flags: u32,
}

/// What one export shows; see the module's documentation for the contract.
pub trait Disk: Send + Sync + 'static {
    /// Size in bytes. Constant.
    fn size(&self) -> u64;

    /// What the disk can do. Constant.
    fn features(&self) -> Features;

    /// Reads `buf.len()` bytes at byte `offset`, if that needs no waiting.
    ///
    /// After [`Attempt::WouldBlock`] the content of `buf` is undefined.
    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Attempt {
        let _ = (offset, buf);
        Attempt::WouldBlock
    }

    /// Reads `buf.len()` bytes at byte `offset`. Dropping the future abandons the read.
    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> BoxFuture<'a, io::Result<()>>;

    /// Where `length` bytes at byte `offset` lie one behind the other in a file, if they do, and reading them there waits
    /// for nothing but the file's device. The server sends long reads from there, without copying them, or reads them in
    /// another way after all. A layer that delays or changes reads answers `None`, as the default does.
    fn in_file(&self, offset: u64, length: usize) -> Option<FileRange> {
        let _ = (offset, length);
        None
    }

    /// `length` bytes at byte `offset` have been read where [`Disk::in_file`] said that they are: for layers that count.
    fn note_read(&self, offset: u64, length: usize) {
        let _ = (offset, length);
    }

    /// Writes `data` at byte `offset`, if that needs no waiting.
    ///
    /// After [`Attempt::WouldBlock`] nothing has been written. Never used for FUA.
    fn try_write(&self, offset: u64, data: &[u8]) -> Attempt {
        let _ = (offset, data);
        Attempt::WouldBlock
    }

    /// Writes `data` at byte `offset`; with `fua`, it is durable when the future ends.
    ///
    /// Dropping the future may leave any part of the range written.
    fn write<'a>(&'a self, offset: u64, data: &'a [u8], fua: bool) -> BoxFuture<'a, io::Result<()>> {
        let _ = (offset, data, fua);
        read_only()
    }

    /// Makes every write that was answered before this call durable, whichever connection sent it.
    fn flush(&self) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async { Ok(()) })
    }

    /// Tells that `length` bytes at `offset` are not needed; they may read as anything until written again.
    fn trim(&self, offset: u64, length: u64, fua: bool) -> BoxFuture<'_, io::Result<()>> {
        let _ = (offset, length, fua);
        read_only()
    }

    /// Makes `length` bytes at `offset` read as zeroes.
    fn zero(&self, offset: u64, length: u64, flags: ZeroFlags, fua: bool) -> BoxFuture<'_, io::Result<()>> {
        let _ = (offset, length, flags, fua);
        read_only()
    }

    /// Names of the metadata contexts that [`Disk::status`] knows, `base:allocation` first.
    fn contexts(&self) -> &'static [&'static str] {
        &[BASE_ALLOCATION]
    }

    /// Status of the range in `context`, one of [`Disk::contexts`]: at least one extent and at most `extents_max`,
    /// in order from `offset`, covering the range or a first part of it. The last may reach past the range.
    fn status(
        &self,
        context: &str,
        offset: u64,
        length: u64,
        extents_max: usize,
    ) -> BoxFuture<'_, io::Result<Vec<StatusExtent>>> {
        let _ = (context, offset, extents_max);
        Box::pin(async move { Ok(vec![StatusExtent { length, flags: 0 }]) })
    }

    /// A hint that the range will be read soon (`NBD_CMD_CACHE`).
    fn prefetch(&self, offset: u64, length: u64) -> BoxFuture<'_, io::Result<()>> {
        let _ = (offset, length);
        Box::pin(async { Ok(()) })
    }
}

fn read_only<'a>() -> BoxFuture<'a, io::Result<()>> {
    Box::pin(async { Err(io::Error::from_raw_os_error(rustix::io::Errno::ROFS.raw_os_error())) })
}
