//! A cluster with real daemons: nodes with a libvirtd, a dockerd and bridges of their own, and a controller, on links of
//! 1 Gbit/s. The images `tiny` (a VM) and `box` (a container) lie on the first node alone.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::host::Host;
use super::net::{Net, Rate};
use super::process::Process;
use super::{container, guest};

/// The controller's address on the instances' network, where they report: below the nodes' own, which are taken from
/// the top.
pub const REPORT: &str = "10.55.0.200";
pub const NEEDS: [&str; 9] =
    ["libvirtd", "virsh", "dockerd", "docker", "unshare", "ip", "busybox", "qemu-system-x86_64", "tar"];
pub const START: Duration = Duration::from_secs(60);
/// Guests share two cores under TCG.
pub const UP: Duration = Duration::from_secs(300);
/// What is left of a network when no instance is on it.
const CARDS: [&str; 3] = ["lo", "eth0", "eth1"];

/// Everything in it is gone on drop. One at a time in a process: there are two cores.
pub struct Cluster {
    controller: Option<Process>,
    agents: Vec<Option<Process>>,
    pub hosts: Vec<Host>,
    docker: Vec<String>,
    pub net: Net,
    // After those who would make it anew.
    pub folder: tempfile::TempDir,
    _alone: MutexGuard<'static, ()>,
}

