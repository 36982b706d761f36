//! libaio: QEMU's `aio=native`.
//!
//! Requests are noted before they are submitted, since another thread may reap and reuse them at once. A request that
//! the kernel does not take now is submitted again later and noted again, which is no harm: what counts is the first
//! touch. Lengths are what was asked for.

use std::ffi::{c_int, c_long, c_void};

use libc::iovec;

use crate::observe::{asked, looked_at};

/// The kernel's `struct iocb` (linux/aio_abi.h).
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Iocb {
    data: u64,
    key_and_flags: u64,
    opcode: u16,
    priority: i16,
    fd: u32,
    buffer: u64,
    length: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    event_fd: u32,
}

const _: () = assert!(size_of::<Iocb>() == 64);

const PREAD: u16 = 0;
const PREADV: u16 = 7;
/// More vectors than the kernel takes in one request.
const VECTORS_MAX: usize = 1024;

hooks! {
    fn io_submit(context: *mut c_void, count: c_long, requests: *mut *mut Iocb) -> c_int = |real| {
        // SAFETY: the kernel is about to read the same array.
        unsafe { note(count, requests) };
        looked_at(|| real(context, count, requests))
    };
}

/// Notes the reads of the image among `count` requests.
///
/// # Safety
/// `requests` is what `io_submit` takes: `count` pointers to valid requests.
pub(super) unsafe fn note(count: c_long, requests: *const *mut Iocb) {
    let count = usize::try_from(count).unwrap_or(0);
    if requests.is_null() || crate::sink::get().is_none() {
        return;
    }
    for index in 0..count {
        // SAFETY: within the array; a null request is the caller's mistake and the kernel's to refuse.
        let Some(request) = (unsafe { (*requests.add(index)).as_ref() }) else { return };
        let length = match request.opcode {
            PREAD => request.length,
            // SAFETY: a vectored request's buffer is an array of that many vectors.
            PREADV => unsafe { vectors_length(request.buffer, request.length) },
            _ => continue,
        };
        if let Some(asked) = c_int::try_from(request.fd).ok().and_then(asked) {
            asked.submitted(request.offset, length);
        }
    }
}

/// # Safety
/// `vectors` is the address of `count` vectors.
unsafe fn vectors_length(vectors: u64, count: u64) -> u64 {
    let (Ok(address), Ok(count)) = (usize::try_from(vectors), usize::try_from(count)) else { return 0 };
    let vectors = std::ptr::with_exposed_provenance::<iovec>(address);
    if vectors.is_null() || count > VECTORS_MAX {
        return 0;
    }
    let mut total = 0_u64;
    for index in 0..count {
        // SAFETY: within the array.
        total = total.saturating_add(unsafe { (*vectors.add(index)).iov_len } as u64);
    }
    total
}
