//! KVM or TCG. That `/dev/kvm` opens says little (nested and emulated hosts abort later), so a guest of one sector is
//! really run on it, through the modes that a kernel goes through.

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::process::Stdio;
use std::str::FromStr;
use std::time::Duration;

use rustix::fs::MemfdFlags;
use tokio::io::AsyncReadExt;
use tokio::process::{ChildStderr, Command};
use tracing::warn;

use super::boot_sector;

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

/// What QEMU prints when KVM cannot go on with a guest; the guest stands still from then on.
const GAVE_UP: &str = "KVM internal error";
/// A guest that does not come to the end of its boot sector in this time does not run.
const DEADLINE: Duration = Duration::from_secs(10);

impl Accelerator {
    /// KVM if a guest runs on it, else TCG. Takes a second at most where KVM works.
    pub async fn detect() -> Self {
        // Without the processor's help KVM runs kernels that were made for that alone, and takes seconds to fail.
        let helped = std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|info| virtualizes(&info));
        let device = std::fs::File::options().read(true).write(true).open("/dev/kvm");
        if helped && device.is_ok() && Self::Kvm.works().await { Self::Kvm } else { Self::Tcg }
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
        sectors[..512].copy_from_slice(&boot_sector::bytes());
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
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        Ok(command)
    }
}

/// Whether `cpuinfo`, as of `/proc/cpuinfo`, tells of a processor with Intel's or AMD's extensions for guests.
fn virtualizes(cpuinfo: &str) -> bool {
    let mut flags = cpuinfo.lines().filter(|line| line.starts_with("flags"));
    flags.any(|line| line.split_ascii_whitespace().any(|flag| flag == "vmx" || flag == "svm"))
}

/// Whether QEMU, which `printed` this, has stopped its guest because KVM cannot go on with it.
pub fn gave_up(printed: &[u8]) -> bool {
    printed.windows(GAVE_UP.len()).any(|window| window == GAVE_UP.as_bytes())
}

/// Whether the guest comes to the end of its boot sector within `deadline`.
async fn boots(mut guest: Command, deadline: Duration) -> io::Result<bool> {
    let mut guest = guest.spawn()?;
    let stderr = guest.stderr.take();
    let status = tokio::select! {
        status = guest.wait() => status?,
        () = stuck(stderr) => return Ok(false),
        () = tokio::time::sleep(deadline) => return Ok(false),
    };
    Ok(status.code() == Some(boot_sector::STATUS))
}

/// Resolves when QEMU says that KVM gave up.
async fn stuck(stderr: Option<ChildStderr>) {
    let Some(mut stderr) = stderr else { return std::future::pending().await };
    let mut chunk = [0; 4096];
    // QEMU writes a line at a time.
    while let Ok(length @ 1..) = stderr.read(&mut chunk).await {
        if gave_up(&chunk[..length]) {
            return;
        }
    }
    std::future::pending().await
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

    #[test]
    fn kvm_without_the_processors_help_is_not_tried() {
        assert!(virtualizes("processor\t: 0\nflags\t\t: fpu vme vmx smx\nvmx flags\t: ept\n"));
        assert!(virtualizes("flags\t\t: fpu svm\n\nprocessor\t: 1\nflags\t\t: fpu svm\n"));
        assert!(!virtualizes("model name\t: svm\nflags\t\t: fpu vmxnet hypervisor\n"));
        assert!(!virtualizes(""));
    }

    #[tokio::test]
    async fn a_guest_that_kvm_gives_up_is_not_waited_for() {
        // As QEMU does it: the guest stands still, the process goes on.
        let mut guest = Command::new("sh");
        guest.args([
            "-c",
            "echo 'KVM internal error. Suberror: 1' >&2; echo 'emulation failure' >&2; exec sleep 600",
        ]);
        guest.stderr(Stdio::piped()).kill_on_drop(true);
        let start = std::time::Instant::now();
        assert!(!boots(guest, Duration::from_secs(300)).await.unwrap());
        assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
    }
}
