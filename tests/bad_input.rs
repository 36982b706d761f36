//! What people get wrong and what disks do: one clear line, an exit code, nothing lost and nothing half-made.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use support::process::Process;
use support::store::Store;

/// A small raw disk, 1 MiB of noise in 2 MiB.
fn small_disk(store: &Store, name: &str, seed: u64) -> PathBuf {
    let path = store.beside(name);
    let mut disk = support::noise(seed, 1 << 20);
    disk.resize(2 << 20, 0);
    std::fs::write(&path, disk).unwrap();
    path
}

fn qemu_img(arguments: &[&str]) {
    support::run(Command::new("qemu-img").args(arguments));
}

fn names(store: &Store) -> Vec<String> {
    let list: serde_json::Value = serde_json::from_str(&store.run(["image", "list", "--json"])).unwrap();
    let names = list.as_array().unwrap().iter().flat_map(|image| image["names"].as_array().unwrap().clone());
    names.map(|name| name.as_str().unwrap().to_owned()).collect()
}

fn nothing_half_made(store: &Store) {
    for folder in ["tmp", "images"] {
        let left: Vec<_> =
            std::fs::read_dir(store.path().join(folder)).into_iter().flatten().flatten().collect();
        assert!(left.is_empty(), "left in {folder}: {left:?}");
    }
}

/// One line of at most 300 characters that says what is wrong.
#[track_caller]
fn one_line(said: &str, about: &str) {
    let lines: Vec<&str> = said.lines().filter(|line| !line.trim().is_empty()).collect();
    assert_eq!(lines.len(), 1, "one line, not:\n{said}");
    assert!(said.len() <= 300, "too long: {said}");
    assert!(said.to_lowercase().contains(about), "it should name `{about}`: {said}");
}

#[test]
fn files_that_are_no_images_are_refused_and_leave_nothing() {
    if !support::require(&["qemu-img"]) {
        return;
    }
    let store = Store::new();
    let raw = small_disk(&store, "small.raw", 1);
    let path = |name: &str| store.beside(name).to_str().unwrap().to_owned();
    let add = |name: &str, arguments: &[&str]| {
        let mut all = vec!["image", "add", "image"];
        let file = path(name);
        all.push(&file);
        all.extend(arguments);
        store.refused(all)
    };
    for (format, file) in [("qcow2", "cut.qcow2"), ("vdi", "cut.vdi"), ("vmdk", "cut.vmdk")] {
        qemu_img(&["convert", "-f", "raw", "-O", format, raw.to_str().unwrap(), &path(file)]);
        let whole = std::fs::read(path(file)).unwrap();
        std::fs::write(path(file), &whole[..whole.len() / 3]).unwrap();
        one_line(&add(file, &[]), file);
    }
    one_line(&add("small.raw", &["--format", "qcow2"]), "small.raw");
    std::fs::write(path("old.vhd"), [b"conectix".as_slice(), &[0; 5000]].concat()).unwrap();
    one_line(&add("old.vhd", &[]), "convert it to qcow2 first");
    assert!(add("small.raw", &["--format", "floppy"]).contains("[possible values: raw, qcow2"));
    one_line(&add("is-not-there", &[]), "is-not-there");
    std::fs::create_dir(path("folder")).unwrap();
    one_line(&add("folder", &[]), "folder");
    std::fs::write(path("empty"), b"").unwrap();
    one_line(&add("empty", &[]), "empty");

    // Another file of the host, through a backing file.
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", "/etc/passwd", "-F", "raw", &path("spy.qcow2"), "1M"]);
    one_line(&add("spy.qcow2", &[]), "--allow-backing-files");
    nothing_half_made(&store);
    assert_eq!(names(&store), [""; 0]);
}

#[test]
fn names_that_could_be_paths_are_refused() {
    let store = Store::new();
    let file = small_disk(&store, "small.raw", 1);
    let too_long = "a".repeat(64);
    for name in ["..", "a/b", "/etc", ".hidden", "", "UPPER", "a b", "a\u{e9}", &too_long] {
        let said = store.refused(["image".as_ref(), "add".as_ref(), name.as_ref(), file.as_os_str()]);
        one_line(&said, "name");
        one_line(&store.refused(["image", "show", name]), "name");
        one_line(&store.refused(["image", "remove", name]), "name");
    }
    for entry in std::fs::read_dir(store.beside("")).unwrap() {
        let name = entry.unwrap().file_name();
        assert!(name == "small.raw" || name == "store", "{name:?} was made");
    }
}

#[test]
fn a_name_that_is_taken_keeps_its_image() {
    let store = Store::new();
    let (first, second) = (small_disk(&store, "first.raw", 1), small_disk(&store, "second.raw", 2));
    store.run(["image", "add", "golden", first.to_str().unwrap()]);
    let before = store.run(["image", "show", "golden"]);
    one_line(&store.refused(["image", "add", "golden", second.to_str().unwrap()]), "taken");
    assert_eq!(store.run(["image", "show", "golden"]), before);
    assert_eq!(names(&store), ["golden"]);
    one_line(&store.refused(["image", "show", "silver"]), "silver");
    one_line(&store.refused(["image", "remove", "silver"]), "silver");
    let there = second.to_str().unwrap();
    one_line(&store.refused(["image", "export", "golden", there]), "second.raw");
    assert!(std::fs::read(&second).unwrap() == std::fs::read(small_disk(&store, "again.raw", 2)).unwrap());
}

