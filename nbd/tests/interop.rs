//! Foreign clients against our server: libnbd's tools, QEMU's, and the `nbd` crate's blocking client.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use bootcache_nbd::layers::{FileDisk, MemoryDisk};
use bootcache_nbd::{Export, Limits, Server, SharedDisk, Tls};
use rustix::fs::{FallocateFlags, fallocate};
use tokio::net::{TcpListener, UnixListener};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

const SIZE: usize = 16 << 20;

/// A server in this process, in a folder of its own.
struct Bench {
    dir: tempfile::TempDir,
    content: Vec<u8>,
    port: u16,
    cancel: CancellationToken,
    _runtime: Runtime,
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

/// Data, a hole, data, zeroes that are written, data.
fn content() -> Vec<u8> {
    let mut bytes = vec![0; SIZE];
    let mut state = 7_u64;
    for range in [0..3 << 20, 5 << 20..6 << 20, (10 << 20) + 512..(16 << 20) - 100] {
        for byte in &mut bytes[range] {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *byte = state.to_be_bytes()[0];
        }
    }
    bytes
}

impl Bench {
    fn new(kind: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let content = content();
        let raw = dir.path().join("disk.raw");
        std::fs::write(&raw, &content).unwrap();
        let file = std::fs::File::options().write(true).open(&raw).unwrap();
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&file, hole, 3 << 20, 2 << 20).unwrap();
        let disk: SharedDisk = match kind {
            "file" => Arc::new(FileDisk::open(&raw, false).unwrap()),
            _ => Arc::new(MemoryDisk::from(content.clone())),
        };
        std::fs::write(dir.path().join("reference.raw"), &content).unwrap();
        let runtime = Runtime::new().unwrap();
        let cancel = CancellationToken::new();
        let server = Server::new(Arc::new(Export::new("disk", disk)), Limits::default(), Tls::Off);
        let port = runtime.block_on(async {
            let unix = UnixListener::bind(dir.path().join("nbd.sock")).unwrap();
            let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = tcp.local_addr().unwrap().port();
            let (other, until, also) = (server.clone(), cancel.clone(), cancel.clone());
            tokio::spawn(async move { server.serve_unix(unix, until).await });
            tokio::spawn(async move { other.serve_tcp(tcp, also).await });
            port
        });
        Self { dir, content, port, cancel, _runtime: runtime }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.path("nbd.sock").display())
    }

    fn tcp(&self) -> String {
        format!("nbd://127.0.0.1:{}/disk", self.port)
    }
}

/// Runs a tool to its end; it must succeed. Returns what it printed.
fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new("timeout").args(["60", program]).args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {}\n{text}{errors}", output.status);
    text
}

/// Whether a tool is here. A missing one is a skip for people, and an error in CI.
fn have(program: &str) -> bool {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&paths).any(|dir| dir.join(program).is_file());
    assert!(found || std::env::var_os("CI").is_none(), "{program} is missing, and this is CI");
    if !found {
        eprintln!("SKIPPED: {program} is not installed");
    }
    found
}

/// What nbdinfo answers to a question by its status: 0 is yes, 2 is no.
fn holds(question: &[&str]) -> bool {
    let output = Command::new("timeout").args(["60", "nbdinfo"]).args(question).output().unwrap();
    match output.status.code() {
        Some(0) => true,
        Some(2) => false,
        _ => panic!("nbdinfo {question:?}: {}", String::from_utf8_lossy(&output.stderr)),
    }
}

fn same_file(a: &Path, b: &[u8]) -> bool {
    std::fs::read(a).unwrap() == b
}

