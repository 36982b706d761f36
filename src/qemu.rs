//! A plain QEMU: the command line of a guest that boots from one virtio disk, and when it has booted.
//!
//! [`Machine`] is the line, [`accelerator`] finds out whether KVM really works, [`until`] says when a boot is over and
//! waits for that. Nothing here knows of images or stores; libvirt's domains are `crate::hypervisor`'s.

pub mod accelerator;
mod boot_sector;
pub mod qmp;
pub mod until;

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

pub use accelerator::Accelerator;
pub use until::Until;

/// The program; others can be run as a command of one's own.
pub const PROGRAM: &str = "qemu-system-x86_64";

/// The hardware address of a guest's first interface, where QEMU chooses it.
pub const FIRST_MAC: &str = "52:54:00:12:34:56";

/// What the guest's disk is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Disk {
    /// A qcow2 file that is thrown away: what the guest flushes is not written out.
    Qcow2(PathBuf),
    /// An export on a Unix socket; the guest waits for up to `reconnect_s` seconds when the server goes away.
    Nbd { socket: PathBuf, export: String, reconnect_s: u32 },
    /// A block device of the host, such as `/dev/nbd0`.
    Block(PathBuf),
}

/// How QEMU reads files (`aio=`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Aio {
    /// `pread` in a pool of threads.
    #[default]
    Threads,
    /// libaio; past the page cache.
    Native,
    /// io_uring.
    IoUring,
}

impl Aio {
    fn as_str(self) -> &'static str {
        match self {
            Self::Threads => "threads",
            Self::Native => "native",
            Self::IoUring => "io_uring",
        }
    }
}

/// Where the guest's first serial line goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Serial {
    /// QEMU's stdout.
    Stdout,
    /// A file, made anew.
    File(PathBuf),
}

/// What became of the wish that a guest shuts down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShutDown {
    /// Its power button was pressed.
    Asked,
    /// It does not run.
    Off,
    /// It stands still, as after an error of its disk, and cannot heed a power button.
    Paused,
}

/// A guest to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// The disk that it boots from.
    pub disk: Disk,
    /// How QEMU reads a [`Disk::Qcow2`] and what is below it.
    pub aio: Aio,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Virtual processors.
    pub cpus: u32,
    /// What runs the guest's code.
    pub accelerator: Accelerator,
    /// The first serial line.
    pub serial: Serial,
    /// The socket on which QEMU takes commands, for [`qmp`].
    pub qmp: Option<PathBuf>,
    /// Whether the guest may reboot; QEMU ends otherwise when it does.
    pub reboots: bool,
    /// More arguments, last, so that they have the last word.
    pub arguments: Vec<OsString>,
}

impl Machine {
    /// QEMU's arguments. The guest has a virtio disk, a virtio network interface behind QEMU's own NAT, one serial line, no
    /// display.
    pub fn arguments(&self) -> Vec<OsString> {
        let mut line: Vec<OsString> = Vec::new();
        let mut option = |name: &str, value: OsString| line.extend([OsString::from(name), value]);
        option("-machine", format!("q35,accel={}", self.accelerator).into());
        option("-cpu", self.accelerator.cpu().into());
        option("-m", self.memory_mib.to_string().into());
        option("-smp", self.cpus.to_string().into());
        option("-display", "none".into());
        option("-monitor", "none".into());
        option("-parallel", "none".into());
        option("-vga", "none".into());
        match &self.serial {
            Serial::Stdout => option("-serial", "stdio".into()),
            // Without options, so that no comma is doubled.
            Serial::File(path) => {
                let mut serial = OsString::from("file:");
                serial.push(path);
                option("-serial", serial);
            }
        }
        option("-drive", self.drive());
        option("-device", "virtio-blk-pci,drive=disk0,bootindex=0".into());
        option("-netdev", "user,id=net0".into());
        option("-device", "virtio-net-pci,netdev=net0,romfile=".into());
        if let Some(path) = &self.qmp {
            let mut listen = OsString::from("unix:");
            listen.push(escaped(path.as_os_str()));
            listen.push(",server=on,wait=off");
            option("-qmp", listen);
        }
        if !self.reboots {
            line.push("-no-reboot".into());
        }
        line.push("-no-user-config".into());
        line.extend(self.arguments.iter().cloned());
        line
    }

    fn drive(&self) -> OsString {
        let mut drive = OsString::from("if=none,id=disk0,discard=unmap,");
        match &self.disk {
            Disk::Qcow2(path) => {
                // libaio reads past the page cache only. A guest that waits for its flushes would seem to think meanwhile.
                let direct = if self.aio == Aio::Native { "on" } else { "off" };
                let cache = format!("cache.direct={direct},cache.no-flush=on");
                drive.push(format!("format=qcow2,{cache},aio={},file=", self.aio.as_str()));
                drive.push(escaped(path.as_os_str()));
            }
            Disk::Nbd { socket, export, reconnect_s } => {
                drive.push(format!(
                    "format=raw,cache=none,file.driver=nbd,file.reconnect-delay={reconnect_s},"
                ));
                drive.push(format!("file.open-timeout={reconnect_s},file.export="));
                drive.push(escaped(OsStr::new(export)));
                drive.push(",file.server.type=unix,file.server.path=");
                drive.push(escaped(socket.as_os_str()));
            }
            Disk::Block(path) => {
                // Past the host's page cache: what is behind the device has one of its own.
                drive.push("format=raw,cache=none,file.driver=host_device,file.filename=");
                drive.push(escaped(path.as_os_str()));
            }
        }
        drive
    }
}

/// In QEMU's options a comma within a value is written twice.
fn escaped(value: &OsStr) -> OsString {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let doubled = |byte: &u8| if *byte == b',' { vec![b',', b','] } else { vec![*byte] };
    OsString::from_vec(value.as_bytes().iter().flat_map(doubled).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(disk: Disk) -> Machine {
        Machine {
            disk,
            aio: Aio::default(),
            memory_mib: 256,
            cpus: 1,
            accelerator: Accelerator::Tcg,
            serial: Serial::Stdout,
            qmp: None,
            reboots: true,
            arguments: vec!["-snapshot".into()],
        }
    }

    #[test]
    fn a_block_device_is_opened_as_one() {
        let line = machine(Disk::Block("/dev/nbd3".into())).arguments();
        let drive = line.iter().find(|word| word.to_string_lossy().contains("disk0,discard")).unwrap();
        assert!(
            drive.to_string_lossy().ends_with("file.driver=host_device,file.filename=/dev/nbd3"),
            "{drive:?}"
        );
    }

    #[test]
    fn a_comma_in_a_path_stays_in_the_path() {
        let line = machine(Disk::Qcow2("/a,b/disk".into())).arguments();
        let drive = line.iter().find(|word| word.to_string_lossy().contains("disk0,discard")).unwrap();
        assert!(drive.to_string_lossy().ends_with("aio=threads,file=/a,,b/disk"), "{drive:?}");
        assert_eq!(line.last().unwrap(), "-snapshot");
    }
}
