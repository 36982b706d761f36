//! Peers that lie, stall and break on bytes that a guest is waiting for.
//!
//! 50 faults in all; the full number is `BOOTCACHE_ROUNDS=500` (`make soak`). Built with `--cfg bootcache_unchecked`, which
//! keeps blocks whatever their digest, the first test must fail: `make prove-checks`.

#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails with the reason")]

mod nodes;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bootcache::peer::fault::{Fault, Faults};
use bootcache::transfer::{Engine, Kind, Options};
use nodes::{Node, Sample, SlowLink};

/// How many faults of each of the eight kinds.
fn of_each_kind() -> u64 {
    let all: u64 = std::env::var("BOOTCACHE_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(50);
    all.div_ceil(Fault::ALL.len() as u64)
}

/// Nothing but what is read; liars are forgiven at once, so that every fault meets the check.
fn forgiving(options: &mut Options) {
    options.fill = false;
    options.ban = Duration::from_millis(1);
    options.demotion = Duration::from_millis(1);
}

/// Reads absent blocks with data one after the other, checks each, until `enough`; how many it read.
async fn read_until(engine: &Engine, sample: &Sample, seed: &mut u64, enough: impl Fn() -> bool) -> u64 {
    let blocks = engine.cache().blocks() - 1;
    let mut reads = 0;
    while !enough() {
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let start = *seed >> 33;
        let unread = |block: &u64| {
            let wanted = sample.bytes(block * 4096, 4096);
            engine.cache().absent(bootcache::block::Extent::new(*block, 1)).len() == 1
                && wanted.iter().any(|byte| *byte != 0)
        };
        let block = (0..blocks).map(|step| (start + step) % blocks).find(unread);
        let block = block.expect("there is more to read than there are faults");
        let mut bytes = vec![0; 4096];
        engine.disk().read(block * 4096, &mut bytes).await.unwrap();
        assert!(bytes == sample.bytes(block * 4096, 4096), "wrong bytes in block {block}");
        reads += 1;
    }
    reads
}

/// Fetches the rest, and holds the whole file against what it should be.
async fn complete(engine: Engine, node: &Node, sample: &Sample) {
    engine.fill();
    assert!(tokio::time::timeout(Duration::from_secs(120), engine.done()).await.unwrap());
    engine.stop().await;
    assert!(node.read_file() == sample.disk);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_lie_about_bytes_that_a_guest_reads_is_found_out() {
    let mut seed = 1;
    let (mut told, mut found) = (0, 0);
    for kind in Fault::ALL.into_iter().filter(|kind| kind.is_lie()) {
        let sample = Sample::new(8 << 20, 11);
        // Every other answer is a lie, and there is nobody else to ask: the liar itself has to be asked again.
        let faults = Arc::new(Faults::new(&[kind], 2, of_each_kind()));
        let liar = Node::origin_without_boot(&sample, Some(Arc::clone(&faults))).await;
        let node = Node::empty(None).await;
        let engine = node.pull(&[liar.address], forgiving).await;
        read_until(&engine, &sample, &mut seed, || faults.done() == of_each_kind()).await;
        let lies = engine.counters().corrupt.load(Ordering::Relaxed);
        assert_eq!(lies, faults.done(), "{kind:?}");
        assert_eq!(engine.counters().bans.load(Ordering::Relaxed), lies, "{kind:?}");
        complete(engine, &node, &sample).await;
        (told, found) = (told + faults.done(), found + lies);
    }
    eprintln!("{told} lies told, {found} found out");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_lie_in_the_boot_stream_is_found_out() {
    // One frame, so that no other answer is lost with the connection when the liar is dropped.
    let sample = Sample::with_boot(2 << 20, 29, 8);
    let (mut told, mut found) = (0, 0);
    for kind in Fault::ALL.into_iter().filter(|kind| kind.is_lie() && *kind != Fault::WrongPlace) {
        for _ in 0..of_each_kind().div_ceil(4) {
            let faults = Arc::new(Faults::new(&[kind], 1, 2));
            let liar = Node::origin(&sample, Some(Arc::clone(&faults))).await;
            let node = Node::empty(None).await;
            let engine = node.pull(&[liar.address], forgiving).await;
            engine.boot_complete().await;
            for block in &sample.boot_blocks {
                let mut bytes = vec![0; 4096];
                engine.disk().read(block * 4096, &mut bytes).await.unwrap();
                assert!(bytes == sample.bytes(block * 4096, 4096), "wrong bytes in block {block}");
            }
            let lies = engine.counters().corrupt.load(Ordering::Relaxed);
            assert_eq!((lies, faults.done()), (2, 2), "{kind:?}");
            (told, found) = (told + 2, found + lies);
        }
    }
    eprintln!("{told} lies told, {found} found out");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_that_does_not_come_is_got_elsewhere() {
    let sample = Sample::new(32 << 20, 5);
    let kinds: Vec<Fault> = Fault::ALL.into_iter().filter(|kind| !kind.is_lie()).collect();
    let most = of_each_kind() * kinds.len() as u64;
    // Both sources have the faults between them: each fault of one finds the other well.
    let faults = Arc::new(Faults::new(&kinds, 23, most));
    let one = Node::origin_without_boot(&sample, Some(Arc::clone(&faults))).await;
    let other = Node::origin_without_boot(&sample, Some(Arc::clone(&faults))).await;
    let node = Node::empty(None).await;
    let engine = node.pull(&[one.address, other.address], forgiving).await;
    let began = Instant::now();
    let reads = read_until(&engine, &sample, &mut 3, || faults.done() == most).await;
    let counters = engine.counters();
    let (hedges, failovers) =
        (counters.hedges.load(Ordering::Relaxed), counters.failovers.load(Ordering::Relaxed));
    eprintln!(
        "{most} faults in {reads} reads, {:?}: {hedges} hedges, {failovers} failovers",
        began.elapsed()
    );
    assert!(hedges + failovers >= most, "{most} faults, {hedges} hedges, {failovers} failovers");
    assert!(hedges * 20 <= counters.requests.total() + 100, "{hedges} of {}", counters.requests.total());
    assert_eq!(counters.corrupt.load(Ordering::Relaxed), 0);
    complete(engine, &node, &sample).await;
}

/// An answer that came 40 ms late cost its source both connections, and everything that was asked on them.
#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_is_late_once_keeps_its_connections() {
    let sample = Sample::new(16 << 20, 31);
    let nodes =
        [Node::origin_without_boot(&sample, None).await, Node::origin_without_boot(&sample, None).await];
    let links =
        [SlowLink::new(nodes[0].address, 64 << 20).await, SlowLink::new(nodes[1].address, 64 << 20).await];
    let node = Node::empty(None).await;
    let engine = node.pull(&links.each_ref().map(|link| link.address), forgiving).await;
    let mut seed = 7;
    // Before it is known how long an answer takes, none is late.
    read_until(&engine, &sample, &mut seed, after(100)).await;
    let hedges = || engine.counters().hedges.load(Ordering::Relaxed);
    let connections = || links.each_ref().map(SlowLink::connections);
    let (before, made) = (hedges(), connections());
    // Whichever of the two is asked, every other answer or so is late.
    let mut late = Duration::from_millis(60);
    for link in links.iter().cycle().take(200) {
        if hedges() >= before + 3 {
            break;
        }
        // How late that is depends on how long answers took until now.
        if hedges() == before {
            late = (late + Duration::from_millis(4)).min(Duration::from_millis(300));
        }
        link.hold(late);
        read_until(&engine, &sample, &mut seed, after(1)).await;
        tokio::time::sleep(late + Duration::from_millis(10)).await;
    }
    assert!(hedges() >= before + 3, "no answer was late");
    // Longer than a connection may stand still.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(connections(), made, "a link was made anew");
    engine.stop().await;
}

/// Its signs of life stood behind what guests waited for, for more than two seconds: it counted as dead, and all of it was
/// asked for once more.
#[tokio::test(flavor = "multi_thread")]
async fn a_source_on_a_slow_link_is_kept_while_its_bytes_come() {
    const READERS: usize = 64;
    let sample = Sample::with_boot(64 << 20, 41, 64);
    let origin = Node::origin_without_boot(&sample, None).await;
    let link = SlowLink::new(origin.address, 200_000).await;
    let node = Node::empty(None).await;
    let engine = node.pull(&[link.address], forgiving).await;
    let up = || engine.progress().sources.iter().any(|source| source.up);
    let limit = Instant::now() + Duration::from_secs(30);
    while !up() {
        assert!(Instant::now() < limit, "it is reached");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let made = link.connections();
    let mut readers = tokio::task::JoinSet::new();
    for reader in 0..READERS {
        let (disk, at) = (engine.disk(), reader * (1 << 20) + 12_345);
        readers.spawn(async move {
            let mut bytes = vec![0; 48 << 10];
            disk.read(at as u64, &mut bytes).await.map(|()| (at, bytes))
        });
    }
    let all = async {
        while let Some(read) = readers.join_next().await {
            let (at, bytes) = read.unwrap().unwrap();
            assert!(bytes == sample.disk[at..at + bytes.len()], "wrong bytes in {at}");
        }
    };
    tokio::time::timeout(Duration::from_secs(120), all).await.expect("all of it comes");
    assert_eq!(link.connections(), made, "the source was lost, and connected to anew");
    engine.stop().await;
}

/// It was asked again at longer and longer intervals, and nobody else who came: after six times not at all.
#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_comes_is_asked_at_once_for_what_another_has_lost() {
    let sample = Sample::new(8 << 20, 37);
    let faults = Arc::new(Faults::new(&[Fault::Stall], 1, u64::MAX));
    let stalls = Node::origin_without_boot(&sample, Some(faults)).await;
    let node = Node::empty(None).await;
    let engine = node.pull(&[stalls.address], |options| options.fill = false).await;
    let (disk, offset) = (engine.disk(), sample.unforeseen_block() * 4096);
    let reader = tokio::spawn(async move {
        let mut bytes = [0; 4096];
        disk.read(offset, &mut bytes).await.map(|()| bytes)
    });
    let limit = Instant::now() + Duration::from_secs(30);
    while engine.counters().requests.get(Kind::Demand) < 2 {
        assert!(Instant::now() < limit, "what is lost is asked for again");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let good = Node::origin_without_boot(&sample, None).await;
    engine.add_source(good.address);
    let read = tokio::time::timeout(Duration::from_secs(3), reader).await;
    assert!(read.expect("who came is asked").unwrap().unwrap()[..] == *sample.bytes(offset, 4096));
    engine.stop().await;
}

/// A node that has the frames and sends little was waited for with every third of them, for seconds each time.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_sends_little_is_left_alone_after_its_first_late_frames() {
    let sample = Sample::with_boot(64 << 20, 43, 8192);
    let origin = Node::origin(&sample, None).await;
    let trickles = Arc::new(Faults::new(&[Fault::Trickle], 1, u64::MAX));
    let mut nodes = vec![Node::empty(Some(Arc::clone(&trickles))).await];
    for _ in 0..2 {
        nodes.push(Node::empty(None).await);
    }
    // Slow enough that each asks before the others have it all.
    let mut links = Vec::new();
    let mut engines = Vec::new();
    for node in &nodes {
        links.push(SlowLink::new(origin.address, 8 << 20).await);
        let from = [links.last().unwrap().address];
        engines.push(node.pull(&from, |options| options.fill = false).await);
    }
    for engine in &engines[1..] {
        let complete = tokio::time::timeout(Duration::from_secs(120), engine.boot_complete()).await;
        assert!(complete.is_ok(), "it waits for a node that sends little");
    }
    // Six, and 26 before: the time is the machine's, too.
    let asked = trickles.done();
    assert!((1..=13).contains(&asked), "the node that sends little sent {asked} frames");
    for engine in engines {
        engine.stop().await;
    }
}

/// Enough reads after `most`.
fn after(most: u64) -> impl Fn() -> bool {
    let count = std::cell::Cell::new(0);
    move || {
        count.set(count.get() + 1);
        count.get() > most
    }
}

/// Time from nothing to the end of a boot that reads every block of the boot set in its order and thinks 2 s in all, with
/// two sources at 100 Mbit/s each, the first of which does `fault` to every fifth answer, if any.
async fn boot_with(sample: &Sample, fault: Option<Fault>) -> Duration {
    let faults = fault.map(|kind| Arc::new(Faults::new(&[kind], 5, u64::MAX)));
    let (bad, good) = (Node::origin(sample, faults.clone()).await, Node::origin(sample, None).await);
    let rate = 100_000_000 / 8;
    let links = [SlowLink::new(bad.address, rate).await, SlowLink::new(good.address, rate).await];
    let node = Node::empty(None).await;
    let began = Instant::now();
    let engine = node.pull(&links.each_ref().map(|link| link.address), |_| ()).await;
    let disk = engine.disk();
    let think = Duration::from_secs(2) / u32::try_from(sample.boot_blocks.len()).unwrap();
    let mut due = Instant::now();
    for block in &sample.boot_blocks {
        let mut bytes = vec![0; 4096];
        disk.read(block * 4096, &mut bytes).await.unwrap();
        assert!(bytes == sample.bytes(block * 4096, 4096), "wrong bytes in block {block}");
        // Thinking counts from when the bytes came; a timer is too coarse for each read.
        due = due.max(Instant::now() - Duration::from_millis(5)) + think;
        tokio::time::sleep_until(due.into()).await;
    }
    let took = began.elapsed();
    engine.stop().await;
    if let Some(faults) = faults {
        assert!(faults.done() > 0, "{fault:?}: nothing was done");
    }
    took
}

/// `make bench-faults`. The goal: 1.5 times the clean boot, with one good source.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a bench: make bench-faults"]
async fn what_a_boot_takes_beside_a_source_that_fails() {
    const ROUNDS: usize = 3;
    let sample = Sample::with_boot(64 << 20, 71, 8192);
    println!(
        "two sources at 100 Mbit/s, {:.1} MB of boot cache, 2 s of thinking; every fifth answer of the first is spoilt; medians of {ROUNDS}",
        sample.boot_bytes as f64 / 1e6
    );
    let mut clean = 0.0;
    for fault in std::iter::once(None).chain(Fault::ALL.map(Some)) {
        let mut times = Vec::new();
        for _ in 0..ROUNDS {
            times.push(boot_with(&sample, fault).await.as_secs_f64());
        }
        times.sort_by(f64::total_cmp);
        let median = times[ROUNDS / 2];
        match fault {
            None => {
                clean = median;
                println!("{:<12} {median:5.2} s", "clean");
            }
            Some(fault) => {
                println!(
                    "{:<12} {median:5.2} s  {:.2} times the clean boot",
                    format!("{fault:?}"),
                    median / clean
                );
            }
        }
    }
}
