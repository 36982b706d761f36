//! libc's `syscall`: programs and libraries that name the kernel's call themselves.

#![expect(clippy::cast_possible_truncation, reason = "a register is a pointer's width, see `crate`")]

use std::ffi::{c_long, c_void};

use libc::iovec;

use super::{aio, descriptors, reads, uring};
use crate::observe::{int, is_looked_at};

hooks! {
    fn syscall(
        number: c_long, a: c_long, b: c_long, c: c_long, d: c_long, e: c_long, f: c_long,
    ) -> c_long = |real| {
        let call = || real(number, a, b, c, d, e, f);
        match number {
            // SAFETY: here and below, the hook gets what the kernel would get, under the same contract.
            libc::SYS_read => unsafe { reads::read(int(a), pointer(b), length(c)) as c_long },
            // SAFETY: as above.
            libc::SYS_readv => unsafe { reads::readv(int(a), vectors(b), int(c)) as c_long },
            // SAFETY: as above.
            libc::SYS_pread64 => unsafe { reads::pread64(int(a), pointer(b), length(c), d) as c_long },
            // The offset is in two halves, of which the kernel takes only the first where a long has 64 bits.
            // SAFETY: as above.
            libc::SYS_preadv => unsafe { reads::preadv64(int(a), vectors(b), int(c), d) as c_long },
            libc::SYS_preadv2 => reads::at_or_position(int(a), d, || call() as isize) as c_long,
            // SAFETY: as above.
            libc::SYS_close => unsafe { descriptors::close(int(a)).into() },
            libc::SYS_io_submit if !is_looked_at() => {
                // SAFETY: as above.
                unsafe { aio::note(b, pointer(c).cast::<*mut aio::Iocb>()) };
                call()
            }
            libc::SYS_io_uring_setup => {
                uring::unknown();
                call()
            }
            libc::SYS_io_uring_enter => {
                if int(b) != 0 {
                    uring::unknown();
                }
                call()
            }
            _ => call(),
        }
    };
}

fn pointer(register: c_long) -> *mut c_void {
    std::ptr::with_exposed_provenance_mut(register as usize)
}

fn vectors(register: c_long) -> *const iovec {
    pointer(register).cast::<iovec>().cast_const()
}

fn length(register: c_long) -> usize {
    register as usize
}
