//! A node's copy of an image: a sparse file with each block at its own offset, and which blocks are there.
//!
//! Read-only to guests and shared by all VMs of the image. What is here is read inline from the page cache; a read of
//! what is not here tells [`Fetch`] and waits until its own blocks have come. Once everything is here the bits are no
//! longer looked at.
//!
//! Order of writes, each kept by a test: verify → write the data → set the bit in memory → wake who waits; and for
//! the disk: copy the bits → sync the data → replace the saved bits. So a saved bit always names data that was
//! synced, and after a crash nothing else is believed, but what [`LocalCache::recover`] has verified again.
//!
//! A sync that fails is told once, and the kernel may have dropped what it could not write. So everything that came
//! after the last good save is absent again, for guests, peers and the next save alike: it is fetched and written anew.
//!
//! A zero block is a hole of the file and is never written. What a crash, a failure or a lie left in the place of an absent
//! block is remembered ([`remains`]), and made a hole before that block counts as zero.
//!
//! Not here: where blocks come from, and whether they are right. Callers of [`LocalCache::insert`] have verified.

mod presence;
mod reader;
mod remains;
mod saved;
mod waiters;

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, Weak};
use std::time::Duration;

use bootcache_nbd::disk::{Attempt, BASE_ALLOCATION, BoxFuture, Disk, Features, FileRange, StatusExtent};
use roaring::RoaringBitmap;
use rustix::io::{Errno, ReadWriteFlags};
use tokio::time::Instant;

use crate::block::{BLOCK_BYTES, BLOCK_SIZE, Extent, blocks_for, bytes_in_block};
use crate::digest::Digest;
use crate::image::extents::data_extents;
use crate::image::page;
use crate::store::atomic::sync_dir;

use presence::Presence;
pub use reader::{ReadCounters, Reader};
use remains::Remains;
use waiters::Waiters;

/// The metadata context of an export that tells which bytes are on this node.
pub const CONTEXT_PRESENT: &str = "bootcache:present";
/// [`CONTEXT_PRESENT`]: the range is here.
pub const STATE_PRESENT: u32 = 1;

/// A read that waits longer is logged, and again at every multiple.
const SLOW_READ: Duration = Duration::from_secs(5);

/// How absent blocks will come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coming {
    /// The boot stream is about to bring them.
    Stream,
    /// They are fetched for this read.
    Demand,
    /// As [`Coming::Demand`], and the boot cache does not have all of them: it did not foresee this read.
    Miss,
}

/// Brings absent blocks. Owned by the transfer engine of the image.
pub trait Fetch: Send + Sync {
    /// A reader waits for the blocks of `absent`. Does not block; called once a read.
    fn want(&self, absent: &[Extent]) -> Coming;

    /// Why nothing comes whatever the sources do, for a person.
    fn hindrance(&self) -> Option<String> {
        None
    }

    /// Somebody may soon read the blocks of `absent`. Does not block; may be ignored.
    fn hint(&self, absent: &[Extent]);
}

/// One image's blocks on this node; see the module's documentation.
pub struct LocalCache {
    file: Arc<File>,
    dir: PathBuf,
    root: Digest,
    size: u64,
    presence: Presence,
    remains: Remains,
    waiters: Waiters,
    /// Its owner may be gone: then nothing comes.
    fetch: OnceLock<Weak<dyn Fetch>>,
    counters: ReadCounters,
    /// Where a guest read last, in blocks.
    last_read: AtomicU64,
    deadline: Option<Duration>,
    /// What the saved bitmap names; held while it is replaced.
    saved: Mutex<RoaringBitmap>,
    /// Shared by those who write blocks and mark them, so that none is marked of which the data was just lost.
    writing: RwLock<()>,
    /// Lets the next sync fail.
    #[cfg(test)]
    fail_sync: std::sync::atomic::AtomicBool,
}

