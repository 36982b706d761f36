//! Images in and out of a store: every format, increments, containers, and interruptions.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bootcache::block::Extent;
use bootcache::image::increment::publish_sealed;
use bootcache::overlay::{BlockState, Header, Run, write_index};
use support::store::Store;

const MIB: u64 = 1 << 20;

fn qemu_img<S: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = S>) -> String {
    support::run(Command::new("qemu-img").args(arguments))
}

/// A sparse raw disk of 40 MiB: noise, repeated bytes, lone blocks and an odd end, holes between.
fn disk(store: &Store, name: &str, seed: u64) -> PathBuf {
    let path = store.beside(name);
    let file = File::create(&path).unwrap();
    file.set_len(40 * MIB).unwrap();
    file.write_all_at(&support::noise(seed, 3 << 20), 0).unwrap();
    file.write_all_at(&[b'x'; 1 << 20], 8 * MIB).unwrap();
    for block in (5000..5400).step_by(7) {
        file.write_all_at(&support::noise(seed + block, 4096), block * 4096).unwrap();
    }
    file.write_all_at(b"the end", 40 * MIB - 7).unwrap();
    path
}

fn shown(store: &Store, name: &str) -> serde_json::Value {
    serde_json::from_str(&store.run(["image", "show", name, "--json"])).unwrap()
}

fn b3sum(path: &Path) -> String {
    support::run(Command::new("b3sum").arg("--no-names").arg(path)).trim().to_owned()
}

fn stored(store: &Store, name: &str) -> PathBuf {
    Path::new(shown(store, name)["path"].as_str().unwrap()).join("disk")
}

fn add(store: &Store, name: &str, file: &Path, options: &[&str]) -> String {
    store.run([&["image", "add", name, file.to_str().unwrap()], options].concat())
}

#[test]
fn every_format_gives_the_same_image_and_b3sum_agrees() {
    if !support::require(&["qemu-img", "b3sum"]) {
        return;
    }
    let store = Store::new();
    let raw = disk(&store, "disk.raw", 1);
    let sources: [(&str, &[&str]); 9] = [
        ("plain.qcow2", &[]),
        ("compressed.qcow2", &["-c"]),
        ("zstd.qcow2", &["-c", "-o", "compression_type=zstd"]),
        ("old.qcow2", &["-o", "compat=0.10,cluster_size=4096"]),
        ("sparse.vmdk", &[]),
        ("stream.vmdk", &["-o", "subformat=streamOptimized"]),
        ("dynamic.vdi", &[]),
        ("static.vdi", &["-o", "static=on"]),
        ("dynamic.vhdx", &[]),
    ];
    add(&store, "raw", &raw, &[]);
    let expected = shown(&store, "raw");
    assert_eq!(expected["raw_blake3"], b3sum(&raw));
    assert_eq!(b3sum(&stored(&store, "raw")), b3sum(&raw));
    for (file, options) in sources {
        let path = store.beside(file);
        let (stem, format) = file.split_once('.').unwrap();
        let mut arguments = vec!["convert", "-f", "raw", "-O", format];
        arguments.extend(options);
        arguments.extend([raw.to_str().unwrap(), path.to_str().unwrap()]);
        qemu_img(arguments);
        // A store of its own, so that nothing is found to be there already.
        let own = Store::new();
        let name = format!("{stem}-{format}");
        add(&own, &name, &path, &[]);
        let found = shown(&own, &name);
        assert_eq!(found["root"], expected["root"], "{file}");
        assert_eq!(found["raw_blake3"], expected["raw_blake3"], "{file}");
        assert_eq!(found["source_format"], format);
        let disk = stored(&own, &name);
        assert_eq!(b3sum(&disk), b3sum(&raw), "{file}");
        let allocated = fs::metadata(disk).unwrap().blocks() * 512;
        assert!(allocated < 6 * MIB, "{file}: {allocated} bytes are allocated for 4.3 MB of data");
        assert!(own.run(["image", "verify", &name]).contains(expected["raw_blake3"].as_str().unwrap()));
    }
}