#[test]
fn nbdinfo_finds_everything_that_is_promised() {
    if !have("nbdinfo") {
        return;
    }
    for kind in ["file", "memory"] {
        let bench = Bench::new(kind);
        for question in [
            "connect",
            "df",
            "flush",
            "fua",
            "multi-conn",
            "trim",
            "zero",
            "read",
            "write",
            "structured-reply",
        ] {
            run("nbdinfo", &["--can", question, &bench.uri()]);
        }
        for (question, yes) in [("cache", kind == "file"), ("fast-zero", kind == "file")] {
            assert_eq!(holds(&["--can", question, &bench.uri()]), yes, "{kind}: --can {question}");
        }
        for question in ["read-only", "rotational", "tls"] {
            assert!(!holds(&["--is", question, &bench.uri()]), "{kind}: --is {question}");
        }
        let contexts = run("nbdinfo", &["--json", &bench.uri()]);
        assert!(contexts.contains("base:allocation"), "{contexts}");
        assert_eq!(run("nbdinfo", &["--size", &bench.tcp()]).trim(), SIZE.to_string());
        let map = run("nbdinfo", &["--map", &bench.uri()]);
        let total: u64 =
            map.lines().map(|line| line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()).sum();
        assert_eq!(total, SIZE as u64, "{map}");
        // One export without a list: whoever does not know the name learns nothing.
        let list = run("nbdinfo", &["--list", &format!("nbd://127.0.0.1:{}", bench.port)]);
        assert!(!list.contains("export="), "{list}");
    }
}

#[test]
fn nbdcopy_copies_both_ways_whatever_its_connections_and_requests() {
    if !have("nbdcopy") {
        return;
    }
    for kind in ["file", "memory"] {
        for (connections, size) in [("1", "262144"), ("4", "4096"), ("8", "33554432")] {
            let bench = Bench::new(kind);
            let (out, back) = (bench.path("out.raw"), bench.path("back.raw"));
            let options = [&format!("--connections={connections}"), &format!("--request-size={size}")];
            run("nbdcopy", &[options[0], options[1], &bench.uri(), out.to_str().unwrap()]);
            assert!(same_file(&out, &bench.content), "{kind} {connections} {size}");
            let mut changed = bench.content.clone();
            changed.rotate_left(4096 * 3 + 17);
            std::fs::write(&out, &changed).unwrap();
            run("nbdcopy", &[options[0], options[1], "--flush", out.to_str().unwrap(), &bench.uri()]);
            run("nbdcopy", &[&bench.tcp(), back.to_str().unwrap()]);
            assert!(same_file(&back, &changed), "{kind} {connections} {size}");
        }
    }
}

#[test]
fn qemu_s_tools_read_write_map_and_compare() {
    if !have("qemu-img") || !have("qemu-io") {
        return;
    }
    for kind in ["file", "memory"] {
        let bench = Bench::new(kind);
        let reference = bench.path("reference.raw");
        run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &bench.uri(), reference.to_str().unwrap()]);
        let map = run("qemu-img", &["map", "--output=json", &bench.uri()]);
        assert!(map.contains("\"length\""), "{map}");
        run("qemu-img", &["bench", "-c", "2000", "-d", "32", "-f", "raw", &bench.uri()]);
        let qcow2 = bench.path("copy.qcow2");
        run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &bench.tcp(), qcow2.to_str().unwrap()]);
        run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", qcow2.to_str().unwrap(), &bench.uri()]);
        let script = [
            "write -P 0x55 1000 70000",
            "read -P 0x55 1000 70000",
            "write -z 8k 64k",
            "read -P 0 8k 64k",
            "write -zu 1M 1M",
            "read -P 0 1M 1M",
            "write -f -P 3 2M 300k",
            "read -P 3 2M 300k",
            "discard 3M 1M",
            "flush",
            "aio_write -P 9 4M 1M",
            "aio_flush",
            "read -P 9 4M 1M",
        ];
        let mut arguments = vec!["-f", "raw"];
        for command in &script {
            arguments.extend(["-c", command]);
        }
        let uri = bench.uri();
        arguments.push(&uri);
        let output = run("qemu-io", &arguments);
        assert!(!output.contains("Pattern verification failed"), "{output}");
    }
}

