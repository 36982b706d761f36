//! A disk that is a file, or a block device: raw bytes, holes and all.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{Advice, FallocateFlags, SeekFrom, fadvise, fallocate, seek};
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use tokio::sync::Semaphore;

use super::InlineWrites;
use crate::disk::{
    Attempt, BASE_ALLOCATION, BoxFuture, Disk, Features, FileRange, STATE_HOLE, STATE_ZERO, StatusExtent,
    ZeroFlags,
};

/// Threads that wait for one file's lock at once: they take turns there anyway.
const TURNS: usize = 8;

/// A raw file, or a block device, as a disk.
///
/// What is in the page cache is read inline by `preadv2(RWF_NOWAIT)`; everything else runs on tokio's blocking
/// threads, by way of a buffer of their own: a thread that outlives its dropped future must not write into the caller's,
/// and the copy (30 µs for 256 KiB) is small beside the device. Writes go into the page cache inline where they are not
/// likely to wait ([`InlineWrites`]). What has to wait for the file's own lock takes so many threads and no more, whatever
/// clients ask for: the process has other files. After a failed sync
/// every later write and flush fails too: the kernel reports a lost page only once. What is trimmed reads as zeroes, or as
/// before where the file system cannot punch holes. A device tells no holes: it is data throughout.
#[derive(Debug, Clone)]
pub struct FileDisk {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    file: File,
    size: u64,
    features: Features,
    inline: InlineWrites,
    /// Who has one may take a thread for what needs the file's lock, behind a whole-disk trim for instance.
    turns: Arc<Semaphore>,
    /// The same for flushes, of which one runs at a time.
    flushes: Arc<Semaphore>,
    /// One sync at a time: the kernel tells a failure to one of two that run together, and the other must not claim success.
    syncing: Mutex<()>,
    failed: AtomicBool,
}

impl FileDisk {
    /// Opens a file for reading, and for writing unless `read_only`.
    pub fn open(path: &Path, read_only: bool) -> io::Result<Self> {
        Self::new(File::options().read(true).write(!read_only).open(path)?, read_only)
    }

    /// Takes an open file. Its length is the disk's size from now on.
    pub fn new(file: File, read_only: bool) -> io::Result<Self> {
        let size = seek(&file, SeekFrom::End(0))?;
        let features = if read_only {
            Features { prefetch: true, ..Features::READ_ONLY }
        } else {
            Features { prefetch: true, fast_zero: true, ..Features::WRITABLE }
        };
        let (inline, syncing) = (InlineWrites::default(), Mutex::default());
        let (turns, flushes) = (Arc::new(Semaphore::new(TURNS)), Arc::new(Semaphore::new(1)));
        let failed = AtomicBool::new(false);
        let shared = Shared { file, size, features, inline, turns, flushes, syncing, failed };
        Ok(Self { shared: Arc::new(shared) })
    }

    fn blocking<T, F>(&self, work: F) -> BoxFuture<'_, io::Result<T>>
    where
        T: Send + 'static,
        F: FnOnce(&Shared) -> io::Result<T> + Send + 'static,
    {
        let shared = Arc::clone(&self.shared);
        Box::pin(async move { tokio::task::spawn_blocking(move || work(&shared)).await? })
    }

    /// The same, when it is its turn. What has not begun when the future is dropped never does: whoever asked for it may
    /// have sent it again on another connection, and newer writes to the same place behind it.
    fn in_turn<'a, T, F>(&'a self, turns: &'a Arc<Semaphore>, work: F) -> BoxFuture<'a, io::Result<T>>
    where
        T: Send + 'static,
        F: FnOnce(&Shared) -> io::Result<T> + Send + 'static,
    {
        Box::pin(async move {
            let turn = Arc::clone(turns).acquire_owned().await.expect("the semaphores are never closed");
            let asked = Arc::new(());
            let asker = Arc::downgrade(&asked);
            let run = move |shared: &Shared| {
                let _turn = turn;
                if asker.strong_count() == 0 {
                    return Err(io::ErrorKind::Interrupted.into());
                }
                work(shared)
            };
            self.blocking(run).await
        })
    }
}

