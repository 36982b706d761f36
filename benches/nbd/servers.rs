//! The servers that are compared, each a process of its own.

use std::fmt;
use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bootcache_nbd::layers::FileDisk;
use bootcache_nbd::{Export, Limits, Tls};

use super::settings::Setting;
use super::support::{self, store::Store};

/// Bytes of the file that is served.
const SIZE: usize = 512 << 20;
/// Tells this program to be a server: `FILE`, and where to listen.
const SERVE: &str = "BENCH_NBD_SERVE";
const START_MAX: Duration = Duration::from_secs(20);

/// The file, and a store in which it is an image.
pub(crate) struct Disks {
    folder: PathBuf,
    raw: PathBuf,
    store: Store,
}

impl Disks {
    pub(crate) fn new(folder: &Path) -> Self {
        let raw = folder.join("disk.raw");
        let mut file = fs::File::create(&raw).expect("a file");
        for seed in 0..(SIZE >> 20) as u64 {
            file.write_all(&support::noise(seed + 1, 1 << 20)).expect("room for the disk");
        }
        file.sync_all().expect("room for the disk");
        let store = Store::new();
        store.run(["image", "add", "disk", raw.to_str().expect("UTF-8")]);
        Self { folder: folder.to_owned(), raw, store }
    }

    /// Brings what is served into the page cache: the kernel may have taken it out while others were measured.
    pub(crate) fn warm(&self, server: Server) {
        let mut files = vec![self.raw.clone()];
        if matches!(server, Server::BootcacheOverlay) {
            let images = fs::read_dir(self.store.path().join("images")).expect("a store");
            files = images.map(|image| image.expect("an image").path().join("disk")).collect();
        }
        for path in files {
            let mut file = fs::File::open(path).expect("a disk");
            std::io::copy(&mut file, &mut std::io::sink()).expect("a disk that can be read");
        }
    }
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Transport {
    Unix,
    Tcp,
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unix => "Unix",
            Self::Tcp => "TCP",
        })
    }
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Server {
    /// A server of this crate on the file, and nothing else of bootcache.
    Bootcache,
    Qemu(&'static Setting),
    Nbdkit(&'static Setting),
    /// `bootcache serve` with a fresh overlay over the image.
    BootcacheOverlay,
    /// A fresh qcow2 over the file.
    QemuOverlay(&'static Setting),
}

/// A server that listens; ends on drop.
pub(crate) struct Running {
    pub(crate) uri: String,
    pub(crate) folder: PathBuf,
    child: Child,
    after: Option<Box<dyn FnOnce()>>,
}

impl Running {
    /// User and system time of the process so far, ended threads included.
    pub(crate) fn cpu_seconds(&self) -> f64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).expect("the server runs");
        let fields: Vec<&str> = stat.rsplit(')').next().expect("a name").split_whitespace().collect();
        let ticks = |at: usize| fields[at].parse::<f64>().expect("a number");
        (ticks(11) + ticks(12)) / 100.0
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.child.wait();
        if let Some(after) = self.after.take() {
            after();
        }
    }
}

impl Server {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Bootcache | Self::BootcacheOverlay => "bootcache",
            Self::Qemu(setting) | Self::QemuOverlay(setting) | Self::Nbdkit(setting) => setting.name,
        }
    }

    pub(crate) fn start(self, disks: &Disks, transport: Transport) -> Running {
        let socket = disks.folder.join("bench.sock");
        let _ = fs::remove_file(&socket);
        let port = free_port();
        let tcp = matches!(transport, Transport::Tcp);
        let mut after: Option<Box<dyn FnOnce()>> = None;
        let mut export = "";
        let mut command = match self {
            Self::Bootcache => {
                let mut command = Command::new(std::env::current_exe().expect("a running program"));
                let place = if tcp { port.to_string() } else { socket.display().to_string() };
                command.env(SERVE, &disks.raw).env("BENCH_NBD_PLACE", place);
                command
            }
            Self::Qemu(setting) | Self::QemuOverlay(setting) => {
                let mut command = Command::new("qemu-nbd");
                command.args(["--persistent", "--shared=16"]).args(setting.options);
                if tcp {
                    command.args(["--bind=127.0.0.1", &format!("--port={port}")]);
                } else {
                    command.arg(format!("--socket={}", socket.display()));
                }
                if matches!(self, Self::Qemu(_)) {
                    command.arg("--format=raw").arg(&disks.raw);
                } else {
                    command.arg("--format=qcow2").arg(qcow2_overlay(disks));
                }
                command
            }
            Self::Nbdkit(setting) => {
                let mut command = Command::new("nbdkit");
                command.arg("--foreground").args(setting.options);
                if tcp {
                    command.args(["--ipaddr=127.0.0.1", &format!("--port={port}")]);
                } else {
                    command.arg("--unix").arg(&socket);
                }
                for word in setting.plugin {
                    command.arg(if *word == "FILE" { disks.raw.as_os_str() } else { word.as_ref() });
                }
                command
            }
            Self::BootcacheOverlay => {
                export = "bench";
                disks.store.run(["overlay", "create", "disk", export]);
                let mut command = disks.store.command(["serve", "--socket"]);
                command.arg(&socket);
                if tcp {
                    command.arg(format!("--listen=127.0.0.1:{port}"));
                }
                let mut remove = disks.store.command(["overlay", "remove", export]);
                after = Some(Box::new(move || drop(support::run(&mut remove))));
                command
            }
        };
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the server starts");
        let uri = if tcp {
            format!("nbd://127.0.0.1:{port}/{export}")
        } else {
            support::store::uri(&socket, export)
        };
        let began = Instant::now();
        let listens = || match transport {
            Transport::Unix => std::os::unix::net::UnixStream::connect(&socket).is_ok(),
            Transport::Tcp => std::net::TcpStream::connect(("127.0.0.1", port)).is_ok(),
        };
        while !listens() {
            assert!(began.elapsed() < START_MAX, "{} does not listen", self.name());
            std::thread::sleep(Duration::from_millis(20));
        }
        Running { uri, folder: disks.folder.clone(), child, after }
    }
}

fn qcow2_overlay(disks: &Disks) -> PathBuf {
    let path = disks.folder.join("overlay.qcow2");
    let _ = fs::remove_file(&path);
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).arg(&disks.raw).arg(&path);
    support::run(&mut create);
    path
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("an address").port()
}

/// Serves the file for as long as the process lives, if this process was started for that.
pub(crate) fn serve_if_told_to() -> bool {
    let (Some(file), Ok(place)) = (std::env::var_os(SERVE), std::env::var("BENCH_NBD_PLACE")) else {
        return false;
    };
    let disk = FileDisk::open(Path::new(&file), false).expect("the file can be opened");
    let server =
        bootcache_nbd::Server::new(Arc::new(Export::new("", Arc::new(disk))), Limits::default(), Tls::Off);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        if let Ok(port) = place.parse::<u16>() {
            let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await.expect("a free port");
            server.serve_tcp(listener, Default::default()).await;
        } else {
            let listener = tokio::net::UnixListener::bind(&place).expect("a free path");
            server.serve_unix(listener, Default::default()).await;
        }
    });
    true
}
