//! Nodes that fetch an image from each other over loopback: complete ones, partial ones, and ones that lie or break.

mod nodes;

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bootcache::block::Extent;
use bootcache::image::page::PAGE_BLOCKS;
use bootcache::image::scan::Watch;
use bootcache::image::verify::{Finding, verify};
use bootcache::local_cache::LocalCache;
use bootcache::peer::fault::{Fault, Faults};
use bootcache::transfer::Pin;
use bootcache::transfer::{Kind, Others, Pulled};
use nodes::{Node, Sample, SlowLink};

/// Ends when `condition` holds.
async fn until(condition: impl Fn() -> bool) {
    let give_up = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < give_up, "it does not come about");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// What `image verify` finds wrong with `sample` on `node`.
fn findings(node: &Node, sample: &Sample) -> Vec<Finding> {
    let entry = node.store().resolve(&sample.name).expect("the image is here");
    verify(&node.store(), &entry, &Watch::default()).expect("the whole of it is").findings
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_comes_whole_and_needs_nobody_afterwards() {
    let sample = Sample::new(24 << 20, 7);
    let origin = Node::origin(&sample, None).await;
    let node = Node::empty(None).await;
    let engine = node.pull(&[origin.address], |_| ()).await;
    let mut bytes = vec![0; 100_000];
    engine.disk().read(5 << 20, &mut bytes).await.unwrap();
    assert!(bytes == sample.bytes(5 << 20, 100_000));
    assert!(engine.done().await);
    engine.stop().await;
    drop(origin);
    assert!(node.read_file() == sample.disk);
    assert!(matches!(node.try_pull(&[]).await, Ok(Pulled::Complete(_))));
    let counters = engine.counters();
    assert_eq!(counters.corrupt.load(Ordering::Relaxed), 0);
    // Zero blocks do not travel, and what has come by the stream is not fetched again.
    let blocks =
        counters.bytes.get(Kind::Fill) + counters.bytes.get(Kind::Demand) + counters.bytes.get(Kind::Stream);
    assert!(blocks < sample.data_bytes() + sample.data_bytes() / 10, "{blocks} of {}", sample.data_bytes());
}

#[tokio::test(flavor = "multi_thread")]
async fn many_readers_of_one_block_cause_one_fetch() {
    let sample = Sample::new(8 << 20, 1);
    let mut origin = Node::origin(&sample, None).await;
    let node = Node::empty(None).await;
    let engine = node.pull(&[origin.address], |options| options.fill = false).await;
    engine.boot_complete().await;
    // The only source is away until all of them wait.
    origin.stop_serving().await;
    until(|| engine.progress().sources.iter().all(|source| !source.up)).await;
    let offset = sample.unforeseen_block() * 4096;
    let mut readers = tokio::task::JoinSet::new();
    for _ in 0..64 {
        let disk = engine.disk();
        readers.spawn(async move {
            let mut bytes = [0; 4096];
            disk.read(offset, &mut bytes).await.unwrap();
            bytes
        });
    }
    until(|| engine.cache().counters().waiting() == 64).await;
    origin.serve_again().await;
    while let Some(bytes) = readers.join_next().await {
        assert!(bytes.unwrap()[..] == *sample.bytes(offset, 4096));
    }
    assert_eq!(engine.counters().requests.get(Kind::Demand), 1);
    assert_eq!(engine.cache().counters().misses.load(Ordering::Relaxed), 64);
}

/// Two VMs of a deployment each had the daemon fetch their image: the second found the folder of the first in use.
#[tokio::test(flavor = "multi_thread")]
async fn many_pulls_of_one_image_at_once_are_one_transfer() {
    let sample = Sample::new(8 << 20, 3);
    let origin = Node::origin(&sample, None).await;
    let store = tempfile::tempdir().unwrap();
    let store = bootcache::store::Store::open(store.path()).unwrap();
    let node = Arc::new(bootcache::serve::Node::open(store).unwrap());
    let mut pulls = tokio::task::JoinSet::new();
    for _ in 0..16 {
        let request = bootcache::control::Request::Pull {
            name: sample.name.clone(),
            root: None,
            boot: Pin::Any,
            sources: vec![origin.address],
            fill: true,
            fill_rate: 0,
        };
        let node = Arc::clone(&node);
        pulls.spawn(async move { node.handle(request).await.map(drop) });
    }
    while let Some(pulled) = pulls.join_next().await {
        pulled.unwrap().unwrap();
    }
    node.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_burst_costs_the_origin_about_one_boot_set() {
    let sample = Sample::new(32 << 20, 3);
    let origin = Node::origin(&sample, None).await;
    let mut nodes = Vec::new();
    for _ in 0..6 {
        nodes.push(Node::empty(None).await);
    }
    let mut engines = Vec::new();
    for node in &nodes {
        engines.push(node.pull(&[origin.address], |options| options.fill = false).await);
    }
    for engine in &engines {
        tokio::time::timeout(Duration::from_secs(60), engine.boot_complete()).await.unwrap();
    }
    let sent = origin.server.counters().stream_bytes.load(Ordering::Relaxed);
    assert!(sent < sample.boot_bytes * 2, "the origin sent {sent} of a boot set of {}", sample.boot_bytes);
    for engine in &engines {
        let mut bytes = vec![0; 4096];
        for block in &sample.boot_blocks {
            engine.disk().read(block * 4096, &mut bytes).await.unwrap();
            assert!(bytes == sample.bytes(block * 4096, 4096));
        }
    }
}

/// It was said of each that it does not answer.
#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_has_not_the_image_is_told_from_one_that_does_not_answer() {
    let sample = Sample::new(4 << 20, 3);
    let origin = Node::origin(&sample, None).await;
    let without = Node::empty(None).await;
    let mut silent = Node::empty(None).await;
    silent.stop_serving().await;
    let node = Node::empty(None).await;
    let all = [origin.address, without.address, silent.address];
    let engine = node.pull(&all, |options| options.fill = false).await;
    let error = |address| {
        let sources = engine.progress().sources;
        sources.into_iter().find(|source| source.address == address).and_then(|source| source.error)
    };
    until(|| error(without.address).is_some() && error(silent.address).is_some()).await;
    assert_eq!(error(without.address).unwrap(), "has not this image");
    assert!(error(silent.address).unwrap().starts_with("does not answer: "));
}

/// The first node of a burst heard of the others a second later, from the origin, and had fetched all from there by then.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_asks_those_too_who_come_to_it_for_an_image_that_it_is_getting() {
    let sample = Sample::new(8 << 20, 11);
    let origin = Node::origin(&sample, None).await;
    let first = Node::empty(None).await;
    let first_engine = first.pull(&[origin.address], |options| options.fill = false).await;
    // The origin never hears of the second.
    let second = Node::empty(None).await;
    let _second_engine = second.pull(&[first.address], |options| options.fill = false).await;
    until(|| {
        first_engine.progress().sources.iter().any(|source| source.up && source.address == second.address)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_stalls_breaks_or_trickles_is_replaced() {
    for kind in [Fault::Stall, Fault::Reset, Fault::Trickle] {
        let sample = Sample::new(8 << 20, 5);
        let origin = Node::origin(&sample, None).await;
        let faults = Arc::new(Faults::new(&[kind], 3, 40));
        let bad = Node::origin(&sample, Some(faults)).await;
        let node = Node::empty(None).await;
        let engine = node.pull(&[bad.address, origin.address], |_| ()).await;
        let began = Instant::now();
        sample.read_all(&*engine.disk()).await;
        assert!(tokio::time::timeout(Duration::from_secs(60), engine.done()).await.unwrap(), "{kind:?}");
        eprintln!("{kind:?}: {:?}", began.elapsed());
        engine.stop().await;
        assert!(node.read_file() == sample.disk, "{kind:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn reads_wait_while_every_source_is_gone_and_go_on_when_one_is_back() {
    let sample = Sample::new(8 << 20, 13);
    let mut origin = Node::origin(&sample, None).await;
    let node = Node::empty(None).await;
    let engine = node.pull(&[origin.address], |options| options.fill = false).await;
    engine.boot_complete().await;
    origin.stop_serving().await;
    let disk = engine.disk();
    let offset = sample.unforeseen_block() * 4096;
    let reader = tokio::spawn(async move {
        let mut bytes = [0; 4096];
        disk.read(offset, &mut bytes).await.map(|()| bytes)
    });
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert!(!reader.is_finished());
    origin.serve_again().await;
    let back = Instant::now();
    assert!(reader.await.unwrap().unwrap()[..] == *sample.bytes(offset, 4096));
    assert!(back.elapsed() < Duration::from_secs(5), "{:?}", back.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transfer_goes_on_after_a_restart_without_fetching_again_what_is_here() {
    let sample = Sample::new(24 << 20, 17);
    let origin = Node::origin(&sample, None).await;
    let node = Node::empty(None).await;
    let engine = node.pull(&[origin.address], |options| options.fill_rate = 2 << 20).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    engine.stop().await;
    let before = engine.progress().present;
    drop(engine);
    let engine = node.pull(&[origin.address], |_| ()).await;
    assert!(engine.progress().present >= before);
    assert!(engine.done().await);
    let second = engine.counters().bytes.total();
    assert!(second < sample.data_bytes(), "{second}");
    engine.stop().await;
    assert!(node.read_file() == sample.disk);
}

/// Once, all began at the front and went on side by side, so that nobody had what another lacked.
#[tokio::test(flavor = "multi_thread")]
async fn nodes_that_fill_at_the_same_time_give_each_other_most_of_it() {
    const NODES: u64 = 4;
    let sample = Sample::new(32 << 20, 23);
    let origin = Node::origin(&sample, None).await;
    let mut nodes = Vec::new();
    for _ in 0..NODES {
        let node = Node::empty(None).await;
        // What comes takes a while, as over a network.
        let engine = node.pull(&[origin.address], |options| options.fill_rate = 3 << 20).await;
        nodes.push((node, engine));
    }
    let mut from_origin = 0;
    let mut all = 0;
    for (node, engine) in &nodes {
        assert!(tokio::time::timeout(Duration::from_secs(120), engine.done()).await.unwrap());
        // Who is complete lets go of its sources: what they brought is told by its own counters.
        all += engine.counters().bytes.total();
        from_origin += engine.counters().origin_bytes.total();
        engine.stop().await;
        assert!(node.read_file() == sample.disk);
    }
    assert!(from_origin > sample.data_bytes() / 2, "{from_origin} of {all} bytes are the origin's");
    let copies = from_origin as f64 / (all as f64 / NODES as f64);
    assert!(copies < 2.5, "the origin sent {copies:.1} copies to {NODES} nodes");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partial_peer_is_enough_for_what_it_has_when_the_origin_dies() {
    let sample = Sample::new(16 << 20, 19);
    let mut origin = Node::origin(&sample, None).await;
    let first = Node::empty(None).await;
    let first_engine = first.pull(&[origin.address], |options| options.fill = false).await;
    first_engine.boot_complete().await;
    let second = Node::empty(None).await;
    let second_engine = second.pull(&[origin.address], |options| options.fill = false).await;
    // The origin told it of the first.
    let knows =
        || second_engine.progress().sources.iter().any(|from| from.up && from.address == first.address);
    until(knows).await;
    origin.stop_serving().await;
    tokio::time::timeout(Duration::from_secs(30), second_engine.boot_complete()).await.unwrap();
    for block in &sample.boot_blocks {
        let mut bytes = vec![0; 4096];
        second_engine.disk().read(block * 4096, &mut bytes).await.unwrap();
        assert!(bytes == sample.bytes(block * 4096, 4096));
    }
}

/// Takes some of the blocks of `pages` from a node that has all of the image, and their bytes.
fn lose(node: &Node, sample: &Sample, pages: &[u64]) {
    let entry = node.store().resolve(&sample.name).expect("it is being pulled");
    let cache = LocalCache::open(&entry.dir, entry.root, entry.manifest.size).expect("a local cache");
    let disk = std::fs::File::options().write(true).open(entry.disk_path()).expect("a disk");
    let blocks: Vec<u64> =
        pages.iter().flat_map(|page| page * PAGE_BLOCKS..(page + 1) * PAGE_BLOCKS).collect();
    for block in &blocks {
        disk.write_all_at(&[0; 4096], block * 4096).expect("room for a block");
    }
    cache.forget(&blocks).expect("bits that can be saved");
}

/// The fill waited for the first pages that no source had, and for as long as a guest waited for a block of them.
#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_has_keeps_neither_the_fill_nor_a_guest_from_the_rest() {
    let sample = Sample::with_boot(64 << 20, 83, 64);
    let lost: Vec<u64> = (0..128).filter(|page| page % 4 == 1).collect();
    let partial = [Node::origin(&sample, None).await, Node::origin(&sample, None).await];
    let mut engines = Vec::new();
    for node in &partial {
        lose(node, &sample, &lost);
        engines.push(node.pull(&[], |options| options.fill = false).await);
        assert!(engines.iter().all(|engine| !engine.cache().is_complete()));
    }
    let node = Node::empty(None).await;
    let sources = [partial[0].address, partial[1].address];
    let engine = node.pull(&sources, |_| ()).await;
    let data = |block: &u64| sample.bytes(block * 4096, 4096).iter().any(|byte| *byte != 0);
    let nobodys =
        (lost[7] * PAGE_BLOCKS..).find(|block| data(block) && !sample.boot_blocks.contains(block)).unwrap();
    let disk = engine.disk();
    let read = tokio::spawn(async move {
        let mut bytes = [0; 4096];
        disk.read(nobodys * 4096, &mut bytes).await.map(|()| bytes)
    });
    let cache = Arc::clone(engine.cache());
    let kept = |page: &u64| !lost.contains(page);
    until(|| (0..128).filter(kept).all(|page| cache.has(Extent::new(page * PAGE_BLOCKS, PAGE_BLOCKS)))).await;
    assert!(!read.is_finished() && !cache.has(Extent::new(nobodys, 1)));
    let origin = Node::origin(&sample, None).await;
    engine.add_source(origin.address);
    assert!(
        tokio::time::timeout(Duration::from_secs(60), engine.done()).await.expect("now somebody has all")
    );
    assert!(read.await.unwrap().unwrap()[..] == *sample.bytes(nobodys * 4096, 4096));
    engine.stop().await;
    assert!(node.read_file() == sample.disk);
}

/// Every node of a burst stayed connected to every other for as long as it had the boot cache only.
#[tokio::test(flavor = "multi_thread")]
async fn nodes_that_have_what_boots_let_go_of_each_other_until_they_need_more() {
    let sample = Sample::new(8 << 20, 97);
    let mut origin = Node::origin(&sample, None).await;
    let (mut nodes, mut engines) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        let node = Node::empty(None).await;
        let boot_only = |options: &mut bootcache::transfer::Options| {
            (options.fill, options.idle) = (false, Duration::from_millis(300));
        };
        engines.push(node.pull(&[origin.address], boot_only).await);
        nodes.push(node);
    }
    let up = |engine: &bootcache::transfer::Engine| {
        engine
            .progress()
            .sources
            .into_iter()
            .filter(|source| source.up)
            .map(|s| s.address)
            .collect::<Vec<_>>()
    };
    for engine in &engines {
        tokio::time::timeout(Duration::from_secs(60), engine.boot_complete()).await.unwrap();
        until(|| engine.progress().sources.len() == nodes.len() && up(engine).len() <= 2).await;
        until(|| up(engine).contains(&origin.address)).await;
    }
    // Only the last has it, and the first is connected to it no more, or by chance.
    let offset = sample.unforeseen_block() * 4096;
    let mut bytes = [0; 4096];
    engines[4].disk().read(offset, &mut bytes).await.unwrap();
    origin.stop_serving().await;
    bytes.fill(0);
    let disk = engines[0].disk();
    let read = tokio::time::timeout(Duration::from_secs(30), disk.read(offset, &mut bytes)).await;
    read.expect("those who were let go are asked").unwrap();
    assert!(bytes[..] == *sample.bytes(offset, 4096));
    origin.serve_again().await;
    engines[0].fill();
    assert!(tokio::time::timeout(Duration::from_secs(60), engines[0].done()).await.expect("all of it comes"));
}

/// It refuses at once, and so seemed to be the one with the least to do: it was asked first for each block.
#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_cannot_read_its_disk_is_not_asked_first_each_time() {
    const READS: u64 = 60;
    let sample = Sample::new(8 << 20, 101);
    let broken = Node::origin_without_boot(&sample, None).await;
    let good = Node::origin_without_boot(&sample, None).await;
    let disk = broken.store().resolve(&sample.name).expect("it is there").disk_path();
    let node = Node::empty(None).await;
    let engine = node.pull(&[good.address, broken.address], |options| options.fill = false).await;
    until(|| engine.progress().sources.iter().all(|source| source.up)).await;
    std::fs::File::options().write(true).open(disk).expect("a disk").set_len(0).expect("it is cut");
    let data = |block: &u64| sample.bytes(block * 4096, 4096).iter().any(|byte| *byte != 0);
    let blocks = (0..2000).filter(data);
    for block in blocks.take(usize::try_from(READS).expect("few")) {
        let mut bytes = [0; 4096];
        engine.disk().read(block * 4096, &mut bytes).await.unwrap();
        assert!(bytes[..] == *sample.bytes(block * 4096, 4096));
    }
    let refused = broken.server.counters().refused.load(Ordering::Relaxed);
    assert!((1..READS / 3).contains(&refused), "it was asked {refused} times");
    engine.stop().await;
}

/// Once, the fill made its order anew before it had come to the end, and asked for the same without a pause.
#[tokio::test(flavor = "multi_thread")]
async fn a_fill_from_a_source_that_cannot_read_its_disk_pauses() {
    let sample = Sample::new(32 << 20, 103);
    let broken = Node::origin_without_boot(&sample, None).await;
    let disk = broken.store().resolve(&sample.name).expect("it is there").disk_path();
    let node = Node::empty(None).await;
    let engine = node.pull(&[broken.address], |options| options.fill = false).await;
    until(|| engine.progress().sources.iter().all(|source| source.up)).await;
    std::fs::File::options().write(true).open(disk).expect("a disk").set_len(0).expect("it is cut");
    engine.fill();
    tokio::time::sleep(Duration::from_secs(3)).await;
    // A request for eight blocks at least, and a pass a second.
    let of_a_pass = (32 << 20) / (8 * 4096);
    let refused = broken.server.counters().refused.load(Ordering::Relaxed);
    assert!((1..5 * of_a_pass).contains(&refused), "it was asked {refused} times");
    engine.stop().await;
}

/// Only whole pages are told of: the second node has nearly nothing of this one but the block.
#[tokio::test(flavor = "multi_thread")]
async fn a_block_that_another_guest_has_read_comes_from_its_node_when_the_origin_is_gone() {
    let sample = Sample::new(16 << 20, 73);
    let mut origin = Node::origin(&sample, None).await;
    let nodes = [Node::empty(None).await, Node::empty(None).await];
    let first = nodes[0].pull(&[origin.address], |options| options.fill = false).await;
    first.boot_complete().await;
    let second = nodes[1].pull(&[origin.address], |options| options.fill = false).await;
    second.boot_complete().await;
    let offset = sample.unforeseen_block() * 4096;
    let mut bytes = [0; 4096];
    second.disk().read(offset, &mut bytes).await.unwrap();
    first.add_source(nodes[1].address);
    let up =
        |node: &Node| first.progress().sources.iter().any(|from| from.up && from.address == node.address);
    until(|| up(&nodes[1])).await;
    origin.stop_serving().await;
    until(|| !up(&origin)).await;
    let (disk, mut bytes) = (first.disk(), [0; 4096]);
    let read = tokio::time::timeout(Duration::from_secs(30), disk.read(offset, &mut bytes)).await;
    read.expect("the second node is asked").unwrap();
    assert!(bytes[..] == *sample.bytes(offset, 4096));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sibling_of_an_image_that_is_here_costs_little_more_than_what_is_its_own() {
    let sample = Sample::new(64 << 20, 23);
    let sibling = sample.sibling();
    let origin = Node::origin(&sibling, None).await;
    // The node has the first image, as if it had been published here, and the other comes over a link that is slow enough
    // for the answer whether copying pays to come before the boot set.
    let node = Node::origin(&sample, None).await;
    let link = SlowLink::new(origin.address, 2 << 20).await;
    let store = node.store();
    let engine = node
        .pull_as(&sibling.name, &[link.address], |options| options.similar = Some(Others::new(store)))
        .await;
    assert!(engine.done().await);
    engine.stop().await;
    let entry = node.store().resolve(&sibling.name).unwrap();
    assert!(std::fs::read(entry.disk_path()).unwrap() == sibling.disk);
    let (came, whole) = (&engine.counters().bytes, sibling.data_bytes());
    let part = came.total() as f64 * 100.0 / whole as f64;
    eprintln!("{} of {whole} bytes: {part:.1} %, {:?}", came.total(), engine.progress().bytes);
    assert!(came.total() * 4 <= whole, "{part:.1} % of the image came over the network");
    // Frames whose blocks were here for the most part were not fetched, and nothing is wrong with the image for that.
    let boot = bootcache::boot_cache::BootCache::open(&entry.boot_path(), entry.root).unwrap();
    assert!(boot.present_frames().unwrap().contains(&false), "every frame was fetched");
    assert_eq!(findings(&node, &sibling), []);
}

/// The files that this process has open and that are in `dir`, removed ones among them.
fn open_files(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let files = std::fs::read_dir("/proc/self/fd").expect("procfs");
    let paths = files.flatten().filter_map(|file| std::fs::read_link(file.path()).ok());
    paths.filter(|path| path.starts_with(dir)).collect()
}

/// Other images stayed in use for as long as an image was here of which only what boots is wanted.
#[tokio::test(flavor = "multi_thread")]
async fn other_images_can_be_removed_while_an_image_is_here_for_its_boot_alone() {
    let sample = Sample::new(8 << 20, 71);
    let sibling = sample.sibling();
    let origin = Node::origin(&sibling, None).await;
    let node = Node::origin(&sample, None).await;
    let store = node.store();
    let engine = node
        .pull_as(&sibling.name, &[origin.address], |options| {
            options.fill = false;
            options.similar = Some(Others::new(store));
        })
        .await;
    tokio::time::timeout(Duration::from_secs(60), engine.boot_complete()).await.unwrap();
    let store = node.store();
    store.remove(&sample.name).unwrap();
    until(|| open_files(&store.tmp()).is_empty()).await;
    engine.fill();
    assert!(tokio::time::timeout(Duration::from_secs(60), engine.done()).await.unwrap());
    engine.stop().await;
    assert!(node.read_file_of(&sibling.name) == sibling.disk);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_boot_missed_is_in_the_boot_cache_after_merging() {
    let sample = Sample::new(8 << 20, 41);
    let origin = Node::origin(&sample, None).await;
    let node = Node::empty(None).await;
    let engine = node.pull(&[origin.address], |options| options.fill = false).await;
    engine.boot_complete().await;
    let missed = sample.unforeseen_block();
    engine.disk().read(missed * 4096, &mut [0; 4096]).await.unwrap();
    engine.stop().await;
    let file = node.store().resolve(&sample.name).unwrap().dir.join(bootcache::transfer::missed::FILE);
    let (root, misses) = bootcache::boot_cache::kept::read(&file).unwrap();

    let store = origin.store();
    let entry = store.resolve(&sample.name).unwrap();
    assert_eq!(root, entry.root);
    let cancel = tokio_util::sync::CancellationToken::new();
    let misses = [misses];
    let merged = bootcache::record::merge_misses(&store, &entry, &misses, 3, &|_| (), &cancel);
    let (_, new) = merged.await.unwrap();
    assert_eq!(new, 1);
    let boot = bootcache::boot_cache::BootCache::open(&entry.boot_path(), root).unwrap();
    assert!(boot.heads().position(missed).is_some());
    assert!(sample.boot_blocks.iter().all(|block| boot.heads().position(*block).is_some()));
    assert_eq!(boot.heads().blocks(), sample.boot_blocks.len() as u64 + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_with_another_boot_cache_is_no_liar_and_gives_the_blocks() {
    let sample = Sample::new(16 << 20, 43);
    let origin = Node::origin(&sample, None).await;
    let again = Node::origin(&sample.recorded_again(), None).await;
    let link = SlowLink::new(origin.address, 512 << 10).await;
    let node = Node::empty(None).await;
    let engine = node.pull(&[link.address], |_| ()).await;
    until(|| engine.progress().frames > 0).await;
    // The origin is away in the middle of the stream, and back with the image recorded again.
    link.kill();
    engine.add_source(again.address);
    assert!(
        tokio::time::timeout(Duration::from_secs(60), engine.done()).await.expect("the rest comes as blocks")
    );
    let progress = engine.progress();
    engine.stop().await;
    assert!(progress.frames < progress.frames_total, "the stream was not cut off");
    assert_eq!(engine.counters().corrupt.load(Ordering::Relaxed), 0);
    assert!(node.read_file() == sample.disk);
}

/// Each took the other for a source that might still get the frames which neither had.
#[tokio::test(flavor = "multi_thread")]
async fn nodes_that_share_a_boot_cache_which_nobody_has_any_more_do_not_wait_for_each_other() {
    let sample = Sample::new(16 << 20, 43);
    let origin = Node::origin(&sample, None).await;
    let again = Node::origin(&sample.recorded_again(), None).await;
    let link = SlowLink::new(origin.address, 256 << 10).await;
    let nodes = [Node::empty(None).await, Node::empty(None).await];
    let first = nodes[0].pull(&[link.address, nodes[1].address], |_| ()).await;
    let second = nodes[1].pull(&[link.address, nodes[0].address], |_| ()).await;
    let engines = [first, second];
    until(|| engines.iter().all(|engine| engine.progress().frames > 0)).await;
    link.kill();
    for engine in &engines {
        assert!(!engine.progress().boot_complete, "the stream was not cut off");
        engine.add_source(again.address);
    }
    for (engine, node) in engines.iter().zip(&nodes) {
        let done = tokio::time::timeout(Duration::from_secs(60), engine.done()).await;
        assert!(done.expect("the rest comes as blocks"));
        engine.stop().await;
        assert_eq!(engine.counters().corrupt.load(Ordering::Relaxed), 0);
        assert!(node.read_file() == sample.disk);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_boot_cache_that_nobody_has_any_more_holds_up_nothing_when_other_images_are_here_too() {
    let sample = Sample::new(16 << 20, 53);
    let sibling = sample.sibling();
    let origin = Node::origin(&sibling, None).await;
    let again = Node::origin(&sibling.recorded_again(), None).await;
    // So slow that the heads have not come when the origin is gone.
    let link = SlowLink::new(origin.address, 24 << 10).await;
    let node = Node::origin(&sample, None).await;
    let store = node.store();
    let engine = node
        .pull_as(&sibling.name, &[link.address], |options| options.similar = Some(Others::new(store)))
        .await;
    link.kill();
    engine.add_source(again.address);
    let done = tokio::time::timeout(Duration::from_secs(60), engine.done()).await;
    let progress = engine.progress();
    engine.stop().await;
    assert!(done.expect("the rest comes as blocks"));
    assert_eq!(progress.frames_total, 0, "the heads came before the origin was gone");
    assert!(node.read_file_of(&sibling.name) == sibling.disk);
    assert_eq!(findings(&node, &sibling), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_is_recorded_while_it_is_served_boots_faster_from_then_on_and_a_removed_one_is_let_go()
{
    let sample = Sample::new(8 << 20, 61);
    let origin = Node::origin_without_boot(&sample, None).await;
    let first = Node::empty(None).await;
    let engine = first.pull(&[origin.address], |_| ()).await;
    assert!(engine.done().await);
    assert_eq!(engine.progress().frames_total, 0);
    engine.stop().await;

    let other = Node::origin(&sample, None).await;
    let recorded = other.store().resolve(&sample.name).unwrap();
    let store = origin.store();
    let file = store.tmp().join("boot");
    std::fs::copy(recorded.boot_path(), &file).unwrap();
    store.set_boot(recorded.root, &file, recorded.manifest.boot.clone().unwrap()).unwrap();
    let second = Node::empty(None).await;
    let engine = second.pull(&[origin.address], |_| ()).await;
    assert!(engine.done().await);
    assert!(engine.progress().frames_total > 0, "the origin still describes what it had first");
    engine.stop().await;

    store.remove(&sample.name).unwrap();
    origin.catalogue.tidy();
    let third = Node::empty(None).await;
    let error = third.try_pull(&[origin.address]).await.unwrap_err();
    assert!(error.to_string().contains("does not have the image"), "{error}");
}

/// It passed for one that does not have the image.
#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_cannot_read_its_image_is_told_apart_from_one_that_lacks_it() {
    let sample = Sample::new(1 << 20, 71);
    let origin = Node::origin(&sample, None).await;
    let tree = origin.store().resolve(&sample.name).unwrap().tree_path();
    std::fs::remove_file(&tree).unwrap();
    // It opens, and every read of it fails.
    std::fs::create_dir(&tree).unwrap();
    let node = Node::empty(None).await;
    let error = node.try_pull(&[origin.address]).await.unwrap_err();
    assert!(error.to_string().contains("has the image, but cannot read it"), "{error}");
}

/// The node was killed by SIGBUS.
#[tokio::test(flavor = "multi_thread")]
async fn a_tree_that_is_cut_while_its_node_serves_it_costs_others_a_source_and_no_more() {
    let sample = Sample::new(8 << 20, 73);
    let (broken, sound) = (Node::origin(&sample, None).await, Node::origin(&sample, None).await);
    let first = Node::empty(None).await;
    let engine = first.pull(&[broken.address], |_| ()).await;
    assert!(engine.done().await);
    engine.stop().await;
    let tree = broken.store().resolve(&sample.name).unwrap().tree_path();
    std::fs::File::options().write(true).open(tree).unwrap().set_len(4096).unwrap();
    let second = Node::empty(None).await;
    let engine = second.pull(&[broken.address, sound.address], |_| ()).await;
    assert!(engine.done().await);
    engine.stop().await;
    assert!(second.read_file() == first.read_file());
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_boot_cache_that_is_pinned_is_taken() {
    let sample = Sample::new(8 << 20, 67);
    let other = Node::origin(&sample.recorded_again(), None).await;
    let right = Node::origin(&sample, None).await;
    let heads = right.store().resolve(&sample.name).unwrap().manifest.boot.unwrap().heads_digest;
    let cases = [
        (Pin::Any, vec![&other], true),
        (Pin::Nothing, vec![&other], false),
        // The first to answer has another one, which comes to nothing; the next has it.
        (Pin::Heads(heads), vec![&other], false),
        (Pin::Heads(heads), vec![&other, &right], true),
    ];
    for (pin, sources, streams) in cases {
        let sources: Vec<_> = sources.iter().map(|source| source.address).collect();
        let node = Node::empty(None).await;
        let engine = node.pull_pinned(pin, &sources).await;
        assert!(engine.done().await);
        assert_eq!(engine.progress().frames_total > 0, streams, "{pin:?} from {}", sources.len());
        let kept = node.store().resolve(&sample.name).unwrap().manifest.boot;
        if pin != Pin::Any {
            assert_eq!(kept.map(|boot| boot.heads_digest), streams.then_some(heads), "{pin:?}");
        }
        engine.stop().await;
        assert!(node.read_file() == sample.disk);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_boot_frame_at_the_only_source_comes_as_blocks() {
    let sample = Sample::new(16 << 20, 59);
    let origin = Node::origin(&sample, None).await;
    origin.damage_frames(&sample, |frame, frames| frame + 1 == frames);
    let node = Node::empty(None).await;
    let engine = node.pull(&[origin.address], |_| ()).await;
    let done = tokio::time::timeout(Duration::from_secs(60), engine.done()).await;
    engine.stop().await;
    assert!(done.expect("the image becomes complete"));
    assert!(node.read_file() == sample.disk);
}

/// It told of the boot cache that it could not give, and whoever pulled the image waited for the heads.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_whose_boot_cache_is_damaged_at_the_only_source_comes_without_it() {
    let sample = Sample::new(8 << 20, 79);
    let origin = Node::origin(&sample, None).await;
    let entry = origin.store().resolve(&sample.name).unwrap();
    std::fs::write(entry.boot_path(), b"rubbish").unwrap();
    let node = Node::empty(None).await;
    let engine = node.pull(&[origin.address], |_| ()).await;
    let done = tokio::time::timeout(Duration::from_secs(60), engine.done()).await;
    assert!(done.expect("the image becomes complete"));
    engine.stop().await;
    assert!(node.read_file() == sample.disk);
}

/// The second to boot was pointed to the first, which had nothing either, and asked the origin again without end.
#[tokio::test(flavor = "multi_thread")]
async fn damaged_boot_frames_at_an_origin_that_points_to_another_node_come_as_blocks() {
    let sample = Sample::new(16 << 20, 59);
    let origin = Node::origin(&sample, None).await;
    origin.damage_frames(&sample, |_, _| true);
    let nodes = [Node::empty(None).await, Node::empty(None).await];
    // It has the blocks, but not all of the image, so that it is not asked before the origin.
    let first = nodes[0].pull(&[origin.address], |options| options.fill = false).await;
    let limit = Duration::from_secs(60);
    tokio::time::timeout(limit, first.boot_complete()).await.expect("the first boots");
    let second = nodes[1].pull(&[origin.address], |_| ()).await;
    assert!(tokio::time::timeout(limit, second.done()).await.expect("the second becomes complete"));
    first.fill();
    assert!(tokio::time::timeout(limit, first.done()).await.expect("the first becomes complete"));
    first.stop().await;
    second.stop().await;
    assert!(nodes.iter().all(|node| node.read_file() == sample.disk));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefetch_of_a_whole_disk_does_not_hold_up_a_guest() {
    let sample = Sample::new(64 << 20, 47);
    let origin = Node::origin(&sample, None).await;
    let link = SlowLink::new(origin.address, 8 << 20).await;
    let node = Node::empty(None).await;
    let engine = node.pull(&[link.address], |options| options.fill = false).await;
    let disk = engine.disk();
    disk.prefetch(0, 64 << 20).await.unwrap();
    let offset = 60 << 20;
    let mut bytes = vec![0; 8192];
    let read = tokio::time::timeout(Duration::from_secs(30), disk.read(offset, &mut bytes)).await;
    read.expect("a guest's read ends").unwrap();
    assert!(bytes == sample.bytes(offset, 8192));
    engine.stop().await;
}
