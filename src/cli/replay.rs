//! `bootcache replay`: a recorded boot against an NBD export.

use std::fs::File;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, bail};
use bootcache::boot_cache::kept;
use bootcache::boot_cache::recording::Recording;
use bootcache::name::ImageName;
use bootcache::replay::{Options, Report, Uri, replay};
use bootcache::store::ImageEntry;
use bootcache_nbd::client::{Client, Policy};

use super::Globals;

const DIFFERENT: u8 = 3;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The image whose recorded boot is played (not with --recording), and the export: nbd://HOST:PORT/EXPORT or
    /// nbd+unix:///EXPORT?socket=PATH
    #[arg(num_args = 1..=2, required = true, value_names = ["IMAGE", "URI"])]
    what: Vec<String>,
    /// Play the recording in this file
    #[arg(long, value_name = "FILE")]
    recording: Option<PathBuf>,
    /// Play this one of the image's recordings [default: the last]
    #[arg(long, value_name = "N", conflicts_with = "recording")]
    number: Option<usize>,
    /// Divide think times by this, to stand for a faster processor
    #[arg(long, default_value_t = 1.0, value_name = "FACTOR", value_parser = speed)]
    speed: f64,
    /// Check every byte against this raw disk [default: the image's own, if it is whole]
    #[arg(long, value_name = "FILE")]
    verify: Option<PathBuf>,
}

pub(crate) fn run(globals: &Globals, args: &Args) -> anyhow::Result<ExitCode> {
    let (image, uri) = match (args.what.as_slice(), &args.recording) {
        ([image, uri], None) => (Some(image.parse::<ImageName>()?), uri),
        ([uri], Some(_)) => (None, uri),
        ([_], None) => bail!("say what to play: bootcache replay IMAGE URI, or --recording FILE URI"),
        _ => bail!("an image and --recording exclude each other: give one"),
    };
    let uri: Uri = uri.parse()?;
    let entry = match &image {
        Some(name) => Some(globals.existing_store()?.resolve(name)?),
        None => None,
    };
    let recording = recording(args, entry.as_ref())?;
    let image = disk(args, entry.as_ref())?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let address = uri.address().context("the server's address")?;
    let client = runtime
        .block_on(Client::connect(address, &uri.export, Policy::default()))
        .with_context(|| format!("cannot open export '{}'", uri.export))?;
    let options = Options { speed: args.speed, image };
    let report = replay(runtime.handle(), &client, &recording, &options)?;
    if globals.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print(&report, options.image.is_some());
    }
    Ok(if report.wrong_bytes == 0 { ExitCode::SUCCESS } else { ExitCode::from(DIFFERENT) })
}

fn speed(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(value) if (0.01..=1000.0).contains(&value) => Ok(value),
        _ => Err("a speed is from 0.01 to 1000".to_owned()),
    }
}

fn recording(args: &Args, entry: Option<&ImageEntry>) -> anyhow::Result<Recording> {
    let path = match (&args.recording, entry) {
        (Some(path), _) => path.clone(),
        (None, Some(entry)) => {
            let kept = kept::recordings(&entry.dir)?;
            let wanted = args.number.or_else(|| kept.last().map(|(number, _)| *number));
            match kept.into_iter().find(|(number, _)| Some(*number) == wanted) {
                Some((_, path)) => path,
                None => bail!(
                    "there is no such recording of the image: see 'bootcache analyze IMAGE --list', or record it"
                ),
            }
        }
        (None, None) => unreachable!("the arguments were checked"),
    };
    let (root, recording) = kept::read(&path).with_context(|| format!("recording {}", path.display()))?;
    match entry {
        Some(entry) if entry.root != root => bail!("{} is a recording of another image", path.display()),
        _ => Ok(recording),
    }
}

/// The disk to check against, if there is one.
fn disk(args: &Args, entry: Option<&ImageEntry>) -> anyhow::Result<Option<Arc<File>>> {
    let path = match (&args.verify, entry) {
        (Some(path), _) => path.clone(),
        (None, Some(entry)) if entry.is_complete() && entry.below().is_none() => entry.disk_path(),
        _ => return Ok(None),
    };
    let file = File::open(&path).with_context(|| path.display().to_string())?;
    Ok(Some(Arc::new(file)))
}

fn print(report: &Report, checked: bool) {
    let seconds = |ms: f64| format!("{:.3} s", ms / 1000.0);
    println!("boot took    {:>10}   {} in the recording", seconds(report.took_ms), seconds(report.local_ms));
    println!("waited       {:>10}   for {} reads", seconds(report.waiting_ms), report.reads);
    println!(
        "answers      {:>7.2} ms   median, p99 {:.2} ms, longest {:.2} ms",
        report.p50_ms, report.p99_ms, report.max_ms
    );
    let verdict = match (checked, report.wrong_bytes) {
        (false, _) => "not checked (--verify FILE)".to_owned(),
        (true, 0) => "all as in the image".to_owned(),
        (true, wrong) => format!("{wrong} BYTES DIFFER from the image"),
    };
    println!("read         {:>7.1} MB   {verdict}", report.bytes as f64 / 1e6);
}
