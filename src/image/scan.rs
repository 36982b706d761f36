//! One pass over a whole disk, by all cores: every page to a visitor, and the plain BLAKE3 of the disk, as `b3sum`
//! prints it.
//!
//! BLAKE3 is a binary tree, so each thread hashes aligned units of 16 MiB on its own while the bytes are in its cache,
//! and the units' values are joined at the end. Holes are not read: their share of the hash comes from a page of zeroes.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use blake3::hazmat::{ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};

use crate::digest::Digest;

use super::extents::data_extents;
use super::page::PAGE_SPAN;
use super::tree::TreeError;

/// Bytes that a thread takes at a time; a power of two, so that it is a subtree of the hash.
const UNIT: u64 = 16 << 20;
const PAGE_BYTES: usize = 512 << 10;
const THREADS_MAX: usize = 8;

static ZERO_PAGE: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

/// How far a long piece of work is, and whether it is to end. Shared between who works and who watches.
#[derive(Debug, Default)]
pub struct Watch {
    /// What is being done, in one word.
    stage: Mutex<&'static str>,
    /// Bytes that are to be done; 0 when it is not known yet.
    pub total: AtomicU64,
    /// Bytes that are done.
    pub done: AtomicU64,
    /// Set it to end the work; it then cleans up and fails with its own error for that.
    pub cancelled: AtomicBool,
}

impl Watch {
    /// Starts a stage of `total` bytes.
    pub(super) fn start(&self, stage: &'static str, total: u64) {
        *self.stage.lock().unwrap_or_else(PoisonError::into_inner) = stage;
        self.done.store(0, Ordering::Relaxed);
        self.total.store(total, Ordering::Relaxed);
    }

    /// What is being done, in one word for a person.
    pub fn stage(&self) -> &'static str {
        *self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the work is to end.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}

/// Why a scan ended early.
#[derive(Debug, thiserror::Error)]
pub enum ScanError {
    /// Reading the disk, or what the visitor wrote, failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The digest tree could not be written.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// The watcher wanted it.
    #[error("interrupted")]
    Cancelled,
}

/// A disk to scan.
pub trait DiskSource: Sync {
    /// Bytes of it.
    fn size(&self) -> u64;

    /// The parts of `range` that may hold something other than zeroes, in order.
    ///
    /// # Errors
    /// Those of the file system.
    fn data(&self, range: Range<u64>) -> io::Result<Vec<Range<u64>>>;

    /// Fills `buffer` from byte `offset`.
    ///
    /// # Errors
    /// Those of the file system; a disk that is shorter than its size is one.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
}

/// A raw disk in a file.
#[derive(Debug)]
pub struct FileSource<'a> {
    file: &'a File,
    size: u64,
}

impl<'a> FileSource<'a> {
    /// The first `size` bytes of `file`, which must have them: what lies past a file's end would pass for a hole.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] when it is shorter.
    pub fn new(file: &'a File, size: u64) -> io::Result<Self> {
        // Seeking also tells the length of a block device.
        if rustix::fs::seek(file, rustix::fs::SeekFrom::End(0))? < size {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("it is shorter than {size} bytes"),
            ));
        }
        Ok(Self { file, size })
    }
}

impl DiskSource for FileSource<'_> {
    fn size(&self) -> u64 {
        self.size
    }

    fn data(&self, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        data_extents(self.file, range).collect()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }
}

/// A page of the disk, as a visitor sees it.
#[derive(Debug)]
pub struct PageView<'a> {
    /// Its number.
    pub index: u64,
    /// Its bytes, fewer than 512 KiB at the end of the disk; none when all of it is a hole.
    pub data: Option<&'a [u8]>,
    /// The parts of the disk, in bytes, that are not holes; only those that overlap the page count.
    pub extents: &'a [Range<u64>],
}

/// Shows every page to `visit`, each once, in no certain order and from several threads, and returns the plain
/// BLAKE3 of the disk.
///
/// # Errors
/// The first that reading or visiting gave; [`ScanError::Cancelled`].
pub fn scan<S, V>(source: &S, watch: &Watch, visit: V) -> Result<Digest, ScanError>
where
    S: DiskSource,
    V: Fn(&PageView<'_>) -> Result<(), ScanError> + Sync,
{
    let units = source.size().div_ceil(UNIT);
    if units <= 1 {
        let hasher = scan_unit(source, 0, watch, &AtomicBool::new(false), &visit)?;
        return Ok(hasher.finalize().into());
    }
    let (next, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let work = || {
        let mut values = Vec::new();
        loop {
            let unit = next.fetch_add(1, Ordering::Relaxed);
            if unit >= units || stop.load(Ordering::Relaxed) {
                return Ok(values);
            }
            match scan_unit(source, unit, watch, &stop, &visit) {
                Ok(hasher) => values.push((unit, hasher.finalize_non_root())),
                Err(error) => {
                    stop.store(true, Ordering::Relaxed);
                    return Err(error);
                }
            }
        }
    };
    let mut values = on_all_cores(work)?;
    values.sort_by_key(|(unit, _)| *unit);
    let values: Vec<ChainingValue> = values.into_iter().map(|(_, value)| value).collect();
    let (left, right) = split(&values);
    Ok(merge_subtrees_root(&merge(left), &merge(right), Mode::Hash).into())
}

fn on_all_cores<T: Send>(work: impl Fn() -> Result<Vec<T>, ScanError> + Sync) -> Result<Vec<T>, ScanError> {
    let threads = thread::available_parallelism().map_or(1, |count| count.get().min(THREADS_MAX));
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(&work)).collect();
        let results: Vec<_> = workers
            .into_iter()
            .map(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect();
        // One thread's error makes the others say "cancelled": its own tells more.
        let (mut all, mut failure) = (Vec::new(), None);
        for result in results {
            match result {
                Ok(values) => all.extend(values),
                Err(error) if matches!(failure, None | Some(ScanError::Cancelled)) => failure = Some(error),
                Err(_) => {}
            }
        }
        failure.map_or(Ok(all), Err)
    })
}

