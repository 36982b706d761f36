use std::time::SystemTime;

use super::evict::Evicted;
use super::remove::Removed;
use super::*;
use crate::image::manifest::{ImageKind, MANIFEST_VERSION, SourceFormat};

fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("store")).unwrap();
    (dir, store)
}

fn name(text: &str) -> ImageName {
    text.parse().unwrap()
}

/// Publishes an image that has a manifest and 100 KiB of disk, and no tree.
fn add(store: &Store, text: &str, content: &str, base: Option<Digest>) -> Digest {
    let (root, scratch) = make(store, content, base);
    store.publish(scratch, root, &name(text)).unwrap();
    root
}

fn make(store: &Store, content: &str, base: Option<Digest>) -> (Digest, Scratch) {
    let root = Digest::of(content.as_bytes());
    let manifest = Manifest {
        version: MANIFEST_VERSION,
        size: 5000,
        root,
        raw_blake3: None,
        kind: ImageKind::Vm,
        source_format: SourceFormat::Raw,
        base,
        allocated: 4096,
        boot: None,
    };
    let scratch = store.scratch("test").unwrap();
    fs::write(scratch.join("manifest"), manifest.to_bytes()).unwrap();
    fs::write(scratch.join("disk"), [1; 100 << 10]).unwrap();
    if base.is_some() {
        fs::write(scratch.join("index"), b"").unwrap();
    }
    (root, scratch)
}

fn tmp_entries(store: &Store) -> usize {
    fs::read_dir(store.tmp()).unwrap().count()
}

#[test]
fn a_published_image_is_found_by_its_name_and_its_root() {
    let (_dir, store) = store();
    let root = add(&store, "debian-12.5", "a", None);
    let entry = store.resolve(&name("debian-12.5")).unwrap();
    assert_eq!((entry.root, entry.manifest.size), (root, 5000));
    assert!(entry.is_complete());
    assert_eq!(store.names().unwrap(), [(name("debian-12.5"), root)]);
    assert_eq!(store.roots().unwrap(), [root]);
    assert_eq!(tmp_entries(&store), 0);
    assert!(matches!(store.resolve(&name("other")), Err(StoreError::NoSuchImage(_))));
}

#[test]
fn an_image_that_begins_to_come_twice_keeps_its_first_folder_and_stays_while_it_is_held() {
    let (_dir, store) = store();
    let arrive = |text, mark: &[u8]| {
        let (root, scratch) = make(&store, "x", None);
        fs::write(scratch.join("present"), mark).unwrap();
        store.publish_arriving(scratch, root, &name(text)).unwrap()
    };
    let (entry, hold) = arrive("a", b"first");
    assert!(!entry.is_complete());
    assert_eq!(store.evict(0).unwrap(), []);
    drop(hold);
    let (entry, hold) = arrive("b", b"second");
    assert_eq!(fs::read(entry.present_path()).unwrap(), b"first");
    assert_eq!(store.names().unwrap(), [(name("a"), entry.root), (name("b"), entry.root)]);
    assert_eq!(tmp_entries(&store), 0);
    // One that is all there is not put in its place while it is held.
    let (root, scratch) = make(&store, "x", None);
    assert!(matches!(store.publish(scratch, root, &name("c")), Err(StoreError::InUse(_))));
    drop(hold);
    assert_eq!(store.evict(0).unwrap().len(), 1);
}

#[test]
fn a_name_is_not_taken_from_another_image() {
    let (_dir, store) = store();
    let first = add(&store, "a", "first", None);
    add(&store, "b", "second", None);
    assert!(matches!(store.add_name(&name("b"), first), Err(StoreError::NameTaken(_))));
    store.add_name(&name("a"), first).unwrap();
}

