//! A cluster with real daemons when things go wrong: kills of controller and agents during launches and ends, a
//! controller that is away while guests read and write, libvirtd and dockerd that hang and restart, a node that is lost.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use support::cluster::{Cluster, NEEDS, START, UP, eventually, name, node_of};
use support::net::Rate;

/// How soon after a kill everything runs and is recorded, or is gone.
const SETTLED: Duration = Duration::from_secs(30);
/// How soon a silent node is offline.
const OFFLINE: Duration = Duration::from_secs(15);

const NETWORK: &str = r#"
    [networks.lan]
    subnet = "10.55.0.0/24"
    uplink = "eth1"
"#;

/// A VM that is not waited for, so that it is killed in the midst of its boot, and six containers on two nodes.
fn few() -> String {
    format!(
        r#"
        name = "few"
        {NETWORK}
        [[groups]]
        name = "vm"
        type = "vm"
        image = "tiny"
        memory = "96M"
        networks = [{{ network = "lan", address = "10.55.0.10" }}]
        [[groups]]
        name = "ct"
        type = "container"
        image = "box"
        nodes = {{ n0 = 3, n1 = 3 }}
        memory = "16M"
        command = ["/bin/report"]
        networks = [{{ network = "lan", address = "10.55.0.60" }}]
        "#
    )
}

/// Kills and starts again: the controller, or the agent of some node.
fn kill(cluster: &mut Cluster, controller: bool, node: usize) {
    if controller {
        cluster.kill_controller();
        cluster.start_controller();
    } else {
        cluster.kill_agent(node);
        cluster.start_agent(node);
    }
}

/// What the daemons of all nodes run, sorted.
fn running(cluster: &Cluster, nodes: usize) -> Vec<String> {
    let names = (0..nodes).flat_map(|node| {
        let domains = cluster.virsh(node, &["list", "--name"]);
        let containers = cluster.docker(node, &["ps", "--format", "{{.Names}}"]);
        [domains, containers].concat().split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    });
    let mut names: Vec<_> = names.collect();
    names.sort();
    names
}

#[test]
fn kills_during_launches_and_ends_leave_no_duplicate_and_no_orphan() {
    if !support::require(&NEEDS) || !support::require_root() {
        return;
    }
    let rounds = support::rounds(10);
    let mut noise = support::noise(rounds.into(), 256).into_iter().cycle();
    let mut random = move |below: u64| u64::from(noise.next().unwrap()) * below / 256;
    let mut cluster = Cluster::up(2, 0);
    let mut slowest = Duration::ZERO;
    for round in 0..rounds {
        let task = cluster.deploy(&few());
        std::thread::sleep(Duration::from_millis(random(3000)));
        kill(&mut cluster, round % 2 == 0, usize::try_from(random(2)).unwrap());
        let began = Instant::now();
        cluster.wait_until_up(task, 7, SETTLED);
        slowest = slowest.max(began.elapsed());
        let rows = cluster.instances(task);
        let mut recorded: Vec<_> = rows.iter().map(|row| row["name"].as_str().unwrap().to_owned()).collect();
        recorded.sort();
        assert_eq!(running(&cluster, 2), recorded, "round {round}");

        cluster.begin_to_end(task);
        std::thread::sleep(Duration::from_millis(random(1500)));
        kill(&mut cluster, round % 2 == 1, usize::try_from(random(2)).unwrap());
        let began = Instant::now();
        let mut left = Vec::new();
        while began.elapsed() < SETTLED {
            left = (0..2).flat_map(|node| cluster.left(node)).collect();
            if left.is_empty()
                && cluster.rows(&["tasks"]).is_empty()
                && cluster.rows(&["instances"]).is_empty()
            {
                break;
            }
            std::thread::sleep(Duration::from_millis(300));
        }
        assert!(left.is_empty(), "round {round}: {left:?}");
        assert!(cluster.rows(&["tasks"]).is_empty() && cluster.rows(&["instances"]).is_empty());
        slowest = slowest.max(began.elapsed());
    }
    // It checks the whole database when it starts.
    kill(&mut cluster, true, 0);
    println!("{rounds} kills of the controller and {rounds} of agents; settled after {slowest:.1?} at most");
}

