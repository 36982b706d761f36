//! `bootcache boot` as people use it: through a libvirt whose QEMU is not root, and by somebody who is not root at all;
//! and the tracer in a QEMU that libvirt started.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::collections::BTreeSet;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use bootcache::boot_cache::kept;
use bootcache::boot_cache::merge::first_touches;
use bootcache::boot_cache::recording::Recording;
use bootcache::trace::Trace;
use serde_json::Value;
use support::host::Host;
use support::net::{Net, Rate};
use support::process::Process;
use support::store::Store;

const LIBVIRT: [&str; 5] = ["libvirtd", "virsh", "unshare", "ip", "qemu-system-x86_64"];
const BOOTED: &str = "serial:BOOTED-OK";

/// A process of this machine whose command line has both words in it.
fn process_of(word: &str, other: &str) -> Option<PathBuf> {
    let has = |folder: &Path| {
        let line = std::fs::read(folder.join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        line.contains(word) && line.contains(other)
    };
    std::fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path()).find(|folder| has(folder))
}

fn status_field(process: &Path, field: &str) -> String {
    let status = std::fs::read_to_string(process.join("status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap_or_default();
    line.trim_start_matches(':').split_whitespace().next().unwrap_or_default().to_owned()
}

/// Lets everybody pass through a folder that `tempfile` made for its owner alone.
fn open_to_all(folder: &Path) {
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755)).unwrap();
}

fn process_id(folder: &Path) -> i32 {
    folder.file_name().unwrap().to_str().unwrap().parse().unwrap()
}

