//! Reads whose bytes never reach the process: the kernel moves them to another file.

use std::ffi::{c_int, c_uint};

use libc::{loff_t, off_t, off64_t, size_t, ssize_t};

use crate::observe::{reading, reading_at};

hooks! {
    fn sendfile(to: c_int, from: c_int, offset: *mut off_t, length: size_t) -> ssize_t =
        |real| moving(from, offset, || real(to, from, offset, length));
    fn sendfile64(to: c_int, from: c_int, offset: *mut off64_t, length: size_t) -> ssize_t =
        |real| moving(from, offset, || real(to, from, offset, length));
    fn copy_file_range(
        from: c_int, from_offset: *mut off64_t, to: c_int, to_offset: *mut off64_t, length: size_t, flags: c_uint,
    ) -> ssize_t =
        |real| moving(from, from_offset, || real(from, from_offset, to, to_offset, length, flags));
    fn splice(
        from: c_int, from_offset: *mut loff_t, to: c_int, to_offset: *mut loff_t, length: size_t, flags: c_uint,
    ) -> ssize_t =
        |real| moving(from, from_offset, || real(from, from_offset, to, to_offset, length, flags));
}

/// A move out of `from` at `*offset`, or at its position when there is no offset.
fn moving(from: c_int, offset: *const i64, call: impl FnOnce() -> ssize_t) -> ssize_t {
    if offset.is_null() {
        return reading(from, call);
    }
    // SAFETY: the kernel is about to read it too, under the caller's contract.
    let before = unsafe { offset.read_unaligned() };
    reading_at(from, before, call)
}