/// Writes, flushes and reads its disk for ever.
const WRITER: &str = r#"n=0
while :; do
  n=$((n+1))
  dd if=/dev/urandom of=/tmp/wrote bs=64k count=2 2>/dev/null
  dd if=/tmp/wrote of=/dev/vda2 bs=64k seek=$((n % 1000 * 2)) conv=fsync 2>/dev/null || echo IO-FAILED
  echo 3 >/proc/sys/vm/drop_caches
  dd if=/dev/vda2 bs=64k skip=$((n % 1000 * 2)) count=2 2>/dev/null | cmp - /tmp/wrote || echo IO-FAILED
  echo IO $n
  sleep 0.2
done
"#;

/// A domain of a user's own: it gives the guest a script by QEMU's firmware configuration.
fn template(script: &Path) -> String {
    format!(
        r#"<domain type='@TYPE@'>
  <name>@NAME@</name>
  <uuid>@UUID@</uuid>
  <title>made from a template</title>
  <memory unit='MiB'>@MEMORY_MIB@</memory>
  <vcpu>@CPUS@</vcpu>
  <sysinfo type='fwcfg'><entry name='opt/bootcache/run' file='{}'/></sysinfo>
  @FACTS@
  <os><type arch='x86_64' machine='pc'>hvm</type><smbios mode='sysinfo'/></os>
  <features><acpi/></features>
  <devices>
    <emulator>@EMULATOR@</emulator>
    @DISK@
    @NICS@
    <serial type='file'><source path='@SERIAL@'/></serial>
  </devices>
</domain>
"#,
        script.display()
    )
}

/// A VM by that template and a container, both of which write and read all the while.
fn writers() -> String {
    format!(
        r#"
        name = "io"
        {NETWORK}
        [[groups]]
        name = "vm"
        type = "vm"
        image = "tiny"
        memory = "96M"
        networks = [{{ network = "lan", address = "10.55.0.10" }}]
        template = "domain.xml"
        until = "serial:IO 1"
        [[groups]]
        name = "ct"
        type = "container"
        image = "box"
        memory = "16M"
        command = ["/bin/sh", "-c", '''
            n=0
            while :; do
                n=$((n+1))
                echo $n >/tmp/wrote
                [ "$(cat /tmp/wrote)" = $n ] && echo IO $n || echo IO-FAILED
                sleep 0.2
            done''']
        networks = [{{ network = "lan", address = "10.55.0.60" }}]
        "#
    )
}

/// Containers beside the writers, to be started and ended while something hangs.
const OTHERS: &str = r#"
    name = "other"
    [[groups]]
    name = "ct"
    type = "container"
    image = "box"
    count = 2
    memory = "16M"
    command = ["/bin/report"]
"#;

/// What the writers are watched by.
struct Writers<'c> {
    cluster: &'c Cluster,
    task: i64,
}

impl Writers<'_> {
    fn said(&self) -> [String; 2] {
        let vm = format!("io-{}-vm-1", self.task);
        let serial = fs::read(self.cluster.store(0).join("vms").join(vm).join("serial.log")).unwrap();
        let logs = self.cluster.docker(0, &["logs", "--tail", "3", &format!("io-{}-ct-1", self.task)]);
        [String::from_utf8_lossy(&serial).into_owned(), logs]
    }

    /// How far both are.
    #[track_caller]
    fn counts(&self) -> [u64; 2] {
        self.said().map(|text| {
            let lower = text.to_lowercase();
            assert!(!text.contains("IO-FAILED") && !lower.contains("i/o error"), "{text}");
            let last = text.lines().rev().find_map(|line| line.trim().strip_prefix("IO ")?.parse().ok());
            last.unwrap_or_else(|| panic!("nothing was written: {text}"))
        })
    }

    /// Both go on for so long, looked at every five seconds; a host's disk may keep them for longer once.
    #[track_caller]
    fn go_on(&self, seconds: u64) {
        let mut before = self.counts();
        for _ in 0..seconds.div_ceil(5) {
            let began = Instant::now();
            loop {
                std::thread::sleep(Duration::from_secs(5));
                let now = self.counts();
                if now[0] > before[0] && now[1] > before[1] {
                    before = now;
                    break;
                }
                assert!(began.elapsed() < Duration::from_secs(60), "{before:?} and a minute later {now:?}");
            }
        }
    }

    fn states(&self) -> Vec<(String, bool)> {
        let rows = self.cluster.instances(self.task);
        rows.iter().map(|row| (row["status"].as_str().unwrap().to_owned(), row["reason"].is_null())).collect()
    }

    /// Both run, and their node says nothing else of them.
    fn are_well(&self) -> bool {
        self.states() == [("running".to_owned(), true), ("running".to_owned(), true)]
    }
}

