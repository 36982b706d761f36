//! `bootcache record` with real guests: what two ways see is the same, nothing is missed, and what cannot be recorded
//! whole is not recorded.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use bootcache::boot_cache::kept;
use bootcache::boot_cache::merge::first_touches;
use bootcache::boot_cache::recording::Recording;
use rustix::process::Signal;
use serde_json::Value;
use support::process::Process;
use support::store::Store;

const BOOT: [&str; 6] = ["--until", "serial:BOOTED-OK", "--memory", "128", "--time-limit", "240"];
const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

/// A store with the tiny guest as `tiny`; none when QEMU is missing.
fn store() -> Option<Store> {
    if !support::require(&["qemu-system-x86_64", "qemu-img"]) || !support::require_root() {
        return None;
    }
    let store = Store::new();
    let disk = support::guest::disk("tiny");
    store.run(["image", "add", "tiny", disk.to_str().unwrap()]);
    Some(store)
}

fn record(store: &Store, arguments: &[&str]) -> Value {
    let line = ["--json", "record", "tiny"].iter().chain(&BOOT).chain(arguments);
    serde_json::from_str(&store.run(line)).unwrap()
}

fn image(store: &Store) -> (PathBuf, Value) {
    let shown: Value = serde_json::from_str(&store.run(["--json", "image", "show", "tiny"])).unwrap();
    let root = shown.pointer("/root").unwrap().clone();
    (store.path().join("images").join(root.as_str().unwrap()), shown)
}

fn recording(store: &Store, number: u64) -> Recording {
    kept::read(&image(store).0.join("recordings").join(number.to_string())).unwrap().1
}

fn blocks(recording: &Recording) -> BTreeSet<u64> {
    first_touches(std::slice::from_ref(recording), u64::MAX).iter().map(|touch| touch.block).collect()
}

fn jaccard(one: &BTreeSet<u64>, other: &BTreeSet<u64>) -> f64 {
    let count = |count: usize| f64::from(u32::try_from(count).unwrap());
    count(one.intersection(other).count()) / count(one.union(other).count())
}

