//! What is attached where: one JSON file for each name in the store's folder `attached/`, and a lock beside it.
//!
//! The lock (`flock`) is held by the name's keeper for as long as it lives, so that a name has one keeper at most and a
//! dead one is known without trusting a process id. Files are replaced atomically. An entry may be older than the host's
//! last start: whether its device is still the one it names is checked against the kernel ([`Entry::is_live`]). What a
//! keeper says goes to a log beside them.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::device::Holder;
use super::{AttachError, Device, Way};
use crate::store::atomic::write_atomic;

/// The folder's name within a store.
const FOLDER: &str = "attached";

/// One attached export.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The VM or image.
    pub name: String,
    /// Its device.
    pub device: Device,
    /// How it was attached.
    pub way: Way,
    /// Size in bytes.
    pub size: u64,
    /// Whether it cannot be written.
    pub read_only: bool,
    /// Process that looks after it.
    pub keeper: u32,
    /// What the kernel showed of it when it was attached.
    pub holder: Holder,
}

impl Entry {
    /// What the kernel is told as the device's backend.
    pub fn backend(name: &str) -> String {
        format!("bootcache:{name}")
    }

    /// Whether the kernel has the device still for whom it was attached.
    pub fn is_live(&self) -> bool {
        self.device.is_connected() && self.device.holder(self.way) == self.holder
    }
}

/// The table of one store.
#[derive(Debug, Clone)]
pub struct Table(PathBuf);

/// Makes its holder the keeper of a name.
#[derive(Debug)]
pub struct KeeperLock {
    _file: File,
}

