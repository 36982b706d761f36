//! Guests that boot from their own disks, and a plain QEMU to run them in.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::process::Process;

/// The raw disk of a guest by its name in `scripts/guest`; built on first use (tiny: 4 s, fast: 30 s and more).
#[track_caller]
pub fn disk(name: &str) -> PathBuf {
    let path = super::run(Command::new(super::checkout("scripts/guest")).arg(name));
    PathBuf::from(path.trim_end())
}

/// A tiny guest to be: 128 MB under TCG, the serial line on stdout.
#[derive(Debug)]
pub struct Tiny {
    accelerator: &'static str,
    command: Command,
}

impl Tiny {
    /// `drive` is the value of QEMU's `-drive` without the interface, such as `file=nbd+unix:///x?socket=/s,format=raw`.
    pub fn new(drive: &str) -> Self {
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-m", "128", "-display", "none", "-monitor", "none", "-no-reboot"])
            .args(["-serial", "stdio", "-nic", "none", "-drive"])
            .arg(format!("if=virtio,{drive}"));
        Self { accelerator: "tcg,tb-size=32", command }
    }

    /// The value of `-accel` instead of one that is enough for a small guest.
    pub fn accelerator(mut self, accelerator: &'static str) -> Self {
        self.accelerator = accelerator;
        self
    }

    /// Tells the guest something; `scripts/guests/tiny` has the keys. A comma must be doubled.
    pub fn tell(mut self, key: &str, value: &str) -> Self {
        self.command.arg("-fw_cfg").arg(format!("name=opt/bootcache/{key},string={value}"));
        self
    }

    /// More arguments for QEMU.
    pub fn arguments<S: AsRef<std::ffi::OsStr>>(mut self, arguments: impl IntoIterator<Item = S>) -> Self {
        self.command.args(arguments);
        self
    }

    /// Starts it; its serial lines are the process's lines.
    #[track_caller]
    pub fn start(mut self) -> Process {
        self.command.args(["-accel", self.accelerator]);
        Process::start(&mut self.command)
    }
}

/// The value of `-drive` for an export on a Unix socket, without a cache of QEMU's own.
pub fn nbd_drive(socket: &Path, export: &str) -> String {
    format!(
        "driver=raw,cache=none,file.driver=nbd,file.server.type=unix,file.server.path={},file.export={export}",
        socket.display()
    )
}

/// The same, where the guest outlives a restart of the server: its requests wait for up to a minute.
pub fn patient_nbd_drive(socket: &Path, export: &str) -> String {
    format!("{},file.reconnect-delay=60,file.open-timeout=10", nbd_drive(socket, export))
}

/// Waits until the guest has booted; two cores may be shared by many.
#[track_caller]
pub fn wait_for_boot(guest: &Process) -> String {
    guest.wait_for("BOOTED-OK", Duration::from_secs(240))
}

/// An ext4 disk labelled PAYLOAD with these programs (and their libraries) and a script `run`, for a tiny guest.
#[track_caller]
pub fn payload(disk: &Path, programs: &[&Path], script: &str) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let copy = |from: &Path, to: PathBuf| {
        std::fs::create_dir_all(to.parent().expect("below the folder")).expect("a folder");
        std::fs::copy(from, &to).unwrap_or_else(|error| panic!("{}: {error}", from.display()));
    };
    for program in programs {
        copy(program, folder.path().join(program.file_name().expect("a program's name")));
        let libraries = super::run(Command::new("ldd").arg(program));
        for word in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
            copy(
                Path::new(word),
                folder.path().join("lib").join(Path::new(word).file_name().expect("a library's name")),
            );
        }
    }
    let run = folder.path().join("run");
    std::fs::write(
        &run,
        format!("#!/bin/sh\nexport PATH=/payload:$PATH LD_LIBRARY_PATH=/payload/lib\n{script}\n"),
    )
    .expect("a script");
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&run, executable).expect("an executable script");
    super::run(
        Command::new("/sbin/mke2fs")
            .args(["-q", "-t", "ext4", "-L", "PAYLOAD", "-d"])
            .arg(folder.path())
            .arg(disk)
            .arg("256M"),
    );
}
