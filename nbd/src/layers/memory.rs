//! A disk in memory. Gone with the process; every write is as durable as it will ever be.

use std::io;
use std::sync::{PoisonError, RwLock};

use crate::disk::{Attempt, BoxFuture, Disk, Features, ZeroFlags};

/// A writable disk in memory. What is trimmed reads as zeroes.
#[derive(Debug)]
pub struct MemoryDisk {
    bytes: RwLock<Vec<u8>>,
}

impl MemoryDisk {
    /// `size` zero bytes.
    pub fn new(size: usize) -> Self {
        Self::from(vec![0; size])
    }

    /// The content.
    pub fn to_vec(&self) -> Vec<u8> {
        self.bytes.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn put(&self, offset: u64, length: usize, fill: impl FnOnce(&mut [u8])) {
        let start = usize::try_from(offset).expect("the offset lies within memory");
        fill(&mut self.bytes.write().unwrap_or_else(PoisonError::into_inner)[start..start + length]);
    }
}

impl From<Vec<u8>> for MemoryDisk {
    fn from(bytes: Vec<u8>) -> Self {
        Self { bytes: RwLock::new(bytes) }
    }
}

impl Disk for MemoryDisk {
    fn size(&self) -> u64 {
        self.bytes.read().unwrap_or_else(PoisonError::into_inner).len() as u64
    }

    fn features(&self) -> Features {
        Features::WRITABLE
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Attempt {
        let start = usize::try_from(offset).expect("the offset lies within memory");
        let bytes = self.bytes.read().unwrap_or_else(PoisonError::into_inner);
        buf.copy_from_slice(&bytes[start..start + buf.len()]);
        Attempt::Ready(Ok(()))
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> BoxFuture<'a, io::Result<()>> {
        let _ = self.try_read(offset, buf);
        Box::pin(async { Ok(()) })
    }

    fn try_write(&self, offset: u64, data: &[u8]) -> Attempt {
        self.put(offset, data.len(), |bytes| bytes.copy_from_slice(data));
        Attempt::Ready(Ok(()))
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8], _fua: bool) -> BoxFuture<'a, io::Result<()>> {
        let _ = self.try_write(offset, data);
        Box::pin(async { Ok(()) })
    }

    fn trim(&self, offset: u64, length: u64, fua: bool) -> BoxFuture<'_, io::Result<()>> {
        self.zero(offset, length, ZeroFlags::default(), fua)
    }

    fn zero(&self, offset: u64, length: u64, _: ZeroFlags, _: bool) -> BoxFuture<'_, io::Result<()>> {
        let length = usize::try_from(length).expect("the length lies within memory");
        self.put(offset, length, |bytes| bytes.fill(0));
        Box::pin(async { Ok(()) })
    }
}
