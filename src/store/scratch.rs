//! Half-made things: folders under `tmp/` that vanish unless they are published.
//!
//! The maker holds a lock on its folder. A folder that nobody holds was left by a process that was killed, and is
//! removed by the next one that opens the store.

use std::fs::{self, File};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::FlockOperation;

use super::atomic::{NEW_SUFFIX, sync_dir};
use super::lock::{exclusive, try_flock};
use super::{ChangeLock, Store, StoreError, at};

/// A file that replaces another lives for milliseconds; one this old was left behind.
const NEW_FILE_AGE: Duration = Duration::from_secs(600);

/// A folder under `tmp/` that is removed when this is dropped, or by the next start.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    _lock: File,
    keep: bool,
}

impl Scratch {
    /// The change lock keeps others from taking the new folder, before it is locked, for one left behind.
    pub(super) fn create(tmp: &Path, label: &str, _change: &ChangeLock) -> Result<Self, StoreError> {
        let path = free_path(tmp, label);
        fs::DirBuilder::new().mode(0o700).create(&path).map_err(at(&path))?;
        let lock = File::open(&path).map_err(at(&path))?;
        try_flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(at(&path))?;
        Ok(Self { path, _lock: lock, keep: false })
    }

    /// Takes the folder `dir` out of sight, to be removed when this is dropped. `lock` is the exclusive lock on it. It takes
    /// no room: a full disk has none for a folder around it. Durable when the folder that it was in is synced.
    pub(super) fn bury(dir: &Path, tmp: &Path, lock: File, _change: &ChangeLock) -> Result<Self, StoreError> {
        let path = free_path(tmp, "removed");
        fs::rename(dir, &path).map_err(at(dir))?;
        Ok(Self { path, _lock: lock, keep: false })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A file in the folder.
    pub fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Moves the folder to `target`, durably. Its files must be durable already.
    pub(super) fn rename_to(mut self, target: &Path) -> Result<(), StoreError> {
        sync_dir(&self.path).map_err(at(&self.path))?;
        fs::rename(&self.path, target).map_err(at(&self.path))?;
        self.keep = true;
        target.parent().map_or(Ok(()), sync_dir).map_err(at(target))
    }
}

/// A path that nothing has. Under the change lock it stays so.
fn free_path(tmp: &Path, label: &str) -> PathBuf {
    (0..u32::MAX)
        .map(|serial| tmp.join(format!("{label}.{serial}")))
        .find(|path| !path.exists())
        .expect("fewer than 2³² things are made at once")
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !self.keep
            && let Err(error) = fs::remove_dir_all(&self.path)
        {
            tracing::warn!("{}: {error}; the next start removes it", self.path.display());
        }
    }
}

impl Store {
    /// Takes the folder `dir` of the store out of sight by one rename, and removes it when the result is dropped, or at the
    /// next start; none when somebody has it locked. Durable when the folder that it was in is synced. May wait for a
    /// moment.
    ///
    /// # Errors
    /// [`StoreError::Io`]; nothing has changed then.
    pub(crate) fn bury(&self, dir: &Path, change: &ChangeLock) -> Result<Option<Scratch>, StoreError> {
        let lock = File::open(dir).and_then(exclusive).map_err(at(dir))?;
        lock.map(|lock| Scratch::bury(dir, &self.tmp(), lock, change)).transpose()
    }

    /// Removes what killed processes left in `tmp/` and `names/`.
    pub(super) fn clean(&self) -> Result<(), StoreError> {
        self.clean_new_files();
        let tmp = self.tmp();
        let mut entries = fs::read_dir(&tmp).map_err(at(&tmp))?.peekable();
        if entries.peek().is_none() {
            return Ok(());
        }
        let _change = self.change(|_| ())?;
        for entry in entries.flatten() {
            let path = entry.path();
            let Ok(dir) = File::open(&path) else { continue };
            if try_flock(&dir, FlockOperation::NonBlockingLockExclusive).map_err(at(&path))? {
                tracing::info!("removing {}, left by an interrupted command", path.display());
                remove_any(&path).map_err(at(&path))?;
            }
        }
        Ok(())
    }

    fn clean_new_files(&self) {
        let old = |entry: &fs::DirEntry| {
            let age = entry.metadata().ok()?.modified().ok()?.elapsed().ok()?;
            (age > NEW_FILE_AGE && entry.file_name().to_str()?.ends_with(NEW_SUFFIX)).then_some(())
        };
        for entry in fs::read_dir(self.dir.join("names")).into_iter().flatten().flatten() {
            if old(&entry).is_some() {
                // Not being able to is no harm: it is tried again at the next start.
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

fn remove_any(path: &Path) -> std::io::Result<()> {
    if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
}

/// Bytes that the files of folder `dir` take in the file system.
pub(super) fn stored_bytes(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.metadata().ok()).map(|metadata| metadata.blocks() * 512).sum()
}
