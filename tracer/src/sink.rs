//! Where reads go: a file mapped shared, so that what was noted is kept however the process ends.
//!
//! Its blocks are allocated before it is mapped (a store into a hole on a full disk would be a SIGBUS). Slots are
//! claimed with one atomic addition, so threads, signal handlers, forked children and other processes with the same
//! trace never wait for each other. When all are taken the trace says so and takes no more.

use std::ffi::{CStr, c_int};
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

use crate::files;
use crate::format::{
    CAPACITY_DEFAULT, CAPACITY_MAX, HEADER_BYTES, Header, MAGIC, OVERFLOW, RECORD_BYTES, Record, VERSION,
};

/// The mapping; null until [`attach`] has succeeded.
static TRACE: AtomicPtr<Header> = AtomicPtr::new(ptr::null_mut());

/// A trace that is mapped for as long as the process lives.
#[derive(Debug, Clone, Copy)]
pub struct Sink {
    header: &'static Header,
}

/// The trace, if this process has one.
pub fn get() -> Option<Sink> {
    // SAFETY: a non-null pointer is the start of a mapping that is never undone, is at least a header long, and is
    // changed only through its atomics.
    unsafe { TRACE.load(Ordering::Acquire).as_ref() }.map(|header| Sink { header })
}

impl Sink {
    /// Notes one read: bytes, and CLOCK_MONOTONIC when it was asked for.
    pub fn note(self, offset: u64, length: u64, time_ns: u64, took_ns: u64) {
        let index = self.header.claimed.fetch_add(1, Ordering::Relaxed);
        if index >= self.header.capacity {
            self.flag(OVERFLOW);
            return;
        }
        let records = ptr::from_ref(self.header).wrapping_byte_add(HEADER_BYTES).cast::<Record>();
        let Ok(index) = usize::try_from(index) else { return };
        // SAFETY: the mapping is HEADER_BYTES + capacity * RECORD_BYTES long (checked in `map`), and index < capacity.
        let record = unsafe { &*records.add(index) };
        record.offset.store(offset, Ordering::Relaxed);
        record.length.store(length, Ordering::Relaxed);
        record.took_ns.store(took_ns, Ordering::Relaxed);
        record.time_ns.store(time_ns.max(1), Ordering::Release);
    }

    /// Says that reads of the image may be missing, and why.
    pub fn flag(self, flag: u32) {
        self.header.flags.fetch_or(flag, Ordering::Relaxed);
    }
}

/// CLOCK_MONOTONIC in ns.
pub fn now_ns() -> u64 {
    let mut time = MaybeUninit::<libc::timespec>::zeroed();
    // SAFETY: `time` has room; on failure it stays zero, which is a valid time.
    let time = unsafe {
        libc::clock_gettime(libc::CLOCK_MONOTONIC, time.as_mut_ptr());
        time.assume_init()
    };
    let part = |value: i64| u64::try_from(value).unwrap_or(0);
    part(time.tv_sec).wrapping_mul(1_000_000_000).wrapping_add(part(time.tv_nsec))
}

/// Maps the trace that the environment names. Silent when it names none or anything is wrong with it.
pub fn attach() {
    // SAFETY: the names are C strings; nobody changes the environment while the program is being loaded.
    let (image, out) = unsafe {
        (libc::getenv(c"BOOTCACHE_TRACE_IMAGE".as_ptr()), libc::getenv(c"BOOTCACHE_TRACE_OUT".as_ptr()))
    };
    if image.is_null() || out.is_null() {
        return;
    }
    // SAFETY: getenv gave C strings.
    let (image, out) = unsafe { (CStr::from_ptr(image), CStr::from_ptr(out)) };
    let errno = crate::real::errno();
    if let Some((device, inode)) = identify(image) {
        files::set_image(device, inode);
        let trace = open(out, device, inode);
        // SAFETY: `trace` is null or a mapping of a trace, see `map`.
        if let Some(header) = unsafe { trace.as_ref() } {
            header.attached.fetch_add(1, Ordering::Relaxed);
            TRACE.store(trace, Ordering::Release);
        }
    }
    crate::real::set_errno(errno);
}

