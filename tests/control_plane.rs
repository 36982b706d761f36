//! The control plane as processes: the examples, a client in another language, kills at random moments, bad bytes,
//! certificates. Instances are in memory here; `tests/cluster.rs` has real ones.

mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use support::example;
use support::process::Process;

const START: Duration = Duration::from_secs(20);
const SOON: Duration = Duration::from_secs(40);

fn bootcache(store: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bootcache"));
    command.arg("--store").arg(store).env_remove("BOOTCACHE_CONTROLLER");
    command
}

/// A controller whose address is what its line says last.
fn controller(store: &Path, more: &[&str]) -> (Process, SocketAddr) {
    let mut command = bootcache(store);
    command.args(["controller", "--listen", "127.0.0.1:0", "--report", "127.0.0.1:0"]);
    command.args(["--poll", "0.2", "--offline-after", "2"]).args(more);
    let process = Process::start(&mut command);
    let line = process.wait_for("ready", START);
    let address = line.split(", ").nth(1).expect("the line has the address").parse().expect("an address");
    (process, address)
}

fn agent(name: &str, dir: &Path, controller: SocketAddr) -> Process {
    let mut command = Command::new(example("embed_agent"));
    let process = Process::start(command.arg(name).arg(dir.join(name)).arg(controller.to_string()));
    process.wait_for("ready", START);
    process
}

