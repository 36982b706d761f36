//! The tracer's trace file: made before the traced process starts, watched while it runs, read when it has ended.
//!
//! The layout is that of `tracer/src/format.rs`, written here a second time: linking the tracer into this program
//! would put its hooks in front of our own calls. A trace is believed only when nothing says that reads are missing.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use crate::boot_cache::recording::{Read, Recording};

const MAGIC: &[u8; 16] = b"bootcache trace\0";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 4096;
const RECORD_BYTES: usize = 32;
/// Reads that a trace has room for: many times what a boot makes, in 64 MiB.
const CAPACITY: u64 = 1 << 21;
const CAPACITY_MAX: u64 = 1 << 24;

const ATTACHED_AT: u64 = 56;
const CLAIMED_AT: u64 = 64;

const OVERFLOW: u32 = 1;
const IO_URING: u32 = 1 << 1;
const IO_URING_UNKNOWN: u32 = 1 << 2;
const MAPPED: u32 = 1 << 3;
const UNSEEN: u32 = 1 << 4;

/// Why a trace cannot be taken for everything that was read.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// No process loaded the tracer.
    #[error("the tracer was not loaded: the program is static, or not allowed LD_PRELOAD")]
    NotAttached,
    /// Processes loaded the tracer and read nothing of the image.
    #[error("no read of the image was seen")]
    NoReads,
    /// Reads that the tracer does not record.
    #[error("the image was read by {0}, which the tracer cannot record")]
    Unseen(&'static str),
    /// More reads than there is room for.
    #[error("there were more than {0} reads, more than a trace holds")]
    Overflow(u64),
    /// Not what this program wrote, or of another image.
    #[error("the trace {} is damaged: {what}", path.display())]
    Damaged { path: PathBuf, what: &'static str },
    /// The file system says no.
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

impl TraceError {
    /// Whether the NBD export would see what the tracer did not.
    pub fn is_incomplete(&self) -> bool {
        matches!(self, Self::NotAttached | Self::NoReads | Self::Unseen(_) | Self::Overflow(_))
    }

    /// What a person can do about it.
    pub fn advice(&self) -> &'static str {
        match self {
            Self::NotAttached | Self::Unseen(_) | Self::Overflow(_) => "use --via nbd",
            Self::NoReads => "was it opened at all? a static program needs --via nbd",
            Self::Damaged { .. } => "record again",
            Self::Io { .. } => "is there room for it in the store?",
        }
    }
}

/// A trace of one file, perhaps still being written by the traced process.
#[derive(Debug)]
pub struct Trace {
    file: File,
    path: PathBuf,
    start_ns: u64,
}

impl Trace {
    /// Makes an empty trace at `path`, which must not exist, of reads of `image`.
    ///
    /// # Errors
    /// [`TraceError::Io`].
    pub fn create(path: &Path, image: &Path) -> Result<Self, TraceError> {
        let at = |path: &Path| {
            let path = path.to_owned();
            move |source| TraceError::Io { path, source }
        };
        let meta = std::fs::metadata(image).map_err(at(image))?;
        let file = File::options().read(true).write(true).create_new(true).open(path).map_err(at(path))?;
        let length = HEADER_BYTES as u64 + CAPACITY * RECORD_BYTES as u64;
        reserve(&file, length).map_err(at(path))?;
        let start_ns = now_ns();
        let header_bytes = 4096_u32;
        let header = [
            MAGIC.as_slice(),
            &VERSION.to_ne_bytes(),
            &header_bytes.to_ne_bytes(),
            &CAPACITY.to_ne_bytes(),
            &meta.dev().to_ne_bytes(),
            &meta.ino().to_ne_bytes(),
            &start_ns.to_ne_bytes(),
        ]
        .concat();
        file.write_all_at(&header, 0).map_err(at(path))?;
        Ok(Self { file, path: path.to_owned(), start_ns })
    }

    /// Opens a trace, for instance one that the tracer made by itself.
    ///
    /// # Errors
    /// [`TraceError::Io`], [`TraceError::Damaged`].
    pub fn open(path: &Path) -> Result<Self, TraceError> {
        let io = |source| TraceError::Io { path: path.to_owned(), source };
        let file = File::open(path).map_err(io)?;
        let mut trace = Self { file, path: path.to_owned(), start_ns: 0 };
        trace.start_ns = trace.header()?.start_ns;
        Ok(trace)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How long ago it was made, in ns: the clock of its records.
    pub fn elapsed_ns(&self) -> u64 {
        now_ns().saturating_sub(self.start_ns)
    }

    /// Reads seen so far.
    ///
    /// # Errors
    /// [`TraceError::Io`].
    pub fn reads(&self) -> Result<u64, TraceError> {
        let mut claimed = [0; 8];
        self.read_at(&mut claimed, CLAIMED_AT)?;
        Ok(u64::from_ne_bytes(claimed))
    }

    /// Whether a process has loaded the tracer.
    ///
    /// # Errors
    /// [`TraceError::Io`].
    pub fn is_attached(&self) -> Result<bool, TraceError> {
        let mut attached = [0; 4];
        self.read_at(&mut attached, ATTACHED_AT)?;
        Ok(u32::from_ne_bytes(attached) > 0)
    }

    /// Whether everything that was read so far is in it.
    ///
    /// # Errors
    /// [`TraceError::Unseen`], [`TraceError::Overflow`], [`TraceError::Damaged`], [`TraceError::Io`].
    pub fn check(&self) -> Result<(), TraceError> {
        let header = self.header()?;
        let unseen = [
            (IO_URING, "io_uring"),
            (IO_URING_UNKNOWN, "a program with an io_uring of its own"),
            (MAPPED, "mapping it into memory"),
            (UNSEEN, "stdio or POSIX aio"),
        ];
        if let Some((_, by)) = unseen.iter().find(|(flag, _)| header.flags & flag != 0) {
            return Err(TraceError::Unseen(by));
        }
        if header.flags & OVERFLOW != 0 || header.claimed > header.capacity {
            return Err(TraceError::Overflow(header.capacity));
        }
        Ok(())
    }

    /// What was asked for of an image of `size` bytes until `end_ns`, on the clock of [`Trace::elapsed_ns`].
    ///
    /// # Errors
    /// Every [`TraceError`]: a recording is made only of a trace that is whole.
    pub fn recording(&self, size: u64, end_ns: u64) -> Result<Recording, TraceError> {
        self.check()?;
        if !self.is_attached()? {
            return Err(TraceError::NotAttached);
        }
        let count = usize::try_from(self.header()?.claimed).expect("no more than the capacity, by the check");
        let mut bytes = vec![0; count * RECORD_BYTES];
        self.read_at(&mut bytes, HEADER_BYTES as u64)?;
        let reads = bytes.chunks_exact(RECORD_BYTES).filter_map(|record| self.read_of(record, size));
        let reads: Vec<Read> = reads.filter(|read| read.time_ns <= end_ns).collect();
        if reads.is_empty() { Err(TraceError::NoReads) } else { Ok(Recording::new(reads, end_ns)) }
    }

    /// A record without a time was claimed by a process that was killed before it could write it: that read was not
    /// answered. What libaio asks for may reach beyond the image's end.
    fn read_of(&self, record: &[u8], size: u64) -> Option<Read> {
        let [offset, length, took_ns, time_ns] = [0, 1, 2, 3].map(|field| u64_at(record, field * 8));
        let length = length.min(size.saturating_sub(offset));
        let time_ns = (time_ns > 0).then(|| time_ns.saturating_sub(self.start_ns))?;
        (length > 0).then_some(Read { offset, length, time_ns, took_ns })
    }

    fn header(&self) -> Result<Header, TraceError> {
        let mut bytes = [0; 72];
        self.read_at(&mut bytes, 0)?;
        let damaged = |what| TraceError::Damaged { path: self.path.clone(), what };
        if !bytes.starts_with(MAGIC) {
            return Err(damaged("it is not a trace"));
        }
        if u32_at(&bytes, 16) != VERSION {
            return Err(damaged("its version is not known"));
        }
        let header = Header {
            capacity: u64_at(&bytes, 24),
            start_ns: u64_at(&bytes, 48),
            flags: u32_at(&bytes, 60),
            claimed: u64_at(&bytes, 64),
        };
        if header.capacity > CAPACITY_MAX {
            return Err(damaged("it claims to be too large"));
        }
        Ok(header)
    }

    fn read_at(&self, to: &mut [u8], offset: u64) -> Result<(), TraceError> {
        self.file.read_exact_at(to, offset).map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof => {
                TraceError::Damaged { path: self.path.clone(), what: "it is cut short" }
            }
            _ => TraceError::Io { path: self.path.clone(), source },
        })
    }
}