/// A file of an image's folder.
fn file_of_image(store: &Store, image: &str, name: &str) -> PathBuf {
    let shown: serde_json::Value =
        serde_json::from_str(&store.run(["image", "show", image, "--json"])).unwrap();
    Path::new(shown["path"].as_str().unwrap()).join(name)
}

#[test]
fn any_changed_byte_of_an_image_is_found() {
    let store = Store::new();
    let raw = small_disk(&store, "small.raw", 3);
    store.run(["image", "add", "golden", raw.to_str().unwrap()]);
    store.run(["record", "golden", "--", "dd", "if={disk}", "of=/dev/null", "bs=64K", "count=9"]);
    let files: Vec<PathBuf> =
        ["disk", "tree", "manifest", "boot"].map(|name| file_of_image(&store, "golden", name)).into();
    for file in files {
        let whole = std::fs::read(&file).unwrap();
        for place in [0, 1, whole.len() / 3, whole.len() / 2, whole.len() - 2, whole.len() - 1] {
            let mut changed = whole.clone();
            changed[place] ^= 0x10;
            std::fs::write(&file, &changed).unwrap();
            let said = store.refused(["image", "verify", "golden"]);
            assert!(said.lines().count() <= 3, "byte {place} of {}:\n{said}", file.display());
        }
        for cut in [0, whole.len() / 2, whole.len() - 1] {
            std::fs::write(&file, &whole[..cut]).unwrap();
            store.refused(["image", "verify", "golden"]);
        }
        std::fs::write(&file, &whole).unwrap();
        store.run(["image", "verify", "golden"]);
    }
    // The boot cache of another image.
    let other = small_disk(&store, "other.raw", 4);
    store.run(["image", "add", "silver", other.to_str().unwrap()]);
    store.run(["record", "silver", "--", "dd", "if={disk}", "of=/dev/null", "bs=64K", "count=9"]);
    std::fs::copy(file_of_image(&store, "silver", "boot"), file_of_image(&store, "golden", "boot")).unwrap();
    one_line(&store.refused(["image", "verify", "golden"]), "boot cache");
}

#[test]
fn a_second_server_on_a_store_is_refused_and_the_first_goes_on() {
    let store = Store::new();
    let mut first = store.serve([""; 0]);
    one_line(&store.refused(["serve"]), &format!("is in use by process {}", first.id()));
    let raw = small_disk(&store, "small.raw", 1);
    store.run(["image", "add", "golden", raw.to_str().unwrap()]);
    store.run(["overlay", "create", "golden", "vm"]);
    // What a killed one leaves is no obstacle.
    first.kill();
    let mut next = store.serve([""; 0]);
    assert!(store.run(["overlay", "list"]).contains("vm"));
    assert!(next.terminate(Duration::from_secs(10)).success());
}

#[test]
fn a_node_that_would_serve_in_the_clear_says_what_to_give() {
    let said = Store::new().refused(["serve", "--peer-listen", "0.0.0.0:7681"]);
    one_line(&said, "--peer-listen: 0.0.0.0:7681 is beyond loopback");
    assert!(said.contains("--tls-dir") && said.contains("--plain"), "{said}");
}

#[test]
fn a_node_that_would_fetch_in_the_clear_says_so_and_does_not_try_again_and_again() {
    let began = Instant::now();
    let said = Store::new().refused(["pull", "golden", "--from", "192.0.2.1:7602"]);
    one_line(&said, "192.0.2.1:7602 is beyond loopback");
    assert!(said.contains("--tls-dir") && said.contains("--plain"), "{said}");
    assert!(began.elapsed() < Duration::from_secs(8), "what cannot come true is not waited for");
}

#[test]
fn commands_without_a_daemon_wait_for_each_other_and_start_one_daemon_together() {
    let store = Store::new();
    let raw = small_disk(&store, "small.raw", 1);
    store.run(["image", "add", "golden", raw.to_str().unwrap()]);
    let all = |commands: Vec<Vec<&str>>| {
        let start = |words: Vec<&str>| Process::start(&mut store.command(words));
        let started: Vec<_> = commands.into_iter().map(start).collect();
        for mut process in started {
            assert!(process.wait(Duration::from_secs(60)).success(), "{}", process.said());
        }
    };
    let vms = ["a", "b", "c", "d"];
    all(vms.iter().map(|vm| vec!["overlay", "create", "golden", vm]).collect());
    for vm in vms {
        std::fs::create_dir(store.path().join("vms").join(vm)).unwrap();
    }
    all(vms.iter().map(|vm| vec!["stop", vm, "--remove"]).collect());
    let left: serde_json::Value = serde_json::from_str(&store.run(["--json", "overlay", "list"])).unwrap();
    assert_eq!(left, serde_json::json!([]));
    let status: serde_json::Value = serde_json::from_str(&store.run(["--json", "status"])).unwrap();
    let daemon = rustix::process::Pid::from_raw(status["pid"].as_i64().unwrap().try_into().unwrap());
    rustix::process::kill_process(daemon.unwrap(), rustix::process::Signal::KILL).unwrap();
}

