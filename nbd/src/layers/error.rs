//! A disk that fails on purpose, by a plan that can be changed while it is served.

use std::io;
use std::sync::{Mutex, PoisonError};

use super::Operation;
use super::gate::{Gate, Gated};
use crate::disk::BoxFuture;

/// A disk whose requests fail as its [`Errors`] say.
pub type ErrorDisk = Gated<Errors>;

/// What happens to a request that is chosen to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It is answered with this error number of the system, for instance 28 for `ENOSPC`.
    Errno(i32),
    /// The layer panics, as a layer with a bug might.
    Panic,
    /// It is never answered.
    Hang,
}

/// Which requests fail, and how. None do to begin with.
#[derive(Debug, Default)]
pub struct Errors {
    plan: Mutex<Option<Plan>>,
}

#[derive(Debug)]
struct Plan {
    fault: Fault,
    operations: Vec<Operation>,
    every: u64,
    seen: u64,
}

impl Errors {
    /// From now on every `every`-th request of `operations` meets `fault`, the first included if `every` is 1.
    pub fn fail(&self, operations: &[Operation], every: u64, fault: Fault) {
        let plan = Plan { fault, operations: operations.to_vec(), every: every.max(1), seen: 0 };
        *self.lock() = Some(plan);
    }

    /// From now on nothing fails.
    pub fn heal(&self) {
        *self.lock() = None;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Plan>> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fault(&self, operation: Operation) -> Option<Fault> {
        let mut plan = self.lock();
        let plan = plan.as_mut().filter(|plan| plan.operations.contains(&operation))?;
        plan.seen += 1;
        plan.seen.is_multiple_of(plan.every).then_some(plan.fault)
    }
}

impl Gate for Errors {
    fn pass(&self, operation: Operation) -> BoxFuture<'_, io::Result<()>> {
        let fault = self.fault(operation);
        Box::pin(async move {
            match fault {
                None => Ok(()),
                Some(Fault::Errno(number)) => Err(io::Error::from_raw_os_error(number)),
                Some(Fault::Panic) => panic!("{operation:?} was told to panic"),
                Some(Fault::Hang) => std::future::pending().await,
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::disk::Disk;
    use crate::layers::MemoryDisk;

    #[tokio::test]
    async fn every_third_write_fails_and_reads_do_not() {
        let disk = ErrorDisk::new(Arc::new(MemoryDisk::new(4096)), Errors::default());
        disk.gate().fail(&[Operation::Write], 3, Fault::Errno(28));
        let mut failed = Vec::new();
        for _ in 0..6 {
            disk.read(0, &mut [0; 16]).await.unwrap();
            failed.push(disk.write(0, b"x", false).await.is_err());
        }
        assert_eq!(failed, [false, false, true, false, false, true]);
        disk.gate().heal();
        for _ in 0..6 {
            disk.write(0, b"x", false).await.unwrap();
        }
    }
}
