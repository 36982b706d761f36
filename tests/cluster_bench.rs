//! The thesis's hundred instances on four nodes, by hand (`make bench-cluster`): with bootcache, after a copy of the whole
//! images, and containers only. Links of 1 Gbit/s; guests under TCG where there is no KVM, so that what counts for them is
//! how long they waited for bytes, from the order to launch until they were up.
//!
//! `BOOTCACHE_GUEST` is the guest (`fast`, a Debian of a few seconds; or `tiny`), `BOOTCACHE_VMS` and
//! `BOOTCACHE_CONTAINERS` how many there are (20 and 80).

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use support::cluster::{Cluster, NEEDS, START, eventually, name, node_of};
use support::guest;

const NODES: usize = 4;
/// Bytes of the container's image that do not compress.
const PAYLOAD: usize = 64 << 20;
const UP: Duration = Duration::from_secs(1200);
/// Of links: what their headers leave is less.
const LINK_BITS: f64 = 1e9;

fn plan(vms: u64, containers: u64) -> String {
    let vm = format!(
        r#"
        [[groups]]
        name = "vm"
        type = "vm"
        image = "golden"
        count = {vms}
        memory = "256M"
        networks = [{{ network = "lan", address = "10.55.0.10" }}]
        until = "serial:BOOTED-OK"
        time_limit = 1200
        "#
    );
    format!(
        r#"
        name = "thesis"
        [networks.lan]
        subnet = "10.55.0.0/24"
        uplink = "eth1"
        {}
        [[groups]]
        name = "ct"
        type = "container"
        image = "box"
        count = {containers}
        memory = "16M"
        command = ["/bin/report"]
        networks = [{{ network = "lan", address = "10.55.0.60" }}]
        until = "report"
        time_limit = 1200
        "#,
        if vms > 0 { vm.as_str() } else { "" }
    )
}

/// What was seen of one way.
struct Seen {
    vms: f64,
    containers: f64,
    count: u64,
    /// Seconds that each VM waited before its image could be read, and for bytes afterwards; all VMs together.
    before: f64,
    reading: f64,
    /// Bytes that the nodes received.
    received: u64,
    /// Seconds until the containers' image was whole and loaded, on the last node: waiting for it alone.
    loaded: f64,
}

impl Seen {
    fn all(&self) -> f64 {
        self.vms.max(self.containers)
    }
}

/// Milliseconds until an instance's image could be read, and until it had what it starts from, as its agent says: the rest
/// is disks and sockets that had to be made, and for containers the image that had to be whole and loaded.
fn had_its_root(cluster: &Cluster, instance: &Value) -> (u64, u64) {
    let said = cluster.agent_said(node_of(instance));
    let start = format!("{}: has its image after ", instance["name"].as_str().unwrap());
    let rest = said.lines().find_map(|line| line.split(&start).nth(1)).unwrap_or_else(|| panic!("{said}"));
    let mut numbers = rest.split(' ').filter_map(|word| word.parse().ok());
    (numbers.next().unwrap(), numbers.next().unwrap())
}

fn deploy(cluster: &Cluster, vms: u64, containers: u64) -> Seen {
    let before: u64 = (0..NODES).map(|node| cluster.net.traffic(node).1).sum();
    let task = cluster.deploy(&plan(vms, containers));
    cluster.wait_until_up(task, usize::try_from(vms + containers).unwrap(), UP);
    let received: u64 = (0..NODES).map(|node| cluster.net.traffic(node).1).sum();
    let rows = cluster.instances(task);
    let of = |kind: &'static str| rows.iter().filter(move |row| row["kind"] == kind);
    let last = |kind| of(kind).map(|row| row["up_ms"].as_u64().unwrap()).max().unwrap_or(0) as f64 / 1e3;
    let roots = |kind| of(kind).map(|row| had_its_root(cluster, row)).collect::<Vec<_>>();
    let mut reading = 0;
    for node in 0..NODES {
        for overlay in cluster.status(node)["overlays"].as_array().unwrap() {
            reading += overlay["waits"]["blocked_ms"].as_u64().unwrap_or(0);
        }
    }
    let seen = Seen {
        vms: last("vm"),
        containers: last("container"),
        count: vms + containers,
        before: roots("vm").iter().map(|root| root.0).sum::<u64>() as f64 / 1e3,
        reading: reading as f64 / 1e3,
        received: received - before,
        loaded: roots("container").into_iter().map(|root| root.1).max().unwrap_or(0) as f64 / 1e3,
    };
    cluster.end(task);
    seen
}