#[test]
fn a_file_whose_end_is_missing_is_refused_or_gives_the_same_image() {
    if !support::require(&["qemu-img"]) {
        return;
    }
    let store = Store::new();
    let raw = store.beside("noise.raw");
    fs::write(&raw, support::noise(11, 5 << 20)).unwrap();
    add(&store, "whole", &raw, &[]);
    let expected = shown(&store, "whole")["root"].clone();
    let sources: [(&str, &[&str]); 6] = [
        ("plain.qcow2", &[]),
        ("compressed.qcow2", &["-c"]),
        ("sparse.vmdk", &[]),
        ("stream.vmdk", &["-o", "subformat=streamOptimized"]),
        ("dynamic.vdi", &[]),
        ("dynamic.vhdx", &[]),
    ];
    for (file, options) in sources {
        let path = store.beside(file);
        let (_, format) = file.split_once('.').unwrap();
        let mut arguments = vec!["convert", "-f", "raw", "-O", format];
        arguments.extend(options);
        arguments.extend([raw.to_str().unwrap(), path.to_str().unwrap()]);
        qemu_img(arguments);
        let whole = fs::read(&path).unwrap();
        for missing in [1, 511, 513, 1500, 5000, 70_000] {
            let cut = store.beside(&format!("cut.{format}"));
            fs::write(&cut, &whole[..whole.len() - missing]).unwrap();
            let own = Store::new();
            let status = own.command(["image", "add", "cut"]).arg(&cut).output().unwrap().status;
            if status.success() {
                assert_eq!(shown(&own, "cut")["root"], expected, "{missing} bytes of {file} are missing");
            }
        }
    }
}

#[test]
fn a_size_that_is_no_multiple_of_a_block_is_kept() {
    if !support::require(&["b3sum"]) {
        return;
    }
    let store = Store::new();
    for (name, size) in [("tiny", 1), ("odd", 4097), ("unit", (16 << 20) + 513)] {
        let path = store.beside(name);
        fs::write(&path, support::noise(size, usize::try_from(size).unwrap())).unwrap();
        add(&store, name, &path, &["--format", "raw"]);
        assert_eq!(shown(&store, name)["size"], size);
        assert_eq!(shown(&store, name)["raw_blake3"], b3sum(&path));
        store.run(["image", "verify", name]);
        let out = store.beside(&format!("{name}.out"));
        store.run(["image", "export", name, out.to_str().unwrap()]);
        assert!(fs::read(out).unwrap() == fs::read(path).unwrap());
    }
}

#[test]
fn zero_blocks_that_were_allocated_become_holes() {
    let store = Store::new();
    let path = store.beside("zeroes.raw");
    let mut bytes = vec![0; 8 << 20];
    bytes[4 << 20] = 1;
    fs::write(&path, bytes).unwrap();
    add(&store, "zeroes", &path, &[]);
    assert!(fs::metadata(stored(&store, "zeroes")).unwrap().blocks() * 512 <= 64 << 10);
    assert_eq!(shown(&store, "zeroes")["allocated"], 4096);
}

#[test]
fn files_outside_the_given_one_are_read_only_when_that_is_allowed() {
    if !support::require(&["qemu-img"]) {
        return;
    }
    let store = Store::new();
    let raw = disk(&store, "disk.raw", 2);
    let path = |name: &str| store.beside(name).to_str().unwrap().to_owned();
    qemu_img(["convert", "-f", "raw", "-O", "qcow2", raw.to_str().unwrap(), &path("base.qcow2")]);
    qemu_img(["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", &path("overlay.qcow2")]);
    let flat = "subformat=monolithicFlat";
    qemu_img(["convert", "-f", "raw", "-O", "vmdk", "-o", flat, raw.to_str().unwrap(), &path("flat.vmdk")]);
    let data_file = format!("data_file={}", path("data"));
    qemu_img(["create", "-q", "-f", "qcow2", "-o", &data_file, &path("outside.qcow2"), "40M"]);
    for file in ["overlay.qcow2", "flat.vmdk", "outside.qcow2"] {
        let said = store.refused(["image", "add", "image", &path(file)]);
        assert!(said.contains("--allow-backing-files"), "{file}: {said}");
    }
    add(&store, "raw", &raw, &[]);
    for (name, file) in [("overlay", "overlay.qcow2"), ("flat", "flat.vmdk")] {
        add(&store, name, &store.beside(file), &["--allow-backing-files"]);
        assert_eq!(shown(&store, name)["root"], shown(&store, "raw")["root"], "{file}");
    }

    // A guest can write a qcow2 header onto its raw disk: stated as raw, it is only bytes.
    let spy = path("spy.raw");
    qemu_img(["create", "-q", "-f", "qcow2", "-b", "/etc/passwd", "-F", "raw", &spy, "1M"]);
    let said = store.refused(["image", "add", "spy", &spy]);
    assert!(said.contains("--format raw"), "{said}");
    add(&store, "spy", Path::new(&spy), &["--format", "raw"]);
    assert!(fs::read(stored(&store, "spy")).unwrap() == fs::read(&spy).unwrap());
}

