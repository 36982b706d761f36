//! VMs of a node by a real libvirtd, one for each (namespaced) host, with containers on the same network.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bootcache::digest::Digest;
use bootcache::hypervisor::docker::Docker;
use bootcache::hypervisor::domain::DomainDisk;
use bootcache::hypervisor::domains::Domains;
use bootcache::hypervisor::libvirt::Libvirt;
use bootcache::hypervisor::{Hypervisor, HypervisorError, Launch, LibvirtError, Nic, Root, Running};
use bootcache::name::HostName;
use bootcache::network::{NetworkSpec, Networks};
use bootcache::qemu::Accelerator;
use support::host::Host;
use support::net::{Net, Rate};
use support::store::Store;
use support::{container, guest};

const NEEDS: [&str; 6] = ["libvirtd", "virsh", "dockerd", "unshare", "busybox", "qemu-system-x86_64"];
const GUEST: Duration = Duration::from_secs(100);

fn spec(host: usize) -> NetworkSpec {
    NetworkSpec {
        name: "lab".parse().unwrap(),
        bridge: "br-lab".to_owned(),
        subnet: ("10.55.0.0".parse().unwrap(), 24),
        gateway: None,
        node_address: Some(format!("10.55.0.25{host}").parse().unwrap()),
        uplink: Some("eth1".to_owned()),
        vlan: None,
        mtu: Some(1400),
        containers: true,
    }
}

fn launch(name: &str, root: Root, number: u8, serial: &Path) -> Launch {
    Launch {
        name: name.parse().unwrap(),
        root,
        cpus: 1,
        memory_mib: 128,
        nics: vec![Nic {
            network: "lab".parse().unwrap(),
            bridge: "br-lab".to_owned(),
            mac: format!("52:54:00:55:00:{number:02x}"),
            address: Some((format!("10.55.0.{number}").parse().unwrap(), 24)),
            gateway: None,
            mtu: Some(1400),
        }],
        env: BTreeMap::new(),
        command: Vec::new(),
        privileged: false,
        facts: vec![
            ("instance".to_owned(), name.to_owned()),
            ("address".to_owned(), format!("10.55.0.{number}/24")),
            ("report".to_owned(), "10.55.0.250:7777".to_owned()),
        ],
        serial: serial.to_owned(),
        template: None,
    }
}

/// Does something to the networks of a host, from inside it.
fn with_networks(net: &Net, host: usize, node: &HostName, work: impl AsyncFnOnce(Networks) + Send) {
    net.within(host, || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(work(Networks::new(node.clone())));
    });
}

/// The names that so many instances report, sorted; fewer when the time is over.
fn reports(listener: &TcpListener, count: usize) -> Vec<String> {
    listener.set_nonblocking(true).unwrap();
    let (deadline, mut names) = (Instant::now() + GUEST, Vec::new());
    while names.len() < count && Instant::now() < deadline {
        let Ok((stream, _)) = listener.accept() else {
            std::thread::sleep(Duration::from_millis(20));
            continue;
        };
        stream.set_nonblocking(false).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        names.extend(BufReader::new(stream).lines().next().map(Result::unwrap));
    }
    names.sort();
    names
}

