//! One boot that is recorded: the overlay, the watcher, the process, the wait, the recording.

use std::ffi::{OsStr, OsString};
use std::net::Ipv4Addr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::child::Recorded;
use super::export::TraceExport;
use super::{Options, RecordError, Subject, Via, io, preload};
use crate::boot_cache::recording::Recording;
use crate::qemu::until::Condition;
use crate::qemu::{self, Accelerator, Machine, Serial, Until};
use crate::store::{ImageEntry, Store};
use crate::trace::{Trace, TraceError};

/// How often the watcher is looked at.
const TICK: Duration = Duration::from_millis(200);
/// A process that has not loaded the tracer by now never will.
const ATTACH_DEADLINE: Duration = Duration::from_secs(10);
/// For what an ended process has printed to be looked at.
const LAST_WORDS: Duration = Duration::from_millis(300);
/// Making an overlay writes a few tables.
const CREATE_DEADLINE: Duration = Duration::from_secs(30);

/// What every run has in common.
#[derive(Debug)]
pub(super) struct Plan<'a> {
    store: &'a Store,
    entry: &'a ImageEntry,
    options: &'a Options,
    via: Via,
    accelerator: Option<Accelerator>,
}

/// Where one boot's reads are seen.
enum Watcher {
    Preload(Trace),
    Nbd(TraceExport),
}

/// Hears of the time since the start and the reads so far.
pub(super) type Seen<'a> = &'a (dyn Fn(Duration, u64) + Sync);

impl<'a> Plan<'a> {
    pub(super) async fn new(
        store: &'a Store,
        entry: &'a ImageEntry,
        options: &'a Options,
    ) -> Result<Self, RecordError> {
        let increment = entry.below().is_some();
        let via = match options.via {
            Some(Via::Preload) if increment => return Err(RecordError::Increment),
            Some(via) => via,
            None if increment => Via::Nbd,
            None => Via::Preload,
        };
        let accelerator = match &options.subject {
            Subject::Guest { accelerator: Some(accelerator), .. } => Some(*accelerator),
            Subject::Guest { accelerator: None, .. } => Some(Accelerator::detect().await),
            Subject::Command(words) => {
                let named = |place: &str| words.iter().any(|word| !pieces(word, place).1.is_empty());
                if !named("{image}") && !named("{disk}") {
                    return Err(RecordError::NoPlaceholder);
                }
                None
            }
        };
        Ok(Self { store, entry, options, via, accelerator })
    }

    /// Where reads are seen.
    pub(super) fn via(&self) -> Via {
        self.via
    }

    /// What runs the guest.
    pub(super) fn accelerator(&self) -> Option<Accelerator> {
        self.accelerator
    }

    /// Whether a boot that the tracer could not see whole may be seen at an export instead.
    pub(super) fn may_switch(&self) -> bool {
        let free = self.options.via.is_none() && self.via == Via::Preload;
        free && matches!(self.options.subject, Subject::Guest { .. })
    }

    /// Sees reads at an export from now on.
    pub(super) fn switch(&mut self) {
        self.via = Via::Nbd;
    }