fn kill(process: &Path) {
    let pid = rustix::process::Pid::from_raw(process_id(process)).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

#[test]
fn a_libvirt_whose_qemu_is_not_root_boots_vms_from_sockets_of_their_own() {
    if !support::require(&LIBVIRT) || !support::require_root() {
        return;
    }
    let store = Store::new();
    open_to_all(store.path().parent().unwrap());
    store.run(["image", "add", "tiny", support::guest::disk("tiny").to_str().unwrap()]);
    let net = Net::new(1, Rate::Unlimited);
    let host = Host::up_with_qemu_as("libvirt-qemu", store.path().parent().unwrap(), &net, 0);
    let uid = user_id("libvirt-qemu");
    let boot = |rest: &[&str]| {
        let line =
            ["--json", "boot", "tiny", "--connect", host.libvirt(), "--memory", "128", "--accel", "tcg"];
        store.command(line.iter().chain(rest))
    };
    let vms = ["--name", "vm", "--count", "2", "--until", BOOTED];
    let output = boot(&vms).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("started a daemon"), "{said}");
    let outcomes: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(outcomes[0]["seconds"].as_f64().unwrap() > 0.5 && outcomes[1]["name"] == "vm-2", "{outcomes}");
    store.have_booted(2);

    for vm in ["vm-1", "vm-2"] {
        let qemu = process_of("qemu-system", &format!("guest={vm},")).expect("it runs");
        assert_eq!(status_field(&qemu, "Uid"), uid.to_string(), "QEMU is not root");
        assert_eq!(status_field(&qemu, "Seccomp"), "2", "QEMU is in its sandbox");
        let socket = store.path().join("vms").join(vm).join("nbd.sock");
        let meta = std::fs::metadata(&socket).unwrap();
        assert_eq!((meta.uid(), meta.mode() & 0o777), (uid, 0o600));
        let console = std::fs::metadata(socket.with_file_name("serial.log")).unwrap();
        assert_eq!(console.mode() & 0o777, 0o600, "a console says passwords");
        let uri = format!("nbd+unix:///?socket={}", socket.display());
        let listed = Command::new("nbdinfo").args(["--list", &uri]).output().unwrap();
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        for other in ["vm-1", "vm-2", "tiny"].iter().filter(|other| **other != vm) {
            assert!(!listed.contains(&format!("\"{other}\"")), "{vm} sees {other}: {listed}");
        }
    }

    // The daemon dies and comes back, and the sockets are still those that QEMU may open.
    kill(&process_of(store.path().to_str().unwrap(), "\0serve").expect("the daemon that boot started"));
    let said = store.refused(["overlay", "remove", "vm-1"]);
    assert!(said.contains("in use"), "the guest runs on and waits for its disk: {said}");
    let serve = store.serve([""; 0]);
    assert_eq!(std::fs::metadata(store.path().join("vms/vm-1/nbd.sock")).unwrap().uid(), uid);

    // A guest that never boots: one line, nothing left of it, the others are not touched.
    let said = {
        let mut never = boot(&["--name", "never", "--until", "serial:NO SUCH LINE", "--time-limit", "3"]);
        let mut process = Process::start(&mut never);
        assert_eq!(process.wait(Duration::from_secs(60)).code(), Some(1));
        process.said()
    };
    assert!(said.contains("never: it had not booted after 3 s (waiting for serial:NO SUCH LINE)"), "{said}");
    assert!(said.contains("its console"), "what it said is told, since its log goes: {said}");
    assert!(!store.path().join("vms/never").exists() && !store.path().join("overlays/never").exists());
    assert!(process_of("qemu-system", "guest=never,").is_none());

    // One that QEMU has stopped, as where KVM cannot go on with it: nobody waits for it until the time is over.
    let said = {
        let mut still = boot(&["--name", "still", "--until", "serial:NO SUCH LINE"]);
        let mut process = Process::start(&mut still);
        let deadline = Instant::now() + Duration::from_secs(30);
        let stop = ["-c", host.libvirt(), "qemu-monitor-command", "still", "--hmp", "stop"];
        while !Command::new("virsh").args(stop).output().unwrap().status.success() {
            assert!(Instant::now() < deadline, "{}", process.said());
            std::thread::sleep(Duration::from_millis(100));
        }
        assert_eq!(process.wait(Duration::from_secs(60)).code(), Some(1));
        process.said()
    };
    assert!(said.contains("before it had booted: QEMU paused it (see its log"), "{said}");
    assert!(!store.path().join("vms/still").exists() && process_of("qemu-system", "guest=still,").is_none());

    // Ended while it starts them: as if it had never been called.
    {
        let mut late = boot(&["--name", "late", "--count", "3", "--until", "serial:NO SUCH LINE"]);
        let mut process = Process::start(&mut late);
        let record = store.path().join("vms/late-1/vm.json");
        let deadline = Instant::now() + Duration::from_secs(30);
        while !record.exists() {
            assert!(Instant::now() < deadline, "{}", process.said());
            std::thread::sleep(Duration::from_millis(2));
        }
        process.signal(rustix::process::Signal::TERM);
        assert_eq!(process.wait(Duration::from_secs(60)).code(), Some(130), "{}", process.said());
    }
    for number in 1..=3 {
        let name = format!("late-{number}");
        assert!(!store.path().join("vms").join(&name).exists(), "{name}");
        assert!(!store.path().join("overlays").join(&name).exists(), "{name}");
        assert!(process_of("qemu-system", &format!("guest={name},")).is_none(), "{name}");
    }

    // A domain of somebody else has the name: it is left alone, and nothing of ours stays.
    let xml = store.beside("theirs.xml");
    let theirs = "<domain type='qemu'><name>theirs</name><memory unit='MiB'>32</memory>
        <os><type arch='x86_64' machine='pc'>hvm</type></os>
        <devices><emulator>/usr/bin/qemu-system-x86_64</emulator></devices></domain>";
    std::fs::write(&xml, theirs).unwrap();
    let virsh = |words: &[&str]| support::run(Command::new("virsh").args(["-c", host.libvirt()]).args(words));
    virsh(&["define", xml.to_str().unwrap()]);
    virsh(&["start", "theirs"]);
    let output = boot(&["--name", "theirs", "--until", BOOTED]).output().unwrap();
    let outcomes: Value = serde_json::from_slice(&output.stdout).unwrap();
    let error = outcomes[0]["error"].as_str().unwrap_or_default();
    assert!(!output.status.success() && error.contains("already exists"), "{outcomes}");
    assert!(!store.path().join("vms/theirs").exists() && !store.path().join("overlays/theirs").exists());
    assert_eq!(virsh(&["domstate", "theirs"]).trim(), "running");
    virsh(&["destroy", "theirs"]);
    virsh(&["undefine", "theirs"]);

    // A guest that is asked to shut down syncs its disk first: its emulator finds the daemon that `stop` starts.
    drop(serve);
    let mut serial = std::fs::File::open(store.path().join("vms/vm-1/serial.log")).unwrap();
    store.run(["stop", "vm-1", "--remove"]);
    let mut said = String::new();
    serial.read_to_string(&mut said).unwrap();
    assert!(said.contains("ACPI-POWEROFF") && !said.contains("error"), "{said}");

    // One that stands still can write nothing down any more, and one whose disk has moved would go on without what it wrote
    // there: neither is ended without a word.
    virsh(&["suspend", "vm-2"]);
    let said = store.refused(["stop", "vm-2"]);
    assert!(said.contains("VM 'vm-2' is paused") && said.contains("--force"), "{said}");
    virsh(&["resume", "vm-2"]);
    let snapshot = store.path().join("snapshot.qcow2");
    support::run(Command::new("qemu-img").args(["create", "-qf", "qcow2"]).arg(&snapshot).arg("256M"));
    std::os::unix::fs::chown(&snapshot, Some(uid), None).unwrap();
    let disk = format!("vda,file={}", snapshot.display());
    let take = ["snapshot-create-as", "vm-2", "s", "--disk-only", "--no-metadata", "--reuse-external"];
    virsh(&[&take[..], &["--diskspec", &disk]].concat());
    let said = store.refused(["stop", "vm-2"]);
    assert!(said.contains("the disk of VM 'vm-2' is another one now"), "{said}");
    assert_eq!(virsh(&["domstate", "vm-2"]).trim(), "running");
    store.run(["stop", "vm-2", "--force"]);
    let said = store.run(["stop", "vm-2"]);
    assert!(said.is_empty(), "it is stopped already: {said}");
    assert!(process_of(store.path().to_str().unwrap(), "guest=vm-").is_none());
    let left = store.run(["--json", "overlay", "list"]);
    assert!(left.contains("vm-2") && !left.contains("vm-1"), "{left}");
    assert!(virsh(&["list", "--all", "--name"]).trim().is_empty());
    store.run(["image", "verify", "tiny"]);
    kill(&process_of(store.path().to_str().unwrap(), "\0serve").expect("the daemon that stop started"));
}

