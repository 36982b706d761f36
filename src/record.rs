//! Recording: boot an image, see what it reads, and make its boot cache of that.
//!
//! The guest writes to a throw-away overlay with 4 KiB clusters, so that the image never changes and no cluster that is
//! copied up widens the trace. What it reads of the image below is seen in one of two places:
//!
//! * [`Via::Preload`]: by the tracer inside QEMU ([`preload`]). It costs least, and sees what any program does with a
//!   file; not static programs, nor io_uring.
//! * [`Via::Nbd`]: at a private export of the image ([`export`]). It sees everything, of any program that speaks NBD.
//!
//! A boot cache is written only of recordings that are whole, and only when every run came to its end.

mod boot;
mod child;
mod export;
mod misses;
mod preload;
mod save;

use std::ffi::OsString;
use std::io;
use std::process::ExitStatus;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

pub use misses::merge_misses;
pub use preload::library as tracer_library;
pub use save::Saved;

use crate::boot_cache::kept;
use crate::boot_cache::recording::Recording;
use crate::image::tree::TreeError;
use crate::qemu::until::WaitError;
use crate::qemu::{Accelerator, Aio, Until};
use crate::store::{ImageEntry, Store, StoreError};
use crate::trace::TraceError;

/// Most boots that are recorded in one go.
pub const RUNS_MAX: u32 = 99;

/// Where reads are seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Via {
    /// In the process that reads, by `LD_PRELOAD`.
    Preload,
    /// At an NBD export of the image.
    Nbd,
}

impl std::fmt::Display for Via {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Preload => "preload",
            Self::Nbd => "nbd",
        })
    }
}

/// What is run.
#[derive(Debug, Clone)]
pub enum Subject {
    /// A guest in QEMU, with one disk.
    Guest {
        /// Memory in MiB.
        memory_mib: u32,
        /// Virtual processors.
        cpus: u32,
        /// How QEMU reads files.
        aio: Aio,
        /// What runs it; none: KVM if it works.
        accelerator: Option<Accelerator>,
        /// More arguments for QEMU.
        arguments: Vec<OsString>,
    },
    /// A command. In its words `{image}` stands for the throw-away overlay (qcow2, writable) and `{disk}` for the
    /// image's disk itself (raw, not to be written): a path, or an NBD URI with [`Via::Nbd`].
    Command(Vec<OsString>),
}

/// What to record.
#[derive(Debug, Clone)]
pub struct Options {
    /// What is run.
    pub subject: Subject,
    /// When a run is over.
    pub until: Until,
    /// A run that takes longer has failed.
    pub time_limit: Duration,
    /// Boots; [`RUNS_MAX`] at most.
    pub runs: u32,
    /// Where reads are seen. None: by preload, and where that cannot see everything, at an export.
    pub via: Option<Via>,
    /// zstd level of the boot cache.
    pub level: i32,
}

/// How far a recording is, for a person who looks on.
#[derive(Debug, Clone, Copy)]
pub enum Progress {
    /// Run `run` has read `reads` times.
    Booting { run: u32, elapsed: Duration, reads: u64 },
    /// `done` of `total` blocks are compressed.
    Compressing { done: u64, total: u64 },
    /// The tracer does not see everything; the run begins anew at an export.
    Switching,
}

/// Hears of [`Progress`], from any thread.
pub type OnProgress<'a> = &'a (dyn Fn(Progress) + Sync);

/// What was recorded.
#[derive(Debug)]
pub struct Recorded {
    /// One a run.
    pub recordings: Vec<Recording>,
    /// Where the reads were seen in the end.
    pub via: Via,
    /// What ran the guest; none for a command.
    pub accelerator: Option<Accelerator>,
    /// Why the tracer was not enough, when it was not.
    pub switched: Option<String>,
    /// The boot cache.
    pub saved: Saved,
}