impl AsFd for Shared {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Shared {
    fn check(&self) -> io::Result<()> {
        if self.failed.load(Ordering::Acquire) {
            return Err(io::Error::other("an earlier sync failed: what was written before it may be lost"));
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let _alone = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        self.check()?;
        self.file.sync_data().inspect_err(|_| self.failed.store(true, Ordering::Release))
    }

    /// Changes how a range is allocated; false, and nothing is done, where that cannot be: the file system does not know
    /// how, or the device wants whole sectors.
    fn punch(&self, offset: u64, length: u64, mode: FallocateFlags) -> io::Result<bool> {
        let _long = self.inline.long();
        match fallocate(&self.file, mode, offset, length) {
            Ok(()) => Ok(true),
            Err(Errno::OPNOTSUPP | Errno::INVAL) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Zeroes by hand, for file systems that cannot do better.
    fn write_zeroes(&self, mut offset: u64, length: u64) -> io::Result<()> {
        static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
        let end = offset + length;
        while offset < end {
            let piece = usize::try_from(end - offset).unwrap_or(usize::MAX).min(ZEROES.len());
            self.file.write_all_at(&ZEROES[..piece], offset)?;
            offset += piece as u64;
        }
        Ok(())
    }

    fn map(&self, offset: u64, length: u64, extents_max: usize) -> io::Result<Vec<StatusExtent>> {
        let mut extents = Vec::new();
        let (mut at, end) = (offset, offset + length);
        let find = |position, unknown| match seek(&self.file, position) {
            Ok(found) => Ok(found.min(self.size)),
            Err(Errno::NXIO) => Ok(self.size),
            // A device, or a file system without holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(unknown),
            Err(error) => Err(io::Error::from(error)),
        };
        while at < end && extents.len() < extents_max {
            let data = find(SeekFrom::Data(at), at)?;
            let (next, flags) = if data > at {
                (data, STATE_HOLE | STATE_ZERO)
            } else {
                (find(SeekFrom::Hole(at), self.size)?, 0)
            };
            // A file that shrank behind our back must not make this loop spin.
            let next = next.max(at + 1).min(end);
            extents.push(StatusExtent { length: next - at, flags });
            at = next;
        }
        Ok(extents)
    }
}

impl Disk for FileDisk {
    fn size(&self) -> u64 {
        self.shared.size
    }

    fn features(&self) -> Features {
        self.shared.features
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Attempt {
        let wanted = buf.len();
        match preadv2(
            self.shared.file.as_fd(),
            &mut [io::IoSliceMut::new(buf)],
            offset,
            ReadWriteFlags::NOWAIT,
        ) {
            Ok(got) if got == wanted => Attempt::Ready(Ok(())),
            // Partly cached, or a kernel or file system without RWF_NOWAIT.
            _ => Attempt::WouldBlock,
        }
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async move {
            let length = buf.len();
            let data = self
                .blocking(move |shared| {
                    let mut data = vec![0; length];
                    shared.file.read_exact_at(&mut data, offset)?;
                    Ok(data)
                })
                .await?;
            buf.copy_from_slice(&data);
            Ok(())
        })
    }

    fn in_file(&self, offset: u64, _: usize) -> Option<FileRange> {
        Some(FileRange { file: Arc::<Shared>::clone(&self.shared), offset })
    }

    fn try_write(&self, offset: u64, data: &[u8]) -> Attempt {
        let shared = &*self.shared;
        shared.inline.attempt(|| shared.check().and_then(|()| shared.file.write_all_at(data, offset)))
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8], fua: bool) -> BoxFuture<'a, io::Result<()>> {
        let data = data.to_vec();
        self.in_turn(&self.shared.turns, move |shared| {
            shared.check()?;
            shared.file.write_all_at(&data, offset)?;
            if fua { shared.sync() } else { Ok(()) }
        })
    }

    fn flush(&self) -> BoxFuture<'_, io::Result<()>> {
        self.in_turn(&self.shared.flushes, Shared::sync)
    }

