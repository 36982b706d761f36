//! `/dev/nbdX` for real: in a tiny guest that has the kernel's module, with the server in the guest too.

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use support::guest::{Tiny, disk, payload};
use support::process::Process;

/// TCG on shared cores.
const DEADLINE: Duration = Duration::from_secs(400);
/// What takes moments.
const SOON: Duration = Duration::from_secs(60);

fn serve_overlay() -> PathBuf {
    let profile = Path::new(env!("CARGO_BIN_EXE_bootcache")).parent().expect("in a folder");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = Command::new(cargo);
    for (name, _) in std::env::vars_os() {
        if name
            .to_str()
            .is_some_and(|name| name.starts_with("CARGO_PKG") || name.starts_with("CARGO_MANIFEST"))
        {
            build.env_remove(name);
        }
    }
    build.args(["build", "--quiet", "--locked", "--example", "serve_overlay"]);
    support::run(
        build.args(profile.ends_with("release").then_some("--release")).current_dir(support::checkout(".")),
    );
    profile.join("examples/serve_overlay")
}

#[test]
fn exports_become_block_devices_that_outlive_their_server() {
    if !support::require_root()
        || !support::require(&["qemu-system-x86_64", "mke2fs", "extlinux", "nbd-client"])
    {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let (system, tools) = (folder.path().join("tiny.qcow2"), folder.path().join("payload.raw"));
    let mut overlay = Command::new("qemu-img");
    overlay.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).arg(disk("tiny")).arg(&system);
    support::run(&mut overlay);
    let programs = [Path::new(env!("CARGO_BIN_EXE_bootcache")), &serve_overlay()];
    payload(&tools, &programs, include_str!("attach/run.sh"));
    let guest = Tiny::new(&format!("file={},format=qcow2,cache=unsafe", system.display()))
        .arguments(["-m", "768", "-smp", "2", "-drive"])
        .arguments([format!("if=virtio,format=raw,readonly=on,file={}", tools.display())])
        .start();
    guest.wait_for("RUN-DONE", DEADLINE);
    let said = guest.said();
    println!("{said}");
    assert!(said.contains("ATTACH-OK") && said.contains("RUN-DONE rc=0"), "{said}");
}

/// A store with the image `disk`.
fn store_with_an_image() -> support::store::Store {
    let store = support::store::Store::new();
    let raw = store.beside("disk.raw");
    std::fs::write(&raw, support::noise(1, 1 << 20)).expect("a file");
    store.run(["image", "add", "disk", raw.to_str().expect("UTF-8")]);
    store
}

/// Where there is no module the message says so and how to go on without, and nothing of the VM is left. The domain and
/// command line with a device are tested where they are written; QEMU itself does not fit into the guest above.
#[test]
fn a_boot_from_a_kernel_device_needs_the_module_and_leaves_nothing_without_it() {
    if !support::require(&["qemu-system-x86_64"]) {
        return;
    }
    let store = store_with_an_image();
    let _serve = store.serve([""; 0]);
    let boot = ["boot", "disk", "--name", "vm", "--disk", "kernel", "--qemu", "--no-wait", "--accel", "tcg"];
    let with_module = Path::new("/sys/block/nbd0").exists();
    if with_module && rustix::process::geteuid().is_root() {
        store.run(boot);
        assert!(store.run(["attached"]).contains("vm"));
        store.run(["stop", "vm", "--force", "--remove"]);
        assert!(!store.run(["attached"]).contains("vm"));
    } else {
        let refused = store.refused(boot);
        assert!(refused.contains("NBD client") || refused.contains("root"), "{refused}");
    }
    let overlays = store.run(["overlay", "list", "--json"]);
    assert_eq!(overlays.trim(), "[]", "the VM's overlay is left");
    assert!(!store.path().join("vms/vm").exists());
}

/// The same for a VM of a plan: its agent says so, and nothing is left before the plan ends. libvirt pretends; where there
/// is a module after all, it refuses the domain, and the device goes again.
#[test]
fn a_plan_that_wants_kernel_devices_fails_clearly_where_there_are_none_and_leaves_nothing() {
    if !support::require(&["qemu-system-x86_64"]) {
        return;
    }
    let store = store_with_an_image();
    let _serve = store.serve([""; 0]);
    let daemon = |words: &[&str]| {
        let process = Process::start(store.command(words).env_remove("BOOTCACHE_CONTROLLER"));
        process.wait_for("ready", SOON);
        process
    };
    let node = format!("attach-{}", std::process::id());
    let _controller = daemon(&["controller", "--poll", "0.2", "--offline-after", "5"]);
    let _agent = daemon(&["agent", "--name", &node, "--connect", "test:///default", "--no-containers"]);
    let plan = store.beside("plan.toml");
    let text = "name = 'lab'\n[[groups]]\nname = 'g'\ntype = 'vm'\nimage = 'disk'\nmemory = 16\ndisk_by = 'kernel'\n";
    std::fs::write(&plan, text).expect("a file");

    let eventually = |words: [&str; 2], part: &str| {
        let deadline = Instant::now() + SOON;
        loop {
            let said = store.run(words);
            if said.contains(part) {
                return said;
            }
            assert!(Instant::now() < deadline, "no {part}: {said}");
            std::thread::sleep(Duration::from_millis(100));
        }
    };
    eventually(["--json", "images"], "disk");
    store.run(["deploy", plan.to_str().expect("UTF-8")]);
    let failed = eventually(["--json", "instances"], "failed");
    let reasons = ["no NBD client", "only root may", "libvirt: "];
    assert!(reasons.iter().any(|reason| failed.contains(reason)), "{failed}");
    assert_eq!(store.run(["overlay", "list", "--json"]).trim(), "[]", "the VM's overlay is left");
    for folder in ["vms", "attached"] {
        let left = std::fs::read_dir(store.path().join(folder)).into_iter().flatten().flatten();
        let left: Vec<_> = left.map(|entry| entry.path()).collect();
        assert!(left.is_empty(), "{left:?}");
    }
    store.run(["end", "1"]);
}