/// Makes the empty `file` `length` zeroes long. The tracer maps it: a hole on a full disk would kill the traced process, so
/// where a file system cannot keep space, the zeroes are written.
fn reserve(mut file: &File, length: u64) -> io::Result<()> {
    match fallocate(file, FallocateFlags::empty(), 0, length) {
        Err(Errno::OPNOTSUPP) => io::copy(&mut io::repeat(0).take(length), &mut file).map(drop),
        result => Ok(result?),
    }
}

struct Header {
    capacity: u64,
    start_ns: u64,
    flags: u32,
    claimed: u64,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(*bytes[at..].first_chunk().expect("the layout's offsets lie within it"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(*bytes[at..].first_chunk().expect("the layout's offsets lie within it"))
}

/// CLOCK_MONOTONIC, which the tracer stamps reads with.
fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let part = |value: i64| u64::try_from(value).expect("the monotonic clock is not negative");
    part(now.tv_sec) * 1_000_000_000 + part(now.tv_nsec)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace() -> (tempfile::TempDir, Trace) {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        std::fs::write(&image, [0; 8192]).unwrap();
        let trace = Trace::create(&dir.path().join("trace"), &image).unwrap();
        (dir, trace)
    }

    fn set(trace: &Trace, at: u64, bytes: &[u8]) {
        let file = File::options().write(true).open(trace.path()).unwrap();
        file.write_all_at(bytes, at).unwrap();
    }

    fn note(trace: &Trace, index: u64, fields: [u64; 4]) {
        let bytes: Vec<u8> = fields.iter().flat_map(|field| field.to_ne_bytes()).collect();
        set(trace, HEADER_BYTES as u64 + index * RECORD_BYTES as u64, &bytes);
        set(trace, CLAIMED_AT, &(index + 1).to_ne_bytes());
    }

    #[test]
    fn a_trace_that_nobody_attached_to_is_no_recording() {
        let (_dir, trace) = trace();
        assert!(matches!(trace.recording(8192, 1), Err(TraceError::NotAttached)));
        set(&trace, ATTACHED_AT, &1_u32.to_ne_bytes());
        assert!(matches!(trace.recording(8192, 1), Err(TraceError::NoReads)));
    }

    #[test]
    fn reads_are_cut_at_the_images_end_and_unwritten_records_left_out() {
        let (_dir, trace) = trace();
        set(&trace, ATTACHED_AT, &1_u32.to_ne_bytes());
        let start = trace.start_ns;
        note(&trace, 0, [4096, 99999, 5, start + 10]);
        note(&trace, 1, [0, 4096, 0, 0]);
        note(&trace, 2, [8192, 1, 5, start + 20]);
        note(&trace, 3, [0, 1, 5, start + 500]);
        let recording = trace.recording(8192, 100).unwrap();
        assert_eq!(recording.reads, [Read { offset: 4096, length: 4096, time_ns: 10, took_ns: 5 }]);
        assert_eq!(trace.reads().unwrap(), 4);
    }

    #[test]
    fn a_trace_with_reads_missing_is_refused() {
        for (flag, word) in [(OVERFLOW, "more than"), (IO_URING, "io_uring"), (MAPPED, "mapping")] {
            let (_dir, trace) = trace();
            set(&trace, ATTACHED_AT, &1_u32.to_ne_bytes());
            note(&trace, 0, [0, 4096, 5, trace.start_ns + 1]);
            set(&trace, 60, &flag.to_ne_bytes());
            let error = trace.recording(8192, 100).unwrap_err();
            assert!(error.is_incomplete() && error.to_string().contains(word), "{error}");
        }
    }

    #[test]
    fn what_is_not_a_trace_is_refused() {
        let (dir, trace) = trace();
        set(&trace, 0, b"x");
        assert!(matches!(Trace::open(trace.path()), Err(TraceError::Damaged { .. })));
        let short = dir.path().join("image");
        std::fs::write(&short, b"bootcache trace\0").unwrap();
        assert!(matches!(Trace::open(&short), Err(TraceError::Damaged { .. })));
    }
}
