//! A file of the user's that appears under its name when it is finished, and not at all when it is not.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, RenameFlags, linkat, renameat_with};
use rustix::io::Errno;

use super::export::ExportError;
use crate::store::atomic::sync_dir;

/// A file that is being made beside its place.
#[derive(Debug)]
pub(super) struct NewFile {
    pub(super) file: File,
    pub(super) path: PathBuf,
    target: PathBuf,
}

impl NewFile {
    /// Starts the file that is to be `target`, beside it.
    pub(super) fn create(target: &Path) -> Result<Self, ExportError> {
        let io_error = |error| ExportError::Io { path: target.to_owned(), error };
        if target.symlink_metadata().is_ok() {
            return Err(ExportError::Exists(target.to_owned()));
        }
        let name = target.file_name().ok_or_else(|| io_error(io::ErrorKind::InvalidFilename.into()))?;
        let path =
            target.with_file_name(format!(".{}.{}.partial", name.to_string_lossy(), std::process::id()));
        let file = File::options().read(true).write(true).create_new(true).open(&path).map_err(io_error)?;
        Ok(Self { file, path, target: target.to_owned() })
    }

    /// Makes it durable and gives it its name.
    pub(super) fn finish(self) -> Result<(), ExportError> {
        let io_error = |error| ExportError::Io { path: self.target.clone(), error };
        self.file.sync_all().map_err(io_error)?;
        let placed = match renameat_with(CWD, &self.path, CWD, &self.target, RenameFlags::NOREPLACE) {
            // NFS and others know no such rename. The other name goes with this value.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => self.link(),
            renamed => renamed,
        };
        placed.map_err(|error| match error {
            Errno::EXIST => ExportError::Exists(self.target.clone()),
            error => io_error(error.into()),
        })?;
        self.target.parent().map_or(Ok(()), sync_dir).map_err(io_error)
    }

    /// Gives it its name beside the one that it has.
    fn link(&self) -> Result<(), Errno> {
        linkat(CWD, &self.path, CWD, &self.target, AtFlags::empty())
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        // After `finish` there is nothing under this name.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_gives_the_name_and_replaces_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out.raw");
        let (first, second) = (NewFile::create(&target).unwrap(), dir.path().join("second.raw"));
        fs::write(&first.path, "first").unwrap();
        first.link().unwrap();
        assert_eq!(first.link(), Err(Errno::EXIST));
        drop(first);
        let next = NewFile::create(&second).unwrap();
        fs::write(&second, "theirs").unwrap();
        assert!(matches!(next.finish(), Err(ExportError::Exists(_))));
        let mut left: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["out.raw", "second.raw"]);
        assert_eq!(fs::read(&target).unwrap(), b"first");
    }
}