#[test]
fn a_name_is_not_taken_from_an_overlay() {
    let (_dir, store) = store();
    let root = add(&store, "a", "first", None);
    std::fs::create_dir(store.overlay_dir(&"vm".parse().unwrap())).unwrap();
    assert!(matches!(store.check_free(&name("vm")), Err(StoreError::NameTaken(_))));
    assert!(matches!(store.add_name(&name("vm"), root), Err(StoreError::NameTaken(_))));
    assert_eq!(store.names().unwrap(), [(name("a"), root)]);
}

#[test]
fn the_content_goes_with_its_last_name() {
    let (_dir, store) = store();
    let root = add(&store, "a", "x", None);
    assert_eq!(add(&store, "b", "x", None), root);
    assert_eq!(store.remove(&name("a")).unwrap(), Removed::NameOnly);
    assert!(store.image(root).is_ok());
    assert!(matches!(store.remove(&name("b")).unwrap(), Removed::Content { freed } if freed >= 100 << 10));
    assert!(!store.image_dir(root).exists());
    assert_eq!(tmp_entries(&store), 0);
}

#[test]
fn what_something_builds_on_or_has_open_is_not_removed() {
    let (_dir, store) = store();
    let base = add(&store, "base", "base", None);
    add(&store, "increment", "increment", Some(base));
    let error = store.remove(&name("base")).unwrap_err().to_string();
    assert!(error.contains("incremental image 'increment'"), "{error}");
    // One that came from a peer with a whole disk needs its base no more.
    let increment = store.resolve(&name("increment")).unwrap();
    assert_eq!(increment.below(), Some(base));
    fs::rename(increment.index_path(), increment.dir.join("away")).unwrap();
    assert_eq!((increment.below(), store.dependent_of(base).unwrap()), (None, None));
    store.remove(&name("increment")).unwrap();

    let overlay = store.overlay_dir(&"vm-1".parse().unwrap());
    fs::create_dir(&overlay).unwrap();
    fs::write(overlay.join("meta"), format!("{{\"version\":1,\"base\":\"{base}\"}}")).unwrap();
    let error = store.remove(&name("base")).unwrap_err().to_string();
    assert!(error.contains("overlay 'vm-1'"), "{error}");
    fs::remove_dir_all(overlay).unwrap();

    let hold = store.hold(base).unwrap();
    assert!(matches!(store.remove(&name("base")), Err(StoreError::InUse(_))));
    assert!(store.resolve(&name("base")).is_ok());
    drop(hold);
    store.remove(&name("base")).unwrap();
}

#[test]
fn opening_removes_what_a_killed_command_left_and_not_what_a_running_one_makes() {
    let (_dir, store) = store();
    let running = store.scratch("import").unwrap();
    fs::write(running.join("disk"), b"x").unwrap();
    let killed = store.tmp().join("import.7");
    fs::create_dir(&killed).unwrap();
    fs::write(killed.join("disk"), b"x").unwrap();
    Store::open(store.dir()).unwrap();
    assert!(!killed.exists());
    assert!(running.join("disk").exists());
    drop(running);
    assert_eq!(tmp_entries(&store), 0);
}

#[test]
fn a_damaged_name_or_manifest_is_one_clear_line() {
    let (_dir, store) = store();
    let root = add(&store, "a", "x", None);
    fs::write(store.image_dir(root).join("manifest"), "{}").unwrap();
    let error = store.resolve(&name("a")).unwrap_err().to_string();
    assert!(error.contains("manifest") && !error.contains('\n'), "{error}");
    // Adding the image again mends it.
    add(&store, "a", "x", None);
    store.resolve(&name("a")).unwrap();
    fs::write(store.dir().join("names/a"), "zz").unwrap();
    let error = store.resolve(&name("a")).unwrap_err().to_string();
    assert!(error.contains("names/a") && !error.contains('\n'), "{error}");
}

