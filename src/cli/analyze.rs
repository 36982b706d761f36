//! `bootcache analyze`: what the recorded boots of an image read.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use bootcache::analyze::picture::{Form, Theme, draw_offsets, draw_sizes};
use bootcache::analyze::summary::{CLASS_LABELS, UNITS};
use bootcache::analyze::{Comparison, Summary};
use bootcache::block::blocks_for;
use bootcache::boot_cache::merge::first_touches;
use bootcache::boot_cache::recording::Recording;
use bootcache::boot_cache::{BootCache, kept};
use bootcache::image::page::PAGE_BLOCKS;
use bootcache::image::tree::Tree;
use bootcache::name::ImageName;
use bootcache::store::ImageEntry;
use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use comfy_table::{CellAlignment, Table};
use serde_json::json;

use super::Globals;

#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("what").args(["image", "recording"]).required(true).multiple(true))]
pub(crate) struct Args {
    /// The image; all its kept recordings are taken together
    image: Option<ImageName>,
    /// Take these recordings instead of the image's own; may be repeated
    #[arg(long, value_name = "FILE")]
    recording: Vec<PathBuf>,
    /// Compare two recordings: numbers of kept ones (see --list) or files
    #[arg(long, num_args = 2, value_names = ["A", "B"])]
    compare: Vec<String>,
    /// List the kept recordings
    #[arg(long, conflicts_with_all = ["compare", "svg", "png"])]
    list: bool,
    /// Draw offsets.svg and sizes.svg into this folder
    #[arg(long, value_name = "DIR")]
    svg: Option<PathBuf>,
    /// Draw offsets.png and sizes.png into this folder
    #[arg(long, value_name = "DIR")]
    png: Option<PathBuf>,
    /// Colours of the pictures
    #[arg(long, value_enum, default_value = "light")]
    theme: ThemeArg,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum ThemeArg {
    Light,
    Dark,
}

/// What is analyzed: an image of the store, or recordings alone.
struct Subject {
    image: Option<ImageEntry>,
    recordings: Vec<(String, Recording)>,
    size: u64,
}

pub(crate) fn run(globals: &Globals, args: &Args) -> anyhow::Result<ExitCode> {
    let subject = Subject::open(globals, args)?;
    if args.list {
        subject.list(globals.json)?;
    } else if let [first, second] = args.compare.as_slice() {
        subject.compare(first, second, globals.json)?;
    } else {
        subject.summarize(args, globals.json)?;
    }
    Ok(ExitCode::SUCCESS)
}

impl Subject {
    fn open(globals: &Globals, args: &Args) -> anyhow::Result<Self> {
        let image = match &args.image {
            Some(name) => {
                let entry = globals.existing_store()?.resolve(name)?;
                super::image::refuse_container(name, &entry)?;
                Some(entry)
            }
            None => None,
        };
        let mut files: Vec<(String, PathBuf)> =
            args.recording.iter().map(|path| (path.display().to_string(), path.clone())).collect();
        if let (Some(entry), true) = (&image, files.is_empty()) {
            let numbered = kept::recordings(&entry.dir).context("the kept recordings cannot be listed")?;
            files = numbered.into_iter().map(|(number, path)| (number.to_string(), path)).collect();
        }
        let mut recordings = Vec::new();
        for (label, path) in files {
            recordings.push((label, read(&path, image.as_ref())?));
        }
        if let (Some(name), true) = (&args.image, recordings.is_empty()) {
            bail!("no boot of '{name}' has been recorded yet: run 'bootcache record {name}'");
        }
        let reads = recordings.iter().flat_map(|(_, recording)| &recording.reads);
        let last_end = reads.map(|read| read.offset + read.length).max().unwrap_or(0);
        let size = image.as_ref().map_or(last_end, |entry| entry.manifest.size);
        Ok(Self { image, recordings, size })
    }

    fn list(&self, as_json: bool) -> anyhow::Result<()> {
        if as_json {
            let rows = self.recordings.iter().map(|(label, recording)| {
                json!({ "recording": label, "reads": recording.reads.len(),
                        "requested": recording.bytes_requested(), "end_ms": recording.end_ns / 1_000_000 })
            });
            return print_json(&rows.collect());
        }
        let mut table = table(&["recording", "reads", "requested", "took"]);
        for (label, recording) in &self.recordings {
            let took = seconds(recording.end_ns / 1_000_000);
            let requested = megabytes(recording.bytes_requested());
            table.add_row([label.clone(), recording.reads.len().to_string(), requested, took]);
        }
        println!("{table}");
        Ok(())
    }

    fn compare(&self, first: &str, second: &str, as_json: bool) -> anyhow::Result<()> {
        let (one, other) = (self.find(first)?, self.find(second)?);
        let comparison = Comparison::of(&one, &other, blocks_for(self.size));
        if as_json {
            return print_json(&serde_json::to_value(comparison)?);
        }
        println!("blocks read by both       {:>10}", comparison.both);
        println!("only by {first:<17} {:>10}", comparison.only_first);
        println!("only by {second:<17} {:>10}", comparison.only_second);
        println!("Jaccard index             {:>10.4}", comparison.jaccard);
        println!("order correlation         {:>10.4}", comparison.order_correlation);
        Ok(())
    }