#[test]
fn an_image_leaves_in_every_format_as_it_came() {
    if !support::require(&["qemu-img"]) {
        return;
    }
    let store = Store::new();
    let raw = disk(&store, "disk.raw", 3);
    add(&store, "golden", &raw, &[]);
    for format in ["raw", "qcow2", "vmdk", "vdi", "vhdx"] {
        let out = store.beside(&format!("out.{format}"));
        store.run(["image", "export", "golden", out.to_str().unwrap()]);
        qemu_img(["compare", "-f", "raw", "-F", format, raw.to_str().unwrap(), out.to_str().unwrap()]);
    }
    let out = store.beside("named-otherwise");
    store.run(["image", "export", "golden", out.to_str().unwrap(), "--format", "qcow2"]);
    qemu_img(["compare", "-f", "raw", "-F", "qcow2", raw.to_str().unwrap(), out.to_str().unwrap()]);

    // What is damaged does not leave.
    let disk = File::options().write(true).open(stored(&store, "golden")).unwrap();
    disk.write_all_at(b"!", MIB).unwrap();
    for format in ["raw", "qcow2"] {
        let out = store.beside(&format!("damaged.{format}"));
        let said = store.refused(["image", "export", "golden", out.to_str().unwrap()]);
        assert!(said.contains("block 256 is damaged"), "{said}");
        assert!(!out.exists());
    }
    assert!(
        fs::read_dir(store.beside(""))
            .unwrap()
            .flatten()
            .all(|entry| { !entry.file_name().to_string_lossy().contains("partial") })
    );
}

/// Makes an increment of `base` called `name`: noise, a block of zeroes over data, and 8 MiB more at the end.
fn increment(store: &Store, base: &str, name: &str, seed: u64) -> Vec<u8> {
    let library = bootcache::store::Store::open(&store.path()).unwrap();
    let entry = library.resolve(&base.parse().unwrap()).unwrap();
    let size = entry.manifest.size + 8 * MIB;
    let (first, zeroes, last) = (100_u64, 200, size / 4096 - 1);
    let whole = store.beside(&format!("{name}.whole"));
    store.run(["image", "export", base, whole.to_str().unwrap()]);
    let mut expected = fs::read(whole).unwrap();
    expected.resize(usize::try_from(size).unwrap(), 0);

    let scratch = library.scratch("test").unwrap();
    let disk = File::create(scratch.join("disk")).unwrap();
    disk.set_len(size).unwrap();
    let run = |start, count, state| Run { extent: Extent::new(start, count), state };
    let runs =
        [run(first, 90, BlockState::Data), run(zeroes, 5, BlockState::Zero), run(last, 1, BlockState::Data)];
    for run in runs {
        let range =
            usize::try_from(run.extent.offset()).unwrap()..usize::try_from(run.extent.end() * 4096).unwrap();
        if run.state == BlockState::Data {
            let noise = support::noise(seed + run.extent.start, range.len());
            disk.write_all_at(&noise, run.extent.offset()).unwrap();
            expected[range].copy_from_slice(&noise);
        } else {
            expected[range].fill(0);
        }
    }
    write_index(&scratch.join("index"), Header { base: entry.root, size }, &runs).unwrap();
    publish_sealed(&library, scratch, &name.parse().unwrap()).unwrap();
    expected
}

