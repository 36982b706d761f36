//! Libvirt domains whose disks are `/dev/nbdX`: one of `boot --disk kernel`, one of a plan. By hand
//! (`make test-kernel-disk`), since it is a guest in a guest, without KVM: a tiny one that has the module runs a Debian's
//! libvirtd and QEMU, and they a tiny one.

mod support;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use support::guest::{Tiny, disk, payload};

/// Emulation in emulation, on shared cores.
const DEADLINE: Duration = Duration::from_secs(1800);

#[test]
#[ignore = "minutes of nested emulation: make test-kernel-disk"]
fn libvirt_domains_boot_from_kernel_devices_and_outlive_restarts_of_the_server_and_the_agent() {
    if !support::require_root() || !support::require(&["qemu-system-x86_64", "mke2fs", "mmdebstrap"]) {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let overlay = |name: &str| {
        let path = folder.path().join(name).with_extension("qcow2");
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).arg(disk(name)).arg(&path);
        support::run(&mut create);
        format!("file={},format=qcow2,cache=unsafe", path.display())
    };
    let tools = folder.path().join("payload.raw");
    payload(&tools, &[Path::new(env!("CARGO_BIN_EXE_bootcache"))], include_str!("kernel_disk/run.sh"));
    // As a file in a disk: the guest looks for its own system on every partition.
    let golden = folder.path().join("golden.qcow2");
    let mut convert = Command::new("qemu-img");
    support::run(convert.args(["convert", "-f", "raw", "-O", "qcow2", "-c"]).arg(disk("tiny")).arg(&golden));
    let drives = [
        format!("if=virtio,format=raw,readonly=on,file={}", tools.display()),
        format!("if=virtio,{}", overlay("libvirt")),
        format!("if=virtio,format=raw,readonly=on,file={}", golden.display()),
    ];
    let guest = Tiny::new(&overlay("tiny"))
        .accelerator("tcg,thread=multi,tb-size=512")
        .arguments(["-m", "2048", "-smp", "2", "-cpu", "max"])
        .arguments(drives.iter().flat_map(|drive| ["-drive", drive]))
        .start();
    guest.wait_for("RUN-DONE", DEADLINE);
    let said = guest.said();
    println!("{said}");
    assert!(said.contains("KERNEL-DISK-OK") && said.contains("RUN-DONE rc=0"), "{said}");
}