#[test]
fn libnbd_s_shell_uses_structured_replies_and_block_status() {
    let python = "/usr/bin/python3";
    let module = Command::new(python).args(["-c", "import nbd"]).status();
    if !module.is_ok_and(|status| status.success()) {
        assert!(std::env::var_os("CI").is_none(), "python3-libnbd is missing, and this is CI");
        eprintln!("SKIPPED: python3-libnbd is not installed");
        return;
    }
    let script = r#"
import nbd, sys
h = nbd.NBD()
h.set_strict_mode(0)
# libnbd asks for extended headers since 1.18.
extended = hasattr(h, "get_extended_headers_negotiated")
h.add_meta_context("base:allocation")
h.connect_uri(sys.argv[1])
assert not extended or h.get_extended_headers_negotiated()
assert h.get_structured_replies_negotiated() and h.can_meta_context("base:allocation")
reference = open(sys.argv[2], "rb").read()
size = h.get_size()
assert h.pread(size, 0) == reference
chunks = []
def chunk(data, offset, kind, error):
    chunks.append((offset, len(data), kind))
assert h.pread_structured(size, 0, chunk) == reference
assert any(kind == nbd.READ_HOLE for _, _, kind in chunks), chunks
chunks.clear()
h.pread_structured(100000, 5000, chunk, nbd.CMD_FLAG_DF)
assert len(chunks) == 1, chunks
extents = []
def extent(context, offset, entries, error):
    extents.extend(entries[0::2])
h.block_status(size, 0, extent)
assert sum(extents) == size, extents
extents.clear()
h.block_status(size, 0, extent, nbd.CMD_FLAG_REQ_ONE)
assert len(extents) == 1 and extents[0] <= size
h.pwrite(b"x" * 777, 123, nbd.CMD_FLAG_FUA)
h.zero(8192, 4096, nbd.CMD_FLAG_NO_HOLE)
if h.can_fast_zero():
    h.zero(65536, 4096, nbd.CMD_FLAG_FAST_ZERO)
if h.can_cache():
    h.cache(1 << 20, 0)
h.trim(1 << 20, 1 << 20)
h.flush()
assert h.pread(777, 123) == b"x" * 777 and h.pread(8192, 4096) == bytes(8192)
for bad in (lambda: h.pread(10, size - 5), lambda: h.pwrite(b"y" * 10, size - 5), lambda: h.pread(4, 1 << 63 - 1)):
    try:
        bad()
    except nbd.Error:
        continue
    raise SystemExit("a request out of bounds was answered")
assert h.pread(1, 0)
h.shutdown()
"#;
    for kind in ["file", "memory"] {
        let bench = Bench::new(kind);
        run(python, &["-c", script, &bench.uri(), bench.path("reference.raw").to_str().unwrap()]);
    }
}

#[test]
fn the_blocking_client_of_the_nbd_crate_reads_and_writes() {
    use std::io::{Read, Seek, SeekFrom, Write};
    for kind in ["file", "memory"] {
        let bench = Bench::new(kind);
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", bench.port)).unwrap();
        stream.set_nodelay(true).unwrap();
        let export = nbd::client::handshake(&mut stream, b"disk").unwrap();
        assert_eq!(export.size, SIZE as u64);
        let mut client = nbd::client::NbdClient::new(&mut stream, &export);
        let mut buffer = vec![0; 10_000];
        client.seek(SeekFrom::Start(1234)).unwrap();
        client.read_exact(&mut buffer).unwrap();
        assert_eq!(buffer, &bench.content[1234..11_234]);
        client.seek(SeekFrom::Start(5000)).unwrap();
        client.write_all(b"written").unwrap();
        client.seek(SeekFrom::Start(4999)).unwrap();
        client.read_exact(&mut buffer[..8]).unwrap();
        assert_eq!(&buffer[1..8], b"written");
    }
}