#[test]
fn instances_notice_nothing_of_a_controller_a_libvirtd_and_a_dockerd_that_are_away() {
    if !support::require(&NEEDS) || !support::require_root() {
        return;
    }
    let away = std::env::var("BOOTCACHE_AWAY_SECONDS").map_or(20, |text| text.parse().unwrap());
    let mut cluster = Cluster::up(1, 0);
    let script = cluster.folder.path().join("writer");
    fs::write(&script, WRITER).unwrap();
    fs::write(cluster.folder.path().join("domain.xml"), template(&script)).unwrap();
    let task = cluster.deploy(&writers());
    cluster.wait_until_up(task, 2, UP);
    cluster.have_booted();
    let title = cluster.virsh(0, &["desc", "--title", &format!("io-{task}-vm-1")]);
    assert_eq!(title.trim(), "made from a template");

    cluster.kill_controller();
    Writers { cluster: &cluster, task }.go_on(away);
    cluster.start_controller();
    let writers = Writers { cluster: &cluster, task };
    eventually("both are well", START, || writers.are_well());

    // A libvirtd that hangs: the node answers polls, and does what does not need it.
    let libvirtd = |signal: &str| {
        let kill = format!("kill -{signal} $(cat /run/libvirt/libvirtd.pid)");
        support::run(&mut cluster.hosts[0].command(["sh", "-c", &kill]));
    };
    libvirtd("STOP");
    let other = cluster.deploy(OTHERS);
    cluster.wait_until_up(other, 2, START);
    cluster.end(other);
    for _ in 0..5 {
        assert!(cluster.is_online(0), "{}", cluster.agent_said(0));
        writers.go_on(1);
    }
    assert_eq!(cluster.count(task, "running"), 2);
    libvirtd("CONT");
    eventually("both are well", START, || writers.are_well());

    // It dies, and is started again.
    libvirtd("KILL");
    eventually("that is said of the VM", START, || writers.states()[0] == ("running".to_owned(), false));
    // The agent is started while it is away: the VM stays what it is.
    cluster.kill_agent(0);
    cluster.start_agent(0);
    let troubles = || cluster.rows(&["nodes"])[0]["troubles"].to_string();
    eventually("the node runs no VMs", START, || troubles().contains("no vms: libvirt"));
    let writers = Writers { cluster: &cluster, task };
    eventually("that is said of the VM", START, || writers.states()[0] == ("running".to_owned(), false));
    writers.go_on(5);
    cluster.hosts[0].restart_libvirtd();
    eventually("both are well", START, || writers.are_well());
    writers.go_on(5);

    // So does dockerd; with `live-restore` its containers go on meanwhile.
    let before = writers.counts();
    support::run(&mut cluster.hosts[0].command([
        "sh",
        "-c",
        &format!("kill -9 $(cat {})", cluster.hosts[0].docker_pid_file().display()),
    ]));
    eventually("that is said of the container", START, || {
        writers.states()[1] == ("running".to_owned(), false)
    });
    cluster.hosts[0].docker();
    eventually("both are well", START, || writers.are_well());
    writers.go_on(5);
    assert!(writers.counts()[1] > before[1] + 10, "the container was stopped meanwhile");

    cluster.end(task);
    cluster.assert_clean(0);
}

/// Containers on all of three nodes.
fn three() -> String {
    format!(
        r#"
        name = "three"
        {NETWORK}
        [[groups]]
        name = "ct"
        type = "container"
        image = "box"
        nodes = {{ n0 = 1, n1 = 1, n2 = 2 }}
        memory = "16M"
        command = ["/bin/report"]
        networks = [{{ network = "lan", address = "10.55.0.60" }}]
        "#
    )
}

