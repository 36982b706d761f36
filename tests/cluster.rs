//! A cluster with real daemons: four nodes with a libvirtd, a dockerd and bridges of their own, and a controller, on links
//! of 1 Gbit/s. VMs boot from bootcache's NBD exports and containers from its store, while their images arrive.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use support::host::Host;
use support::net::{Net, Rate};
use support::process::Process;
use support::{container, guest};

const NODES: usize = 4;
/// The controller's place in the net.
const CONTROLLER: usize = NODES;
/// Its address on the instances' network, where they report: below the nodes' own, which are taken from the top.
const REPORT: &str = "10.55.0.200";
const NEEDS: [&str; 9] =
    ["libvirtd", "virsh", "dockerd", "docker", "unshare", "ip", "busybox", "qemu-system-x86_64", "tar"];
const START: Duration = Duration::from_secs(60);
/// Guests share two cores under TCG.
const UP: Duration = Duration::from_secs(300);

struct Cluster {
    folder: tempfile::TempDir,
    net: Net,
    hosts: Vec<Host>,
    docker: Vec<String>,
    agents: Vec<Option<Process>>,
    controller: Option<Process>,
}

impl Cluster {
    fn up() -> Self {
        let folder = tempfile::tempdir().unwrap();
        // QEMU's user must reach the sockets of the VMs.
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(folder.path(), open).unwrap();
        let net = Net::new(NODES + 1, Rate::Megabits(1000));
        net.add_uplinks();
        for host in 0..=NODES {
            on(&net, host, &["ip", "link", "set", "eth1", "up"]);
        }
        on(&net, CONTROLLER, &["ip", "address", "add", &format!("{REPORT}/24"), "dev", "eth1"]);
        let hosts: Vec<_> = (0..NODES).map(|host| Host::up(folder.path(), &net, host)).collect();
        let docker = hosts.iter().map(Host::docker).collect();
        let agents = (0..NODES).map(|_| None).collect();
        let mut cluster = Self { folder, net, hosts, docker, agents, controller: None };
        cluster.add_images();
        cluster.start_controller();
        for node in 0..NODES {
            cluster.start_agent(node);
        }
        eventually("all nodes are online, and their images known", START, || {
            let nodes = cluster.json(&["nodes"]);
            nodes.as_array().unwrap().iter().filter(|node| node["online"] == true).count() == NODES
                && cluster.json(&["images"]).as_array().unwrap().len() == 2
        });
        cluster
    }

    fn store(&self, node: usize) -> PathBuf {
        self.folder.path().join(format!("store{node}"))
    }

    /// Both images lie on the first node alone.
    fn add_images(&self) {
        let archive = self.folder.path().join("box.tar");
        container::root_fs(&archive, 8 << 20);
        let store = self.store(0);
        let tiny = guest::disk("tiny");
        support::run(bootcache(&store).args(["image", "add", "--format", "raw", "tiny"]).arg(tiny));
        support::run(bootcache(&store).args(["image", "add", "--type", "container", "box"]).arg(archive));
    }

    fn start_controller(&mut self) {
        let mut command = bootcache(&self.folder.path().join("control"));
        let listen = format!("{}:7600", self.net.address(CONTROLLER));
        command.args(["controller", "--plain", "--listen", &listen, "--report", &format!("{REPORT}:7609")]);
        let process = Process::start(&mut self.net.on(CONTROLLER, &command));
        process.wait_for("ready", START);
        self.controller = Some(process);
    }

    fn start_agent(&mut self, node: usize) {
        let address = self.net.address(node);
        let store = self.store(node);
        let mut command = self.hosts[node].command([env!("CARGO_BIN_EXE_bootcache"), "--store"]);
        command.arg(store).args(["agent", "--plain", "--name", &name(node)]);
        command.args(["--controller", &format!("{}:7600", self.net.address(CONTROLLER))]);
        command.args(["--listen", &format!("{address}:7601"), "--peer-listen", &format!("{address}:7602")]);
        command.args(["--connect", self.hosts[node].libvirt(), "--docker", &self.docker[node]]);
        let process = Process::start(&mut command);
        process.wait_for("ready", START);
        self.agents[node] = Some(process);
    }

    /// Kills the agent itself: the process at hand only waits for it, outside of the node's namespaces.
    fn kill_agent(&mut self, node: usize) {
        let process = self.agents[node].take().unwrap();
        let outside = process.id();
        let children = fs::read_to_string(format!("/proc/{outside}/task/{outside}/children")).unwrap();
        let agent = children.trim().parse().ok().and_then(rustix::process::Pid::from_raw).expect("one child");
        rustix::process::kill_process(agent, rustix::process::Signal::KILL).unwrap();
    }

