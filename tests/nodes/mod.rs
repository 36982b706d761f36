//! Nodes within one process, each with a store and a peer server on loopback, and an image to hand around.

#![allow(
    clippy::unwrap_used,
    dead_code,
    reason = "each test program uses a part of it, and fails when it cannot"
)]

use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bootcache::boot_cache::Builder;
use bootcache::boot_cache::merge::Touch;
use bootcache::choose::PeerKey;
use bootcache::image::import::{ImportOptions, import};
use bootcache::image::manifest::{Boot, ImageKind, Manifest};
use bootcache::image::scan::Watch;
use bootcache::name::ImageName;
use bootcache::peer::catalogue::Catalogue;
use bootcache::peer::fault::Faults;
use bootcache::peer::message::Load;
use bootcache::peer::server::{Server, ServerOptions};
use bootcache::store::Store;
use bootcache::transfer::{Engine, Options, Pin, PullError, Pulled, Target, pull};
use bootcache_nbd::Disk;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

pub(crate) fn image_name() -> ImageName {
    "sample".parse().unwrap()
}

/// A disk that is neither all noise nor all zero, and a boot that reads an eighth of it in an order of its own.
pub(crate) struct Sample {
    pub(crate) name: ImageName,
    pub(crate) disk: Vec<u8>,
    pub(crate) boot_blocks: Vec<u64>,
    /// Compressed bytes of the boot cache's frames.
    pub(crate) boot_bytes: u64,
    dir: tempfile::TempDir,
}

fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

impl Sample {
    pub(crate) fn new(size: usize, seed: u64) -> Self {
        Self::with_boot(size, seed, size / 4096 / 8)
    }

    /// A disk whose boot reads `boot_length` blocks.
    pub(crate) fn with_boot(size: usize, seed: u64, boot_length: usize) -> Self {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let blocks = size / 4096;
        let mut disk = vec![0; size + 1000];
        for block in disk.chunks_mut(4096) {
            match next(&mut state) % 8 {
                0..3 => {}
                3..6 => {
                    let half = block.len() / 2;
                    block[..half].iter_mut().for_each(|byte| *byte = next(&mut state).to_le_bytes()[3]);
                }
                _ => block.iter_mut().for_each(|byte| *byte = next(&mut state).to_le_bytes()[3]),
            }
        }
        let mut boot_blocks: Vec<u64> = Vec::new();
        while boot_blocks.len() < boot_length {
            let start = next(&mut state) % blocks as u64;
            let run = 1 + next(&mut state) % 40;
            for block in start..(start + run).min(blocks as u64) {
                if !boot_blocks.contains(&block) {
                    boot_blocks.push(block);
                }
            }
        }
        boot_blocks.truncate(boot_length);
        Self::of(image_name(), disk, boot_blocks)
    }

    /// Another image, that has four blocks of five in common with this one, many at other places.
    pub(crate) fn sibling(&self) -> Self {
        let mut disk = self.disk.clone();
        let mut state = 99;
        for (index, block) in disk.chunks_mut(4096).enumerate() {
            if index % 5 == 2 && block.iter().any(|byte| *byte != 0) {
                block.iter_mut().for_each(|byte| *byte = next(&mut state).to_le_bytes()[3]);
            }
        }
        let half = disk.len() / 2 / 4096 * 4096;
        disk[half..half + (1 << 20)].rotate_left(512 << 10);
        Self::of("sibling".parse().unwrap(), disk, self.boot_blocks.clone())
    }

    /// The same disk, recorded again: the boot cache has its blocks in another order.
    pub(crate) fn recorded_again(&self) -> Self {
        let boot_blocks = self.boot_blocks.iter().rev().copied().collect();
        Self::of(self.name.clone(), self.disk.clone(), boot_blocks)
    }

    fn of(name: ImageName, disk: Vec<u8>, boot_blocks: Vec<u64>) -> Self {
        let mut sample = Self { name, disk, boot_blocks, boot_bytes: 0, dir: tempfile::tempdir().unwrap() };
        sample.boot_bytes = sample.publish();
        sample
    }

