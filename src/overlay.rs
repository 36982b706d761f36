//! A VM's private, writable layer over an image that never changes.
//!
//! A block that the VM wrote is in the *diff*, a sparse file with every block at its own offset; which blocks those are
//! says the *index*, two bits a block in memory ([`map`]) and a log of runs on disk ([`log`]). Everything else is read
//! from the base. Reads need no lock ([`layer`]); how writes merge is in [`mod@write`], what FLUSH and FUA do, in which
//! order and why, in [`flush`]. Sealed ([`seal`]), two such files are an incremental image.
//!
//! It knows nothing of names or folders beyond its own two files; one process has them open at a time.
//!
//! Invariants: after a crash of the machine at any instant each block holds what was last flushed, or something newer;
//! after `kill -9` of the process it holds what was last answered ([`live`]).

mod dirty;
mod flush;
pub(crate) mod layer;
mod live;
mod log;
mod map;
mod range_lock;
mod seal;
mod storage;
mod write;

#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod odd_diff_tests;
#[cfg(test)]
mod tests;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bootcache_nbd::layers::InlineWrites;
use bootcache_nbd::{Attempt, BoxFuture, Disk, Features, SharedDisk, StatusExtent, ZeroFlags};
use tokio::sync::Semaphore;

use crate::digest::Digest;
use crate::image_disk::padded::Padded;
use crate::store::atomic::sync_dir;
use dirty::DirtySet;
use flush::Flusher;
use layer::Layer;
use live::{Live, Owner};
use log::Log;
pub use log::{Header, IndexError, SIZE_MAX};
use map::BlockMap;
pub use map::{BlockState, Run};
use range_lock::RangeLock;
pub use seal::{DISK_FILE, Sealed};
pub use storage::{DiffFile, FileDiff, FileLog, LogFile, ReplaceError};

/// The index's file name within an overlay's folder.
pub const INDEX_FILE: &str = "index";
/// The diff's file name within an overlay's folder.
pub const DIFF_FILE: &str = "diff";
/// The name of the file within an overlay's folder with its map while it is open.
pub const LIVE_FILE: &str = "live";
/// Threads that change one overlay at once: most of the time they take turns at the diff's own lock.
const TURNS: usize = 8;

/// Why an overlay cannot be made or opened.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// Its index is bad.
    #[error("cannot use the index {path}: {error}")]
    Index { path: String, error: IndexError },
    /// Its diff is bad.
    #[error("cannot use the diff {path}: {error}")]
    Diff { path: String, error: io::Error },
    /// Its live map, which may hold more than the index, cannot be used.
    #[error(
        "cannot use the live map {path}: {error}; it may tell of writes that were answered and not flushed: without \
         the file the overlay is what was last flushed"
    )]
    Live { path: String, error: io::Error },
    /// Another process has it open.
    #[error("the overlay {0} is in use by another process; stop its VM or its server first")]
    InUse(String),
    /// It belongs to another image.
    #[error("the overlay was made over image {expected}, not over {found}")]
    OtherBase { expected: String, found: String },
    /// It belongs to a disk of another size.
    #[error("the overlay was made over a disk of {expected} bytes, not of {found}")]
    OtherSize { expected: u64, found: u64 },
}

/// An overlay, open for reading and writing. Owner of its map, its diff and its index.
#[derive(Debug, Clone)]
pub struct Overlay(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    layer: Layer,
    /// Where the map outlives this process; none when it could not be made.
    live: Option<Live>,
    header: Header,
    dirty: DirtySet,
    locks: RangeLock,
    /// Who has one may take a thread to wait for a range's lock and change the diff.
    turns: Arc<Semaphore>,
    inline: InlineWrites,
    /// Count of changes, so that a flush with nothing to do costs nothing.
    written: AtomicU64,
    flusher: Flusher,
    latched: AtomicBool,
    sealed: AtomicBool,
}

/// How much an overlay holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Blocks in the diff.
    pub data_blocks: u64,
    /// Blocks that read as zeroes whatever the base has.
    pub zero_blocks: u64,
}

impl Overlay {
    /// Makes an empty overlay in the folder `dir`, which is made if it is missing, over an image of `size` bytes, or fewer.
    ///
    /// Durable when it returns. The diff comes first: a folder without an index is no overlay.
    pub fn create(dir: &Path, base: Digest, size: u64) -> Result<(), OverlayError> {
        let (index, diff) = (dir.join(INDEX_FILE), dir.join(DIFF_FILE));
        if size > SIZE_MAX {
            return Err(index_error(&index, IndexError::TooLarge(size)));
        }
        std::fs::create_dir_all(dir)
            .and_then(|()| dir.parent().map_or(Ok(()), sync_dir))
            .and_then(|()| FileDiff::create(&diff, size))
            .map_err(|error| OverlayError::Diff { path: diff.display().to_string(), error })?;
        FileLog::create(&index, &Header { base, size }.encode())
            .map_err(|error| index_error(&index, error.into()))?;
        Ok(())
    }

