//! Files that are either what they were or what they are to be, whenever the machine stops.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// Ends the name of a file that is about to replace another.
pub(super) const NEW_SUFFIX: &str = ".new";

/// Replaces the file at `path` by `bytes`: a crash leaves the old content or the new, never a part. When it returns,
/// the new content is durable.
///
/// Order: content synced before the rename that shows it, folder synced after, so that the rename itself lasts.
///
/// # Errors
/// Those of the file system; the old file is untouched then.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> io::Result<()> {
    replace(path, bytes, None)
}

/// As [`write_atomic`]; the file has the permissions `mode`, and never any more.
///
/// # Errors
/// Those of the file system; the old file is untouched then.
pub fn write_atomic_as(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    replace(path, bytes, Some(mode))
}

fn replace(path: &Path, bytes: &[u8], mode: Option<u32>) -> io::Result<()> {
    static SERIAL: AtomicU64 = AtomicU64::new(0);
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a file's path"));
    };
    let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
    let new = dir.join(format!(".{}.{}.{serial}{NEW_SUFFIX}", name.to_string_lossy(), std::process::id()));
    let replace = || {
        // Nobody may open for a moment what is not for everybody.
        let mode_max = mode.unwrap_or(0o666);
        let mut file = File::options().write(true).create(true).truncate(true).mode(mode_max).open(&new)?;
        if let Some(mode) = mode {
            file.set_permissions(Permissions::from_mode(mode))?;
        }
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&new, path)
    };
    if let Err(error) = replace() {
        // Nothing more can be done if this fails too; the next start removes the file.
        let _ = fs::remove_file(&new);
        return Err(error);
    }
    sync_dir(dir)
}

/// Makes the entries of a folder durable. The parent of a lone name, which is empty, is the current folder.
///
/// # Errors
/// Those of the file system.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces_the_whole_content_and_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        write_atomic(&path, b"a longer first content").unwrap();
        write_atomic(&path, b"second").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"second");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_failure_leaves_the_old_content() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("taken");
        fs::create_dir(&path).unwrap();
        assert!(write_atomic(&path, b"x").is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
