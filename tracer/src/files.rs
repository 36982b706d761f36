//! Which descriptors are the image: told by device and inode, so that it does not matter how they were opened,
//! duplicated, inherited or received.
//!
//! A descriptor is looked at (`fstat`) when it is first read, and the answer is kept until a hook sees its number
//! closed or given to another file. Numbers beyond the table are looked at each time. libc opens and
//! closes some descriptors of its own without passing a hook; every open therefore forgets the number it returns as well.

use std::ffi::c_int;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

const TABLE: usize = 1 << 16;
const UNKNOWN: u8 = 0;
const OTHER: u8 = 1;
const IMAGE: u8 = 2;

static KNOWN: [AtomicU8; TABLE] = [const { AtomicU8::new(UNKNOWN) }; TABLE];
static DEVICE: AtomicU64 = AtomicU64::new(0);
static INODE: AtomicU64 = AtomicU64::new(0);

/// Sets which file is the image. Before the first question, and once.
pub fn set_image(device: u64, inode: u64) {
    DEVICE.store(device, Ordering::Relaxed);
    INODE.store(inode, Ordering::Relaxed);
}

/// Whether `fd` is the image. May change `errno`.
pub fn is_image(fd: c_int) -> bool {
    match slot(fd) {
        Some(slot) => match slot.load(Ordering::Relaxed) {
            UNKNOWN => {
                let Some(image) = look(fd) else { return false };
                slot.store(if image { IMAGE } else { OTHER }, Ordering::Relaxed);
                image
            }
            known => known == IMAGE,
        },
        None => fd >= 0 && look(fd) == Some(true),
    }
}

/// `fd` may be another file from now on.
pub fn forget(fd: c_int) {
    if let Some(slot) = slot(fd) {
        // Most numbers were never read; a load does not dirty the cache line.
        if slot.load(Ordering::Relaxed) != UNKNOWN {
            slot.store(UNKNOWN, Ordering::Relaxed);
        }
    }
}

/// All of `first..=last` may be other files from now on.
pub fn forget_range(first: u32, last: u32) {
    let first = usize::try_from(first).unwrap_or(TABLE).min(TABLE);
    let count = usize::try_from(last).unwrap_or(TABLE).saturating_add(1).saturating_sub(first);
    for slot in KNOWN.iter().skip(first).take(count) {
        slot.store(UNKNOWN, Ordering::Relaxed);
    }
}

fn slot(fd: c_int) -> Option<&'static AtomicU8> {
    KNOWN.get(usize::try_from(fd).ok()?)
}

/// `None` when the descriptor is not valid: nothing is remembered of such a number.
fn look(fd: c_int) -> Option<bool> {
    let mut stat = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: `stat` has room for what fstat writes; a bad descriptor is an error.
    if unsafe { libc::fstat(fd, stat.as_mut_ptr()) } != 0 {
        return None;
    }
    // SAFETY: fstat succeeded, so it wrote the whole structure.
    let stat = unsafe { stat.assume_init() };
    Some(stat.st_dev == DEVICE.load(Ordering::Relaxed) && stat.st_ino == INODE.load(Ordering::Relaxed))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn the_image_is_known_by_any_descriptor_and_forgotten_on_close() {
        let path = std::env::current_exe().unwrap();
        let image = std::fs::File::open(&path).unwrap();
        let meta = image.metadata().unwrap();
        set_image(meta.dev(), meta.ino());
        let again = image.try_clone().unwrap();
        assert!(is_image(image.as_raw_fd()) && is_image(again.as_raw_fd()));
        let number = again.as_raw_fd();
        drop(again);
        forget(number);
        assert!(!is_image(number));
        let other = std::fs::File::open("/dev/null").unwrap();
        assert!(!is_image(other.as_raw_fd()));
        assert!(!is_image(-1) && !is_image(1 << 20));
        forget_range(0, u32::MAX);
        assert!(is_image(image.as_raw_fd()));
    }
}