    /// What the overlay in `dir` was made over, and how much it held when it was last flushed, without opening it.
    pub fn stored(dir: &Path) -> Result<(Header, Usage), OverlayError> {
        let (header, runs) = read_index(&dir.join(INDEX_FILE))?;
        let (data_blocks, zero_blocks) = map_of(header.size, &runs).counts();
        Ok((header, Usage { data_blocks, zero_blocks }))
    }

    /// Opens the overlay in `dir` over `base`, whose root digest must be `base_root`. A larger overlay has zeroes behind
    /// the end of its base.
    pub fn open(dir: &Path, base: SharedDisk, base_root: Digest) -> Result<Self, OverlayError> {
        let (index, diff) = (dir.join(INDEX_FILE), dir.join(DIFF_FILE));
        let diff_error = |error: io::Error| match error.kind() {
            io::ErrorKind::WouldBlock => OverlayError::InUse(dir.display().to_string()),
            _ => OverlayError::Diff { path: diff.display().to_string(), error },
        };
        let diff_file = FileDiff::open(&diff).map_err(diff_error)?;
        let length = diff_file.length().map_err(diff_error)?;
        let log_file = FileLog::open(&index).map_err(|error| index_error(&index, error.into()))?;
        let (log, runs) = Log::open(Arc::new(log_file)).map_err(|error| index_error(&index, error))?;
        let header = log.header();
        let indexed = map_of(header.size, &runs);
        let owner = Owner { header: &header, batch: log.batch(), diff: diff_file.file() };
        let live = dir.join(LIVE_FILE);
        let live = match Live::open(&live, &owner, &indexed) {
            Ok(live) => Some(live),
            // Going by the index would lose what a killed process had answered. And it would leave the file to the next
            // process, which would believe it: behind the flushes of this one.
            Err(error) if !matches!(live.try_exists(), Ok(false)) => {
                return Err(OverlayError::Live { path: live.display().to_string(), error });
            }
            Err(error) => {
                tracing::warn!(overlay = %dir.display(), %error, "no live map: a kill would lose unflushed writes");
                None
            }
        };
        let base = padded(base, header.size);
        let overlay = Self::assemble(log, indexed, live, Arc::new(diff_file), base);
        if header.base != base_root {
            return Err(OverlayError::OtherBase { expected: header.base.short(), found: base_root.short() });
        }
        for found in [overlay.0.layer.base.size(), length] {
            if found != header.size {
                return Err(OverlayError::OtherSize { expected: header.size, found });
            }
        }
        Ok(overlay)
    }

    /// Opens an overlay on any two files. The sizes of log, diff and base must agree.
    pub fn from_files(
        log: Arc<dyn LogFile>,
        diff: Arc<dyn DiffFile>,
        base: SharedDisk,
    ) -> Result<Self, IndexError> {
        let (log, runs) = Log::open(log)?;
        let indexed = map_of(log.header().size, &runs);
        Ok(Self::assemble(log, indexed, None, diff, base))
    }

    /// `indexed` is what the log says; with `live` comes what was answered since by a process that was killed.
    fn assemble(
        log: Log,
        indexed: BlockMap,
        live: Option<(Live, Option<BlockMap>)>,
        diff: Arc<dyn DiffFile>,
        base: SharedDisk,
    ) -> Self {
        let header = log.header();
        let dirty = DirtySet::new(indexed.words().len());
        let (live, left) = live.unzip();
        let map = match left.flatten() {
            Some(left) => {
                left.differences(&indexed, |word, bits| dirty.mark(word, bits));
                left
            }
            None => indexed,
        };
        Self(Arc::new(Inner {
            layer: Layer { map: Arc::new(map), diff, base, size: header.size },
            live,
            header,
            dirty,
            locks: RangeLock::default(),
            turns: Arc::new(Semaphore::new(TURNS)),
            inline: InlineWrites::default(),
            // The first flush syncs the diff whatever comes before it: blocks may have been written over by a process
            // that was killed.
            written: AtomicU64::new(1),
            flusher: Flusher::new(log),
            latched: AtomicBool::new(false),
            sealed: AtomicBool::new(false),
        }))
    }

