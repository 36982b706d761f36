//! An image as a disk that guests read: a whole disk, or an increment over the disk of its base.
//!
//! Read-only, and complete: what is still arriving is `local_cache`'s. There is no cache of our own in it. Every
//! overlay and increment above an image reads through the same file and therefore through the same pages of the
//! kernel's cache, so a block is read from the device once however many VMs ask for it, also at the same time, and
//! memory beyond the page cache is two bits a block of each increment.

pub(crate) mod padded;

use std::io;
use std::path::Path;
use std::sync::Arc;

use bootcache_nbd::disk::{BASE_ALLOCATION, FileRange, STATE_HOLE, STATE_ZERO};
use bootcache_nbd::{Attempt, BoxFuture, Disk, Features, SharedDisk, StatusExtent};

use crate::digest::Digest;
use crate::image::extents::data_extents;
use crate::local_cache::{CONTEXT_PRESENT, STATE_PRESENT};
use crate::overlay::layer::{Layer, blocking, read_diff};
use crate::overlay::{DiffFile, FileDiff, OverlayError, open_increment};

/// A complete image; see the module's documentation.
#[derive(Debug)]
pub struct ImageDisk(Source);

#[derive(Debug)]
enum Source {
    Whole { file: Arc<FileDiff>, size: u64 },
    Increment(Layer),
}

impl ImageDisk {
    /// Opens the whole disk at `path`.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = FileDiff::open_read_only(path)?;
        let size = file.length()?;
        Ok(Self(Source::Whole { file: Arc::new(file), size }))
    }

    /// Opens an increment, its `index` and its `disk`, over `base`, whose root digest must be `base_root`.
    ///
    /// # Errors
    /// [`OverlayError`]: the index is bad, or belongs to another base; the disk cannot be opened or is too short.
    pub fn open_increment(
        index: &Path,
        disk: &Path,
        base: SharedDisk,
        base_root: Digest,
    ) -> Result<Self, OverlayError> {
        let disk_error = |error| OverlayError::Diff { path: disk.display().to_string(), error };
        let file = FileDiff::open_read_only(disk).map_err(disk_error)?;
        let length = file.length().map_err(disk_error)?;
        let (header, layer) = open_increment(index, Arc::new(file), base)?;
        if header.base != base_root {
            return Err(OverlayError::OtherBase { expected: header.base.short(), found: base_root.short() });
        }
        if length != header.size {
            return Err(OverlayError::OtherSize { expected: header.size, found: length });
        }
        Ok(Self(Source::Increment(layer)))
    }
}

impl Disk for ImageDisk {
    fn size(&self) -> u64 {
        match &self.0 {
            Source::Whole { size, .. } => *size,
            Source::Increment(layer) => layer.size(),
        }
    }

    fn features(&self) -> Features {
        Features { prefetch: true, ..Features::READ_ONLY }
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Attempt {
        match &self.0 {
            Source::Whole { file, .. } => file.try_read_at(buf, offset),
            Source::Increment(layer) => layer.try_read(offset, buf),
        }
    }

    fn in_file(&self, offset: u64, _: usize) -> Option<FileRange> {
        match &self.0 {
            Source::Whole { file, .. } => Some(FileRange { file: Arc::<FileDiff>::clone(file), offset }),
            Source::Increment(_) => None,
        }
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> BoxFuture<'a, io::Result<()>> {
        match &self.0 {
            Source::Whole { file, .. } => Box::pin(read_diff(file, offset, buf)),
            Source::Increment(layer) => Box::pin(layer.read(offset, buf)),
        }
    }

    fn contexts(&self) -> &'static [&'static str] {
        &[BASE_ALLOCATION, CONTEXT_PRESENT]
    }

    fn status(
        &self,
        context: &str,
        offset: u64,
        length: u64,
        extents_max: usize,
    ) -> BoxFuture<'_, io::Result<Vec<StatusExtent>>> {
        let context = context.to_owned();
        Box::pin(async move {
            match &self.0 {
                _ if context == CONTEXT_PRESENT => Ok(vec![StatusExtent { length, flags: STATE_PRESENT }]),
                Source::Increment(layer) => layer.status(&context, offset, length, extents_max).await,
                Source::Whole { file, .. } => {
                    let file = file.clone();
                    blocking(move || allocation(&file, offset, length, extents_max)).await
                }
            }
        })
    }

    fn prefetch(&self, offset: u64, length: u64) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move {
            match &self.0 {
                Source::Increment(layer) => layer.prefetch(offset, length).await,
                Source::Whole { file, .. } => {
                    let file = file.clone();
                    blocking(move || file.read_ahead(offset, length)).await
                }
            }
        })
    }
}

