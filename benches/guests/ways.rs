//! The ways to boot: one function each, from the state it assumes to the guest's report.
//!
//! Host 0 of the net is the origin, host 1 the node that boots. What a user would have set up before (servers at the
//! origin, a compressed copy) is set up before the clock starts; what happens because of this boot is timed.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use super::support::guest::{nbd_drive, wait_for_boot};
use super::support::net::Net;
use super::support::process::Process;
use super::support::store::Store;

/// One boot.
pub(crate) struct Boot {
    pub(crate) seconds: f64,
    /// What came over the node's link, both directions, headers included.
    pub(crate) wire_bytes: u64,
}

/// A way to boot.
pub(crate) struct Way {
    pub(crate) name: &'static str,
    pub(crate) boot: fn(&mut Bench) -> Boot,
}

/// All ways, the one to compare with first.
pub(crate) const WAYS: [Way; 8] = [
    Way { name: "local", boot: local },
    Way { name: "bootcache-present", boot: bootcache_present },
    Way { name: "qemu-nbd", boot: qemu_nbd },
    Way { name: "nbdkit-node", boot: |bench| nbdkit_node(bench, &[], &[]) },
    Way { name: "nbdkit-node-readahead", boot: |bench| nbdkit_node(bench, &["--filter=readahead"], &[]) },
    Way {
        name: "nbdkit-node-cow-on-read",
        boot: |bench| nbdkit_node(bench, &["--filter=cow"], &["cow-on-read=true"]),
    },
    Way { name: "nbdcopy-then-boot", boot: nbdcopy_then_boot },
    Way { name: "zstd-http-then-boot", boot: zstd_http_then_boot },
];

/// What the ways share.
pub(crate) struct Bench {
    net: Net,
    /// The golden raw disk.
    raw: PathBuf,
    folder: tempfile::TempDir,
    /// A store that has the whole image, served; made by the first way that wants it.
    present: Option<(Store, Process)>,
    overlays: u32,
}

