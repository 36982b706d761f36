//! A disk with zeroes behind its end: the base of an increment or an overlay that is larger than it.
//!
//! Read-only. Requests lie within the padded size.

use std::io;

use bootcache_nbd::disk::{BASE_ALLOCATION, STATE_HOLE, STATE_ZERO};
use bootcache_nbd::{Attempt, BoxFuture, Disk, Features, SharedDisk, StatusExtent};

use crate::local_cache::{CONTEXT_PRESENT, STATE_PRESENT};

/// `disk`, as large as `size`.
pub(crate) struct Padded {
    pub(crate) disk: SharedDisk,
    pub(crate) size: u64,
}

impl Padded {
    /// How many of `length` bytes at `offset` the disk itself has.
    fn own(&self, offset: u64, length: u64) -> u64 {
        self.disk.size().saturating_sub(offset).min(length)
    }

    /// Zeroes what of `buf` lies behind the disk; gives the rest.
    fn pad<'a>(&self, offset: u64, buf: &'a mut [u8]) -> &'a mut [u8] {
        let own = usize::try_from(self.own(offset, buf.len() as u64)).expect("at most the buffer's length");
        let (own, behind) = buf.split_at_mut(own);
        behind.fill(0);
        own
    }
}

impl Disk for Padded {
    fn size(&self) -> u64 {
        self.size
    }

    fn features(&self) -> Features {
        self.disk.features()
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Attempt {
        match self.pad(offset, buf) {
            [] => Attempt::Ready(Ok(())),
            own => self.disk.try_read(offset, own),
        }
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> BoxFuture<'a, io::Result<()>> {
        match self.pad(offset, buf) {
            [] => Box::pin(async { Ok(()) }),
            own => self.disk.read(offset, own),
        }
    }

    fn contexts(&self) -> &'static [&'static str] {
        self.disk.contexts()
    }

    fn status(
        &self,
        context: &str,
        offset: u64,
        length: u64,
        extents_max: usize,
    ) -> BoxFuture<'_, io::Result<Vec<StatusExtent>>> {
        let own = self.own(offset, length);
        if own > 0 {
            return self.disk.status(context, offset, own, extents_max);
        }
        let flags = match context {
            BASE_ALLOCATION => STATE_HOLE | STATE_ZERO,
            CONTEXT_PRESENT => STATE_PRESENT,
            _ => 0,
        };
        Box::pin(async move { Ok(vec![StatusExtent { length, flags }]) })
    }

    fn prefetch(&self, offset: u64, length: u64) -> BoxFuture<'_, io::Result<()>> {
        match self.own(offset, length) {
            0 => Box::pin(async { Ok(()) }),
            own => self.disk.prefetch(offset, own),
        }
    }
}