/// Once, an error of the file system passed for the absence of a file, and absent blocks read as zeroes.
#[test]
fn an_image_of_which_it_cannot_be_told_is_not_complete_and_has_an_image_below() {
    let (_dir, store) = store();
    let base = add(&store, "base", "base", None);
    add(&store, "increment", "increment", Some(base));
    let entry = store.resolve(&name("increment")).unwrap();
    fs::remove_file(entry.index_path()).unwrap();
    assert_eq!((entry.is_complete(), entry.below()), (true, None));
    for file in ["present", "index"] {
        // To itself: not to be followed, and not absent.
        std::os::unix::fs::symlink(file, entry.dir.join(file)).unwrap();
    }
    assert_eq!((entry.is_complete(), entry.below()), (false, Some(base)));
}

/// Once, a stray file in `names` kept a daemon from going on with any image that was on its way.
#[test]
fn a_name_that_cannot_be_read_hides_no_other_and_may_be_that_of_any_image() {
    let (_dir, store) = store();
    let root = add(&store, "a", "x", None);
    let stray = store.dir().join("names/readme");
    fs::write(&stray, "not a root").unwrap();
    assert_eq!(store.names().unwrap(), [(name("a"), root)]);
    assert!(matches!(store.remove(&name("a")), Err(StoreError::Damaged { .. })));
    fs::remove_file(store.dir().join("names/a")).unwrap();
    assert_eq!(store.evict(0).unwrap(), []);
    fs::remove_file(stray).unwrap();
    assert_eq!(store.evict(0).unwrap().len(), 1);
}

#[test]
fn the_manifest_of_another_image_is_refused() {
    let (_dir, store) = store();
    let (first, second) = (add(&store, "a", "x", None), add(&store, "b", "y", None));
    fs::copy(store.image_dir(first).join("manifest"), store.image_dir(second).join("manifest")).unwrap();
    assert!(matches!(store.resolve(&name("b")), Err(StoreError::Damaged { .. })));
}

#[test]
fn a_boot_cache_comes_with_its_manifest_entry() {
    let (_dir, store) = store();
    let root = add(&store, "a", "x", None);
    let scratch = store.scratch("record").unwrap();
    fs::write(scratch.join("boot"), b"boot").unwrap();
    let boot = Boot { heads_digest: Digest::of(b"h"), heads_length: 1, file_length: 4, until: None };
    store.set_boot(root, &scratch.join("boot"), boot.clone()).unwrap();
    let entry = store.image(root).unwrap();
    assert_eq!(entry.manifest.boot, Some(boot));
    assert_eq!(fs::read(entry.boot_path()).unwrap(), b"boot");
}

#[test]
fn only_pulled_images_that_nothing_uses_are_evicted_the_longest_unused_first() {
    let (_dir, store) = store();
    let added = add(&store, "added", "added", None);
    let [old, older, held, base, increment] = ["old", "older", "held", "base", "increment"].map(|text| {
        let base = (text == "increment").then(|| Digest::of(b"base"));
        add(&store, text, text, base)
    });
    for (root, age) in [(old, 100), (older, 200), (held, 300), (base, 400), (increment, 50)] {
        store.mark_pulled(root).unwrap();
        let file = fs::File::open(store.image_dir(root).join("pulled")).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(age)).unwrap();
    }
    let hold = store.hold(held).unwrap();
    let all = store.images_bytes().unwrap();
    assert_eq!(store.evict(all).unwrap(), []);
    let roots = |evicted: Vec<Evicted>| evicted.into_iter().map(|evicted| evicted.root).collect::<Vec<_>>();
    assert_eq!(roots(store.evict(all - 1).unwrap()), [older]);
    assert!(matches!(store.resolve(&name("older")), Err(StoreError::NoSuchImage(_))));
    assert_eq!(roots(store.evict(0).unwrap()), [old, increment, base]);
    assert_eq!(store.roots().unwrap().len(), 2);
    drop(hold);
    assert_eq!(roots(store.evict(0).unwrap()), [held]);
    assert_eq!(store.roots().unwrap(), [added]);
    // One that got no name.
    store.remove_name(&name("added")).unwrap();
    assert_eq!(roots(store.evict(0).unwrap()), [added]);
}