#[test]
fn a_socket_takes_the_place_of_a_dead_one_and_of_nothing_else() {
    let store = Store::new();
    let (socket, beside) = (store.beside("nbd.sock"), store.beside("nbd.sock.new"));
    let serve = ["serve", "--socket", socket.to_str().unwrap()];
    for file in [&socket, &beside] {
        std::fs::write(file, "precious").unwrap();
        one_line(&store.refused(serve), "not a socket");
        assert_eq!(std::fs::read_to_string(file).unwrap(), "precious");
        std::fs::remove_file(file).unwrap();
    }
    let other = Store::new();
    let mut first = other.serve(&serve[1..]);
    one_line(&store.refused(serve), "in use");
    std::os::unix::net::UnixStream::connect(&socket).unwrap();
    first.kill();
    drop(store.serve(&serve[1..]));
}

/// A small file system in memory, unmounted on drop.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: PathBuf, megabytes: u32) -> Self {
        std::fs::create_dir_all(&at).unwrap();
        support::run(
            Command::new("mount")
                .args(["-t", "tmpfs", "-o", &format!("size={megabytes}m"), "small"])
                .arg(&at),
        );
        Self(at)
    }

    /// Leaves no room, neither for bytes nor for another file or folder.
    fn fill(&self) {
        let filler = std::fs::File::options().create(true).append(true).open(self.0.join("filler"));
        std::io::copy(&mut std::io::repeat(1), &mut filler.unwrap()).unwrap_err();
        let used = rustix::fs::statvfs(self.0.as_path()).map(|fs| fs.f_files - fs.f_ffree).unwrap();
        let remount = format!("remount,nr_inodes={used}");
        support::run(Command::new("mount").args(["-o", &remount]).arg(&self.0));
        std::fs::create_dir(self.0.join("folder")).unwrap_err();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _best_effort = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

#[test]
fn a_full_disk_is_said_to_be_full_and_the_store_works_on() {
    if !support::require(&["mount", "umount"]) || !support::require_root() {
        return;
    }
    let store = Store::new();
    let small = small_disk(&store, "small.raw", 4);
    let large = store.beside("large.raw");
    std::fs::write(&large, support::noise(5, 24 << 20)).unwrap();
    let _disk = SmallDisk::mount(store.path(), 16);
    one_line(&store.refused(["image", "add", "large", large.to_str().unwrap()]), "space");
    if support::require(&["qemu-img"]) {
        let qcow2 = store.beside("large.qcow2");
        let (from, to) = (large.to_str().unwrap(), qcow2.to_str().unwrap());
        qemu_img(&["convert", "-f", "raw", "-O", "qcow2", from, to]);
        one_line(&store.refused(["image", "add", "large", to]), "space");
    }
    nothing_half_made(&store);
    store.run(["image", "add", "small", small.to_str().unwrap()]);
    store.run(["image", "verify", "small"]);
    assert_eq!(names(&store), ["small"]);

    // There is no room for a trace, then for nothing at all.
    one_line(&store.refused(["record", "small", "--", "dd", "if={disk}", "of=/dev/null"]), "is there room");
    assert_eq!(std::fs::read_dir(store.path().join("tmp")).unwrap().count(), 0);
    let filler = store.path().join("filler");
    std::io::copy(&mut std::io::repeat(1), &mut std::fs::File::create(&filler).unwrap()).unwrap_err();
    one_line(&store.refused(["overlay", "create", "small", "vm"]), "free some space");
    assert!(!store.path().join("overlays/vm").exists());
    std::fs::remove_file(&filler).unwrap();
    store.run(["overlay", "create", "small", "vm"]);
    store.run(["image", "verify", "small"]);
}

/// Once, what was to be removed was moved into a new folder, for which there was no room; by then the image's name had gone.
#[test]
fn images_and_overlays_can_be_removed_from_a_full_disk() {
    if !support::require(&["mount", "umount"]) || !support::require_root() {
        return;
    }
    let store = Store::new();
    let small = small_disk(&store, "small.raw", 4);
    let disk = SmallDisk::mount(store.path(), 16);
    store.run(["image", "add", "small", small.to_str().unwrap()]);
    store.run(["overlay", "create", "small", "vm"]);
    store.run(["overlay", "create", "small", "vm-2"]);
    let daemon = store.serve([""; 0]);
    disk.fill();
    store.run(["overlay", "remove", "vm"]);
    drop(daemon);
    disk.fill();
    store.run(["overlay", "remove", "vm-2"]);
    disk.fill();
    store.run(["image", "remove", "small"]);
    assert_eq!(names(&store), [""; 0]);
    nothing_half_made(&store);
}