/// BLAKE3's shape: the left subtree is the largest power of two that leaves something for the right one.
fn split(values: &[ChainingValue]) -> (&[ChainingValue], &[ChainingValue]) {
    values.split_at(values.len().next_power_of_two() / 2)
}

fn merge(values: &[ChainingValue]) -> ChainingValue {
    if let [value] = values {
        return *value;
    }
    let (left, right) = split(values);
    merge_subtrees_non_root(&merge(left), &merge(right), Mode::Hash)
}

fn scan_unit<S: DiskSource>(
    source: &S,
    unit: u64,
    watch: &Watch,
    stop: &AtomicBool,
    visit: &impl Fn(&PageView<'_>) -> Result<(), ScanError>,
) -> Result<blake3::Hasher, ScanError> {
    let range = unit * UNIT..((unit + 1) * UNIT).min(source.size());
    let extents = source.data(range.clone())?;
    let mut hasher = blake3::Hasher::new();
    hasher.set_input_offset(range.start);
    let mut buffer = vec![0; if extents.is_empty() { 0 } else { PAGE_BYTES }];
    let mut rest = &extents[..];
    for index in range.start / PAGE_SPAN..range.end.div_ceil(PAGE_SPAN) {
        if watch.is_cancelled() || stop.load(Ordering::Relaxed) {
            return Err(ScanError::Cancelled);
        }
        let at = index * PAGE_SPAN;
        let end = (at + PAGE_SPAN).min(range.end);
        let length = usize::try_from(end - at).expect("a page spans 512 KiB");
        rest = &rest[rest.partition_point(|extent| extent.end <= at)..];
        if rest.first().is_some_and(|extent| extent.start < end) {
            let data = &mut buffer[..length];
            source.read_at(data, at)?;
            hasher.update(data);
            visit(&PageView { index, data: Some(data), extents: rest })?;
        } else {
            hasher.update(&ZERO_PAGE[..length]);
            visit(&PageView { index, data: None, extents: &[] })?;
        }
        watch.done.fetch_add(end - at, Ordering::Relaxed);
    }
    Ok(hasher)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sparse(size: u64, blocks: &[u64]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        for at in blocks {
            file.write_all_at(&[7; 1000], *at).unwrap();
        }
        file
    }

    #[test]
    fn agrees_with_plain_blake3_at_every_shape_of_the_tree() {
        for size in
            [0, 1, 4096, UNIT - 1, UNIT, UNIT + 1, 2 * UNIT, 3 * UNIT + 512, 5 * UNIT, 7 * UNIT + 77_777]
        {
            let blocks: Vec<u64> =
                [0, 3_000_000, 17 << 20, 50 << 20].into_iter().filter(|at| at + 1000 < size).collect();
            let file = sparse(size, &blocks);
            let mut model = blake3::Hasher::new();
            model.update_reader(&file).unwrap();
            let seen = Mutex::new(Vec::new());
            let digest = scan(&FileSource::new(&file, size).unwrap(), &Watch::default(), |page| {
                seen.lock().unwrap().push((page.index, page.data.map(<[u8]>::to_vec)));
                Ok(())
            })
            .unwrap();
            assert_eq!(digest, model.finalize().into(), "{size} bytes");
            let mut seen = seen.into_inner().unwrap();
            seen.sort();
            assert_eq!(seen.len() as u64, size.div_ceil(PAGE_SPAN));
            for (index, data) in seen {
                if let Some(data) = data {
                    let mut expected = vec![0; data.len()];
                    file.read_exact_at(&mut expected, index * PAGE_SPAN).unwrap();
                    assert_eq!(data, expected);
                }
            }
        }
    }

    #[test]
    fn a_file_that_is_shorter_than_the_disk_is_refused() {
        assert!(FileSource::new(&sparse(10_000, &[]), 10_001).is_err());
    }

    #[test]
    fn the_first_error_of_a_visitor_ends_the_scan() {
        let file = sparse(100 << 20, &[0, 60 << 20]);
        let source = FileSource::new(&file, 100 << 20).unwrap();
        let result = scan(&source, &Watch::default(), |page| match page.data {
            Some(_) => Err(io::Error::other("full").into()),
            None => Ok(()),
        });
        assert!(matches!(result, Err(ScanError::Io(_))));
    }

    #[test]
    fn a_cancelled_scan_says_so() {
        let file = sparse(100 << 20, &[]);
        let watch = Watch::default();
        watch.cancelled.store(true, Ordering::Relaxed);
        let source = FileSource::new(&file, 100 << 20).unwrap();
        assert!(matches!(scan(&source, &watch, |_| Ok(())), Err(ScanError::Cancelled)));
    }
}
