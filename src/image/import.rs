//! How a file becomes an image of the store.
//!
//! The guest-visible disk is made as a sparse raw file in a scratch folder, then one pass by all cores makes the digest
//! tree and the plain BLAKE3 and turns the last zero blocks into holes; for a raw file the same pass also copies, so
//! that it is read once. Everything is durable before the folder is renamed into the store, so an interruption at
//! any moment leaves a scratch folder that the next start removes, and nothing else.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, ioctl_ficlone, seek};
use rustix::io::Errno;
use tracing::warn;

use crate::block::{BLOCK_BYTES, BLOCK_SIZE, Extent, blocks_for};
use crate::boot_cache::merge::Touch;
use crate::boot_cache::{Builder, TooScattered};
use crate::digest::Digest;
use crate::name::ImageName;
use crate::store::{ImageEntry, Scratch, Store, StoreError};

use super::archive::{self, ArchiveError};
use super::format::{FormatError, Head, refuse_truncated, refuse_truncated_vdi};
use super::increment::{IncrementError, import_increment};
use super::manifest::{Boot, ImageKind, MANIFEST_VERSION, Manifest, SourceFormat};
use super::page::{PAGE_SPAN, Page};
use super::qcow2;
use super::qemu_img::{self, QemuImgError};
use super::repair::repair;
use super::scan::{DiskSource, FileSource, PageView, ScanError, Watch, scan};
use super::tree::{SIZE_MAX, TreeError};
use super::tree_builder::TreeBuilder;
use super::vmdk;

/// zstd level of archives, all of which is compressed: 9 packs 5 % tighter than 3, at 70 MB/s a core.
const ARCHIVE_LEVEL: i32 = 9;
const TRUNCATED: &str = "it is truncated: its tables name parts of the disk past its end";

/// Why a file did not become an image. Nothing of it is left in the store then.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The file cannot be read.
    #[error("{}: {error}", path.display())]
    Source { path: PathBuf, error: io::Error },
    /// It is a folder, a pipe or the like.
    #[error("{}: it is neither a file nor a block device", .0.display())]
    NotAFile(PathBuf),
    /// It is empty.
    #[error("{}: it is empty", .0.display())]
    Empty(PathBuf),
    /// Its format is not what it should be.
    #[error("{}: {error}", path.display())]
    Format { path: PathBuf, error: FormatError },
    /// Its disk is larger than an image may be.
    #[error("{}: {error}", path.display())]
    TooLarge { path: PathBuf, error: TreeError },
    /// It is said to be a container but is no archive.
    #[error("{}: it is not a tar archive, so not a container: leave --type out, or state --type vm", .0.display())]
    NotAnArchive(PathBuf),
    /// It is a container's archive that could not be loaded.
    #[error("{}: {error}", path.display())]
    Archive { path: PathBuf, error: ArchiveError },
    /// It is an incremental image that cannot be taken.
    #[error("{}: {error}", path.display())]
    Increment { path: PathBuf, error: IncrementError },
    /// `qemu-img` cannot read it.
    #[error("{}: {error}", path.display())]
    QemuImg { path: PathBuf, error: QemuImgError },
    /// Somebody wrote to it meanwhile: what was looked through need not be what was read.
    #[error("{}: it was changed while it was read: add it again once nobody writes to it", .0.display())]
    Changed(PathBuf),
    /// The same bytes are here as an image of the other kind.
    #[error("{}: an image with these bytes is here already, of type {kind}: remove that first", path.display())]
    OtherKind { path: PathBuf, kind: ImageKind },
    /// There is no room for it.
    #[error("{}: the disk is full: free some space, or choose another --store", .0.display())]
    NoSpace(PathBuf),
    /// The store's folder cannot be written.
    #[error("{}: {error}", path.display())]
    Target { path: PathBuf, error: io::Error },
    /// The store cannot take it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The watcher wanted it.
    #[error("interrupted; nothing was added")]
    Cancelled,
}

/// What the user says of a file.
#[derive(Debug, Clone, Copy, Default)]
pub struct ImportOptions {
    /// Its format; otherwise found by the rule of [`super::format`].
    pub format: Option<SourceFormat>,
    /// What it is for; otherwise a container when it is a tar archive, a VM's disk when not.
    pub kind: Option<ImageKind>,
    /// Files outside the given one may be opened.
    pub allow_backing_files: bool,
}

