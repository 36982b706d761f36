//! `LD_PRELOAD` library that records which parts of one file a process reads: how `bootcache record` learns what a
//! boot reads of its disk image, whatever QEMU does with the rest of its files.
//!
//! ```text
//! LD_PRELOAD=libbootcache_tracer.so BOOTCACHE_TRACE_IMAGE=disk.raw BOOTCACHE_TRACE_OUT=trace  qemu-system-x86_64 …
//! ```
//!
//! [`hooks`] stand in front of libc's calls, [`files`] tells whether a descriptor is the image, [`sink`] keeps the
//! reads in a shared mapping that outlives `kill -9`, [`mod@format`] is that file's layout, [`real`] finds the calls
//! behind the hooks.
//!
//! It must not hurt the process it sits in. A hook allocates nothing, takes no lock, leaves `errno` as the call left
//! it, lets no panic out, and makes no system call that QEMU's seccomp sandbox refuses; opening and mapping happen
//! before `main`. When anything is not as expected the library says nothing and records nothing: the trace then says
//! that nobody attached, or which reads it could not see, and whoever reads it must not take it for whole.
//!
//! What it cannot see: static programs, programs that make system calls without libc, and (flagged in the trace)
//! io_uring, mappings, stdio and POSIX aio.

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!("the tracer is for 64-bit Linux");

pub mod files;
pub mod format;
pub mod hooks;
mod observe;
pub mod real;
pub mod sink;

/// Runs when the library is loaded, before the program's `main` and before it has threads.
extern "C" fn attach() {
    let _ = std::panic::catch_unwind(|| {
        hooks::resolve();
        sink::attach();
    });
}

// Not in this crate's own tests: their process is not to be traced.
#[cfg(not(test))]
#[used]
#[unsafe(link_section = ".init_array")]
static ATTACH: extern "C" fn() = attach;

#[cfg(test)]
const _: extern "C" fn() = attach;