    /// Makes the store from which every origin of this sample is copied.
    fn publish(&self) -> u64 {
        let source = self.dir.path().join("source.raw");
        std::fs::write(&source, &self.disk).unwrap();
        let store = Store::open(&self.dir.path().join("store")).unwrap();
        let options = ImportOptions {
            format: Some(bootcache::image::manifest::SourceFormat::Raw),
            kind: Some(ImageKind::Vm),
            ..ImportOptions::default()
        };
        let entry = import(&store, &self.name, &source, options, &Watch::default()).unwrap();
        let touches: Vec<Touch> = (1..)
            .zip(&self.boot_blocks)
            .map(|(at, block)| Touch { block: *block, time_ns: at * 100_000 })
            .collect();
        let path = store.tmp().join("boot-of-sample");
        let builder = Builder {
            root: entry.root,
            size: entry.manifest.size,
            touches: &touches,
            end_ns: 1_000_000_000,
            level: 3,
            threads: 1,
        };
        let read = |extent: bootcache::block::Extent, buf: &mut [u8]| {
            let from = usize::try_from(extent.offset()).unwrap();
            let bytes = &self.disk[from..self.disk.len().min(from + buf.len())];
            buf.fill(0);
            buf[..bytes.len()].copy_from_slice(bytes);
            Ok(())
        };
        let written = builder.write(&path, &read, &|_| ()).unwrap();
        let boot = Boot {
            heads_digest: written.heads_digest,
            heads_length: written.heads_length,
            file_length: written.file_length,
            until: None,
        };
        store.set_boot(entry.root, &path, boot).unwrap();
        written.file_length - written.heads_length
    }

    pub(crate) fn bytes(&self, offset: u64, length: usize) -> &[u8] {
        let from = usize::try_from(offset).unwrap();
        &self.disk[from..from + length]
    }

    /// Bytes of blocks that are not zero.
    pub(crate) fn data_bytes(&self) -> u64 {
        self.disk.chunks(4096).filter(|block| block.iter().any(|byte| *byte != 0)).count() as u64 * 4096
    }

    /// A block with data that the boot does not read.
    pub(crate) fn unforeseen_block(&self) -> u64 {
        let data = |block: &u64| self.bytes(block * 4096, 4096).iter().any(|byte| *byte != 0);
        (100..).find(|block| !self.boot_blocks.contains(block) && data(block)).unwrap()
    }

    /// Reads the whole disk, and holds every byte against what it should be.
    pub(crate) async fn read_all(&self, disk: &dyn Disk) {
        for (at, expected) in (0..).step_by(50_000).zip(self.disk.chunks(50_000)) {
            let mut bytes = vec![0; expected.len()];
            disk.read(at, &mut bytes).await.unwrap();
            assert!(bytes == expected, "wrong bytes in {at}+{}", expected.len());
        }
    }
}

/// A link to a server that carries so many bytes a second back, and can be held up and cut.
pub(crate) struct SlowLink {
    pub(crate) address: SocketAddr,
    cut: CancellationToken,
    connections: Arc<AtomicU64>,
    held_until: Arc<Mutex<Instant>>,
}

impl SlowLink {
    pub(crate) async fn new(to: SocketAddr, bytes_per_second: usize) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let (address, cut) = (listener.local_addr().unwrap(), CancellationToken::new());
        let (connections, held_until) = (Arc::new(AtomicU64::new(0)), Arc::new(Mutex::new(Instant::now())));
        let stop = cut.clone();
        let (count, held) = (Arc::clone(&connections), Arc::clone(&held_until));
        tokio::spawn(async move {
            let carry = async {
                loop {
                    let (near, _) = listener.accept().await.unwrap();
                    count.fetch_add(1, Ordering::Relaxed);
                    let (stop, held) = (stop.clone(), Arc::clone(&held));
                    tokio::spawn(async move {
                        tokio::select! {
                            _ = carry(near, to, bytes_per_second, &held) => {}
                            () = stop.cancelled() => {}
                        }
                    });
                }
            };
            tokio::select! {
                () = carry => {}
                () = stop.cancelled() => {}
            }
        });
        Self { address, cut, connections, held_until }
    }

    /// Connections that were made over it.
    pub(crate) fn connections(&self) -> u64 {
        self.connections.load(Ordering::Relaxed)
    }

    /// Carries nothing back for `time`.
    pub(crate) fn hold(&self, time: Duration) {
        *self.held_until.lock().unwrap() = Instant::now() + time;
    }

    /// Cuts it, as when the host at its end loses power: every connection breaks, and none is made again.
    pub(crate) fn kill(&self) {
        self.cut.cancel();
    }
}