/// What is known of a file before it is read.
#[derive(Debug)]
struct Source {
    path: PathBuf,
    file: File,
    stamp: Stamp,
    format: SourceFormat,
    kind: ImageKind,
    /// Bytes that a guest sees.
    size: u64,
}

/// Adds `file` to `store` as an image called `name`. Ends early, with nothing left, when `watch` says so.
///
/// # Errors
/// [`ImportError`]; the store is as it was.
pub fn import(
    store: &Store,
    name: &ImageName,
    file: &Path,
    options: ImportOptions,
    watch: &Watch,
) -> Result<ImageEntry, ImportError> {
    store.check_free(name)?;
    let opened = Opened::new(file)?;
    if opened.head.is_increment() && options.format.is_none() && options.kind.is_none() {
        let added = import_increment(store, name, &opened.file, opened.length, watch);
        return added.map_err(|error| match error {
            IncrementError::Cancelled => ImportError::Cancelled,
            IncrementError::Store(error) => error.into(),
            error => ImportError::Increment { path: file.to_owned(), error },
        });
    }
    let source = opened.inspect(file, options, watch)?;
    let scratch = store.scratch("import")?;
    let disk = make_disk(&source, file, &scratch, watch)?;
    keep_right(store, &source, options.kind.is_some(), &disk, &scratch)?;
    let boot = match source.kind {
        ImageKind::Container => whole_in_order(&scratch, disk.root, source.size, watch)?,
        ImageKind::Vm => None,
    };
    let manifest = Manifest {
        version: MANIFEST_VERSION,
        size: source.size,
        root: disk.root,
        raw_blake3: Some(disk.raw),
        kind: source.kind,
        source_format: source.format,
        base: None,
        allocated: disk.allocated,
        boot,
    };
    let path = scratch.join("manifest");
    crate::store::write_atomic(&path, &manifest.to_bytes()).map_err(|error| target_error(&path, error))?;
    Ok(store.publish(scratch, disk.root, name)?)
}

/// What is here already of the image that was just read is kept, so it has to be the same: of the kind that was asked
/// for, and with the bytes that it had when it was stored.
fn keep_right(
    store: &Store,
    source: &Source,
    is_kind_stated: bool,
    disk: &Digests,
    scratch: &Scratch,
) -> Result<(), ImportError> {
    let Ok(there) = store.image(disk.root) else { return Ok(()) };
    if is_kind_stated && there.manifest.kind != source.kind {
        return Err(ImportError::OtherKind { path: source.path.clone(), kind: there.manifest.kind });
    }
    if !there.is_complete() || there.below().is_some() {
        return Ok(());
    }
    let _hold = store.hold(disk.root)?;
    let stored = there.disk_path();
    let blocks =
        repair(&stored, &scratch.join("disk"), source.size).map_err(|error| target_error(&stored, error))?;
    if blocks > 0 {
        warn!("{blocks} blocks of {} had changed since it was added, and are right again", stored.display());
    }
    Ok(())
}

/// Which file it is, and its last change. That of anything, since a time of writing can be set by whoever owns it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    changed: (i64, i64),
}

impl Stamp {
    fn new(meta: &fs::Metadata) -> Self {
        Self { device: meta.dev(), inode: meta.ino(), changed: (meta.ctime(), meta.ctime_nsec()) }
    }
}

impl Source {
    /// Whether the file is still as it was when it was first looked at. `qemu-img` opens it again by its path: another file
    /// there, or another backing file named in its tables, would be read in its place. And what a raw file has lost
    /// meanwhile was taken for holes.
    fn check_unchanged(&self, given: &Path) -> Result<(), ImportError> {
        let now = fs::metadata(&self.path)
            .map_err(|error| ImportError::Source { path: given.to_owned(), error })?;
        // A device has no such time.
        if now.is_file() && Stamp::new(&now) != self.stamp {
            return Err(ImportError::Changed(given.to_owned()));
        }
        Ok(())
    }
}

/// A file that exists and has bytes.
struct Opened {
    path: PathBuf,
    file: File,
    stamp: Stamp,
    length: u64,
    head: Head,
}