    /// Boots once.
    pub(super) async fn boot(
        &self,
        seen: Seen<'_>,
        cancel: &CancellationToken,
    ) -> Result<Recording, RecordError> {
        let scratch = self.store.scratch("record")?;
        let before = self.disk_state()?;
        let watcher = self.watcher(scratch.path())?;
        let overlay = scratch.join("overlay.qcow2");
        self.create_overlay(&overlay, &watcher).await?;
        let condition = Condition::prepare(self.options.until.clone(), Ipv4Addr::LOCALHOST).await?;
        let mut command = self.command(&overlay, &watcher);
        if let Watcher::Preload(trace) = &watcher {
            let library = preload::library()?;
            command.envs(preload::environment(&library, &self.entry.disk_path(), trace.path()));
        }
        let (mut child, serial) = Recorded::start(command)?;
        let (start, stuck) = (Instant::now(), child.stuck());
        let end_ns = {
            let mut met = std::pin::pin!(condition.met(serial, || watcher.reads().unwrap_or(0)));
            let met = tokio::select! {
                met = &mut met => Ok(met),
                error = watch(&watcher, start, seen) => Err(error),
                // The last it printed may not have been looked at yet.
                status = child.ended() => match tokio::time::timeout(LAST_WORDS, met).await {
                    Ok(met) => Ok(met),
                    Err(_) => self.ended(status.map_err(io("waiting for the process"))?, &child),
                },
                () = tokio::time::sleep(self.options.time_limit) => Err(self.too_late(&child)),
                () = stuck.cancelled() => Err(RecordError::Kvm),
                () = cancel.cancelled() => Err(RecordError::Interrupted),
            };
            met.map(|met| watcher.end_ns(met))
        };
        child.stop().await;
        // Before anything else that may be wrong: of what it did, this is the worst.
        if self.disk_state()? != before {
            return Err(RecordError::Written);
        }
        let end_ns = end_ns.map_err(|error| self.better(error, &watcher))?;
        watcher.recording(self.entry.manifest.size, end_ns).await
    }

    fn watcher(&self, dir: &Path) -> Result<Watcher, RecordError> {
        match self.via {
            Via::Preload => Ok(Watcher::Preload(Trace::create(&dir.join("trace"), &self.entry.disk_path())?)),
            Via::Nbd => Ok(Watcher::Nbd(TraceExport::start(self.store, self.entry, dir.join("nbd.sock"))?)),
        }
    }

    async fn create_overlay(&self, overlay: &Path, watcher: &Watcher) -> Result<(), RecordError> {
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-o", "cluster_size=4096", "-b"]);
        command.arg(watcher.disk(self.entry)).arg(overlay).arg(self.entry.manifest.size.to_string());
        command.stdin(Stdio::null()).kill_on_drop(true);
        let output = tokio::time::timeout(CREATE_DEADLINE, command.output())
            .await
            .map_err(|_| RecordError::Overlay("qemu-img does not end".to_owned()))?
            .map_err(|source| RecordError::Start { program: "qemu-img".to_owned(), source })?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        Err(RecordError::Overlay(said.lines().last().unwrap_or_default().to_owned()))
    }

    fn command(&self, overlay: &Path, watcher: &Watcher) -> Command {
        match &self.options.subject {
            Subject::Guest { memory_mib, cpus, aio, arguments, .. } => {
                let machine = Machine {
                    disk: qemu::Disk::Qcow2(overlay.to_owned()),
                    aio: *aio,
                    memory_mib: *memory_mib,
                    cpus: *cpus,
                    accelerator: self.accelerator.unwrap_or(Accelerator::Tcg),
                    serial: Serial::Stdout,
                    qmp: None,
                    // A first boot may well end with one.
                    reboots: !matches!(self.options.until, Until::Exit),
                    arguments: arguments.clone(),
                };
                let mut command = Command::new(qemu::PROGRAM);
                command.args(machine.arguments());
                command
            }
            Subject::Command(words) => {
                let disk = watcher.disk(self.entry);
                let mut words = words
                    .iter()
                    .map(|word| replaced(&replaced(word, "{image}", overlay.as_os_str()), "{disk}", &disk));
                let mut command = Command::new(words.next().unwrap_or_default());
                command.args(words);
                command
            }
        }
    }

    fn ended(&self, status: std::process::ExitStatus, child: &Recorded) -> Result<Instant, RecordError> {
        if matches!(self.options.until, Until::Exit) && status.success() {
            return Ok(Instant::now());
        }
        Err(RecordError::Ended { until: self.options.until.to_string(), status, said: child.said() })
    }

    fn too_late(&self, child: &Recorded) -> RecordError {
        RecordError::TimeLimit {
            until: self.options.until.to_string(),
            limit_s: self.options.time_limit.as_secs(),
            said: child.said(),
        }
    }