fn user_id(user: &str) -> u32 {
    support::run(Command::new("id").args(["-u", user])).trim().parse().unwrap()
}

#[test]
fn an_image_that_was_recorded_until_its_guest_connected_boots_in_libvirt_without_being_told_more() {
    const PORT: u16 = 17_001;
    if !support::require(&LIBVIRT) || !support::require(&["debugfs"]) || !support::require_root() {
        return;
    }
    let store = Store::new();
    open_to_all(store.path().parent().unwrap());
    let (disk, init) = (store.beside("calls.raw"), store.beside("init"));
    support::run(Command::new("cp").arg("--sparse=always").arg(support::guest::disk("tiny")).arg(&disk));
    // This one knows whom to call. It is not mounted for that: a mount namespace that another test makes meanwhile
    // would keep the mount, and the disk would be copied before what was written is on it.
    let root = format!("{}?offset=1048576", disk.display());
    let on_root = |request: &str| {
        let debugfs = support::find("debugfs").expect("e2fsprogs has debugfs");
        support::run(Command::new(debugfs).args(["-w", "-R", request, &root]))
    };
    let call = format!("report=10.0.2.2:{PORT}");
    let knows = |line: &str| if line.starts_with("report=") { call.clone() } else { line.to_owned() };
    let lines: Vec<_> = on_root("cat /sbin/init").lines().map(knows).collect();
    std::fs::write(&init, lines.join("\n") + "\n").unwrap();
    on_root("rm /sbin/init");
    on_root(&format!("write {} /sbin/init", init.display()));
    on_root("set_inode_field /sbin/init mode 0100755");
    assert_eq!(on_root("cat /sbin/init").lines().filter(|line| *line == call).count(), 1);
    store.run(["image", "add", "calls", disk.to_str().unwrap()]);
    let net = Net::new(1, Rate::Unlimited);
    let host = Host::up_with_qemu_as("libvirt-qemu", store.path().parent().unwrap(), &net, 0);
    net.within(0, || {
        let guest = ["--memory", "128", "--accel", "tcg"];
        let until = format!("tcp:{PORT}");
        store.run(["record", "calls", "--runs", "1", "--until", &until].iter().chain(&guest));
        let boot = ["--json", "boot", "calls", "--connect", host.libvirt(), "--time-limit", "100"];
        let outcomes: Value = serde_json::from_str(&store.run(boot.iter().chain(&guest))).unwrap();
        assert!(outcomes[0]["seconds"].as_f64().unwrap() > 0.5, "{outcomes}");
        store.run(["stop", "calls-vm", "--force", "--remove"]);
    });
    kill(&process_of(store.path().to_str().unwrap(), "\0serve").expect("the daemon that boot started"));
}

