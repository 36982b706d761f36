//! `bootcache record`: boot an image once, or several times, and keep what it read.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use bootcache::analyze::Summary;
use bootcache::boot_cache::LEVEL_DEFAULT;
use bootcache::boot_cache::kept;
use bootcache::name::ImageName;
use bootcache::qemu::{Accelerator, Aio, Until};
use bootcache::record::{self, Options, Progress, RecordError, Recorded, Subject, Via};
use bootcache::store::{ImageEntry, Store};
use indicatif::{HumanBytes, HumanCount, ProgressBar, ProgressStyle};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::Globals;

const INTERRUPTED: u8 = 130;
/// Kernels are larger: whoever read less has not started one.
const BOOTED_MIN: u64 = 1 << 20;

/// The guest writes to a throw-away overlay: the image itself is only read.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The image
    image: ImageName,
    /// When the boot is over: serial:REGEX, tcp:PORT (the guest connects to 10.0.2.2:PORT), idle:SECONDS (nothing read
    /// for so long), exit (of the command) [default: as last time; else idle:10, with a command exit]
    #[arg(long, value_name = "CONDITION")]
    until: Option<Until>,
    /// Fail when the boot takes longer than this many seconds
    #[arg(long, value_name = "SECONDS", default_value = "300", value_parser = clap::value_parser!(u64).range(1..=86400))]
    time_limit: u64,
    /// Boot so many times; what only a minority of the boots read goes last
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u32).range(1..=i64::from(record::RUNS_MAX)))]
    runs: u32,
    /// See reads in the process (preload) or at an NBD export (nbd) [default: preload, nbd where that sees too little]
    #[arg(long, value_enum)]
    via: Option<ViaArg>,
    /// Memory of the guest in MiB
    #[arg(long, value_name = "MIB", default_value = "1024", value_parser = clap::value_parser!(u32).range(16..))]
    memory: u32,
    /// Virtual processors of the guest
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u32).range(1..=255))]
    cpus: u32,
    /// What runs the guest [default: kvm when a guest really runs on it, else tcg]
    #[arg(long, value_name = "kvm|tcg")]
    accel: Option<Accelerator>,
    /// How QEMU reads files
    #[arg(long, value_enum, default_value = "threads")]
    aio: AioArg,
    /// One more argument for QEMU; may be repeated
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    qemu_arg: Vec<OsString>,
    /// zstd level of the boot cache
    #[arg(long, value_name = "1-22", default_value_t = LEVEL_DEFAULT, value_parser = clap::value_parser!(i32).range(1..=22))]
    level: i32,
    /// Boot nothing: make the boot cache better by what production boots missed, as nodes keep it in the file `misses` of
    /// the image's folder; may be given several times
    #[arg(long, value_name = "FILE", conflicts_with_all = ["until", "runs", "via", "command"])]
    merge_misses: Vec<PathBuf>,
    /// Run this instead of QEMU; {image} in it is a throw-away qcow2 overlay, {disk} the raw disk, only to be read
    #[arg(last = true, value_name = "COMMAND", conflicts_with_all = ["memory", "cpus", "accel", "aio", "qemu_arg"])]
    command: Vec<OsString>,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum ViaArg {
    Preload,
    Nbd,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum AioArg {
    Threads,
    Native,
    #[value(name = "io_uring")]
    IoUring,
}

pub(crate) fn run(globals: &Globals, args: Args) -> anyhow::Result<ExitCode> {
    let store = globals.existing_store()?;
    let entry = store.resolve(&args.image)?;
    super::image::refuse_container(&args.image, &entry)?;
    let name = args.image.clone();
    if !args.merge_misses.is_empty() {
        return merge(globals, &store, &entry, &args);
    }
    let options = options(args, &entry)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let recorded = runtime.block_on(interruptible(&store, &entry, &options));
    match recorded {
        Ok(recorded) => {
            let manifest = &recorded.saved.entry.manifest;
            let summary = Summary::of(&recorded.recordings, manifest.size, Some(manifest.allocated));
            if globals.json {
                print_json(&name, &options, &recorded, &summary)?;
            } else {
                print_summary(&name, &options, &recorded, &summary);
            }
            if let Some(doubt) = doubt(&options, summary.unique) {
                super::say(&doubt);
            }
        }
        Err(error) if matches!(error.downcast_ref(), Some(RecordError::Interrupted)) => {
            eprintln!("bootcache: {error}");
            return Ok(ExitCode::from(INTERRUPTED));
        }
        Err(error) => return Err(error),
    }
    Ok(ExitCode::SUCCESS)
}

/// Merges what was missed into the boot cache.
fn merge(globals: &Globals, store: &Store, entry: &ImageEntry, args: &Args) -> anyhow::Result<ExitCode> {
    let mut misses = Vec::new();
    for path in &args.merge_misses {
        let (root, recording) =
            kept::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        if root != entry.root {
            bail!("{} is of image {}, not of '{}'", path.display(), root.short(), args.image);
        }
        misses.push(recording);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let cancel = CancellationToken::new();
    let merged = record::merge_misses(store, entry, &misses, args.level, &|_| (), &cancel);
    let (saved, new) = runtime.block_on(merged)?;
    if globals.json {
        println!("{}", json!({ "root": entry.root, "new_blocks": new, "frames": saved.written.frames }));
    } else {
        let length = HumanBytes(saved.written.file_length);
        println!("{new} blocks are new: the boot cache is {length} in {} frames", saved.written.frames);
    }
    Ok(ExitCode::SUCCESS)
}

fn options(args: Args, entry: &ImageEntry) -> anyhow::Result<Options> {
    let last_time = entry.manifest.boot.as_ref().and_then(|boot| boot.until.as_deref());
    let is_command = !args.command.is_empty();
    let until = match (args.until, last_time) {
        (Some(Until::Exit), _) if !is_command => bail!("exit is a condition for a command: see --until"),
        (Some(until), _) => until,
        (None, _) if is_command => Until::Exit,
        (None, Some(text)) => text.parse()?,
        (None, None) => Until::Idle(Duration::from_secs(10)),
    };
    let subject = if is_command {
        Subject::Command(args.command)
    } else {
        Subject::Guest {
            memory_mib: args.memory,
            cpus: args.cpus,
            aio: match args.aio {
                AioArg::Threads => Aio::Threads,
                AioArg::Native => Aio::Native,
                AioArg::IoUring => Aio::IoUring,
            },
            accelerator: args.accel,
            arguments: args.qemu_arg,
        }
    };
    Ok(Options {
        subject,
        until,
        time_limit: Duration::from_secs(args.time_limit),
        runs: args.runs,
        via: args.via.map(|via| match via {
            ViaArg::Preload => Via::Preload,
            ViaArg::Nbd => Via::Nbd,
        }),
        level: args.level,
    })
}

/// Records with a line that shows how far it is, until it is done or the user wants it to end.
async fn interruptible(store: &Store, entry: &ImageEntry, options: &Options) -> anyhow::Result<Recorded> {
    let mut interrupt = signal(SignalKind::interrupt()).context("Ctrl-C cannot be waited for")?;
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM cannot be waited for")?;
    let cancel = CancellationToken::new();
    let line = line();
    let runs = options.runs;
    let show = |progress| show(&line, runs, progress);
    let recorded = {
        let mut work = std::pin::pin!(record::record(store, entry, options, &show, &cancel));
        loop {
            tokio::select! {
                recorded = &mut work => break recorded,
                _ = interrupt.recv() => cancel.cancel(),
                _ = terminate.recv() => cancel.cancel(),
            }
        }
    };
    line.finish_and_clear();
    Ok(recorded?)
}

fn line() -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{spinner} {msg}").expect("the template is sound");
    ProgressBar::new_spinner().with_style(style)
}

fn show(line: &ProgressBar, runs: u32, progress: Progress) {
    line.set_message(match progress {
        Progress::Booting { run, elapsed, reads } => {
            let seconds = elapsed.as_secs_f64();
            format!("boot {run} of {runs}: {seconds:.1} s, {} reads", HumanCount(reads))
        }
        Progress::Compressing { done, total } => {
            format!("compressing: {} of {} blocks", HumanCount(done), HumanCount(total))
        }
        Progress::Switching => "the tracer does not see everything: recording at an NBD export".to_owned(),
    });
    line.tick();
}

/// What a guest that was over when it read nothing more may have been instead, when it read `unique` bytes.
fn doubt(options: &Options, unique: u64) -> Option<String> {
    let is_guest = matches!(options.subject, Subject::Guest { .. });
    (is_guest && matches!(options.until, Until::Idle(_)) && unique < BOOTED_MIN).then(|| {
        format!(
            "the guest read only {} and then nothing more: did it boot at all? Look with `bootcache boot`; \
             --until serial:REGEX or tcp:PORT tells a boot from a guest that hangs",
            HumanBytes(unique)
        )
    })
}

fn print_summary(name: &ImageName, options: &Options, recorded: &Recorded, summary: &Summary) {
    if let Some(reason) = &recorded.switched {
        eprintln!("bootcache: recorded via nbd, since {reason}");
    }
    let boots = if summary.boots == 1 { "1 boot".to_owned() } else { format!("{} boots", summary.boots) };
    let on = recorded.accelerator.map(|accelerator| format!(" on {accelerator}")).unwrap_or_default();
    let seconds = std::time::Duration::from_millis(summary.end_ms).as_secs_f64();
    println!("recorded {boots} of '{name}'{on} via {}: {} after {seconds:.1} s", recorded.via, options.until);
    let row = |label: &str, value: String| println!("  {label:<12}{value}");
    row("reads", format!("{}, {} asked for", HumanCount(summary.reads), HumanBytes(summary.requested)));
    row("unique", format!("{} in {} extents", HumanBytes(summary.unique), HumanCount(summary.extents)));
    let allocated = summary.allocated.unwrap_or(0);
    row("allocated", format!("{:.1} % of {}", percent(summary.unique, allocated), HumanBytes(allocated)));
    row(
        "logical",
        format!("{:.1} % of {}", percent(summary.unique, summary.logical), HumanBytes(summary.logical)),
    );
    let written = &recorded.saved.written;
    row("boot cache", format!("{} in {} frames", HumanBytes(written.file_length), written.frames));
}

fn print_json(
    name: &ImageName,
    options: &Options,
    recorded: &Recorded,
    summary: &Summary,
) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(&json!({
        "image": name.as_str(),
        "root": recorded.saved.entry.root,
        "until": options.until.to_string(),
        "via": recorded.via.to_string(),
        "switched": recorded.switched,
        "accelerator": recorded.accelerator.map(|accelerator| accelerator.to_string()),
        "summary": summary,
        "recordings": recorded.saved.kept,
        "boot": recorded.saved.entry.manifest.boot,
        "frames": recorded.saved.written.frames,
    }))?;
    println!("{text}");
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "a percentage has one digit after the point")]
fn percent(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 * 100.0 / whole as f64 }
}
