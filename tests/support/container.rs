//! A small image for containers: busybox, and a program that reports as the tiny guest does.

use std::io::Write;
use std::path::Path;
use std::process::Command;

/// Says the instance's name to the address in its environment until somebody hears it, and then stays.
const REPORT: &str = r#"#!/bin/sh
address=${BOOTCACHE_REPORT:-}
while [ -n "$address" ] && ! echo "$BOOTCACHE_INSTANCE" | nc -w 2 "${address%:*}" "${address##*:}"; do sleep 0.2; done
while :; do sleep 3600; done
"#;

/// Writes a root file system as a tar archive: busybox, `/bin/report`, and so many bytes that do not compress.
#[track_caller]
pub fn root_fs(archive: &Path, payload: usize) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let bin = folder.path().join("bin");
    std::fs::create_dir(&bin).expect("a folder");
    std::fs::copy(super::find("busybox").expect("busybox-static is installed"), bin.join("busybox"))
        .expect("a copy");
    for applet in ["sh", "sleep", "nc", "ping", "ip", "cat", "id", "echo", "head", "hostname"] {
        std::os::unix::fs::symlink("busybox", bin.join(applet)).expect("a link");
    }
    let report = bin.join("report");
    let mut file = std::fs::File::create(&report).expect("a file");
    file.write_all(REPORT.as_bytes()).expect("room for it");
    std::fs::set_permissions(&report, std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .expect("its owner");
    std::fs::write(folder.path().join("payload"), super::noise(7, payload)).expect("room for it");
    for empty in ["dev", "etc", "proc", "sys", "tmp"] {
        std::fs::create_dir(folder.path().join(empty)).expect("a folder");
    }
    let mut tar = Command::new("tar");
    tar.arg("-C")
        .arg(folder.path())
        .args(["--sort=name", "--owner=0", "--group=0", "-cf"])
        .arg(archive)
        .arg(".");
    super::run(&mut tar);
}

/// The command of a container that reports.
pub fn reporting() -> Vec<String> {
    vec!["/bin/report".to_owned()]
}
