//! A cluster with real daemons: VMs boot from bootcache's NBD exports and containers from its store while their images
//! arrive, on networks that span the nodes. What goes wrong is in `tests/cluster_faults.rs`.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::time::Duration;

use serde_json::Value;
use support::cluster::{Cluster, NEEDS, START, UP, address, eventually, name, node_of};

const NODES: usize = 4;
const PAYLOAD: usize = 8 << 20;

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
    let mut cluster = Cluster::up(NODES, PAYLOAD);
    let task = cluster.deploy(&plan(8, 24));
    cluster.wait_until_up(task, 32, UP);

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
    cluster.have_booted();
    let of = |kind: &str, node: usize| rows.iter().find(|i| i["kind"] == kind && node_of(i) == node).unwrap();
    for (from, to) in [(0, 0), (0, 1), (2, 3)] {
        assert!(cluster.pings(of("container", from), &address(of("vm", to))), "container {from} to VM {to}");
        assert!(
            cluster.pings(of("container", from), &address(of("container", to))),
            "containers {from}, {to}"
        );
    }

    // The controller is killed: nothing notices, and it knows everything again.
    cluster.kill_controller();
    assert!(cluster.pings(of("container", 0), &address(of("vm", 1))));
    cluster.start_controller();
    assert_eq!(cluster.count(task, "running"), 32);

    // An agent is killed: its node is lost, its instances are not; it adopts them.
    cluster.kill_agent(1);
    eventually("the node is offline", Duration::from_secs(15), || !cluster.is_online(1));
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
}

/// Two networks, a VM with an interface in each that forwards, a container on each side of it and on two nodes, and another
/// that is told of no router.
const ROUTED: &str = r#"
    name = "routed"
    [networks.left]
    subnet = "10.55.0.0/24"
    gateway = "10.55.0.1"
    uplink = "eth1"
    [networks.right]
    subnet = "10.56.0.0/24"
    gateway = "10.56.0.1"
    [networks.apart]
    subnet = "10.57.0.0/24"
    [[groups]]
    name = "router"
    type = "vm"
    image = "tiny"
    nodes = ["n0"]
    memory = "96M"
    disk = "1G"
    networks = [{ network = "left", address = "10.55.0.1" }, { network = "right", address = "10.56.0.1" }]
    until = "report"
    [[groups]]
    name = "left"
    type = "container"
    image = "box"
    nodes = { n0 = 1, n1 = 1 }
    memory = "16M"
    command = ["/bin/report"]
    networks = [{ network = "left", address = "10.55.0.10" }]
    [[groups]]
    name = "right"
    type = "container"
    image = "box"
    nodes = ["n0"]
    memory = "16M"
    command = ["/bin/report"]
    networks = [{ network = "right", address = "10.56.0.10" }]
    [[groups]]
    name = "apart"
    type = "container"
    image = "box"
    nodes = ["n0"]
    memory = "16M"
    command = ["/bin/report"]
    networks = [{ network = "apart", address = "10.57.0.10" }]
"#;

#[test]
fn a_router_instance_is_the_only_way_from_one_network_to_another() {
    if !support::require(&NEEDS) || !support::require_root() {
        return;
    }
    let cluster = Cluster::up(2, 0);
    let task = cluster.deploy(ROUTED);
    cluster.wait_until_up(task, 5, UP);
    cluster.have_booted();
    let rows = cluster.instances(task);
    let of = |address: &str| rows.iter().find(|row| row["addresses"][0] == address).unwrap();
    for (from, to) in
        [("10.55.0.10", "10.56.0.10"), ("10.55.0.11", "10.56.0.10"), ("10.56.0.10", "10.55.0.11")]
    {
        assert!(cluster.pings(of(from), to), "{from} does not reach {to}");
    }
    // A network without a router leads nowhere, not even through the node that has them all.
    for (from, to) in
        [("10.57.0.10", "10.56.0.10"), ("10.57.0.10", "10.55.0.10"), ("10.55.0.10", "10.57.0.10")]
    {
        assert!(!cluster.pings(of(from), to), "{from} reaches {to}");
    }
    let overlays = cluster.status(0)["overlays"].clone();
    assert_eq!(overlays[0]["size"], 1_u64 << 30, "its disk is not as large as the plan says: {overlays}");
    // It is the router that forwards, not the node.
    let router = of("10.55.0.1");
    let name = router["name"].as_str().unwrap();
    cluster.virsh(0, &["suspend", name]);
    assert!(!cluster.pings(of("10.55.0.11"), "10.56.0.10"), "there is a way around the router");
    let paused = of("10.57.0.10")["name"].as_str().unwrap();
    cluster.docker(0, &["pause", paused]);
    for way_on in [format!("virsh resume {name}"), format!("docker unpause {paused}")] {
        eventually("how what is paused goes on is said", START, || {
            let rows = cluster.instances(task);
            rows.iter().any(|row| row["reason"].as_str().is_some_and(|reason| reason.contains(&way_on)))
        });
    }
    cluster.docker(0, &["unpause", paused]);
    cluster.virsh(0, &["resume", name]);
    assert!(cluster.pings(of("10.55.0.11"), "10.56.0.10"));
    cluster.end(task);
    (0..2).for_each(|node| cluster.assert_clean(node));
}