impl Drop for SlowLink {
    fn drop(&mut self) {
        self.kill();
    }
}

async fn carry(
    near: TcpStream,
    to: SocketAddr,
    bytes_per_second: usize,
    held_until: &Mutex<Instant>,
) -> std::io::Result<()> {
    let far = TcpStream::connect(to).await?;
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    let (mut near_read, mut near_write) = near.into_split();
    let (mut far_read, mut far_write) = far.into_split();
    let there = tokio::io::copy(&mut near_read, &mut far_write);
    let back = async {
        let mut piece = vec![0; (bytes_per_second / 500).max(1)];
        loop {
            let length = far_read.read(&mut piece).await?;
            if length == 0 {
                return Ok::<(), std::io::Error>(());
            }
            let until = *held_until.lock().unwrap();
            tokio::time::sleep_until(until.into()).await;
            near_write.write_all(&piece[..length]).await?;
            tokio::time::sleep(Duration::from_secs_f64(length as f64 / bytes_per_second as f64)).await;
        }
    };
    tokio::select! {
        done = there => done.map(drop),
        done = back => done,
    }
}

/// A node: a store, and a server of what is in it.
pub(crate) struct Node {
    pub(crate) address: SocketAddr,
    pub(crate) server: Arc<Server>,
    pub(crate) catalogue: Arc<Catalogue>,
    key: u64,
    dir: tempfile::TempDir,
    stop: CancellationToken,
    serving: Option<tokio::task::JoinHandle<()>>,
}

static NODES: AtomicU64 = AtomicU64::new(0);

fn copy(from: &Path, to: &Path) {
    let status = std::process::Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap();
    assert!(status.success());
}

impl Node {
    /// A node that has published `sample`.
    pub(crate) async fn origin(sample: &Sample, faults: Option<Arc<Faults>>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        copy(&sample.dir.path().join("store"), &dir.path().join("store"));
        Self::start(dir, faults).await
    }

    /// A node that has published `sample`, and has no boot cache of it.
    pub(crate) async fn origin_without_boot(sample: &Sample, faults: Option<Arc<Faults>>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        copy(&sample.dir.path().join("store"), &dir.path().join("store"));
        let store = Store::open(&dir.path().join("store")).unwrap();
        let entry = store.resolve(&sample.name).unwrap();
        let manifest = Manifest { boot: None, ..entry.manifest.clone() };
        std::fs::write(entry.dir.join("manifest"), manifest.to_bytes()).unwrap();
        Self::start(dir, faults).await
    }

    /// A node that has nothing.
    pub(crate) async fn empty(faults: Option<Arc<Faults>>) -> Self {
        Self::start(tempfile::tempdir().unwrap(), faults).await
    }

    async fn start(dir: tempfile::TempDir, faults: Option<Arc<Faults>>) -> Self {
        let filter = tracing_subscriber::EnvFilter::from_env("BOOTCACHE_LOG");
        let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
        let number = NODES.fetch_add(1, Ordering::Relaxed);
        let node = format!("node-{number}");
        let key = PeerKey::of(&node).0;
        let store = Store::open(&dir.path().join("store")).unwrap();
        let catalogue = Catalogue::new(store, Load::default);
        let options = ServerOptions { node, key, faults, ..ServerOptions::default() };
        let server = Server::new(Arc::clone(&catalogue) as Arc<_>, options);
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut node =
            Self { address: any, server, catalogue, key, dir, stop: CancellationToken::new(), serving: None };
        node.serve_again().await;
        node
    }