/// How many emulators libvirt keeps the capabilities of.
fn emulators_looked_at(host: &Host) -> usize {
    let list = "ls /var/cache/libvirt/qemu/capabilities 2>/dev/null || true";
    support::run(&mut host.command(["sh", "-c", list])).lines().count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_is_told_its_facts_and_is_on_one_network_with_containers_of_both_hosts() {
    if !support::require(&NEEDS) || !support::require_root() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let net = Net::new(2, Rate::Unlimited);
    net.add_uplinks(Rate::Unlimited);
    let hosts = [Host::up(folder.path(), &net, 0), Host::up(folder.path(), &net, 1)];
    let nodes: [HostName; 2] = ["node-0".parse().unwrap(), "node-1".parse().unwrap()];
    let listener = net.within(0, || TcpListener::bind("0.0.0.0:7777").unwrap());
    let archive = folder.path().join("box.tar");
    container::root_fs(&archive, 0);
    let mut engines = Vec::new();
    for (index, host) in hosts.iter().enumerate() {
        let spec = spec(index);
        with_networks(&net, index, &nodes[index], async move |networks| {
            networks.ensure(&spec).await.unwrap();
        });
        engines.push(Docker::new(host.docker(), nodes[index].clone()));
    }

    // The VM's disk comes from a data plane of the host.
    let store = Store::new();
    store.run(["image", "add", "tiny", guest::disk("tiny").to_str().unwrap()]);
    let _serve = store.serve::<&str>([]);
    store.run(["overlay", "create", "tiny", "vm-1"]);
    let disk = DomainDisk::Nbd { socket: store.path().join("nbd.sock"), export: "vm-1".to_owned() };
    let vms = Domains::new(Libvirt::new(hosts[0].libvirt()), &nodes[0], folder.path())
        .with_accelerator(Accelerator::Tcg);
    vms.check().await.unwrap();
    vms.prepare().await.unwrap();
    let looked_at = emulators_looked_at(&hosts[0]);
    assert!(looked_at > 0, "libvirt keeps what it saw");
    let serial = folder.path().join("serial.log");
    let vm = launch("vm-1", Root::Disk(disk), 11, &serial);
    vms.launch(&vm).await.unwrap();
    vms.launch(&vm).await.unwrap();
    assert_eq!(emulators_looked_at(&hosts[0]), looked_at, "it had been prepared for this one");

    for (index, engine) in engines.iter().enumerate() {
        engine.ensure_network(&spec(index)).await.unwrap();
        let bytes = std::fs::read(&archive).unwrap();
        let (name, root) = ("box".parse().unwrap(), Digest::of(&bytes));
        let image = engine.load(&name, root, std::io::Cursor::new(bytes)).await.unwrap();
        let number = u8::try_from(index + 20).unwrap();
        let mut instance = launch(&format!("c-{index}"), Root::Image(image), number, Path::new(""));
        (instance.memory_mib, instance.command) = (64, container::reporting());
        engine.launch(&instance).await.unwrap();
    }
    let reports = tokio::task::spawn_blocking(move || reports(&listener, 3)).await.unwrap();
    let said = std::fs::read_to_string(&serial).unwrap_or_default();
    assert_eq!(reports, ["c-0", "c-1", "vm-1"], "{said}");
    store.have_booted(1);

    for (host, name) in hosts.iter().zip(["c-0", "c-1"]) {
        let mut ping = Command::new("docker");
        ping.args(["-H", &host.docker_address(), "exec", name, "ping", "-c", "1", "-W", "20", "10.55.0.11"]);
        support::run(&mut ping);
    }
    let info = vms.info(&vm.name).await.unwrap().unwrap();
    assert_eq!(info.state, Running::Running);
    assert!(
        info.memory_bytes > 32 << 20 && info.network_bytes[0] > 0 && info.network_bytes[1] > 0,
        "{info:?}"
    );
    assert_eq!(vms.list().await.unwrap(), std::slice::from_ref(&vm.name));
    let domain = support::run(Command::new("virsh").args(["-c", hosts[0].libvirt(), "dumpxml", "vm-1"]));
    assert!(domain.contains("org.qemu.guest_agent.0") && domain.contains("52:54:00:55:00:0b"), "{domain}");
    assert!(domain.contains("<mtu size='1400'/>"), "{domain}");

    // Another node's guests, and people's, are nobody's business here.
    let other = Domains::new(Libvirt::new(hosts[0].libvirt()), &nodes[1], folder.path());
    assert!(other.list().await.unwrap().is_empty());
    other.delete(&vm.name).await.unwrap();
    let error = other.with_accelerator(Accelerator::Tcg).launch(&vm).await.unwrap_err();
    assert!(matches!(&error, HypervisorError::Refused(_)), "{error}");

    // A libvirtd that hangs: calls end at their deadline, however many there are, and the next ones get through.
    let libvirtd = |signal: &str| {
        let kill = format!("kill -{signal} $(cat /run/libvirt/libvirtd.pid)");
        support::run(&mut hosts[0].command(["sh", "-c", &kill]));
    };
    let libvirt = Libvirt::new(hosts[0].libvirt()).with_deadline(Duration::from_secs(1));
    let hasty = Domains::new(libvirt.clone(), &nodes[0], folder.path());
    libvirtd("STOP");
    // What is given up does not happen later either.
    let late =
        "<domain type='qemu'><name>late</name><memory>16384</memory><os><type>hvm</type></os></domain>";
    let error = libvirt.launch(late.to_owned()).await.unwrap_err();
    assert!(matches!(&error, LibvirtError::TimedOut { .. }), "{error}");
    for _ in 0..3 {
        let error = hasty.info(&vm.name).await.unwrap_err();
        assert!(matches!(&error, HypervisorError::TimedOut(_)), "{error}");
    }
    libvirtd("CONT");
    // Behind the calls that waited.
    let deadline = Instant::now() + Duration::from_secs(30);
    let state = loop {
        match hasty.info(&vm.name).await {
            Err(HypervisorError::TimedOut(_)) if Instant::now() < deadline => {}
            other => break other.unwrap().unwrap().state,
        }
    };
    assert_eq!(state, Running::Running);
    tokio::time::sleep(Duration::from_secs(3)).await;
    let all = support::run(Command::new("virsh").args(["-c", hosts[0].libvirt(), "list", "--all", "--name"]));
    assert!(!all.contains("late"), "{all}");

    // It ends and comes back; the guest does not notice, and the same owner goes on.
    libvirtd("KILL");
    let error = vms.info(&vm.name).await.unwrap_err();
    assert!(matches!(error, HypervisorError::Unreachable(_)), "{error}");
    hosts[0].restart_libvirtd();
    let mut state = Err(error);
    for _ in 0..100 {
        state = vms.info(&vm.name).await;
        if state.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert_eq!(state.unwrap().unwrap().state, Running::Running);

    vms.stop(&vm.name, Duration::from_secs(60)).await.unwrap();
    let said = std::fs::read_to_string(&serial).unwrap();
    assert!(said.contains("ACPI-POWEROFF"), "it was asked, not killed: {said}");
    vms.stop(&vm.name, Duration::ZERO).await.unwrap();
    vms.delete(&vm.name).await.unwrap();
    vms.delete(&vm.name).await.unwrap();
    assert_eq!(vms.info(&vm.name).await.unwrap(), None);
    for (index, engine) in engines.iter().enumerate() {
        engine.delete(&format!("c-{index}").parse().unwrap()).await.unwrap();
        engine.remove_network("br-lab").await.unwrap();
        with_networks(&net, index, &nodes[index], async |networks| {
            networks.remove("br-lab").await.unwrap();
        });
    }
}

/// An emulator that takes its time to start the guest `vm-1`.
const SLOW: &str = r#"#!/bin/sh
case "$*" in *guest=vm-1*) sleep 5 ;; esac
exec qemu-system-x86_64 "$@"
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_an_agent_had_begun_to_start_is_waited_for_by_the_next() {
    if !support::require(&["libvirtd", "unshare", "busybox", "qemu-system-x86_64"])
        || !support::require_root()
    {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let net = Net::new(1, Rate::Unlimited);
    let host = Host::up(folder.path(), &net, 0);
    let emulator = folder.path().join("slow");
    std::fs::write(&emulator, SLOW).unwrap();
    std::fs::set_permissions(&emulator, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let store = Store::new();
    store.run(["image", "add", "tiny", guest::disk("tiny").to_str().unwrap()]);
    let _serve = store.serve::<&str>([]);
    store.run(["overlay", "create", "tiny", "vm-1"]);
    let disk = DomainDisk::Nbd { socket: store.path().join("nbd.sock"), export: "vm-1".to_owned() };
    let mut vm = launch("vm-1", Root::Disk(disk), 11, &folder.path().join("serial.log"));
    vm.nics.clear();
    vm.template = Some(format!(
        "<domain type='@TYPE@'><name>@NAME@</name><uuid>@UUID@</uuid><memory unit='MiB'>@MEMORY_MIB@</memory>\
         <os><type arch='x86_64'>hvm</type></os><devices><emulator>{}</emulator>@DISK@@NICS@</devices></domain>",
        emulator.display()
    ));
    let agent = || {
        Arc::new(
            Domains::new(Libvirt::new(host.libvirt()), &"n1".parse().unwrap(), folder.path())
                .with_accelerator(Accelerator::Tcg),
        )
    };
    let (killed, next) = (agent(), agent());
    let begun = tokio::spawn({
        let (killed, vm) = (Arc::clone(&killed), vm.clone());
        async move { killed.launch(&vm).await }
    });
    let state = async || next.info(&vm.name).await.unwrap().map(|info| info.state);
    while state().await != Some(Running::Starting) {
        assert!(!begun.is_finished(), "it was not seen to start");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    next.launch(&vm).await.unwrap();
    assert_eq!(state().await, Some(Running::Running));
    begun.await.unwrap().unwrap();
    next.delete(&vm.name).await.unwrap();
}
