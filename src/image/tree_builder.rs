//! Writes a digest tree's file, page by page, from as many threads as there are.
//!
//! Memory does not grow with the disk: what is known goes to its place in the file at once. A file that was not
//! finished has no header, and so is not a tree.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::digest::{DIGEST_BYTES, Digest};

use super::extents::data_extents;
use super::page::{PAGE_BLOCKS, PAGE_DIGEST_BYTES, PAGE_SPAN, Page};
use super::tree::{GROUP_BYTES_MAX, Layout, TreeError, group_digest, root_digest, zero_page_digest};

/// A tree that is being made.
#[derive(Debug)]
pub struct TreeBuilder {
    file: File,
    path: PathBuf,
    layout: Layout,
}

impl TreeBuilder {
    /// Starts the tree of a disk of `size` bytes at `path`; what was there is replaced.
    ///
    /// # Errors
    /// [`TreeError::TooLarge`], [`TreeError::Io`].
    pub fn create(path: &Path, size: u64) -> Result<Self, TreeError> {
        let layout = Layout::new(size)?;
        let io_error = |error| TreeError::Io { path: path.to_owned(), error };
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)
            .map_err(io_error)?;
        file.set_len(layout.length()).map_err(io_error)?;
        Ok(Self { file, path: path.to_owned(), layout })
    }

    /// Number of pages.
    pub const fn pages(&self) -> u64 {
        self.layout.pages()
    }

    /// Sets page `index`, once. Pages that are never set are zero.
    ///
    /// # Errors
    /// [`TreeError::Io`].
    pub fn put(&self, index: u64, page: &Page) -> Result<(), TreeError> {
        if page.is_zero() {
            return Ok(());
        }
        write_page(&self.file, self.layout, index, page)
            .and_then(|()| self.file.write_all_at(&page.digest().0, self.layout.page_digest_at(index)))
            .map_err(|error| self.io_error(error))
    }

    /// Computes groups and root, makes the file durable, and returns the root.
    ///
    /// # Errors
    /// [`TreeError::Io`].
    pub fn finish(self) -> Result<Digest, TreeError> {
        self.write_top().map_err(|error| self.io_error(error))
    }

    fn write_top(&self) -> io::Result<Digest> {
        let layout = self.layout;
        let mut top = Vec::new();
        let mut buffer = [0; GROUP_BYTES_MAX];
        for group in 0..layout.groups() {
            let length = usize::try_from(layout.group_length(group)).expect("a group has at most 4096 bytes");
            let bytes = &mut buffer[..length];
            self.file.read_exact_at(bytes, layout.group_at(group))?;
            let (digests, _) = bytes.as_chunks_mut::<DIGEST_BYTES>();
            digests.iter_mut().filter(|digest| **digest == [0; DIGEST_BYTES]).for_each(|digest| {
                *digest = zero_page_digest().0;
            });
            self.file.write_all_at(bytes, layout.group_at(group))?;
            top.extend_from_slice(&group_digest(bytes).0);
        }
        self.file.write_all_at(&top, layout.top_at())?;
        let root = root_digest(layout.size, &top);
        self.file.write_all_at(&layout.header(root), 0)?;
        self.file.sync_all()?;
        Ok(root)
    }

    fn io_error(&self, error: io::Error) -> TreeError {
        TreeError::Io { path: self.path.clone(), error }
    }
}

/// Writes bitmap and digests of page `index` to their places.
pub(super) fn write_page(file: &File, layout: Layout, index: u64, page: &Page) -> io::Result<()> {
    let mut slots = [0; PAGE_DIGEST_BYTES];
    let (digests, _) = slots.as_chunks_mut::<DIGEST_BYTES>();
    page.digests().for_each(|(i, digest)| digests[i] = digest.0);
    file.write_all_at(&slots, layout.digest_at(index * PAGE_BLOCKS))?;
    file.write_all_at(&page.bitmap().to_le_bytes(), layout.bitmap_at(index))
}

/// Makes the tree of the first `size` bytes of `disk` at `path`, in one thread, and returns the root.
///
/// # Errors
/// [`TreeError::TooLarge`], [`TreeError::Io`], also when the disk is shorter than `size`.
pub fn build_from(disk: &File, size: u64, path: &Path) -> Result<Digest, TreeError> {
    let builder = TreeBuilder::create(path, size)?;
    let mut buffer = vec![0; usize::try_from(PAGE_SPAN).expect("a page spans 512 KiB")];
    let mut done = 0;
    for extent in data_extents(disk, 0..size) {
        let extent = extent.map_err(|error| builder.io_error(error))?;
        let pages = done.max(extent.start / PAGE_SPAN)..extent.end.div_ceil(PAGE_SPAN);
        for page in pages.clone() {
            let at = page * PAGE_SPAN;
            let length = usize::try_from(PAGE_SPAN.min(size - at)).expect("a page spans 512 KiB");
            disk.read_exact_at(&mut buffer[..length], at).map_err(|error| builder.io_error(error))?;
            builder.put(page, &Page::of(&buffer[..length]))?;
        }
        done = done.max(pages.end);
    }
    builder.finish()
}
