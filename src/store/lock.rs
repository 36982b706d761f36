//! The store's locks. All are `flock` on files or folders that stay: the kernel ends them with their process, so that
//! `kill -9` leaves nothing to clear away, and what the file says of its holder is only for people.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;

use crate::digest::Digest;

use super::{StoreError, at};

const POLL: Duration = Duration::from_millis(50);
/// How often, and how far apart, a lock that is held is tried by who does not wait for it.
const ATTEMPTS: u32 = 25;
const PAUSE: Duration = Duration::from_millis(10);
/// A process id and the spaces behind it.
const HOLDER_BYTES: usize = 20;

/// The store is this process's, until this is dropped.
#[derive(Debug)]
pub struct StoreLock {
    _file: File,
}

impl StoreLock {
    pub(super) fn take(dir: &Path) -> Result<Self, StoreError> {
        let path = dir.join("lock");
        match patiently(|| try_exclusive(&path)).map_err(at(&path))? {
            Some(file) => Ok(Self { _file: file }),
            None => Err(StoreError::Locked { dir: dir.to_owned(), holder: holder(&path) }),
        }
    }
}

/// Names and content may be changed by this process, until this is dropped. To be held for moments only.
#[derive(Debug)]
pub struct ChangeLock {
    _file: File,
}

impl ChangeLock {
    pub(super) fn take(
        dir: &Path,
        deadline: Duration,
        waiting: impl FnOnce(&str),
    ) -> Result<Self, StoreError> {
        let path = dir.join("lock.change");
        let start = Instant::now();
        let mut waiting = Some(waiting);
        loop {
            if let Some(file) = try_exclusive(&path).map_err(at(&path))? {
                return Ok(Self { _file: file });
            }
            if start.elapsed() > deadline {
                return Err(StoreError::Busy { dir: dir.to_owned(), holder: holder(&path) });
            }
            if let Some(waiting) = waiting.take_if(|_| start.elapsed() > 4 * POLL) {
                waiting(&holder(&path));
            }
            std::thread::sleep(POLL);
        }
    }
}

/// Locks the file at `path`, which is made when it is missing, and writes this process's id into it: over what is there,
/// since that takes no room. A full disk keeps nobody from removing things.
fn try_exclusive(path: &Path) -> io::Result<Option<File>> {
    lock_for_this_process(open(path)?)
}

fn lock_for_this_process(file: File) -> io::Result<Option<File>> {
    if !try_flock(&file, FlockOperation::NonBlockingLockExclusive)? {
        return Ok(None);
    }
    let holder = format!("{:<HOLDER_BYTES$}\n", std::process::id());
    if file.write_all_at(holder.as_bytes(), 0).is_err() {
        // Better nobody than another one. If this fails too, people are told of that other one.
        let _ = file.set_len(0);
    }
    Ok(Some(file))
}

/// Opens a lock's file, which is made when it is missing, for its owner alone: who may read a file may lock it.
fn open(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let file = options.custom_flags(OFlags::NOFOLLOW.bits().cast_signed()).open(path)?;
    if file.metadata()?.mode() & 0o077 != 0 {
        file.set_permissions(fs::Permissions::from_mode(0o600))?;
    }
    Ok(file)
}

fn holder(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    match text.split_whitespace().next() {
        None => "unknown".to_owned(),
        Some(pid) => pid.chars().take(HOLDER_BYTES).collect(),
    }
}

/// Has `attempt` take a lock, again for a moment while another has it: a child that was forked while a handle of that one
/// was open shares its lock until it runs its own program, although it has been closed here.
pub(crate) fn patiently<T>(mut attempt: impl FnMut() -> io::Result<Option<T>>) -> io::Result<Option<T>> {
    for _ in 1..ATTEMPTS {
        if let Some(locked) = attempt()? {
            return Ok(Some(locked));
        }
        std::thread::sleep(PAUSE);
    }
    attempt()
}

/// Takes the exclusive lock of a file, if nobody has it.
pub(crate) fn exclusive(file: File) -> io::Result<Option<File>> {
    let locked = patiently(|| Ok(try_flock(&file, FlockOperation::NonBlockingLockExclusive)?.then_some(())))?;
    Ok(locked.map(|()| file))
}

