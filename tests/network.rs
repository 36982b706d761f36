//! Networks of plans as bridges of real (namespaced) hosts.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::process::Command;
use std::sync::Arc;

use bootcache::agent::{HostNetworks, Networks as _};
use bootcache::hypervisor::docker::Docker;
use bootcache::network::{NetworkError, NetworkSpec, Networks};
use support::net::{Net, Rate};

fn spec(name: &str, bridge: &str) -> NetworkSpec {
    NetworkSpec {
        name: name.parse().unwrap(),
        bridge: bridge.to_owned(),
        subnet: ("10.55.0.0".parse().unwrap(), 24),
        gateway: None,
        node_address: Some("10.55.0.251".parse().unwrap()),
        uplink: None,
        vlan: None,
        mtu: Some(1400),
        containers: false,
    }
}

/// A host with nothing but an interface `eth0` that has an address; `None` where namespaces cannot be made.
fn host() -> Option<Net> {
    (support::require(&["ip", "tc", "nsenter"]) && support::require_root())
        .then(|| Net::new(1, Rate::Unlimited))
}

fn ip(net: &Net, arguments: &[&str]) -> String {
    support::run(&mut net.on(0, Command::new("ip").args(arguments)))
}

/// Every call is on a host of its own choosing, by an owner that remembers nothing of the calls before.
fn on<T: Send>(net: &Net, work: impl AsyncFnOnce(Networks) -> T + Send) -> T {
    net.within(0, || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(work(Networks::new("node-a".parse().unwrap())))
    })
}

fn ensure(net: &Net, spec: &NetworkSpec) -> Result<(), NetworkError> {
    on(net, async |networks| networks.ensure(spec).await)
}

fn remove(net: &Net, bridge: &str) -> Result<(), NetworkError> {
    on(net, async |networks| networks.remove(bridge).await)
}

#[test]
fn a_network_is_made_once_found_again_and_removed_when_nobody_uses_it() {
    let Some(net) = host() else { return };
    ensure(&net, &spec("lab", "br-lab")).unwrap();
    let address = ip(&net, &["-o", "addr", "show", "br-lab"]);
    assert!(!address.contains("10.55.0."), "VMs alone lead to no host: {address}");
    let lab = NetworkSpec { containers: true, ..spec("lab", "br-lab") };
    ensure(&net, &lab).unwrap();
    let before = ip(&net, &["-o", "addr", "show", "br-lab"]);
    assert!(before.contains("10.55.0.251/24"), "{before}");
    let link = ip(&net, &["-o", "link", "show", "br-lab"]);
    assert!(link.contains("mtu 1400") && link.contains("UP") && link.contains(" 02:"), "{link}");

    ensure(&net, &lab).unwrap();
    assert_eq!(ip(&net, &["-o", "addr", "show", "br-lab"]), before);
    let listed = on(&net, async |networks| networks.list().await).unwrap();
    assert_eq!(listed, ["br-lab"]);

    ip(&net, &["tuntap", "add", "tap-vm", "mode", "tap"]);
    ip(&net, &["link", "set", "tap-vm", "master", "br-lab"]);
    let error = remove(&net, "br-lab").unwrap_err().to_string();
    assert!(error.contains("in use by tap-vm"), "{error}");
    ip(&net, &["link", "del", "tap-vm"]);
    remove(&net, "br-lab").unwrap();
    remove(&net, "br-lab").unwrap();
    assert!(!ip(&net, &["-o", "link"]).contains("br-lab"));
}

#[test]
fn a_network_of_vms_goes_though_docker_is_away_and_one_of_containers_waits_for_it() {
    let Some(net) = host() else { return };
    let (vms, containers) =
        (spec("vms", "br-vms"), NetworkSpec { containers: true, ..spec("box", "br-box") });
    on(&net, async |bridges| {
        bridges.ensure(&containers).await.unwrap();
        let docker = Docker::new("/nowhere/docker.sock", "node-a".parse().unwrap());
        let networks = HostNetworks::new(bridges, Some(Arc::new(docker)));
        networks.ensure(&vms).await.unwrap();
        networks.remove(&vms).await.unwrap();
        let error = networks.remove(&containers).await.unwrap_err();
        assert!(matches!(error, bootcache::agent::ServiceError::Away(_)), "{error}");
    });
    let links = ip(&net, &["-o", "link"]);
    assert!(!links.contains("br-vms") && links.contains("br-box"), "{links}");
}

#[test]
fn a_subnet_that_the_host_has_elsewhere_is_refused_with_nothing_made() {
    let Some(net) = host() else { return };
    ip(&net, &["link", "add", "other", "type", "bridge"]);
    ip(&net, &["addr", "add", "10.55.0.9/24", "dev", "other"]);
    ip(&net, &["link", "set", "other", "up"]);
    let before = ip(&net, &["-o", "link"]);
    let routes = ip(&net, &["route"]);
    let containers = NetworkSpec { containers: true, ..spec("lab", "br-lab") };
    let error = ensure(&net, &containers).unwrap_err().to_string();
    assert!(error.contains("other of this host has 10.55.0.9/24"), "{error}");
    assert_eq!((ip(&net, &["-o", "link"]), ip(&net, &["route"])), (before, routes.clone()));
    // Docker would do the same to a bridge that was there before.
    ip(&net, &["link", "add", "br-lab", "type", "bridge"]);
    ensure(&net, &containers).unwrap_err();
    ip(&net, &["link", "del", "br-lab"]);

    // VMs among themselves may have it, and a bridge that has it already is no other device.
    ensure(&net, &spec("lab", "br-lab")).unwrap();
    assert_eq!(ip(&net, &["route"]), routes);
    ip(&net, &["link", "del", "other"]);
    for _ in 0..2 {
        ensure(&net, &containers).unwrap();
    }
    remove(&net, "br-lab").unwrap();
}