impl Opened {
    fn new(given: &Path) -> Result<Self, ImportError> {
        let source_error = |error| ImportError::Source { path: given.to_owned(), error };
        let file_type = fs::metadata(given).map_err(source_error)?.file_type();
        if !file_type.is_file() && !file_type.is_block_device() {
            return Err(ImportError::NotAFile(given.to_owned()));
        }
        let path = given.canonicalize().map_err(source_error)?;
        let file = File::open(&path).map_err(source_error)?;
        let stamp = Stamp::new(&file.metadata().map_err(source_error)?);
        // Seeking also tells the length of a block device.
        let length = seek(&file, SeekFrom::End(0)).map_err(|error| source_error(error.into()))?;
        seek(&file, SeekFrom::Start(0)).map_err(|error| source_error(error.into()))?;
        if length == 0 {
            return Err(ImportError::Empty(given.to_owned()));
        }
        let head = Head::read(&file).map_err(source_error)?;
        Ok(Self { path, file, stamp, length, head })
    }

    /// Finds out format, kind and size, and refuses what should not be read any further.
    fn inspect(self, given: &Path, options: ImportOptions, watch: &Watch) -> Result<Source, ImportError> {
        let format_error = |error| ImportError::Format { path: given.to_owned(), error };
        let Self { path, file, stamp, length, head } = self;
        let archive = options.kind.is_none() && options.format.is_none() && head.is_tar();
        let kind = options.kind.unwrap_or(if archive { ImageKind::Container } else { ImageKind::Vm });
        let format = match kind {
            ImageKind::Container if !head.is_archive() => {
                return Err(ImportError::NotAnArchive(given.to_owned()));
            }
            ImageKind::Container => {
                archive::check(&file)
                    .map_err(|error| ImportError::Archive { path: given.to_owned(), error })?;
                SourceFormat::Raw
            }
            ImageKind::Vm => head.choose(given, options.format).map_err(format_error)?,
        };
        let size = if format == SourceFormat::Raw {
            if kind == ImageKind::Vm && options.format.is_none() {
                refuse_truncated(&head, length).map_err(format_error)?;
            }
            length
        } else {
            if !options.allow_backing_files {
                head.refuse_outside_files(format).map_err(format_error)?;
            }
            match format {
                SourceFormat::Vdi => refuse_truncated_vdi(&head, length).map_err(format_error)?,
                SourceFormat::Qcow2 | SourceFormat::Vmdk => {
                    let is_qcow2 = format == SourceFormat::Qcow2;
                    let check = if is_qcow2 { qcow2::holds_its_clusters } else { vmdk::holds_its_grains };
                    let is_whole = check(&file, length)
                        .map_err(|error| ImportError::Source { path: given.to_owned(), error })?;
                    if is_qcow2 && qcow2::is_marked_corrupt(&file) {
                        return Err(format_error(FormatError::Unsound(
                            "it is marked corrupt: `qemu-img check -r all` may mend it",
                        )));
                    }
                    if !is_whole {
                        return Err(format_error(FormatError::Unsound(TRUNCATED)));
                    }
                }
                _ => {}
            }
            ask_qemu_img(given, &path, format, options, watch)?
        };
        match size {
            0 => Err(ImportError::Empty(given.to_owned())),
            size if size > SIZE_MAX => {
                Err(ImportError::TooLarge { path: given.to_owned(), error: TreeError::TooLarge(size) })
            }
            size => Ok(Source { path, file, stamp, format, kind, size }),
        }
    }
}

/// The guest-visible size, once `qemu-img` finds the image sound and names no file that it should not.
fn ask_qemu_img(
    given: &Path,
    path: &Path,
    format: SourceFormat,
    options: ImportOptions,
    watch: &Watch,
) -> Result<u64, ImportError> {
    let qemu_error = |error| qemu_error(given, given, error);
    let format_error = |error| ImportError::Format { path: given.to_owned(), error };
    let infos = qemu_img::info(path, format, options.allow_backing_files, watch).map_err(qemu_error)?;
    for info in &infos {
        let outside = info.outside_files(path).into_iter().next();
        if let Some(name) = outside.filter(|_| !options.allow_backing_files) {
            return Err(format_error(FormatError::OutsideFile(format!("'{}'", name.escape_debug()))));
        }
        if info.backing.is_some() && info.backing_format.is_none() {
            return Err(format_error(FormatError::Unsound(
                "it does not say what format its backing file has: set it (`qemu-img rebase -u -F FORMAT`)",
            )));
        }
        if info.encrypted {
            return Err(format_error(FormatError::Unsound("it is encrypted: decrypt it first")));
        }
    }
    qemu_img::check(path, format, watch).map_err(qemu_error)?;
    Ok(infos.first().map_or(0, |info| info.virtual_size))
}

