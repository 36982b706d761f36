//! How an image leaves the store as a file of the user's: raw, or in another disk format through `qemu-img`.
//!
//! Every block is checked against the digest tree on its way out. The file appears under its name only when it is
//! whole and durable.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::block::BLOCK_BYTES;
use crate::digest::Digest;
use crate::store::{ImageEntry, Store, StoreError};

use super::manifest::{ImageKind, SourceFormat};
use super::new_file::NewFile;
use super::page::{PAGE_BLOCKS, PAGE_SPAN, is_zero};
use super::qemu_img::{self, QemuImgError};
use super::scan::{DiskSource, PageView, ScanError, Watch, scan};
use super::stored_disk::StoredDisk;
use super::tree::{Tree, TreeError};

/// Why an image was not exported. No file is left then.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The file exists.
    #[error("{}: it exists already: choose another name, or remove it", .0.display())]
    Exists(PathBuf),
    /// The image has not arrived completely.
    #[error("image {} has not arrived completely: wait for it, or use `bootcache pull`", .0.short())]
    Incomplete(Digest),
    /// It stands on its own.
    #[error("image {} adds to no other: leave --increment out", .0.short())]
    NotAnIncrement(Digest),
    /// A container's archive is no disk.
    #[error("a container image is exported as it is: leave --format out")]
    Container,
    /// What is stored is not the image.
    #[error("image {}: block {block} is damaged: see `bootcache image verify`", root.short())]
    Damaged { root: Digest, block: u64 },
    /// The file cannot be written, or the image not read.
    #[error("{}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
    /// The digest tree cannot be used.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// `qemu-img` cannot write the format.
    #[error("{}: {error}", path.display())]
    QemuImg { path: PathBuf, error: QemuImgError },
    /// The store cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The watcher wanted it.
    #[error("interrupted; nothing was exported")]
    Cancelled,
}

/// Writes the disk of `entry` to `path`, which must not exist, in `format`.
///
/// # Errors
/// [`ExportError`]; no file is left.
pub fn export(
    store: &Store,
    entry: &ImageEntry,
    path: &Path,
    format: SourceFormat,
    watch: &Watch,
) -> Result<(), ExportError> {
    if !entry.is_complete() {
        return Err(ExportError::Incomplete(entry.root));
    }
    if entry.manifest.kind == ImageKind::Container && format != SourceFormat::Raw {
        return Err(ExportError::Container);
    }
    let io_error = |error| ExportError::Io { path: path.to_owned(), error };
    let target = NewFile::create(path)?;
    let disk = StoredDisk::open(store, entry)?;
    let copier = Copier { tree: Tree::open(&entry.tree_path(), Some(entry.root))?, disk: &disk, watch };
    if format == SourceFormat::Raw {
        copier.copy_to(Some(&target.file)).map_err(|failure| failure.explain(path))?;
        return target.finish();
    }
    let scratch = store.scratch("export")?;
    let source = if entry.below().is_none() {
        copier.copy_to(None).map_err(|failure| failure.explain(path))?;
        entry.disk_path()
    } else {
        let whole = scratch.join("disk");
        let file = File::create_new(&whole).map_err(io_error)?;
        copier.copy_to(Some(&file)).map_err(|failure| failure.explain(path))?;
        whole
    };
    let new_path = target.path.canonicalize().map_err(io_error)?;
    qemu_img::convert((&source, SourceFormat::Raw), (&new_path, format), entry.manifest.size, watch)
        .map_err(|error| match error {
            QemuImgError::Cancelled => ExportError::Cancelled,
            error => ExportError::QemuImg { path: path.to_owned(), error },
        })?;
    target.finish()
}

/// Reads a whole image, checks every block, and writes what is not zero.
struct Copier<'a> {
    tree: Tree,
    disk: &'a StoredDisk,
    watch: &'a Watch,
}

enum CopyFailure {
    Damaged { root: Digest, block: u64 },
    Scan(ScanError),
}

impl CopyFailure {
    fn explain(self, path: &Path) -> ExportError {
        match self {
            Self::Damaged { root, block } => ExportError::Damaged { root, block },
            Self::Scan(ScanError::Cancelled) => ExportError::Cancelled,
            Self::Scan(ScanError::Io(error)) => ExportError::Io { path: path.to_owned(), error },
            Self::Scan(ScanError::Tree(error)) => error.into(),
        }
    }
}

impl Copier<'_> {
    /// Copies to `target`, or only checks.
    fn copy_to(&self, target: Option<&File>) -> Result<(), CopyFailure> {
        self.watch.start(if target.is_some() { "copying" } else { "checking" }, self.disk.size());
        if let Some(target) = target {
            target.set_len(self.disk.size()).map_err(|error| CopyFailure::Scan(error.into()))?;
        }
        let damaged = OnceLock::new();
        let scanned = scan(self.disk, self.watch, |view| {
            if let Some(block) = self.bad_block(view)? {
                // Another thread may have found one too; either will do.
                let _ = damaged.set(block);
                return Err(ScanError::Cancelled);
            }
            target.map_or(Ok(()), |target| write_data(target, view)).map_err(ScanError::Io)
        });
        match damaged.into_inner() {
            Some(block) => Err(CopyFailure::Damaged { root: self.tree.root(), block }),
            None => scanned.map(|_| ()).map_err(CopyFailure::Scan),
        }
    }

    fn bad_block(&self, view: &PageView<'_>) -> Result<Option<u64>, TreeError> {
        let page = self.tree.page(view.index)?;
        let bad = match view.data {
            None => page.data_runs().next().map(|run| run.start),
            Some(data) => {
                let mut blocks = data.chunks(BLOCK_BYTES).enumerate();
                blocks.find(|(i, data)| !page.verify(*i, data)).map(|(i, _)| i)
            }
        };
        Ok(bad.map(|i| view.index * PAGE_BLOCKS + i as u64))
    }
}

fn write_data(target: &File, view: &PageView<'_>) -> io::Result<()> {
    let places = (view.index * PAGE_SPAN..).step_by(BLOCK_BYTES);
    for (at, block) in places.zip(view.data.unwrap_or_default().chunks(BLOCK_BYTES)) {
        if !is_zero(block) {
            target.write_all_at(block, at)?;
        }
    }
    Ok(())
}
