//! Calls after which a descriptor's number may mean another file.
//!
//! Numbers are forgotten after they are given out and before they are closed: between close and the next open of the
//! same number nobody may rightly read it.

use std::ffi::{c_char, c_int, c_long, c_uint};

use libc::mode_t;

use crate::files::{forget, forget_range};

fn opened(fd: c_int) -> c_int {
    forget(fd);
    fd
}

hooks! {
    fn open(path: *const c_char, flags: c_int, mode: mode_t) -> c_int =
        |real| opened(real(path, flags, mode));
    fn open64(path: *const c_char, flags: c_int, mode: mode_t) -> c_int =
        |real| opened(real(path, flags, mode));
    fn openat(at: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int =
        |real| opened(real(at, path, flags, mode));
    fn openat64(at: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int =
        |real| opened(real(at, path, flags, mode));
    fn __open_2(path: *const c_char, flags: c_int) -> c_int = |real| opened(real(path, flags));
    fn __open64_2(path: *const c_char, flags: c_int) -> c_int = |real| opened(real(path, flags));
    fn __openat_2(at: c_int, path: *const c_char, flags: c_int) -> c_int =
        |real| opened(real(at, path, flags));
    fn __openat64_2(at: c_int, path: *const c_char, flags: c_int) -> c_int =
        |real| opened(real(at, path, flags));
    fn creat(path: *const c_char, mode: mode_t) -> c_int = |real| opened(real(path, mode));
    fn creat64(path: *const c_char, mode: mode_t) -> c_int = |real| opened(real(path, mode));

    fn dup(fd: c_int) -> c_int = |real| opened(real(fd));
    fn dup2(fd: c_int, number: c_int) -> c_int = |real| opened(real(fd, number));
    fn dup3(fd: c_int, number: c_int, flags: c_int) -> c_int =
        |real| opened(real(fd, number, flags));
    fn fcntl(fd: c_int, command: c_int, argument: c_long) -> c_int =
        |real| controlled(command, real(fd, command, argument));
    fn fcntl64(fd: c_int, command: c_int, argument: c_long) -> c_int =
        |real| controlled(command, real(fd, command, argument));

    fn close(fd: c_int) -> c_int = |real| {
        forget(fd);
        real(fd)
    };
    fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int = |real| {
        forget_range(first, last);
        real(first, last, flags)
    };
    fn closefrom(first: c_int) = |real| {
        forget_range(u32::try_from(first).unwrap_or(0), u32::MAX);
        real(first)
    };
}

fn controlled(command: c_int, result: c_int) -> c_int {
    if matches!(command, libc::F_DUPFD | libc::F_DUPFD_CLOEXEC) {
        forget(result);
    }
    result
}
