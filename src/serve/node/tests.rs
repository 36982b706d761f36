//! The node by its requests, as the control socket carries them.

use std::fs;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use bootcache_nbd::SharedDisk;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::image::import::{ImportOptions, import};
use crate::image::manifest::ImageKind;
use crate::peer::message::Wanted;
use crate::peer::server::Provider;

fn node(dir: &Path) -> Node {
    let store = Store::open(dir).unwrap();
    add(&store, "base", 7);
    Node::open(store).unwrap()
}

/// Adds an image that is one byte over and over.
pub(in crate::serve) fn add(store: &Store, name: &str, byte: u8) -> Digest {
    let disk = store.dir().join("disk.raw");
    fs::write(&disk, vec![byte; 64 << 10]).unwrap();
    let (name, options) = (name.parse().unwrap(), ImportOptions::default());
    import(store, &name, &disk, options, &crate::image::scan::Watch::default()).unwrap().root
}

/// Adds an image that was on its way when the last daemon ended, from nobody who is there.
pub(in crate::serve) fn add_unfinished(store: &Store, name: &str, byte: u8) -> Digest {
    let entry = store.image(add(store, name, byte)).unwrap();
    crate::local_cache::LocalCache::create(&entry.dir, entry.root, entry.manifest.size).unwrap();
    let plan = Plan { sources: vec!["127.0.0.1:1".parse().unwrap()], fill: true, fill_rate: 0 };
    fs::write(entry.dir.join("sources"), serde_json::to_vec(&plan).unwrap()).unwrap();
    entry.root
}

async fn create(node: &Node, name: &str) -> Result<Reply, NodeError> {
    create_of(node, name, None).await
}

async fn create_of(node: &Node, name: &str, size: Option<u64>) -> Result<Reply, NodeError> {
    let (image, name) = ("base".parse().unwrap(), name.parse().unwrap());
    node.handle(Request::OverlayCreate { image, name, size }).await
}

async fn read(disk: &SharedDisk, offset: u64) -> u8 {
    let mut byte = [0];
    disk.read(offset, &mut byte).await.unwrap();
    byte[0]
}

#[tokio::test]
async fn two_overlays_of_one_image_never_see_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let node = node(dir.path());
    create(&node, "a").await.unwrap();
    create(&node, "b").await.unwrap();
    let (a, b) = (node.export("a").await.unwrap().disk, node.export("b").await.unwrap().disk);
    a.write(100, &[1], false).await.unwrap();
    b.write(100, &[2], false).await.unwrap();
    assert_eq!((read(&a, 100).await, read(&b, 100).await, read(&a, 101).await), (1, 2, 7));
    assert_eq!(read(&node.export("base").await.unwrap().disk, 100).await, 7);
}

#[tokio::test]
async fn a_container_image_takes_no_overlay_and_one_it_had_makes_no_image() {
    let dir = tempfile::tempdir().unwrap();
    let node = node(dir.path());
    let archive = dir.path().join("c.tar");
    fs::write(dir.path().join("sh"), "a shell").unwrap();
    let tar = std::process::Command::new("tar").arg("-C").arg(dir.path()).args(["-c", "sh"]).output();
    fs::write(&archive, tar.unwrap().stdout).unwrap();
    let options = ImportOptions { kind: Some(ImageKind::Container), ..ImportOptions::default() };
    let (name, watch) = ("box".parse().unwrap(), crate::image::scan::Watch::default());
    let entry = import(node.store(), &name, &archive, options, &watch).unwrap();
    let request = Request::OverlayCreate { image: name, name: "a".parse().unwrap(), size: None };
    let error = node.handle(request).await.unwrap_err();
    assert!(matches!(&error, NodeError::Container(image) if image == "box"), "{error}");
    // As earlier releases have made it.
    let made = node.store().overlay_dir(&"old".parse().unwrap());
    crate::overlay::Overlay::create(&made, entry.root, entry.manifest.size).unwrap();
    crate::serve::overlay_meta::OverlayMeta::new(entry.root).write(&made).unwrap();
    let request = Request::OverlayCommit { name: "old".parse().unwrap(), image: "new".parse().unwrap() };
    let error = node.handle(request).await.unwrap_err();
    assert!(matches!(&error, NodeError::Container(image) if image == "box"), "{error}");
}

