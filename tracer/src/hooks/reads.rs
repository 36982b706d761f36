//! Synchronous reads, with the checking variants that `_FORTIFY_SOURCE` calls.

use std::ffi::{c_int, c_void};

use libc::{iovec, off_t, off64_t, size_t, ssize_t};

use crate::observe::{reading, reading_at};

hooks! {
    fn read(fd: c_int, to: *mut c_void, length: size_t) -> ssize_t =
        |real| reading(fd, || real(fd, to, length));
    fn __read_chk(fd: c_int, to: *mut c_void, length: size_t, room: size_t) -> ssize_t =
        |real| reading(fd, || real(fd, to, length, room));
    fn readv(fd: c_int, to: *const iovec, count: c_int) -> ssize_t =
        |real| reading(fd, || real(fd, to, count));

    fn pread(fd: c_int, to: *mut c_void, length: size_t, offset: off_t) -> ssize_t =
        |real| reading_at(fd, offset, || real(fd, to, length, offset));
    fn pread64(fd: c_int, to: *mut c_void, length: size_t, offset: off64_t) -> ssize_t =
        |real| reading_at(fd, offset, || real(fd, to, length, offset));
    fn __pread_chk(fd: c_int, to: *mut c_void, length: size_t, offset: off_t, room: size_t) -> ssize_t =
        |real| reading_at(fd, offset, || real(fd, to, length, offset, room));
    fn __pread64_chk(fd: c_int, to: *mut c_void, length: size_t, offset: off64_t, room: size_t) -> ssize_t =
        |real| reading_at(fd, offset, || real(fd, to, length, offset, room));

    fn preadv(fd: c_int, to: *const iovec, count: c_int, offset: off_t) -> ssize_t =
        |real| reading_at(fd, offset, || real(fd, to, count, offset));
    fn preadv64(fd: c_int, to: *const iovec, count: c_int, offset: off64_t) -> ssize_t =
        |real| reading_at(fd, offset, || real(fd, to, count, offset));
    fn preadv2(fd: c_int, to: *const iovec, count: c_int, offset: off_t, flags: c_int) -> ssize_t =
        |real| at_or_position(fd, offset, || real(fd, to, count, offset, flags));
    fn preadv64v2(fd: c_int, to: *const iovec, count: c_int, offset: off64_t, flags: c_int) -> ssize_t =
        |real| at_or_position(fd, offset, || real(fd, to, count, offset, flags));
}

/// `preadv2` reads at the descriptor's position when the offset is -1.
pub(super) fn at_or_position(fd: c_int, offset: i64, read: impl FnOnce() -> ssize_t) -> ssize_t {
    if offset == -1 { reading(fd, read) } else { reading_at(fd, offset, read) }
}
