//! Blocks of an image are read from its device once, however many overlays and increments read them, and when.
//!
//! Alone in its file: the kernel's counters are those of the whole process.

mod support;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bootcache::digest::Digest;
use bootcache::image_disk::ImageDisk;
use bootcache::overlay::Overlay;
use bootcache_nbd::{Attempt, Disk, SharedDisk};
use rustix::fs::{Advice, fadvise};

const ROOT: Digest = Digest([5; 32]);
const SIZE: usize = 48 << 20;
const CHUNK: usize = 64 << 10;
const VMS: u64 = 20;

fn read_bytes() -> u64 {
    let io = fs::read_to_string("/proc/self/io").expect("the kernel accounts for I/O");
    io.lines().find_map(|line| line.strip_prefix("read_bytes: ")?.parse().ok()).expect("a count")
}

/// Drops a file's pages, so that reads go to the device.
fn drop_cache(path: &Path) {
    let file = File::open(path).expect("a file");
    file.sync_all().expect("clean pages");
    fadvise(&file, 0, None, Advice::DontNeed).expect("advice is taken");
}

async fn read(disk: &SharedDisk, offset: usize) -> Vec<u8> {
    let mut bytes = vec![0; CHUNK];
    if let Attempt::WouldBlock = disk.try_read(offset as u64, &mut bytes) {
        disk.read(offset as u64, &mut bytes).await.expect("a read");
    }
    bytes
}

/// All VMs read the whole disk at once, each beginning elsewhere, every second one backwards.
async fn boot_all(disks: Vec<SharedDisk>) {
    let tasks: Vec<_> = disks
        .into_iter()
        .enumerate()
        .map(|(vm, disk)| {
            tokio::spawn(async move {
                let chunks = SIZE / CHUNK;
                for step in 0..chunks {
                    let step = if vm % 2 == 0 { step } else { chunks - 1 - step };
                    read(&disk, (step + vm * 7) % chunks * CHUNK).await;
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.expect("a reader");
    }
}

async fn overlay(folder: PathBuf, base: &SharedDisk, seed: u64) -> Overlay {
    Overlay::create(&folder, ROOT, SIZE as u64).expect("an overlay");
    let overlay = Overlay::open(&folder, base.clone(), ROOT).expect("it opens");
    overlay.write(seed * 8192, &support::noise(seed, 4096), true).await.expect("a write");
    overlay
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_vms_read_the_base_once_also_through_increments() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("disk");
    fs::write(&path, support::noise(3, SIZE)).expect("an image");
    drop_cache(&path);
    let before = read_bytes();
    fs::read(&path).expect("the image");
    if read_bytes() - before < SIZE as u64 {
        support::skip("this file system's reads are not counted (tmpfs?): set TMPDIR to a disk");
        return;
    }
    let base: SharedDisk = Arc::new(ImageDisk::open(&path).expect("it opens"));

    let mut vms: Vec<SharedDisk> = Vec::new();
    for vm in 0..VMS {
        vms.push(Arc::new(overlay(folder.path().join(format!("vm-{vm}")), &base, vm).await));
    }
    let mut over_increments: Vec<SharedDisk> = Vec::new();
    let mut own_files = Vec::new();
    for increment in 0..5 {
        let image = folder.path().join(format!("image-{increment}"));
        fs::create_dir(&image).expect("a folder");
        let sealed = overlay(folder.path().join(format!("seal-{increment}")), &base, 100 + increment).await;
        sealed.seal(&image).await.expect("an increment");
        let (index, disk) = (image.join("index"), image.join("disk"));
        own_files.push(disk.clone());
        let opened = ImageDisk::open_increment(&index, &disk, base.clone(), ROOT).expect("it opens");
        let disk: SharedDisk = Arc::new(opened);
        for vm in 0..VMS / 5 {
            let name = format!("vm-{increment}-{vm}");
            over_increments.push(Arc::new(overlay(folder.path().join(name), &disk, 200 + vm).await));
        }
    }

    for (what, disks) in [("one image", vms), ("five increments of it", over_increments)] {
        own_files.iter().for_each(|file| drop_cache(file));
        drop_cache(&path);
        let before = read_bytes();
        boot_all(disks).await;
        let read = read_bytes() - before;
        println!("{VMS} VMs over {what} of {SIZE} bytes: {read} bytes read from the device");
        assert!(read >= SIZE as u64 * 9 / 10, "the cache was cold");
        assert!(read <= SIZE as u64 * 11 / 10, "{what}: {read} bytes were read for {SIZE} unique ones");
    }
}