    fn trim(&self, offset: u64, length: u64, fua: bool) -> BoxFuture<'_, io::Result<()>> {
        self.in_turn(&self.shared.turns, move |shared| {
            shared.check()?;
            // A hint that cannot be taken is no error.
            shared.punch(offset, length, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE)?;
            if fua { shared.sync() } else { Ok(()) }
        })
    }

    fn zero(&self, offset: u64, length: u64, flags: ZeroFlags, fua: bool) -> BoxFuture<'_, io::Result<()>> {
        self.in_turn(&self.shared.turns, move |shared| {
            shared.check()?;
            let mode = if flags.no_hole {
                FallocateFlags::ZERO_RANGE
            } else {
                FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE
            };
            if !shared.punch(offset, length, mode)? {
                if flags.fast {
                    return Err(Errno::OPNOTSUPP.into());
                }
                shared.write_zeroes(offset, length)?;
            }
            if fua { shared.sync() } else { Ok(()) }
        })
    }

    fn status(
        &self,
        context: &str,
        offset: u64,
        length: u64,
        extents_max: usize,
    ) -> BoxFuture<'_, io::Result<Vec<StatusExtent>>> {
        debug_assert_eq!(context, BASE_ALLOCATION);
        self.in_turn(&self.shared.turns, move |shared| shared.map(offset, length, extents_max))
    }

    fn prefetch(&self, offset: u64, length: u64) -> BoxFuture<'_, io::Result<()>> {
        self.blocking(move |shared| {
            Ok(fadvise(&shared.file, offset, std::num::NonZero::new(length), Advice::WillNeed)?)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn nothing_is_written_inline_while_a_range_is_zeroed() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let disk = FileDisk::new(file, false).unwrap();
        let long = disk.shared.inline.long();
        assert!(matches!(disk.try_write(0, b"x"), Attempt::WouldBlock));
        drop(long);
        assert!(matches!(disk.try_write(0, b"x"), Attempt::Ready(Ok(()))));
    }

    /// Once, such a write was done all the same, over newer ones that had been answered.
    #[test]
    fn a_write_that_waits_for_a_thread_is_given_up_with_its_client() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let disk = FileDisk::new(file.try_clone().unwrap(), false).unwrap();
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.worker_threads(2).max_blocking_threads(1).enable_time().build().unwrap();
        let (release, released) = std::sync::mpsc::channel();
        let turns = async |count| {
            while disk.shared.turns.available_permits() != count {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let given_up = async {
            let _the_only_thread = tokio::task::spawn_blocking(move || released.recv());
            let writing = tokio::spawn({
                let disk = disk.clone();
                async move { disk.write(0, b"old", false).await }
            });
            turns(TURNS - 1).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
            writing.abort();
            assert!(writing.await.unwrap_err().is_cancelled());
            release.send(()).unwrap();
            turns(TURNS).await;
        };
        let given_up = async { tokio::time::timeout(Duration::from_secs(10), given_up).await };
        runtime.block_on(given_up).expect("it ends");
        let mut found = [1; 3];
        file.read_exact_at(&mut found, 0).unwrap();
        assert_eq!(found, [0; 3]);
    }

    #[test]
    fn requests_that_wait_for_one_file_leave_threads_for_others() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let disk = FileDisk::new(file, false).unwrap();
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime =
            runtime.worker_threads(2).max_blocking_threads(TURNS + 2).enable_time().build().unwrap();
        let alone = disk.shared.syncing.lock().unwrap();
        let other = runtime.block_on(async {
            for _ in 0..64 {
                let disk = disk.clone();
                tokio::spawn(async move { tokio::join!(disk.flush(), disk.trim(0, 4096, true)) });
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
            tokio::time::timeout(Duration::from_secs(5), tokio::task::spawn_blocking(|| ())).await
        });
        drop(alone);
        other.expect("one file has all threads").unwrap();
    }
}