fn image(cluster: &Cluster, node: usize, arguments: &[&str], file: &Path) {
    let mut command = Command::new(support::store::bootcache());
    command.arg("--store").arg(cluster.store(node)).args(["image", "add"]).args(arguments).arg(file);
    support::run(&mut command);
}

/// A cluster with the guest's image on the first node, and its boot recorded there where that is of use.
fn cluster(disk: &Path, recorded: bool) -> Cluster {
    let cluster = Cluster::up(NODES, PAYLOAD);
    image(&cluster, 0, &["--format", "raw", "golden"], disk);
    if recorded {
        let mut record = Command::new(support::store::bootcache());
        record.arg("--store").arg(cluster.store(0)).args(["record", "golden"]);
        support::run(record.args(["--until", "serial:BOOTED-OK", "--memory", "256", "--accel", "tcg"]));
    }
    eventually("the image is known, with its boot cache", START, || {
        let images = cluster.rows(&["images"]);
        images.iter().any(|row| row["name"] == "golden" && (row["boot_bytes"] != 0) == recorded)
    });
    cluster
}

/// Copies a compressed file from the first node to the others, all at once, and gives how long each took until it had
/// the whole file.
fn copy(cluster: &Cluster, from: &Path, to: &str) -> Vec<f64> {
    let listener = cluster.net.within(0, || TcpListener::bind((cluster.net.address(0), 0)).unwrap());
    let address = listener.local_addr().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 1..NODES {
                let (mut stream, _) = listener.accept().unwrap();
                scope.spawn(move || {
                    std::io::copy(&mut fs::File::open(from).unwrap(), &mut stream).unwrap();
                });
            }
        });
        let nodes: Vec<_> = (1..NODES)
            .map(|node| {
                let file = cluster.folder.path().join(format!("{to}{node}"));
                scope.spawn(move || {
                    let began = Instant::now();
                    let mut stream =
                        cluster.net.within(node, || std::net::TcpStream::connect(address).unwrap());
                    let mut unpack = Command::new("zstd");
                    unpack.args(["-d", "-q", "-f", "-o"]).arg(file).stdin(Stdio::piped());
                    let mut unpack = unpack.spawn().unwrap();
                    let mut pipe = unpack.stdin.take().unwrap();
                    let mut piece = vec![0; 1 << 20];
                    loop {
                        let length = stream.read(&mut piece).unwrap();
                        if length == 0 {
                            break;
                        }
                        pipe.write_all(&piece[..length]).unwrap();
                    }
                    drop(pipe);
                    assert!(unpack.wait().unwrap().success());
                    began.elapsed().as_secs_f64()
                })
            })
            .collect();
        nodes.into_iter().map(|node| node.join().unwrap()).collect()
    })
}

fn compressed(file: &Path, to: &Path) -> u64 {
    support::run(Command::new("zstd").args(["-9", "-T0", "-q", "-f", "-o"]).arg(to).arg(file));
    fs::metadata(to).unwrap().len()
}

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |text| text.parse().unwrap())
}

