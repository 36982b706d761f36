//! Other people's NBD clients against our exports, from every image format: qemu-img, qemu-io, nbdcopy, nbdinfo, nbdsh, fio.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use support::store::Store;

/// Of the test disk: not a whole number of 512 KiB pages, nor of 64 KiB clusters.
const SIZE: usize = 24 * 1024 * 1024 + 5 * 4096;

/// Name of the image, format for `qemu-img convert`, and its options.
const SOURCES: [(&str, &str, &[&str]); 5] = [
    ("raw", "raw", &[]),
    ("qcow2", "qcow2", &[]),
    ("compressed", "qcow2", &["-c"]),
    ("vmdk", "vmdk", &[]),
    ("vdi", "vdi", &[]),
];

const TOOLS: [&str; 6] = ["qemu-img", "qemu-io", "nbdcopy", "nbdinfo", "fio", "nbdsh"];

/// A sparse raw disk: noise in runs of several lengths, zeroes between them, noise in its last block.
fn test_disk(path: &Path) -> Vec<u8> {
    let mut disk = vec![0; SIZE];
    let mut offset = 4096;
    for (seed, length) in (1..).zip([4096, 65536, 512, 1 << 20, 4096 * 3, 200_000].into_iter().cycle()) {
        if offset + length > SIZE {
            break;
        }
        disk[offset..offset + length].copy_from_slice(&support::noise(seed, length));
        offset += length * 3;
    }
    disk[SIZE - 4096..].copy_from_slice(&support::noise(99, 4096));
    write_sparse(path, &disk);
    disk
}

fn write_sparse(path: &Path, disk: &[u8]) {
    let file = File::create(path).unwrap();
    file.set_len(disk.len() as u64).unwrap();
    for (index, block) in
        disk.chunks(4096).enumerate().filter(|(_, block)| block.iter().any(|&byte| byte != 0))
    {
        file.write_all_at(block, index as u64 * 4096).unwrap();
    }
}

/// A store with the test disk as one image per source format.
fn store_with_images() -> (Store, PathBuf, Vec<u8>) {
    let store = Store::new();
    let raw = store.beside("disk.raw");
    let disk = test_disk(&raw);
    for (name, format, options) in SOURCES {
        let file = store.beside(&format!("{name}.{format}"));
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-f", "raw", "-O", format]).args(options).arg(&raw).arg(&file);
        support::run(&mut convert);
        store.run(["image", "add", name, file.to_str().unwrap()]);
    }
    (store, raw, disk)
}

fn nbdsh(uri: &str, script: &str) -> String {
    support::run(Command::new("/usr/bin/python3").args([
        "-m",
        "nbd",
        "--base-allocation",
        "-u",
        uri,
        "-c",
        script,
    ]))
}

/// Whether qemu-img sees the same bytes in the raw file and the export.
fn compare(raw: &Path, uri: &str) {
    support::run(Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "raw"]).arg(raw).arg(uri));
}

