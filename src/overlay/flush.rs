//! What makes an overlay durable.
//!
//! One flush, in this order, and why:
//!
//! 1. Take the set of blocks whose state changed. Each of them had its bytes in the diff before its mark was set, so
//!    the sync that follows covers them. A write that comes later is marked anew and belongs to the next flush.
//! 2. `fdatasync(diff)`. Before the index, since an index that is durable first could, after a crash, point at
//!    bytes that never reached the disk.
//! 3. Append one batch of records to the index.
//! 4. `fdatasync(index)`. Only now is the flush answered, and only now may the next batch be written: a crash tears
//!    at most the last batch (see [`super::log`]).
//!
//! Before step 3 the first flush of a process makes durable what it found in the index ([`Log::catch_up`]).
//!
//! When the log has grown enough, steps 3 and 4 write it anew instead, from the states as they were at step 1.
//!
//! Flushes that arrive while one runs share the next one. A failed sync latches the overlay: the kernel has forgotten
//! which pages did not reach the disk, so no later flush could be honest. A failed *append* (a full disk) latches
//! nothing: the marks are put back and the next flush tries again. Nor does a new log that could not be made.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::OwnedMutexGuard;

use super::Inner;
use super::dirty::runs_of;
use super::layer::blocking;
use super::live::Live;
use super::log::Log;
use super::map::Run;
use super::storage::ReplaceError;

/// Flush state: the log, and the numbers by which flushes find out whether another one covers them.
#[derive(Debug)]
pub(super) struct Flusher {
    /// Number of the last flush that began.
    began: AtomicU64,
    progress: Arc<tokio::sync::Mutex<Progress>>,
}

#[derive(Debug)]
pub(super) struct Progress {
    pub(super) log: Log,
    /// Number of the last flush that ended well.
    done: u64,
    /// Count of writes that it covered.
    covered: u64,
}

impl Flusher {
    pub(super) fn new(log: Log) -> Self {
        let progress = Progress { log, done: 0, covered: 0 };
        Self { began: AtomicU64::new(0), progress: Arc::new(tokio::sync::Mutex::new(progress)) }
    }

    /// Holds all flushes up, and lets the log be seen.
    #[cfg(test)]
    pub(super) async fn progress_for_test(&self) -> OwnedMutexGuard<Progress> {
        self.progress.clone().lock_owned().await
    }
}

impl Inner {
    /// Makes durable what was written before the call. Runs to its end even if the future is dropped.
    pub(super) async fn flush(self: &Arc<Self>) -> io::Result<()> {
        self.check_latch()?;
        let arrived = self.flusher.began.load(Ordering::SeqCst);
        let progress = self.flusher.progress.clone().lock_owned().await;
        if progress.done > arrived {
            return Ok(()); // It began after this call did.
        }
        let inner = self.clone();
        blocking(move || inner.flush_now(progress)).await
    }

    fn flush_now(&self, mut progress: OwnedMutexGuard<Progress>) -> io::Result<()> {
        self.check_latch()?;
        let number = self.flusher.began.fetch_add(1, Ordering::SeqCst) + 1;
        let written = self.written.load(Ordering::SeqCst);
        let dirty = self.dirty.take();
        if written != progress.covered || !dirty.is_empty() {
            let batch = runs_of(&self.layer.map, &dirty);
            let compacted = progress.log.wants_compaction().then(|| self.layer.map.own_runs());
            self.layer.diff.sync().map_err(|error| self.latch("diff", &error))?;
            let recorded = self.record(&mut progress.log, &batch, compacted.as_deref());
            recorded.inspect_err(|_| self.dirty.put_back(&dirty))?;
            if let Some(live) = &self.live {
                live.index_has(progress.log.batch());
            }
        }
        progress.covered = written;
        progress.done = number;
        Ok(())
    }

    /// Steps 3 and 4: `compacted` in place of the whole log if that can be made, else `batch` at its end.
    fn record(&self, log: &mut Log, batch: &[Run], compacted: Option<&[Run]>) -> io::Result<()> {
        if let Some(live) = self.live.as_ref().filter(|_| compacted.is_some()) {
            live.index_is_replaced();
        }
        match compacted.map(|runs| log.replace(runs)) {
            Some(Ok(())) => return Ok(()),
            Some(Err(ReplaceError::InDoubt(error))) => return Err(self.latch("index", &error)),
            // The next flush tries again.
            Some(Err(ReplaceError::Unchanged(_))) | None => {}
        }
        if log.catch_up()? {
            log.sync().map_err(|error| self.latch("index", &error))?;
        }
        if batch.is_empty() {
            return Ok(());
        }
        log.append(batch)?;
        log.sync().map_err(|error| self.latch("index", &error))
    }

    /// Refuses writes and flushes from now on.
    pub(super) fn latch(&self, file: &'static str, error: &io::Error) -> io::Error {
        self.latched.store(true, Ordering::SeqCst);
        // The next process must not believe writes that this one knows may be lost.
        if let Some(Err(error)) = self.live.as_ref().map(Live::disown) {
            tracing::error!(%error, "overlay: the live map cannot be removed, and may tell of writes that are lost");
        }
        tracing::error!(file, %error, "overlay: a file failed; writes and flushes fail from now on");
        latched()
    }

    fn check_latch(&self) -> io::Result<()> {
        if self.latched.load(Ordering::SeqCst) { Err(latched()) } else { Ok(()) }
    }

    /// Whether writes are accepted: nothing has failed to sync, and the overlay is not being sealed.
    pub(super) fn check_writable(&self) -> io::Result<()> {
        self.check_latch()?;
        if self.sealed.load(Ordering::SeqCst) {
            return Err(rustix::io::Errno::ROFS.into());
        }
        Ok(())
    }
}

fn latched() -> io::Error {
    rustix::io::Errno::IO.into()
}
