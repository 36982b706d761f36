//! The control plane as processes: a controller, agents whose instances are in memory, nodes with a daemon and none.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::example;
use super::process::Process;

pub const START: Duration = Duration::from_secs(20);
pub const SOON: Duration = Duration::from_secs(40);

pub fn bootcache(store: &Path) -> Command {
    let mut command = Command::new(super::store::bootcache());
    command.arg("--store").arg(store).env_remove("BOOTCACHE_CONTROLLER");
    command
}

/// A controller whose address is what its line says last.
pub fn controller(store: &Path, more: &[&str]) -> (Process, SocketAddr) {
    let mut command = bootcache(store);
    command.args(["controller", "--listen", "127.0.0.1:0", "--report", "127.0.0.1:0"]);
    command.args(["--poll", "0.2", "--offline-after", "2"]).args(more);
    let process = Process::start(&mut command);
    let line = process.wait_for("ready", START);
    let address = line.split(", ").nth(1).expect("the line has the address").parse().expect("an address");
    (process, address)
}

pub fn agent(name: &str, dir: &Path, controller: SocketAddr) -> Process {
    let mut command = Command::new(example("embed_agent"));
    let process = Process::start(command.arg(name).arg(dir.join(name)).arg(controller.to_string()));
    process.wait_for("ready", START);
    process
}

pub fn json(store: &Path, arguments: &[&str]) -> Value {
    let text = super::run(bootcache(store).arg("--json").args(arguments));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

pub fn refused(command: &mut Command) -> String {
    let output = command.output().expect("it starts");
    assert!(!output.status.success(), "{command:?} did not fail");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[track_caller]
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !condition() {
        assert!(Instant::now() < deadline, "did not come true: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

pub fn plan(dir: &Path, count: u32) -> PathBuf {
    let path = dir.join(format!("plan{count}.toml"));
    let text = format!(
        "name = \"lab\"\n[[groups]]\nname = \"g\"\ntype = \"vm\"\nimage = \"debian\"\nmemory = 16\ncount = {count}\n"
    );
    fs::write(&path, text).expect("a plan");
    path
}

pub fn has_image(store: &Path) -> bool {
    json(store, &["images"]).as_array().is_some_and(|images| !images.is_empty())
}
/// A node with a real data plane, which runs no instances; its daemon is ended on drop too.
pub struct DataNode {
    store: PathBuf,
    pub agent: Process,
}

impl DataNode {
    pub fn start(dir: &Path, name: &str, controller: SocketAddr) -> Self {
        Self::start_with(dir, name, controller, &[])
    }

    pub fn start_with(dir: &Path, name: &str, controller: SocketAddr, more: &[&str]) -> Self {
        let peer = format!("127.0.0.1:{}", super::free_port());
        Self::start_taker(dir, name, controller, &[&["--peer-listen", peer.as_str()][..], more].concat())
    }

    /// One that gives images to no other.
    pub fn start_taker(dir: &Path, name: &str, controller: SocketAddr, more: &[&str]) -> Self {
        let store = dir.join(name);
        let mut command = bootcache(&store);
        command.args(["agent", "--no-vms", "--no-containers", "--name", name]);
        command.args(["--controller", &controller.to_string()]);
        let agent = Process::start(command.args(more));
        agent.wait_for("ready", START);
        Self { store, agent }
    }

    /// Gives it an image of a container; `dir` is for what that is made of.
    pub fn add_image(&self, dir: &Path, image: &str) {
        let content = dir.join(image);
        fs::create_dir_all(content.join("bin")).expect("a folder");
        fs::write(content.join("data"), super::noise(1, 3 << 20)).expect("a file");
        let archive = dir.join(format!("{image}.tar"));
        super::run(Command::new("tar").arg("-C").arg(&content).arg("-cf").arg(&archive).arg("."));
        let add = ["image", "add", "--type", "container", image];
        super::run(bootcache(&self.store).args(add).arg(archive));
    }

    pub fn has(&self, image: &str) -> bool {
        let images = json(&self.store, &["image", "list"]);
        images.to_string().contains(&format!("\"{image}\""))
    }

    /// The process of its daemon, while one runs.
    pub fn daemon(&self) -> Option<rustix::process::Pid> {
        let output = bootcache(&self.store).args(["--json", "status"]).output().ok()?;
        let status: Value = serde_json::from_slice(&output.stdout).ok()?;
        rustix::process::Pid::from_raw(i32::try_from(status["pid"].as_i64()?).ok()?)
    }
}

impl Drop for DataNode {
    fn drop(&mut self) {
        // The agent first, which would start another daemon.
        self.agent.signal(rustix::process::Signal::KILL);
        if let Some(pid) = self.daemon() {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
    }
}
