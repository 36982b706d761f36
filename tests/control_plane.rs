//! The control plane as processes: the examples, a client in another language, kills at random moments, waiting for what
//! was ordered, certificates, mistakes, images ahead of demand. Instances are in memory here; `tests/cluster.rs` has real
//! ones, and `tests/control_bytes.rs` bytes that make no sense.

mod support;

use std::fs;
use std::net::SocketAddr;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use support::control::{
    DataNode, SOON, START, agent, bootcache, controller, eventually, has_image, json, plan, refused,
};
use support::example;
use support::process::Process;

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
