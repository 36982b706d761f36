//! An increment over a link of 100 Mbit/s: beside its base it costs the network what it adds, without it everything.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::fs;
use std::process::Command;

use support::net::{Net, Rate};
use support::process::Process;
use support::store::Store;

const MIB: u64 = 1 << 20;
/// Of the base, which is noise and so is not compressed.
const DATA: u64 = 24 * MIB;
/// Of what a VM writes, in the middle of it.
const WRITTEN: u64 = 2 * MIB;
/// Digests, descriptions, and what headers and acknowledgements of packets come to.
const BESIDES: u64 = 256 << 10;

/// The origin, on host 0; the others pull from it.
const PEER: &str = "10.77.0.1:4600";

#[test]
fn an_increment_costs_the_link_what_it_adds_where_its_base_is_and_everything_elsewhere() {
    if !support::require_root() || !support::require(&["qemu-io", "tc"]) {
        return;
    }
    let net = Net::new(3, Rate::Megabits(100));
    let origin = Store::new();
    let raw = origin.beside("base.raw");
    fs::write(&raw, support::noise(5, usize::try_from(DATA).unwrap())).unwrap();
    origin.run(["image", "add", "base", raw.to_str().unwrap(), "--format", "raw"]);
    let serve = origin.command(["serve", "--plain", "--peer-listen", PEER]);
    let serve = Process::start(&mut net.on(0, &serve));
    serve.wait_for("ready", std::time::Duration::from_secs(20));
    origin.run(["overlay", "create", "base", "vm"]);
    let written = origin.beside("written.raw");
    fs::write(&written, support::noise(6, usize::try_from(WRITTEN).unwrap())).unwrap();
    let write = format!("write -s {} {} {WRITTEN}", written.display(), 8 * MIB);
    support::run(Command::new("qemu-io").args(["-f", "raw", "-c", &write, "-c", "flush", &origin.uri("vm")]));
    origin.run(["overlay", "commit", "vm", "increment"]);
    let expected = exported(&origin);

    let pull = |host: usize, store: &Store, image: &str| {
        let (_, before) = net.traffic(host);
        support::run(&mut net.on(host, &store.command(["pull", image, "--plain", "--from", PEER])));
        net.traffic(host).1 - before
    };
    let beside = Store::new();
    let base = pull(1, &beside, "base");
    assert!(base > DATA, "{base} bytes for the base");
    let increment = pull(1, &beside, "increment");
    let alone = Store::new();
    let both = pull(2, &alone, "increment");
    println!("base {base} bytes, increment {increment} beside it, {both} without it; it adds {WRITTEN}");
    assert!(increment > WRITTEN && increment < WRITTEN + WRITTEN / 10 + BESIDES, "{increment} bytes");
    assert!(both > DATA && both < DATA + DATA / 10 + BESIDES, "{both} bytes");
    for store in [&beside, &alone] {
        store.run(["image", "verify", "increment"]);
        assert!(exported(store) == expected, "the increment is another disk there");
        // Here it is a whole disk, base or no base, which the tracer sees too.
        for via in ["preload", "nbd"] {
            let record = ["record", "increment", "--runs", "1", "--until", "exit", "--via", via, "--"];
            let read = "if [ -e '{disk}' ]; then head -c 1M '{disk}'; else qemu-io -r -f raw -c 'read 0 1M' '{disk}'; fi";
            store.run(record.into_iter().chain(["sh", "-c", read]));
        }
    }
}

fn exported(store: &Store) -> Vec<u8> {
    let whole = store.beside("whole.raw");
    store.run(["image", "export", "increment", whole.to_str().unwrap()]);
    fs::read(whole).unwrap()
}
