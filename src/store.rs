//! The store: the one folder in which a node keeps its images, overlays and VMs, and the names of its images.
//!
//! ```text
//! lock                    held by `serve` for as long as it runs
//! lock.change             held for a moment by whoever changes names or adds and removes content
//! names/NAME              root digest of the image that NAME means; several names may mean one image
//! images/ROOT/            manifest, tree, disk, and what else the image has; see [`ImageEntry`]
//! overlays/NAME/ vms/NAME/
//! tmp/LABEL.N/            a half-made thing; its maker holds a lock on the folder
//! ```
//!
//! Content is made whole under `tmp/`, made durable, and then renamed into place, so that nothing half-made is ever
//! seen and commands can add images beside a running `serve`. All locks are `flock`: they end with their process,
//! however it ends.

pub mod atomic;
pub mod evict;
pub mod lock;
pub mod remove;
pub mod scratch;

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::digest::Digest;
use crate::image::manifest::{Boot, MANIFEST_BYTES_MAX, Manifest, ManifestError};
use crate::name::{HostName, ImageName};

pub use atomic::{write_atomic, write_atomic_as};
pub use lock::{ChangeLock, Hold, StoreLock};
pub use scratch::Scratch;

/// How long a change waits for another one to end.
const CHANGE_DEADLINE: Duration = Duration::from_secs(30);

/// Why the store cannot do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system says no.
    #[error("{}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
    /// Another process has the store.
    #[error("store {} is in use by process {holder}: stop it, or choose another store with --store", dir.display())]
    Locked { dir: PathBuf, holder: String },
    /// Another process changes the store and does not end.
    #[error("store {} is being changed by process {holder}: try again when it is done", dir.display())]
    Busy { dir: PathBuf, holder: String },
    /// No image has this name.
    #[error("there is no image '{0}': `bootcache image list` shows those there are")]
    NoSuchImage(ImageName),
    /// No image has this root.
    #[error("there is no image with root {}", .0.short())]
    NoSuchRoot(Digest),
    /// The name means another image, or an overlay.
    #[error("the name '{0}' is taken: remove what has it first, or choose another name")]
    NameTaken(ImageName),
    /// The image is open somewhere.
    #[error("image {} is in use: stop the VMs and commands that use it first", .0.short())]
    InUse(Digest),
    /// Something builds on the image.
    #[error("image {} is the base of {dependent}: remove that first", root.short())]
    HasDependent { root: Digest, dependent: String },
    /// Its sockets would have names that Unix sockets cannot have.
    #[error("{}: the store's path may have {PATH_MAX} bytes, since that of a socket in it has 107 at most", .0.display())]
    PathTooLong(PathBuf),
    /// A file of the store is not what it was.
    #[error("{}: {what}", path.display())]
    Damaged { path: PathBuf, what: String },
    /// The manifest is not what it was.
    #[error("{}: {error}", path.display())]
    Manifest { path: PathBuf, error: ManifestError },
}

/// The longest path of a store, in bytes: that of `control.sock.new` in it fits into a socket's address (`unix(7)`).
const PATH_MAX: usize = 107 - "/control.sock.new".len();

/// Ties an I/O error to its path.
pub(crate) fn at(path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    move |error| StoreError::Io { path: path.to_owned(), error }
}

/// A store's folder. Cheap to clone; holds no lock by itself.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
}

/// An image of the store: where it is, and its manifest.
#[derive(Debug, Clone)]
pub struct ImageEntry {
    /// Its identity.
    pub root: Digest,
    /// Its folder.
    pub dir: PathBuf,
    /// What is known of it.
    pub manifest: Manifest,
}

impl ImageEntry {
    /// The digest tree.
    pub fn tree_path(&self) -> PathBuf {
        self.dir.join("tree")
    }

    /// The disk; of an increment, the blocks it adds.
    pub fn disk_path(&self) -> PathBuf {
        self.dir.join("disk")
    }

    /// The boot cache.
    pub fn boot_path(&self) -> PathBuf {
        self.dir.join("boot")
    }

    /// Increments only: which blocks are the image's own.
    pub fn index_path(&self) -> PathBuf {
        self.dir.join("index")
    }

    /// The presence bitmap of a disk that is still arriving.
    pub fn present_path(&self) -> PathBuf {
        self.dir.join("present")
    }

    /// The image whose blocks are read where this one has none of its own; none when the disk is whole by itself, as
    /// that of an increment is which came from a peer. When that cannot be told it is not: zeroes would be read there.
    pub fn below(&self) -> Option<Digest> {
        self.manifest.base.filter(|_| !matches!(self.index_path().try_exists(), Ok(false)))
    }