#[tokio::test]
async fn an_overlay_may_be_larger_than_its_image_and_becomes_an_image_of_its_size() {
    const IMAGE: u64 = 64 << 10;
    const SIZE: u64 = 1 << 20;
    let dir = tempfile::tempdir().unwrap();
    let node = node(dir.path());
    for bad in [0, IMAGE - 4096, IMAGE + 1, !4095] {
        let error = create_of(&node, "a", Some(bad)).await.unwrap_err();
        assert!(matches!(error, NodeError::OverlaySize { .. }), "{error}");
    }
    let said = create_of(&node, "a", Some(9 << 40)).await.unwrap_err().to_string();
    assert!(said.contains("cannot have 9.00 TiB on image 'base'") && said.ends_with("to 8.00 TiB"), "{said}");
    let said = create_of(&node, "a", Some(IMAGE + 1)).await.unwrap_err().to_string();
    assert!(said.contains("64.00 KiB (65537 bytes)"), "{said}");
    let Reply::Overlay(info) = create_of(&node, "a", Some(SIZE)).await.unwrap() else { panic!() };
    assert_eq!(info.size, SIZE);
    let disk = node.export("a").await.unwrap().disk;
    assert_eq!((disk.size(), read(&disk, IMAGE - 1).await, read(&disk, IMAGE).await), (SIZE, 7, 0));
    disk.write(IMAGE - 1, &[1, 2], false).await.unwrap();
    disk.write(SIZE - 1, &[3], true).await.unwrap();
    drop(disk);
    node.close().await.unwrap();
    drop(node);

    let node = Node::open(Store::open(dir.path()).unwrap()).unwrap();
    let commit = Request::OverlayCommit { name: "a".parse().unwrap(), image: "more".parse().unwrap() };
    node.handle(commit).await.unwrap();
    for export in ["a", "more"] {
        let disk = node.export(export).await.unwrap().disk;
        let mut found = Vec::new();
        for offset in [IMAGE - 2, IMAGE - 1, IMAGE, IMAGE + 1, SIZE - 2, SIZE - 1] {
            found.push(read(&disk, offset).await);
        }
        assert_eq!((disk.size(), found), (SIZE, vec![7, 1, 2, 0, 0, 3]), "{export}");
    }
}

#[tokio::test]
async fn what_somebody_uses_is_neither_removed_nor_committed() {
    let dir = tempfile::tempdir().unwrap();
    let node = node(dir.path());
    create(&node, "a").await.unwrap();
    let name: HostName = "a".parse().unwrap();
    let stats = node.export("a").await.unwrap().stats;
    stats.connections.fetch_add(1, Ordering::Relaxed);
    let remove = Request::OverlayRemove { name: name.clone() };
    assert!(matches!(node.handle(remove.clone()).await, Err(NodeError::InUse(_))));
    let commit = Request::OverlayCommit { name, image: "c".parse().unwrap() };
    assert!(matches!(node.handle(commit).await, Err(NodeError::InUse(_))));
    stats.connections.fetch_sub(1, Ordering::Relaxed);
    node.handle(remove).await.unwrap();
    assert!(node.export("a").await.is_err());
}

#[tokio::test]
async fn a_change_of_the_store_that_takes_long_holds_up_no_export() {
    let dir = tempfile::tempdir().unwrap();
    let node = Arc::new(node(dir.path()));
    create(&node, "a").await.unwrap();
    create(&node, "b").await.unwrap();
    create(&node, "c").await.unwrap();
    node.export("c").await.unwrap().disk.write(5000, &[1], false).await.unwrap();
    let change = node.store.change(|_| ()).unwrap();
    let mut waiting = tokio::task::JoinSet::new();
    for request in [
        Request::OverlayCreate { image: "base".parse().unwrap(), name: "d".parse().unwrap(), size: None },
        Request::OverlayRemove { name: "b".parse().unwrap() },
        Request::OverlayCommit { name: "c".parse().unwrap(), image: "more".parse().unwrap() },
    ] {
        let node = Arc::clone(&node);
        waiting.spawn(async move { node.handle(request).await });
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    for name in ["a", "base"] {
        assert!(node.export(name).await.is_ok(), "{name}");
    }
    assert!(waiting.try_join_next().is_none(), "it does not wait for the change");
    drop(change);
    for done in waiting.join_all().await {
        done.unwrap();
    }
    assert!(node.export("b").await.is_err());
    assert!(node.export("d").await.is_ok() && node.export("more").await.is_ok());
}

#[tokio::test]
async fn a_vm_s_overlay_is_in_use_while_its_daemon_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let name: HostName = "a".parse().unwrap();
    {
        let node = node(dir.path());
        create(&node, "a").await.unwrap();
        node.handle(Request::VmOpen { name: name.clone(), owner: None }).await.unwrap();
        node.close().await.unwrap();
    }
    // As a command without a daemon has it: it opens no sockets again.
    let node = Node::open(Store::open(dir.path()).unwrap()).unwrap();
    let remove = Request::OverlayRemove { name: name.clone() };
    assert!(matches!(node.handle(remove.clone()).await, Err(NodeError::InUse(_))));
    let commit = Request::OverlayCommit { name: name.clone(), image: "c".parse().unwrap() };
    assert!(matches!(node.handle(commit).await, Err(NodeError::InUse(_))));
    let close = Request::VmClose { name };
    node.handle(close.clone()).await.unwrap();
    assert!(matches!(node.handle(close).await, Err(NodeError::NoVm(_))));
    node.handle(remove).await.unwrap();
}