    /// A kept recording by its number, or the one in a file.
    fn find(&self, label: &str) -> anyhow::Result<Recording> {
        match self.recordings.iter().find(|(known, _)| known == label) {
            Some((_, recording)) => Ok(recording.clone()),
            None => read(Path::new(label), self.image.as_ref()),
        }
    }

    fn summarize(&self, args: &Args, as_json: bool) -> anyhow::Result<()> {
        let recordings: Vec<Recording> =
            self.recordings.iter().map(|(_, recording)| recording.clone()).collect();
        let allocated = self.image.as_ref().map(|entry| entry.manifest.allocated);
        let summary = Summary::of(&recordings, self.size, allocated);
        let compressed = self.image.as_ref().and_then(|entry| {
            let boot_cache = BootCache::open(&entry.boot_path(), entry.root).ok()?;
            Some(boot_cache.file_length())
        });
        if as_json {
            print_json(&json!({ "summary": summary, "boot_cache_bytes": compressed }))?;
        } else {
            print_summary(&summary, compressed);
        }
        self.draw(args, &recordings, &summary)
    }

    fn draw(&self, args: &Args, recordings: &[Recording], summary: &Summary) -> anyhow::Result<()> {
        let theme = match args.theme {
            ThemeArg::Light => Theme::Light,
            ThemeArg::Dark => Theme::Dark,
        };
        for (dir, form, extension) in [(&args.svg, Form::Svg, "svg"), (&args.png, Form::Png, "png")] {
            let Some(dir) = dir else { continue };
            std::fs::create_dir_all(dir).with_context(|| format!("{} cannot be made", dir.display()))?;
            let mut bitmaps = Vec::new();
            if let Some(entry) = &self.image {
                let tree = Tree::open(&entry.tree_path(), Some(entry.root))?;
                for group in 0..tree.groups() {
                    bitmaps.extend(tree.bitmaps(group)?);
                }
            }
            let is_zero = |block: u64| {
                let bitmap = usize::try_from(block / PAGE_BLOCKS).ok().and_then(|page| bitmaps.get(page));
                bitmap.is_none_or(|bitmap| bitmap >> (block % PAGE_BLOCKS) & 1 == 0)
            };
            let touches = first_touches(recordings, blocks_for(self.size));
            let offsets = dir.join(format!("offsets.{extension}"));
            draw_offsets(&offsets, form, theme, summary, &touches, &is_zero)?;
            let sizes = dir.join(format!("sizes.{extension}"));
            draw_sizes(&sizes, form, theme, summary)?;
            eprintln!("drew {} and {}", offsets.display(), sizes.display());
        }
        Ok(())
    }
}

fn read(path: &Path, image: Option<&ImageEntry>) -> anyhow::Result<Recording> {
    let (root, recording) = kept::read(path).with_context(|| format!("recording {}", path.display()))?;
    match image {
        Some(entry) if entry.root != root => {
            bail!("{} is a recording of another image ({})", path.display(), root.short())
        }
        _ => Ok(recording),
    }
}

fn print_summary(summary: &Summary, compressed: Option<u64>) {
    let of = |part: u64, whole: u64| format!("{:.1} %", 100.0 * part as f64 / whole.max(1) as f64);
    let mut rows = vec![("logical size", megabytes(summary.logical), String::new())];
    if let Some(allocated) = summary.allocated {
        rows.push(("allocated", megabytes(allocated), of(allocated, summary.logical) + " of logical"));
    }
    rows.push(("requested", megabytes(summary.requested), format!("{} reads", summary.reads)));
    let whole = summary.allocated.map_or((summary.logical, "logical"), |bytes| (bytes, "allocated"));
    let share = format!("{} of {}", of(summary.unique, whole.0), whole.1);
    rows.push(("unique", megabytes(summary.unique), share));
    if let Some(bytes) = compressed {
        rows.push(("boot cache", megabytes(bytes), of(bytes, summary.unique) + " of unique"));
    }
    let lengths = summary.run_lengths;
    let runs = format!("blocks: median {}, p90 {}, max {}", lengths.median, lengths.p90, lengths.max);
    rows.push(("extents", summary.extents.to_string(), runs));
    rows.push(("boot took", seconds(summary.end_ms), format!("{} recorded", summary.boots)));
    for (name, value, note) in rows {
        println!("{name:<13} {value:>12}  {note}");
    }

    let mut header = vec![""];
    header.extend(CLASS_LABELS);
    let mut classes = table(&header);
    let mut reads = vec!["reads".to_owned()];
    reads.extend(summary.classes.iter().map(|class| class.reads.to_string()));
    let mut bytes = vec!["MB".to_owned()];
    bytes.extend(summary.classes.iter().map(|class| format!("{:.1}", class.bytes as f64 / 1e6)));
    classes.add_row(reads).add_row(bytes);
    println!("\nsizes of reads\n{classes}");

    let units = UNITS.map(|unit| format!("{}K", unit >> 10));
    let mut rounded = table(&units.each_ref().map(String::as_str));
    rounded.add_row(summary.rounded.map(megabytes));
    println!("\nunique, rounded up to\n{rounded}");
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(UTF8_HORIZONTAL_ONLY).set_header(header.iter().copied());
    for column in table.column_iter_mut() {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

fn seconds(ms: u64) -> String {
    format!("{:.2} s", ms as f64 / 1000.0)
}

fn print_json(value: &serde_json::Value) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}
