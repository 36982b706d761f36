//! The ways to boot: what each sets up before the clock starts, and what a node then does because of this boot.
//!
//! A user would have servers at the origin, a compressed copy and daemons on the nodes set up long before; so they are
//! here. Rivals run as their manuals advise; the command lines are written down and printed with the results.

mod ours;
mod rivals;

use super::boot::Prepared;
use super::drive::Drive;
use super::lab::{Lab, Server};

/// What a way moves over the origin's link, roughly: to say how long a table will take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Moves {
    Nothing,
    /// The compressed stream, once for all nodes.
    Stream,
    /// The compressed stream to every node.
    StreamEach,
    /// What the boot reads, to every node.
    ReadsEach,
    /// All data of the disk.
    Disk,
    /// The same, compressed.
    DiskCompressed,
}

/// A way to boot.
pub(crate) struct Way {
    pub(crate) name: &'static str,
    pub(crate) moves: Moves,
    /// More nodes would not tell anything else.
    pub(crate) one_node: bool,
    pub(crate) prepare: fn(&Lab) -> Prepared,
}

const fn way(name: &'static str, moves: Moves, prepare: fn(&Lab) -> Prepared) -> Way {
    Way { name, moves, one_node: false, prepare }
}

const fn lone(name: &'static str, moves: Moves, prepare: fn(&Lab) -> Prepared) -> Way {
    Way { name, moves, one_node: true, prepare }
}

/// The way that others are compared with.
pub(crate) const LOCAL: &str = "local";
/// A node that has all of the image: what the server and the overlay cost.
pub(crate) const HAS_IMAGE: &str = "bootcache, has image";
/// The way that this is about: a node that has nothing.
pub(crate) const BOOTCACHE: &str = "bootcache";
/// One of several nodes sends at a tenth of its link's rate.
pub(crate) const SLOW_NODE: &str = "bootcache, a slow node";

/// All ways, the one to compare with first.
pub(crate) const WAYS: [Way; 18] = [
    way(LOCAL, Moves::Nothing, rivals::local),
    way(HAS_IMAGE, Moves::Nothing, ours::present),
    way(BOOTCACHE, Moves::Stream, ours::nothing),
    way("bootcache, relay off", Moves::StreamEach, ours::no_relay),
    way("bootcache, two sources", Moves::Stream, ours::second_source),
    way("bootcache, booted once", Moves::Nothing, ours::booted),
    way(SLOW_NODE, Moves::Stream, ours::slow_node),
    way("qemu-nbd", Moves::ReadsEach, rivals::qemu_nbd),
    way("nbdkit", Moves::ReadsEach, rivals::nbdkit),
    way("nbdkit on node", Moves::ReadsEach, |lab| rivals::nbdkit_on_node(lab, &[], &[])),
    way("nbdkit readahead", Moves::ReadsEach, |lab| {
        rivals::nbdkit_on_node(lab, &["--filter=readahead"], &[])
    }),
    way("nbdkit cache+readahead", Moves::ReadsEach, |lab| {
        rivals::nbdkit_on_node(lab, &["--filter=cache", "--filter=readahead"], &["cache-on-read=true"])
    }),
    way("nbdkit cow-on-read", Moves::ReadsEach, |lab| {
        rivals::nbdkit_on_node(lab, &["--filter=cow"], &["cow-on-read=true"])
    }),
    lone("qcow2 copy-on-read", Moves::ReadsEach, rivals::qcow2_copy_on_read),
    lone("NFS", Moves::ReadsEach, rivals::nfs),
    lone("copy: zstd over HTTP", Moves::DiskCompressed, rivals::zstd_http),
    lone("copy: nbdcopy", Moves::Disk, rivals::nbdcopy),
    lone("copy: qemu-img", Moves::Disk, rivals::qemu_img),
];

/// Ways by names: those of exactly this name, else those with it in theirs; all for none. The local boot always.
pub(crate) fn chosen(names: &[String], nodes: usize) -> Vec<&'static Way> {
    let is_name = |part: &String| WAYS.iter().any(|way| way.name == *part);
    let meant = |way: &Way| {
        let by = |part: &String| {
            if is_name(part) { way.name == *part } else { way.name.contains(part.as_str()) }
        };
        if names.is_empty() { way.name != SLOW_NODE } else { names.iter().any(by) }
    };
    WAYS.iter().filter(|way| way.name == LOCAL || (meant(way) && (nodes == 1 || !way.one_node))).collect()
}

fn without_servers(fetch: impl Fn(&Lab, usize) -> Drive + Sync + 'static) -> Prepared {
    with_servers(Vec::new(), fetch)
}

fn with_servers(servers: Vec<Server>, fetch: impl Fn(&Lab, usize) -> Drive + Sync + 'static) -> Prepared {
    Prepared { servers, fetch: Box::new(fetch), stores: Vec::new() }
}

fn text(path: &std::path::Path) -> &str {
    path.to_str().expect("our own path")
}
