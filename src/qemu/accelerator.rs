//! KVM or TCG. That `/dev/kvm` opens says little (nested and emulated hosts abort later), so a guest of one sector is
//! really run on it.

use std::fmt;
use std::io::Write;
use std::process::Stdio;
use std::str::FromStr;
use std::time::Duration;

use tokio::process::Command;

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

    /// Whether a guest of one sector boots.
    pub async fn works(self) -> bool {
        self.try_boot(DEADLINE).await.unwrap_or(false)
    }

    /// The processor model that goes with it: everything it can do.
    pub(super) fn cpu(self) -> &'static str {
        match self {
            Self::Kvm => "host",
            Self::Tcg => "max",
        }
    }

    async fn try_boot(self, deadline: Duration) -> std::io::Result<bool> {
        // AHCI's part of the firmware reads no disk of a single sector.
        let mut disk = vec![0_u8; 1 << 20];
        disk[..BOOT_SECTOR.len()].copy_from_slice(&BOOT_SECTOR);
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        let dir = std::env::temp_dir();
        let path = dir.join(format!("bootcache-accelerator-{}-{self}", std::process::id()));
        std::fs::File::create(&path)?.write_all(&disk)?;
        let mut command = Command::new(super::PROGRAM);
        command
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-m", "32"])
            // Machine and processor as guests get them: on some hosts KVM fails only with a certain processor.
            .args(["-machine", &format!("q35,accel={self}"), "-cpu", self.cpu()])
            .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-drive"])
            .arg(super::joined("if=ide,format=raw,snapshot=on,file=", &path))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true);
        let ended = match command.spawn() {
            Ok(mut guest) => tokio::time::timeout(deadline, guest.wait()).await,
            Err(error) => Ok(Err(error)),
        };
        let _ = std::fs::remove_file(&path);
        Ok(matches!(ended, Ok(Ok(status)) if status.code() == Some(STATUS)))
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
        // The translator on a machine that runs other tests beside this one.
        assert!(Accelerator::Tcg.try_boot(Duration::from_secs(120)).await.unwrap());
    }
}