/// Holes and data of a file as `base:allocation` has them.
fn allocation(
    file: &FileDiff,
    offset: u64,
    length: u64,
    extents_max: usize,
) -> io::Result<Vec<StatusExtent>> {
    let end = offset + length;
    let mut extents = Vec::new();
    let mut at = offset;
    for data in data_extents(file.file(), offset..end) {
        if extents.len() >= extents_max {
            break;
        }
        let data = data?;
        if data.start > at {
            extents.push(StatusExtent { length: data.start - at, flags: STATE_HOLE | STATE_ZERO });
        }
        extents.push(StatusExtent { length: data.end - data.start, flags: 0 });
        at = data.end;
    }
    if at < end && extents.len() < extents_max {
        extents.push(StatusExtent { length: end - at, flags: STATE_HOLE | STATE_ZERO });
    }
    extents.truncate(extents_max);
    Ok(extents)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::path::PathBuf;

    use super::*;
    use crate::block::{BLOCK_BYTES, Extent};
    use crate::overlay::{BlockState, Header, Overlay, Run, write_index};

    const ROOT: Digest = Digest([1; 32]);

    fn whole_image(dir: &Path, blocks: u64) -> PathBuf {
        let path = dir.join("disk");
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(blocks * 4096).unwrap();
        for block in (0..blocks).filter(|block| block % 4 < 2) {
            file.write_all_at(&[u8::try_from(block % 250).unwrap() + 1; 4096], block * 4096).unwrap();
        }
        file.sync_all().unwrap();
        path
    }

    async fn read(disk: &dyn Disk, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0xcc; length];
        disk.read(offset, &mut bytes).await.unwrap();
        bytes
    }

    #[tokio::test]
    async fn a_whole_image_tells_its_holes() {
        let dir = tempfile::tempdir().unwrap();
        let disk = ImageDisk::open(&whole_image(dir.path(), 8)).unwrap();
        let extents = disk.status(BASE_ALLOCATION, 4096, 7 * 4096, 10).await.unwrap();
        let extent = |blocks: u64, flags| StatusExtent { length: blocks * 4096, flags };
        assert_eq!(extents, [extent(1, 0), extent(2, 3), extent(2, 0), extent(2, 3)]);
        assert_eq!(disk.status(BASE_ALLOCATION, 4096, 7 * 4096, 2).await.unwrap().len(), 2);
        assert_eq!(read(&disk, 4 * 4096, 2).await, [5, 5]);
    }

    #[tokio::test]
    async fn a_sealed_overlay_reads_as_an_increment_and_increments_stack() {
        let dir = tempfile::tempdir().unwrap();
        let mut disk: SharedDisk = Arc::new(ImageDisk::open(&whole_image(dir.path(), 64)).unwrap());
        let mut model = read(&*disk, 0, 64 * 4096).await;
        for layer in 0u8..4 {
            let folder = dir.path().join(format!("layer-{layer}"));
            Overlay::create(&folder, ROOT, disk.size()).unwrap();
            let overlay = Overlay::open(&folder, disk.clone(), ROOT).unwrap();
            let at = usize::from(layer) * 9000 + 10;
            overlay.write(at as u64, &[100 + layer; 7000], false).await.unwrap();
            model[at..at + 7000].fill(100 + layer);
            overlay.trim((40 + u64::from(layer)) * 4096, 4096, false).await.unwrap();
            let trimmed = (40 + usize::from(layer)) * 4096;
            model[trimmed..trimmed + 4096].fill(0);
            let image = dir.path().join(format!("image-{layer}"));
            std::fs::create_dir(&image).unwrap();
            overlay.seal(&image).await.unwrap();
            let (index, diff) = (image.join("index"), image.join("disk"));
            assert!(ImageDisk::open_increment(&index, &diff, disk.clone(), Digest([2; 32])).is_err());
            disk = Arc::new(ImageDisk::open_increment(&index, &diff, disk, ROOT).unwrap());
            assert!(read(&*disk, 0, 64 * 4096).await == model, "layer {layer}");
        }
    }

    #[tokio::test]
    async fn an_increment_larger_than_its_base_reads_zeroes_behind_the_base() {
        for base_size in [5 * 4096, 5 * 4096 - 1000] {
            let dir = tempfile::tempdir().unwrap();
            let base_path = whole_image(dir.path(), 5);
            std::fs::File::options().write(true).open(&base_path).unwrap().set_len(base_size).unwrap();
            let base: SharedDisk = Arc::new(ImageDisk::open(&base_path).unwrap());
            let (index, disk) = (dir.path().join("index"), dir.path().join("increment"));
            let run = Run { extent: Extent::new(7, 1), state: BlockState::Data };
            write_index(&index, Header { base: ROOT, size: 8 * 4096 }, &[run]).unwrap();
            let file = std::fs::File::create(&disk).unwrap();
            file.set_len(8 * 4096).unwrap();
            file.write_all_at(&[9; BLOCK_BYTES], 7 * 4096).unwrap();
            let image = ImageDisk::open_increment(&index, &disk, base, ROOT).unwrap();
            assert_eq!(image.size(), 8 * 4096);
            let mut expected = vec![5; 4 * BLOCK_BYTES];
            expected[usize::try_from(base_size).unwrap() - 4 * BLOCK_BYTES..].fill(0);
            expected[3 * BLOCK_BYTES..].fill(9);
            assert!(read(&image, 4 * 4096, 4 * BLOCK_BYTES).await == expected, "{base_size}");
            let found = image.status(BASE_ALLOCATION, 4 * 4096, 4 * 4096, 9).await.unwrap();
            assert_eq!(found.iter().map(|extent| extent.length).sum::<u64>(), 4 * 4096);
        }
    }
}
