//! The control plane and bytes that make no sense: from whoever connects, and in requests of every type.

mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;
use support::control::{DataNode, SOON, agent, bootcache, controller, eventually, has_image, json, plan};
use support::process::Process;

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