fn show(way: &str, seen: &Seen, copied: f64) {
    println!(
        "{way:24} | {:7.2} | {:7.2} | {:10.2} | {:11.2} | {:6.2} + {:6.2} | {:8.1}",
        copied + seen.all(),
        if seen.vms > 0.0 { copied + seen.vms } else { 0.0 },
        copied + seen.containers,
        seen.count as f64 / (copied + seen.all()),
        seen.before,
        seen.reading,
        seen.received as f64 / 1e6,
    );
}

#[test]
#[ignore = "by hand: make bench-cluster"]
fn the_thesis_hundred_instances() {
    if !support::require(&NEEDS) || !support::require(&["zstd"]) || !support::require_root() {
        return;
    }
    let (vms, containers) = (number("BOOTCACHE_VMS", 20), number("BOOTCACHE_CONTAINERS", 80));
    let guest_name = std::env::var("BOOTCACHE_GUEST").unwrap_or_else(|_| "fast".to_owned());
    let disk: PathBuf = guest::disk(&guest_name);

    let bootcache = cluster(&disk, true);
    let goodput = bootcache.net.goodput(0, 1, 64 << 20);
    let seen = deploy(&bootcache, vms, containers);
    drop(bootcache);

    let whole = cluster(&disk, false);
    let folder = whole.folder.path().to_owned();
    let (golden, archive) = (folder.join("golden.zst"), folder.join("box.tar.zst"));
    let golden_bytes = compressed(&disk, &golden);
    let box_bytes = compressed(&folder.join("box.tar"), &archive);
    // One after the other, the VMs' first: either way they share the first node's link.
    let (vm_copies, box_copies) = (copy(&whole, &golden, "golden"), copy(&whole, &archive, "box"));
    for node in 1..NODES {
        image(&whole, node, &["--format", "raw", "golden"], &folder.join(format!("golden{node}")));
        image(&whole, node, &["--type", "container", "box"], &folder.join(format!("box{node}")));
    }
    eventually("every node has everything", START, || {
        let images = whole.rows(&["images"]);
        let wanted = images.iter().filter(|row| row["name"] != "tiny");
        wanted.clone().count() == 2
            && wanted.into_iter().all(|row| row["complete"].as_array().unwrap().len() == NODES)
    });
    let mut copied = deploy(&whole, vms, containers);
    drop(whole);
    // The placement is the same: as many VMs on each node.
    let each = vms as f64 / NODES as f64;
    copied.before += vm_copies.iter().sum::<f64>() * each;
    copied.received += (golden_bytes + box_bytes) * (NODES as u64 - 1);
    let copying = vm_copies.iter().zip(&box_copies).map(|(one, other)| one + other).fold(0.0, f64::max);

    let only = Cluster::up(NODES, PAYLOAD);
    let alone = deploy(&only, 0, vms + containers);
    drop(only);

    println!(
        "{vms} VMs ({guest_name}, {:.0} MB compressed) and {containers} containers ({:.0} MB compressed) on {NODES} nodes, of \
         which {} has the images; 1 Gbit/s links, a plain TCP copy gets {goodput:.0} Mbit/s",
        golden_bytes as f64 / 1e6,
        box_bytes as f64 / 1e6,
        name(0)
    );
    println!(
        "                         |      all up after seconds      |  instances  | all VMs waited  | MB to"
    );
    println!(
        "way                      |     all |     VMs | containers |    a second | image s + reads s| nodes"
    );
    show("bootcache", &seen, 0.0);
    show("whole copies, then boot", &copied, copying);
    show("containers only", &alone, 0.0);
    println!(
        "VMs waited for bytes: {:.3} of copy-then-boot (goal 0.2); copies took {vm_copies:.2?} s and {box_copies:.2?} s",
        (seen.before + seen.reading) / (copied.before + copied.reading),
    );
    println!(
        "containers' image: compressed / link {:.2} s; loaded on the last node {:.2} s after the order beside VMs, {:.2} s without",
        box_bytes as f64 * 8.0 / LINK_BITS,
        seen.loaded,
        alone.loaded,
    );
}