#[test]
fn an_increment_travels_alone_and_is_whole_again_where_its_base_is() {
    let store = Store::new();
    let raw = disk(&store, "disk.raw", 4);
    add(&store, "base", &raw, &[]);
    increment(&store, "base", "first", 10);
    let expected = increment(&store, "first", "second", 20);
    for name in ["first", "second"] {
        store.run(["image", "verify", name]);
    }
    let whole = store.beside("whole.raw");
    store.run(["image", "export", "second", whole.to_str().unwrap()]);
    assert!(fs::read(&whole).unwrap() == expected);
    let said = store.refused(["image", "export", "base", store.beside("x").to_str().unwrap(), "--increment"]);
    assert!(said.contains("--increment"), "{said}");
    assert!(store.refused(["image", "remove", "first"]).contains("'second'"));

    let [first, second] = ["first", "second"].map(|name| {
        let file = store.beside(&format!("{name}.increment"));
        store.run(["image", "export", name, file.to_str().unwrap(), "--increment"]);
        assert!(fs::metadata(&file).unwrap().len() < 400_000, "only what it adds");
        file
    });
    let other = Store::new();
    let said = other.refused(["image", "add", "second", second.to_str().unwrap()]);
    assert!(said.contains("not in this store"), "{said}");
    add(&other, "base", &raw, &[]);
    add(&other, "first", &first, &[]);
    add(&other, "second", &second, &[]);
    assert_eq!(shown(&other, "second")["root"], shown(&store, "second")["root"]);
    assert!(
        other.run(["image", "list"]).lines().any(|line| line.contains("second") && line.contains("first"))
    );
    other.run(["image", "verify", "second"]);
    let again = other.beside("again.raw");
    other.run(["image", "export", "second", again.to_str().unwrap()]);
    assert!(fs::read(again).unwrap() == expected);

    // The identity is that of the disk, however it is stored.
    let flat = Store::new();
    add(&flat, "flat", &whole, &[]);
    assert_eq!(shown(&flat, "flat")["root"], shown(&store, "second")["root"]);

    // A changed byte, anywhere, is noticed before anything is kept.
    let sound = fs::read(&first).unwrap();
    let third = Store::new();
    add(&third, "base", &raw, &[]);
    for at in [0, 20, 60, 300, 800, sound.len() / 2, sound.len() - 1] {
        let mut bytes = sound.clone();
        bytes[at] ^= 1;
        let file = third.beside("damaged");
        fs::write(&file, bytes).unwrap();
        if at > 0 {
            third.refused(["image", "add", "first", file.to_str().unwrap()]);
        }
    }
    assert_eq!(fs::read_dir(third.path().join("images")).unwrap().count(), 1);
    assert_eq!(fs::read_dir(third.path().join("tmp")).unwrap().count(), 0);
}

#[test]
fn verify_tells_a_file_that_cannot_be_read_from_one_that_differs() {
    let store = Store::new();
    let raw = disk(&store, "disk.raw", 5);
    add(&store, "base", &raw, &[]);
    increment(&store, "base", "more", 30);
    let dir = stored(&store, "more").parent().unwrap().to_owned();
    for file in ["index", "tree"] {
        let (path, away) = (dir.join(file), dir.join("away"));
        fs::rename(&path, &away).unwrap();
        // It opens, and every read of it fails.
        fs::create_dir(&path).unwrap();
        let verified = store.command(["image", "verify", "more"]).output().unwrap();
        assert_eq!(verified.status.code(), Some(1), "{file}: {verified:?}");
        fs::remove_dir(&path).unwrap();
        fs::rename(&away, &path).unwrap();
    }
    store.run(["image", "verify", "more"]);
}

#[test]
fn a_changed_byte_of_an_increment_is_found_by_verify() {
    let store = Store::new();
    let raw = disk(&store, "disk.raw", 5);
    add(&store, "base", &raw, &[]);
    increment(&store, "base", "more", 30);
    let dir = stored(&store, "more").parent().unwrap().to_owned();
    for (file, at) in
        [("disk", 100 * 4096 + 5), ("index", 24), ("index", 100), ("index", 150), ("tree", 5000)]
    {
        let path = dir.join(file);
        let sound = fs::read(&path).unwrap();
        let mut bytes = sound.clone();
        bytes[at] ^= 1;
        fs::write(&path, bytes).unwrap();
        let status = store.command(["image", "verify", "more"]).output().unwrap().status;
        assert_eq!(status.code(), Some(3), "byte {at} of {file}");
        fs::write(&path, sound).unwrap();
    }
    store.run(["image", "verify", "more"]);
}