    pub(crate) async fn serve_again(&mut self) {
        let (listener, address) = self.server.listen(self.address).await.unwrap();
        self.address = address;
        self.stop = CancellationToken::new();
        self.serving = Some(tokio::spawn(Arc::clone(&self.server).run(listener, self.stop.clone())));
    }

    pub(crate) async fn stop_serving(&mut self) {
        self.stop.cancel();
        if let Some(serving) = self.serving.take() {
            serving.await.unwrap();
        }
    }

    pub(crate) fn store(&self) -> Store {
        Store::open(&self.dir.path().join("store")).unwrap()
    }

    pub(crate) async fn try_pull(&self, sources: &[SocketAddr]) -> Result<Pulled, PullError> {
        self.pull_with((&image_name(), Pin::Any), sources, |_| ()).await
    }

    async fn pull_with(
        &self,
        (name, boot): (&ImageName, Pin),
        sources: &[SocketAddr],
        change: impl FnOnce(&mut Options),
    ) -> Result<Pulled, PullError> {
        let target = Target { name: name.clone(), root: None, boot, verify: false };
        let mut options = Options { key: self.key, listen: Some(self.address.port()), ..Options::default() };
        change(&mut options);
        pull(&self.store(), &target, sources, options).await
    }

    /// Begins to fetch the sample with the boot cache that `pin` says.
    pub(crate) async fn pull_pinned(&self, pin: Pin, sources: &[SocketAddr]) -> Engine {
        let pulled = self.pull_with((&image_name(), pin), sources, |_| ()).await.unwrap();
        self.offer(pulled)
    }

    /// Begins to fetch the sample, and offers it from then on.
    pub(crate) async fn pull(&self, sources: &[SocketAddr], change: impl FnOnce(&mut Options)) -> Engine {
        self.pull_as(&image_name(), sources, change).await
    }

    /// Begins to fetch the image called `name`.
    pub(crate) async fn pull_as(
        &self,
        name: &ImageName,
        sources: &[SocketAddr],
        change: impl FnOnce(&mut Options),
    ) -> Engine {
        let pulled = self.pull_with((name, Pin::Any), sources, change).await.unwrap();
        self.offer(pulled)
    }

    fn offer(&self, pulled: Pulled) -> Engine {
        match pulled {
            Pulled::Coming(engine, _) => {
                self.catalogue.offer(Arc::clone(engine.holding()));
                engine
            }
            Pulled::Complete(_) => panic!("the image is here already"),
        }
    }

    /// Damages those frames of the boot cache on the disk that `which` names by index and count.
    pub(crate) fn damage_frames(&self, sample: &Sample, which: impl Fn(usize, usize) -> bool) {
        let entry = self.store().resolve(&sample.name).unwrap();
        let open = bootcache::boot_cache::BootCache::open(&entry.boot_path(), entry.root).unwrap();
        let mut boot = std::fs::read(entry.boot_path()).unwrap();
        let start = boot.len() - usize::try_from(open.heads().frames_length()).unwrap();
        let frames = open.heads().frames();
        for (index, frame) in frames.iter().enumerate() {
            if frame.length > 0 && which(index, frames.len()) {
                boot[start + usize::try_from(frame.offset).unwrap()] ^= 1;
            }
        }
        std::fs::write(entry.boot_path(), boot).unwrap();
    }

    /// The disk's file, whole.
    pub(crate) fn read_file(&self) -> Vec<u8> {
        self.read_file_of(&image_name())
    }

    /// The file of the image `name`, which is complete.
    pub(crate) fn read_file_of(&self, name: &ImageName) -> Vec<u8> {
        let entry = self.store().resolve(name).unwrap();
        assert!(entry.is_complete(), "a presence bitmap is still there");
        bootcache::image::tree::Tree::open(&entry.tree_path(), Some(entry.root)).unwrap();
        std::fs::read(entry.disk_path()).unwrap()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
