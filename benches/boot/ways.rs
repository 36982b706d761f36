//! The ways to boot: what each sets up before the clock starts, and what a node then does because of this boot.
//!
//! A user would have servers at the origin, a compressed copy and daemons on the nodes set up long before; so they are
//! here. Rivals run as their manuals advise; their command lines are these.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::boot::{Drive, Prepared};
use super::lab::{Lab, Server};
use super::support;

/// A way to boot.
pub(crate) struct Way {
    pub(crate) name: &'static str,
    /// Where nothing but one node can be, or would not tell anything else.
    pub(crate) one_node: bool,
    /// QEMU has to do it itself.
    pub(crate) guest_only: bool,
    pub(crate) prepare: fn(&Lab) -> Prepared,
}

const fn way(name: &'static str, prepare: fn(&Lab) -> Prepared) -> Way {
    Way { name, one_node: false, guest_only: false, prepare }
}

/// All ways, the one to compare with first.
pub(crate) const WAYS: [Way; 15] = [
    way("local", local),
    way("bootcache, image present", |lab| ours(lab, Before::Present)),
    way("bootcache", |lab| ours(lab, Before::Nothing)),
    way("bootcache, relay off", |lab| ours(lab, Before::NoRelay)),
    way("bootcache, second source", |lab| ours(lab, Before::SecondSource)),
    way("bootcache, booted before", |lab| ours(lab, Before::Booted)),
    way("QEMU to qemu-nbd", qemu_nbd),
    way("QEMU to nbdkit", nbdkit),
    way("nbdkit on node", |lab| nbdkit_node(lab, &[], &[])),
    way("nbdkit cache+readahead", |lab| {
        nbdkit_node(lab, &["--filter=cache", "--filter=readahead"], &["cache-on-read=true"])
    }),
    way("nbdkit cow-on-read", |lab| nbdkit_node(lab, &["--filter=cow"], &["cow-on-read=true"])),
    Way { name: "qcow2 copy-on-read", one_node: true, guest_only: true, prepare: qcow2_copy_on_read },
    Way { name: "zstd over HTTP, then boot", one_node: true, guest_only: false, prepare: zstd_http },
    Way { name: "nbdcopy, then boot", one_node: true, guest_only: false, prepare: nbdcopy },
    Way { name: "qemu-img, then boot", one_node: true, guest_only: false, prepare: qemu_img },
];

fn text(path: &Path) -> &str {
    path.to_str().expect("our own path")
}

fn without_servers(fetch: impl Fn(&Lab, usize) -> Drive + Sync + 'static) -> Prepared {
    Prepared { servers: Vec::new(), fetch: Box::new(fetch), stores: Vec::new() }
}

fn with_servers(servers: Vec<Server>, fetch: impl Fn(&Lab, usize) -> Drive + Sync + 'static) -> Prepared {
    Prepared { servers, fetch: Box::new(fetch), stores: Vec::new() }
}

/// A raw file of its own on each node's disk.
fn local(lab: &Lab) -> Prepared {
    let copies: Vec<PathBuf> = (0..=lab.nodes)
        .map(|node| {
            let path = lab.folder().join(format!("local-{node}.raw"));
            support::run(Command::new("cp").arg("--sparse=always").arg(&lab.raw).arg(&path));
            path
        })
        .collect();
    without_servers(move |_, node| Drive::Raw(copies[node].clone()))
}

/// What a node of ours has when the clock starts.
#[derive(Clone, Copy, PartialEq)]
enum Before {
    /// The whole image.
    Present,
    /// An empty store and a daemon.
    Nothing,
    /// The same, and nobody fetches from a node.
    NoRelay,
    /// The same as nothing, but another node has the whole image.
    SecondSource,
    /// The boot set: a VM has booted there before, and the daemon was restarted.
    Booted,
}

fn ours(lab: &Lab, before: Before) -> Prepared {
    let golden = lab.daemon(0, &lab.golden, true);
    let mut servers = vec![golden];
    let relays = before != Before::NoRelay;
    let from = lab.peer(0);
    let mut used = Vec::new();
    let stores: Vec<PathBuf> = (1..=lab.nodes).map(|node| lab.fresh(&format!("n{node}"))).collect();
    let mut sources = vec![from.clone()];
    if before == Before::SecondSource {
        // The last host is kept for it.
        let store = lab.fresh("second");
        let second = lab.daemon(lab.nodes + 1, &store, true);
        lab.quickly(|| lab.bootcache(lab.nodes + 1, &store, &["pull", "golden", "--from", &from]));
        servers.push(Server { host: 0, ..second }); // no node that boots: its memory is not counted
        sources.push(lab.peer(lab.nodes + 1));
        used.push(store);
    }
    for (node, store) in (1..).zip(&stores) {
        std::fs::create_dir_all(store).expect("a folder of our own");
        if matches!(before, Before::Present | Before::Booted) {
            let earlier = lab.daemon(node, store, relays);
            let much: &[&str] = if before == Before::Booted { &["--boot-only"] } else { &[] };
            let pull = ["pull", "golden", "--from", &from];
            lab.quickly(|| lab.bootcache(node, store, &[&pull, much].concat()));
            drop(earlier);
        }
        servers.push(lab.daemon(node, store, relays));
    }
    let at = stores.clone();
    let fetch = move |lab: &Lab, node: usize| {
        let store = &at[node - 1];
        if before != Before::Present {
            let mut pull = vec!["pull", "golden", "--background"];
            for source in &sources {
                pull.extend(["--from", source]);
            }
            lab.bootcache(node, store, &pull);
        }
        lab.bootcache(node, store, &["overlay", "create", "golden", "vm"]);
        Drive::Unix(store.join("nbd.sock"), "vm".to_owned())
    };
    used.splice(0..0, stores);
    Prepared { servers, fetch: Box::new(fetch), stores: used }
}