fn identify(path: &CStr) -> Option<(u64, u64)> {
    let mut stat = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: the path is a C string, `stat` has room.
    if unsafe { libc::stat(path.as_ptr(), stat.as_mut_ptr()) } != 0 {
        return None;
    }
    // SAFETY: stat succeeded.
    let stat = unsafe { stat.assume_init() };
    Some((stat.st_dev, stat.st_ino))
}

/// The trace at `path`, made if it is not there or empty; null when it cannot be had or is of another image.
fn open(path: &CStr, device: u64, inode: u64) -> *mut Header {
    // SAFETY: the path is a C string.
    let fd = unsafe { libc::open(path.as_ptr(), libc::O_RDWR | libc::O_CREAT | libc::O_CLOEXEC, 0o600) };
    if fd < 0 {
        return ptr::null_mut();
    }
    if length(fd) == Some(0) {
        // Two processes of one pipeline may get here at once. The mapping would keep the lock beyond `close`.
        // SAFETY: `fd` was just opened; so it is below.
        unsafe { libc::flock(fd, libc::LOCK_EX) };
        if length(fd) == Some(0) {
            create(fd, device, inode);
        }
        // SAFETY: as above.
        unsafe { libc::flock(fd, libc::LOCK_UN) };
    }
    let trace = length(fd).map_or(ptr::null_mut(), |length| map(fd, length, device, inode));
    // SAFETY: as above; the mapping stays.
    unsafe { libc::close(fd) };
    trace
}

fn length(fd: c_int) -> Option<u64> {
    // SAFETY: seeking an own descriptor to its end.
    u64::try_from(unsafe { libc::lseek(fd, 0, libc::SEEK_END) }).ok()
}

/// Makes an empty file a trace, or leaves it empty.
fn create(fd: c_int, device: u64, inode: u64) {
    let header = Header {
        magic: MAGIC,
        version: VERSION,
        header_bytes: 4096,
        capacity: CAPACITY_DEFAULT,
        device,
        inode,
        start_ns: now_ns(),
        attached: 0.into(),
        flags: 0.into(),
        claimed: 0.into(),
    };
    let length = HEADER_BYTES as u64 + CAPACITY_DEFAULT * RECORD_BYTES as u64;
    let Ok(length_signed) = i64::try_from(length) else { return };
    // SAFETY: `fd` is open for writing; the header is plain memory of its own size.
    let written = unsafe {
        libc::posix_fallocate(fd, 0, length_signed) == 0
            && libc::pwrite(fd, ptr::from_ref(&header).cast(), size_of::<Header>(), 0)
                == isize::try_from(size_of::<Header>()).unwrap_or(-1)
    };
    if !written {
        // Half a trace would be refused by the next process, and by the reader.
        // SAFETY: as above.
        unsafe { libc::ftruncate(fd, 0) };
    }
}

/// Maps the trace in `fd` if it is one, of this image, and as long as it says.
fn map(fd: c_int, length: u64, device: u64, inode: u64) -> *mut Header {
    let Ok(bytes) = usize::try_from(length) else { return ptr::null_mut() };
    if bytes < HEADER_BYTES {
        return ptr::null_mut();
    }
    // SAFETY: a fresh mapping of an open file, at an address that the kernel chooses.
    let mapping = unsafe {
        libc::mmap(ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, fd, 0)
    };
    if mapping == libc::MAP_FAILED {
        return ptr::null_mut();
    }
    let trace = mapping.cast::<Header>();
    // SAFETY: the mapping is page-aligned and longer than a header, any bytes are a valid Header.
    let header = unsafe { &*trace };
    let room = (length - HEADER_BYTES as u64) / RECORD_BYTES as u64;
    let sound = header.magic == MAGIC
        && header.version == VERSION
        && header.header_bytes == 4096
        && header.capacity <= room.min(CAPACITY_MAX)
        && (header.device, header.inode) == (device, inode);
    if !sound {
        // SAFETY: undoes the mapping made above; `header` is not used again.
        unsafe { libc::munmap(mapping, bytes) };
        return ptr::null_mut();
    }
    trace
}