#[test]
fn somebody_who_is_not_root_records_and_boots_without_any_setting() {
    if !support::require(&["qemu-system-x86_64", "qemu-img", "setpriv"]) || !support::require_root() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    open_to_all(folder.path());
    let home = folder.path().join("ho,me");
    let disk = folder.path().join("tiny.raw");
    std::fs::create_dir(&home).unwrap();
    support::run(Command::new("cp").arg("--sparse=always").arg(support::guest::disk("tiny")).arg(&disk));
    // The programs lie where only root may look, perhaps.
    let bin = folder.path().join("bin");
    std::fs::create_dir(&bin).unwrap();
    for program in [PathBuf::from(support::store::bootcache()), bootcache::record::tracer_library().unwrap()]
    {
        std::fs::copy(&program, bin.join(program.file_name().unwrap())).unwrap();
    }
    support::run(Command::new("chown").args(["-R", "nobody"]).arg(folder.path()));
    let command = |words: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=nobody", "--regid=nogroup", "--clear-groups", "--"]);
        command.arg(bin.join("bootcache")).args(words).env_clear().current_dir(&home);
        command.env("HOME", &home).env("PATH", "/usr/bin:/bin");
        command
    };
    let run = |words: &[&str]| support::run(&mut command(words));

    // QEMU's options end at a comma that is not written twice.
    run(&["image", "add", "tiny", disk.to_str().unwrap()]);
    let recorded = run(&["record", "tiny", "--until", BOOTED, "--memory", "128", "--accel", "tcg"]);
    assert!(recorded.contains("via preload"), "{recorded}");
    let boot = ["--json", "boot", "tiny", "--qemu", "--memory", "128", "--accel", "tcg", "--count", "2"];
    let outcomes: Value = serde_json::from_str(&run(&boot)).unwrap();
    assert_eq!(
        (outcomes[0]["name"].as_str(), outcomes[1]["name"].as_str()),
        (Some("tiny-vm-1"), Some("tiny-vm-2"))
    );
    let store = home.join(".local/share/bootcache");
    assert!(store.join("vms/tiny-vm-1/nbd.sock").exists());
    let daemon = process_of(store.to_str().unwrap(), "\0serve").expect("the daemon that boot started");
    assert_ne!(status_field(&daemon, "Uid"), "0");

    // Stopped, its overlay stays; only asked to does another boot go on with it, and one that fails leaves it there.
    let refused = |words: &[&str]| {
        let output = command(words).output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let one = |rest: &[&'static str]| -> Vec<&'static str> {
        let line = ["boot", "tiny", "--qemu", "--memory", "128", "--accel", "tcg", "--name", "tiny-vm-1"];
        [&line, rest].concat()
    };
    let said = refused(&one(&["--reuse"]));
    assert!(said.contains("VM 'tiny-vm-1' runs: `bootcache stop tiny-vm-1` ends it"), "{said}");
    run(&["stop", "tiny-vm-1", "--force"]);
    let said = refused(&one(&[]));
    assert!(said.contains("'tiny-vm-1' is taken") && said.contains("--reuse"), "{said}");
    let said = refused(&one(&["--reuse", "--until", "serial:NO SUCH LINE", "--time-limit", "2"]));
    assert!(said.contains("it had not booted after 2 s"), "{said}");
    let uri = format!("nbd+unix:///tiny-vm-1?socket={}", store.join("nbd.sock").display());
    support::run(Command::new("qemu-io").args(["-f", "raw", "-c", "write -P 77 7M 4k", "-c", "flush", &uri]));
    run(&one(&["--reuse"]));
    support::run(Command::new("qemu-io").args(["-r", "-f", "raw", "-c", "read -P 77 7M 4k", &uri]));

    // A guest that went off by itself is none that runs.
    let record = std::fs::read_to_string(store.join("vms/tiny-vm-1/vm.json")).unwrap();
    let record: Value = serde_json::from_str(&record).unwrap();
    kill(&Path::new("/proc").join(record["runner"]["qemu"]["pid"].to_string()));
    let deadline = Instant::now() + Duration::from_secs(30);
    let in_use = || run(&["--json", "overlay", "show", "tiny-vm-1"]).contains("\"connections\":1");
    while in_use() {
        assert!(Instant::now() < deadline, "its client is still there");
        std::thread::sleep(Duration::from_millis(20));
    }
    run(&one(&["--reuse"]));
    // Its power button is pressed, as libvirt's guests have theirs.
    let mut serial = std::fs::File::open(store.join("vms/tiny-vm-1/serial.log")).unwrap();
    run(&["stop", "tiny-vm-1", "tiny-vm-2", "--remove"]);
    let mut said = String::new();
    serial.read_to_string(&mut said).unwrap();
    assert!(said.contains("ACPI-POWEROFF"), "{said}");
    let left: Value = serde_json::from_str(&run(&["--json", "overlay", "list"])).unwrap();
    assert_eq!(left, serde_json::json!([]));
    kill(&daemon);
}

#[test]
fn a_qemu_that_cannot_be_written_down_is_ended() {
    if !support::require(&["qemu-system-x86_64"]) {
        return;
    }
    let store = Store::new();
    let raw = store.beside("disk.raw");
    std::fs::write(&raw, support::noise(1, 1 << 20)).unwrap();
    store.run(["image", "add", "disk", raw.to_str().unwrap()]);
    let _serve = store.serve([""; 0]);
    let folder = store.path().join("vms/vm");
    std::fs::create_dir_all(folder.join("vm.json")).unwrap();
    let refused = store.refused(["boot", "disk", "--name", "vm", "--qemu", "--no-wait", "--accel", "tcg"]);
    assert!(refused.contains("cannot write down which process QEMU is"), "{refused}");
    assert_eq!(process_of(folder.to_str().unwrap(), "serial.log"), None);
    assert_eq!(store.run(["overlay", "list", "--json"]).trim(), "[]");
}

#[test]
fn under_libvirt_s_sandbox_the_tracer_sees_what_the_export_sees() {
    if !support::require(&LIBVIRT) || !support::require_root() {
        return;
    }
    let store = Store::new();
    let disk = support::guest::disk("tiny");
    store.run(["image", "add", "tiny", disk.to_str().unwrap()]);
    // Up, it would look at its disks at once: whether that is seen depends on who ends the boot how fast.
    let stay = "name=opt/bootcache/run,string=sleep 600";
    let stayed = ["--until", BOOTED, "--qemu-arg=-fw_cfg", "--qemu-arg", stay];
    let recorded = ["--json", "record", "tiny", "--via", "nbd", "--memory", "128", "--accel", "tcg"];
    let recorded = store.run(recorded.iter().chain(&stayed));
    let recorded: Value = serde_json::from_str(&recorded).unwrap();
    let shown: Value = serde_json::from_str(&store.run(["--json", "image", "show", "tiny"])).unwrap();
    let root = store.path().join("images").join(shown["root"].as_str().unwrap());
    let exported = kept::read(&root.join("recordings/1")).unwrap().1;
    assert_eq!(recorded["via"], "nbd");

    let image = store.beside("tiny.raw");
    support::run(Command::new("cp").arg("--sparse=always").arg(&disk).arg(&image));
    let overlay = store.beside("overlay.qcow2");
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "-F", "raw", "-b"]);
    support::run(create.arg(&image).arg(&overlay));
    let (trace, serial) = (store.beside("boot.trace"), store.beside("serial.log"));
    let library = bootcache::record::tracer_library().unwrap();
    let xml = store.beside("domain.xml");
    let domain = format!(
        "<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
           <name>traced</name><memory unit='MiB'>128</memory>
           <os><type arch='x86_64' machine='pc'>hvm</type></os><features><acpi/></features>
           <devices>
             <emulator>/usr/bin/qemu-system-x86_64</emulator>
             <disk type='file' device='disk'>
               <driver name='qemu' type='qcow2' io='threads'/>
               <source file='{}'/><target dev='vda' bus='virtio'/>
             </disk>
             <serial type='file'><source path='{}'/></serial>
           </devices>
           <qemu:commandline>
             <qemu:env name='LD_PRELOAD' value='{}'/>
             <qemu:env name='BOOTCACHE_TRACE_IMAGE' value='{}'/>
             <qemu:env name='BOOTCACHE_TRACE_OUT' value='{}'/>
             <qemu:arg value='-fw_cfg'/><qemu:arg value='{stay}'/>
           </qemu:commandline>
         </domain>",
        overlay.display(),
        serial.display(),
        library.display(),
        image.display(),
        trace.display()
    );
    std::fs::write(&xml, domain).unwrap();
    let net = Net::new(1, Rate::Unlimited);
    let host = Host::up(store.path().parent().unwrap(), &net, 0);
    support::run(Command::new("virsh").args(["-c", host.libvirt(), "create"]).arg(&xml));
    let deadline = Instant::now() + Duration::from_secs(240);
    while !std::fs::read_to_string(&serial).unwrap_or_default().contains("BOOTED-OK") {
        assert!(Instant::now() < deadline, "{}", std::fs::read_to_string(&serial).unwrap_or_default());
        std::thread::sleep(Duration::from_millis(20));
    }
    let qemu = process_of("qemu-system", "guest=traced,").expect("it runs");
    assert_eq!(status_field(&qemu, "Seccomp"), "2", "QEMU is in its sandbox");
    // As a power cut would end it.
    drop(host);
    let traced = Trace::open(&trace).unwrap().recording(256 << 20, u64::MAX).unwrap();
    let jaccard = jaccard(&traced, &exported);
    eprintln!("tracer under libvirt and export: {jaccard:.4} of {} blocks", blocks(&traced).len());
    assert!(jaccard >= 0.98, "{jaccard}");
}

fn blocks(recording: &Recording) -> BTreeSet<u64> {
    first_touches(std::slice::from_ref(recording), u64::MAX).iter().map(|touch| touch.block).collect()
}

fn jaccard(one: &Recording, other: &Recording) -> f64 {
    let (one, other) = (blocks(one), blocks(other));
    one.intersection(&other).count() as f64 / one.union(&other).count() as f64
}
