//! Many VMs of one image: its blocks come off the disk once, and memory does not grow with their number.
//!
//! The bound is what the guests asked for, each block once, and a tenth; what the kernel dropped from its page cache of
//! its own accord meanwhile, and read again, is its affair (a host that reclaims memory from an idle machine makes it).
//!
//! `BOOTCACHE_VMS` sets how many (20).

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use support::guest::{self, Tiny, nbd_drive};
use support::process::Process;
use support::store::Store;

/// Two shared cores boot twenty guests in two minutes.
const ALL_BOOTED: Duration = Duration::from_secs(1200);

/// Twenty guests at a time are enough for a machine.
static ALONE: Mutex<()> = Mutex::new(());

fn vms() -> usize {
    std::env::var("BOOTCACHE_VMS").map_or(20, |text| text.parse().expect("BOOTCACHE_VMS is a number"))
}

/// Bytes of the distinct 4 KiB blocks that one boot reads, as nbdkit's log of it has them: not our own measure.
fn unique_bytes(raw: &Path, folder: &Path) -> u64 {
    let (log, socket) = (folder.join("reads.log"), folder.join("log.sock"));
    let mut server = Command::new("nbdkit");
    server.args(["-f", "-r", "-U"]).arg(&socket).args(["--filter=log", "file"]).arg(raw);
    server.arg(format!("logfile={}", log.display()));
    let server = Process::start(&mut server);
    while !socket.exists() {
        std::thread::sleep(Duration::from_millis(20));
    }
    let guest = Tiny::new(&format!("{},snapshot=on", nbd_drive(&socket, ""))).start();
    guest::wait_for_boot(&guest);
    drop((guest, server));
    let mut blocks = BTreeSet::new();
    for line in std::fs::read_to_string(&log).unwrap().lines().filter(|line| line.contains(" Read id=")) {
        let field = |name: &str| {
            let text = line.split_whitespace().find_map(|word| word.strip_prefix(name)).unwrap();
            u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap()
        };
        let (offset, length) = (field("offset="), field("count="));
        blocks.extend(offset / 4096..(offset + length).div_ceil(4096));
    }
    blocks.len() as u64 * 4096
}

/// Puts every byte of the store's files out of the page cache.
fn forget(store: &Store) {
    let find = format!(
        "sync; find {} -type f -exec dd if={{}} iflag=nocache count=0 status=none \\;",
        store.path().display()
    );
    support::run(Command::new("bash").args(["-c", &find]));
}

/// At most what the guests asked for, once, and a tenth for tables and the like.
fn read_once(read: u64, again: u64, unique: u64) {
    let (first, most) = (read.saturating_sub(again) as f64, unique as f64 * 1.1);
    assert!(first <= most, "{read} bytes were read of {unique} distinct ones, {again} of them after reclaim");
}

/// Bytes of files that the kernel has read again after it had reclaimed their pages, on this host and so far. Pages that a
/// program gave up (`POSIX_FADV_DONTNEED`) are not among them.
fn refaulted() -> u64 {
    let vmstat = std::fs::read_to_string("/proc/vmstat").unwrap();
    let pages = vmstat.lines().find_map(|line| line.strip_prefix("workingset_refault_file "));
    pages.expect("a kernel since 5.9").parse::<u64>().unwrap() * 4096
}

/// Boots a VM on each of these overlays at once and waits for all. By the server's count each has read 8 MB at least.
fn boot_all(store: &Store, overlays: &[String]) {
    let socket = &store.path().join("nbd.sock");
    let guests: Vec<Process> =
        overlays.iter().map(|name| Tiny::new(&nbd_drive(socket, name)).tell("name", name).start()).collect();
    for guest in &guests {
        guest.wait_for("BOOTED-OK", ALL_BOOTED);
        assert!(!guest.said().contains("PAYLOAD-DAMAGED"));
    }
    let all: serde_json::Value = serde_json::from_str(&store.run(["--json", "overlay", "list"])).unwrap();
    for overlay in
        all.as_array().unwrap().iter().filter(|one| overlays.iter().any(|name| one["name"] == **name))
    {
        assert!(overlay["read_bytes"].as_u64().unwrap() > 8_000_000, "{overlay}");
    }
}

#[test]
fn the_blocks_of_an_image_come_off_the_disk_once_for_all_its_vms() {
    if !support::require(&["qemu-system-x86_64", "nbdkit"]) || !support::require_root() {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let store = Store::new();
    let raw = guest::disk("tiny");
    let unique = unique_bytes(&raw, &store.beside(""));
    assert!(unique > 8_000_000, "a boot reads {unique} bytes of its disk");
    store.run(["image", "add", "tiny", raw.to_str().unwrap()]);
    forget(&store);

    let serve = store.serve([""; 0]);
    let overlays: Vec<String> = (0..vms()).map(|index| format!("vm-{index}")).collect();
    for name in &overlays {
        store.run(["overlay", "create", "tiny", name]);
    }
    let refaulted_before = refaulted();
    boot_all(&store, &overlays);
    let (read, again) = (serve.io("read_bytes"), refaulted() - refaulted_before);
    let anonymous = serve.memory("RssAnon");
    println!(
        "{} VMs: {read} bytes off the disk, {again} after reclaim, {unique} distinct, RssAnon {anonymous}",
        overlays.len()
    );
    read_once(read, again, unique);
    assert!(read as f64 >= unique as f64 * 0.9, "{read} of {unique} bytes: the page cache was not cold");
    assert!(anonymous <= 64 << 20, "RssAnon is {anonymous}");
}

#[test]
fn increments_of_one_base_share_what_was_read_of_it() {
    if !support::require(&["qemu-system-x86_64", "nbdkit", "qemu-io"]) || !support::require_root() {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let store = Store::new();
    let raw = guest::disk("tiny");
    let unique = unique_bytes(&raw, &store.beside(""));
    store.run(["image", "add", "tiny", raw.to_str().unwrap()]);
    {
        let _serve = store.serve([""; 0]);
        for increment in 0..5 {
            let overlay = format!("made-{increment}");
            store.run(["overlay", "create", "tiny", &overlay]);
            // 256 KiB of its own in the empty partition.
            let write = format!("write -P {} {}M 256k", increment + 1, 100 + increment);
            support::run(Command::new("qemu-io").args([
                "-f",
                "raw",
                "-c",
                &write,
                "-c",
                "flush",
                &store.uri(&overlay),
            ]));
            store.run(["overlay", "commit", &overlay, &format!("increment-{increment}")]);
        }
    }
    forget(&store);
    let serve = store.serve([""; 0]);
    let overlays: Vec<String> = (0..vms()).map(|index| format!("vm-{index}")).collect();
    for (index, name) in overlays.iter().enumerate() {
        store.run(["overlay", "create", &format!("increment-{}", index % 5), name]);
    }
    let refaulted_before = refaulted();
    boot_all(&store, &overlays);
    let (read, again) = (serve.io("read_bytes"), refaulted() - refaulted_before);
    println!(
        "{} VMs over 5 increments: {read} bytes off the disk, {again} after reclaim, {unique} distinct",
        overlays.len()
    );
    read_once(read, again, unique);
    assert!(read as f64 >= unique as f64 * 0.9, "{read} of {unique} bytes: the page cache was not cold");
}
