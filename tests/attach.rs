//! `/dev/nbdX` for real: in a tiny guest that has the kernel's module, with the server in the guest too.

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use support::guest::{Tiny, disk, payload};

/// TCG on shared cores.
const DEADLINE: Duration = Duration::from_secs(400);

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