/// Once, a daemon ended at the start because of one damaged record, and the guests of all VMs waited.
#[tokio::test]
async fn a_damaged_record_and_a_stray_name_stand_in_the_way_of_no_other_vm() {
    let dir = tempfile::tempdir().unwrap();
    {
        let node = node(dir.path());
        for name in ["a", "b"] {
            create(&node, name).await.unwrap();
            node.handle(Request::VmOpen { name: name.parse().unwrap(), owner: None }).await.unwrap();
        }
        node.close().await.unwrap();
    }
    fs::write(dir.path().join("vms/a/socket.json"), "rubbish").unwrap();
    fs::write(dir.path().join("names/readme"), "rubbish").unwrap();
    let node = Node::open(Store::open(dir.path()).unwrap()).unwrap();
    node.reopen_vms(&CancellationToken::new()).await.unwrap();
    let Reply::Status(status) = node.handle(Request::Status).await.unwrap() else { panic!() };
    assert_eq!(status.vms.iter().map(|vm| vm.name.as_str()).collect::<Vec<_>>(), ["b"]);
    assert_eq!(status.images.len(), 1);
    let name: HostName = "a".parse().unwrap();
    node.handle(Request::VmClose { name: name.clone() }).await.unwrap();
    node.handle(Request::OverlayRemove { name }).await.unwrap();
}

#[tokio::test]
async fn an_image_that_is_still_to_be_taken_up_can_be_removed_and_stays_away() {
    let dir = tempfile::tempdir().unwrap();
    let node = node(dir.path());
    let root = add_unfinished(&node.store, "coming", 1);
    node.store.mark_pulled(root).unwrap();
    node.arrivals.look_back();
    assert!(node.store.evict(0).unwrap().is_empty());
    let name: ImageName = "coming".parse().unwrap();
    node.handle(Request::ImageRemove { name: name.clone() }).await.unwrap();
    node.arrivals.resume(&CancellationToken::new()).await;
    node.arrivals.resumed(root).await;
    assert!(node.arrivals.get(root).is_none() && node.store.root_of(&name).unwrap().is_none());
}

#[tokio::test]
async fn who_needs_an_image_that_is_still_to_be_taken_up_has_it_taken_up() {
    let dir = tempfile::tempdir().unwrap();
    let node = node(dir.path());
    let root = add_unfinished(&node.store, "coming", 1);
    let other = add_unfinished(&node.store, "other", 2);
    assert!(node.export("coming").await.is_err(), "nothing fetches it");
    node.arrivals.look_back();
    node.export("coming").await.unwrap();
    assert!(node.arrivals.get(root).is_some() && node.arrivals.get(other).is_none());
    node.arrivals.resume(&CancellationToken::new()).await;
    assert!(node.arrivals.get(other).is_some());
    node.close().await.unwrap();
}

/// Once, the command that goes on with an overlay held its lock, and another removed it all the same.
#[tokio::test]
async fn an_overlay_that_a_command_has_locked_is_not_removed() {
    let dir = tempfile::tempdir().unwrap();
    let node = node(dir.path());
    create(&node, "a").await.unwrap();
    let remove = Request::OverlayRemove { name: "a".parse().unwrap() };
    let locked = node.store.lock_overlay(&"a".parse().unwrap()).unwrap().unwrap();
    assert!(matches!(node.handle(remove.clone()).await, Err(NodeError::InUse(_))));
    drop(locked);
    node.handle(remove).await.unwrap();
}

