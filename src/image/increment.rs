//! Incremental images: made of a sealed overlay, written to a file of their own, and taken back from one.
//!
//! An increment has the files of an overlay under other names, `index` and `disk`, and a whole digest tree, so that
//! its blocks are checked like those of any image. Its base must be in the store, and stays while the increment does.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use crate::block::Extent;
use crate::digest::Digest;
use crate::name::ImageName;
use crate::overlay::{
    BlockState, Header, INDEX_FILE, IndexError, OverlayError, Run, read_index, write_index,
};
use crate::store::{Hold, ImageEntry, Scratch, Store, StoreError, at};

use super::export::ExportError;
use super::increment_file::{self, IncrementFileError, Reader};
use super::increment_tree::{Change, build_increment_tree};
use super::manifest::{MANIFEST_VERSION, Manifest, SourceFormat};
use super::new_file::NewFile;
use super::page::LastPage;
use super::scan::{ScanError, Watch};
use super::tree::{Tree, TreeError};

/// Why an increment was not made. Nothing of it is left in the store then.
#[derive(Debug, thiserror::Error)]
pub enum IncrementError {
    /// What it adds to is not here.
    #[error("it adds to image {}, which is not in this store: add that one first", .0.short())]
    BaseMissing(Digest),
    /// What it adds to has not arrived completely.
    #[error("it adds to image {}, which has not arrived completely: wait for it", .0.short())]
    BaseIncomplete(Digest),
    /// Base and blocks together are not the image that they should be.
    #[error("together with its base it is not the image that it says: it, or the base, is damaged")]
    WrongRoot,
    /// The file is not sound.
    #[error(transparent)]
    File(#[from] IncrementFileError),
    /// The overlay is not sound.
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    /// The digest tree cannot be read or made.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// The disk is full.
    #[error("{}: the disk is full: free some space, or choose another --store", .0.display())]
    NoSpace(PathBuf),
    /// A file cannot be read or written.
    #[error("{}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
    /// The store cannot take it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The watcher wanted it.
    #[error("interrupted; nothing was added")]
    Cancelled,
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> IncrementError {
    move |error| match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => IncrementError::NoSpace(path.to_owned()),
        _ => IncrementError::Io { path: path.to_owned(), error },
    }
}

/// The blocks that increment `entry` has itself, in order.
///
/// # Errors
/// [`StoreError::Damaged`] when its index is not sound or not of this image, [`StoreError::Io`] when it cannot be read.
pub(super) fn own_changes(entry: &ImageEntry) -> Result<Vec<Change>, StoreError> {
    let path = entry.index_path();
    let damaged = |what: String| StoreError::Damaged { path: path.clone(), what };
    let (header, runs) = read_index(&path).map_err(|error| match error {
        OverlayError::Index { error: IndexError::Io(error), .. }
            if error.kind() != io::ErrorKind::NotFound =>
        {
            StoreError::Io { path: path.clone(), error }
        }
        error => damaged(error.to_string()),
    })?;
    if Some(header.base) != entry.manifest.base || header.size != entry.manifest.size {
        return Err(damaged(
            "it is the index of another image; remove the image and add it again".to_owned(),
        ));
    }
    Ok(changes_of(&runs))
}

fn changes_of(runs: &[Run]) -> Vec<Change> {
    let own = runs.iter().filter(|run| run.state != BlockState::Absent);
    own.map(|run| Change { extent: run.extent, zero: run.state == BlockState::Zero }).collect()
}

fn runs_of(changes: &[Change]) -> Vec<Run> {
    let state = |zero| if zero { BlockState::Zero } else { BlockState::Data };
    changes.iter().map(|change| Run { extent: change.extent, state: state(change.zero) }).collect()
}

/// Makes an incremental image called `name` of `scratch`, which holds `index` and `disk` as `Overlay::seal` made them.
///
/// # Errors
/// [`IncrementError`]; the store is as it was.
pub fn publish_sealed(
    store: &Store,
    scratch: Scratch,
    name: &ImageName,
) -> Result<ImageEntry, IncrementError> {
    store.check_free(name)?;
    let (header, runs) = read_index(&scratch.join(INDEX_FILE))?;
    let base = Base::open(store, header.base)?;
    publish(store, scratch, &base, header, &changes_of(&runs), None, name)
}

/// The image that an increment adds to, kept from being removed.
struct Base {
    entry: ImageEntry,
    tree: Tree,
    _hold: Hold,
}

impl Base {
    fn open(store: &Store, root: Digest) -> Result<Self, IncrementError> {
        let missing = |error| match error {
            StoreError::NoSuchRoot(_) => IncrementError::BaseMissing(root),
            error => error.into(),
        };
        let hold = store.hold(root).map_err(missing)?;
        let entry = store.image(root).map_err(missing)?;
        if !entry.is_complete() {
            return Err(IncrementError::BaseIncomplete(root));
        }
        let tree = Tree::open(&entry.tree_path(), Some(root))?;
        Ok(Self { entry, tree, _hold: hold })
    }
}

/// Adds tree and manifest to `scratch`, which has index and disk, and publishes it. With `expected`, only if that is
/// its root.
fn publish(
    store: &Store,
    scratch: Scratch,
    base: &Base,
    header: Header,
    changes: &[Change],
    expected: Option<Digest>,
    name: &ImageName,
) -> Result<ImageEntry, IncrementError> {
    let path = scratch.join("disk");
    let disk = File::open(&path).map_err(io_error(&path))?;
    let root = build_increment_tree(&base.tree, header.size, changes, &disk, &scratch.join("tree")).map_err(
        |error| match error {
            ScanError::Io(error) | ScanError::Tree(TreeError::Io { error, .. }) => io_error(&path)(error),
            ScanError::Tree(error) => error.into(),
            ScanError::Cancelled => IncrementError::Cancelled,
        },
    )?;
    if expected.is_some_and(|expected| expected != root) {
        return Err(IncrementError::WrongRoot);
    }
    disk.sync_all().map_err(io_error(&path))?;
    let data: u64 = changes.iter().filter(|change| !change.zero).map(|change| change.extent.bytes()).sum();
    let manifest = Manifest {
        version: MANIFEST_VERSION,
        size: header.size,
        root,
        raw_blake3: None,
        kind: base.entry.manifest.kind,
        source_format: SourceFormat::Overlay,
        base: Some(header.base),
        allocated: data,
        boot: None,
    };
    let path = scratch.join("manifest");
    crate::store::write_atomic(&path, &manifest.to_bytes()).map_err(io_error(&path))?;
    Ok(store.publish(scratch, root, name)?)
}

/// Writes what increment `entry` adds to its base to the file `path`, which must not exist.
///
/// # Errors
/// [`ExportError`]; no file is left.
pub fn export_increment(
    store: &Store,
    entry: &ImageEntry,
    path: &Path,
    watch: &Watch,
) -> Result<(), ExportError> {
    if entry.below().is_none() {
        return Err(ExportError::NotAnIncrement(entry.root));
    }
    let _hold = store.hold(entry.root)?;
    let changes = own_changes(entry)?;
    let tree = Tree::open(&entry.tree_path(), Some(entry.root))?;
    let disk_path = entry.disk_path();
    let disk = File::open(&disk_path).map_err(at(&disk_path))?;
    let target = NewFile::create(path)?;
    watch.start("exporting", entry.manifest.allocated);
    let (mut damaged, mut unreadable, mut last) = (None, None, LastPage::default());
    let mut out = BufWriter::new(&target.file);
    let written = increment_file::write(&mut out, &entry.manifest, &changes, |extent, buffer| {
        if watch.is_cancelled() {
            return Err(io::Error::other("interrupted"));
        }
        read_blocks(&disk, extent, entry.manifest.size, buffer)?;
        watch.done.fetch_add(extent.bytes(), Ordering::Relaxed);
        for (block, data) in extent.blocks().zip(buffer.chunks(4096)) {
            match tree.verify_block(block, data, &mut last) {
                Ok(true) => {}
                Ok(false) => {
                    damaged = Some(block);
                    return Err(io::Error::other("damaged"));
                }
                Err(error) => {
                    unreadable = Some(error);
                    return Err(io::Error::other("unreadable"));
                }
            }
        }
        Ok(())
    });
    let written = written.and_then(|()| out.flush());
    drop(out);
    if let Some(error) = unreadable {
        return Err(error.into());
    }
    match (written, damaged) {
        (Ok(()), _) => target.finish(),
        (Err(_), Some(block)) => Err(ExportError::Damaged { root: entry.root, block }),
        (Err(_), None) if watch.is_cancelled() => Err(ExportError::Cancelled),
        (Err(error), None) => Err(ExportError::Io { path: path.to_owned(), error }),
    }
}

/// Reads whole blocks; what lies past the end of the disk is zero.
fn read_blocks(disk: &File, extent: Extent, size: u64, buffer: &mut [u8]) -> io::Result<()> {
    let inside = (size - extent.offset()).min(extent.bytes());
    let (inside, past_end) =
        buffer.split_at_mut(usize::try_from(inside).expect("at most the buffer's length"));
    past_end.fill(0);
    disk.read_exact_at(inside, extent.offset())
}

/// Adds the increment in `file`, of `length` bytes, to `store` as an image called `name`.
///
/// # Errors
/// [`IncrementError`]; the store is as it was.
pub(super) fn import_increment(
    store: &Store,
    name: &ImageName,
    file: &File,
    length: u64,
    watch: &Watch,
) -> Result<ImageEntry, IncrementError> {
    let reader = Reader::new(BufReader::new(file), length)?;
    let base = Base::open(store, reader.base)?;
    let (changes, manifest) = (reader.changes.clone(), reader.manifest.clone());
    let scratch = store.scratch("import")?;
    let path = scratch.join("disk");
    let disk = File::create_new(&path).map_err(io_error(&path))?;
    disk.set_len(manifest.size).map_err(io_error(&path))?;
    watch.start("unpacking", manifest.allocated);
    let mut failure = None;
    let read = reader.read_blocks(|extent, data| {
        watch.done.fetch_add(extent.bytes(), Ordering::Relaxed);
        let inside = (manifest.size - extent.offset()).min(extent.bytes());
        let data = &data[..usize::try_from(inside).expect("at most the data's length")];
        failure = match disk.write_all_at(data, extent.offset()) {
            _ if watch.is_cancelled() => Some(IncrementError::Cancelled),
            Ok(()) => return Ok(()),
            Err(error) => Some(io_error(&path)(error)),
        };
        Err(IncrementFileError::Damaged("it was not read to its end"))
    });
    if let Some(failure) = failure {
        return Err(failure);
    }
    read?;
    let header = Header { base: base.entry.root, size: manifest.size };
    write_index(&scratch.join(INDEX_FILE), header, &runs_of(&changes))?;
    publish(store, scratch, &base, header, &changes, Some(manifest.root), name)
}
