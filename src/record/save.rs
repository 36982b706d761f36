//! From recordings to the image's boot cache.
//!
//! Every block is checked against the image's digest tree on its way: a boot cache is never made of a damaged disk.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::{OnProgress, Options, Progress, RecordError};
use crate::block::{BLOCK_BYTES, Extent, blocks_for};
use crate::boot_cache::merge::{Touch, first_touches};
use crate::boot_cache::recording::Recording;
use crate::boot_cache::{Builder, Written, kept};
use crate::digest::Digest;
use crate::image::manifest::Boot;
use crate::image::page::LastPage;
use crate::image::scan::DiskSource;
use crate::image::stored_disk::StoredDisk;
use crate::image::tree::Tree;
use crate::qemu::Until;
use crate::store::{ImageEntry, Store};

const TICK: Duration = Duration::from_millis(200);
const NO_BLOCK: u64 = u64::MAX;

/// The boot cache that was written.
#[derive(Debug, Clone)]
pub struct Saved {
    /// Lengths, digest and frames.
    pub written: Written,
    /// The image with it.
    pub entry: ImageEntry,
    /// The numbers under which the recordings are kept beside it.
    pub kept: Vec<usize>,
}

pub(super) async fn save(
    store: &Store,
    entry: &ImageEntry,
    options: &Options,
    recordings: &[Recording],
    progress: OnProgress<'_>,
    cancel: &CancellationToken,
) -> Result<Saved, RecordError> {
    let touches = first_touches(recordings, blocks_for(entry.manifest.size));
    let end_ns =
        recordings.iter().map(|recording| recording.end_ns).sum::<u64>() / recordings.len().max(1) as u64;
    let until = match &options.until {
        Until::Exit => None,
        until => Some(until.to_string()),
    };
    let order = Order { touches, end_ns, until, level: options.level };
    write(store, entry, order, recordings, progress, cancel).await
}

/// What the boot cache is to have, in which order.
pub(super) struct Order {
    pub(super) touches: Vec<Touch>,
    /// When the boot was over.
    pub(super) end_ns: u64,
    /// What told that it was.
    pub(super) until: Option<String>,
    /// zstd level.
    pub(super) level: i32,
}

/// Gives the image the boot cache of `order`, and keeps `recordings` beside it.
pub(super) async fn write(
    store: &Store,
    entry: &ImageEntry,
    order: Order,
    recordings: &[Recording],
    progress: OnProgress<'_>,
    cancel: &CancellationToken,
) -> Result<Saved, RecordError> {
    let Order { touches, end_ns, until, level } = order;
    let scratch = store.scratch("record")?;
    let path = scratch.join("boot");
    let total = touches.len() as u64;
    let source = Source::open(store, entry)?;
    let (root, size) = (entry.root, entry.manifest.size);
    let done = std::sync::Arc::new(AtomicU64::new(0));
    let (counter, stop) = (done.clone(), cancel.clone());
    let mut packing = tokio::task::spawn_blocking(move || {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let builder = Builder { root, size, touches: &touches, end_ns, level, threads };
        let read = |extent: Extent, to: &mut [u8]| match stop.is_cancelled() {
            true => Err(io::ErrorKind::Interrupted.into()),
            false => source.read(extent, to),
        };
        let written = builder.write(&path, &read, &|blocks| {
            counter.fetch_add(blocks, Ordering::Relaxed);
        });
        (written, path, source)
    });
    let mut tick = tokio::time::interval(TICK);
    let packed = loop {
        tokio::select! {
            packed = &mut packing => break packed,
            _ = tick.tick() => progress(Progress::Compressing { done: done.load(Ordering::Relaxed), total }),
        }
    };
    let (written, path, source) =
        packed.map_err(|error| super::io("the boot cache")(io::Error::other(error)))?;
    if cancel.is_cancelled() {
        return Err(RecordError::Interrupted);
    }
    let written = written.map_err(|error| source.blame(error))?;
    let boot = Boot {
        heads_digest: written.heads_digest,
        heads_length: written.heads_length,
        file_length: written.file_length,
        until,
    };
    let mut numbers = Vec::new();
    let saved = keep(&entry.dir, root, recordings, &mut numbers)
        .and_then(|()| Ok(store.set_boot(root, &path, boot)?));
    if saved.is_err() {
        for number in &numbers {
            // What cannot be removed belongs to a recording that nothing was made of; that is all.
            let _ = kept::remove(&entry.dir, *number);
        }
    }
    Ok(Saved { written, entry: saved?, kept: numbers })
}

/// Keeps `recordings`, and adds the number of each to `numbers`.
fn keep(
    image_dir: &Path,
    root: Digest,
    recordings: &[Recording],
    numbers: &mut Vec<usize>,
) -> Result<(), RecordError> {
    for recording in recordings {
        numbers.push(kept::keep(image_dir, root, recording).map_err(super::io("the recording"))?);
    }
    Ok(())
}

/// The image's blocks, each checked.
struct Source {
    disk: StoredDisk,
    tree: Tree,
    wrong: AtomicU64,
}

impl Source {
    fn open(store: &Store, entry: &ImageEntry) -> Result<Self, RecordError> {
        let tree = Tree::open(&entry.tree_path(), Some(entry.root))?;
        Ok(Self { disk: StoredDisk::open(store, entry)?, tree, wrong: AtomicU64::new(NO_BLOCK) })
    }

    /// Fills `to` with the blocks of `extent`; what lies past the image's end is zero.
    fn read(&self, extent: Extent, to: &mut [u8]) -> io::Result<()> {
        let inside = extent.bytes().min(self.disk.size().saturating_sub(extent.offset()));
        let (inside, outside) = to.split_at_mut(usize::try_from(inside).expect("a part of the buffer"));
        self.disk.read_at(inside, extent.offset())?;
        outside.fill(0);
        let mut last = LastPage::default();
        for (block, data) in extent.blocks().zip(to.chunks(BLOCK_BYTES)) {
            if !self.tree.verify_block(block, data, &mut last).map_err(io::Error::other)? {
                self.wrong.store(block, Ordering::Relaxed);
                return Err(io::ErrorKind::InvalidData.into());
            }
        }
        Ok(())
    }

    fn blame(&self, error: io::Error) -> RecordError {
        match self.wrong.load(Ordering::Relaxed) {
            NO_BLOCK => super::io("the boot cache cannot be written")(error),
            block => RecordError::WrongBlock { block },
        }
    }
}