    /// Asks the controller over its socket, which works from anywhere on this machine.
    fn json(&self, arguments: &[&str]) -> Value {
        let mut command = bootcache(&self.folder.path().join("control"));
        let text = support::run(command.arg("--json").args(arguments));
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    fn deploy(&self, plan: &str) -> i64 {
        let path = self.folder.path().join("plan.toml");
        fs::write(&path, plan).unwrap();
        self.json(&["deploy", path.to_str().unwrap()])["task"].as_i64().unwrap()
    }

    fn end(&self, task: i64) {
        support::run(bootcache(&self.folder.path().join("control")).args(["end", &task.to_string()]));
    }

    fn instances(&self, task: i64) -> Vec<Value> {
        self.json(&["instances", &task.to_string()]).as_array().unwrap().clone()
    }

    fn count(&self, task: i64, status: &str) -> usize {
        self.instances(task).iter().filter(|instance| instance["status"] == status).count()
    }

    #[track_caller]
    fn wait_until_up(&self, task: i64, count: usize) {
        let deadline = Instant::now() + UP;
        while self.count(task, "running") < count {
            let failed: Vec<_> =
                self.instances(task).into_iter().filter(|i| i["status"] == "failed").collect();
            assert!(failed.is_empty(), "{failed:?}");
            let rows = self.instances(task);
            assert!(Instant::now() < deadline, "not up: {rows:?}");
            std::thread::sleep(Duration::from_millis(500));
        }
    }

    fn docker(&self, node: usize, arguments: &[&str]) -> String {
        support::run(Command::new("docker").args(["-H", &self.docker[node]]).args(arguments))
    }

    /// Whether `from`, a container, reaches the address.
    fn pings(&self, from: &Value, address: &str) -> bool {
        let node = node_of(from);
        let mut command = Command::new("docker");
        command.args(["-H", &self.docker[node], "exec", from["name"].as_str().unwrap()]);
        command.args(["ping", "-c", "1", "-W", "5", address]);
        command.output().unwrap().status.success()
    }

    /// Nothing of any task is left on a node.
    #[track_caller]
    fn assert_clean(&self, node: usize) {
        let domains = support::run(Command::new("virsh").args([
            "-c",
            self.hosts[node].libvirt(),
            "list",
            "--all",
            "--name",
        ]));
        assert_eq!(domains.trim(), "", "domains on {}", name(node));
        assert_eq!(self.docker(node, &["ps", "-aq"]).trim(), "", "containers on {}", name(node));
        let links = on(&self.net, node, &["ip", "-o", "link"]);
        assert!(!links.contains(": bc") && !links.contains(": tap"), "{}: {links}", name(node));
        let networks = self.docker(node, &["network", "ls", "--format", "{{.Name}}"]);
        assert!(!networks.lines().any(|network| network.starts_with("bc")), "{networks}");
        for folder in ["overlays", "vms", "agent/tasks"] {
            let path = self.store(node).join(folder);
            let left: Vec<_> =
                fs::read_dir(&path).into_iter().flatten().flatten().map(|e| e.path()).collect();
            assert!(left.is_empty(), "{left:?}");
        }
    }
}

fn name(node: usize) -> String {
    format!("n{node}")
}

fn node_of(instance: &Value) -> usize {
    instance["node"].as_str().unwrap()[1..].parse().unwrap()
}

fn address(instance: &Value) -> String {
    instance["addresses"][0].as_str().unwrap().to_owned()
}

fn bootcache(store: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bootcache"));
    command.arg("--store").arg(store).env_remove("BOOTCACHE_CONTROLLER");
    command
}

fn on(net: &Net, host: usize, command: &[&str]) -> String {
    let mut inner = Command::new(command[0]);
    inner.args(&command[1..]);
    support::run(&mut net.on(host, &inner))
}

#[track_caller]
fn eventually(what: &str, within: Duration, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + within;
    while !condition() {
        assert!(Instant::now() < deadline, "did not come true within {within:?}: {what}");
        std::thread::sleep(Duration::from_millis(300));
    }
}

fn plan(vms: u32, containers: u32) -> String {
    format!(
        r#"
        name = "lab"
        [networks.lan]
        subnet = "10.55.0.0/24"
        uplink = "eth1"
        [[groups]]
        name = "vm"
        type = "vm"
        image = "tiny"
        count = {vms}
        memory = "96M"
        networks = [{{ network = "lan", address = "10.55.0.10" }}]
        until = "report"
        [[groups]]
        name = "ct"
        type = "container"
        image = "box"
        count = {containers}
        memory = "16M"
        command = ["/bin/report"]
        networks = [{{ network = "lan", address = "10.55.0.60" }}]
        until = "report"
        "#
    )
}

#[test]
fn a_plan_of_vms_and_containers_comes_up_on_four_nodes_and_survives_its_daemons() {
    if !support::require(&NEEDS) || !support::require_root() {
        return;
    }
    let mut cluster = Cluster::up();
    let task = cluster.deploy(&plan(8, 24));
    cluster.wait_until_up(task, 32);

    let rows = cluster.instances(task);
    for node in 0..NODES {
        let here = |kind: &str| rows.iter().filter(|i| node_of(i) == node && i["kind"] == kind).count();
        assert!(
            here("vm") >= 1 && here("container") >= 3,
            "{} has {} and {}",
            name(node),
            here("vm"),
            here("container")
        );
    }
    // Every VM has read its disk, through the daemon of its node.
    for node in 0..NODES {
        let text = support::run(bootcache(&cluster.store(node)).args(["--json", "status"]));
        let status: Value = serde_json::from_str(&text).unwrap();
        for overlay in status["overlays"].as_array().unwrap() {
            assert!(overlay["read_bytes"].as_u64().unwrap() >= 8 << 20, "{overlay}");
        }
    }
    let of = |kind: &str, node: usize| rows.iter().find(|i| i["kind"] == kind && node_of(i) == node).unwrap();
    for (from, to) in [(0, 0), (0, 1), (2, 3)] {
        assert!(cluster.pings(of("container", from), &address(of("vm", to))), "container {from} to VM {to}");
        assert!(
            cluster.pings(of("container", from), &address(of("container", to))),
            "containers {from}, {to}"
        );
    }

    // The controller is killed: nothing notices, and it knows everything again.
    drop(cluster.controller.take());
    assert!(cluster.pings(of("container", 0), &address(of("vm", 1))));
    cluster.start_controller();
    assert_eq!(cluster.count(task, "running"), 32);

    // An agent is killed: its node is lost, its instances are not; it adopts them.
    cluster.kill_agent(1);
    eventually("the node is offline", Duration::from_secs(15), || {
        cluster.json(&["nodes"])[1]["online"] == false
    });
    assert!(cluster.count(task, "lost") > 0);
    assert!(cluster.pings(of("container", 0), &address(of("vm", 1))));
    cluster.start_agent(1);
    eventually("all run again", START, || cluster.count(task, "running") == 32);

    cluster.end(task);
    for node in 0..NODES {
        cluster.assert_clean(node);
    }
    assert_eq!(cluster.json(&["tasks"]), Value::Array(Vec::new()));
    assert_eq!(cluster.json(&["instances"]), Value::Array(Vec::new()));

    // Power loss of a node: offline, its instances lost, the others go on; it ends with what it was told meanwhile.
    let task = cluster.deploy(&plan(4, 4));
    cluster.wait_until_up(task, 8);
    cluster.hosts[3].power_loss();
    eventually("the node is offline", Duration::from_secs(15), || {
        cluster.json(&["nodes"])[3]["online"] == false
    });
    assert_eq!(cluster.count(task, "lost") + cluster.count(task, "running"), 8);
    cluster.end(task);
    for node in 0..3 {
        cluster.assert_clean(node);
    }
}

/// Seconds of waiting for bytes that the disks of all VMs have seen, and bytes that the nodes have received.
fn waited(cluster: &Cluster) -> (f64, f64, u64) {
    let (mut stream, mut demand, mut received) = (0, 0, 0);
    for node in 0..NODES {
        let text = support::run(bootcache(&cluster.store(node)).args(["--json", "status"]));
        let status: Value = serde_json::from_str(&text).unwrap();
        for overlay in status["overlays"].as_array().unwrap() {
            stream += overlay["waits"]["stream_wait_ms"].as_u64().unwrap_or(0);
            demand += overlay["waits"]["demand_wait_ms"].as_u64().unwrap_or(0);
        }
        received += cluster.net.traffic(node).1;
    }
    (stream as f64 / 1e3, demand as f64 / 1e3, received)
}

#[test]
#[ignore = "by hand: make bench-cluster"]
fn the_thesis_hundred_instances() {
    if !support::require(&NEEDS) || !support::require_root() {
        return;
    }
    for (what, vms, containers) in [("20 VMs + 80 containers", 20, 80), ("containers only", 0, 100)] {
        let cluster = Cluster::up();
        let mut text = plan(vms, containers);
        if vms == 0 {
            let (head, rest) = text.split_once("[[groups]]").unwrap();
            text = format!("{head}[[groups]]{}", rest.split_once("[[groups]]").unwrap().1);
        }
        let task = cluster.deploy(&text);
        cluster.wait_until_up(task, usize::try_from(vms + containers).unwrap());
        let rows = cluster.instances(task);
        let last = |kind: &str| {
            let times = rows.iter().filter(|i| i["kind"] == kind).filter_map(|i| i["up_ms"].as_u64());
            times.max().unwrap_or(0) as f64 / 1e3
        };
        let all = last("vm").max(last("container"));
        let (stream, demand, received) = waited(&cluster);
        println!(
            "{what}: all up after {all:.1} s ({:.2} instances/s; VMs {:.1} s, containers {:.1} s); all VMs together waited \
             {stream:.2} s for the stream and {demand:.2} s for fetches; {:.1} MB came to the four nodes",
            f64::from(vms + containers) / all,
            last("vm"),
            last("container"),
            received as f64 / 1e6,
        );
        cluster.end(task);
    }
}
