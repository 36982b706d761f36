//! The overlay and the examples as processes: what they export, and in what order writes and removals become durable.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use support::example;
use support::process::Process;
use support::store::{Store, bootcache};

const START: Duration = Duration::from_secs(20);

fn uri(socket: &Path) -> String {
    format!("nbd+unix:///?socket={}", socket.display())
}

fn image(folder: &Path) -> (PathBuf, Vec<u8>) {
    let path = folder.join("image.raw");
    let mut bytes = support::noise(1, 8 << 20);
    bytes[1 << 20..3 << 20].fill(0);
    fs::write(&path, &bytes).expect("an image");
    (path, bytes)
}

#[track_caller]
fn ends_on_interrupt(mut server: Process) -> String {
    server.signal(Signal::INT);
    assert!(server.wait(START).success(), "{}", server.said());
    server.said()
}

#[test]
fn the_file_and_layer_examples_export_the_image() {
    if !support::require(&["nbdcopy", "nbdinfo"]) {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let (image, bytes) = image(folder.path());
    for name in ["serve_file", "custom_layer"] {
        let (socket, copy) = (folder.path().join(format!("{name}.sock")), folder.path().join(name));
        let server = Process::start(Command::new(example(name)).arg(&image).arg(&socket));
        server.wait_for("ready", START);
        support::run(Command::new("nbdcopy").arg(uri(&socket)).arg(&copy));
        assert!(fs::read(&copy).expect("a copy") == bytes, "{name}");
        let info = support::run(Command::new("nbdinfo").arg(uri(&socket)));
        assert!(info.contains("is_read_only: true"), "{info}");
        let said = ends_on_interrupt(server);
        let count =
            said.split("ready\n").nth(1).and_then(|rest| rest.split(' ').next()?.parse::<usize>().ok());
        assert!(name == "serve_file" || count.is_some_and(|count| count >= 6 << 20), "{said}");
    }
}

#[test]
fn the_overlay_example_keeps_writes_and_leaves_the_image_alone() {
    if !support::require(&["qemu-io", "qemu-img", "nbdcopy"]) {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let (image, mut bytes) = image(folder.path());
    let before = bytes.clone();
    let (overlay, socket) = (folder.path().join("overlay"), folder.path().join("s"));
    let start = || {
        let server =
            Process::start(Command::new(example("serve_overlay")).arg(&image).arg(&overlay).arg(&socket));
        server.wait_for("ready", START);
        server
    };
    let mut server = start();
    let commands = ["write -P 7 5000 70000", "write -z 4M 64k", "discard 6M 1M", "flush"];
    let mut qemu_io = Command::new("qemu-io");
    qemu_io.args(["-f", "raw"]).args(commands.iter().flat_map(|command| ["-c", command])).arg(uri(&socket));
    support::run(&mut qemu_io);
    server.kill();
    bytes[5000..75_000].fill(7);
    bytes[4 << 20..(4 << 20) + (64 << 10)].fill(0);
    bytes[6 << 20..7 << 20].fill(0);

    let server = start();
    let copy = folder.path().join("copy");
    support::run(Command::new("nbdcopy").arg(uri(&socket)).arg(&copy));
    assert!(fs::read(&copy).expect("a copy") == bytes, "what was flushed survives kill -9");
    assert!(ends_on_interrupt(server).contains("34 blocks written, 256 zeroed"));
    assert!(fs::read(&image).expect("the image") == before);
}

/// A tmpfs that is unmounted again.
struct SmallDisk<'a>(&'a Path);

impl SmallDisk<'_> {
    fn set_size(&self, options: &str) {
        support::run(Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(self.0));
    }
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        let _best_effort = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

#[test]
fn a_full_disk_fails_the_write_alone_and_all_is_well_when_space_returns() {
    if !support::require(&["qemu-io", "nbdcopy"]) || !support::require_root() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let (image, mut bytes) = image(folder.path());
    let (mount, socket) = (folder.path().join("mount"), folder.path().join("s"));
    fs::create_dir(&mount).expect("a folder");
    let disk = SmallDisk(&mount);
    disk.set_size("size=2M");
    let server = Process::start(
        Command::new(example("serve_overlay")).arg(&image).arg(mount.join("overlay")).arg(&socket),
    );
    server.wait_for("ready", START);
    let qemu_io = |commands: &[&str]| {
        let mut qemu_io = Command::new("qemu-io");
        qemu_io
            .args(["-f", "raw"])
            .args(commands.iter().flat_map(|command| ["-c", command]))
            .arg(uri(&socket));
        let output = qemu_io.output().expect("qemu-io runs");
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    };
    assert!(qemu_io(&["write -P 1 0 64k", "flush"]).contains("wrote 65536"));
    bytes[..65536].fill(1);
    let said = qemu_io(&["write -P 2 1M 4M"]);
    assert!(said.contains("No space left on device"), "{said}");
    let copy = folder.path().join("copy");
    support::run(Command::new("nbdcopy").arg(uri(&socket)).arg(&copy));
    let seen = fs::read(&copy).expect("a copy");
    let blocks = || seen.chunks(4096).zip(bytes.chunks(4096)).enumerate();
    for (block, (seen, before)) in blocks() {
        let written = (256..1280).contains(&block) && seen == [2; 4096];
        assert!(written || seen == before, "block {block} is neither the old nor the new");
    }
    disk.set_size("remount,size=16M");
    let said = qemu_io(&["write -P 3 1M 4M", "flush"]);
    assert!(said.contains("wrote 4194304") && !said.contains("fail"), "{said}");
    bytes[1 << 20..5 << 20].fill(3);
    support::run(Command::new("nbdcopy").arg(uri(&socket)).arg(&copy));
    assert!(fs::read(&copy).expect("a copy") == bytes);
    ends_on_interrupt(server);
}

/// What a process did that matters to durability.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    DiffWritten,
    DiffSynced,
    IndexWritten,
    IndexSynced,
    Answered,
}

