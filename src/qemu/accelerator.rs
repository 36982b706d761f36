//! KVM or TCG. That `/dev/kvm` opens says little (nested and emulated hosts abort later), so a guest of one sector is
//! really run on it.

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::process::Stdio;
use std::str::FromStr;
use std::time::Duration;

use rustix::fs::MemfdFlags;
use tokio::process::Command;
use tracing::warn;

/// What runs a guest's code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// The processor.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        })
    }
}

impl FromStr for Accelerator {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "kvm" => Ok(Self::Kvm),
            "tcg" => Ok(Self::Tcg),
            _ => Err("kvm or tcg is expected".to_owned()),
        }
    }
}

/// A firmware that does not come as far as the boot sector in this time does not work.
const DEADLINE: Duration = Duration::from_secs(10);
/// `mov dx, 0xf4; mov al, 0x10; out dx, al; hlt; jmp $-1`: tells QEMU's debug-exit device to end with status 33.
const BOOT_SECTOR: [u8; 9] = [0xba, 0xf4, 0x00, 0xb0, 0x10, 0xee, 0xf4, 0xeb, 0xfd];
const STATUS: i32 = (0x10 << 1) | 1;

impl Accelerator {
    /// KVM if a guest runs on it, else TCG. Takes a second at most where KVM works.
    pub async fn detect() -> Self {
        let device = std::fs::File::options().read(true).write(true).open("/dev/kvm");
        if device.is_ok() && Self::Kvm.works().await { Self::Kvm } else { Self::Tcg }
    }

    /// Whether a guest of one sector boots. One that cannot be tried counts as one that does not.
    pub async fn works(self) -> bool {
        let tried = async { boots(self.guest()?, DEADLINE).await };
        tried.await.unwrap_or_else(|error| {
            warn!(
                "whether guests run on {self} cannot be tried with {}, so they do not: {error}",
                super::PROGRAM
            );
            false
        })
    }

    /// The processor model that goes with it: everything it can do.
    pub(super) fn cpu(self) -> &'static str {
        match self {
            Self::Kvm => "host",
            Self::Tcg => "max",
        }
    }

    /// QEMU with a disk that is in memory: nobody can put another in its place, and nothing of it is left behind.
    fn guest(self) -> io::Result<Command> {
        // AHCI's part of the firmware reads no disk of a single sector.
        let mut sectors = vec![0_u8; 1 << 20];
        sectors[..BOOT_SECTOR.len()].copy_from_slice(&BOOT_SECTOR);
        sectors[510..512].copy_from_slice(&[0x55, 0xaa]);
        let mut disk = File::from(rustix::fs::memfd_create("boot-sector", MemfdFlags::CLOEXEC)?);
        disk.write_all(&sectors)?;
        let mut command = Command::new(super::PROGRAM);
        command
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-m", "32"])
            // Machine and processor as guests get them: on some hosts KVM fails only with a certain processor.
            .args(["-machine", &format!("q35,accel={self}"), "-cpu", self.cpu()])
            .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"])
            .args(["-drive", "if=ide,format=raw,file=/proc/self/fd/0"])
            .stdin(disk)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true);
        Ok(command)
    }
}

/// Whether the guest comes as far as its boot sector within `deadline`.
async fn boots(mut guest: Command, deadline: Duration) -> io::Result<bool> {
    let mut guest = guest.spawn()?;
    match tokio::time::timeout(deadline, guest.wait()).await {
        Ok(status) => Ok(status?.code() == Some(STATUS)),
        Err(_) => Ok(false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_guest_of_one_sector_runs_where_it_can() {
        if std::process::Command::new(crate::qemu::PROGRAM).arg("--version").output().is_err() {
            assert!(std::env::var_os("CI").is_none(), "CI has QEMU");
            eprintln!("SKIPPED: {} is not installed", crate::qemu::PROGRAM);
            return;
        }
        // Not even a folder for temporary files is needed.
        let mut guest = Accelerator::Tcg.guest().unwrap();
        guest.env("TMPDIR", "/nowhere");
        // The translator on a machine that runs other tests beside this one.
        assert!(boots(guest, Duration::from_secs(120)).await.unwrap());
    }
}