impl Bench {
    pub(crate) fn new(net: Net, raw: PathBuf) -> Self {
        let folder =
            tempfile::Builder::new().prefix("bootcache-bench-").tempdir().expect("a temporary folder");
        Self { net, raw, folder, present: None, overlays: 0 }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs `fetch` and boots from the drive that it gives, on the clock.
    fn time(&self, fetch: impl FnOnce(&Net) -> String) -> Boot {
        let traffic = || self.net.traffic(1).0 + self.net.traffic(1).1;
        let before = traffic();
        let began = Instant::now();
        let drive = fetch(&self.net);
        let mut guest = Command::new("qemu-system-x86_64");
        guest
            .args([
                "-accel", "tcg", "-m", "512", "-smp", "1", "-display", "none", "-monitor", "none", "-nic",
                "none",
            ])
            .args(["-no-reboot", "-serial", "stdio", "-drive", &format!("if=virtio,{drive}")]);
        let guest = Process::start(&mut self.net.on(1, &guest));
        wait_for_boot(&guest);
        let seconds = began.elapsed().as_secs_f64();
        drop(guest);
        Boot { seconds, wire_bytes: traffic() - before }
    }

    /// Starts a server on a host and gives it a moment to listen.
    fn server(&self, host: usize, program: &str, arguments: &[&str]) -> Process {
        let server = Process::start(&mut self.net.on(host, Command::new(program).args(arguments)));
        std::thread::sleep(Duration::from_millis(300));
        server
    }

    fn origin(&self) -> String {
        self.net.address(0).to_string()
    }

    fn raw(&self) -> &str {
        self.raw.to_str().expect("our own path")
    }
}

fn raw_drive(path: &Path) -> String {
    format!("file={},format=raw", path.display())
}

/// A raw file of its own on the node's disk.
fn local(bench: &mut Bench) -> Boot {
    let disk = bench.file("local.raw");
    super::support::run(Command::new("cp").arg("--sparse=always").arg(&bench.raw).arg(&disk));
    bench.time(|_| raw_drive(&disk))
}

/// Our export with every block present: what overlay and NBD cost.
fn bootcache_present(bench: &mut Bench) -> Boot {
    let raw = bench.raw.clone();
    let (store, _serve) = bench.present.get_or_insert_with(|| {
        let store = Store::new();
        store.run(["image".as_ref(), "add".as_ref(), "golden".as_ref(), raw.as_os_str()]);
        let serve = store.serve([""; 0]);
        (store, serve)
    });
    bench.overlays += 1;
    let overlay = format!("vm-{}", bench.overlays);
    store.run(["overlay", "create", "golden", &overlay]);
    let drive = nbd_drive(&store.path().join("nbd.sock"), &overlay);
    bench.time(|_| drive)
}

/// QEMU straight to qemu-nbd at the origin; its writes go to a snapshot on the node.
fn qemu_nbd(bench: &mut Bench) -> Boot {
    let origin = bench.origin();
    let arguments =
        ["--read-only", "-f", "raw", "--persistent", "--shared=4", "-b", &origin, "-p", "10809", bench.raw()];
    let _server = bench.server(0, "qemu-nbd", &arguments);
    bench.time(|_| format!("driver=raw,snapshot=on,file.driver=nbd,file.server.type=inet,file.server.host={origin},file.server.port=10809"))
}

/// nbdkit on the node in front of nbdkit at the origin, with filters on the node.
fn nbdkit_node(bench: &mut Bench, filters: &[&str], parameters: &[&str]) -> Boot {
    let origin = bench.origin();
    let socket = bench.file("nbdkit.sock");
    let _origin = bench.server(0, "nbdkit", &["-f", "-r", "-i", &origin, "-p", "10809", "file", bench.raw()]);
    let (at, hostname) = (socket.to_str().expect("our own path"), format!("hostname={origin}"));
    let mut arguments = vec!["-f", "-r", "-U", at];
    arguments.extend(filters);
    arguments.extend(["nbd", &hostname, "port=10809"]);
    arguments.extend(parameters);
    let node = bench.server(1, "nbdkit", &arguments);
    let boot = bench.time(|_| {
        format!("driver=raw,snapshot=on,file.driver=nbd,file.server.type=unix,file.server.path={at}")
    });
    drop(node);
    let _left_by_the_kill = std::fs::remove_file(&socket);
    boot
}

/// The whole disk first, its holes skipped.
fn nbdcopy_then_boot(bench: &mut Bench) -> Boot {
    let origin = bench.origin();
    let disk = bench.file("copied.raw");
    let _server = bench.server(0, "nbdkit", &["-f", "-r", "-i", &origin, "-p", "10809", "file", bench.raw()]);
    let boot = bench.time(|net| {
        super::support::run(
            &mut net.on(1, Command::new("nbdcopy").arg(format!("nbd://{origin}")).arg(&disk)),
        );
        raw_drive(&disk)
    });
    std::fs::remove_file(&disk).expect("it was copied");
    boot
}

/// The whole disk first, compressed beforehand, over HTTP.
fn zstd_http_then_boot(bench: &mut Bench) -> Boot {
    let origin = bench.origin();
    let (compressed, disk) = (bench.file("golden.zst"), bench.file("unpacked.raw"));
    if !compressed.exists() {
        super::support::run(Command::new("zstd").args(["-q", "-3", bench.raw(), "-o"]).arg(&compressed));
    }
    let folder = bench.folder.path().to_str().expect("our own path").to_owned();
    let _server = bench.server(
        0,
        "/usr/bin/python3",
        &["-m", "http.server", "8080", "--bind", &origin, "--directory", &folder],
    );
    let boot = bench.time(|net| {
        let fetch = format!(
            "curl -sf http://{origin}:8080/golden.zst | zstd -dcq --sparse -f -o {} -",
            disk.display()
        );
        super::support::run(&mut net.on(1, Command::new("bash").args(["-o", "pipefail", "-c", &fetch])));
        raw_drive(&disk)
    });
    std::fs::remove_file(&disk).expect("it was unpacked");
    boot
}
