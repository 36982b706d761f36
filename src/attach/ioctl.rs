//! The kernel's NBD client by ioctl, for kernels without its netlink interface.
//!
//! The device lives as long as the call [`Session::run`], which blocks a thread of the keeper. There is no way to give
//! it another socket: when the server goes, requests fail.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;

use super::Device;
use super::netlink::{KernelError, Setup};

// Linux `include/uapi/linux/nbd.h`: _IO(0xab, n).
const SET_SOCK: libc::c_ulong = 0xab00;
const SET_BLKSIZE: libc::c_ulong = 0xab01;
const DO_IT: libc::c_ulong = 0xab03;
const CLEAR_SOCK: libc::c_ulong = 0xab04;
const CLEAR_QUE: libc::c_ulong = 0xab05;
const SET_SIZE_BLOCKS: libc::c_ulong = 0xab07;
const DISCONNECT: libc::c_ulong = 0xab08;
const SET_FLAGS: libc::c_ulong = 0xab0a;

/// A device that has its sockets and waits to be run.
#[derive(Debug)]
pub(super) struct Session {
    file: File,
    device: Device,
}

impl Session {
    /// Sets the device up, or the first one that is free.
    pub(super) fn start(setup: &Setup, sockets: &[BorrowedFd<'_>]) -> Result<Self, KernelError> {
        let candidates = setup.index.map_or_else(Device::all, |index| vec![Device(index)]);
        if candidates.is_empty() {
            return Err(KernelError::NoModule);
        }
        for device in candidates.into_iter().filter(|device| !device.is_connected()) {
            match Self::set_up(device, setup, sockets) {
                Ok(session) => return Ok(session),
                // Somebody else took it between the two looks.
                Err(error) if error.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(KernelError::NoModule),
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    return Err(KernelError::NotPermitted);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(KernelError::busy(setup.index))
    }

    fn set_up(device: Device, setup: &Setup, sockets: &[BorrowedFd<'_>]) -> io::Result<Self> {
        let file = File::options().read(true).write(setup.is_writable()).open(device.path())?;
        let session = Self { file, device };
        for (done, socket) in sockets.iter().enumerate() {
            let descriptor = libc::c_ulong::try_from(socket.as_raw_fd()).expect("an open descriptor");
            let set = ioctl(&session.file, SET_SOCK, descriptor);
            if set.is_err() && done > 0 {
                break; // A kernel that takes one socket only.
            }
            set?;
        }
        let values = [
            (SET_BLKSIZE, u64::from(setup.block_size)),
            (SET_SIZE_BLOCKS, setup.size / u64::from(setup.block_size)),
            (SET_FLAGS, u64::from(setup.flags)),
        ];
        for (request, value) in values {
            if let Err(error) = ioctl(&session.file, request, value) {
                session.clear();
                return Err(error);
            }
        }
        Ok(session)
    }

    /// Which device it is.
    pub(super) fn device(&self) -> Device {
        self.device
    }

    /// Serves the device until it is disconnected or its connections die. Blocks.
    pub(super) fn run(self) -> io::Result<()> {
        let result = ioctl(&self.file, DO_IT, 0);
        self.clear();
        result
    }

    fn clear(&self) {
        // The device is given up: there is nobody to tell of a failure, and nothing to do about it.
        let _ = ioctl(&self.file, CLEAR_QUE, 0);
        let _ = ioctl(&self.file, CLEAR_SOCK, 0);
    }
}

/// Ends a device that some process runs.
pub(super) fn disconnect(file: &File) -> io::Result<()> {
    ioctl(file, DISCONNECT, 0)
}

fn ioctl(file: &File, request: libc::c_ulong, value: libc::c_ulong) -> io::Result<()> {
    // SAFETY: the descriptor is open for the whole call, and every NBD request takes its argument as a plain number:
    // the kernel reads and writes no memory of ours.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, value) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