#[test]
fn an_image_from_any_format_reads_the_same_through_every_client() {
    if !support::require(&TOOLS) {
        return;
    }
    let (store, raw, disk) = store_with_images();
    let _serve = store.serve([""; 0]);
    for (name, ..) in SOURCES {
        let uri = store.uri(name);
        compare(&raw, &uri);

        let copy = store.beside("copy.raw");
        support::run(Command::new("nbdcopy").args(["--connections=2", "--requests=16"]).arg(&uri).arg(&copy));
        assert!(std::fs::read(&copy).unwrap() == disk, "nbdcopy of {name}");
        std::fs::remove_file(&copy).unwrap();

        assert_eq!(support::run(Command::new("nbdinfo").args(["--size", &uri])).trim(), SIZE.to_string());
        support::run(Command::new("nbdinfo").args(["--is", "read-only", &uri]));
        assert_eq!(
            said_to_be_zero(&disk, &uri),
            zero_bytes(&disk),
            "every zero block of {name} is said to be zero"
        );

        let script = "import sys
a = h.pread(65536, 4096)
b = bytearray(65536)
h.pread_structured(65536, 4096, lambda data, offset, status, error: b.__setitem__(slice(offset - 4096, offset - 4096 + len(data)), data), nbd.CMD_FLAG_DF)
assert a[:4096] == b[:4096]
try:
    h.pwrite(b'x' * 512, 0)
    sys.exit('a write to an image was accepted')
except nbd.Error: pass
assert h.pread(512, h.get_size() - 512) == h.pread(4096, h.get_size() - 4096)[-512:]";
        nbdsh(&uri, script);

        // What is in the first block of the raw file, as qemu-io reads it there, it must read here.
        let dump = |file: &str| {
            let io = Command::new("qemu-io")
                .args(["-r", "-f", "raw", "-c", "read -v 0 4096", "-c", "read -v 65000 5000", file])
                .output()
                .unwrap();
            assert!(io.status.success(), "qemu-io of {file}");
            let said = String::from_utf8(io.stdout).unwrap();
            said.lines()
                .filter(|line| line.contains(':') && !line.contains("ops"))
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        let read = dump(&uri);
        assert!(read.len() > 500 && read == dump(raw.to_str().unwrap()), "qemu-io of {name}");
    }
    fio_verifies_images(&store);
    let list = support::run(Command::new("nbdinfo").args(["--list", "--json", &store.uri("")]));
    for (name, ..) in SOURCES {
        assert!(list.contains(&format!("\"{name}\"")), "{name} is listed:\n{list}");
    }
}

/// fio writes a file with checksums in it; images of that file in every format must satisfy it.
fn fio_verifies_images(store: &Store) {
    let file = store.beside("checked.raw");
    let job = |more: &[&str]| {
        let mut fio = Command::new("fio");
        fio.args([
            "--name=checked",
            "--rw=randread",
            "--bs=4k",
            "--size=16M",
            "--io_size=16M",
            "--randseed=11",
        ])
        .args(["--verify=crc32c", "--verify_fatal=1", "--minimal"])
        .args(more);
        support::run(fio.current_dir(store.path()));
    };
    let name = format!("--filename={}", file.display());
    job(&["--ioengine=psync", "--rw=randwrite", "--do_verify=0", &name]);
    for (format, options) in SOURCES.map(|(_, format, options)| (format, options)) {
        let image = format!("checked-{format}-{}", options.len());
        let converted = store.beside(&image);
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-f", "raw", "-O", format]).args(options).arg(&file).arg(&converted);
        support::run(&mut convert);
        store.run(["image", "add", &image, converted.to_str().unwrap(), "--format", format]);
        job(&["--ioengine=nbd", "--iodepth=16", &format!("--uri={}", store.uri(&image))]);
    }
}

/// What `nbdinfo --map` says is zero must read as zeroes. Returns how many bytes it says are.
fn said_to_be_zero(disk: &[u8], uri: &str) -> usize {
    let map = support::run(Command::new("nbdinfo").args(["--map", "--json", uri]));
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let (mut next, mut zeroes) = (0, 0);
    for extent in map.as_array().unwrap() {
        let number = |key: &str| usize::try_from(extent[key].as_u64().unwrap()).unwrap();
        let (offset, length, kind) = (number("offset"), number("length"), number("type"));
        assert_eq!(offset, next, "the map has no gaps");
        next += length;
        if kind & 2 != 0 {
            assert!(disk[offset..next].iter().all(|&byte| byte == 0), "{offset}+{length} is said to be zero");
            zeroes += length;
        }
    }
    assert_eq!(next, disk.len());
    zeroes
}

/// Bytes of the blocks that are all zero.
fn zero_bytes(disk: &[u8]) -> usize {
    disk.chunks(4096).filter(|block| block.iter().all(|&byte| byte == 0)).count() * 4096
}

#[test]
fn an_overlay_takes_writes_of_every_client_and_the_image_below_stays_as_it_was() {
    if !support::require(&TOOLS) {
        return;
    }
    let (store, raw, disk) = store_with_images();
    let mut serve = store.serve([""; 0]);
    let expected = store.beside("expected.raw");
    for (name, ..) in SOURCES {
        let overlay = format!("vm-{name}");
        store.run(["overlay", "create", name, &overlay]);
        let uri = store.uri(&overlay);
        compare(&raw, &uri);
        let mut disk = disk.clone();
        write_with_qemu_io_and_nbdsh(&uri, &mut disk);
        write_sparse(&expected, &disk);
        compare(&expected, &uri);
        // Zeroes written with NO_HOLE stay allocated, and may be said to be data.
        let no_hole = 65536 + 4096;
        assert!(said_to_be_zero(&disk, &uri) >= zero_bytes(&disk) - no_hole);
    }

    // A second client on another connection, and after a clean restart, sees the same.
    assert!(serve.terminate(std::time::Duration::from_secs(10)).success(), "{}", serve.said());
    let mut serve = store.serve([""; 0]);
    for (name, ..) in SOURCES {
        compare(&expected, &store.uri(&format!("vm-{name}")));

        let overlay = format!("fio-{name}");
        store.run(["overlay", "create", name, &overlay]);
        let mut fio = Command::new("fio");
        fio.args(["--name=verify", "--ioengine=nbd", "--rw=randwrite", "--bssplit=4k/60:16k/30:512/10"])
            .args(["--iodepth=16", "--verify=crc32c", "--verify_fatal=1", "--fsync=64", "--randseed=7"])
            .args(["--size=16M", "--io_size=16M", "--minimal", &format!("--uri={}", store.uri(&overlay))]);
        support::run(fio.current_dir(store.path()));

        let overlay = format!("copy-{name}");
        store.run(["overlay", "create", name, &overlay]);
        support::run(Command::new("nbdcopy").arg(&expected).arg(store.uri(&overlay)));
        compare(&expected, &store.uri(&overlay));
    }

    for (name, ..) in SOURCES {
        compare(&raw, &store.uri(name));
    }
    assert!(serve.terminate(std::time::Duration::from_secs(10)).success(), "{}", serve.said());
    for (name, ..) in SOURCES {
        store.run(["image", "verify", name]);
    }
}

/// Writes, zeroes and trims at the export, and the same in `disk`.
fn write_with_qemu_io_and_nbdsh(uri: &str, disk: &mut [u8]) {
    let write =
        |disk: &mut [u8], offset: usize, length: usize, byte: u8| disk[offset..offset + length].fill(byte);
    let mut io = Command::new("qemu-io");
    io.args(["-f", "raw", "-c", "write -P 0x11 0 4096", "-c", "write -P 0x22 5000 3000", "-c", "flush"])
        .args([
            "-c",
            "write -z 1048576 65536",
            "-c",
            "write -f -P 0x33 1050000 100",
            "-c",
            "discard 2097152 65536",
        ])
        .args(["-c", "read -P 0x22 5000 3000", "-c", "read -P 0 1048576 1000", uri]);
    let said = support::run(&mut io);
    assert!(!said.contains("failed"), "{said}");
    write(disk, 0, 4096, 0x11);
    write(disk, 5000, 3000, 0x22);
    write(disk, 1_048_576, 65536, 0);
    write(disk, 1_050_000, 100, 0x33);
    // What a trim leaves is ours to say: zeroes, so that a guest cannot see the image come back.
    write(disk, 2_097_152, 65536, 0);

    nbdsh(
        uri,
        "size = h.get_size()
h.pwrite(b'D' * 8192, 3145728, nbd.CMD_FLAG_FUA)
h.zero(4096, 3145728, nbd.CMD_FLAG_NO_HOLE)
h.trim(65536, 4194304)
h.flush()
assert h.pread(8192, 3145728) == bytes(4096) + b'D' * 4096
assert h.pread(65536, 4194304) == bytes(65536)
h.pwrite(b'E' * 1000, size - 1000)
seen = []
h.block_status(131072, 4194304 - 32768, lambda context, offset, entries, error: seen.extend(entries) and 0 or 0)
assert sum(seen[0::2]) >= 65536, seen
import sys
for offset, length in [(size, 1), (size - 1, 2), (2**63, 512)]:
    h.set_strict_mode(0)
    try:
        h.pread(length, offset)
        sys.exit('a read beyond the end was accepted')
    except nbd.Error: pass",
    );
    write(disk, 3_145_728, 4096, 0);
    write(disk, 3_145_728 + 4096, 4096, b'D');
    write(disk, 4_194_304, 65536, 0);
    let end = SIZE - 1000;
    write(disk, end, 1000, b'E');
}

/// The port that a daemon which was told `:0` says it has.
fn port_of(said: &str, scheme: &str) -> u16 {
    let after = said.split(scheme).nth(1).unwrap_or_else(|| panic!("{scheme} is not in: {said}"));
    after.split_whitespace().next().unwrap().rsplit(':').next().unwrap().parse().unwrap()
}

#[test]
fn tcp_beyond_loopback_is_served_over_tls_with_the_cluster_s_certificates_and_not_otherwise() {
    if !support::require(&["nbdinfo", "qemu-img"]) {
        return;
    }
    let store = Store::new();
    let raw = store.beside("disk.raw");
    test_disk(&raw);
    store.run(["image", "add", "disk", raw.to_str().unwrap()]);
    let refused = store.refused(["serve", "--listen", "0.0.0.0:0"]);
    assert!(refused.contains("--tls-dir"), "{refused}");

    let folder = |name: &str| store.beside(name).to_str().unwrap().to_owned();
    let (authority, node, user) = (folder("ca"), folder("node"), folder("user"));
    store.run(["ca", "--ca-dir", &authority, "init"]);
    let issue = |name: &str, role: &str, out: &str| {
        let address = ["--address", "localhost", "--address", "127.0.0.1"];
        let command = ["ca", "--ca-dir", &authority, "issue", name, "--role", role, "--out", out];
        store.run(command.into_iter().chain(address));
    };
    issue("n1", "node", &node);
    issue("person", "user", &user);
    let mut serve = store.serve(["--tls-dir", &node, "--listen", "0.0.0.0:0", "--listen", "127.0.0.1:0"]);
    let said = serve.said();
    let (secure, loopback) = (port_of(&said, "nbds://"), port_of(&said, "nbd://127"));

    let uri = |port| format!("nbds://localhost:{port}/disk?tls-certificates={user}");
    for port in [secure, loopback] {
        assert_eq!(
            support::run(Command::new("nbdinfo").args(["--size", &uri(port)])).trim(),
            SIZE.to_string()
        );
    }
    let object = format!("tls-creds-x509,id=tls0,endpoint=client,dir={user}");
    let image = format!(
        "driver=nbd,server.type=inet,server.host=127.0.0.1,server.port={secure},export=disk,tls-creds=tls0"
    );
    let reference = format!("driver=raw,file.driver=file,file.filename={}", raw.display());
    support::run(Command::new("qemu-img").args([
        "compare",
        "--object",
        &object,
        "--image-opts",
        &image,
        &reference,
    ]));

    let plain =
        |port| Command::new("nbdinfo").args(["--size", &format!("nbd://localhost:{port}/disk")]).output();
    assert!(plain(loopback).unwrap().status.success(), "on loopback TLS is offered only");
    assert!(!plain(secure).unwrap().status.success(), "a client without TLS was served beyond loopback");
    let stranger = folder("stranger");
    store.run(["ca", "--ca-dir", &folder("other"), "init"]);
    store.run(["ca", "--ca-dir", &folder("other"), "issue", "n1", "--out", &stranger]);
    let theirs = format!("nbds://localhost:{secure}/disk?tls-certificates={stranger}");
    assert!(!Command::new("nbdinfo").args(["--size", &theirs]).output().unwrap().status.success());
    assert!(serve.terminate(std::time::Duration::from_secs(10)).success(), "{}", serve.said());
}