/// What one pass over a disk finds out.
#[derive(Debug, Clone, Copy)]
pub(super) struct Digests {
    pub(super) root: Digest,
    pub(super) raw: Digest,
    /// Bytes of blocks that are not all zero.
    pub(super) allocated: u64,
}

/// Makes `disk` and `tree` in `scratch`, durable, of a file that nobody changes meanwhile.
fn make_disk(
    source: &Source,
    given: &Path,
    scratch: &Scratch,
    watch: &Watch,
) -> Result<Digests, ImportError> {
    let (path, tree) = (scratch.join("disk"), scratch.join("tree"));
    let target = |error| target_error(&path, error);
    if source.format != SourceFormat::Raw {
        qemu_img::convert((&source.path, source.format), (&path, SourceFormat::Raw), source.size, watch)
            .map_err(|error| qemu_error(&source.path, &path, error))?;
        let disk = File::options().read(true).write(true).open(&path).map_err(target)?;
        source.check_unchanged(given)?;
        disk.set_len(source.size).map_err(target)?;
        return digest_in_place(&disk, source.size, &tree, watch).map_err(|error| scan_error(&path, error));
    }
    let disk = File::options().read(true).write(true).create_new(true).open(&path).map_err(target)?;
    if ioctl_ficlone(&disk, &source.file).is_ok() {
        return digest_in_place(&disk, source.size, &tree, watch).map_err(|error| scan_error(&path, error));
    }
    disk.set_len(source.size).map_err(target)?;
    let source_error = |error| ImportError::Source { path: source.path.clone(), error };
    let from = Given {
        file: FileSource::new(&source.file, source.size).map_err(source_error)?,
        failed: Mutex::default(),
    };
    let copied = digest(&from, &tree, watch, |view, page| copy_data(&disk, view, page))
        .and_then(|digests| disk.sync_all().map(|()| digests).map_err(ScanError::Io));
    let digests =
        copied.map_err(|error| match from.failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            None => scan_error(&path, error),
            Some(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                ImportError::Changed(given.to_owned())
            }
            Some(error) => source_error(error),
        })?;
    source.check_unchanged(given)?;
    Ok(digests)
}

/// A given file as it is read, and how that failed: errors of the store's own files look alike.
struct Given<'a> {
    file: FileSource<'a>,
    failed: Mutex<Option<io::Error>>,
}

impl Given<'_> {
    fn noted<T>(&self, result: io::Result<T>) -> io::Result<T> {
        result.map_err(|error| {
            let kind = error.kind();
            self.failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            kind.into()
        })
    }
}

impl DiskSource for Given<'_> {
    fn size(&self) -> u64 {
        self.file.size()
    }

    fn data(&self, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        self.noted(self.file.data(range))
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.noted(self.file.read_at(buffer, offset))
    }
}

