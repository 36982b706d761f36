//! The two files of an overlay, behind traits, so that tests can put a storage below it that loses what was not synced.
//!
//! Everything here may block, except [`DiffFile::try_read_at`].

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use bootcache_nbd::Attempt;
use rustix::fs::{Advice, FallocateFlags, fadvise, fallocate};
use rustix::io::{Errno, ReadWriteFlags, preadv2, pwritev};

use crate::store::lock::exclusive;

/// The diff: as long as the disk, sparse, each block at its own offset.
pub trait DiffFile: Send + Sync + std::fmt::Debug + 'static {
    /// Reads if all of it is in the page cache.
    fn try_read_at(&self, buf: &mut [u8], offset: u64) -> Attempt;
    /// Reads.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes the parts one after the other; after an error any part of the range may be written.
    fn write_at(&self, parts: [&[u8]; 3], offset: u64) -> io::Result<()>;
    /// Makes the range read as zeroes and gives its space back. Where that is not supported it does nothing.
    fn punch(&self, offset: u64, length: u64) -> io::Result<()>;
    /// Makes the range read as zeroes and keeps space for it. If `fast`, it fails with `EOPNOTSUPP`, and has done nothing,
    /// where the zeroes would have to be written.
    fn allocate_zeroes(&self, offset: u64, length: u64, fast: bool) -> io::Result<()>;
    /// Makes everything written before durable.
    fn sync(&self) -> io::Result<()>;
    /// Starts reading the range into the page cache.
    fn read_ahead(&self, offset: u64, length: u64) -> io::Result<()>;
}

/// The index's log: appended to, or replaced as a whole.
pub trait LogFile: Send + Sync + std::fmt::Debug + 'static {
    /// The whole content.
    fn load(&self) -> io::Result<Vec<u8>>;
    /// Writes at `offset`, the current end, or over what is there.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Cuts the file.
    fn truncate(&self, length: u64) -> io::Result<()>;
    /// Makes everything written before durable.
    fn sync(&self) -> io::Result<()>;
    /// Puts `bytes` in place of the content: after a crash there is all of the old or all of the new.
    fn replace(&self, bytes: &[u8]) -> Result<(), ReplaceError>;
}

/// Why a log was not replaced.
#[derive(Debug, thiserror::Error)]
pub enum ReplaceError {
    /// The old content is there, as it was.
    #[error("{0}")]
    Unchanged(io::Error),
    /// It is not known which of the two is there.
    #[error("{0}")]
    InDoubt(io::Error),
}

impl From<ReplaceError> for io::Error {
    fn from(error: ReplaceError) -> Self {
        match error {
            ReplaceError::Unchanged(error) | ReplaceError::InDoubt(error) => error,
        }
    }
}

/// [`DiffFile`] on a file, and what complete images are read through.
#[derive(Debug)]
pub struct FileDiff(File);

impl FileDiff {
    /// Makes an empty diff of `size` bytes and locks it.
    pub fn create(path: &Path, size: u64) -> io::Result<Self> {
        let file = File::options().read(true).write(true).create_new(true).open(path)?;
        file.set_len(size)?;
        file.sync_all()?;
        Self::lock(file)
    }

    /// Opens for reading and writing, for one owner: `WouldBlock` if another process has it.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::lock(File::options().read(true).write(true).open(path)?)
    }

    /// Opens for reading, beside any number of others. The kernel reads what is asked for and no more: guests read
    /// ahead themselves, and a boot would bring 1.6 times what it wants into the page cache.
    pub fn open_read_only(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        // A hint: without it more is read, and nothing else changes.
        let _ = fadvise(&file, 0, None, Advice::Random);
        Ok(Self(file))
    }

    /// Length in bytes.
    pub fn length(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    /// The file itself.
    pub fn file(&self) -> &File {
        &self.0
    }

    /// Takes the file for this process.
    fn lock(file: File) -> io::Result<Self> {
        exclusive(file)?.map(Self).ok_or_else(|| io::ErrorKind::WouldBlock.into())
    }
}

impl AsFd for FileDiff {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl DiffFile for FileDiff {
    fn try_read_at(&self, buf: &mut [u8], offset: u64) -> Attempt {
        let mut done = 0;
        while done < buf.len() {
            let parts = &mut [IoSliceMut::new(&mut buf[done..])];
            match preadv2(&self.0, parts, offset + done as u64, ReadWriteFlags::NOWAIT) {
                Ok(0) => return Attempt::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                // OPNOTSUPP: the file system cannot tell, so it is read where waiting is allowed.
                Err(Errno::AGAIN | Errno::OPNOTSUPP) => return Attempt::WouldBlock,
                Err(error) => return Attempt::Ready(Err(error.into())),
            }
        }
        Attempt::Ready(Ok(()))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_exact_at(buf, offset)
    }