/// Bytes that node 2 has had from each node of the container's image, while that is on its way.
fn received(cluster: &Cluster) -> Option<[u64; 2]> {
    let status = cluster.status(2);
    let image = status["images"].as_array().unwrap().iter().find(|image| image["name"] == "box")?.clone();
    let sources = image["transfer"]["sources"].as_array()?.clone();
    let of = |node: usize| {
        let here = sources.iter().filter(|source| source["node"] == name(node).as_str());
        here.map(|source| source["bytes"].as_u64().unwrap()).sum()
    };
    // Those that are done with are left out.
    Some([of(0), of(1)]).filter(|bytes| bytes.iter().sum::<u64>() > 0)
}

#[test]
fn transfers_from_a_node_that_is_lost_go_on_from_another_and_the_node_comes_back() {
    if !support::require(&NEEDS) || !support::require_root() {
        return;
    }
    const PAYLOAD: usize = 64 << 20;
    let mut cluster = Cluster::up(3, PAYLOAD);
    support::run(&mut cluster.command(&["prefetch", "box", "n1"]));
    eventually("a second node has the image", START, || {
        let images = cluster.rows(&["images"]);
        images.iter().any(|image| image["name"] == "box" && image["complete"].as_array().unwrap().len() == 2)
    });
    cluster.net.shape(2, Rate::Megabits(5)); // until the others are done
    let task = cluster.deploy(&three());
    eventually("the two other nodes run theirs", START, || cluster.count(task, "running") == 2);
    cluster.net.shape(2, Rate::Megabits(60)); // nine seconds for the payload
    eventually("the image is on its way", START, || {
        received(&cluster).is_some_and(|bytes| bytes.iter().sum::<u64>() > 4 << 20)
    });
    let before = received(&cluster).expect("it takes nine seconds");
    let lost = usize::from(before[1] > before[0]);
    cluster.power_loss(lost);
    let began = Instant::now();
    let mut last = before;
    while cluster.is_online(lost) || cluster.count(task, "lost") == 0 {
        assert!(began.elapsed() < OFFLINE, "a lost node is not offline");
        last = received(&cluster).unwrap_or(last);
        std::thread::sleep(Duration::from_millis(200));
    }
    let gone: Vec<_> = cluster.instances(task).into_iter().filter(|row| row["status"] == "lost").collect();
    assert!(gone.iter().all(|row| node_of(row) == lost) && gone.len() == 1, "{gone:?}");
    eventually("the others run", START, || {
        last = received(&cluster).unwrap_or(last);
        cluster.count(task, "running") == 3
    });
    let other = 1 - lost;
    println!("node 2 had {before:?} bytes when n{lost} was lost, and {last:?} at the end");
    assert!(before[lost] > 1 << 20, "nothing came from the node that was lost: {before:?}");
    assert!(last[other] > before[other] + (16 << 20), "the rest did not come from the other: {last:?}");

    // What was ended meanwhile ends when the node is back, which it is by itself.
    cluster.end(task);
    cluster.power_on(lost);
    eventually("it is back", START, || cluster.is_online(lost));
    eventually("nothing is left", START, || (0..3).all(|node| cluster.left(node).is_empty()));
}

#[test]
fn a_source_that_does_not_answer_at_first_makes_instances_wait_and_not_fail() {
    if !support::require(&NEEDS) || !support::require_root() {
        return;
    }
    let cluster = Cluster::up(2, 0);
    let pid = cluster.status(0)["pid"].to_string();
    let origin = |signal: &str| {
        let kill = format!("kill -{signal} {pid}");
        support::run(&mut cluster.hosts[0].command(["sh", "-c", &kill]));
    };
    origin("STOP");
    let plan = OTHERS.replace("count = 2", "nodes = { n1 = 2 }");
    let task = cluster.deploy(&plan);
    // Not of both at one time: one asks while the other waits for its turn.
    let mut told = std::collections::BTreeSet::new();
    eventually("why they wait is said", START, || {
        for row in cluster.instances(task) {
            assert_eq!(row["status"], "preparing", "{row}");
            if row["reason"].as_str().is_some_and(|reason| reason.contains("no source has image box")) {
                told.insert(row["name"].to_string());
            }
        }
        told.len() == 2
    });
    origin("CONT");
    cluster.wait_until_up(task, 2, START);
    cluster.end(task);
    cluster.assert_clean(1);
}
