//! Ways to read that are not recorded, and are flagged: mappings, stdio and POSIX aio.

use std::ffi::{c_char, c_int, c_void};

use libc::{FILE, off_t, off64_t, size_t};

use crate::format::{MAPPED, UNSEEN};
use crate::observe::unseen;

hooks! {
    fn mmap(
        at: *mut c_void, length: size_t, protection: c_int, flags: c_int, fd: c_int, offset: off_t,
    ) -> *mut c_void = |real| {
        mapped(flags, fd);
        real(at, length, protection, flags, fd, offset)
    };
    fn mmap64(
        at: *mut c_void, length: size_t, protection: c_int, flags: c_int, fd: c_int, offset: off64_t,
    ) -> *mut c_void = |real| {
        mapped(flags, fd);
        real(at, length, protection, flags, fd, offset)
    };

    fn fopen(path: *const c_char, mode: *const c_char) -> *mut FILE =
        |real| stream(real(path, mode));
    fn fopen64(path: *const c_char, mode: *const c_char) -> *mut FILE =
        |real| stream(real(path, mode));
    fn freopen(path: *const c_char, mode: *const c_char, old: *mut FILE) -> *mut FILE = |real| {
        closing(old);
        stream(real(path, mode, old))
    };
    fn freopen64(path: *const c_char, mode: *const c_char, old: *mut FILE) -> *mut FILE = |real| {
        closing(old);
        stream(real(path, mode, old))
    };
    fn fclose(old: *mut FILE) -> c_int = |real| {
        closing(old);
        real(old)
    };
    fn fdopen(fd: c_int, mode: *const c_char) -> *mut FILE = |real| stream(real(fd, mode));

    fn aio_read(request: *mut libc::aiocb) -> c_int = |real| {
        requested(request);
        real(request)
    };
    fn aio_read64(request: *mut libc::aiocb) -> c_int = |real| {
        requested(request);
        real(request)
    };
    fn lio_listio(
        mode: c_int, requests: *const *mut libc::aiocb, count: c_int, event: *mut c_void,
    ) -> c_int = |real| {
        listed(requests, count);
        real(mode, requests, count, event)
    };
    fn lio_listio64(
        mode: c_int, requests: *const *mut libc::aiocb, count: c_int, event: *mut c_void,
    ) -> c_int = |real| {
        listed(requests, count);
        real(mode, requests, count, event)
    };
}

fn mapped(flags: c_int, fd: c_int) {
    if fd >= 0 && flags & libc::MAP_ANONYMOUS == 0 {
        unseen(fd, MAPPED);
    }
}

/// libc opened the stream's descriptor itself, so its number may be remembered as another file.
fn stream(stream: *mut FILE) -> *mut FILE {
    if !stream.is_null() {
        // SAFETY: a stream that was just opened.
        let fd = unsafe { libc::fileno(stream) };
        crate::files::forget(fd);
        unseen(fd, UNSEEN);
    }
    stream
}

/// libc closes the stream's descriptor itself: its number may come back by a way that has no hook.
fn closing(stream: *mut FILE) {
    if !stream.is_null() {
        let errno = crate::real::errno();
        // SAFETY: a stream that is still open.
        crate::files::forget(unsafe { libc::fileno(stream) });
        crate::real::set_errno(errno);
    }
}

fn requested(request: *const libc::aiocb) {
    // SAFETY: libc is about to read it too.
    if let Some(request) = unsafe { request.as_ref() } {
        unseen(request.aio_fildes, UNSEEN);
    }
}

fn listed(requests: *const *mut libc::aiocb, count: c_int) {
    if requests.is_null() {
        return;
    }
    for index in 0..usize::try_from(count).unwrap_or(0) {
        // SAFETY: libc is about to walk the same array; null entries are allowed.
        requested(unsafe { *requests.add(index) });
    }
}
