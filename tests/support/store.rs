//! A store of the test's own, and the `bootcache` binary on it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::process::Process;

/// The line that `serve` prints when its exports can be used.
const READY: &str = "ready";

/// A store in a temporary folder, removed on drop.
#[derive(Debug)]
pub struct Store {
    folder: tempfile::TempDir,
}

impl Store {
    pub fn new() -> Self {
        let folder =
            tempfile::Builder::new().prefix("bootcache-test-").tempdir().expect("a temporary folder");
        Self { folder }
    }

    /// The store's folder; below it `nbd.sock`, `images`, …
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("store")
    }

    /// A place for other files of the test, beside the store.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `bootcache ARGUMENTS` on this store.
    pub fn command<S: AsRef<std::ffi::OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(bootcache());
        command.args(arguments).env("BOOTCACHE_STORE", self.path());
        command
    }

    /// Runs it; it must succeed. Returns its stdout.
    #[track_caller]
    pub fn run<S: AsRef<std::ffi::OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> String {
        super::run(&mut self.command(arguments))
    }

    /// Runs it; it must fail, within a minute, with one short message, which is returned.
    #[track_caller]
    pub fn refused<S: AsRef<std::ffi::OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> String {
        let mut command = self.command(arguments);
        let mut process = Process::start(&mut command);
        let status = process.wait(Duration::from_secs(60));
        let said = process.said();
        assert!(!status.success(), "{command:?} succeeded:\n{said}");
        assert!(status.code().is_some(), "{command:?} ended by {status}:\n{said}");
        assert!(!said.contains("panicked"), "{command:?}:\n{said}");
        said
    }

    /// Starts `bootcache serve ARGUMENTS` and waits until it is ready.
    #[track_caller]
    pub fn serve<S: AsRef<std::ffi::OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Process {
        let mut command = self.command(["serve"]);
        command.args(arguments);
        let process = Process::start(&mut command);
        process.wait_for(READY, Duration::from_secs(20));
        process
    }

    /// Asserts that so many VMs have booted from their disks, by the daemon's own count: 8 MB of each at least.
    #[track_caller]
    pub fn have_booted(&self, vms: usize) {
        let list = self.run(["--json", "overlay", "list"]);
        let list: serde_json::Value = serde_json::from_str(&list).expect("it is JSON");
        let overlays = list.as_array().expect("a list");
        assert_eq!(overlays.len(), vms, "{list}");
        for overlay in overlays {
            assert!(overlay["read_bytes"].as_u64() >= Some(8_000_000), "{overlay}");
        }
    }

    /// The NBD URI of an export on the store's own socket.
    pub fn uri(&self, export: &str) -> String {
        uri(&self.path().join("nbd.sock"), export)
    }
}

/// A daemon that `boot` or `pull` started outlives that command, and would outlive a test that fails.
impl Drop for Store {
    fn drop(&mut self) {
        let wanted = format!("--store\0{}\0serve\0", self.path().display());
        let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        for process in processes {
            let line = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
            let pid = process.file_name().to_str().and_then(|name| name.parse().ok());
            let pid = pid.and_then(rustix::process::Pid::from_raw);
            if let Some(pid) = pid.filter(|_| String::from_utf8_lossy(&line).contains(&wanted)) {
                let _it_has_ended = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }
}

/// The NBD URI of an export on a Unix socket.
pub fn uri(socket: &Path, export: &str) -> String {
    format!("nbd+unix:///{export}?socket={}", socket.display())
}

/// The binary under test.
pub fn bootcache() -> &'static str {
    env!("CARGO_BIN_EXE_bootcache")
}
