//! A disk that panics answers `EIO`: the request that met the bug fails, and everything else goes on.

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

use futures_util::FutureExt;

use crate::disk::Attempt;

/// Runs a `try_` form of a disk.
pub(super) fn attempt(run: impl FnOnce() -> Attempt) -> Attempt {
    // What a panic leaves half-done belongs to the disk, which has to live with panics at any place anyway.
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| Attempt::Ready(Err(failed(&*panic))))
}

/// Asks or tells a disk what no answer depends on; one that panics gives the default.
pub(super) fn aside<T: Default>(run: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        failed(&*panic);
        T::default()
    })
}

/// Runs an asynchronous form of a disk, the call that makes the future included.
pub(super) async fn guarded<T, R>(run: impl FnOnce() -> R) -> io::Result<T>
where
    R: Future<Output = io::Result<T>>,
{
    let future = catch_unwind(AssertUnwindSafe(run)).map_err(|panic| failed(&*panic))?;
    AssertUnwindSafe(future).catch_unwind().await.unwrap_or_else(|panic| Err(failed(&*panic)))
}

fn failed(panic: &(dyn Any + Send)) -> io::Error {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    tracing::error!("a disk panicked: {}", text.unwrap_or("no message"));
    io::Error::other("the disk failed")
}