impl LocalCache {
    /// Opens the copy of image `root` in its store folder `dir`: `disk`, and `present` unless it is complete.
    ///
    /// # Errors
    /// When the files cannot be opened, or `disk` is not `size` bytes long.
    pub fn open(dir: &Path, root: Digest, size: u64) -> io::Result<Self> {
        let complete = !dir.join("present").try_exists()?;
        let file = File::options().read(true).write(!complete).open(dir.join("disk"))?;
        if file.metadata()?.len() != size {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the image's disk file does not have the image's size: remove the image and pull it again",
            ));
        }
        let presence = Presence::new(blocks_for(size));
        let saved = if complete {
            presence.set(Extent::new(0, presence.blocks()));
            presence.snapshot()
        } else {
            let bitmap = saved::load(&dir.join("present"), root, size)?;
            for block in bitmap.iter().map(u64::from).filter(|block| *block < presence.blocks()) {
                presence.set(Extent::new(block, 1));
            }
            presence.snapshot()
        };
        Ok(Self {
            file: Arc::new(file),
            dir: dir.to_owned(),
            root,
            size,
            presence,
            remains: Remains::default(),
            waiters: Waiters::default(),
            fetch: OnceLock::new(),
            counters: ReadCounters::default(),
            last_read: AtomicU64::new(0),
            deadline: None,
            saved: Mutex::new(saved),
            writing: RwLock::new(()),
            #[cfg(test)]
            fail_sync: std::sync::atomic::AtomicBool::new(false),
        })
    }

    /// Makes an empty copy in `dir`, for [`LocalCache::open`]. Durable when it returns, but for its names.
    ///
    /// # Errors
    /// When a file cannot be made.
    pub fn create(dir: &Path, root: Digest, size: u64) -> io::Result<()> {
        let disk = File::options().write(true).create(true).truncate(true).open(dir.join("disk"))?;
        disk.set_len(size)?;
        disk.sync_all()?;
        saved::save(&dir.join("present"), root, size, &RoaringBitmap::new())
    }

    /// Ends reads that have waited `deadline` with an error. By default they wait for ever.
    #[must_use]
    pub const fn with_deadline(mut self, deadline: Option<Duration>) -> Self {
        self.deadline = deadline;
        self
    }

    /// Holds every block that is in the file against `verify`: keeps those that are right, forgets the others.
    ///
    /// With `trust_saved`, the saved bits are believed and only what was written after them is looked at, which is
    /// what a daemon that was killed had not saved yet. Returns how many blocks were won, less those lost.
    /// `verify` says whether the bytes are right; blocks it cannot judge are left as they are saved. To be called before
    /// anything is inserted: it also finds what the file has in the place of absent blocks.
    ///
    /// # Errors
    /// When the file cannot be read, or the saved bits not be replaced.
    pub fn recover(
        &mut self,
        trust_saved: bool,
        mut verify: impl FnMut(u64, &[u8]) -> io::Result<Option<bool>>,
    ) -> io::Result<i64> {
        let before = self.presence.count().cast_signed();
        let mut block_bytes = [0; BLOCK_BYTES];
        let mut wrong = Vec::new();
        for extent in data_extents(&self.file, 0..self.size) {
            let extent = extent?;
            for block in Extent::touching(extent.start, extent.end - extent.start).blocks() {
                let one = Extent::new(block, 1);
                let here = self.presence.has(one);
                if trust_saved && here {
                    continue;
                }
                let length = usize::try_from(bytes_in_block(block, self.size)).expect("at most a block");
                let bytes = &mut block_bytes[..length];
                self.file.read_exact_at(bytes, block * BLOCK_SIZE)?;
                match (verify(block, bytes)?, here) {
                    (Some(true), _) => {
                        self.presence.set(one);
                    }
                    (Some(false), true) => wrong.push(block),
                    (None, true) => {}
                    (_, false) if page::is_zero(bytes) => {}
                    (_, false) => self.remains.add(one),
                }
            }
        }
        self.forget(&wrong)?;
        Ok(self.presence.count().cast_signed() - before)
    }

    /// Says who brings absent blocks; once. Until then reads of them wait.
    pub fn set_fetch(&self, fetch: &Arc<dyn Fetch>) {
        if self.fetch.set(Arc::downgrade(fetch)).is_ok() {
            let wanted = self.waiters.wanted();
            self.want(&wanted);
        }
    }

    /// The image's identity.
    pub const fn root(&self) -> Digest {
        self.root
    }

    /// Number of blocks.
    pub const fn blocks(&self) -> u64 {
        self.presence.blocks()
    }

    /// Blocks that are here, zero blocks that are known to be zero included.
    pub fn blocks_present(&self) -> u64 {
        self.presence.count()
    }

    /// Whether every block is here.
    pub fn is_complete(&self) -> bool {
        self.presence.is_complete()
    }

    /// Whether all of `extent` is here.
    pub fn has(&self, extent: Extent) -> bool {
        self.presence.has(extent)
    }

    /// The runs of `extent` that are not here.
    pub fn absent(&self, extent: Extent) -> Vec<Extent> {
        self.presence.runs(extent, false)
    }

    /// The runs of `extent` that are here.
    pub fn present(&self, extent: Extent) -> Vec<Extent> {
        self.presence.runs(extent, true)
    }

    /// The extents that readers wait for now.
    pub fn wanted(&self) -> Vec<Extent> {
        self.waiters.wanted().into_iter().flat_map(|extent| self.absent(extent)).collect()
    }

    /// Whether a read waits to which something came less than `limit` ago, or which began to wait since then.
    pub fn waits_since(&self, limit: Duration) -> bool {
        self.waiters.any_since(limit)
    }

    /// Where the time of reads went, over all VMs.
    pub const fn counters(&self) -> &ReadCounters {
        &self.counters
    }

    /// The block at which the last read of a guest began; 0 before one has read.
    pub fn last_read(&self) -> u64 {
        self.last_read.load(Ordering::Relaxed)
    }

    /// A guest has read `length` bytes from `offset` on, and waited for them.
    fn count(&self, offset: u64, length: usize, waited: Option<(Coming, Duration)>) {
        self.last_read.store(offset / BLOCK_SIZE, Ordering::Relaxed);
        self.counters.count(length, waited);
    }

    /// Keeps verified `data`, which begins at block `start` and ends with a block or with the disk. Blocks.
    ///
    /// Zero blocks become present without being written: the file has a hole there. Whether any block was new.
    ///
    /// # Errors
    /// Of the write, or of making the hole; nothing is then marked.
    pub fn insert(&self, start: u64, data: &[u8]) -> io::Result<bool> {
        let extent = Extent::touching(start * BLOCK_SIZE, data.len() as u64);
        let bytes_of = |run: Extent| {
            let from = usize::try_from((run.start - start) * BLOCK_SIZE).expect("within the slice");
            let to = usize::try_from((run.end() - start) * BLOCK_SIZE).expect("within the slice");
            &data[from..to.min(data.len())]
        };
        let _writing = self.writing.read().unwrap_or_else(PoisonError::into_inner);
        for run in self.absent(extent) {
            let mut at = run.start;
            while at < run.end() {
                let zero = page::is_zero(bytes_of(Extent::new(at, 1)));
                let same = (at..run.end())
                    .take_while(|block| page::is_zero(bytes_of(Extent::new(*block, 1))) == zero)
                    .count() as u64;
                let part = Extent::new(at, same);
                match zero {
                    true => self.remains.clear(part, &self.file, self.size)?,
                    false => self.write_run(part, bytes_of(part))?,
                }
                at = part.end();
            }
        }
        Ok(self.mark(extent))
    }

    fn write_run(&self, extent: Extent, bytes: &[u8]) -> io::Result<()> {
        // First: who believes that the block is zero then makes no hole of these bytes.
        self.remains.remove(extent);
        self.file.write_all_at(bytes, extent.offset()).inspect_err(|_| self.remains.add(extent))
    }

    /// Marks blocks present that are known to be zero. Their place in the file is a hole, or becomes one.
    ///
    /// # Errors
    /// When the hole cannot be made; nothing is then marked.
    pub fn insert_zero(&self, extent: Extent) -> io::Result<()> {
        let _writing = self.writing.read().unwrap_or_else(PoisonError::into_inner);
        self.remains.clear(extent, &self.file, self.size)?;
        self.mark(extent);
        Ok(())
    }

    fn mark(&self, extent: Extent) -> bool {
        let fresh = self.presence.set(extent);
        if fresh {
            self.waiters.wake(extent);
        }
        fresh
    }

    /// Makes the bits of what is here durable, after its data. Blocks; call it every few seconds and before the end.
    ///
    /// When everything is here, and `may_finish`, the saved bits are removed instead. The image counts as complete from
    /// then on, so whatever else belongs to it has to be durable before. Whether it does.
    ///
    /// # Errors
    /// Of the sync: what came after the last good save is then absent again. Of replacing or removing the saved bits: all
    /// stays as it is, and the next save tries again.
    pub fn save(&self, may_finish: bool) -> io::Result<bool> {
        let mut saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner);
        let path = self.dir.join("present");
        let bitmap = self.presence.snapshot();
        let finish = may_finish && bitmap.len() == self.presence.blocks();
        if bitmap == *saved && !(finish && path.try_exists()?) {
            return Ok(finish);
        }
        if let Err(error) = self.sync() {
            let _nobody_writes = self.writing.write().unwrap_or_else(PoisonError::into_inner);
            self.take_back(&(self.presence.snapshot() - &*saved));
            return Err(error);
        }
        let write = || saved::save(&path, self.root, self.size, &bitmap);
        if finish {
            std::fs::remove_file(&path)?;
            if let Err(error) = sync_dir(&self.dir) {
                // That all is here is not known to be durable: there has to be something for the next save to remove.
                write()?;
                return Err(error);
            }
        } else {
            write()?;
        }
        *saved = bitmap;
        Ok(finish)
    }

    /// Makes `blocks` absent, whatever is in their place. Nobody may be writing.
    fn take_back(&self, blocks: &RoaringBitmap) {
        blocks.iter().for_each(|block| self.presence.forget(u64::from(block)));
        self.remains.add_all(blocks);
    }

    fn sync(&self) -> io::Result<()> {
        #[cfg(test)]
        if self.fail_sync.swap(false, std::sync::atomic::Ordering::Relaxed) {
            return Err(Errno::IO.into());
        }
        self.file.sync_data()
    }

    fn want(&self, absent: &[Extent]) -> Coming {
        match self.fetch.get().and_then(Weak::upgrade) {
            Some(fetch) if !absent.is_empty() => fetch.want(absent),
            _ => Coming::Demand,
        }
    }

    fn why_nothing_comes(&self) -> String {
        let hindrance = self.fetch.get().and_then(Weak::upgrade).and_then(|fetch| fetch.hindrance());
        hindrance.unwrap_or_else(|| "no source brings its blocks".to_owned())
    }

    /// Waits until all of `extent` is here; says what was waited for, and how long.
    async fn wait(&self, extent: Extent) -> io::Result<Option<(Coming, Duration)>> {
        if self.has(extent) {
            return Ok(None);
        }
        let waiting = self.waiters.register(extent);
        let _waiting = self.counters.begin_wait();
        let began = Instant::now();
        let absent = self.absent(extent);
        let coming = self.want(&absent);
        let mut log_at = began + SLOW_READ;
        while !self.has(extent) {
            let until = self.deadline.map_or(log_at, |deadline| log_at.min(began + deadline));
            if tokio::time::timeout_at(until, waiting.woken()).await.is_ok() {
                continue;
            }
            if self.deadline.is_some_and(|deadline| began.elapsed() >= deadline) {
                return Err(io::ErrorKind::TimedOut.into());
            }
            tracing::warn!(
                image = %self.root.short(), blocks = ?self.absent(extent), seconds = began.elapsed().as_secs(),
                "a guest's read waits: {}", self.why_nothing_comes()
            );
            log_at += SLOW_READ;
        }
        Ok(Some((coming, began.elapsed())))
    }

    fn read_now(&self, offset: u64, buf: &mut [u8]) -> Attempt {
        let slices = &mut [io::IoSliceMut::new(buf)];
        match rustix::io::preadv2(&*self.file, slices, offset, ReadWriteFlags::NOWAIT) {
            Ok(read) if read == buf.len() => Attempt::Ready(Ok(())),
            Ok(_) | Err(Errno::AGAIN | Errno::OPNOTSUPP | Errno::INTR) => Attempt::WouldBlock,
            Err(error) => Attempt::Ready(Err(error.into())),
        }
    }

    /// Reads what is here, whether or not it is in the page cache; for peers, so it does not count as a guest's read.
    ///
    /// # Errors
    /// Of this node's own disk.
    pub async fn read_present(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if let Attempt::Ready(result) = self.read_now(offset, buf) {
            return result;
        }
        let file = Arc::clone(&self.file);
        let length = buf.len();
        let read = tokio::task::spawn_blocking(move || {
            let mut bytes = vec![0; length];
            file.read_exact_at(&mut bytes, offset).map(|()| bytes)
        });
        buf.copy_from_slice(&read.await.map_err(io::Error::other)??);
        Ok(())
    }

    /// Reads what is here, on the calling thread.
    ///
    /// # Errors
    /// Of this node's own disk.
    pub fn read_blocking(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    /// Takes back that `blocks` are here: they were found to be wrong. Reads wait for them again. Blocks.
    ///
    /// # Errors
    /// When the saved bits cannot be replaced: after a crash, the blocks would be believed again.
    pub fn forget(&self, blocks: &[u64]) -> io::Result<()> {
        let number = |block: &u64| u32::try_from(*block).expect("an image has at most 2^31 blocks");
        let blocks: RoaringBitmap = blocks.iter().map(number).collect();
        {
            let _nobody_writes = self.writing.write().unwrap_or_else(PoisonError::into_inner);
            self.take_back(&blocks);
        }
        // At once: a bit that is still saved would be believed by the next start.
        let mut saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner);
        if saved.is_disjoint(&blocks) {
            return Ok(());
        }
        let without = &*saved - &blocks;
        saved::save(&self.dir.join("present"), self.root, self.size, &without)?;
        *saved = without;
        Ok(())
    }

    /// Waits until the bytes of a read are here, and counts it. What was waited for, and how long.
    async fn wait_for(&self, offset: u64, length: u64) -> io::Result<Option<(Coming, Duration)>> {
        let waited = self.wait(Extent::touching(offset, length)).await?;
        self.count(offset, usize::try_from(length).expect("a buffer's length"), waited);
        Ok(waited)
    }
}