    /// A wait for a quiet disk that saw no read at all is about the tracer, not about the guest.
    fn better(&self, error: RecordError, watcher: &Watcher) -> RecordError {
        match (&error, watcher) {
            (RecordError::TimeLimit { .. }, Watcher::Preload(trace))
                if matches!(self.options.until, Until::Idle(_))
                    && trace.reads().is_ok_and(|reads| reads == 0) =>
            {
                TraceError::NoReads.into()
            }
            _ => error,
        }
    }

    /// Length and last change of the image's own file.
    fn disk_state(&self) -> Result<(u64, i64, i64), RecordError> {
        let meta = std::fs::metadata(self.entry.disk_path()).map_err(io("the image's disk"))?;
        Ok((meta.len(), meta.mtime(), meta.mtime_nsec()))
    }
}

impl Watcher {
    /// The image itself, as a program is told it.
    fn disk(&self, entry: &ImageEntry) -> OsString {
        match self {
            Self::Preload(_) => entry.disk_path().into(),
            Self::Nbd(export) => export.uri().into(),
        }
    }

    fn reads(&self) -> Result<u64, TraceError> {
        match self {
            Self::Preload(trace) => trace.reads(),
            Self::Nbd(export) => Ok(export.reads()),
        }
    }

    /// `met` on the clock of the reads.
    fn end_ns(&self, met: Instant) -> u64 {
        let now = match self {
            Self::Preload(trace) => trace.elapsed_ns(),
            Self::Nbd(export) => export.elapsed_ns(),
        };
        now.saturating_sub(u64::try_from(met.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    /// Whether the boot is being seen whole, as far as can be told while it runs.
    fn check(&self, elapsed: Duration) -> Result<(), TraceError> {
        let Self::Preload(trace) = self else { return Ok(()) };
        trace.check()?;
        if elapsed > ATTACH_DEADLINE && !trace.is_attached()? { Err(TraceError::NotAttached) } else { Ok(()) }
    }

    async fn recording(self, size: u64, end_ns: u64) -> Result<Recording, RecordError> {
        match self {
            Self::Preload(trace) => Ok(trace.recording(size, end_ns)?),
            Self::Nbd(export) => export.recording(end_ns).await,
        }
    }
}

/// Tells how far the boot is, until its trace is of no use.
async fn watch(watcher: &Watcher, start: Instant, seen: Seen<'_>) -> RecordError {
    let mut tick = tokio::time::interval(TICK);
    loop {
        tick.tick().await;
        match watcher.check(start.elapsed()).and_then(|()| watcher.reads()) {
            Ok(reads) => seen(start.elapsed(), reads),
            Err(error) => return error.into(),
        }
    }
}

/// What is before the first `place` in `word`, and the rest from there; the rest is empty when there is none.
fn pieces<'w>(word: &'w OsStr, place: &str) -> (&'w [u8], &'w [u8]) {
    let bytes = word.as_bytes();
    let at = bytes.windows(place.len()).position(|window| window == place.as_bytes());
    bytes.split_at(at.unwrap_or(bytes.len()))
}

/// `word` with every `place` replaced by `value`.
fn replaced(word: &OsStr, place: &str, value: &OsStr) -> OsString {
    let mut result = Vec::new();
    let mut word = word;
    loop {
        let (before, rest) = pieces(word, place);
        result.extend_from_slice(before);
        let Some(after) = rest.strip_prefix(place.as_bytes()) else { return OsString::from_vec(result) };
        result.extend_from_slice(value.as_bytes());
        word = OsStr::from_bytes(after);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placeholders_are_replaced_wherever_they_stand() {
        let replaced = |word: &str| replaced(OsStr::new(word), "{image}", OsStr::new("/x"));
        assert_eq!(replaced("file={image},a={image}"), "file=/x,a=/x");
        assert_eq!(replaced("{image"), "{image");
        assert_eq!(replaced(""), "");
    }
}