#[test]
fn container_archives_are_kept_byte_for_byte() {
    if !support::require(&["tar", "gzip"]) {
        return;
    }
    let store = Store::new();
    let root = store.beside("rootfs");
    fs::create_dir_all(root.join("bin")).unwrap();
    fs::write(root.join("bin/sh"), support::noise(1, 100_000)).unwrap();
    let tar = store.beside("rootfs.tar");
    support::run(Command::new("tar").arg("-C").arg(&root).arg("-cf").arg(&tar).arg("."));
    let said = add(&store, "alpine", &tar, &[]);
    assert!(said.contains("container"), "{said}");
    assert_eq!(shown(&store, "alpine")["type"], "container");
    assert!(fs::read(stored(&store, "alpine")).unwrap() == fs::read(&tar).unwrap());
    // It has a boot cache from the start: all of it, so that it can be loaded while it arrives.
    let length = shown(&store, "alpine")["boot"]["file_length"].as_u64().unwrap();
    assert!((100_000..150_000).contains(&length), "{length}");
    store.run(["image", "verify", "alpine"]);
    let cut = store.beside("cut.tar");
    fs::write(&cut, &fs::read(&tar).unwrap()[..60_000]).unwrap();
    assert!(store.refused(["image", "add", "cut", cut.to_str().unwrap()]).contains("ends in the middle"));
    support::run(Command::new("gzip").arg("-k").arg(&tar));
    let compressed = store.beside("rootfs.tar.gz");
    let said = store.refused(["image", "add", "gz", compressed.to_str().unwrap()]);
    assert!(said.contains("gzip"), "{said}");
    add(&store, "gz", &compressed, &["--type", "container"]);
    assert!(fs::read(stored(&store, "gz")).unwrap() == fs::read(&compressed).unwrap());
    let raw = disk(&store, "disk.raw", 6);
    let said = store.refused(["image", "add", "raw", raw.to_str().unwrap(), "--type", "container"]);
    assert!(said.contains("not a tar archive"), "{said}");
    let out = store.beside("x.qcow2");
    assert!(store.refused(["image", "export", "alpine", out.to_str().unwrap()]).contains("--format"));
}

#[test]
fn an_import_that_is_killed_leaves_nothing_and_can_be_repeated() {
    if !support::require(&["qemu-img"]) {
        return;
    }
    let store = Store::new();
    let raw = store.beside("large.raw");
    fs::write(&raw, support::noise(7, 96 << 20)).unwrap();
    let qcow2 = store.beside("large.qcow2");
    qemu_img(["convert", "-c", "-f", "raw", "-O", "qcow2", raw.to_str().unwrap(), qcow2.to_str().unwrap()]);
    // A kill may come before the store is there, and then nothing could be listed.
    bootcache::store::Store::open(&store.path()).unwrap();
    let mut interrupted = 0;
    for (file, delay_ms) in [(&raw, 20), (&raw, 60), (&raw, 120), (&qcow2, 60), (&qcow2, 150), (&qcow2, 300)]
    {
        let mut import = store.command(["image", "add", "large", file.to_str().unwrap()]).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(delay_ms));
        import.kill().unwrap();
        let status = import.wait().unwrap();
        interrupted += u32::from(!status.success());
        if status.success() {
            store.run(["image", "remove", "large"]);
        }
        assert_eq!(store.run(["image", "list", "--json"]).trim(), "[]");
        assert_eq!(fs::read_dir(store.path().join("tmp")).unwrap().count(), 0, "the next command cleans up");
        assert_eq!(fs::read_dir(store.path().join("images")).unwrap().count(), 0);
    }
    assert!(interrupted > 0, "no kill came in time");
    add(&store, "large", &raw, &[]);
    store.run(["image", "verify", "large"]);
}