/// Makes the boot cache of a container's archive: all of it from the first byte to the last, as a hypervisor reads it,
/// so that it can be loaded while it arrives. None when it is too large for one: it is loaded all the same.
fn whole_in_order(
    scratch: &Scratch,
    root: Digest,
    size: u64,
    watch: &Watch,
) -> Result<Option<Boot>, ImportError> {
    let (path, boot) = (scratch.join("disk"), scratch.join("boot"));
    let disk = File::open(&path).map_err(|error| target_error(&path, error))?;
    let touches: Vec<Touch> = (0..blocks_for(size)).map(|block| Touch { block, time_ns: 0 }).collect();
    watch.start("compressing", size);
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let builder = Builder { root, size, touches: &touches, end_ns: 0, level: ARCHIVE_LEVEL, threads };
    let read = |extent: Extent, to: &mut [u8]| {
        if watch.is_cancelled() {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let inside = usize::try_from(size.saturating_sub(extent.offset())).unwrap_or(usize::MAX);
        let (inside, outside) = to.split_at_mut(inside.min(to.len()));
        outside.fill(0);
        disk.read_exact_at(inside, extent.offset())
    };
    let written = builder.write(&boot, &read, &|blocks| {
        watch.done.fetch_add(blocks * BLOCK_SIZE, Ordering::Relaxed);
    });
    if watch.is_cancelled() {
        return Err(ImportError::Cancelled);
    }
    if written.as_ref().is_err_and(TooScattered::is) {
        tracing::warn!(size, "the archive is too large for a boot cache: added without one");
        return Ok(None);
    }
    let written = written.map_err(|error| target_error(&boot, error))?;
    Ok(Some(Boot {
        heads_digest: written.heads_digest,
        heads_length: written.heads_length,
        file_length: written.file_length,
        until: None,
    }))
}

/// Digests the first `size` bytes of a raw disk, which must have them, and makes holes of its zero blocks. What is behind
/// them goes: a clone is of what the file has grown to since its size was looked at. Writing it out begins before the pass,
/// beside it.
fn digest_in_place(disk: &File, size: u64, tree: &Path, watch: &Watch) -> Result<Digests, ScanError> {
    let source = FileSource::new(disk, size)?;
    disk.set_len(size)?;
    let digests = thread::scope(|scope| {
        let early = scope.spawn(|| disk.sync_data());
        let digests = digest(&source, tree, watch, |view, page| punch_zeroes(disk, view, page));
        early.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        digests
    })?;
    disk.sync_all()?;
    Ok(digests)
}

/// Makes the tree of `source` at `tree`, and shows every page that is not a hole to `visit`.
pub(super) fn digest(
    source: &impl DiskSource,
    tree: &Path,
    watch: &Watch,
    visit: impl Fn(&PageView<'_>, &Page) -> io::Result<()> + Sync,
) -> Result<Digests, ScanError> {
    watch.start("hashing", source.size());
    let builder = TreeBuilder::create(tree, source.size())?;
    let blocks = AtomicU64::new(0);
    let raw = scan(source, watch, |view| {
        let Some(data) = view.data else { return Ok(()) };
        let page = Page::of(data);
        blocks.fetch_add(u64::from(page.bitmap().count_ones()), Ordering::Relaxed);
        builder.put(view.index, &page)?;
        Ok(visit(view, &page)?)
    })?;
    let root = builder.finish()?;
    Ok(Digests { root, raw, allocated: blocks.into_inner() * BLOCK_SIZE })
}

/// Writes the blocks of a page that are not all zero to the same place in `disk`.
fn copy_data(disk: &File, view: &PageView<'_>, page: &Page) -> io::Result<()> {
    let data = view.data.unwrap_or_default();
    for run in page.data_runs() {
        let end = data.len().min(run.end * BLOCK_BYTES);
        let at = run.start * BLOCK_BYTES;
        disk.write_all_at(&data[at..end], view.index * PAGE_SPAN + at as u64)?;
    }
    Ok(())
}

/// Makes holes of the blocks of a page that are all zero and not holes yet.
fn punch_zeroes(disk: &File, view: &PageView<'_>, page: &Page) -> io::Result<()> {
    let first = view.index * PAGE_SPAN;
    for run in page.zero_runs(view.data.map_or(0, |data| data.len().div_ceil(BLOCK_BYTES))) {
        let zeroes = first + (run.start * BLOCK_BYTES) as u64..first + (run.end * BLOCK_BYTES) as u64;
        for extent in view.extents.iter().take_while(|extent| extent.start < zeroes.end) {
            punch(disk, extent.start.max(zeroes.start)..extent.end.min(zeroes.end))?;
        }
    }
    Ok(())
}

fn punch(disk: &File, range: Range<u64>) -> io::Result<()> {
    if range.is_empty() {
        return Ok(());
    }
    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match fallocate(disk, mode, range.start, range.end - range.start) {
        // A file system without holes keeps the zeroes, which read the same.
        Ok(()) | Err(Errno::OPNOTSUPP) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn target_error(path: &Path, error: io::Error) -> ImportError {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ImportError::NoSpace(path.to_owned()),
        _ => ImportError::Target { path: path.to_owned(), error },
    }
}

fn qemu_error(source_path: &Path, target: &Path, error: QemuImgError) -> ImportError {
    match error {
        QemuImgError::NoSpace => ImportError::NoSpace(target.to_owned()),
        QemuImgError::Cancelled => ImportError::Cancelled,
        error => ImportError::QemuImg { path: source_path.to_owned(), error },
    }
}

fn scan_error(path: &Path, error: ScanError) -> ImportError {
    match error {
        ScanError::Cancelled => ImportError::Cancelled,
        ScanError::Io(error) | ScanError::Tree(TreeError::Io { error, .. }) => target_error(path, error),
        ScanError::Tree(error) => ImportError::TooLarge { path: path.to_owned(), error },
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The image of a disk in a store in `dir`.
    pub(crate) fn one_image(dir: &Path) -> (Store, ImageEntry) {
        let store = Store::open(&dir.join("store")).unwrap();
        let file = dir.join("disk.raw");
        fs::write(&file, [7; 9000]).unwrap();
        let (format, kind) = (Some(SourceFormat::Raw), Some(ImageKind::Vm));
        let options = ImportOptions { format, kind, ..ImportOptions::default() };
        let entry = import(&store, &"base".parse().unwrap(), &file, options, &Watch::default()).unwrap();
        (store, entry)
    }

    /// Once, an image of the old size had a disk and a tree of the new one, and could not be used.
    #[test]
    fn of_a_file_that_grows_while_it_is_added_the_size_is_taken_that_it_had() {
        let dir = tempfile::tempdir().unwrap();
        let made = |length: u64| {
            let disk = tempfile::tempfile().unwrap();
            let content: Vec<u8> = (0..length).map(|at| u8::try_from(at % 251).unwrap()).collect();
            disk.write_all_at(&content, 0).unwrap();
            let digests =
                digest_in_place(&disk, 5000, &dir.path().join(length.to_string()), &Watch::default());
            digests.map(|digests| (digests.root, digests.raw, disk.metadata().unwrap().len()))
        };
        let as_it_was = made(5000).unwrap();
        assert_eq!(as_it_was.2, 5000);
        assert_eq!(made(20_000).unwrap(), as_it_was);
        assert!(
            matches!(made(4999), Err(ScanError::Io(error)) if error.kind() == io::ErrorKind::UnexpectedEof)
        );
    }

    /// Once, what was cut off a raw file while it was read became zeroes of the image.
    #[test]
    fn a_raw_file_may_not_change_until_it_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        let path = dir.path().join("disk.raw");
        let watch = Watch::default();
        let options = ImportOptions { format: Some(SourceFormat::Raw), ..ImportOptions::default() };
        for length_after in [1 << 20, 2 << 20] {
            fs::write(&path, vec![7; 1 << 20]).unwrap();
            let source = Opened::new(&path).unwrap().inspect(&path, options, &watch).unwrap();
            let make = || make_disk(&source, &path, &store.scratch("import").unwrap(), &watch);
            make().unwrap();
            std::thread::sleep(std::time::Duration::from_millis(20));
            let file = File::options().write(true).open(&path).unwrap();
            punch(&file, 4096..1 << 20).unwrap();
            file.set_len(length_after).unwrap();
            // A clone is of one moment, whichever.
            let can_clone = ioctl_ficlone(File::create(dir.path().join("clone")).unwrap(), &file).is_ok();
            assert!(can_clone || matches!(make(), Err(ImportError::Changed(_))));
        }
    }

    #[test]
    fn a_file_whose_tables_were_checked_may_not_change_until_it_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.qcow2");
        let create = || {
            let mut create = std::process::Command::new("qemu-img");
            create.args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("1M").status().unwrap()
        };
        assert!(create().success());
        let watch = Watch::default();
        let inspect =
            || Opened::new(&path).unwrap().inspect(&path, ImportOptions::default(), &watch).unwrap();
        let source = inspect();
        source.check_unchanged(&path).unwrap();
        // Rewritten in place as its owner may, with the times that it had.
        let (file, times) = (File::options().write(true).open(&path).unwrap(), fs::metadata(&path).unwrap());
        std::thread::sleep(std::time::Duration::from_millis(20));
        file.write_all_at(b"QFI", 0).unwrap();
        file.set_modified(times.modified().unwrap()).unwrap();
        assert!(matches!(source.check_unchanged(&path), Err(ImportError::Changed(_))));
        // Another file in its place.
        let source = inspect();
        fs::rename(&path, dir.path().join("old")).unwrap();
        assert!(create().success());
        assert!(matches!(source.check_unchanged(&path), Err(ImportError::Changed(_))));
    }
}