fn nothing_left(store: &Store) {
    let left: Vec<_> =
        std::fs::read_dir(store.path().join("tmp")).unwrap().map(|entry| entry.unwrap()).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn tracer_and_export_see_the_same_and_so_do_two_boots() {
    let Some(store) = store() else { return };
    let first = record(&store, &[]);
    assert_eq!((&first["via"], &first["switched"]), (&"preload".into(), &Value::Null));
    assert!(first["summary"]["unique"].as_u64().unwrap() > 8 << 20, "{first}");
    // As libvirt runs QEMU: no fork, no exec, no new privileges.
    record(&store, &["--qemu-arg=-sandbox", &format!("--qemu-arg={SANDBOX}")]);
    let third = record(&store, &["--via", "nbd"]);
    assert_eq!(third["recordings"], serde_json::json!([3]));
    let [traced, sandboxed, exported] = [1, 2, 3].map(|number| blocks(&recording(&store, number)));
    let (boots, ways) = (jaccard(&traced, &sandboxed), jaccard(&traced, &exported));
    eprintln!("two boots: {boots:.4}; tracer and export: {ways:.4}");
    assert!(boots >= 0.99 && ways >= 0.98, "two boots: {boots}; two ways: {ways}");
    // The image is what it was, and so is every block of its boot cache.
    store.run(["image", "verify", "tiny"]);
    nothing_left(&store);
}

#[test]
fn several_runs_make_one_boot_cache_that_names_its_condition() {
    let Some(store) = store() else { return };
    let recorded = record(&store, &["--runs", "2"]);
    assert_eq!(
        (&recorded["summary"]["boots"], &recorded["recordings"]),
        (&2.into(), &serde_json::json!([1, 2]))
    );
    assert_eq!(recorded["boot"]["until"], "serial:BOOTED-OK");
    let union = &blocks(&recording(&store, 1)) | &blocks(&recording(&store, 2));
    let (dir, shown) = image(&store);
    let root = shown.pointer("/root").unwrap();
    let root = root.as_str().unwrap().parse().unwrap();
    let boot = bootcache::boot_cache::BootCache::open(&dir.join("boot"), root).unwrap();
    let stored: Vec<u64> = boot.heads().extents().into_iter().flat_map(|extent| extent.blocks()).collect();
    assert_eq!(stored.len(), union.len(), "each block once");
    assert_eq!(stored.into_iter().collect::<BTreeSet<_>>(), union);
}

/// The lines of strace's log, each call on one: what another thread's call broke in two is put together.
fn whole_lines(log: &str) -> Vec<String> {
    let mut begun: std::collections::HashMap<&str, &str> = std::collections::HashMap::new();
    let mut whole = Vec::new();
    for line in log.lines() {
        let (thread, rest) = line.split_once(' ').unwrap_or((line, ""));
        if let Some(start) = rest.strip_suffix("<unfinished ...>") {
            begun.insert(thread, start);
        } else if let Some((_, end)) =
            rest.split_once(" resumed>").filter(|_| rest.trim_start().starts_with("<..."))
        {
            whole.extend(begun.remove(thread).map(|start| format!("{thread} {start}{end}")));
        } else {
            whole.push(line.to_owned());
        }
    }
    whole
}

#[test]
fn strace_sees_no_read_of_the_image_that_the_tracer_missed() {
    if !support::require(&["strace"]) {
        return;
    }
    let Some(store) = store() else { return };
    let log = store.beside("strace.log");
    let calls = "trace=read,readv,pread64,preadv,preadv2,sendfile,splice,copy_file_range,io_submit";
    let mut line = vec!["record", "tiny", "--until", "serial:BOOTED-OK", "--time-limit", "400", "--"];
    line.extend(["strace", "-f", "-y", "-e", calls, "-o", log.to_str().unwrap(), "qemu-system-x86_64"]);
    line.extend([
        "-accel",
        "tcg,tb-size=32",
        "-m",
        "128",
        "-display",
        "none",
        "-monitor",
        "none",
        "-no-reboot",
        // What it would read after the boot might be seen by strace alone.
        "-fw_cfg",
        "name=opt/bootcache/run,string=sleep 600",
    ]);
    line.extend(["-nic", "none", "-serial", "stdio", "-drive", "if=virtio,format=qcow2,file={image}"]);
    store.run(line);
    let (dir, _) = image(&store);
    let disk = format!("<{}>", dir.join("disk").display());
    let strace = std::fs::read_to_string(&log).unwrap();
    let mut seen = BTreeSet::new();
    let mut lines = 0;
    for line in whole_lines(&strace).iter().filter(|line| line.contains(&disk)) {
        // 123 pread64(9</…/disk>, "…"..., 4096, 8192) = 4096
        let Some((call, result)) = line.rsplit_once(" = ") else { continue };
        let Ok(length) = result.split_whitespace().next().unwrap().parse::<u64>() else { continue };
        assert!(call.contains("pread64(") || call.contains("preadv("), "not understood: {line}");
        let offset =
            call.trim_end().trim_end_matches(')').rsplit_once(", ").unwrap().1.parse::<u64>().unwrap();
        lines += 1;
        seen.extend(bootcache::block::Extent::touching(offset, length).blocks());
    }
    let traced = blocks(&recording(&store, 1));
    eprintln!("strace: {lines} reads, {} blocks; tracer: {} blocks", seen.len(), traced.len());
    assert!(seen.len() * 100 >= traced.len() * 99, "strace has seen the boot");
    // What was read after the condition was met is not part of the boot.
    let missed: Vec<_> = seen.difference(&traced).collect();
    assert!(missed.is_empty(), "{missed:?}");
}

#[test]
fn what_the_tracer_cannot_see_is_recorded_at_the_export_or_not_at_all() {
    let Some(store) = store() else { return };
    let mut refused = vec!["record", "tiny", "--aio", "io_uring", "--via", "preload"];
    refused.extend(BOOT);
    let said = store.refused(refused);
    assert!(said.contains("io_uring") && said.contains("--via nbd"), "{said}");
    let program = store.beside("static");
    if support::require(&["cc"]) {
        let source = store.beside("static.c");
        let text = "#include <fcntl.h>\n#include <unistd.h>\n\
                    int main(int n, char **a) { char c; return read(open(a[1], O_RDONLY), &c, 1) != 1; }\n";
        std::fs::write(&source, text).unwrap();
        support::run(Command::new("cc").args(["-static", "-o"]).arg(&program).arg(&source));
        let said = store.refused(["record", "tiny", "--", program.to_str().unwrap(), "{disk}"]);
        assert!(said.contains("tracer was not loaded") && said.contains("--via nbd"), "{said}");
    }
    let boot = image(&store).1.pointer("/boot").cloned();
    assert_eq!(boot, Some(Value::Null), "no boot cache");
    let switched = record(&store, &["--aio", "io_uring"]);
    assert_eq!(switched["via"], "nbd");
    assert!(switched["switched"].as_str().unwrap().contains("io_uring"), "{switched}");
    nothing_left(&store);
}

#[test]
fn any_command_can_be_recorded_by_either_way() {
    if !support::require(&["qemu-img", "dd", "nbdcopy"]) {
        return;
    }
    let store = Store::new();
    let raw = store.beside("raw");
    std::fs::write(&raw, support::noise(3, 1 << 20)).unwrap();
    store.run(["image", "add", "tiny", raw.to_str().unwrap()]);
    store.run(["record", "tiny", "--", "dd", "if={disk}", "of=/dev/null", "bs=64K", "skip=3", "count=2"]);
    let dd = recording(&store, 1);
    let ranges: Vec<_> = dd.reads.iter().map(|read| (read.offset, read.length)).collect();
    assert_eq!(ranges, [(3 << 16, 1 << 16), (4 << 16, 1 << 16)]);
    store.run(["record", "tiny", "--via", "nbd", "--", "nbdcopy", "{disk}", "null:"]);
    assert_eq!(blocks(&recording(&store, 2)).len(), 256);
    let copy = store.beside("copy.raw");
    let copy = copy.to_str().unwrap();
    store.run(["record", "tiny", "--", "qemu-img", "convert", "-O", "raw", "{image}", copy]);
    assert_eq!(blocks(&recording(&store, 3)).len(), 256);
    for (line, word) in [
        (vec!["--", "true"], "neither {image} nor {disk}"),
        (vec!["--", "false", "{disk}"], "exit status: 1"),
        (vec!["--", "true", "{disk}"], "no read of the image"),
        (vec!["--", "no-such-program", "{disk}"], "cannot be started"),
        (
            vec!["--until", "idle:1", "--time-limit", "2", "--", "sh", "-c", "sleep 60", "{disk}"],
            "no read of the image",
        ),
        (
            vec!["--until", "serial:never", "--time-limit", "2", "--", "cat", "/dev/zero", "{disk}"],
            "within 2 s",
        ),
        (
            vec!["--", "sh", "-c", "echo 'KVM internal error. Suberror: 1' >&2; sleep 600", "x", "{disk}"],
            "run it without (--accel tcg)",
        ),
        (vec!["--", "touch", "{disk}"], "wrote to the image"),
        (vec!["--", "sh", "-c", "touch $1; exit 1", "x", "{disk}"], "wrote to the image"),
        (vec!["--", "sh", "-c", "dd if=$1 of=/dev/null; touch $1", "x", "{disk}"], "wrote to the image"),
    ] {
        let said = store.refused(["record", "tiny"].into_iter().chain(line));
        assert!(said.contains(word) && said.trim().lines().count() == 1, "{said}");
    }
    nothing_left(&store);
}

#[test]
fn a_disk_that_does_not_boot_is_not_taken_for_one_that_is_idle_without_a_word() {
    if !support::require(&["qemu-system-x86_64", "qemu-img"]) || !support::require_root() {
        return;
    }
    let store = Store::new();
    let raw = store.beside("raw");
    std::fs::write(&raw, support::noise(5, 4 << 20)).unwrap();
    store.run(["image", "add", "--format", "raw", "noise", raw.to_str().unwrap()]);
    let mut recorder = Process::start(&mut store.command(["record", "noise", "--until", "idle:2"]));
    assert!(recorder.wait(Duration::from_secs(60)).success(), "{}", recorder.said());
    let said = recorder.said();
    assert!(said.contains("recorded 1 boot") && said.contains("did it boot at all?"), "{said}");
}

#[test]
fn ctrl_c_leaves_nothing_behind() {
    let Some(store) = store() else { return };
    let pid = store.beside("pid");
    let pidfile = format!("--qemu-arg={}", pid.display());
    let mut command: Command =
        store.command(["record", "tiny", "--until", "serial:never", "--qemu-arg=-pidfile", &pidfile]);
    let mut recorder = Process::start(&mut command);
    let guest = process_id(&pid);
    recorder.signal(Signal::INT);
    assert_eq!(recorder.wait(Duration::from_secs(30)).code(), Some(130), "{}", recorder.said());
    assert!(!PathBuf::from(format!("/proc/{guest}/exe")).exists(), "the guest has ended");
    nothing_left(&store);
}

#[test]
fn a_recorder_that_is_killed_takes_its_guest_along() {
    let Some(store) = store() else { return };
    let pid = store.beside("pid");
    let pidfile = format!("--qemu-arg={}", pid.display());
    let mut command: Command =
        store.command(["record", "tiny", "--until", "serial:never", "--qemu-arg=-pidfile", &pidfile]);
    let mut recorder = Process::start(&mut command);
    let guest = process_id(&pid);
    recorder.kill();
    let exe = PathBuf::from(format!("/proc/{guest}/exe"));
    let gone = (0..100).any(|_| {
        std::thread::sleep(Duration::from_millis(100));
        std::fs::read_link(&exe).is_err()
    });
    assert!(gone, "the guest has ended");
    store.run(["image", "list"]);
    nothing_left(&store);
}

/// The guest's process id, once QEMU has written it.
fn process_id(path: &std::path::Path) -> u32 {
    (0..1200)
        .find_map(|_| {
            std::thread::sleep(Duration::from_millis(50));
            std::fs::read_to_string(path).ok()?.trim().parse().ok()
        })
        .expect("QEMU starts")
}
