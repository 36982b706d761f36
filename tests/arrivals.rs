//! The images that are on their way to a node's daemon: more names and sources for one, and what is left of it in the end.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod nodes;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bootcache::control::{Reply, Request};
use bootcache::name::ImageName;
use bootcache::transfer::{Arrivals, Options, Plan, Target};
use nodes::{Node, Sample, SlowLink, image_name};
use tokio_util::sync::CancellationToken;

const DEADLINE: Duration = Duration::from_secs(120);

fn arrivals(node: &Node) -> Arrivals {
    Arrivals::new(node.store(), Arc::clone(&node.catalogue), Options::default())
}

fn plan(sources: &[SocketAddr]) -> Plan {
    Plan { sources: sources.to_vec(), fill: true, fill_rate: 0 }
}

fn target(name: &ImageName) -> Target {
    Target { name: name.clone(), root: None, boot: bootcache::transfer::Pin::Any, verify: false }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_name_for_an_image_on_its_way_leaves_those_who_read_it_alone() {
    let sample = Sample::new(8 << 20, 3);
    let origin = Node::origin(&sample, None).await;
    let slow = SlowLink::new(origin.address, 1 << 20).await;
    let node = Node::empty(None).await;
    let arrivals = arrivals(&node);
    let root = arrivals.pull(&target(&sample.name), &plan(&[slow.address])).await.unwrap();
    let engine = arrivals.get(root).unwrap();
    let disk = engine.disk();
    let reads = tokio::spawn(async move {
        let mut bytes = vec![0; 4 << 20];
        disk.read(4 << 20, &mut bytes).await.map(|()| bytes)
    });
    let other: ImageName = "other".parse().unwrap();
    let by_root =
        Target { name: other.clone(), root: Some(root), boot: bootcache::transfer::Pin::Any, verify: false };
    assert_eq!(arrivals.pull(&by_root, &plan(&[origin.address])).await.unwrap(), root);
    assert!(Arc::ptr_eq(&engine, &arrivals.get(root).unwrap()), "there are two engines for one image");
    assert_eq!(node.store().root_of(&other).unwrap(), Some(root));
    let bytes = tokio::time::timeout(DEADLINE, reads).await.expect("the read ends").unwrap().unwrap();
    assert!(bytes == sample.bytes(4 << 20, 4 << 20));
    assert!(tokio::time::timeout(DEADLINE, engine.done()).await.expect("all of it comes"));
    arrivals.stop().await;
}

/// An origin on which `sample` has a second name, and that name.
async fn origin_of_two_names(sample: &Sample) -> (Node, ImageName) {
    let origin = Node::origin(sample, None).await;
    let (store, other): (_, ImageName) = (origin.store(), "other".parse().unwrap());
    store.add_name(&other, store.root_of(&sample.name).unwrap().unwrap()).unwrap();
    (origin, other)
}

/// Every instance of a plan pulls its image: the rate that somebody had set was gone with the first.
#[tokio::test(flavor = "multi_thread")]
async fn a_pull_that_says_no_rate_leaves_that_of_the_one_before() {
    let sample = Sample::new(8 << 20, 5);
    let origin = Node::origin(&sample, None).await;
    let node = Node::empty(None).await;
    let plan = |fill_rate| Plan { fill_rate, ..plan(&[origin.address]) };
    let daemon = arrivals(&node);
    let root = daemon.pull(&target(&sample.name), &plan(1000)).await.unwrap();
    let written = || std::fs::read_to_string(node.store().image_dir(root).join("sources")).unwrap();
    assert!(written().contains(r#""fill_rate":1000"#), "{}", written());
    daemon.pull(&target(&sample.name), &plan(0)).await.unwrap();
    assert!(written().contains(r#""fill_rate":1000"#), "{}", written());
    daemon.stop().await;

    let daemon = arrivals(&node);
    daemon.pull(&target(&sample.name), &plan(0)).await.unwrap();
    assert!(written().contains(r#""fill_rate":1000"#), "{}", written());
    daemon.pull(&target(&sample.name), &plan(u64::MAX)).await.unwrap();
    let all = daemon.get(root).unwrap();
    assert!(tokio::time::timeout(DEADLINE, all.done()).await.expect("it is no longer slow"));
    daemon.stop().await;
}

/// The second pull put its own folder in the place of the first one's, under the first one's engine: the disk that was
/// complete in the end had nothing but holes.
#[tokio::test(flavor = "multi_thread")]
async fn two_names_of_one_image_that_are_pulled_at_once_are_one_transfer() {
    let sample = Sample::new(2 << 20, 11);
    let (origin, other) = origin_of_two_names(&sample).await;
    for round in 0..8 {
        let node = Node::empty(None).await;
        let arrivals = arrivals(&node);
        let (one, two, plan) = (target(&sample.name), target(&other), plan(&[origin.address]));
        let (first, second) = tokio::join!(arrivals.pull(&one, &plan), arrivals.pull(&two, &plan));
        let root = first.unwrap();
        assert_eq!(second.unwrap(), root);
        assert_eq!(node.store().root_of(&other).unwrap(), Some(root));
        let engine = arrivals.get(root).unwrap();
        assert!(tokio::time::timeout(DEADLINE, engine.done()).await.expect("all of it comes"), "{round}");
        assert!(node.read_file() == sample.disk, "{round}");
        arrivals.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_name_whose_image_only_the_source_knows_joins_the_transfer_of_the_first() {
    let sample = Sample::new(4 << 20, 13);
    let (origin, other) = origin_of_two_names(&sample).await;
    let slow = SlowLink::new(origin.address, 1 << 20).await;
    let node = Node::empty(None).await;
    let arrivals = arrivals(&node);
    let root = arrivals.pull(&target(&sample.name), &plan(&[slow.address])).await.unwrap();
    let engine = arrivals.get(root).unwrap();
    assert!(!engine.progress().complete);
    assert_eq!(arrivals.pull(&target(&other), &plan(&[origin.address])).await.unwrap(), root);
    assert!(Arc::ptr_eq(&engine, &arrivals.get(root).unwrap()), "there are two engines for one image");
    assert!(tokio::time::timeout(DEADLINE, engine.done()).await.expect("all of it comes"));
    arrivals.stop().await;
    assert!(node.read_file() == sample.disk);
}

/// Names were given on the thread that runs everything else, which waited there for other commands to end.
#[tokio::test]
async fn a_name_that_waits_for_a_change_of_the_store_holds_up_nothing_else() {
    let sample = Sample::new(1 << 20, 17);
    let origin = Node::origin(&sample, None).await;
    let slow = SlowLink::new(origin.address, 64 << 10).await;
    let node = Node::empty(None).await;
    let arrivals = arrivals(&node);
    let root = arrivals.pull(&target(&sample.name), &plan(&[slow.address])).await.unwrap();

    let longest_ms = Arc::new(AtomicU64::new(0));
    let ticker = {
        let longest_ms = Arc::clone(&longest_ms);
        tokio::spawn(async move {
            loop {
                let began = Instant::now();
                tokio::time::sleep(Duration::from_millis(5)).await;
                let took_ms = u64::try_from(began.elapsed().as_millis()).unwrap();
                longest_ms.fetch_max(took_ms, Ordering::Relaxed);
            }
        })
    };
    let change = node.store().change(|_| ()).unwrap();
    let began = Instant::now();
    arrivals.pull(&target(&sample.name), &plan(&[slow.address])).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(5), "a name that is known changes nothing");
    let began = Instant::now();
    let release = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(8));
        drop(change);
    });
    let other: ImageName = "other".parse().unwrap();
    let by_root = Target { root: Some(root), ..target(&other) };
    arrivals.pull(&by_root, &plan(&[slow.address])).await.unwrap();
    assert!(began.elapsed() > Duration::from_millis(7900), "it did not wait for the change");
    release.join().unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    ticker.abort();
    let longest_ms = longest_ms.load(Ordering::Relaxed);
    assert!(longest_ms < 5000, "everything stood still for {longest_ms} ms");
    arrivals.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sources_that_are_added_are_asked_again_by_the_daemon_that_goes_on() {
    let sample = Sample::new(4 << 20, 5);
    let origin = Node::origin(&sample, None).await;
    let slow = SlowLink::new(origin.address, 512 << 10).await;
    let node = Node::empty(None).await;
    let before = arrivals(&node);
    let nobody = SlowLink::new(origin.address, 32 << 10).await;
    let only_boot = Plan { fill: false, ..plan(&[nobody.address]) };
    let root = before.pull(&target(&sample.name), &only_boot).await.unwrap();
    before.pull(&target(&sample.name), &plan(&[slow.address])).await.unwrap();
    before.stop().await;
    nobody.kill();

    let after = arrivals(&node);
    after.look_back();
    after.resume(&CancellationToken::new()).await;
    let engine = after.get(root).expect("it goes on");
    assert!(tokio::time::timeout(DEADLINE, engine.done()).await.expect("from the source that was added"));
    after.stop().await;
    assert!(node.read_file() == sample.disk);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_is_all_here_can_be_removed_and_pulled_again() {
    let sample = Sample::new(4 << 20, 7);
    let origin = Node::origin(&sample, None).await;
    let node = Node::empty(None).await;
    let arrivals = arrivals(&node);
    for round in 0..2 {
        let root = arrivals.pull(&target(&sample.name), &plan(&[origin.address])).await.unwrap();
        let engine = arrivals.get(root).unwrap();
        assert!(tokio::time::timeout(DEADLINE, engine.done()).await.expect("all of it comes"), "{round}");
        drop(engine);
        let until = Instant::now() + DEADLINE;
        while let Err(error) = node.store().remove(&image_name()) {
            assert!(Instant::now() < until, "{round}: {error}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    arrivals.stop().await;
}

/// Only its own transfer had it in use, and nothing ended that.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_arrives_is_removed_with_its_transfer_once_nobody_uses_it() {
    let (sample, sibling) = (Sample::new(4 << 20, 7), Sample::new(4 << 20, 7).sibling());
    let (origin, other_origin) = (Node::origin(&sample, None).await, Node::origin(&sibling, None).await);
    let links =
        [SlowLink::new(origin.address, 64 << 10).await, SlowLink::new(other_origin.address, 64 << 10).await];
    let empty = Node::empty(None).await;
    let node = bootcache::serve::Node::open(empty.store()).unwrap();
    let pull = async |name: &ImageName, source: SocketAddr| {
        let (name, sources) = (name.clone(), vec![source]);
        let boot = bootcache::transfer::Pin::Any;
        let request = Request::Pull { name, root: None, boot, sources, fill: true, fill_rate: 0 };
        let Reply::Image { root } = node.handle(request).await.unwrap() else { panic!("no image") };
        root
    };
    let root = pull(&sample.name, links[0].address).await;
    let other = pull(&sibling.name, links[1].address).await;
    let other_engine = node.arrivals().get(other).unwrap();
    let remove = async || node.handle(Request::ImageRemove { name: sample.name.clone() }).await;
    let refused = async || remove().await.unwrap_err().to_string();

    let (image, vm) = (sample.name.clone(), "vm".parse().unwrap());
    node.handle(Request::OverlayCreate { image, name: vm, size: None }).await.unwrap();
    assert!(refused().await.contains("overlay 'vm'"));
    node.handle(Request::OverlayRemove { name: "vm".parse().unwrap() }).await.unwrap();
    let reader = node.export(sample.name.as_str()).await.unwrap();
    assert!(refused().await.contains("in use"));
    assert!(node.arrivals().get(root).is_some(), "the transfer of an image that is used was ended");
    drop(reader);

    // Somebody whom the daemon does not know of: the transfer goes on.
    let hold = node.store().hold(root).unwrap();
    assert!(refused().await.contains("in use"));
    assert!(node.arrivals().get(root).is_some(), "the transfer of an image that stays was ended for good");
    drop(hold);

    let removed = remove().await.unwrap();
    assert!(matches!(removed, Reply::Removed { freed: Some(_) }), "{removed:?}");
    assert!(node.arrivals().get(root).is_none() && !node.store().image_dir(root).exists());
    assert_eq!(node.store().root_of(&sample.name).unwrap(), None);
    assert_eq!(std::fs::read_dir(node.store().tmp()).unwrap().count(), 0, "something half-made is left");
    assert!(Arc::ptr_eq(&other_engine, &node.arrivals().get(other).unwrap()));
    drop(other_engine);

    assert_eq!(pull(&sample.name, origin.address).await, root);
    let engine = node.arrivals().get(root).unwrap();
    assert!(tokio::time::timeout(DEADLINE, engine.done()).await.expect("all of it comes"));
    node.close().await.unwrap();
    assert!(empty.read_file() == sample.disk);
}