/// Completed calls of a `strace -f -y`, in order of completion.
fn events(trace: &str) -> Vec<Event> {
    let mut unfinished = std::collections::HashMap::new();
    let mut events = Vec::new();
    for line in trace.lines() {
        let (pid, call) = line.trim_start().split_once(' ').expect("strace -f begins with the thread");
        let call = call.trim_start();
        if call.ends_with("<unfinished ...>") {
            unfinished.insert(pid, call);
            continue;
        }
        let call = if call.starts_with("<... ") {
            unfinished.remove(pid).unwrap_or_else(|| panic!("no beginning of {line}"))
        } else {
            call
        };
        let Some((name, rest)) = call.split_once('(') else { continue };
        let file = rest.split(['>', ',', ')']).next().unwrap_or_default();
        events.extend(match (name, file) {
            ("fdatasync", file) if file.ends_with("/diff") => Some(Event::DiffSynced),
            ("fdatasync", file) if file.ends_with("/index") => Some(Event::IndexSynced),
            (_, file) if name.starts_with("pwrite") && file.ends_with("/diff") => Some(Event::DiffWritten),
            (_, file) if name.starts_with("pwrite") && file.ends_with("/index") => Some(Event::IndexWritten),
            (_, file) if file.contains("socket:[") => Some(Event::Answered),
            _ => None,
        });
    }
    events
}

#[test]
fn a_flush_and_a_fua_write_are_answered_after_data_then_index_are_synced() {
    if !support::require(&["strace", "qemu-io"]) {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let (image, _) = image(folder.path());
    let (overlay, socket, trace) =
        (folder.path().join("overlay"), folder.path().join("s"), folder.path().join("trace"));
    let server = Process::start(
        Command::new("strace")
            .args([
                "-D",
                "-f",
                "-y",
                "-qq",
                "-e",
                "trace=pwrite64,pwritev,fdatasync,write,writev,sendto,sendmsg",
                "-o",
            ])
            .arg(&trace)
            .arg(example("serve_overlay"))
            .args([&image, &overlay, &socket]),
    );
    server.wait_for("ready", START);
    // -t none: no flush at the end of each command but those asked for.
    let run = |commands: &[&str]| {
        let before = events(&fs::read_to_string(&trace).expect("a trace")).len();
        let mut qemu_io = Command::new("qemu-io");
        qemu_io.args(["-t", "none", "-f", "raw"]).args(commands.iter().flat_map(|command| ["-c", command]));
        support::run(qemu_io.arg(uri(&socket)));
        // strace writes behind.
        let (mut all, deadline) = (Vec::new(), Instant::now() + START);
        loop {
            std::thread::sleep(Duration::from_millis(300));
            let now = events(&fs::read_to_string(&trace).expect("a trace"));
            if now.len() > before && now == all {
                return all.split_off(before);
            }
            assert!(Instant::now() < deadline, "{now:?} after {before}");
            all = now;
        }
    };
    use Event::{Answered, DiffSynced, DiffWritten, IndexSynced, IndexWritten};
    let after_write = |events: &[Event]| {
        let first = events.iter().position(|event| *event == DiffWritten).expect("it writes");
        events[first..].to_vec()
    };
    let first = after_write(&run(&["write -f -P 1 3M 4k"]));
    let expected = [DiffWritten, DiffSynced, IndexWritten, IndexSynced, IndexWritten, IndexSynced, Answered];
    assert_eq!(first[..7], expected, "the index as it was found comes first: {first:?}");
    let fua = after_write(&run(&["write -f -P 1 1M 4k"]));
    assert_eq!(fua[..5], [DiffWritten, DiffSynced, IndexWritten, IndexSynced, Answered], "{fua:?}");
    let again = after_write(&run(&["write -f -P 2 1M 4k"]));
    assert_eq!(again[..3], [DiffWritten, DiffSynced, Answered], "nothing new for the index: {again:?}");
    let flush = after_write(&run(&["write -P 3 2M 4k", "flush"]));
    let expected = [DiffWritten, Answered, DiffSynced, IndexWritten, IndexSynced, Answered];
    assert_eq!(flush[..6], expected, "{flush:?}");
    ends_on_interrupt(server);
}

#[test]
fn a_removal_is_answered_after_it_is_durable() {
    if !support::require(&["strace"]) {
        return;
    }
    let store = Store::new();
    let image = store.beside("image.raw");
    fs::write(&image, support::noise(1, 1 << 20)).expect("an image");
    store.run(["image", "add", "golden", image.to_str().expect("it is text")]);
    store.run(["overlay", "create", "golden", "vm"]);
    let trace = store.beside("trace");
    let calls = "trace=rename,renameat,renameat2,fsync,write";
    support::run(
        Command::new("strace")
            .args(["-f", "-y", "-qq", "-e", calls, "-o"])
            .arg(&trace)
            .args([bootcache(), "--json", "overlay", "remove", "vm"])
            .env("BOOTCACHE_STORE", store.path()),
    );
    let trace = fs::read_to_string(&trace).expect("a trace");
    let mut rest = trace.lines();
    for (call, file) in [("rename", "/overlays/vm\""), ("fsync(", "/overlays>"), ("write(1<", "vm")] {
        assert!(
            rest.any(|line| line.contains(call) && line.contains(file)),
            "no {call} in its place:\n{trace}"
        );
    }
}
