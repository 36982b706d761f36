//! Removal: a name goes; the content goes with its last name, unless something builds on it or has it open.

use std::fs;
use std::path::Path;

use serde::Deserialize;

use crate::digest::Digest;
use crate::name::ImageName;

use super::lock::Hold;
use super::{ChangeLock, Scratch, Store, StoreError, at, atomic};

/// What became of a removed name's image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Removed {
    /// The content went with its last name.
    Content {
        /// Bytes that the file system got back.
        freed: u64,
    },
    /// Other names mean the same image, so the content stays.
    NameOnly,
}

impl Removed {
    /// Bytes that the file system got back; none when the content stayed.
    pub const fn freed(self) -> Option<u64> {
        match self {
            Self::Content { freed } => Some(freed),
            Self::NameOnly => None,
        }
    }
}

/// An image's content that nobody sees any more. Dropping it takes as long as the file system needs for large files: it is
/// best done once others may change the store again.
#[derive(Debug)]
pub(super) struct Buried {
    /// Bytes that the file system gets back.
    pub(super) freed: u64,
    _grave: Scratch,
}

/// What is read here of an overlay's `meta`, which the overlay owns.
#[derive(Deserialize)]
struct OverlayMeta {
    base: Digest,
}

impl Store {
    /// Removes `name`, and the image itself when that was its last name.
    ///
    /// # Errors
    /// [`StoreError::HasDependent`] when an overlay or an incremental image builds on it, [`StoreError::InUse`],
    /// [`StoreError::NoSuchImage`], [`StoreError::Damaged`] when it cannot be told what another name means,
    /// [`StoreError::Io`].
    pub fn remove(&self, name: &ImageName) -> Result<Removed, StoreError> {
        let change = self.change(|_| ())?;
        let root = self.root_of(name)?.ok_or_else(|| StoreError::NoSuchImage(name.clone()))?;
        let (names, unreadable) = self.read_names()?;
        if names.iter().any(|(other, other_root)| other != name && *other_root == root) {
            self.remove_name(name)?;
            return Ok(Removed::NameOnly);
        }
        // It may be another name of this image.
        unreadable.into_iter().next().map_or(Ok(()), Err)?;
        let dir = self.image_dir(root);
        if !dir.try_exists().map_err(at(&dir))? {
            self.remove_name(name)?;
            return Ok(Removed::Content { freed: 0 });
        }
        if let Some(dependent) = self.dependent_of(root)? {
            return Err(StoreError::HasDependent { root, dependent });
        }
        let hold = Hold::exclusive(&self.image_dir(root), root)?;
        // The name goes last: whatever comes in between, it is there for the next attempt.
        let buried = self.delete_image(root, hold, &change)?;
        self.remove_name(name)?;
        drop(change); // others need not wait for the rest
        Ok(Removed::Content { freed: buried.freed })
    }

    pub(super) fn remove_name(&self, name: &ImageName) -> Result<(), StoreError> {
        let path = self.name_path(name);
        fs::remove_file(&path).map_err(at(&path))?;
        let dir = self.dir.join("names");
        atomic::sync_dir(&dir).map_err(at(&dir))
    }

    /// Deletes the content of image `root`, which nobody else holds: out of sight by one rename, then piece by piece when
    /// the result is dropped.
    pub(super) fn delete_image(
        &self,
        root: Digest,
        hold: Hold,
        change: &ChangeLock,
    ) -> Result<Buried, StoreError> {
        let dir = self.image_dir(root);
        let freed = super::scratch::stored_bytes(&dir);
        let grave = Scratch::bury(&dir, &self.tmp(), hold.into_lock(), change)?;
        let images = self.dir.join("images");
        atomic::sync_dir(&images).map_err(at(&images))?;
        Ok(Buried { freed, _grave: grave })
    }

    /// Something that builds on image `root`, as a person would call it.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] when it cannot be told what an overlay builds on; [`StoreError::Io`].
    pub fn dependent_of(&self, root: Digest) -> Result<Option<String>, StoreError> {
        for (other, base) in self.overlay_bases()? {
            if base == root {
                return Ok(Some(format!("overlay '{other}'")));
            }
        }
        for other in self.roots()? {
            // An image without a sound manifest cannot be booted, and so depends on nothing.
            let Ok(entry) = self.image(other) else { continue };
            if entry.below() == Some(root) {
                let names = self.names()?;
                let name = names.into_iter().find(|(_, named)| *named == other).map(|(name, _)| name);
                let name = name.map_or_else(|| other.short(), |name| format!("'{name}'"));
                return Ok(Some(format!("incremental image {name}")));
            }
        }
        Ok(None)
    }

    /// The overlays there are, with the root of the image below each.
    pub(super) fn overlay_bases(&self) -> Result<Vec<(String, Digest)>, StoreError> {
        let dir = self.dir.join("overlays");
        let mut bases = Vec::new();
        for entry in fs::read_dir(&dir).map_err(at(&dir))? {
            let entry = entry.map_err(at(&dir))?;
            if let Some(base) = overlay_base(&entry.path().join("meta"))? {
                bases.push((entry.file_name().to_string_lossy().into_owned(), base));
            }
        }
        Ok(bases)
    }
}

/// The base in an overlay's `meta`; none when the overlay is only just being made or removed.
fn overlay_base(meta: &Path) -> Result<Option<Digest>, StoreError> {
    let text = match fs::read(meta) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(at(meta)(error)),
    };
    serde_json::from_slice::<OverlayMeta>(&text).map(|meta| Some(meta.base)).map_err(|error| {
        let what = format!("cannot tell what this overlay builds on ({error}); remove the overlay first");
        StoreError::Damaged { path: meta.to_owned(), what }
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_store_can_be_changed_while_a_removed_image_is_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let root = Digest::of(b"x");
        fs::create_dir(store.image_dir(root)).unwrap();
        fs::write(store.image_dir(root).join("disk"), [1; 8192]).unwrap();
        let change = store.change(|_| ()).unwrap();
        let hold = Hold::exclusive(&store.image_dir(root), root).unwrap();
        let buried = store.delete_image(root, hold, &change).unwrap();
        drop(change);
        assert!(buried.freed >= 8192 && !store.image_dir(root).exists());
        assert_eq!(fs::read_dir(store.tmp()).unwrap().count(), 1, "it is deleted before others may go on");
        ChangeLock::take(store.dir(), Duration::ZERO, |_| ()).unwrap();
        drop(buried);
        assert_eq!(fs::read_dir(store.tmp()).unwrap().count(), 0);
    }
}
