//! VLANs for real: two guests whose kernel has 802.1Q are two hosts on one cable, and make their networks with the
//! library's own code.

mod support;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use support::guest::{Tiny, disk, payload};
use support::process::Process;

/// TCG on shared cores.
const DEADLINE: Duration = Duration::from_secs(300);

/// Boots host 1 or 2 on its end of the cable.
fn host(folder: &Path, number: u32) -> Process {
    let path = |name: &str| folder.join(format!("{name}{number}"));
    let mut overlay = Command::new("qemu-img");
    overlay.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).arg(disk("tiny")).arg(path("disk"));
    support::run(&mut overlay);
    let script = include_str!("network/vlan.sh");
    let script = format!("SELF={number} OTHER={}\n{script}", 3 - number);
    let tools = [&support::example("make_network"), Path::new("/sbin/bridge")];
    payload(&path("tools"), &tools, &script);
    let server = if number == 1 { "on" } else { "off" };
    let cable = folder.join("cable");
    Tiny::new(&format!("file={},format=qcow2,cache=unsafe", path("disk").display()))
        .arguments(["-drive", &format!("if=virtio,format=raw,readonly=on,file={}", path("tools").display())])
        .arguments([
            "-netdev",
            &format!("stream,id=cable,server={server},addr.type=unix,addr.path={}", cable.display()),
        ])
        .arguments(["-device", &format!("virtio-net-pci,netdev=cable,mac=52:54:00:00:00:0{number}")])
        .start()
}

#[test]
fn vlans_share_a_cable_with_the_hosts_and_keep_networks_apart() {
    if !support::require(&["qemu-system-x86_64", "qemu-img", "mke2fs", "extlinux", "bridge"])
        || !support::require_root()
    {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let first = host(folder.path(), 1);
    for _ in 0..100 {
        if folder.path().join("cable").exists() {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    let second = host(folder.path(), 2);
    for host in [&second, &first] {
        host.wait_for("RUN-DONE", DEADLINE);
        let said = host.said();
        assert!(said.contains("VLAN-OK") && said.contains("RUN-DONE rc=0"), "{said}");
    }
}
