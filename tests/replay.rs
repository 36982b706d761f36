//! `bootcache replay` against a foreign server and its own.

#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails with the reason")]

mod support;

use std::path::Path;
use std::time::Duration;

use bootcache::boot_cache::kept;
use bootcache::boot_cache::recording::{Read, Recording};
use bootcache::store;
use support::process::Process;
use support::store::{Store, uri};

/// 200 reads of 20 KiB all over the disk, some overlapping in time.
fn boot() -> Recording {
    let read = |index: u64| Read {
        offset: index * 7919 % 400 * 8192,
        length: 20 << 10,
        time_ns: index * 500_000,
        took_ns: index % 3 * 600_000,
    };
    Recording::new((0..200).map(read).collect(), 120_000_000)
}

/// A store with the image `noise` and a recording of it.
fn recorded(disk: &Path) -> Store {
    let store = Store::new();
    store.run(["image".as_ref(), "add".as_ref(), "noise".as_ref(), disk.as_os_str()]);
    let entry = store::Store::open(&store.path()).unwrap().resolve(&"noise".parse().unwrap()).unwrap();
    kept::keep(&entry.dir, entry.root, &boot()).unwrap();
    store
}

#[test]
fn every_server_gets_the_same_reads_and_a_wrong_byte_is_noticed() {
    if !support::require(&["nbdkit"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk.raw");
    let mut bytes = support::noise(5, 4 << 20);
    std::fs::write(&disk, &bytes).unwrap();
    let store = recorded(&disk);
    bytes[7919 % 400 * 8192 + 77] ^= 1; // in the second read
    let damaged = folder.path().join("damaged.raw");
    std::fs::write(&damaged, &bytes).unwrap();

    let replay = |uri: &str| -> (i32, serde_json::Value) {
        let output = store.command(["--json", "replay", "noise", uri]).output().unwrap();
        let report = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)));
        (output.status.code().unwrap(), report)
    };
    let _serve = store.serve([""; 0]);
    let (code, report) = replay(&store.uri("noise"));
    assert_eq!((code, &report["reads"], &report["wrong_bytes"]), (0, &200.into(), &0.into()));
    assert_eq!(report["bytes"], 200 * (20 << 10));
    assert!(report["took_ms"].as_f64() > report["waiting_ms"].as_f64(), "it thinks too: {report}");

    for (file, code) in [(&disk, 0), (&damaged, 3)] {
        let socket = folder.path().join("nbdkit.sock");
        let mut server = std::process::Command::new("nbdkit");
        let server = Process::start(server.args(["-f", "-r", "-U"]).arg(&socket).arg("file").arg(file));
        let began = std::time::Instant::now();
        while !socket.exists() && began.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(10));
        }
        let (got, report) = replay(&uri(&socket, ""));
        assert_eq!(got, code, "{report}");
        drop(server);
        std::fs::remove_file(&socket).unwrap();
    }
}

#[test]
fn says_what_to_do_when_there_is_nothing_to_play() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk.raw");
    std::fs::write(&disk, support::noise(6, 1 << 20)).unwrap();
    let store = Store::new();
    store.run(["image".as_ref(), "add".as_ref(), "noise".as_ref(), disk.as_os_str()]);
    assert!(store.refused(["replay", "noise", "nbd://127.0.0.1:1/noise"]).contains("record it"));
    assert!(store.refused(["replay", "nbd://127.0.0.1:1/noise"]).contains("--recording"));
    assert!(store.refused(["replay", "noise", "http://x"]).contains("nbd+unix"));
}