    /// Root digest of the image below.
    pub fn base_root(&self) -> Digest {
        self.0.header.base
    }

    /// How much it holds now.
    pub fn usage(&self) -> Usage {
        let (data_blocks, zero_blocks) = self.0.layer.map.counts();
        Usage { data_blocks, zero_blocks }
    }

    /// Whether a sync has failed, so that writes are refused until the overlay is opened again.
    pub fn is_latched(&self) -> bool {
        self.0.latched.load(Ordering::SeqCst)
    }
}

/// The map that a log's runs add up to.
fn map_of(size: u64, runs: &[Run]) -> BlockMap {
    let map = BlockMap::new(size);
    for run in runs {
        map.set(run.extent, run.state, |_, _| ());
    }
    map
}

fn index_error(path: &Path, error: IndexError) -> OverlayError {
    OverlayError::Index { path: path.display().to_string(), error }
}

/// What the index file at `path` says: the runs that are not absent, in ascending order, without overlaps.
pub fn read_index(path: &Path) -> Result<(Header, Vec<Run>), OverlayError> {
    let bytes = std::fs::read(path).map_err(|error| index_error(path, error.into()))?;
    let content = log::parse(&bytes).map_err(|error| index_error(path, error))?;
    Ok((content.header, map_of(content.header.size, &content.runs).own_runs()))
}

/// Makes the index file at `path` say this, durably and atomically. `runs` lie within the disk.
pub fn write_index(path: &Path, header: Header, runs: &[Run]) -> Result<(), OverlayError> {
    FileLog::create(path, &log::encode(header, runs)).map_err(|error| index_error(path, error.into()))?;
    Ok(())
}

/// The reading half of an increment: its `index` and `disk` over its base, which is as large or smaller.
pub(crate) fn open_increment(
    index: &Path,
    disk: Arc<dyn DiffFile>,
    base: SharedDisk,
) -> Result<(Header, Layer), OverlayError> {
    let (header, runs) = read_index(index)?;
    if header.size < base.size() {
        return Err(OverlayError::OtherSize { expected: header.size, found: base.size() });
    }
    let map = Arc::new(map_of(header.size, &runs));
    Ok((header, Layer { map, diff: disk, base: padded(base, header.size), size: header.size }))
}

/// `base` with zeroes behind its end, when it is smaller than `size`.
fn padded(base: SharedDisk, size: u64) -> SharedDisk {
    if base.size() < size { Arc::new(Padded { disk: base, size }) } else { base }
}

impl Disk for Overlay {
    fn size(&self) -> u64 {
        self.0.layer.size
    }

    fn features(&self) -> Features {
        let base = self.0.layer.base.features();
        Features { fast_zero: true, prefetch: true, rotational: base.rotational, ..Features::WRITABLE }
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Attempt {
        self.0.layer.try_read(offset, buf)
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(self.0.layer.read(offset, buf))
    }

    fn try_write(&self, offset: u64, data: &[u8]) -> Attempt {
        self.0.try_write(offset, data)
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8], fua: bool) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async move {
            // The server has tried a plain write already; one with FUA comes here at once.
            match if fua { self.0.try_write(offset, data) } else { Attempt::WouldBlock } {
                Attempt::Ready(result) => result?,
                Attempt::WouldBlock => self.0.write(offset, data).await?,
            }
            self.flush_if(fua).await
        })
    }

    fn flush(&self) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(self.0.flush())
    }

    fn trim(&self, offset: u64, length: u64, fua: bool) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move {
            self.0.trim(offset, length).await?;
            self.flush_if(fua).await
        })
    }

    fn zero(&self, offset: u64, length: u64, flags: ZeroFlags, fua: bool) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move {
            self.0.zero(offset, length, flags).await?;
            self.flush_if(fua).await
        })
    }

    fn contexts(&self) -> &'static [&'static str] {
        self.0.layer.base.contexts()
    }

    fn status(
        &self,
        context: &str,
        offset: u64,
        length: u64,
        extents_max: usize,
    ) -> BoxFuture<'_, io::Result<Vec<StatusExtent>>> {
        let context = context.to_owned();
        Box::pin(async move { self.0.layer.status(&context, offset, length, extents_max).await })
    }

    fn prefetch(&self, offset: u64, length: u64) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(self.0.layer.prefetch(offset, length))
    }
}

impl Overlay {
    async fn flush_if(&self, fua: bool) -> io::Result<()> {
        if fua { self.0.flush().await } else { Ok(()) }
    }
}