/// Whether the lock was got; not when another has it.
pub(super) fn try_flock(file: &File, operation: FlockOperation) -> io::Result<bool> {
    match flock(file, operation) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// An image's content stays where it is while this lives. Shared holds are for users, the exclusive one for removal.
#[derive(Debug)]
pub struct Hold {
    dir: File,
}

impl Hold {
    pub(super) fn shared(dir: &Path, root: Digest) -> Result<Self, StoreError> {
        Self::take(dir, root, FlockOperation::NonBlockingLockShared)
    }

    pub(super) fn exclusive(dir: &Path, root: Digest) -> Result<Self, StoreError> {
        Self::take(dir, root, FlockOperation::NonBlockingLockExclusive)
    }

    /// The folder, locked.
    pub(super) fn into_lock(self) -> File {
        self.dir
    }

    /// The folder itself is locked, not a file in it: files are replaced by rename, the folder stays the same.
    fn take(path: &Path, root: Digest, operation: FlockOperation) -> Result<Self, StoreError> {
        let dir = File::open(path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => StoreError::NoSuchRoot(root),
            _ => at(path)(error),
        })?;
        let locked = patiently(|| Ok(try_flock(&dir, operation)?.then_some(()))).map_err(at(path))?;
        if locked.is_none() {
            return Err(StoreError::InUse(root));
        }
        // It may have been removed, and added again, between open and lock.
        let held = dir.metadata().map_err(at(path))?;
        if !fs::metadata(path).is_ok_and(|now| (now.dev(), now.ino()) == (held.dev(), held.ino())) {
            return Err(StoreError::NoSuchRoot(root));
        }
        Ok(Self { dir })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_that_a_child_has_a_moment_longer_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let root = Digest::of(b"root");
        let closed = Hold::exclusive(dir.path(), root).unwrap().into_lock();
        let of_the_child = closed.try_clone().unwrap();
        drop(closed);
        let child = std::thread::spawn(move || {
            std::thread::sleep(5 * PAUSE);
            drop(of_the_child);
        });
        Hold::shared(dir.path(), root).unwrap();
        child.join().unwrap();
    }

    #[test]
    fn nobody_else_can_open_a_lock_nor_lead_it_elsewhere() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        fs::write(&path, "").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        drop(StoreLock::take(dir.path()).unwrap());
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let target = dir.path().join("target");
        fs::write(&target, "precious").unwrap();
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(&target, &path).unwrap();
        assert!(StoreLock::take(dir.path()).is_err());
        assert_eq!(fs::read(&target).unwrap(), b"precious");
    }

    #[test]
    fn the_second_daemon_is_told_who_has_the_store() {
        let dir = tempfile::tempdir().unwrap();
        let first = StoreLock::take(dir.path()).unwrap();
        let error = StoreLock::take(dir.path()).unwrap_err().to_string();
        assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
        drop(first);
        StoreLock::take(dir.path()).unwrap();
    }

    #[test]
    fn a_lock_file_that_a_killed_process_left_is_no_obstacle() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("lock"), "999999999 and more text than a number has\n").unwrap();
        let _lock = StoreLock::take(dir.path()).unwrap();
        assert_eq!(holder(&dir.path().join("lock")), std::process::id().to_string());
    }

    /// Once, nothing could be removed from a full disk, for want of the block that the process's id takes.
    #[test]
    fn a_lock_needs_no_room() {
        let full = File::options().read(true).write(true).open("/dev/full").unwrap();
        assert!(lock_for_this_process(full).unwrap().is_some());
    }

    #[test]
    fn a_change_waits_for_another_and_says_so_once() {
        let dir = tempfile::tempdir().unwrap();
        let first = ChangeLock::take(dir.path(), Duration::ZERO, |_| ()).unwrap();
        let mut told = Vec::new();
        let error =
            ChangeLock::take(dir.path(), Duration::from_millis(400), |holder| told.push(holder.to_owned()));
        assert!(matches!(error, Err(StoreError::Busy { .. })));
        assert_eq!(told, [std::process::id().to_string()]);
        drop(first);
        ChangeLock::take(dir.path(), Duration::ZERO, |_| ()).unwrap();
    }

    #[test]
    fn an_image_in_use_cannot_be_held_for_removal() {
        let dir = tempfile::tempdir().unwrap();
        let root = Digest::of(b"");
        let users = [Hold::shared(dir.path(), root).unwrap(), Hold::shared(dir.path(), root).unwrap()];
        assert!(matches!(Hold::exclusive(dir.path(), root), Err(StoreError::InUse(_))));
        drop(users);
        let _removal = Hold::exclusive(dir.path(), root).unwrap();
        assert!(Hold::shared(dir.path(), root).is_err());
    }
}