impl Cluster {
    /// So many nodes that are online; `payload` is how many bytes that do not compress the container's image has.
    #[track_caller]
    pub fn up(nodes: usize, payload: usize) -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let folder = tempfile::tempdir().expect("a temporary folder");
        // QEMU's user must reach the sockets of the VMs.
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(folder.path(), open).expect("its owner");
        let net = Net::new(nodes + 1, Rate::Megabits(1000));
        net.add_uplinks(Rate::Megabits(1000));
        for host in 0..=nodes {
            on(&net, host, &["ip", "link", "set", "eth1", "up"]);
        }
        on(&net, nodes, &["ip", "address", "add", &format!("{REPORT}/24"), "dev", "eth1"]);
        let hosts: Vec<_> = (0..nodes).map(|host| Host::up(folder.path(), &net, host)).collect();
        let docker = hosts.iter().map(Host::docker).collect();
        let agents = (0..nodes).map(|_| None).collect();
        let mut cluster = Self { folder, net, hosts, docker, agents, controller: None, _alone: alone };
        cluster.add_images(payload);
        cluster.start_controller();
        for node in 0..nodes {
            cluster.start_agent(node);
        }
        eventually("all nodes are online, and their images known", START, || {
            cluster.online() == nodes && cluster.rows(&["images"]).len() == 2
        });
        cluster
    }

    /// The folder of a node's store.
    pub fn store(&self, node: usize) -> PathBuf {
        self.folder.path().join(format!("store{node}"))
    }

    fn add_images(&self, payload: usize) {
        let archive = self.folder.path().join("box.tar");
        container::root_fs(&archive, payload);
        let store = self.store(0);
        let tiny = guest::disk("tiny");
        super::run(bootcache(&store).args(["image", "add", "--format", "raw", "tiny"]).arg(tiny));
        super::run(bootcache(&store).args(["image", "add", "--type", "container", "box"]).arg(archive));
    }

    /// The controller's place in the net: after the nodes.
    fn controller_host(&self) -> usize {
        self.hosts.len()
    }

    pub fn start_controller(&mut self) {
        let host = self.controller_host();
        let mut command = bootcache(&self.folder.path().join("control"));
        let listen = format!("{}:7600", self.net.address(host));
        command.args([
            "controller",
            "--plain",
            "--allow-privileged",
            "--listen",
            &listen,
            "--report",
            &format!("{REPORT}:7609"),
        ]);
        let process = Process::start(&mut self.net.on(host, &command));
        process.wait_for("ready", START);
        self.controller = Some(process);
    }

    /// SIGKILL.
    pub fn kill_controller(&mut self) {
        drop(self.controller.take());
    }

    pub fn start_agent(&mut self, node: usize) {
        let address = self.net.address(node);
        let store = self.store(node);
        // Its daemon's log is for whoever reads of a failure.
        let mut command = self.hosts[node].command([super::store::bootcache(), "--store"]);
        command.env("BOOTCACHE_LOG", "bootcache=debug,bootcache_nbd=debug");
        command.arg(store).args(["agent", "--plain", "--name", &name(node)]);
        command.args(["--daemon-patience", "3600"]); // one that hangs is to be seen
        command.args(["--controller", &format!("{}:7600", self.net.address(self.controller_host()))]);
        command.args(["--listen", &format!("{address}:7601"), "--peer-listen", &format!("{address}:7602")]);
        command.args(["--connect", self.hosts[node].libvirt(), "--docker", &self.docker[node]]);
        let process = Process::start(&mut command);
        process.wait_for("ready", START);
        self.agents[node] = Some(process);
    }

    /// Kills the agent itself: the process at hand only waits for it, outside of the node's namespaces.
    pub fn kill_agent(&mut self, node: usize) {
        let process = self.agents[node].take().expect("it runs");
        let outside = process.id();
        let children = fs::read_to_string(format!("/proc/{outside}/task/{outside}/children"));
        let child = children.expect("it runs").trim().parse().ok();
        let agent = child.and_then(rustix::process::Pid::from_raw).expect("one child");
        rustix::process::kill_process(agent, rustix::process::Signal::KILL).expect("it runs");
    }

    /// What the agent has said so far.
    pub fn agent_said(&self, node: usize) -> String {
        self.agents[node].as_ref().map_or_else(String::new, Process::said)
    }

    /// Kills every process of a node at once.
    pub fn power_loss(&mut self, node: usize) {
        self.hosts[node].power_loss();
        self.agents[node] = None;
    }

    /// Starts a node again after a power loss: its daemons, and its agent.
    pub fn power_on(&mut self, node: usize) {
        self.hosts[node].power_on(&self.net, node);
        self.docker[node] = self.hosts[node].docker();
        self.start_agent(node);
    }

    /// A command of the controller. It is asked over its socket, which works from anywhere on this machine.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = bootcache(&self.folder.path().join("control"));
        command.args(arguments);
        command
    }

    /// What a command of the controller says.
    #[track_caller]
    pub fn json(&self, arguments: &[&str]) -> Value {
        let text = super::run(self.command(arguments).arg("--json"));
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// The rows of a command that lists.
    #[track_caller]
    pub fn rows(&self, arguments: &[&str]) -> Vec<Value> {
        self.json(arguments).as_array().expect("a list").clone()
    }

    /// What a node's data plane has.
    #[track_caller]
    pub fn status(&self, node: usize) -> Value {
        let text = super::run(bootcache(&self.store(node)).args(["--json", "status"]));
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    pub fn online(&self) -> usize {
        self.rows(&["nodes"]).iter().filter(|node| node["online"] == true).count()
    }

    pub fn is_online(&self, node: usize) -> bool {
        self.rows(&["nodes"]).iter().any(|row| row["name"] == name(node).as_str() && row["online"] == true)
    }

    #[track_caller]
    pub fn deploy(&self, plan: &str) -> i64 {
        let path = self.folder.path().join("plan.toml");
        fs::write(&path, plan).expect("room for it");
        self.json(&["deploy", path.to_str().expect("UTF-8")])["task"].as_i64().expect("a number")
    }

    /// Returns when nothing is left of the task.
    #[track_caller]
    pub fn end(&self, task: i64) {
        super::run(&mut self.command(&["end", &task.to_string()]));
    }

    #[track_caller]
    pub fn begin_to_end(&self, task: i64) {
        super::run(&mut self.command(&["end", "--background", &task.to_string()]));
    }

    pub fn instances(&self, task: i64) -> Vec<Value> {
        self.rows(&["instances", &task.to_string()])
    }

    pub fn count(&self, task: i64, status: &str) -> usize {
        self.instances(task).iter().filter(|instance| instance["status"] == status).count()
    }

    #[track_caller]
    pub fn wait_until_up(&self, task: i64, count: usize, within: Duration) {
        let deadline = Instant::now() + within;
        loop {
            let rows = self.instances(task);
            let of = |status: &str| rows.iter().filter(|row| row["status"] == status).collect::<Vec<_>>();
            if of("running").len() == count {
                return;
            }
            assert!(of("failed").is_empty(), "{:?}", of("failed"));
            assert!(Instant::now() < deadline, "not up within {within:?}: {rows:?}\n{}", self.agents_said());
            std::thread::sleep(Duration::from_millis(300));
        }
    }

    /// Asserts that every VM has read its disk, through the daemon of its node: 8 MB at least.
    #[track_caller]
    pub fn have_booted(&self) {
        for node in 0..self.hosts.len() {
            for overlay in self.status(node)["overlays"].as_array().expect("a list") {
                assert!(overlay["read_bytes"].as_u64() >= Some(8_000_000), "{overlay}");
            }
        }
    }

    /// What the daemons have said and which processes the nodes run: for whoever reads of a failure.
    fn agents_said(&self) -> String {
        let of = |node: usize| {
            let ps = ["ps", "axf", "-o", "pid,stat,wchan:20,etime,args", "--cols", "250"];
            let processes = output(self.hosts[node].command(ps));
            let mut status = Command::new("timeout"); // one that hangs may be what is looked for
            status.args(["10", super::store::bootcache(), "--store"]).arg(self.store(node)).arg("status");
            let serve = fs::read_to_string(self.store(node).join("serve.log")).unwrap_or_default();
            let lines: Vec<_> = serve.lines().collect();
            let serve = lines[lines.len().saturating_sub(80)..].join("\n");
            let (name, agent, libvirtd) =
                (name(node), self.agent_said(node), self.hosts[node].libvirtd_said());
            let status = output(status);
            format!("{name}:\n{agent}\nserve:\n{serve}\n{status}\nlibvirtd:\n{libvirtd}\n{processes}\n")
        };
        (0..self.hosts.len()).map(of).collect()
    }

    #[track_caller]
    pub fn docker(&self, node: usize, arguments: &[&str]) -> String {
        super::run(Command::new("docker").args(["-H", &self.docker[node]]).args(arguments))
    }

    #[track_caller]
    pub fn virsh(&self, node: usize, arguments: &[&str]) -> String {
        super::run(Command::new("virsh").args(["-c", self.hosts[node].libvirt()]).args(arguments))
    }

    /// Whether `from`, a container, reaches the address.
    pub fn pings(&self, from: &Value, address: &str) -> bool {
        let node = node_of(from);
        let mut command = Command::new("docker");
        command.args(["-H", &self.docker[node], "exec", from["name"].as_str().expect("a name")]);
        command.args(["ping", "-c", "1", "-W", "5", address]);
        command.output().expect("docker is installed").status.success()
    }

    /// What of any task is left on a node; empty when nothing is.
    pub fn left(&self, node: usize) -> Vec<String> {
        let lines = |what: &str, text: String| {
            let lines = text.lines().filter(|line| !line.trim().is_empty());
            lines.map(|line| format!("{what} {line}")).collect::<Vec<_>>()
        };
        let mut left = lines("domain", self.virsh(node, &["list", "--all", "--name"]));
        left.extend(lines("container", self.docker(node, &["ps", "-a", "--format", "{{.Names}}"])));
        let networks = self.docker(node, &["network", "ls", "--format", "{{.Name}}"]);
        left.extend(lines("network", networks).into_iter().filter(|line| line.starts_with("network bc")));
        let links = on(&self.net, node, &["ip", "-o", "link"]);
        let names = links.lines().filter_map(|line| line.split(": ").nth(1)?.split('@').next());
        left.extend(names.filter(|name| !CARDS.contains(name)).map(|name| format!("device {name}")));
        let status = self.status(node);
        for kind in ["overlays", "vms"] {
            let open = status[kind].as_array().expect("a list").iter();
            left.extend(open.map(|one| format!("export {}", one["name"])));
        }
        for folder in ["overlays", "vms", "attached", "agent/tasks"] {
            let entries = fs::read_dir(self.store(node).join(folder)).into_iter().flatten().flatten();
            left.extend(entries.map(|entry| entry.path().display().to_string()));
        }
        left
    }

    #[track_caller]
    pub fn assert_clean(&self, node: usize) {
        let left = self.left(node);
        assert!(left.is_empty(), "left on {}: {left:?}", name(node));
    }
}

/// The name of a node.
pub fn name(node: usize) -> String {
    format!("n{node}")
}

/// The node that an instance is on.
#[track_caller]
pub fn node_of(instance: &Value) -> usize {
    instance["node"].as_str().and_then(|name| name[1..].parse().ok()).expect("a node's name")
}

/// The first address of an instance.
#[track_caller]
pub fn address(instance: &Value) -> String {
    instance["addresses"][0].as_str().expect("an address").to_owned()
}

fn bootcache(store: &Path) -> Command {
    let mut command = Command::new(super::store::bootcache());
    command.arg("--store").arg(store).env_remove("BOOTCACHE_CONTROLLER");
    command
}

/// Runs a command in the network of a host.
#[track_caller]
pub fn on(net: &Net, host: usize, command: &[&str]) -> String {
    let mut inner = Command::new(command[0]);
    inner.args(&command[1..]);
    super::run(&mut net.on(host, &inner))
}

#[track_caller]
pub fn eventually(what: &str, within: Duration, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + within;
    while !condition() {
        assert!(Instant::now() < deadline, "did not come true within {within:?}: {what}");
        std::thread::sleep(Duration::from_millis(300));
    }
}

fn output(mut command: Command) -> String {
    command
        .output()
        .map_or_else(|error| error.to_string(), |output| String::from_utf8_lossy(&output.stdout).into_owned())
}
