//! A compute node with a libvirtd and a dockerd of its own (`scripts/host`), on one host of a [`Net`].

use std::path::{Path, PathBuf};
use std::process::Command;

use super::net::Net;

/// The node's daemons run until drop, which is a power loss: guests and containers go with them.
#[derive(Debug)]
pub struct Host {
    folder: PathBuf,
    libvirt: String,
    user: &'static str,
}

impl Host {
    /// Starts libvirtd in the network namespace of `net`'s host, with its state below `parent`.
    #[track_caller]
    pub fn up(parent: &Path, net: &Net, host: usize) -> Self {
        Self::up_with_qemu_as("root", parent, net, host)
    }

    /// The same, where libvirt runs QEMU as this user, in the group `kvm` as Debian has it.
    #[track_caller]
    pub fn up_with_qemu_as(user: &'static str, parent: &Path, net: &Net, host: usize) -> Self {
        let folder = parent.join(net.namespace(host));
        let libvirt = script_as(user, "up", &folder, &[&net.namespace(host)]);
        Self { folder, libvirt, user }
    }

    /// The URI for libvirt; works from anywhere on this machine.
    pub fn libvirt(&self) -> &str {
        &self.libvirt
    }

    /// Starts dockerd, again after it was killed; returns the address of its API.
    #[track_caller]
    pub fn docker(&self) -> String {
        script("docker", &self.folder, &[])
    }

    /// The address of its dockerd's API, once that was started.
    pub fn docker_address(&self) -> String {
        format!("unix://{}", self.folder.join("docker/docker.sock").display())
    }

    /// The warnings of its libvirtd.
    pub fn libvirtd_said(&self) -> String {
        std::fs::read_to_string(self.folder.join("log/libvirtd.log")).unwrap_or_default()
    }

    /// Where its dockerd's process id is.
    pub fn docker_pid_file(&self) -> PathBuf {
        self.folder.join("docker/docker.pid")
    }

    /// Starts libvirtd again, after it was killed.
    #[track_caller]
    pub fn restart_libvirtd(&self) {
        script("libvirtd", &self.folder, &[]);
    }

    /// A command that will run inside: its processes, network and libvirt folders.
    pub fn command<S: AsRef<std::ffi::OsStr>>(&self, command: impl IntoIterator<Item = S>) -> Command {
        let mut inside = Command::new(super::checkout("scripts/host"));
        inside.arg("exec").arg(&self.folder).args(command);
        inside
    }

    /// Everything in it is killed at once, with nobody told.
    pub fn power_loss(&self) {
        script("down", &self.folder, &[]);
    }

    /// Starts it again after a power loss; what was on its disk is there.
    #[track_caller]
    pub fn power_on(&self, net: &Net, host: usize) {
        script_as(self.user, "up", &self.folder, &[&net.namespace(host)]);
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let mut command = Command::new(super::checkout("scripts/host"));
        let _best_effort = command.arg("remove").arg(&self.folder).output();
    }
}

#[track_caller]
fn script(verb: &str, folder: &Path, arguments: &[&str]) -> String {
    script_as("root", verb, folder, arguments)
}

#[track_caller]
fn script_as(user: &str, verb: &str, folder: &Path, arguments: &[&str]) -> String {
    // Its daemons inherit stdout, so its answer goes through a file.
    let answer = tempfile::NamedTempFile::new().expect("a temporary file");
    let complaint = tempfile::NamedTempFile::new().expect("a temporary file");
    let status = Command::new(super::checkout("scripts/host"))
        .arg(verb)
        .arg(folder)
        .args(arguments)
        .env("QEMU_USER", user)
        .env("QEMU_GROUP", if user == "root" { "root" } else { "kvm" })
        .stdin(std::process::Stdio::null())
        .stdout(answer.reopen().expect("it was just made"))
        .stderr(complaint.reopen().expect("it was just made"))
        .status()
        .expect("scripts/host runs");
    let text = |path: &Path| std::fs::read_to_string(path).unwrap_or_default().trim_end().to_owned();
    assert!(status.success(), "host {verb} {}: {}", folder.display(), text(complaint.path()));
    text(answer.path())
}