fn json(store: &Path, arguments: &[&str]) -> Value {
    let text = support::run(bootcache(store).arg("--json").args(arguments));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

fn refused(command: &mut Command) -> String {
    let output = command.output().expect("it starts");
    assert!(!output.status.success(), "{command:?} did not fail");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[track_caller]
fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !condition() {
        assert!(Instant::now() < deadline, "did not come true: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn plan(dir: &Path, count: u32) -> PathBuf {
    let path = dir.join(format!("plan{count}.toml"));
    let text = format!(
        "name = \"lab\"\n[[groups]]\nname = \"g\"\ntype = \"vm\"\nimage = \"debian\"\nmemory = 16\ncount = {count}\n"
    );
    fs::write(&path, text).expect("a plan");
    path
}

fn has_image(store: &Path) -> bool {
    json(store, &["images"]).as_array().is_some_and(|images| !images.is_empty())
}

#[test]
fn the_embedded_controller_and_agent_meet() {
    let dir = tempfile::tempdir().expect("a folder");
    let controller = Process::start(Command::new(example("embed_controller")).arg(dir.path().join("c")));
    let line = controller.wait_for("ready on", START);
    let address = line.rsplit(' ').next().expect("a word").parse().expect("an address");
    let agent = agent("n1", dir.path(), address);
    agent.wait_for("demo-1-web-3 starts with 16 MiB", SOON);
    controller.wait_for("task 1 is gone", SOON);
}

#[test]
fn a_client_in_python_deploys_and_ends() {
    let python = "/usr/bin/python3";
    let has_msgpack = Command::new(python).args(["-c", "import msgpack"]).status().is_ok_and(|s| s.success());
    if !has_msgpack && !support::skip("python3-msgpack is not installed; run scripts/setup") {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let (_controller, address) = controller(dir.path(), &[]);
    let _agent = agent("n1", dir.path(), address);
    eventually("the node has an image", || has_image(dir.path()));
    let client = |target: &str, arguments: &[&str]| {
        let mut command = Command::new(python);
        support::run(command.arg(support::checkout("examples/mfd_client.py")).arg(target).args(arguments))
    };
    assert!(client(&address.to_string(), &["nodes"]).starts_with("n1 online 127.0.0.1:"));
    let plan = dir.path().join("plan.json");
    let groups = r#"[{"name":"g","type":"vm","image":"debian","memory":16,"count":2}]"#;
    fs::write(&plan, format!(r#"{{"name":"lab","groups":{groups}}}"#)).expect("a plan");
    let socket = dir.path().join("controller/controller.sock");
    let said = client(socket.to_str().expect("UTF-8"), &["deploy", plan.to_str().expect("UTF-8")]);
    assert!(said.starts_with("task 1 running"), "{said}");
    client(&address.to_string(), &["end", "1"]);
    eventually("the task has gone", || json(dir.path(), &["tasks"]) == Value::Array(Vec::new()));
}

#[test]
fn kills_of_controller_and_agents_leave_no_duplicate_and_no_orphan() {
    let rounds = support::rounds(6);
    let dir = tempfile::tempdir().expect("a folder");
    let mut seed = support::noise(rounds.into(), 64).into_iter().cycle();
    let mut random = move |below: u64| u64::from(seed.next().expect("it is endless")) * below / 256;
    let port = support::free_port();
    let listen = format!("127.0.0.1:{port}");
    let start = || {
        let mut command = bootcache(dir.path());
        command.args(["controller", "--listen", &listen, "--poll", "0.2", "--offline-after", "2"]);
        let process = Process::start(&mut command);
        process.wait_for("ready", START);
        process
    };
    let address: SocketAddr = listen.parse().expect("an address");
    let mut controller = start();
    let names = ["n1", "n2"];
    let mut agents = names.map(|name| Some(agent(name, dir.path(), address)));
    eventually("the nodes have an image", || {
        has_image(dir.path()) && json(dir.path(), &["nodes"]).as_array().map(Vec::len) == Some(2)
    });
    for round in 0..rounds {
        let path = plan(dir.path(), 4);
        let task =
            json(dir.path(), &["deploy", path.to_str().expect("UTF-8")])["task"].as_i64().expect("a number");
        std::thread::sleep(Duration::from_millis(random(400)));
        if round % 2 == 0 {
            drop(controller);
            controller = start();
        } else {
            let which = usize::try_from(random(2)).expect("0 or 1");
            // Its instances, which are in its memory, go with it: they are started again, or seen to have ended.
            drop(agents[which].take());
            agents[which] = Some(agent(names[which], dir.path(), address));
        }
        let settled = |instance: &Value| matches!(instance["status"].as_str(), Some("running" | "stopped"));
        eventually("every instance runs or has ended", || {
            let rows = json(dir.path(), &["instances", &task.to_string()]);
            let rows = rows.as_array().expect("a list");
            rows.len() == 4 && rows.iter().all(settled)
        });
        support::run(bootcache(dir.path()).args(["end", "--background", &task.to_string()]));
        std::thread::sleep(Duration::from_millis(random(200)));
        if round % 3 == 0 {
            drop(controller);
            controller = start();
        }
        eventually("the task has gone", || json(dir.path(), &["tasks"]) == Value::Array(Vec::new()));
        eventually("no node has a file of it", || {
            names
                .iter()
                .all(|name| fs::read_dir(dir.path().join(name).join("tasks")).is_ok_and(|d| d.count() == 0))
        });
        assert_eq!(json(dir.path(), &["instances"]), Value::Array(Vec::new()));
    }
    drop(controller);
    // It checks the whole database when it starts.
    drop(start());
}

/// Sends bytes and returns what comes back until the connection ends, or twenty seconds have passed.
fn say(address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).expect("it listens");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a socket");
    // It may close before all has been sent.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    answer
}

/// Where the first node's agent listens.
fn agent_address(store: &Path) -> SocketAddr {
    let nodes = json(store, &["nodes"]);
    nodes[0]["address"].as_str().and_then(|text| text.parse().ok()).expect("an address")
}

fn resident_kib(process: &Process) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", process.id())).expect("it runs");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("it has memory");
    line.split_whitespace().nth(1).expect("a number").parse().expect("a number")
}

#[test]
fn bad_bytes_change_nothing_and_cost_nothing() {
    let dir = tempfile::tempdir().expect("a folder");
    let (controller, address) = controller(dir.path(), &[]);
    let agent = agent("n1", dir.path(), address);
    eventually("the node has an image", || has_image(dir.path()));
    let agent_address = agent_address(dir.path());
    let path = plan(dir.path(), 2);
    support::run(bootcache(dir.path()).args(["deploy", "--wait"]).arg(path));
    let before = (resident_kib(&controller), resident_kib(&agent));
    let known = lasting(dir.path());
    // {"id":1,"version":1,"body":{"task":99}} and the like, as recorded from the Python client.
    let end = b"\x83\xa2id\x01\xa7version\x01\xa4body\x81\xa4task\x63";
    let other_version = b"\x83\xa2id\x01\xa7version\x02\xa4body\x81\xa4task\x01";
    let unknown_field = b"\x83\xa2id\x01\xa7version\x01\xa4body\x82\xa4task\x01\xa1x\x01";
    let corpus: Vec<(Vec<u8>, &str)> = vec![
        (frame(4, end), "not_found"),
        (frame(4, other_version), "version"),
        (frame(4, unknown_field), "malformed"),
        (frame(0x7f, end), "unknown_type"),
        (frame(4, b"\xc1"), "malformed"),
        (frame(4, &[0xdd; 100]), "malformed"),
        (frame(4, &[0x91; 10_000]), "malformed"),
        (frame(8, end), "unknown_type"),
    ];
    for (bytes, expected) in &corpus {
        let answer = say(address, bytes);
        let text = String::from_utf8_lossy(&answer);
        assert!(text.contains(expected), "{expected}: {text}");
        for end in 0..bytes.len().min(64) {
            say(address, &bytes[..end]);
        }
    }
    assert!(say(address, b"MFD\x04\xff\xff\xff\xff").is_empty(), "4 GiB were taken for a length");
    assert!(say(address, b"GET / HTTP/1.1\r\n\r\n").is_empty());
    for seed in 0..200 {
        let mut bytes = support::noise(seed, 300);
        if seed % 2 == 0 {
            bytes = frame(u8::try_from(seed % 0x30).expect("small"), &bytes);
        }
        say(address, &bytes);
        say(agent_address, &bytes);
    }
    // An order of another cluster.
    let cluster = b"\x83\xa2id\x01\xa7version\x01\xa4body\x82\xa7cluster\xa1x\xa4task\x01";
    assert!(String::from_utf8_lossy(&say(agent_address, &frame(9, cluster))).contains("another cluster"));
    assert!(resident_kib(&controller) < before.0 + (64 << 10), "bad bytes have cost the controller memory");
    assert!(resident_kib(&agent) < before.1 + (64 << 10), "bad bytes have cost the agent memory");
    assert_eq!(lasting(dir.path()), known);
}

/// A frame as it is on the wire.
fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![b'M', b'F', b'D', kind];
    bytes.extend(u32::try_from(payload.len()).expect("short").to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// What a controller knows, without what changes by itself.
fn lasting(store: &Path) -> [Value; 4] {
    let passing = ["load", "score", "memory_free", "silent_ms", "troubles", "cpu", "memory_bytes"];
    ["tasks", "instances", "images", "nodes"].map(|what| {
        let mut rows = json(store, &[what]);
        for row in rows.as_array_mut().expect("a list").iter_mut().filter_map(Value::as_object_mut) {
            passing.iter().for_each(|field| drop(row.remove(*field)));
        }
        rows
    })
}

#[test]
fn nonsense_is_warned_of_once_a_second_at_most() {
    let dir = tempfile::tempdir().expect("a folder");
    let (controller, address) = controller(dir.path(), &[]);
    let node = DataNode::start(dir.path(), "n1", address);
    eventually("the node is known", || {
        json(dir.path(), &["nodes"]).as_array().is_some_and(|rows| !rows.is_empty())
    });
    let agent_address = agent_address(dir.path());
    let end = b"\x83\xa2id\x01\xa7version\x01\xa4body\x81\xa4task\x63";
    let other_version = b"\x83\xa2id\x01\xa7version\x02\xa4body\x81\xa4task\x01";
    for (process, address) in [(&controller, address), (&node.agent, agent_address)] {
        let began = Instant::now();
        for _ in 0..200 {
            say(address, b"GET / HTTP/1.1\r\n\r\n");
        }
        process.wait_for("is closed: not an MFD frame", SOON);
        let cases: [(Vec<u8>, &str); 4] = [
            (b"MFD\x04\xff\xff\xff\xff".to_vec(), "is over the limit"),
            (frame(0x7f, end), "makes no sense: frames of type 0x7f are not known here"),
            (frame(9, b"\xc1"), "makes no sense: "),
            (frame(9, other_version), "makes no sense: the protocol's version here is 1"),
        ];
        for (bytes, expected) in cases {
            eventually(expected, || {
                say(address, &bytes);
                process.said().contains(expected)
            });
        }
        let told = process.said().lines().filter(|line| line.contains("from 127.0.0.1:")).count();
        let seconds = usize::try_from(began.elapsed().as_secs()).expect("a short test");
        assert!(told <= seconds + 1, "{told} warnings in {seconds} s:\n{}", process.said());
        assert!(process.said().contains("more since the last warning"), "{}", process.said());
    }
}

/// `bytes` with one to four of them changed, mostly behind the header.
fn mutated(bytes: &[u8], seed: u64) -> Vec<u8> {
    let noise = support::noise(seed, 17);
    let first = if seed.is_multiple_of(8) { 0 } else { 8 };
    let mut bytes = bytes.to_vec();
    for change in noise[1..].chunks(4).take(1 + usize::from(noise[0] % 4)) {
        let at = first + usize::from(u16::from_le_bytes([change[0], change[1]])) % (bytes.len() - first);
        bytes[at] = change[2];
    }
    bytes
}

/// A request of every type, to the controller and to an agent.
fn requests(cluster: &str) -> [Vec<(&'static str, Vec<u8>)>; 2] {
    use bootcache::wire::cluster as say;
    fn encoded<B: say::Body>(body: B) -> Vec<u8> {
        let request = say::Request { id: 1, version: Some(say::PROTOCOL_VERSION), body };
        bootcache::wire::frame::encode(B::TYPE, &request).expect("it is short")
    }
    let (cluster, node, image) = (cluster.to_owned(), "n1", "debian");
    let plan = bootcache::plan::read::parse(
        "name = \"fuzz\"\n[networks.lan]\nsubnet = \"10.0.0.0/24\"\n[[groups]]\nname = \"g\"\ntype = \"vm\"\n\
         image = \"debian\"\nmemory = 16\ndisk = \"2G\"\ndisk_by = \"kernel\"\nuntil = \"serial:x\"\n\
         networks = [{ network = \"lan\" }]",
    )
    .expect("a sound plan");
    let here = say::ImageHere {
        name: image.parse().expect("a name"),
        root: bootcache::digest::Digest::of(b"debian"),
        kind: bootcache::image::manifest::ImageKind::Vm,
        size: 1 << 30,
        boot_bytes: 7,
        boot: Some(bootcache::digest::Digest::of(b"heads")),
        present: 1 << 30,
        allocated: 1 << 30,
        complete: true,
        boot_complete: true,
        received: 0,
    };
    let state = say::InstanceState {
        name: "lab-1-g-1".parse().expect("a name"),
        task: 1,
        status: say::InstanceStatus::Running,
        reason: Some("none".to_owned()),
        up_ms: Some(1),
        cpu: 0.5,
        memory_bytes: 1,
        network_bytes: [1, 2],
    };
    let register = say::RegisterCompute {
        node: node.parse().expect("a name"),
        ip: None,
        port: 1,
        kinds: vec![bootcache::hypervisor::InstanceType::Vm],
        cpus: 1,
        memory_bytes: 1 << 30,
        addresses: vec![say::Address { ip: [127, 0, 0, 1].into(), mac: String::new() }],
    };
    let needed = say::Needed {
        name: here.name.clone(),
        root: here.root,
        boot: here.boot,
        size: here.size,
        sources: vec![SocketAddr::from(([127, 0, 0, 1], 1))],
    };
    let order = say::InstanceOrder {
        name: "fuzz-1000-g-1".parse().expect("a name"),
        kind: bootcache::hypervisor::InstanceType::Vm,
        image: here.name.clone(),
        cpus: 1,
        memory_mib: 16,
        disk_bytes: Some(1 << 31),
        disk_by: bootcache::hypervisor::DiskBy::Kernel,
        nics: Vec::new(),
        env: [("A".to_owned(), "b".to_owned())].into(),
        command: vec!["sh".to_owned()],
        privileged: false,
        template: None,
        common: Some(0),
        up_when: say::UpWhen::Started,
        time_limit_s: 60,
    };
    let part = say::Part {
        networks: Vec::new(),
        images: vec![needed.clone()],
        common: vec![say::Common { env: order.env.clone(), command: order.command.clone(), template: None }],
        instances: vec![order],
        report: Some(SocketAddr::from(([127, 0, 0, 1], 1))),
    };
    let nodes = vec![node.parse().expect("a name")];
    let prefetch = say::Prefetch::Image { image: here.name.clone(), nodes, boot_only: true };
    let images = say::RegisterImage { node: node.parse().expect("a name"), peer: None, images: vec![here] };
    let changed = say::InstancesChanged { node: node.parse().expect("a name"), instances: vec![state] };
    [
        vec![
            ("RegisterCompute", encoded(register)),
            ("RegisterImage", encoded(images)),
            ("InstancesChanged", encoded(changed)),
            ("Deploy", encoded(say::Deploy { request: "fuzz".to_owned(), plan })),
            ("End", encoded(say::End { task: 1000 })),
            ("Query", encoded(say::Query::instances(Some(1)))),
            ("Prefetch", encoded(prefetch)),
            ("Forget", encoded(say::Forget { node: "n9".parse().expect("a name") })),
        ],
        vec![
            ("AskNode", encoded(say::AskNode {})),
            ("RunPart", encoded(say::RunPart { cluster: cluster.clone(), task: 1000, part })),
            ("EndPart", encoded(say::EndPart { cluster: cluster.clone(), task: 1000 })),
            ("Fetch", encoded(say::Fetch { cluster, image: needed, boot_only: true })),
        ],
    ]
}

#[test]
fn requests_with_changed_bytes_break_neither_controller_nor_agent() {
    let rounds = u64::from(support::rounds(300));
    println!("seeds 0 to {}", rounds - 1);
    let dir = tempfile::tempdir().expect("a folder");
    let (controller, address) = controller(dir.path(), &[]);
    let agent = agent("n1", dir.path(), address);
    eventually("the node has an image", || has_image(dir.path()));
    let agent_address = agent_address(dir.path());
    let cluster = fs::read_to_string(dir.path().join("n1/cluster")).expect("it has joined a cluster");
    let before = (resident_kib(&controller), resident_kib(&agent));
    let answerers = [(&controller, address), (&agent, agent_address)];
    for ((process, address), requests) in answerers.into_iter().zip(requests(cluster.trim())) {
        for (name, bytes) in requests {
            assert!(!say(address, &bytes).is_empty(), "{name} itself is not answered");
            for seed in 0..rounds {
                println!("{name}, seed {seed}");
                say(address, &mutated(&bytes, seed));
            }
            assert!(!process.said().contains("panicked"), "{name}:\n{}", process.said());
        }
    }
    assert!(resident_kib(&controller) < before.0 + (64 << 10), "the controller has grown");
    assert!(resident_kib(&agent) < before.1 + (64 << 10), "the agent has grown");
    let said = support::run(bootcache(dir.path()).args(["deploy", "--wait"]).arg(plan(dir.path(), 1)));
    assert!(said.contains("1 of 1 instances are up"), "{said}");
}

#[test]
fn deploy_waits_until_all_is_up_and_an_interrupt_leaves_the_task_running() {
    let dir = tempfile::tempdir().expect("a folder");
    let (_controller, address) = controller(dir.path(), &[]);
    let _agent = agent("n1", dir.path(), address);
    eventually("the node has an image", || has_image(dir.path()));
    let path = plan(dir.path(), 3);
    let said = support::run(bootcache(dir.path()).args(["deploy", "--wait"]).arg(&path));
    assert!(said.starts_with("task 1: 3 of 3 instances are up in "), "{said}");

    // These wait for a report that nobody gives.
    let text = fs::read_to_string(&path).expect("the plan");
    fs::write(&path, format!("{text}until = \"report\"\n")).expect("a plan");
    let mut waiting = Process::start(bootcache(dir.path()).args(["deploy", "--wait"]).arg(&path));
    let booting = || {
        let tasks = json(dir.path(), &["tasks"]);
        tasks[1]["status"] == "starting" && tasks[1]["nodes"]["n1"]["booting"] == 3
    };
    eventually("the second task boots", booting);
    waiting.signal(rustix::process::Signal::INT);
    assert_eq!(waiting.wait(SOON).code(), Some(130));
    let said = waiting.said();
    assert!(said.contains("task 2 goes on: `bootcache tasks` shows it, `bootcache end 2` ends it"), "{said}");
    assert!(booting(), "the task did not go on");

    let mut limited = bootcache(dir.path());
    limited.args(["deploy", "--wait", "--timeout", "1"]).arg(&path);
    let said = refused(&mut limited);
    assert!(
        said.contains("task 3 is not up after 1 s, and goes on: `bootcache instances` shows it"),
        "{said}"
    );
    for task in ["2", "3"] {
        support::run(bootcache(dir.path()).args(["end", task]));
    }
    assert_eq!(json(dir.path(), &["tasks"]).as_array().map(Vec::len), Some(1));
}

#[test]
fn an_order_to_a_controller_that_hangs_can_be_interrupted() {
    use rustix::process::Signal;
    let dir = tempfile::tempdir().expect("a folder");
    let (controller, _) = controller(dir.path(), &[]);
    controller.signal(Signal::STOP);
    let path = plan(dir.path(), 1);
    for (words, signal) in
        [(["deploy", path.to_str().expect("UTF-8")], Signal::INT), (["end", "1"], Signal::TERM)]
    {
        let mut order = Process::start(bootcache(dir.path()).args(words));
        let status = format!("/proc/{}/status", order.id());
        eventually("it heeds signals", || {
            let status = fs::read_to_string(&status).expect("it runs");
            let caught =
                status.lines().find_map(|line| line.strip_prefix("SigCgt:")).expect("the kernel tells");
            let caught = u64::from_str_radix(caught.trim(), 16).expect("it is hexadecimal");
            caught & (1 << (signal.as_raw() - 1)) != 0
        });
        std::thread::sleep(Duration::from_millis(200)); // it has asked by then, and waits
        order.signal(signal);
        assert_eq!(order.wait(Duration::from_secs(5)).code(), Some(130), "{words:?}");
        order.wait_for("it may have begun: `bootcache tasks` shows it", START);
    }
}

#[test]
fn whoever_waits_for_a_deployment_outlives_a_restart_of_the_controller() {
    let dir = tempfile::tempdir().expect("a folder");
    let listen = format!("127.0.0.1:{}", support::free_port());
    let start = || {
        let mut command = bootcache(dir.path());
        command.args(["controller", "--listen", &listen, "--poll", "0.2", "--offline-after", "2"]);
        command.args(["--report", "127.0.0.1:0"]);
        let process = Process::start(&mut command);
        process.wait_for("ready", START);
        process
    };
    let controller = start();
    let _agent = agent("n1", dir.path(), listen.parse().expect("an address"));
    eventually("the node has an image", || has_image(dir.path()));
    let path = plan(dir.path(), 1);
    let text = fs::read_to_string(&path).expect("the plan");
    fs::write(&path, format!("{text}until = \"report\"\n")).expect("a plan");
    let waiting = Process::start(bootcache(dir.path()).args(["deploy", "--wait"]).arg(&path));
    waiting.wait_for("task 1 is under way", START);
    drop(controller);
    waiting.wait_for("the controller is away", START);
    let _controller = start();
    let ended = support::run(bootcache(dir.path()).args(["end", "1"]));
    assert!(ended.contains("nothing is left of it"), "{ended}");
    waiting.wait_for("task 1 was ended meanwhile", SOON);
}

#[test]
fn an_agent_with_its_certificate_comes_online_and_cannot_be_another_node() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = |name: &str| dir.path().join(name).to_str().expect("UTF-8").to_owned();
    let ca = |arguments: &[&str]| {
        support::run(bootcache(dir.path()).args(["ca", "--ca-dir", &path("ca")]).args(arguments));
    };
    ca(&["init"]);
    for (name, role) in [("control", "controller"), ("cert1", "node"), ("alice", "user")] {
        let subject = if role == "node" { "n1" } else { name };
        ca(&["issue", subject, "--role", role, "--out", &path(name)]);
    }
    let (controller, address) = controller(dir.path(), &["--tls-dir", &path("control")]);
    let names = || {
        let rows =
            json(dir.path(), &["nodes", "--controller", &address.to_string(), "--tls-dir", &path("alice")]);
        let rows = rows.as_array().expect("a list").clone();
        rows.iter().map(|row| (row["name"].to_string(), row["online"] == true)).collect::<Vec<_>>()
    };
    let tls = ["--tls-dir", &path("cert1")];
    let _node = DataNode::start_with(dir.path(), "n1", address, &tls);
    eventually("the node is online", || names() == [("\"n1\"".to_owned(), true)]);

    let other = DataNode::start_with(dir.path(), "n2", address, &tls);
    other.agent.wait_for("your certificate is not that of node 'n2'", SOON);
    controller.wait_for("is refused: its certificate is not that of node 'n2'", SOON);
    let plain = DataNode::start(dir.path(), "n3", address);
    plain.agent.wait_for("not registered", SOON);
    eventually("the node alone is online", || names() == [("\"n1\"".to_owned(), true)]);
}

#[test]
fn another_node_s_certificate_does_not_pass_at_a_node_s_address() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = |name: &str| dir.path().join(name).to_str().expect("UTF-8").to_owned();
    let ca = |arguments: &[&str]| {
        support::run(bootcache(dir.path()).args(["ca", "--ca-dir", &path("ca")]).args(arguments));
    };
    ca(&["init"]);
    for (name, role) in [("control", "controller"), ("n1", "node"), ("n2", "node"), ("alice", "user")] {
        ca(&["issue", name, "--role", role, "--out", &path(&format!("tls-{name}"))]);
    }
    let (_controller, address) = controller(dir.path(), &["--tls-dir", &path("tls-control")]);
    let target = address.to_string();
    let online = || {
        let rows = json(dir.path(), &["nodes", "--controller", &target, "--tls-dir", &path("tls-alice")]);
        rows[0]["online"] == true
    };
    let listen = format!("127.0.0.1:{}", support::free_port());
    let node =
        DataNode::start_with(dir.path(), "n1", address, &["--tls-dir", &path("tls-n1"), "--listen", &listen]);
    eventually("the node is online", online);
    drop(node);
    let other = dir.path().join("other");
    fs::create_dir(&other).expect("a folder");
    let other =
        DataNode::start_with(&other, "n1", address, &["--tls-dir", &path("tls-n2"), "--listen", &listen]);
    other.agent.wait_for("your certificate is not that of node 'n1'", SOON);
    eventually("the node is offline", || !online());
    std::thread::sleep(Duration::from_secs(1)); // some rounds
    assert!(!online(), "the other passes for it");
}

#[test]
fn only_members_speak_and_only_in_their_role() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = |name: &str| dir.path().join(name);
    let ca = |arguments: &[&str]| {
        let mut command = bootcache(dir.path());
        support::run(command.args(["ca", "--ca-dir"]).arg(path("ca")).args(arguments));
    };
    ca(&["init"]);
    for (name, role) in [("control", "controller"), ("n1", "node"), ("alice", "user")] {
        let out = path(name);
        ca(&["issue", name, "--role", role, "--out", out.to_str().expect("UTF-8")]);
    }
    let tls = |name: &str| path(name).to_str().expect("UTF-8").to_owned();
    let (_controller, address) = controller(dir.path(), &["--tls-dir", &tls("control")]);
    let target = address.to_string();
    let nodes = |member: Option<&str>| {
        let mut command = bootcache(&path("nowhere"));
        command.args(["nodes", "--controller", &target]);
        if let Some(member) = member {
            command.args(["--tls-dir", &tls(member)]);
        }
        command
    };
    support::run(&mut nodes(Some("alice")));
    assert!(refused(&mut nodes(Some("n1"))).contains("not a user's"));
    refused(&mut nodes(None));
    let mut wrong = bootcache(&path("wrong"));
    wrong.args(["nodes", "--controller", "10.255.255.1:1"]);
    assert!(refused(&mut wrong).contains("--tls-dir"));
}

#[test]
fn mistakes_are_one_clear_line() {
    let dir = tempfile::tempdir().expect("a folder");
    let missing = refused(bootcache(dir.path()).arg("nodes"));
    assert!(missing.contains("no controller runs here") && missing.lines().count() == 1, "{missing}");
    let (_controller, address) = controller(dir.path(), &[]);
    let second = refused(bootcache(dir.path()).arg("controller"));
    assert!(second.contains("another controller runs") && second.lines().count() == 1, "{second}");
    let mut taken = bootcache(&dir.path().join("other"));
    taken.args(["controller", "--listen", &address.to_string()]);
    assert!(refused(&mut taken).contains("cannot listen on"));
    let file = plan(dir.path(), 0);
    let checked = refused(bootcache(dir.path()).args(["plan", "check"]).arg(&file));
    assert!(checked.contains("line 7: 0 instances"), "{checked}");
    let deployed = refused(bootcache(dir.path()).arg("deploy").arg(plan(dir.path(), 1)));
    assert!(deployed.contains("no image 'debian'") && deployed.lines().count() == 1, "{deployed}");
    let ended = refused(bootcache(dir.path()).args(["end", "7"]));
    assert!(ended.contains("no task 7"), "{ended}");
    for weights in ["cpu=0.5", "cpu=1,disk=1", "soul=1"] {
        refused(bootcache(&dir.path().join("third")).args(["controller", "--weight", weights]));
    }
}

#[test]
fn a_second_agent_of_a_name_does_not_start_on_a_host() {
    let dir = tempfile::tempdir().expect("a folder");
    let name = format!("second-{}", std::process::id());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    let name_of = name.parse().expect("a name");
    let held = runtime.block_on(bootcache::agent::NameLock::take(&name_of)).expect("it is new");
    let mut second = bootcache(dir.path());
    // An address that no host has: without the other it does not start either.
    second.args(["agent", "--name", &name, "--plain", "--listen", "192.0.2.1:1"]);
    let line = refused(second.args(["--no-vms", "--docker", "/nowhere/docker.sock"]));
    assert!(line.contains("another agent of node 'second-") && line.lines().count() == 1, "{line}");
    assert!(!dir.path().join(bootcache::serve::CONTROL_SOCKET).exists(), "it has started a daemon");
    drop(held);
}

#[test]
fn a_database_that_another_program_holds_is_one_clear_line() {
    let dir = tempfile::tempdir().expect("a folder");
    let (controller, _) = controller(dir.path(), &[]);
    drop(controller);
    let database = dir.path().join("controller/bootcache.db");
    let other = rusqlite::Connection::open(&database).expect("the database");
    other.execute_batch("PRAGMA locking_mode = EXCLUSIVE; BEGIN EXCLUSIVE").expect("nobody else has it");
    let began = Instant::now();
    let locked = refused(bootcache(dir.path()).args(["controller", "--listen", "127.0.0.1:0"]));
    assert!(
        locked.contains("the database is locked by another program: end it") && locked.lines().count() == 1,
        "{locked}"
    );
    assert!(began.elapsed() < START, "it waited for {:?}", began.elapsed());
    drop(other);
    drop(self::controller(dir.path(), &[]));
}

/// A node with a real data plane, which runs no instances; its daemon is ended on drop too.
struct DataNode {
    store: PathBuf,
    agent: Process,
}

impl DataNode {
    fn start(dir: &Path, name: &str, controller: SocketAddr) -> Self {
        Self::start_with(dir, name, controller, &[])
    }

    fn start_with(dir: &Path, name: &str, controller: SocketAddr, more: &[&str]) -> Self {
        let peer = format!("127.0.0.1:{}", support::free_port());
        Self::start_taker(dir, name, controller, &[&["--peer-listen", peer.as_str()][..], more].concat())
    }

    /// One that gives images to no other.
    fn start_taker(dir: &Path, name: &str, controller: SocketAddr, more: &[&str]) -> Self {
        let store = dir.join(name);
        let mut command = bootcache(&store);
        command.args(["agent", "--no-vms", "--no-containers", "--name", name]);
        command.args(["--controller", &controller.to_string()]);
        let agent = Process::start(command.args(more));
        agent.wait_for("ready", START);
        Self { store, agent }
    }

    /// Gives it an image of a container; `dir` is for what that is made of.
    fn add_image(&self, dir: &Path, image: &str) {
        let content = dir.join(image);
        fs::create_dir_all(content.join("bin")).expect("a folder");
        fs::write(content.join("data"), support::noise(1, 3 << 20)).expect("a file");
        let archive = dir.join(format!("{image}.tar"));
        support::run(Command::new("tar").arg("-C").arg(&content).arg("-cf").arg(&archive).arg("."));
        let add = ["image", "add", "--type", "container", image];
        support::run(bootcache(&self.store).args(add).arg(archive));
    }

    fn has(&self, image: &str) -> bool {
        let images = json(&self.store, &["image", "list"]);
        images.to_string().contains(&format!("\"{image}\""))
    }

    /// The process of its daemon, while one runs.
    fn daemon(&self) -> Option<rustix::process::Pid> {
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

#[test]
fn an_agent_starts_its_daemon_again() {
    let dir = tempfile::tempdir().expect("a folder");
    let (_controller, address) = controller(dir.path(), &[]);
    let node = DataNode::start(dir.path(), "n1", address);
    let first = node.daemon().expect("the agent has started it");
    rustix::process::kill_process(first, rustix::process::Signal::KILL).expect("it runs");
    eventually("another one runs", || node.daemon().is_some_and(|pid| pid != first));
    node.agent.wait_for("started a daemon on", START);
}

#[test]
fn a_node_that_gives_images_to_no_other_fetches_them_with_its_certificate() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = |name: &str| dir.path().join(name).to_str().expect("UTF-8").to_owned();
    let ca = |arguments: &[&str]| {
        support::run(bootcache(dir.path()).args(["ca", "--ca-dir", &path("ca")]).args(arguments));
    };
    ca(&["init"]);
    for (name, role) in [("control", "controller"), ("n1", "node"), ("n2", "node")] {
        ca(&["issue", name, "--role", role, "--out", &path(&format!("tls-{name}"))]);
    }
    let (_controller, address) = controller(dir.path(), &["--tls-dir", &path("tls-control")]);
    let origin = DataNode::start_with(dir.path(), "n1", address, &["--tls-dir", &path("tls-n1")]);
    origin.add_image(dir.path(), "first");
    let taker = DataNode::start_taker(dir.path(), "n2", address, &["--tls-dir", &path("tls-n2")]);
    eventually("both nodes and the image are known", || {
        json(dir.path(), &["nodes"]).as_array().map(Vec::len) == Some(2) && has_image(dir.path())
    });
    support::run(bootcache(dir.path()).args(["prefetch", "first", "n2"]));
    eventually("the image has come", || taker.has("first"));
}

#[test]
fn images_are_brought_to_nodes_ahead_of_demand() {
    let dir = tempfile::tempdir().expect("a folder");
    let (_controller, address) = controller(dir.path(), &[]);
    let origin = DataNode::start(dir.path(), "n1", address);
    for image in ["first", "second"] {
        origin.add_image(dir.path(), image);
    }
    let other = DataNode::start(dir.path(), "n2", address);
    eventually("both nodes and both images are known", || {
        json(dir.path(), &["nodes"]).as_array().map(Vec::len) == Some(2)
            && json(dir.path(), &["images"]).as_array().map(Vec::len) == Some(2)
    });
    support::run(bootcache(dir.path()).args(["prefetch", "first", "n2"]));
    eventually("the image has come", || other.has("first"));
    assert!(!other.has("second"), "nobody asked for it");
    support::run(bootcache(dir.path()).args(["prefetch", "--standing", "on"]));
    eventually("the other one comes by the standing order", || other.has("second"));
    let unknown = refused(bootcache(dir.path()).args(["prefetch", "first", "n9"]));
    assert!(unknown.contains("no node 'n9'"), "{unknown}");
}