#[test]
fn a_bridge_that_was_there_before_is_used_and_left_as_it_is() {
    let Some(net) = host() else { return };
    ip(&net, &["link", "add", "br0", "type", "bridge"]);
    let before = ip(&net, &["-o", "link", "show", "br0"]);
    ensure(&net, &spec("lab", "br0")).unwrap();
    remove(&net, "br0").unwrap();
    assert_eq!(ip(&net, &["-o", "link", "show", "br0"]), before);
    assert!(on(&net, async |networks| networks.list().await).unwrap().is_empty());

    let with_uplink = NetworkSpec { uplink: Some("eth0".to_owned()), ..spec("lab", "br0") };
    let error = ensure(&net, &with_uplink).unwrap_err().to_string();
    assert!(error.contains("eth0 is not a port of it"), "{error}");
    ip(&net, &["link", "set", "eth0", "master", "br0"]);
    ensure(&net, &with_uplink).unwrap();
}

#[test]
fn an_uplink_becomes_a_port_and_one_that_cannot_be_is_refused_with_nothing_made() {
    let Some(net) = host() else { return };
    let with = |uplink: &str, name: &str, bridge: &str| NetworkSpec {
        uplink: Some(uplink.to_owned()),
        ..spec(name, bridge)
    };
    let refusals = [
        (with("eth7", "lab", "br-lab"), "no network interface eth7"),
        (with("eth0", "lab", "br-lab"), "has the host's address 10.77.0.1"),
        (spec("lab", "eth0"), "eth0 is there and is no bridge"),
        (spec("lab", "a-name-of-17-bytes"), "no name of a device"),
    ];
    let before = ip(&net, &["-o", "link"]);
    for (wrong, reason) in refusals {
        let error = ensure(&net, &wrong).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
        assert_eq!(ip(&net, &["-o", "link"]), before);
    }

    ip(&net, &["link", "add", "interface", "type", "veth", "peer", "name", "cable"]);
    ensure(&net, &with("interface", "lab", "br-lab")).unwrap();
    let interface = ip(&net, &["-o", "link", "show", "interface"]);
    assert!(interface.contains("master br-lab") && interface.contains("mtu 1400"), "{interface}");
    let error = ensure(&net, &with("interface", "other", "br-other")).unwrap_err().to_string();
    assert!(error.contains("port of the bridge br-lab already"), "{error}");
    let other_node =
        on(&net, async |_| Networks::new("node-b".parse().unwrap()).ensure(&spec("other", "br-lab")).await);
    let taken = other_node.unwrap_err().to_string();
    assert!(taken.contains("bridge of bootcache:node-a:br-lab"), "{taken}");

    remove(&net, "br-lab").unwrap();
    assert!(!ip(&net, &["-o", "link", "show", "interface"]).contains("master"), "the interface stays");
}

#[test]
fn a_vlan_shares_a_card_with_the_host_where_the_kernel_has_vlans() {
    let Some(net) = host() else { return };
    let tagged = NetworkSpec { uplink: Some("eth0".to_owned()), vlan: Some(10), ..spec("lab", "br-lab") };
    match ensure(&net, &tagged) {
        Ok(()) => {
            assert!(ip(&net, &["-o", "link", "show", "eth0.10"]).contains("master br-lab"));
            remove(&net, "br-lab").unwrap();
        }
        Err(error) => {
            let error = error.to_string();
            assert!(error.contains("this kernel has no VLANs (CONFIG_VLAN_8021Q"), "{error}");
        }
    }
    assert_eq!(ip(&net, &["-o", "link"]).lines().count(), 2, "lo and eth0");
}

#[test]
fn what_an_earlier_process_left_half_made_is_made_anew_or_goes() {
    let Some(net) = host() else { return };
    // Its name until it is marked, as a process that was killed in between leaves it.
    let digest = blake3::hash(b"bootcache:node-a:br-lab").to_hex();
    ip(&net, &["link", "add", &format!("bcnew{}", &digest[..8]), "type", "bridge"]);
    ensure(&net, &spec("lab", "br-lab")).unwrap();
    remove(&net, "br-lab").unwrap();
    assert!(!ip(&net, &["-o", "link"]).contains("bridge"));
    assert_eq!(ip(&net, &["-o", "link"]).lines().count(), 2, "lo and eth0");

    // Or it is removed with a network that was never made.
    ip(&net, &["link", "add", &format!("bcnew{}", &digest[..8]), "type", "bridge"]);
    remove(&net, "br-lab").unwrap();
    assert_eq!(ip(&net, &["-o", "link"]).lines().count(), 2, "lo and eth0");
}

#[test]
fn without_the_right_to_change_networks_the_message_says_which_is_missing() {
    let Some(net) = host() else { return };
    let error = net.within(0, || {
        let mut sets = rustix::thread::capabilities(None).unwrap();
        sets.effective.remove(rustix::thread::CapabilitySet::NET_ADMIN);
        rustix::thread::set_capabilities(None, sets).unwrap(); // of this thread alone
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(Networks::new("node-a".parse().unwrap()).ensure(&spec("lab", "br-lab"))).unwrap_err()
    });
    assert!(error.to_string().contains("CAP_NET_ADMIN"), "{error}");
}