#[test]
fn ctrl_c_ends_an_import_at_once_with_nothing_left() {
    if !support::require(&["qemu-img"]) {
        return;
    }
    let store = Store::new();
    let raw = store.beside("large.raw");
    fs::write(&raw, support::noise(8, 96 << 20)).unwrap();
    let qcow2 = store.beside("large.qcow2");
    qemu_img(["convert", "-c", "-f", "raw", "-O", "qcow2", raw.to_str().unwrap(), qcow2.to_str().unwrap()]);
    let mut import = store.command(["image", "add", "large", qcow2.to_str().unwrap()]).spawn().unwrap();
    let converting = || {
        let entries = fs::read_dir(store.path().join("tmp")).into_iter().flatten().flatten();
        entries.into_iter().any(|entry| entry.path().join("disk").exists())
    };
    let deadline = Instant::now() + Duration::from_secs(20);
    while !converting() {
        assert!(Instant::now() < deadline, "qemu-img never began");
        std::thread::sleep(Duration::from_millis(2));
    }
    let pid = rustix::process::Pid::from_child(&import);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let status = import.wait().unwrap();
    assert_eq!(status.code(), Some(130));
    assert_eq!(fs::read_dir(store.path().join("tmp")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(store.path().join("images")).unwrap().count(), 0);
}

#[test]
fn images_come_and_go_beside_a_daemon_that_holds_the_store() {
    let store = Store::new();
    let library = bootcache::store::Store::open(&store.path()).unwrap();
    let _daemon = library.lock().unwrap();
    let raw = disk(&store, "disk.raw", 9);
    add(&store, "golden", &raw, &[]);
    store.run(["image", "verify", "golden"]);
    let hold = library.hold(library.resolve(&"golden".parse().unwrap()).unwrap().root).unwrap();
    let said = store.refused(["image", "remove", "golden"]);
    assert!(said.contains("in use"), "{said}");
    drop(hold);
    store.run(["image", "remove", "golden"]);
}

#[test]
fn a_disk_that_rotted_is_right_again_once_the_image_is_added_again() {
    let store = Store::new();
    let raw = disk(&store, "disk.raw", 5);
    add(&store, "base", &raw, &[]);
    let serve = store.serve([""; 0]);
    store.run(["overlay", "create", "base", "vm"]);
    let rotten = File::options().write(true).open(stored(&store, "base")).unwrap();
    for at in [100, 8 * MIB + 5, 20 * MIB] {
        rotten.write_all_at(b"rot", at).unwrap();
    }
    assert_eq!(store.command(["image", "verify", "base"]).output().unwrap().status.code(), Some(3));
    add(&store, "again", &raw, &[]);
    store.run(["image", "verify", "base"]);
    let uri = store.uri("vm");
    qemu_img(["compare", "-f", "raw", "-F", "raw", raw.to_str().unwrap(), &uri]);
    drop(serve);
}

#[test]
fn what_is_not_what_it_is_said_to_be_is_refused() {
    if !support::require(&["qemu-img", "tar"]) {
        return;
    }
    let store = Store::new();
    let raw = disk(&store, "disk.raw", 6);
    let archive = store.beside("c.tar");
    support::run(
        Command::new("tar").arg("-C").arg(store.beside("")).arg("-cf").arg(&archive).arg("disk.raw"),
    );
    add(&store, "as-disk", &archive, &["--format", "raw"]);
    let archive = archive.to_str().unwrap();
    let said = store.refused(["image", "add", "as-container", archive, "--type", "container"]);
    assert!(said.contains("is here already, of type vm"), "{said}");

    let qcow2 = store.beside("disk.qcow2");
    qemu_img(["convert", "-O", "qcow2", raw.to_str().unwrap(), qcow2.to_str().unwrap()]);
    File::options().write(true).open(&qcow2).unwrap().write_all_at(&2_u64.to_be_bytes(), 72).unwrap();
    let said = store.refused(["image", "add", "corrupt", qcow2.to_str().unwrap()]);
    assert!(said.contains("marked corrupt"), "{said}");

    let mut piped = store.command(["image", "add", "piped", "/dev/stdin"]);
    let mut piped = piped.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(piped.stdin.take());
    let output = piped.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("neither a file nor a block device"), "{said}");
}
