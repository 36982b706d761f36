//! A disk that is slow on purpose: each request waits before it is carried out. Requests wait side by side.

use std::io;
use std::time::Duration;

use super::Operation;
use super::gate::{Gate, Gated};
use crate::disk::BoxFuture;

/// A disk whose requests wait as its [`Delays`] say.
pub type DelayDisk = Gated<Delays>;

/// How long requests wait.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Delays {
    /// Reads and status requests.
    pub read: Duration,
    /// Writes, trims and zeroes.
    pub write: Duration,
    /// Flushes.
    pub flush: Duration,
}

impl Delays {
    /// All requests wait for as long.
    pub const fn all(delay: Duration) -> Self {
        Self { read: delay, write: delay, flush: delay }
    }
}

impl Gate for Delays {
    fn pass(&self, operation: Operation) -> BoxFuture<'_, io::Result<()>> {
        let delay = match operation {
            Operation::Read | Operation::Status | Operation::Prefetch => self.read,
            Operation::Write | Operation::Trim | Operation::Zero => self.write,
            Operation::Flush => self.flush,
        };
        Box::pin(async move {
            tokio::time::sleep(delay).await;
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::disk::Disk;
    use crate::layers::MemoryDisk;

    #[tokio::test(start_paused = true)]
    async fn requests_wait_side_by_side() {
        let memory = Arc::new(MemoryDisk::new(8192));
        let delays = Delays { read: Duration::from_secs(3), ..Delays::all(Duration::from_secs(5)) };
        let disk = DelayDisk::new(memory, delays);
        let began = tokio::time::Instant::now();
        let (mut a, mut b) = ([0; 512], [0; 512]);
        let (a, b, write) =
            tokio::join!(disk.read(0, &mut a), disk.read(512, &mut b), disk.write(0, &[1; 512], false));
        assert!(a.is_ok() && b.is_ok() && write.is_ok());
        assert_eq!(began.elapsed().as_secs(), 5);
    }
}
