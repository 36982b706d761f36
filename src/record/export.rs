//! Seeing reads at an export: a layer that notes every read, and a private server of it.

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use bootcache_nbd::{
    Attempt, BoxFuture, Disk, Export, Features, Limits, Server, SharedDisk, StatusExtent, Tls,
};
use tokio::net::UnixListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::RecordError;
use crate::boot_cache::recording::{READS_MAX, Read, Recording};
use crate::image_disk::ImageDisk;
use crate::serve::nbd_uri;
use crate::store::{ImageEntry, Store, StoreError, at};
use crate::trace::TraceError;

/// The export's name.
const NAME: &str = "image";
/// Increments upon increments: a bound for a store that is damaged.
const LAYERS_MAX: usize = 64;

/// A disk that notes what is read of the disk below it. Owns the notes of one boot.
struct TraceDisk {
    start: Instant,
    reads: Mutex<Vec<Read>>,
    count: AtomicU64,
    below: SharedDisk,
}

impl TraceDisk {
    fn new(below: SharedDisk) -> Self {
        Self { start: Instant::now(), reads: Mutex::default(), count: AtomicU64::new(0), below }
    }

    fn now_ns(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn note(&self, offset: u64, length: usize, time_ns: u64) {
        self.count.fetch_add(1, Ordering::Relaxed);
        let took_ns = self.now_ns().saturating_sub(time_ns).max(1);
        let mut reads = self.reads.lock().unwrap_or_else(PoisonError::into_inner);
        if reads.len() < READS_MAX {
            reads.push(Read { offset, length: length as u64, time_ns, took_ns });
        }
    }
}

impl Disk for TraceDisk {
    fn size(&self) -> u64 {
        self.below.size()
    }

    fn features(&self) -> Features {
        // A hint to prefetch is no read; without the feature nobody sends one.
        Features { prefetch: false, ..self.below.features() }
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Attempt {
        let time_ns = self.now_ns();
        let attempt = self.below.try_read(offset, buf);
        if matches!(attempt, Attempt::Ready(Ok(()))) {
            self.note(offset, buf.len(), time_ns);
        }
        attempt
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async move {
            let (time_ns, length) = (self.now_ns(), buf.len());
            let result = self.below.read(offset, buf).await;
            if result.is_ok() {
                self.note(offset, length, time_ns);
            }
            result
        })
    }

    fn contexts(&self) -> &'static [&'static str] {
        self.below.contexts()
    }

    fn status(
        &self,
        context: &str,
        offset: u64,
        length: u64,
        extents_max: usize,
    ) -> BoxFuture<'_, io::Result<Vec<StatusExtent>>> {
        self.below.status(context, offset, length, extents_max)
    }
}

/// A server of one image on a Unix socket of its own, for as long as it lives.
pub(super) struct TraceExport {
    disk: Arc<TraceDisk>,
    socket: PathBuf,
    cancel: CancellationToken,
    serving: JoinHandle<()>,
}

impl TraceExport {
    /// Serves the image at `socket`, which must not exist.
    pub(super) fn start(store: &Store, entry: &ImageEntry, socket: PathBuf) -> Result<Self, RecordError> {
        let disk = Arc::new(TraceDisk::new(open_disk(store, entry)?));
        let listener = UnixListener::bind(&socket).map_err(super::io("the export's socket"))?;
        let export = Export::new(NAME, Arc::clone(&disk) as SharedDisk);
        let server = Server::new(Arc::new(export), Limits::default(), Tls::Off);
        let cancel = CancellationToken::new();
        let until = cancel.clone();
        let serving = tokio::spawn(async move { server.serve_unix(listener, until).await });
        Ok(Self { disk, socket, cancel, serving })
    }

    /// What QEMU and other clients of NBD open.
    pub(super) fn uri(&self) -> String {
        nbd_uri(NAME, &self.socket)
    }

    /// Reads so far.
    pub(super) fn reads(&self) -> u64 {
        self.disk.count.load(Ordering::Relaxed)
    }

    /// How long it has served, in ns: the clock of its reads.
    pub(super) fn elapsed_ns(&self) -> u64 {
        self.disk.now_ns()
    }

    /// Ends the server; what was asked for until `end_ns`.
    pub(super) async fn recording(self, end_ns: u64) -> Result<Recording, RecordError> {
        self.cancel.cancel();
        self.serving.await.map_err(|error| super::io("the private export")(io::Error::other(error)))?;
        let mut reads = self.disk.reads.lock().unwrap_or_else(PoisonError::into_inner);
        let mut reads = std::mem::take(&mut *reads);
        if reads.len() == READS_MAX {
            return Err(TraceError::Overflow(READS_MAX as u64).into());
        }
        reads.retain(|read| read.time_ns <= end_ns);
        if reads.is_empty() { Err(TraceError::NoReads.into()) } else { Ok(Recording::new(reads, end_ns)) }
    }
}

/// The image as guests see it, through the images that it builds on.
fn open_disk(store: &Store, entry: &ImageEntry) -> Result<SharedDisk, RecordError> {
    let mut increments = Vec::new();
    let mut lowest = entry.clone();
    while let Some(base) = lowest.below() {
        let below = store.image(base)?;
        increments.push((lowest, base));
        if increments.len() > LAYERS_MAX {
            let what = format!("more than {LAYERS_MAX} images build on each other");
            return Err(StoreError::Damaged { path: below.dir, what }.into());
        }
        lowest = below;
    }
    let path = lowest.disk_path();
    let mut disk: SharedDisk = Arc::new(ImageDisk::open(&path).map_err(at(&path))?);
    lowest.check_length(disk.size())?;
    for (increment, base) in increments.into_iter().rev() {
        let opened =
            ImageDisk::open_increment(&increment.index_path(), &increment.disk_path(), disk, base).map_err(
                |error| StoreError::Damaged { path: increment.dir.clone(), what: error.to_string() },
            )?;
        increment.check_length(opened.size())?;
        disk = Arc::new(opened);
    }
    Ok(disk)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bootcache_nbd::layers::MemoryDisk;

    #[tokio::test]
    async fn every_read_is_noted_once_whichever_way_it_goes() {
        let disk = TraceDisk::new(Arc::new(MemoryDisk::new(8192)));
        let mut buffer = [1; 512];
        if !matches!(disk.try_read(512, &mut buffer), Attempt::Ready(Ok(()))) {
            disk.read(512, &mut buffer).await.unwrap();
        }
        disk.read(4096, &mut buffer).await.unwrap();
        let reads = disk.reads.lock().unwrap();
        let ranges: Vec<_> = reads.iter().map(|read| (read.offset, read.length)).collect();
        assert_eq!(ranges, [(512, 512), (4096, 512)]);
    }
}