/// Why nothing was recorded. The image and its boot cache, if it had one, are as before.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// There is nothing to make better.
    #[error("the image has no boot cache yet: record it first")]
    NoBootCache,
    /// The boot did not come to its end.
    #[error("the boot was not over ({until}) within {limit_s} s{said}: look at --until and --time-limit")]
    TimeLimit { until: String, limit_s: u64, said: Said },
    /// The process ended before the condition was met.
    #[error("the process ended before the boot was over ({until}): {status}{said}")]
    Ended { until: String, status: ExitStatus, said: Said },
    /// QEMU stopped the guest.
    #[error(
        "KVM cannot run this guest on this host (QEMU: KVM internal error), as may be where hosts are guests \
         themselves: run it without (--accel tcg)"
    )]
    Kvm,
    /// The process cannot be started.
    #[error("{program} cannot be started: {source}")]
    Start { program: String, source: io::Error },
    /// The user wanted it.
    #[error("interrupted: nothing was recorded")]
    Interrupted,
    /// The trace is not whole.
    #[error("{0}: {advice}", advice = .0.advice())]
    Trace(#[from] TraceError),
    /// The tracer's library is not there.
    #[error(
        "the tracer {} was not found beside this program: set BOOTCACHE_TRACER to its path, or use --via nbd",
        preload::LIBRARY
    )]
    NoTracer,
    /// There is no one file that the tracer could watch.
    #[error("an incremental image is no single file, which the tracer needs: use --via nbd")]
    Increment,
    /// The command names the image nowhere.
    #[error("the command has neither {{image}} nor {{disk}} in it: put one where the disk belongs")]
    NoPlaceholder,
    /// The image is still arriving.
    #[error("the image has not arrived completely: wait for it, or use `bootcache pull`")]
    Incomplete,
    /// The command wrote to the image.
    #[error(
        "the command wrote to the image's disk itself: run `bootcache image verify`; use {{image}}, not {{disk}}"
    )]
    Written,
    /// What was read is not what the image is.
    #[error("block {block} of the disk is not the image's: run `bootcache image verify`")]
    WrongBlock { block: u64 },
    /// `qemu-img create` failed.
    #[error("the throw-away overlay cannot be made: {0}")]
    Overlay(String),
    /// The condition cannot be waited for.
    #[error(transparent)]
    Wait(#[from] WaitError),
    /// The store cannot be read or written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The image's digest tree cannot be read.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// Anything else of the operating system.
    #[error("{what}: {source}")]
    Io { what: &'static str, source: io::Error },
}

/// The last line that a process printed, for an error; may be nothing.
#[derive(Debug, Clone, Default)]
pub struct Said(pub String);

impl std::fmt::Display for Said {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.is_empty() { Ok(()) } else { write!(f, "; it said last: {}", self.0) }
    }
}

/// Ties an I/O error to what was being done.
fn io(what: &'static str) -> impl FnOnce(io::Error) -> RecordError {
    move |source| RecordError::Io { what, source }
}

/// Records `entry` as `options` say and gives it its boot cache. Must run on tokio's multi-threaded runtime. When
/// `cancel` is cancelled the guest is ended, everything made on the way removed.
///
/// # Errors
/// [`RecordError`]; the image is as it was before.
pub async fn record(
    store: &Store,
    entry: &ImageEntry,
    options: &Options,
    progress: OnProgress<'_>,
    cancel: &CancellationToken,
) -> Result<Recorded, RecordError> {
    if !entry.is_complete() {
        return Err(RecordError::Incomplete);
    }
    let hold = store.hold(entry.root)?;
    let runs = options.runs.clamp(1, RUNS_MAX);
    kept::next(&entry.dir, runs as usize).map_err(io("the recordings"))?;
    let mut plan = boot::Plan::new(store, entry, options).await?;
    let mut recordings = Vec::new();
    let mut switched = None;
    let mut run = 1;
    while run <= runs {
        let seen = |elapsed, reads| progress(Progress::Booting { run, elapsed, reads });
        match plan.boot(&seen, cancel).await {
            Ok(recording) => {
                recordings.push(recording);
                run += 1;
            }
            Err(RecordError::Trace(error)) if error.is_incomplete() && plan.may_switch() => {
                tracing::info!("recording at an NBD export instead: {error}");
                progress(Progress::Switching);
                // One boot cache is not made of recordings from two places.
                (switched, run) = (Some(error.to_string()), 1);
                recordings.clear();
                plan.switch();
            }
            Err(error) => return Err(error),
        }
    }
    let saved = save::save(store, entry, options, &recordings, progress, cancel).await?;
    drop(hold);
    Ok(Recorded { recordings, via: plan.via(), accelerator: plan.accelerator(), switched, saved })
}
