//! A disk that counts: requests, bytes, errors and time, for each operation.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::Operation;
use crate::disk::{Attempt, BoxFuture, Disk, Features, FileRange, SharedDisk, StatusExtent, ZeroFlags};

/// A disk that counts what is asked of it. An attempt that would block is not counted: the request comes again.
pub struct StatsDisk {
    disk: SharedDisk,
    counters: [Counter; Operation::ALL.len()],
}

#[derive(Debug, Default)]
struct Counter {
    requests: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    nanos: AtomicU64,
}

/// What one operation came to so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    /// Requests that were answered.
    pub requests: u64,
    /// Bytes that they asked for.
    pub bytes: u64,
    /// How many of them failed.
    pub errors: u64,
    /// Time from request to answer, all of them together. What is sent straight from a file takes this layer none.
    pub time: Duration,
}

impl std::fmt::Debug for StatsDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StatsDisk").field("counters", &self.counters).finish_non_exhaustive()
    }
}

impl StatsDisk {
    /// Counts what is asked of `disk`.
    pub fn new(disk: SharedDisk) -> Self {
        Self { disk, counters: Default::default() }
    }

    /// What `operation` came to so far.
    pub fn count(&self, operation: Operation) -> Count {
        let counter = &self.counters[operation as usize];
        Count {
            requests: counter.requests.load(Ordering::Relaxed),
            bytes: counter.bytes.load(Ordering::Relaxed),
            errors: counter.errors.load(Ordering::Relaxed),
            time: Duration::from_nanos(counter.nanos.load(Ordering::Relaxed)),
        }
    }

    fn note(&self, operation: Operation, bytes: u64, failed: bool, began: Instant) {
        let counter = &self.counters[operation as usize];
        counter.requests.fetch_add(1, Ordering::Relaxed);
        counter.bytes.fetch_add(bytes, Ordering::Relaxed);
        counter.errors.fetch_add(failed.into(), Ordering::Relaxed);
        let nanos = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        counter.nanos.fetch_add(nanos, Ordering::Relaxed);
    }

    fn attempt(&self, operation: Operation, bytes: usize, run: impl FnOnce() -> Attempt) -> Attempt {
        let began = Instant::now();
        let attempt = run();
        if let Attempt::Ready(result) = &attempt {
            self.note(operation, bytes as u64, result.is_err(), began);
        }
        attempt
    }

    fn counted<'a, T: Send + 'a>(
        &'a self,
        operation: Operation,
        bytes: u64,
        request: BoxFuture<'a, io::Result<T>>,
    ) -> BoxFuture<'a, io::Result<T>> {
        Box::pin(async move {
            let began = Instant::now();
            let result = request.await;
            self.note(operation, bytes, result.is_err(), began);
            result
        })
    }
}

impl Disk for StatsDisk {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn features(&self) -> Features {
        self.disk.features()
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Attempt {
        self.attempt(Operation::Read, buf.len(), || self.disk.try_read(offset, buf))
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> BoxFuture<'a, io::Result<()>> {
        self.counted(Operation::Read, buf.len() as u64, self.disk.read(offset, buf))
    }

    fn in_file(&self, offset: u64, length: usize) -> Option<FileRange> {
        self.disk.in_file(offset, length)
    }

    fn note_read(&self, offset: u64, length: usize) {
        self.note(Operation::Read, length as u64, false, Instant::now());
        self.disk.note_read(offset, length);
    }

    fn try_write(&self, offset: u64, data: &[u8]) -> Attempt {
        self.attempt(Operation::Write, data.len(), || self.disk.try_write(offset, data))
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8], fua: bool) -> BoxFuture<'a, io::Result<()>> {
        self.counted(Operation::Write, data.len() as u64, self.disk.write(offset, data, fua))
    }

    fn flush(&self) -> BoxFuture<'_, io::Result<()>> {
        self.counted(Operation::Flush, 0, self.disk.flush())
    }

    fn trim(&self, offset: u64, length: u64, fua: bool) -> BoxFuture<'_, io::Result<()>> {
        self.counted(Operation::Trim, length, self.disk.trim(offset, length, fua))
    }

    fn zero(&self, offset: u64, length: u64, flags: ZeroFlags, fua: bool) -> BoxFuture<'_, io::Result<()>> {
        self.counted(Operation::Zero, length, self.disk.zero(offset, length, flags, fua))
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
        self.counted(Operation::Status, length, self.disk.status(context, offset, length, extents_max))
    }

    fn prefetch(&self, offset: u64, length: u64) -> BoxFuture<'_, io::Result<()>> {
        self.counted(Operation::Prefetch, length, self.disk.prefetch(offset, length))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::layers::{ErrorDisk, Errors, Fault, FileDisk, MemoryDisk};

    #[tokio::test]
    async fn requests_bytes_and_errors_are_counted_once() {
        let below = ErrorDisk::new(Arc::new(MemoryDisk::new(8192)), Errors::default());
        below.gate().fail(&[Operation::Write], 2, Fault::Errno(5));
        let disk = StatsDisk::new(Arc::new(below));
        // The layer below has no synchronous form.
        assert!(matches!(disk.try_read(0, &mut [0; 512]), Attempt::WouldBlock));
        disk.read(0, &mut [0; 512]).await.unwrap();
        assert!(disk.write(0, &[1; 100], false).await.is_ok());
        assert!(disk.write(0, &[1; 100], false).await.is_err());
        let (reads, writes) = (disk.count(Operation::Read), disk.count(Operation::Write));
        assert_eq!((reads.requests, reads.bytes, reads.errors), (1, 512, 0));
        assert_eq!((writes.requests, writes.bytes, writes.errors), (2, 200, 1));
        assert_eq!(disk.count(Operation::Flush), Count::default());
    }

    /// Once, a disk whose requests were counted was copied.
    #[test]
    fn what_is_sent_straight_from_a_file_still_is_and_is_counted() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let disk = StatsDisk::new(Arc::new(StatsDisk::new(Arc::new(FileDisk::new(file, false).unwrap()))));
        assert_eq!(disk.in_file(4096, 4096).unwrap().offset, 4096);
        assert_eq!(disk.count(Operation::Read), Count::default());
        disk.note_read(4096, 4096);
        let reads = disk.count(Operation::Read);
        assert_eq!((reads.requests, reads.bytes, reads.errors), (1, 4096, 0));
    }
}
