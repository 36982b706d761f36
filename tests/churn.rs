//! VMs that come and go on one daemon, all the time and side by side: nobody is kept waiting for ever.
//!
//! 30 of each of four; more of them are `BOOTCACHE_ROUNDS=1500` (`make soak`).

#![allow(clippy::unwrap_used, reason = "a test program")]

mod nodes;
mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bootcache::control::{Client, Reply, Request};
use bootcache::serve::CONTROL_SOCKET;
use bootcache_nbd::client::{Address, Client as NbdClient, Policy};
use nodes::{Node, Sample};
use support::store::Store;

/// Longest that any step may take: a guest that starts waits for several of them.
const STEP: Duration = Duration::from_secs(20);
/// VMs at a time.
const VMS: u64 = 4;

#[track_caller]
fn step<T>(what: &str, work: impl Future<Output = T>) -> impl Future<Output = T> {
    let at = std::panic::Location::caller();
    async move {
        tokio::time::timeout(STEP, work).await.unwrap_or_else(|_| panic!("{what} hangs, line {}", at.line()))
    }
}

async fn call(store: &Path, request: &Request) -> Reply {
    let work = async { Client::connect(&store.join(CONTROL_SOCKET)).await.unwrap().call(request).await };
    step(&format!("{request:?}"), work).await.unwrap_or_else(|error| panic!("{request:?}: {error}"))
}

/// One VM after another, each with the disk of an agent's: opened, read and written as by QEMU, and removed.
async fn guests(store: PathBuf, sample: Arc<Sample>, number: u64, rounds: u64) {
    let mut seed = number;
    let mut random = move |below: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % below
    };
    let blocks = sample.disk.len() as u64 / 4096 - 8;
    for round in 0..rounds {
        let name: bootcache::name::HostName = format!("vm-{number}-{round}").parse().unwrap();
        call(&store, &Request::OverlayCreate { image: sample.name.clone(), name: name.clone(), size: None })
            .await;
        let opened = call(&store, &Request::VmOpen { name: name.clone(), owner: None }).await;
        let Reply::Vm(vm) = opened else { panic!("another answer: {opened:?}") };
        let connect = NbdClient::connect(Address::Unix(vm.socket), &vm.export, Policy::default());
        let guest = step("connect", connect).await.unwrap();
        let first = step("the first read", guest.read(0, 512)).await.unwrap();
        assert!(first == sample.bytes(0, 512));
        for _ in 0..random(40) {
            let offset = random(blocks) * 4096;
            match random(4) {
                0 => step("write", guest.write(offset, &[7; 8192], random(2) == 0)).await.unwrap(),
                1 => step("flush", guest.flush()).await.unwrap(),
                _ => drop(step("read", guest.read(offset, 16384)).await.unwrap()),
            }
        }
        // One that is killed does not say that it goes.
        match random(2) {
            0 => step("close", guest.close()).await,
            _ => drop(guest),
        }
        call(&store, &Request::VmClose { name: name.clone() }).await;
        // The loss of a connection is noticed a little later.
        let gone = async {
            loop {
                let remove = Request::OverlayRemove { name: name.clone() };
                let mut client = Client::connect(&store.join(CONTROL_SOCKET)).await.unwrap();
                if client.call(&remove).await.is_ok() {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        step("the removal", gone).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn vms_that_come_and_go_side_by_side_are_kept_waiting_by_nobody() {
    let rounds = u64::from(support::rounds(30));
    let sample = Arc::new(Sample::new(32 << 20, 77));
    let origin = Node::origin(&sample, None).await;
    let store = Store::new();
    let _daemon = store.serve([""; 0]);
    let pull = Request::Pull {
        name: sample.name.clone(),
        root: None,
        boot: bootcache::transfer::Pin::Any,
        sources: vec![origin.address],
        fill: true,
        fill_rate: 0,
    };
    call(&store.path(), &pull).await;
    let guests =
        (0..VMS).map(|number| tokio::spawn(guests(store.path(), Arc::clone(&sample), number, rounds)));
    let guests = futures_util::future::join_all(guests);
    let asking = async {
        loop {
            call(&store.path(), &Request::Status).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::select! {
        done = guests => done.into_iter().for_each(|result| result.unwrap()),
        () = asking => {}
    }
}
