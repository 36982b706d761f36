//! The workloads: what is set up is the same for any number of operations, so that it cancels out.

use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use bootcache::boot_cache::merge::first_touches;
use bootcache::boot_cache::recording::{Read, Recording};
use bootcache::boot_cache::{BootCache, Builder, decode_frame};
use bootcache::choose::{Candidate, Draw, Has, Item, Load, Need, PeerKey, Weights, by_name};
use bootcache::digest::Digest;
use bootcache::image::page::LastPage;
use bootcache::image::tree::Tree;
use bootcache::image::tree_builder::build_from;
use bootcache::image_disk::ImageDisk;
use bootcache::overlay::Overlay;
use bootcache_nbd::request::{COMPACT_BYTES, Request, Terms, check};
use bootcache_nbd::{Attempt, Disk, Features};

use super::support::noise;

/// A named workload that does so many operations.
pub(crate) struct Workload {
    pub(crate) name: &'static str,
    pub(crate) operations: u32,
    pub(crate) run: fn(u32),
}

pub(crate) const WORKLOADS: [Workload; 8] = [
    Workload { name: "nbd-request", operations: 10_000, run: nbd_request },
    Workload {
        name: "overlay-read-4k-own",
        operations: 2_000,
        run: |operations| overlay_read(operations, true),
    },
    Workload {
        name: "overlay-read-4k-base",
        operations: 2_000,
        run: |operations| overlay_read(operations, false),
    },
    Workload { name: "tree-build-1m", operations: 8, run: tree_build },
    Workload { name: "tree-verify-block", operations: 500, run: tree_verify },
    Workload { name: "recordings-merge-1000", operations: 3, run: recordings_merge },
    Workload { name: "boot-cache-frame", operations: 4, run: boot_cache_frame },
    Workload { name: "choose-of-1000", operations: 20, run: choose },
];

const MEGABYTE: usize = 1 << 20;

/// A raw disk of noise.
fn disk(folder: &Path, megabytes: usize) -> File {
    let path = folder.join("disk");
    std::fs::write(&path, noise(1, megabytes * MEGABYTE)).expect("a temporary file");
    File::open(path).expect("it was just written")
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

/// From bytes to a checked action.
fn nbd_request(operations: u32) {
    let mut bytes = [0; COMPACT_BYTES];
    bytes[..4].copy_from_slice(&0x2560_9513_u32.to_be_bytes());
    let features = Features::WRITABLE;
    let terms = Terms {
        size: 1 << 40,
        features,
        structured: true,
        extended: false,
        contexts: true,
        payload_max: 32 << 20,
    };
    for operation in 0..operations {
        bytes[16..24].copy_from_slice(&(u64::from(operation) * 4096).to_be_bytes());
        bytes[24..28].copy_from_slice(&4096_u32.to_be_bytes());
        let request =
            Request::parse(black_box(&bytes), false).expect("the right magic").expect("it is whole");
        black_box(check(&request, &terms).expect("a sound request"));
    }
}

/// The hot path of a guest's read: index, then the page cache.
fn overlay_read(operations: u32, own: bool) {
    let folder = folder();
    drop(disk(folder.path(), 4));
    let base = Arc::new(ImageDisk::open(&folder.path().join("disk")).expect("a disk"));
    let root = Digest::of(b"base");
    let dir = folder.path().join("overlay");
    Overlay::create(&dir, root, (4 * MEGABYTE) as u64).expect("a new overlay");
    let overlay = Overlay::open(&dir, base, root).expect("a sound overlay");
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let data = noise(2, 2 * MEGABYTE);
    runtime.block_on(overlay.write(0, &data, false)).expect("space");
    let start = if own { 0 } else { 2 * MEGABYTE as u64 };
    let mut buffer = vec![0; 4096];
    let _warm = runtime.block_on(overlay.read(start, &mut buffer));
    for operation in 0..u64::from(operations) {
        let offset = start + operation % 512 * 4096;
        match overlay.try_read(offset, &mut buffer) {
            Attempt::Ready(result) => result.expect("a read"),
            Attempt::WouldBlock => runtime.block_on(overlay.read(offset, &mut buffer)).expect("a read"),
        }
        black_box(&buffer);
    }
}

fn tree_build(operations: u32) {
    let folder = folder();
    let disk = disk(folder.path(), 8);
    // At least one page, so that what does not depend on the size cancels out.
    let size = ((operations as usize * MEGABYTE).max(512 * 1024)) as u64;
    black_box(build_from(&disk, size, &folder.path().join("tree")).expect("a tree"));
}

fn tree_verify(operations: u32) {
    let folder = folder();
    let disk = disk(folder.path(), 4);
    let path = folder.path().join("tree");
    let root = build_from(&disk, (4 * MEGABYTE) as u64, &path).expect("a tree");
    let tree = Tree::open(&path, Some(root)).expect("the tree just built");
    let mut block = vec![0; 4096];
    disk.read_exact_at(&mut block, 4096 * 7).expect("a block");
    let mut last = LastPage::default();
    for _ in 0..operations {
        assert!(tree.verify_block(7, black_box(&block), &mut last).expect("a tree that can be read"));
    }
}

/// Boots of a thousand reads that overlap for the most part.
fn recordings_merge(operations: u32) {
    let boot = |seed: u64| {
        let place = |index: u64| (index * 7919 + seed * 13 * (index % 10 / 9)) % 100_000;
        let read =
            |index| Read { offset: place(index) * 4096, length: 16384, time_ns: index * 1000, took_ns: 0 };
        Recording::new((0..1000).map(read).collect(), 1_000_000)
    };
    let recordings: Vec<Recording> = (0..u64::from(operations) + 1).map(boot).collect();
    black_box(first_touches(black_box(&recordings), 200_000));
}

/// Digest and decompression of one frame, as a node does it to each that comes.
fn boot_cache_frame(operations: u32) {
    let folder = folder();
    let disk = disk(folder.path(), 4);
    let root = Digest::of(b"image");
    let reads =
        (0..64).map(|index| Read { offset: index * 65536, length: 32768, time_ns: index, took_ns: 0 });
    let touches = first_touches(&[Recording::new(reads.collect(), 100)], 1024);
    let path = folder.path().join("boot");
    let builder =
        Builder { root, size: (4 * MEGABYTE) as u64, touches: &touches, end_ns: 100, level: 3, threads: 1 };
    builder
        .write(&path, &|extent, buffer| disk.read_exact_at(buffer, extent.offset()), &|_| ())
        .expect("space");
    let cache = BootCache::open(&path, root).expect("the boot cache just written");
    let frame = cache.read_frame(1).expect("it has several frames");
    for _ in 0..operations {
        black_box(decode_frame(cache.heads(), 1, black_box(&frame)).expect("a sound frame"));
    }
}

fn choose(operations: u32) {
    let load = |index: u64| Load::new((0..4).map(|item| (Item(item), (index * 37 % 100) as f32 / 100.0)));
    let candidates: Vec<Candidate> = (0..1000)
        .map(|index| Candidate {
            load: load(index),
            ..Candidate::new(PeerKey(index), Has::Complete, index == 0)
        })
        .collect();
    let candidates: Vec<&Candidate> = candidates.iter().collect();
    let chooser = by_name("least-load", &Weights::default()).expect("the default chooser");
    let mut draw = Draw::new(1);
    for operation in 0..operations {
        black_box(chooser.choose(Need::Frame(operation), black_box(&candidates), &mut draw));
    }
}
