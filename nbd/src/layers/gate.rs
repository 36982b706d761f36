//! What the layers that hold requests up, or refuse them, have in common.

use std::io;

use super::Operation;
use crate::disk::{BoxFuture, Disk, Features, SharedDisk, StatusExtent, ZeroFlags};

/// Says when a request may go on, and whether.
pub trait Gate: Send + Sync + 'static {
    /// Ends when `operation` may be carried out; an error is its answer instead.
    fn pass(&self, operation: Operation) -> BoxFuture<'_, io::Result<()>>;
}

/// A disk behind a [`Gate`]. Every request goes the asynchronous way, and passes the gate once.
pub struct Gated<G> {
    disk: SharedDisk,
    gate: G,
}

impl<G: std::fmt::Debug> std::fmt::Debug for Gated<G> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gated").field("gate", &self.gate).finish_non_exhaustive()
    }
}

impl<G> Gated<G> {
    /// Puts `gate` before `disk`.
    pub fn new(disk: SharedDisk, gate: G) -> Self {
        Self { disk, gate }
    }

    /// The gate, to change it while the disk is served.
    pub fn gate(&self) -> &G {
        &self.gate
    }
}

impl<G: Gate> Gated<G> {
    fn after<'a, T: Send>(
        &'a self,
        operation: Operation,
        run: impl FnOnce(&'a dyn Disk) -> BoxFuture<'a, io::Result<T>> + Send + 'a,
    ) -> BoxFuture<'a, io::Result<T>> {
        Box::pin(async move {
            self.gate.pass(operation).await?;
            run(&*self.disk).await
        })
    }
}

impl<G: Gate> Disk for Gated<G> {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn features(&self) -> Features {
        self.disk.features()
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> BoxFuture<'a, io::Result<()>> {
        self.after(Operation::Read, move |disk| disk.read(offset, buf))
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8], fua: bool) -> BoxFuture<'a, io::Result<()>> {
        self.after(Operation::Write, move |disk| disk.write(offset, data, fua))
    }

    fn flush(&self) -> BoxFuture<'_, io::Result<()>> {
        self.after(Operation::Flush, |disk| disk.flush())
    }

    fn trim(&self, offset: u64, length: u64, fua: bool) -> BoxFuture<'_, io::Result<()>> {
        self.after(Operation::Trim, move |disk| disk.trim(offset, length, fua))
    }

    fn zero(&self, offset: u64, length: u64, flags: ZeroFlags, fua: bool) -> BoxFuture<'_, io::Result<()>> {
        self.after(Operation::Zero, move |disk| disk.zero(offset, length, flags, fua))
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
        let context = context.to_owned();
        Box::pin(async move {
            self.gate.pass(Operation::Status).await?;
            self.disk.status(&context, offset, length, extents_max).await
        })
    }

    fn prefetch(&self, offset: u64, length: u64) -> BoxFuture<'_, io::Result<()>> {
        self.after(Operation::Prefetch, move |disk| disk.prefetch(offset, length))
    }
}
