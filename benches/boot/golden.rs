//! The golden store of a guest: its disk imported as `golden` and its boot recorded.
//!
//! Made on first use and kept below the cache folder, because recording takes a boot.

use std::ffi::OsStr;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::support;
use super::support::store::bootcache;

/// Not a guest of `scripts/guest`: synthetic, made and read by `scripts/windows-like`.
const SYNTHETIC: &str = "windows-like";

/// The store of `guest`; a path is the store itself.
pub(crate) fn golden(guest: &str) -> PathBuf {
    if guest.contains('/') {
        return PathBuf::from(guest);
    }
    let raw = if guest == SYNTHETIC { synthetic() } else { support::guest::disk(guest) };
    let name = raw.file_stem().expect("it has a name");
    let cache = stores(&raw);
    let dir = cache.join(name);
    if dir.join("store").is_dir() {
        return dir.join("store");
    }
    eprintln!("importing {guest} and recording its boot (kept in {})", dir.display());
    let making = cache.join(format!("{}.{}", name.display(), std::process::id()));
    std::fs::create_dir_all(&making).expect("the cache folder is writable");
    let store = making.join("store");
    let run = |arguments: &[&OsStr]| {
        support::run(Command::new(bootcache()).arg("--store").arg(&store).args(arguments));
    };
    run(&["image".as_ref(), "add".as_ref(), "golden".as_ref(), raw.as_os_str()]);
    if guest == SYNTHETIC {
        let reader = support::checkout("scripts/windows-like");
        let words = ["record", "golden", "--until", "exit", "--"].map(OsStr::new);
        run(&[&words[..], &[reader.as_os_str(), "read".as_ref(), "{disk}".as_ref()]].concat());
    } else {
        // The last one is replayed: the first comes when the disk has just been written, and is slower.
        let words = ["record", "golden", "--runs", "3", "--until", "serial:BOOTED-OK", "--memory", "512"];
        run(&words.map(AsRef::as_ref));
    }
    std::fs::rename(&making, &dir).expect("a rename within the cache folder");
    dir.join("store")
}

/// Held for as long as boots are measured; none while another bench measures, which would be slower by this one and has
/// the same golden stores open.
pub(crate) fn lock() -> Option<File> {
    let folder = stores(&support::guest::disk("tiny"));
    let lock = std::fs::create_dir_all(&folder).and_then(|()| File::create(folder.join("lock")));
    let lock = lock.expect("the cache folder is writable");
    match lock.try_lock() {
        Ok(()) => Some(lock),
        Err(TryLockError::WouldBlock) => None,
        Err(TryLockError::Error(error)) => panic!("the cache folder cannot be locked: {error}"),
    }
}

/// Where the golden stores are, beside the folder that `disk` is in.
fn stores(disk: &Path) -> PathBuf {
    disk.parent().and_then(Path::parent).expect("it is in the cache folder").join("bench")
}

/// Removes all golden stores: boots are recorded anew.
pub(crate) fn forget() {
    let stores = std::fs::read_dir(stores(&support::guest::disk("tiny"))).into_iter().flatten().flatten();
    for store in stores.filter(|entry| entry.path().is_dir()) {
        std::fs::remove_dir_all(store.path()).expect("the cache folder is writable");
    }
}

/// The synthetic disk, in the same folder as the guests'.
fn synthetic() -> PathBuf {
    let folder = support::guest::disk("tiny").parent().expect("it is in a folder").to_owned();
    let raw = folder.join(format!("{SYNTHETIC}.raw"));
    if !raw.exists() {
        let partial = raw.with_extension("partial");
        support::run(Command::new(support::checkout("scripts/windows-like")).arg("make").arg(&partial));
        std::fs::rename(&partial, &raw).expect("a rename within the cache folder");
    }
    raw
}
