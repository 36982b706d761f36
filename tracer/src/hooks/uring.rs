//! io_uring, by liburing's calls: not recorded, since completions are read from shared memory without a call, but
//! noticed. A trace with [`IO_URING`] or [`IO_URING_UNKNOWN`] is not whole.
//!
//! QEMU sets a ring up for waiting on descriptors whatever its `aio=` is; so it is the submitted entries that are
//! looked at. Programs that fill rings without liburing are noticed when they make or enter them through libc's `syscall`.

use std::ffi::{c_int, c_uint, c_void};

use crate::format::{IO_URING, IO_URING_UNKNOWN};
use crate::observe::{is_looked_at, looked_at, quietly, unseen};
use crate::sink;

/// The beginning of liburing's `struct io_uring`, the same since its first version.
#[derive(Debug)]
#[repr(C)]
pub struct Ring {
    head: *mut c_uint,
    tail: *mut c_uint,
    mask: *mut c_uint,
    entries: *mut c_uint,
    flags: *mut c_uint,
    dropped: *mut c_uint,
    array: *mut c_uint,
    requests: *mut Request,
    request_head: c_uint,
    request_tail: c_uint,
}

/// The beginning of the kernel's `struct io_uring_sqe` (64 bytes).
#[derive(Debug)]
#[repr(C)]
pub struct Request {
    opcode: u8,
    flags: u8,
    priority: u16,
    fd: c_int,
    rest: [u64; 7],
}

const _: () = assert!(size_of::<Request>() == 64);

/// IORING_OP_READV, IORING_OP_READ_FIXED, IORING_OP_READ.
const READS: [u8; 3] = [1, 4, 22];
/// IOSQE_FIXED_FILE: the descriptor is an index into registered files.
const FIXED_FILE: u8 = 1;

hooks! {
    fn io_uring_queue_init(entries: c_uint, ring: *mut Ring, flags: c_uint) -> c_int =
        |real| looked_at(|| real(entries, ring, flags));
    fn io_uring_queue_init_params(entries: c_uint, ring: *mut Ring, parameters: *mut c_void) -> c_int =
        |real| looked_at(|| real(entries, ring, parameters));
    fn io_uring_queue_init_mem(
        entries: c_uint, ring: *mut Ring, parameters: *mut c_void, memory: *mut c_void, size: usize,
    ) -> c_int = |real| looked_at(|| real(entries, ring, parameters, memory, size));

    fn io_uring_submit(ring: *mut Ring) -> c_int =
        |real| submitting(ring, || real(ring));
    fn io_uring_submit_and_wait(ring: *mut Ring, wait: c_uint) -> c_int =
        |real| submitting(ring, || real(ring, wait));
    fn io_uring_submit_and_wait_timeout(
        ring: *mut Ring, completion: *mut c_void, wait: c_uint, timeout: *mut c_void, mask: *mut c_void,
    ) -> c_int =
        |real| submitting(ring, || real(ring, completion, wait, timeout, mask));
    fn io_uring_submit_and_get_events(ring: *mut Ring) -> c_int =
        |real| submitting(ring, || real(ring));
    fn io_uring_wait_cqe_timeout(ring: *mut Ring, completion: *mut c_void, timeout: *mut c_void) -> c_int =
        |real| submitting(ring, || real(ring, completion, timeout));
    fn io_uring_wait_cqes(
        ring: *mut Ring, completion: *mut c_void, wait: c_uint, timeout: *mut c_void, mask: *mut c_void,
    ) -> c_int =
        |real| submitting(ring, || real(ring, completion, wait, timeout, mask));

    fn io_uring_register_files(ring: *mut Ring, files: *const c_int, count: c_uint) -> c_int = |real| {
        registered(files, count);
        real(ring, files, count)
    };
    fn io_uring_register_files_update(
        ring: *mut Ring, first: c_uint, files: *const c_int, count: c_uint,
    ) -> c_int = |real| {
        registered(files, count);
        real(ring, first, files, count)
    };
    fn io_uring_enter(
        fd: c_uint, submit: c_uint, wait: c_uint, flags: c_uint, mask: *mut c_void,
    ) -> c_int = |real| {
        if submit > 0 {
            unknown();
        }
        real(fd, submit, wait, flags, mask)
    };
    fn io_uring_enter2(
        fd: c_uint, submit: c_uint, wait: c_uint, flags: c_uint, mask: *mut c_void, size: usize,
    ) -> c_int = |real| {
        if submit > 0 {
            unknown();
        }
        real(fd, submit, wait, flags, mask, size)
    };
}

/// A ring is set up, or entered with new entries, and nothing shows what is read through it.
pub(super) fn unknown() {
    if !is_looked_at()
        && let Some(sink) = sink::get()
    {
        sink.flag(IO_URING_UNKNOWN);
    }
}

fn submitting(ring: *const Ring, call: impl FnOnce() -> c_int) -> c_int {
    if sink::get().is_some() {
        // SAFETY: liburing is about to walk the same entries.
        quietly((), || unsafe { look(ring) });
    }
    looked_at(call)
}

/// Flags the trace if an entry that is about to be submitted reads the image.
///
/// # Safety
/// `ring` is an initialised ring of liburing, used by this thread alone.
unsafe fn look(ring: *const Ring) {
    // SAFETY: as the caller promises.
    let Some(ring) = (unsafe { ring.as_ref() }) else { return };
    // SAFETY: the mask is mapped for as long as the ring lives.
    let Some(&mask) = (unsafe { ring.mask.as_ref() }) else { return };
    let count = ring.request_tail.wrapping_sub(ring.request_head).min(mask.saturating_add(1));
    for step in 0..count {
        let index = (ring.request_head.wrapping_add(step) & mask) as usize;
        // SAFETY: there are mask + 1 requests.
        let request = unsafe { &*ring.requests.wrapping_add(index) };
        if READS.contains(&request.opcode) && request.flags & FIXED_FILE == 0 {
            unseen(request.fd, IO_URING);
        }
    }
}

/// Reads through registered files show only an index: registering the image is enough to tell.
fn registered(files: *const c_int, count: c_uint) {
    if files.is_null() {
        return;
    }
    for index in 0..count as usize {
        // SAFETY: the kernel is about to read the same array.
        unseen(unsafe { *files.add(index) }, IO_URING);
    }
}
