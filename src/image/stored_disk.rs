//! A whole image as one disk that can be read: its own file, or an increment's blocks over those of the images below.
//!
//! For passes over everything (verify, export). Guests are served by `crate::image_disk`, which reads one block at a
//! time and caches.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::block::BLOCK_SIZE;
use crate::store::{Hold, ImageEntry, Store, StoreError, at};

use super::extents::data_extents;
use super::increment::own_changes;
use super::increment_tree::Change;
use super::scan::DiskSource;

/// Increments upon increments: more than anyone has, and a bound for a store that is damaged.
const LAYERS_MAX: usize = 64;

/// A whole image, opened for reading from end to end. It, and what it builds on, is not removed while this lives.
#[derive(Debug)]
pub struct StoredDisk {
    /// The image's own layer first, the one that holds a whole disk last.
    layers: Vec<Layer>,
    size: u64,
    _holds: Vec<Hold>,
}

#[derive(Debug)]
struct Layer {
    disk: File,
    size: u64,
    /// The blocks of an increment, in order; none for a whole disk.
    changes: Option<Vec<Change>>,
}

/// A part of a disk, and where its bytes are.
enum Part<'a> {
    Zero,
    In(&'a File),
}

impl StoredDisk {
    /// Opens `entry`, and what it builds on.
    ///
    /// # Errors
    /// [`StoreError::NoSuchRoot`] when a base is missing, [`StoreError::Damaged`], [`StoreError::Io`].
    pub fn open(store: &Store, entry: &ImageEntry) -> Result<Self, StoreError> {
        let (mut layers, mut holds) = (Vec::new(), Vec::new());
        let mut next = Some(entry.clone());
        while let Some(entry) = next {
            if layers.len() == LAYERS_MAX {
                let what = format!("more than {LAYERS_MAX} images build on each other");
                return Err(StoreError::Damaged { path: entry.dir, what });
            }
            holds.push(store.hold(entry.root)?);
            layers.push(Layer::open(&entry)?);
            next = entry.below().map(|base| store.image(base)).transpose()?;
        }
        Ok(Self { layers, size: entry.manifest.size, _holds: holds })
    }

    /// Shows the parts of `range` to `see`, in order, each as the topmost layer that has it says.
    fn parts<'a>(
        &'a self,
        layer: usize,
        range: Range<u64>,
        see: &mut impl FnMut(Part<'a>, Range<u64>) -> io::Result<()>,
    ) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let Some(Layer { disk, size, changes }) = self.layers.get(layer) else {
            return see(Part::Zero, range);
        };
        // An increment may be larger than what it builds on.
        let inside = range.start..range.end.min(*size).max(range.start);
        let outside = inside.end..range.end;
        match changes {
            None if inside.is_empty() => {}
            None => see(Part::In(disk), inside)?,
            Some(changes) => {
                let mut done = inside.start;
                let from = changes.partition_point(|change| change.extent.end() * BLOCK_SIZE <= inside.start);
                for change in changes[from..].iter().take_while(|change| change.extent.offset() < inside.end)
                {
                    let start = change.extent.offset().max(inside.start);
                    let end = (change.extent.end() * BLOCK_SIZE).min(inside.end);
                    self.parts(layer + 1, done..start, see)?;
                    see(if change.zero { Part::Zero } else { Part::In(disk) }, start..end)?;
                    done = end;
                }
                self.parts(layer + 1, done..inside.end, see)?;
            }
        }
        if outside.is_empty() { Ok(()) } else { see(Part::Zero, outside) }
    }
}

impl Layer {
    fn open(entry: &ImageEntry) -> Result<Self, StoreError> {
        let path = entry.disk_path();
        let disk = File::open(&path).map_err(at(&path))?;
        let size = entry.manifest.size;
        entry.check_length(disk.metadata().map_err(at(&path))?.len())?;
        let changes = entry.below().map(|_| own_changes(entry)).transpose()?;
        Ok(Self { disk, size, changes })
    }
}

impl DiskSource for StoredDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn data(&self, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let mut extents = Vec::new();
        self.parts(0, range, &mut |part, range| {
            let Part::In(file) = part else { return Ok(()) };
            for extent in data_extents(file, range) {
                extents.push(extent?);
            }
            Ok(())
        })?;
        Ok(extents)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let mut rest = buffer;
        let range = offset..offset + rest.len() as u64;
        self.parts(0, range, &mut |part, range| {
            let length = usize::try_from(range.end - range.start).expect("a part of the buffer");
            let (here, after) = std::mem::take(&mut rest).split_at_mut(length);
            rest = after;
            match part {
                Part::Zero => here.fill(0),
                Part::In(file) => file.read_exact_at(here, range.start)?,
            }
            Ok(())
        })
    }
}