    /// Whether the whole disk is here. When that cannot be told it is not: what is absent would read as zeroes.
    pub fn is_complete(&self) -> bool {
        matches!(self.present_path().try_exists(), Ok(false))
    }

    /// Refuses a disk of another length than the image's size: what is missing would read as zeroes.
    ///
    /// # Errors
    /// [`StoreError::Damaged`].
    pub fn check_length(&self, length: u64) -> Result<(), StoreError> {
        let size = self.manifest.size;
        if length == size {
            return Ok(());
        }
        let what = format!(
            "it has {length} bytes, not {size}; add an intact copy of the image again, which repairs it"
        );
        Err(StoreError::Damaged { path: self.disk_path(), what })
    }

    /// Bytes that the image takes in the file system.
    pub fn stored_bytes(&self) -> u64 {
        scratch::stored_bytes(&self.dir)
    }
}

/// Names of images in order, with the root of each.
pub type Names = Vec<(ImageName, Digest)>;

impl Store {
    /// Opens the store in `dir`, makes its folders when they are missing, and removes what interrupted commands left.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        let make = |path: &Path, mode| {
            fs::DirBuilder::new().recursive(true).mode(mode).create(path).map_err(at(path))
        };
        if dir.as_os_str().len() > PATH_MAX {
            return Err(StoreError::PathTooLong(dir.to_owned()));
        }
        make(dir, 0o755)?;
        let dir = dir.canonicalize().map_err(at(dir))?;
        let store = Self { dir };
        // A QEMU that is not root must reach its socket in vms/, and nothing else.
        for (name, mode) in
            [("names", 0o755), ("images", 0o700), ("overlays", 0o700), ("vms", 0o711), ("tmp", 0o700)]
        {
            make(&store.dir.join(name), mode)?;
        }
        store.clean()?;
        Ok(store)
    }

    /// Whether somebody has made a store in `dir`, or may have where this process may not look: [`Self::open`] says why.
    pub fn exists(dir: &Path) -> bool {
        dir.join("names").try_exists().unwrap_or(true)
    }

    /// Keeps other commands from starting a VM on the overlay of that name, which is there, until the result is dropped;
    /// none while another one has it.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn lock_overlay(&self, name: &HostName) -> Result<Option<fs::File>, StoreError> {
        let dir = self.overlay_dir(name);
        fs::File::open(&dir).and_then(lock::exclusive).map_err(at(&dir))
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Takes the store for a daemon, until the lock is dropped or the process ends.
    ///
    /// # Errors
    /// [`StoreError::Locked`] names who has it; [`StoreError::Io`].
    pub fn lock(&self) -> Result<StoreLock, StoreError> {
        StoreLock::take(&self.dir)
    }

    /// Takes the short lock for a change of names or content; waits for another change to end, and tells `waiting`
    /// once that it does, with the process that is in the way.
    ///
    /// # Errors
    /// [`StoreError::Busy`] after 30 s; [`StoreError::Io`].
    pub fn change(&self, waiting: impl FnOnce(&str)) -> Result<ChangeLock, StoreError> {
        ChangeLock::take(&self.dir, CHANGE_DEADLINE, waiting)
    }

    /// The folder of image `root`.
    pub fn image_dir(&self, root: Digest) -> PathBuf {
        self.dir.join("images").join(root.to_string())
    }

    /// The folder of overlay `name`.
    pub fn overlay_dir(&self, name: &HostName) -> PathBuf {
        self.dir.join("overlays").join(name.as_str())
    }

    /// The folder of VM `name`.
    pub fn vm_dir(&self, name: &HostName) -> PathBuf {
        self.dir.join("vms").join(name.as_str())
    }

    /// The folder for half-made things; use [`Store::scratch`].
    pub fn tmp(&self) -> PathBuf {
        self.dir.join("tmp")
    }

    fn name_path(&self, name: &ImageName) -> PathBuf {
        self.dir.join("names").join(name.as_str())
    }

    /// The names there are, in order, with the root of each; without those whose file cannot be read.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn names(&self) -> Result<Names, StoreError> {
        Ok(self.read_names()?.0)
    }

    /// The same, and what is wrong with the others.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn read_names(&self) -> Result<(Names, Vec<StoreError>), StoreError> {
        let dir = self.dir.join("names");
        let (mut names, mut unreadable) = (Vec::new(), Vec::new());
        for entry in fs::read_dir(&dir).map_err(at(&dir))? {
            let entry = entry.map_err(at(&dir))?;
            let Some(name) = entry.file_name().to_str().and_then(|text| text.parse::<ImageName>().ok())
            else {
                continue;
            };
            match self.root_of(&name) {
                Ok(Some(root)) => names.push((name, root)),
                Ok(None) => {} // A name may go while we look.
                Err(error) => unreadable.push(error),
            }
        }
        names.sort();
        Ok((names, unreadable))
    }

    /// The root that `name` means, if it is a name.
    ///
    /// # Errors
    /// [`StoreError::Io`], [`StoreError::Damaged`].
    pub fn root_of(&self, name: &ImageName) -> Result<Option<Digest>, StoreError> {
        let path = self.name_path(name);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(at(&path)(error)),
        };
        match text.strip_suffix('\n').unwrap_or(&text).parse() {
            Ok(root) => Ok(Some(root)),
            Err(_) => Err(StoreError::Damaged {
                path,
                what: "the name's file is damaged; delete it and name the image again".to_owned(),
            }),
        }
    }

    /// The image that `name` means.
    ///
    /// # Errors
    /// [`StoreError::NoSuchImage`], and those of [`Store::image`].
    pub fn resolve(&self, name: &ImageName) -> Result<ImageEntry, StoreError> {
        let root = self.root_of(name)?.ok_or_else(|| StoreError::NoSuchImage(name.clone()))?;
        self.image(root)
    }

    /// The image with `root`.
    ///
    /// # Errors
    /// [`StoreError::NoSuchRoot`], [`StoreError::Manifest`], [`StoreError::Damaged`], [`StoreError::Io`].
    pub fn image(&self, root: Digest) -> Result<ImageEntry, StoreError> {
        let dir = self.image_dir(root);
        let path = dir.join("manifest");
        let bytes = match read_bounded(&path, MANIFEST_BYTES_MAX) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(StoreError::NoSuchRoot(root));
            }
            Err(error) => return Err(at(&path)(error)),
        };
        let manifest = Manifest::from_bytes(&bytes)
            .map_err(|error| StoreError::Manifest { path: path.clone(), error })?;
        if manifest.root != root {
            let what = "the manifest is that of another image; remove the image and add it again".to_owned();
            return Err(StoreError::Damaged { path, what });
        }
        Ok(ImageEntry { root, dir, manifest })
    }

    /// The roots of all images, named or not, in order.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn roots(&self) -> Result<Vec<Digest>, StoreError> {
        let dir = self.dir.join("images");
        let mut roots = Vec::new();
        for entry in fs::read_dir(&dir).map_err(at(&dir))? {
            roots.extend(
                entry.map_err(at(&dir))?.file_name().to_str().and_then(|name| name.parse::<Digest>().ok()),
            );
        }
        roots.sort();
        Ok(roots)
    }

    /// Keeps image `root` from being removed for as long as the result lives.
    ///
    /// # Errors
    /// [`StoreError::NoSuchRoot`], [`StoreError::InUse`] when it is being removed, [`StoreError::Io`].
    pub fn hold(&self, root: Digest) -> Result<Hold, StoreError> {
        Hold::shared(&self.image_dir(root), root)
    }

    /// Starts a half-made thing; its folder is removed unless it is published.
    ///
    /// # Errors
    /// [`StoreError::Io`], [`StoreError::Busy`].
    pub fn scratch(&self, label: &str) -> Result<Scratch, StoreError> {
        let change = self.change(|_| ())?;
        Scratch::create(&self.tmp(), label, &change)
    }

    /// Makes `scratch`, which holds manifest, tree and disk of image `root`, a part of the store, and `name` its name.
    /// Its files must be durable. An image with this root that is here already is kept, and gets the name.
    ///
    /// # Errors
    /// [`StoreError::NameTaken`], [`StoreError::InUse`] when the image is just being fetched from a peer,
    /// [`StoreError::Io`].
    pub fn publish(
        &self,
        scratch: Scratch,
        root: Digest,
        name: &ImageName,
    ) -> Result<ImageEntry, StoreError> {
        let change = self.change(|_| ())?;
        self.check_name(name, root)?;
        match self.image(root) {
            Ok(entry) if entry.is_complete() => self.forget_pulled(root)?,
            Ok(_) | Err(StoreError::Manifest { .. } | StoreError::Damaged { .. }) => {
                self.replace(root, scratch, &change)?;
            }
            Err(StoreError::NoSuchRoot(_)) => scratch.rename_to(&self.image_dir(root))?,
            Err(error) => return Err(error),
        }
        self.write_name(name, root)?;
        self.image(root)
    }

    /// As [`Store::publish`], for an image that is only about to come from a peer: of its disk nothing is in `scratch`.
    /// Whatever is here of the image already is kept. The hold keeps it from being removed from the first moment on.
    ///
    /// # Errors
    /// [`StoreError::NameTaken`], [`StoreError::Io`]; [`StoreError::InUse`] when the image is damaged, and open.
    pub fn publish_arriving(
        &self,
        scratch: Scratch,
        root: Digest,
        name: &ImageName,
    ) -> Result<(ImageEntry, Hold), StoreError> {
        let change = self.change(|_| ())?;
        self.check_name(name, root)?;
        let is_new = match self.image(root) {
            Ok(_) => false,
            Err(StoreError::Manifest { .. } | StoreError::Damaged { .. }) => {
                self.replace(root, scratch, &change)?;
                true
            }
            Err(StoreError::NoSuchRoot(_)) => {
                scratch.rename_to(&self.image_dir(root))?;
                true
            }
            Err(error) => return Err(error),
        };
        // Images are removed under the change lock only, so that this one is still there.
        let hold = self.hold(root)?;
        if is_new {
            self.mark_pulled(root)?;
        }
        self.write_name(name, root)?;
        Ok((self.image(root)?, hold))
    }

    /// Puts `scratch` in the place of image `root`, unless that is in use.
    fn replace(&self, root: Digest, scratch: Scratch, change: &ChangeLock) -> Result<(), StoreError> {
        let dir = self.image_dir(root);
        let hold = Hold::exclusive(&dir, root)?;
        self.delete_image(root, hold, change)?;
        scratch.rename_to(&dir)
    }

    /// Gives image `root`, which is here, the name `name`. Blocks, for as long as another change takes, unless the name
    /// means this image already.
    ///
    /// # Errors
    /// [`StoreError::NameTaken`], [`StoreError::NoSuchRoot`], [`StoreError::Busy`], [`StoreError::Io`].
    pub fn add_name(&self, name: &ImageName, root: Digest) -> Result<(), StoreError> {
        if self.root_of(name)? == Some(root) {
            return self.image(root).map(drop);
        }
        let _change = self.change(|_| ())?;
        self.check_name(name, root)?;
        self.image(root)?;
        self.write_name(name, root)
    }

    /// Whether no image and no overlay is called `name` yet: to be asked before long work for it.
    ///
    /// # Errors
    /// [`StoreError::NameTaken`], [`StoreError::Io`].
    pub fn check_free(&self, name: &ImageName) -> Result<(), StoreError> {
        match self.root_of(name)? {
            None if !self.is_overlay(name) => Ok(()),
            _ => Err(StoreError::NameTaken(name.clone())),
        }
    }

    /// Whether `name` is free, or means `root` already.
    ///
    /// # Errors
    /// [`StoreError::NameTaken`], [`StoreError::Io`].
    pub fn check_name(&self, name: &ImageName, root: Digest) -> Result<(), StoreError> {
        match self.root_of(name)? {
            Some(found) if found == root => Ok(()),
            None if !self.is_overlay(name) => Ok(()),
            _ => Err(StoreError::NameTaken(name.clone())),
        }
    }

    /// Images and overlays are exported under their names, so that one name means one of them.
    fn is_overlay(&self, name: &ImageName) -> bool {
        name.as_str().parse().is_ok_and(|name: HostName| self.overlay_dir(&name).exists())
    }

    fn write_name(&self, name: &ImageName, root: Digest) -> Result<(), StoreError> {
        let path = self.name_path(name);
        write_atomic(&path, format!("{root}\n").as_bytes()).map_err(at(&path))
    }

    /// Gives image `root` the boot cache in `file`, which must be durable and on the store's file system, and says so
    /// in its manifest. In between the manifest names none, so that a crash leaves no boot cache believed wrongly.
    ///
    /// # Errors
    /// [`StoreError::NoSuchRoot`], [`StoreError::Io`].
    pub fn set_boot(&self, root: Digest, file: &Path, boot: Boot) -> Result<ImageEntry, StoreError> {
        let _change = self.change(|_| ())?;
        let mut entry = self.image(root)?;
        let path = entry.dir.join("manifest");
        entry.manifest.boot = None;
        write_atomic(&path, &entry.manifest.to_bytes()).map_err(at(&path))?;
        fs::rename(file, entry.boot_path()).map_err(at(file))?;
        atomic::sync_dir(&entry.dir).map_err(at(&entry.dir))?;
        entry.manifest.boot = Some(boot);
        write_atomic(&path, &entry.manifest.to_bytes()).map_err(at(&path))?;
        Ok(entry)
    }
}

/// Reads a file that must not be longer than `length_max` bytes.
fn read_bounded(path: &Path, length_max: usize) -> io::Result<Vec<u8>> {
    if fs::metadata(path)?.size() > length_max as u64 {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the file is too long"));
    }
    fs::read(path)
}

#[cfg(test)]
mod tests;
