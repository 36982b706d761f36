//! Bootcache: a daemon at the origin and one on each node; what a node has differs.

use std::path::PathBuf;

use super::super::boot::Prepared;
use super::super::drive::Drive;
use super::super::lab::{Lab, Server};

/// What a node has when the clock starts.
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

pub(super) fn present(lab: &Lab) -> Prepared {
    prepare(lab, Before::Present)
}

pub(super) fn nothing(lab: &Lab) -> Prepared {
    prepare(lab, Before::Nothing)
}

pub(super) fn no_relay(lab: &Lab) -> Prepared {
    prepare(lab, Before::NoRelay)
}

pub(super) fn second_source(lab: &Lab) -> Prepared {
    prepare(lab, Before::SecondSource)
}

pub(super) fn booted(lab: &Lab) -> Prepared {
    prepare(lab, Before::Booted)
}

/// As nothing, but the first node sends at a tenth of its link's rate.
pub(super) fn slow_node(lab: &Lab) -> Prepared {
    let prepared = prepare(lab, Before::Nothing);
    lab.slow_down_sending(1, 10);
    prepared
}

fn prepare(lab: &Lab, before: Before) -> Prepared {
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