impl fmt::Debug for LocalCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalCache")
            .field("root", &self.root.short())
            .field("blocks", &self.blocks())
            .field("present", &self.blocks_present())
            .finish_non_exhaustive()
    }
}

impl Disk for LocalCache {
    fn size(&self) -> u64 {
        self.size
    }

    fn features(&self) -> Features {
        Features { prefetch: true, ..Features::READ_ONLY }
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Attempt {
        if !self.presence.has(Extent::touching(offset, buf.len() as u64)) {
            return Attempt::WouldBlock;
        }
        let attempt = self.read_now(offset, buf);
        if matches!(attempt, Attempt::Ready(Ok(()))) {
            self.count(offset, buf.len(), None);
        }
        attempt
    }

    fn in_file(&self, offset: u64, length: usize) -> Option<FileRange> {
        let present = self.presence.has(Extent::touching(offset, length as u64));
        present.then(|| FileRange { file: Arc::<File>::clone(&self.file), offset })
    }

    fn note_read(&self, offset: u64, length: usize) {
        self.count(offset, length, None);
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async move {
            self.wait_for(offset, buf.len() as u64).await?;
            self.read_present(offset, buf).await
        })
    }

    fn contexts(&self) -> &'static [&'static str] {
        &[BASE_ALLOCATION, CONTEXT_PRESENT]
    }

    fn status(
        &self,
        context: &str,
        offset: u64,
        length: u64,
        extents_max: usize,
    ) -> BoxFuture<'_, io::Result<Vec<StatusExtent>>> {
        let here = context == CONTEXT_PRESENT;
        Box::pin(async move {
            if !here {
                return Ok(vec![StatusExtent { length, flags: 0 }]);
            }
            Ok(self.present_status(offset, length, extents_max))
        })
    }

    fn prefetch(&self, offset: u64, length: u64) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move {
            let absent = self.absent(Extent::touching(offset, length));
            if let Some(fetch) = self.fetch.get().and_then(Weak::upgrade).filter(|_| !absent.is_empty()) {
                fetch.hint(&absent);
            }
            Ok(())
        })
    }
}

impl LocalCache {
    fn present_status(&self, offset: u64, length: u64, extents_max: usize) -> Vec<StatusExtent> {
        let end = offset + length;
        let range = Extent::touching(offset, length);
        let mut status = Vec::new();
        let mut at = offset;
        let mut push = |until: u64, flags: u32| {
            if until > at && status.len() < extents_max {
                status.push(StatusExtent { length: until - at, flags });
                at = until;
            }
        };
        // Each of them makes one extent at least. There may be as many as every other block of the disk.
        for run in self.presence.first_runs(range, true, extents_max) {
            push(run.offset().clamp(offset, end), 0);
            push((run.end() * BLOCK_SIZE).clamp(offset, end), STATE_PRESENT);
        }
        push(end, 0);
        status
    }
}

#[cfg(test)]
mod tests;
