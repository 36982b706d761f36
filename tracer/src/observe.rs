//! What the hooks share: seeing a read from both sides of the call behind it.

use std::cell::Cell;
use std::ffi::{c_int, c_long};
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::real::{errno, set_errno};
use crate::{files, sink};

thread_local! {
    /// Whether this thread is inside a library's call that was looked at; such libraries may use libc's `syscall`.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Calls what was looked at already, so that what it calls in turn is not noted again.
pub(crate) fn looked_at<T>(call: impl FnOnce() -> T) -> T {
    let outer = INSIDE.replace(true);
    let result = call();
    INSIDE.set(outer);
    result
}

/// Whether this thread is within [`looked_at`].
pub(crate) fn is_looked_at() -> bool {
    INSIDE.get()
}

/// A read of the image that has been asked for. Has no destructor: the thread may be cancelled before it ends.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asked {
    fd: c_int,
    sink: sink::Sink,
    time_ns: u64,
}

/// Runs `work` so that the program does not notice: `errno` stays, no panic gets out.
pub(crate) fn quietly<T>(otherwise: T, work: impl FnOnce() -> T) -> T {
    let before = errno();
    let result = catch_unwind(AssertUnwindSafe(work)).unwrap_or(otherwise);
    set_errno(before);
    result
}

/// Before a read of `fd`; `None` when it is not the image.
pub(crate) fn asked(fd: c_int) -> Option<Asked> {
    let sink = sink::get()?;
    quietly(None, || files::is_image(fd).then(|| Asked { fd, sink, time_ns: sink::now_ns() }))
}

/// Says that the image is read in a way that is not recorded, if `fd` is the image.
pub(crate) fn unseen(fd: c_int, flag: u32) {
    if let Some(asked) = asked(fd) {
        asked.sink.flag(flag);
    }
}

impl Asked {
    /// After a read at `offset` that moved `moved` bytes, or failed.
    pub(crate) fn answered_at(self, offset: i64, moved: isize) {
        let (Ok(offset), Ok(length)) = (u64::try_from(offset), u64::try_from(moved)) else { return };
        if length > 0 {
            quietly((), || {
                let took_ns = sink::now_ns().saturating_sub(self.time_ns);
                self.sink.note(offset, length, self.time_ns, took_ns.max(1));
            });
        }
    }

    /// After a read at the descriptor's position. The kernel is asked where that is: duplicates, children and other
    /// processes may share it, so nothing that could be remembered here would be right.
    pub(crate) fn answered(self, moved: isize) {
        if moved <= 0 {
            return;
        }
        let Ok(length) = i64::try_from(moved) else { return };
        // SAFETY: asking a descriptor's position changes nothing.
        let end = quietly(-1, || unsafe { libc::lseek64(self.fd, 0, libc::SEEK_CUR) });
        self.answered_at(end.saturating_sub(length), moved);
    }

    /// A read that was handed to the kernel and whose answer is not seen here.
    pub(crate) fn submitted(self, offset: i64, length: u64) {
        if let (Ok(offset), true) = (u64::try_from(offset), length > 0) {
            quietly((), || self.sink.note(offset, length, self.time_ns, 0));
        }
    }
}

/// Calls `read`, which reads `fd` at `offset`, and notes what it read.
pub(crate) fn reading_at(fd: c_int, offset: i64, read: impl FnOnce() -> isize) -> isize {
    let asked = asked(fd);
    let moved = read();
    if let Some(asked) = asked {
        asked.answered_at(offset, moved);
    }
    moved
}

/// Calls `read`, which reads `fd` at its position, and notes what it read.
pub(crate) fn reading(fd: c_int, read: impl FnOnce() -> isize) -> isize {
    let asked = asked(fd);
    let moved = read();
    if let Some(asked) = asked {
        asked.answered(moved);
    }
    moved
}

/// A register's value as the `int` that the callee takes it for.
#[expect(clippy::cast_possible_truncation, reason = "a C int is the low half of its register")]
pub(crate) const fn int(register: c_long) -> c_int {
    register as c_int
}
