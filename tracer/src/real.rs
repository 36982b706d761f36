//! The calls behind the hooks: the next symbol of that name after this library.

use std::ffi::{CStr, c_int, c_void};
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

/// A symbol of a library that was loaded after this one. Looked up before `main`; looking it up does not allocate, so
/// a hook that another library's constructor calls earlier may do it too.
#[derive(Debug)]
pub struct Symbol {
    name: &'static CStr,
    address: AtomicPtr<c_void>,
}

/// A looked-up symbol that is not there.
const ABSENT: *mut c_void = ptr::without_provenance_mut(usize::MAX);

impl Symbol {
    /// The symbol `name`, not looked up yet.
    pub const fn new(name: &'static CStr) -> Self {
        Self { name, address: AtomicPtr::new(ptr::null_mut()) }
    }

    /// Its address, if a library has it. The caller knows its type.
    pub fn address(&self) -> Option<*mut c_void> {
        let mut address = self.address.load(Ordering::Relaxed);
        if address.is_null() {
            // SAFETY: the name is a C string; RTLD_NEXT is valid in a loaded library.
            address = unsafe { libc::dlsym(libc::RTLD_NEXT, self.name.as_ptr()) };
            if address.is_null() {
                address = ABSENT;
            }
            self.address.store(address, Ordering::Relaxed);
        }
        (address != ABSENT).then_some(address)
    }
}

/// What a hook answers when the call behind it does not exist.
pub trait Absent {
    /// The failure value; sets `errno` to `ENOSYS`.
    fn absent() -> Self;
}

impl Absent for c_int {
    fn absent() -> Self {
        set_errno(libc::ENOSYS);
        -1
    }
}

impl Absent for isize {
    fn absent() -> Self {
        set_errno(libc::ENOSYS);
        -1
    }
}

impl Absent for i64 {
    fn absent() -> Self {
        set_errno(libc::ENOSYS);
        -1
    }
}

impl Absent for () {
    fn absent() -> Self {
        set_errno(libc::ENOSYS);
    }
}

impl<T> Absent for *mut T {
    fn absent() -> Self {
        set_errno(libc::ENOSYS);
        // MAP_FAILED for mmap would be -1; every libc has mmap, and fopen fails with null.
        ptr::null_mut()
    }
}

/// The thread's `errno`.
pub fn errno() -> c_int {
    // SAFETY: libc's location of this thread's errno is always valid.
    unsafe { *libc::__errno_location() }
}

/// Sets the thread's `errno`.
pub fn set_errno(value: c_int) {
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = value }
}