impl Table {
    /// The table of the store in `store`; makes the folder if it is missing.
    pub fn open(store: &Path) -> Result<Self, AttachError> {
        let folder = store.join(FOLDER);
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&folder);
        // Who may read a lock's file may lock it; older versions let everybody.
        made.and_then(|()| fs::set_permissions(&folder, Permissions::from_mode(0o700)))
            .map_err(|error| at(&folder, error))?;
        Ok(Self(folder))
    }

    /// The same without making anything: what is not there has no entries.
    pub(super) fn of(store: &Path) -> Self {
        Self(store.join(FOLDER))
    }

    /// What the kernel has of the store in `store` under `name`, whether somebody keeps it or not. Makes no folder.
    pub fn live(store: &Path, name: &str) -> Result<Option<Entry>, AttachError> {
        Ok(Self::of(store).get(name)?.filter(Entry::is_live))
    }

    /// Whether the kernel has something of the store in `store` under `name` that nobody keeps. Makes no folder.
    pub fn is_unattended(store: &Path, name: &str) -> Result<bool, AttachError> {
        Ok(Self::live(store, name)?.is_some() && !Self::of(store).is_kept(name)?)
    }

    /// Whether there is anything of a name: a keeper is given its log, and takes its lock first of all. Makes nothing.
    pub(super) fn knows(&self, name: &str) -> bool {
        self.log_path(name).exists() || self.lock_path(name).exists()
    }

    /// Everything in it, by device.
    pub fn entries(&self) -> Result<Vec<Entry>, AttachError> {
        let mut entries = Vec::new();
        for file in fs::read_dir(&self.0).map_err(|error| at(&self.0, error))? {
            let path = file.map_err(|error| at(&self.0, error))?.path();
            // Names may have dots in them, so the ending is looked at and not the extension cut off.
            if let Some(name) = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".json")) {
                entries.extend(self.get(name)?);
            }
        }
        entries.sort_by_key(|entry| entry.device);
        Ok(entries)
    }

    /// The entry of a name.
    pub fn get(&self, name: &str) -> Result<Option<Entry>, AttachError> {
        let path = self.path(name);
        match fs::read(&path) {
            Ok(bytes) => {
                let parsed = serde_json::from_slice(&bytes);
                parsed.map(Some).map_err(|error| at(&path, io::Error::new(io::ErrorKind::InvalidData, error)))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(at(&path, error)),
        }
    }

    /// The entry of a name, or of the device of which `text` is the name.
    pub fn find(&self, text: &str) -> Result<Entry, AttachError> {
        let device = text.strip_prefix("/dev/").and_then(|_| text.parse::<Device>().ok());
        let found = match device {
            Some(device) => self.entries()?.into_iter().find(|entry| entry.device == device),
            None if text.contains('/') => None,
            None => self.get(text)?,
        };
        found.ok_or_else(|| AttachError::NotAttached(text.to_owned()))
    }

    /// Adds or replaces the entry of a name. For its keeper.
    pub(super) fn put(&self, entry: &Entry) -> Result<(), AttachError> {
        let path = self.path(&entry.name);
        let bytes = serde_json::to_vec_pretty(entry).map_err(|error| at(&path, io::Error::other(error)))?;
        write_atomic(&path, &bytes).map_err(|error| at(&path, error))
    }

    /// Removes an entry, if it is still that keeper's: another may have taken the name meanwhile.
    pub(super) fn remove(&self, entry: &Entry) -> Result<(), AttachError> {
        let path = self.path(&entry.name);
        if self.get(&entry.name)?.is_some_and(|found| found.keeper != entry.keeper) {
            return Ok(());
        }
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at(&path, error)),
            _ => Ok(()),
        }
    }

    /// Becomes the keeper of a name, if it has none.
    pub(super) fn lock(&self, name: &str) -> Result<Option<KeeperLock>, AttachError> {
        let path = self.lock_path(name);
        let failed = |error: io::Error| at(&path, error);
        loop {
            let file =
                File::options().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                // It may have been removed since it was opened: whoever comes next would lock another one.
                Ok(()) if is_at(&file, &path).map_err(failed)? => {
                    return Ok(Some(KeeperLock { _file: file }));
                }
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
                Err(error) => return Err(failed(error.into())),
            }
        }
    }

    /// Removes the lock and the log of a name that has neither a keeper nor an entry; false if it has one.
    pub(super) fn clear(&self, name: &str) -> Result<bool, AttachError> {
        let Some(_lock) = self.lock(name)? else { return Ok(false) };
        if self.get(name)?.is_some() {
            return Ok(false);
        }
        // The lock is held until it has gone.
        for path in [self.log_path(name), self.lock_path(name)] {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at(&path, error)),
                _ => {}
            }
        }
        Ok(true)
    }

    /// Whether a name has a keeper.
    pub fn is_kept(&self, name: &str) -> Result<bool, AttachError> {
        self.lock(name).map(|lock| lock.is_none())
    }

    /// What the keeper of a name says.
    pub(super) fn log_path(&self, name: &str) -> PathBuf {
        self.0.join(format!("{name}.log"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(format!("{name}.json"))
    }

    fn lock_path(&self, name: &str) -> PathBuf {
        self.0.join(format!("{name}.lock"))
    }
}

/// Whether `file` is what stands at `path`.
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let ours = file.metadata()?;
    match fs::metadata(path) {
        Ok(there) => Ok((there.dev(), there.ino()) == (ours.dev(), ours.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn at(path: &Path, error: io::Error) -> AttachError {
    AttachError::Table { path: path.display().to_string(), error }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::attach) fn entry(name: &str, device: u32) -> Entry {
        let (device, way) = (Device(device), Way::Netlink);
        let holder = device.holder(way);
        Entry { name: name.into(), device, way, size: 4096, read_only: false, keeper: 1, holder }
    }

    #[test]
    fn keeps_what_was_put_and_finds_it_by_name_and_device() {
        let dir = tempfile::tempdir().unwrap();
        let table = Table::open(dir.path()).unwrap();
        for entry in [entry("vm-2", 1), entry("debian.12", 0)] {
            table.put(&entry).unwrap();
        }
        let table = Table::open(dir.path()).unwrap();
        assert_eq!(table.entries().unwrap(), [entry("debian.12", 0), entry("vm-2", 1)]);
        assert_eq!(table.find("vm-2").unwrap().device, Device(1));
        assert_eq!(table.find("/dev/nbd0").unwrap().name, "debian.12");
        for text in ["vm-3", "/dev/nbd7", "../vm-2"] {
            assert!(matches!(table.find(text), Err(AttachError::NotAttached(_))), "{text}");
        }
        // Another keeper's by now.
        table.remove(&Entry { keeper: 2, ..entry("vm-2", 1) }).unwrap();
        assert_eq!(table.entries().unwrap().len(), 2);
        table.remove(&entry("vm-2", 1)).unwrap();
        table.remove(&entry("vm-2", 1)).unwrap();
        assert_eq!(table.entries().unwrap().len(), 1);
    }

    #[test]
    fn what_the_kernel_does_not_have_is_not_live_and_asking_makes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Table::live(dir.path(), "vm").unwrap(), None);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let table = Table::open(dir.path()).unwrap();
        table.put(&entry("vm", u32::MAX)).unwrap();
        assert_eq!(Table::live(dir.path(), "vm").unwrap(), None);
        fs::write(table.path("vm"), "{").unwrap();
        assert!(matches!(Table::live(dir.path(), "vm"), Err(AttachError::Table { .. })));
    }

    #[test]
    fn a_name_has_one_keeper() {
        let dir = tempfile::tempdir().unwrap();
        let table = Table::open(dir.path()).unwrap();
        let lock = table.lock("vm").unwrap();
        assert!(lock.is_some() && table.is_kept("vm").unwrap() && !table.is_kept("other").unwrap());
        assert!(table.lock("vm").unwrap().is_none());
        drop(lock);
        assert!(!table.is_kept("vm").unwrap());
    }

    #[test]
    fn a_name_is_cleared_when_it_has_neither_a_keeper_nor_an_entry() {
        let dir = tempfile::tempdir().unwrap();
        let table = Table::open(dir.path()).unwrap();
        let lock = table.lock("vm").unwrap();
        fs::write(table.log_path("vm"), "it says").unwrap();
        assert!(table.knows("vm") && !table.clear("vm").unwrap());
        drop(lock);
        table.put(&entry("vm", 0)).unwrap();
        assert!(!table.clear("vm").unwrap());
        table.remove(&entry("vm", 0)).unwrap();
        assert!(table.clear("vm").unwrap() && !table.knows("vm"));
        assert_eq!(fs::read_dir(dir.path().join(FOLDER)).unwrap().count(), 0);
    }

    #[test]
    fn a_lock_that_was_removed_while_it_was_waited_for_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (dir.path().join("first"), dir.path().join("second"));
        let file = File::create(&first).unwrap();
        assert!(is_at(&file, &first).unwrap());
        File::create(&second).unwrap();
        fs::rename(&second, &first).unwrap();
        assert!(!is_at(&file, &first).unwrap());
        fs::remove_file(&first).unwrap();
        assert!(!is_at(&file, &first).unwrap());
    }
}
