//! The testbed itself: what the other end-to-end tests stand on works on this machine.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::process::Command;
use std::time::Duration;

use support::guest::{self, Tiny};
use support::host::Host;
use support::net::{Net, Rate};

#[test]
fn a_shaped_link_gives_the_goodput_it_should_and_a_pulled_cable_none() {
    if !support::require(&["ip", "tc", "nsenter"]) || !support::require_root() {
        return;
    }
    let net = Net::new(2, Rate::Megabits(100));
    // Other work on this machine may slow a copy down, but nothing may make it faster than the link.
    let goodputs: Vec<f64> = (0..5).map(|_| net.goodput(0, 1, 4 << 20)).collect();
    assert!(goodputs.iter().all(|goodput| *goodput < 100.0), "{goodputs:?} Mbit/s");
    assert!(goodputs.iter().any(|goodput| *goodput > 85.0), "{goodputs:?} Mbit/s");
    assert!(net.traffic(0).0 > 4 << 20);

    net.connect(1, false);
    let ping = |net: &Net| {
        let mut ping = Command::new("bash");
        ping.args(["-c", &format!("exec 3<>/dev/tcp/{}/9", net.address(1))]);
        let mut ping = support::process::Process::start(&mut net.on(0, &ping));
        std::thread::sleep(Duration::from_millis(500));
        ping.kill();
        ping.said()
    };
    assert_eq!(ping(&net), "");
    net.connect(1, true);
    let refused = (0..20).any(|_| ping(&net).contains("refused"));
    assert!(refused, "the port is closed, but the host is there again");
}

#[test]
fn the_tiny_guest_boots_from_its_own_disk_and_does_what_it_is_told() {
    if !support::require(&["qemu-system-x86_64"]) || !support::require_root() {
        return;
    }
    let disk = guest::disk("tiny");
    let mut guest = Tiny::new(&format!("file={},format=raw,snapshot=on", disk.display()))
        .tell("name", "little")
        .tell("run", "echo seven-is $((3 + 4))")
        .tell("off", "1")
        .start();
    assert!(guest::wait_for_boot(&guest).contains("little"));
    guest.wait_for("seven-is 7", Duration::from_secs(20));
    assert!(guest.wait(Duration::from_secs(30)).success());
    assert!(!guest.said().contains("PAYLOAD-DAMAGED"));
}

#[test]
fn a_host_has_a_libvirt_and_a_docker_of_its_own_and_survives_a_power_loss() {
    if !support::require(&["libvirtd", "virsh", "dockerd", "unshare", "curl"]) || !support::require_root() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let net = Net::new(2, Rate::Unlimited);
    let hosts = [Host::up(folder.path(), &net, 0), Host::up(folder.path(), &net, 1)];
    for (index, host) in hosts.iter().enumerate() {
        let name = support::run(Command::new("virsh").args(["-c", host.libvirt(), "hostname"]));
        assert_eq!(name.trim(), net.namespace(index));
        assert!(host.docker().starts_with("unix://"));
    }
    hosts[1].power_loss();
    let gone = Command::new("virsh").args(["-c", hosts[1].libvirt(), "hostname"]).output().unwrap();
    assert!(!gone.status.success());
    hosts[1].power_on(&net, 1);
    assert!(hosts[1].docker().starts_with("unix://"));
    support::run(Command::new("virsh").args(["-c", hosts[1].libvirt(), "list"]));
    support::run(&mut hosts[0].command(["ip", "link", "show", "eth0"]));
}

#[test]
fn a_payload_disk_carries_programs_and_a_script_into_the_tiny_guest() {
    if !support::require(&["qemu-system-x86_64"]) || !support::require_root() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let payload = folder.path().join("payload.raw");
    let program = std::path::Path::new(support::store::bootcache());
    guest::payload(&payload, &[program], "bootcache --version; modprobe nbd && ls /dev/nbd0");
    let guest = Tiny::new(&format!("file={},format=raw,snapshot=on", guest::disk("tiny").display()))
        .arguments(["-drive", &format!("file={},format=raw,if=virtio", payload.display())])
        .start();
    guest::wait_for_boot(&guest);
    guest.wait_for("RUN-DONE rc=0", Duration::from_secs(60));
    assert!(guest.said().contains(env!("CARGO_PKG_VERSION")), "{}", guest.said());
}