/// qemu-nbd at the origin.
fn origin_qemu_nbd(lab: &Lab) -> Server {
    let origin = lab.origin();
    let arguments = ["--read-only", "-f", "raw", "--persistent", "--shared=64", "--cache=writeback"];
    let place = ["-b", &origin, "-p", "10809", text(&lab.raw)];
    lab.server(0, "qemu-nbd", &[&arguments[..], &place].concat())
}

/// QEMU straight to qemu-nbd at the origin; its writes go to a snapshot on the node.
fn qemu_nbd(lab: &Lab) -> Prepared {
    let origin = lab.origin();
    with_servers(vec![origin_qemu_nbd(lab)], move |_, _| Drive::Tcp(origin.clone()))
}

/// nbdkit at the origin.
fn origin_nbdkit(lab: &Lab) -> Server {
    lab.server(0, "nbdkit", &["-f", "-r", "-i", &lab.origin(), "-p", "10809", "file", text(&lab.raw)])
}

/// QEMU straight to nbdkit at the origin.
fn nbdkit(lab: &Lab) -> Prepared {
    let origin = lab.origin();
    with_servers(vec![origin_nbdkit(lab)], move |_, _| Drive::Tcp(origin.clone()))
}

/// nbdkit on the node in front of nbdkit at the origin, with filters on the node.
fn nbdkit_node(lab: &Lab, filters: &[&str], parameters: &[&str]) -> Prepared {
    let mut servers = vec![origin_nbdkit(lab)];
    let hostname = format!("hostname={}", lab.origin());
    let sockets: Vec<PathBuf> = (1..=lab.nodes).map(|node| lab.fresh(&format!("nbdkit-{node}"))).collect();
    for (node, socket) in (1..).zip(&sockets) {
        let mut arguments = vec!["-f", "-r", "-U", text(socket)];
        arguments.extend(filters);
        arguments.extend(["nbd", &hostname, "port=10809"]);
        arguments.extend(parameters);
        servers.push(lab.socket_server(node, socket, "nbdkit", &arguments));
    }
    with_servers(servers, move |_, node| Drive::Unix(sockets[node - 1].clone(), String::new()))
}

/// A qcow2 file on the node whose backing is qemu-nbd at the origin; what is read is kept.
fn qcow2_copy_on_read(lab: &Lab) -> Prepared {
    with_servers(vec![origin_qemu_nbd(lab)], |lab, node| {
        let overlay = lab.fresh("overlay.qcow2");
        let backing = format!("nbd://{}:10809", lab.origin());
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", &backing]).arg(&overlay);
        support::run(&mut lab.net.on(node, &create));
        Drive::Qemu(format!("file={},format=qcow2,copy-on-read=on", overlay.display()))
    })
}

/// The whole disk first, its holes skipped.
fn nbdcopy(lab: &Lab) -> Prepared {
    with_servers(vec![origin_nbdkit(lab)], |lab, node| {
        let disk = lab.folder().join("copied.raw");
        let _from_the_round_before = std::fs::remove_file(&disk);
        let mut copy = Command::new("nbdcopy");
        copy.arg(format!("nbd://{}", lab.origin())).arg(&disk);
        support::run(&mut lab.net.on(node, &copy));
        Drive::Raw(disk)
    })
}

fn qemu_img(lab: &Lab) -> Prepared {
    with_servers(vec![origin_nbdkit(lab)], |lab, node| {
        let disk = lab.folder().join("converted.raw");
        let _from_the_round_before = std::fs::remove_file(&disk);
        let mut copy = Command::new("qemu-img");
        copy.args(["convert", "-f", "raw", "-O", "raw", "-W", "-m", "16"]);
        copy.arg(format!("nbd://{}", lab.origin())).arg(&disk);
        support::run(&mut lab.net.on(node, &copy));
        Drive::Raw(disk)
    })
}

/// The whole disk first, compressed beforehand, over HTTP.
fn zstd_http(lab: &Lab) -> Prepared {
    let compressed = lab.folder().join("golden.zst");
    if !compressed.exists() {
        support::run(Command::new("zstd").args(["-q", "-3", text(&lab.raw), "-o"]).arg(&compressed));
    }
    let (origin, folder) = (lab.origin(), text(lab.folder()));
    let arguments = ["-m", "http.server", "8080", "--bind", &origin, "--directory", folder];
    let server = lab.server(0, "/usr/bin/python3", &arguments);
    with_servers(vec![server], move |lab, node| {
        let disk = lab.folder().join("unpacked.raw");
        let fetch = format!(
            "curl -sf http://{origin}:8080/golden.zst | zstd -dcq --sparse -f -o {} -",
            disk.display()
        );
        support::run(&mut lab.net.on(node, Command::new("bash").args(["-o", "pipefail", "-c", &fetch])));
        Drive::Raw(disk)
    })
}