    fn write_at(&self, parts: [&[u8]; 3], mut offset: u64) -> io::Result<()> {
        let mut slices = parts.map(IoSlice::new);
        let mut rest = &mut slices[..];
        IoSlice::advance_slices(&mut rest, 0);
        while !rest.is_empty() {
            match pwritev(&self.0, rest, offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    offset += count as u64;
                    IoSlice::advance_slices(&mut rest, count);
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        match fallocate(&self.0, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, length) {
            Err(error) if error != Errno::OPNOTSUPP => Err(error.into()),
            _ => Ok(()),
        }
    }

    fn allocate_zeroes(&self, offset: u64, length: u64, fast: bool) -> io::Result<()> {
        match fallocate(&self.0, FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, offset, length) {
            Err(Errno::OPNOTSUPP) if !fast => {}
            result => return Ok(result?),
        }
        static ZEROES: [u8; 1 << 16] = [0; 1 << 16];
        let mut done = 0;
        while done < length {
            let count = (length - done).min(ZEROES.len() as u64);
            let count_bytes = usize::try_from(count).expect("at most 64 KiB");
            self.0.write_all_at(&ZEROES[..count_bytes], offset + done)?;
            done += count;
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn read_ahead(&self, offset: u64, length: u64) -> io::Result<()> {
        Ok(fadvise(&self.0, offset, length.try_into().ok(), Advice::WillNeed)?)
    }
}

/// How far ahead of the log's end space is kept, so that a flush still succeeds when guests have filled the disk.
const LOG_RESERVE: u64 = 64 << 10;

/// [`LogFile`] on a file.
#[derive(Debug)]
pub struct FileLog {
    path: PathBuf,
    state: Mutex<LogState>,
}

#[derive(Debug)]
struct LogState {
    file: File,
    reserved: u64,
    /// Synced with the file the first time: a process that was killed may have just replaced it.
    folder: Option<File>,
}

impl FileLog {
    /// Makes a file with this content, durable.
    pub fn create(path: &Path, content: &[u8]) -> io::Result<Self> {
        let state = LogState { file: replace_file(path, content)?, reserved: 0, folder: None };
        Ok(Self { path: path.to_owned(), state: Mutex::new(state) })
    }

    /// Opens for appending.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::options().read(true).write(true).open(path)?;
        let state = LogState { file, reserved: 0, folder: Some(folder_of(path)?) };
        Ok(Self { path: path.to_owned(), state: Mutex::new(state) })
    }

    fn state(&self) -> std::sync::MutexGuard<'_, LogState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LogFile for FileLog {
    fn load(&self) -> io::Result<Vec<u8>> {
        std::fs::read(&self.path)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut state = self.state();
        let end = offset + bytes.len() as u64;
        if end + LOG_RESERVE / 2 > state.reserved {
            // A failure here is no failure yet: the write below decides.
            if fallocate(&state.file, FallocateFlags::KEEP_SIZE, end, LOG_RESERVE).is_ok() {
                state.reserved = end + LOG_RESERVE;
            }
        }
        state.file.write_all_at(bytes, offset)
    }

    fn truncate(&self, length: u64) -> io::Result<()> {
        let mut state = self.state();
        state.reserved = 0;
        state.file.set_len(length)
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.state();
        state.file.sync_data()?;
        if let Some(folder) = &state.folder {
            folder.sync_all()?;
            state.folder = None;
        }
        Ok(())
    }

    fn replace(&self, bytes: &[u8]) -> Result<(), ReplaceError> {
        *self.state() = LogState { file: replace_file(&self.path, bytes)?, reserved: 0, folder: None };
        Ok(())
    }
}

/// Temporary file, sync, rename, sync of the folder: a reader finds the old or the new, whole. Gives the new one.
///
/// What can fail for a moment, as when there are no more handles, comes before the rename.
fn replace_file(path: &Path, bytes: &[u8]) -> Result<File, ReplaceError> {
    let temporary = path.with_extension("new");
    let written = folder_of(path).and_then(|folder| {
        let file = File::create(&temporary)?;
        file.write_all_at(bytes, 0)?;
        file.sync_all()?;
        Ok((folder, file))
    });
    let renamed = written.map_err(ReplaceError::Unchanged).and_then(|new| {
        std::fs::rename(&temporary, path).map(|()| new).map_err(|error| match is_full(&error) {
            true => ReplaceError::Unchanged(error),
            false => ReplaceError::InDoubt(error),
        })
    });
    let (folder, file) = renamed.inspect_err(|_| {
        // Best effort: a left-over is overwritten by the next attempt.
        let _ = std::fs::remove_file(&temporary);
    })?;
    folder.sync_all().map_err(|error| {
        let what = format!("the folder of {} did not sync: {error}", path.display());
        ReplaceError::InDoubt(io::Error::other(what))
    })?;
    Ok(file)
}

/// The folder that makes the name of the file at `path` durable.
fn folder_of(path: &Path) -> io::Result<File> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    File::open(folder.unwrap_or_else(|| Path::new(".")))
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
