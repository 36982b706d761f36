//! Which export names a socket answers to.

use std::io;
use std::sync::Arc;

use bootcache_nbd::disk::FileRange;
use bootcache_nbd::{
    Attempt, BoxFuture, Disk, Export, Exports, Features, OpenError, SharedDisk, StatusExtent,
};

use super::node::{Node, OpenImage};

/// Every image and overlay of the node by its name, or just one of them.
pub(super) struct NodeExports {
    /// Where the disks come from.
    pub(super) node: Arc<Node>,
    /// The one name to answer to, if only one. It is the default export too.
    pub(super) only: Option<String>,
}

impl Exports for NodeExports {
    fn open<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Export, OpenError>> {
        Box::pin(async move {
            match &self.only {
                Some(only) if name.is_empty() || name == only => self.node.export(only).await,
                Some(_) => Err(OpenError::Unknown("there is no export of that name".to_owned())),
                None => self.node.export(name).await,
            }
        })
    }

    fn list(&self) -> BoxFuture<'_, Vec<(String, String)>> {
        Box::pin(async move {
            let mut names = self.node.export_names();
            names.retain(|(name, _)| self.only.as_ref().is_none_or(|only| name == only));
            names
        })
    }
}

/// An image's disk that keeps the image open for as long as somebody reads it.
pub(super) struct HeldImage {
    pub(super) disk: SharedDisk,
    pub(super) _image: Arc<OpenImage>,
}

impl Disk for HeldImage {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn features(&self) -> Features {
        self.disk.features()
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Attempt {
        self.disk.try_read(offset, buf)
    }

    fn in_file(&self, offset: u64, length: usize) -> Option<FileRange> {
        self.disk.in_file(offset, length)
    }

    fn note_read(&self, offset: u64, length: usize) {
        self.disk.note_read(offset, length);
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> BoxFuture<'a, io::Result<()>> {
        self.disk.read(offset, buf)
    }

    fn contexts(&self) -> &'static [&'static str] {
        self.disk.contexts()
    }

    fn status(
        &self,
        context: &str,
        offset: u64,
        length: u64,
        extents_max: usize,
    ) -> BoxFuture<'_, io::Result<Vec<StatusExtent>>> {
        self.disk.status(context, offset, length, extents_max)
    }

    fn prefetch(&self, offset: u64, length: u64) -> BoxFuture<'_, io::Result<()>> {
        self.disk.prefetch(offset, length)
    }
}