/// Once, pulled images went in the order in which they had come, however much they were used.
#[tokio::test]
async fn the_image_that_was_opened_is_not_the_one_that_is_evicted() {
    let dir = tempfile::tempdir().unwrap();
    let node = node(dir.path());
    let used = node.store.root_of(&"base".parse().unwrap()).unwrap().unwrap();
    let unused = add(&node.store, "unused", 8);
    let file = |root| node.store.image_dir(root).join("pulled");
    let now = SystemTime::now();
    for (root, age) in [(used, 200), (unused, 100)] {
        node.store.mark_pulled(root).unwrap();
        let opened = fs::File::open(file(root)).unwrap();
        opened.set_modified(now - Duration::from_secs(age)).unwrap();
    }
    node.export("base").await.unwrap();
    for _ in 0..1000 {
        if fs::metadata(file(used)).unwrap().modified().unwrap() >= now {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let evicted = node.store.evict(node.store.images_bytes().unwrap() - 1).unwrap();
    assert_eq!(evicted.iter().map(|evicted| evicted.root).collect::<Vec<_>>(), [unused]);
}

#[tokio::test]
async fn a_committed_overlay_reads_the_same_as_an_image_and_can_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let node = node(dir.path());
    create(&node, "a").await.unwrap();
    let disk = node.export("a").await.unwrap().disk;
    disk.write(5000, &[1], false).await.unwrap();
    drop(disk);
    let commit = Request::OverlayCommit { name: "a".parse().unwrap(), image: "more".parse().unwrap() };
    node.handle(commit).await.unwrap();
    let overlay = node.export("a").await.unwrap().disk;
    overlay.write(5000, &[2], false).await.unwrap();
    let image = node.export("more").await.unwrap().disk;
    assert_eq!((read(&image, 5000).await, read(&image, 5001).await, read(&overlay, 5000).await), (1, 7, 2));
}

#[tokio::test]
async fn a_disk_that_was_cut_is_neither_exported_nor_given_to_peers() {
    let dir = tempfile::tempdir().unwrap();
    let node = node(dir.path());
    create(&node, "a").await.unwrap();
    let root = node.store.root_of(&"base".parse().unwrap()).unwrap().unwrap();
    node.close().await.unwrap();
    let disk = fs::File::options().write(true).open(node.store.image_dir(root).join("disk")).unwrap();
    disk.set_len(60 << 10).unwrap();
    for name in ["base", "a"] {
        let error = node.export(name).await.map(|_| ()).unwrap_err();
        assert!(error.to_string().contains("it has 61440 bytes, not 65536"), "{error}");
    }
    let given = async || Arc::clone(&node.catalogue).find(Wanted::Root(root)).await.is_ok();
    assert!(!given().await);
    disk.set_len(64 << 10).unwrap();
    assert!(node.export("a").await.is_ok() && given().await);
}

#[tokio::test]
async fn a_list_opens_nothing_and_tells_of_the_overlay_that_is_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let node = node(dir.path());
    for name in ["a", "b"] {
        create(&node, name).await.unwrap();
    }
    node.export("b").await.unwrap().disk.write(5000, &[1], true).await.unwrap();
    node.close().await.unwrap();
    fs::write(node.store.overlay_dir(&"a".parse().unwrap()).join("index"), "x").unwrap();
    let Reply::Overlays(infos) = node.handle(Request::OverlayList).await.unwrap() else { panic!() };
    let told: Vec<_> = infos.iter().map(|info| (info.name.as_str(), info.size, info.data)).collect();
    assert_eq!(told, [("a", 0, 0), ("b", 64 << 10, 4096)]);
    assert!(infos[0].error.as_ref().is_some_and(|error| error.contains("index")), "{infos:?}");
    assert_eq!(infos[1].image, Some("base".parse().unwrap()));
    assert!(lock(&node.open).overlays.is_empty());
}

#[tokio::test]
async fn a_name_means_one_thing() {
    let dir = tempfile::tempdir().unwrap();
    let node = node(dir.path());
    assert!(matches!(create(&node, "base").await, Err(NodeError::Taken(_))));
    create(&node, "a").await.unwrap();
    assert!(matches!(create(&node, "a").await, Err(NodeError::Taken(_))));
}
