//! `bootcache image add|list|show|verify|remove|export`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::bail;
use bootcache::control::{Client, ControlError, Reply, Request};
use bootcache::digest::Digest;
use bootcache::image::export::{ExportError, export};
use bootcache::image::import::{ImportError, ImportOptions, import};
use bootcache::image::increment::export_increment;
use bootcache::image::manifest::{ImageKind, Manifest, SourceFormat};
use bootcache::image::verify::verify;
use bootcache::name::ImageName;
use bootcache::serve::CONTROL_SOCKET;
use bootcache::store::{ImageEntry, Store, StoreError};
use indicatif::HumanBytes;
use serde::Serialize;

use super::progress::watched;

const DIFFERENT: u8 = 3;
const INTERRUPTED: u8 = 130;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Add a disk image or a container archive to the store
    ///
    /// Without --format the file's first bytes decide, and what begins like no known format is raw. A file that would
    /// make other files of this host be read is refused.
    Add {
        /// What to call it: 1 to 63 of a-z 0-9 . _ -
        name: ImageName,
        /// The file
        file: PathBuf,
        /// Take the file as this format, whatever it begins like
        #[arg(long, value_enum)]
        format: Option<FormatArg>,
        /// Let the image read the other files that it refers to: backing files, extents, data files
        #[arg(long)]
        allow_backing_files: bool,
        /// What it is for [default: container for a tar archive, else vm]
        #[arg(long = "type", value_enum, value_name = "TYPE")]
        kind: Option<KindArg>,
    },
    /// List the images
    #[command(visible_alias = "ls")]
    List,
    /// Show all that is known of an image
    Show {
        /// The image
        name: ImageName,
    },
    /// Check every block of an image, and of its boot cache; exit code 3 when something differs
    Verify {
        /// The image
        name: ImageName,
    },
    /// Remove a name, and with its last name the image
    #[command(visible_alias = "rm")]
    Remove {
        /// The images
        #[arg(required = true)]
        names: Vec<ImageName>,
    },
    /// Write an image to a file
    Export {
        /// The image
        name: ImageName,
        /// The file; must not exist
        file: PathBuf,
        /// Format of the file [default: by its extension, else raw]
        #[arg(long, value_enum)]
        format: Option<FormatArg>,
        /// Write only what an incremental image adds to its base; `image add` takes the file where the base is
        #[arg(long, conflicts_with = "format")]
        increment: bool,
    },
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum FormatArg {
    Raw,
    Qcow2,
    Vmdk,
    Vdi,
    Vhdx,
}

impl From<FormatArg> for SourceFormat {
    fn from(format: FormatArg) -> Self {
        match format {
            FormatArg::Raw => Self::Raw,
            FormatArg::Qcow2 => Self::Qcow2,
            FormatArg::Vmdk => Self::Vmdk,
            FormatArg::Vdi => Self::Vdi,
            FormatArg::Vhdx => Self::Vhdx,
        }
    }
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum KindArg {
    Vm,
    Container,
}

impl From<KindArg> for ImageKind {
    fn from(kind: KindArg) -> Self {
        match kind {
            KindArg::Vm => Self::Vm,
            KindArg::Container => Self::Container,
        }
    }
}

/// Refuses the image of a container, for commands that boot or look at a boot.
pub(crate) fn refuse_container(name: &ImageName, entry: &ImageEntry) -> anyhow::Result<()> {
    if entry.manifest.kind == ImageKind::Container {
        bail!("'{name}' is a container image, in which nothing boots: a plan starts it (`bootcache deploy`)");
    }
    Ok(())
}

pub(crate) fn run(globals: &super::Globals, args: Args) -> anyhow::Result<ExitCode> {
    let store = match args.command {
        Command::Add { .. } => Store::open(&globals.store_dir())?,
        _ => globals.existing_store()?,
    };
    let json = globals.json;
    match args.command {
        Command::Add { name, file, format, allow_backing_files, kind } => {
            let options = ImportOptions {
                format: format.map(Into::into),
                kind: kind.map(Into::into),
                allow_backing_files,
            };
            add(&store, name, file, options, json)
        }
        Command::List => list(&store, json),
        Command::Show { name } => show(&store, &name, json),
        Command::Verify { name } => verify_image(store, name, json),
        Command::Remove { names } => {
            names.iter().try_for_each(|name| remove(&store, name, json)).map(|()| ExitCode::SUCCESS)
        }
        Command::Export { name, file, format, increment } => {
            let format = format.map(Into::into).or_else(|| format_of(&file)).unwrap_or(SourceFormat::Raw);
            export_image(store, &name, file, (!increment).then_some(format), json)
        }
    }
}

fn add(
    store: &Store,
    name: ImageName,
    file: PathBuf,
    options: ImportOptions,
    json: bool,
) -> anyhow::Result<ExitCode> {
    let image = name.clone();
    let importing = store.clone();
    match watched(move |watch| import(&importing, &image, &file, options, watch))? {
        Ok(entry) if json => print_json(&Shown::new(&entry, vec![name])),
        Ok(entry) => {
            let names = store.names()?;
            if let Some((other, _)) = names.iter().find(|(other, root)| *root == entry.root && *other != name)
            {
                println!("added {name}: the same image as {other}");
                return Ok(ExitCode::SUCCESS);
            }
            let Manifest { size, allocated, kind, source_format, .. } = entry.manifest;
            let (size, data) = (HumanBytes(size), HumanBytes(allocated));
            println!("added {name}: {kind} from {source_format}, {size} with {data} of data");
            Ok(ExitCode::SUCCESS)
        }
        Err(error @ ImportError::Cancelled) => interrupted(&error),
        Err(error) => Err(error.into()),
    }
}

/// An image as `--json` shows it.
#[derive(Debug, Serialize)]
struct Shown {
    names: Vec<ImageName>,
    complete: bool,
    /// Bytes in the file system.
    stored: u64,
    path: PathBuf,
    #[serde(flatten)]
    manifest: Manifest,
}

impl Shown {
    fn new(entry: &ImageEntry, names: Vec<ImageName>) -> Self {
        Self {
            names,
            complete: entry.is_complete(),
            stored: entry.stored_bytes(),
            path: entry.dir.clone(),
            manifest: entry.manifest.clone(),
        }
    }
}

/// A line of `image list` that cannot be told more of.
#[derive(Debug, Serialize)]
struct Broken {
    names: Vec<ImageName>,
    root: Digest,
    error: String,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Listed {
    Sound(Box<Shown>),
    Broken(Broken),
}

fn list(store: &Store, json: bool) -> anyhow::Result<ExitCode> {
    let (names, unreadable) = store.read_names()?;
    unreadable.iter().for_each(|error| eprintln!("bootcache: {error}"));
    let listed: Vec<Listed> = names
        .iter()
        .map(|(name, root)| match store.image(*root) {
            Ok(entry) => Listed::Sound(Box::new(Shown::new(&entry, vec![name.clone()]))),
            Err(error) => {
                Listed::Broken(Broken { names: vec![name.clone()], root: *root, error: error.to_string() })
            }
        })
        .collect();
    if json {
        return print_json(&listed);
    }
    if listed.is_empty() {
        println!("no images: add one with `bootcache image add NAME FILE`");
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header(["NAME", "TYPE", "SIZE", "DATA", "BOOT CACHE", "BASE", "COMPLETE"]);
    for column in [2, 3, 4] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(comfy_table::CellAlignment::Right);
        }
    }
    for line in &listed {
        match line {
            Listed::Sound(shown) => table.add_row(row(shown, &names)),
            Listed::Broken(broken) => table.add_row([broken.names[0].as_str(), "damaged: see `image show`"]),
        };
    }
    println!("{table}");
    Ok(ExitCode::SUCCESS)
}

fn row(shown: &Shown, names: &[(ImageName, Digest)]) -> [String; 7] {
    let manifest = &shown.manifest;
    let boot = manifest.boot.as_ref();
    [
        shown.names[0].to_string(),
        manifest.kind.to_string(),
        HumanBytes(manifest.size).to_string(),
        HumanBytes(manifest.allocated).to_string(),
        boot.map_or_else(|| "no".to_owned(), |boot| HumanBytes(boot.file_length).to_string()),
        manifest.base.map_or_else(|| "-".to_owned(), |base| name_of(base, names)),
        if shown.complete { "yes" } else { "no" }.to_owned(),
    ]
}

fn name_of(root: Digest, names: &[(ImageName, Digest)]) -> String {
    names.iter().find(|(_, named)| *named == root).map_or_else(|| root.short(), |(name, _)| name.to_string())
}

fn show(store: &Store, name: &ImageName, json: bool) -> anyhow::Result<ExitCode> {
    let entry = store.resolve(name)?;
    let all = store.names()?;
    let names: Vec<ImageName> =
        all.iter().filter(|(_, root)| *root == entry.root).map(|(name, _)| name.clone()).collect();
    let shown = Shown::new(&entry, names);
    if json {
        return print_json(&shown);
    }
    let Manifest { version: _, size, root, raw_blake3, kind, source_format, base, allocated, boot } =
        &shown.manifest;
    let names: Vec<&str> = shown.names.iter().map(ImageName::as_str).collect();
    println!("names       {}", names.join(", "));
    println!("type        {kind}, from {source_format}");
    println!("size        {size} bytes ({})", HumanBytes(*size));
    println!(
        "data        {allocated} bytes ({}), {} stored",
        HumanBytes(*allocated),
        HumanBytes(shown.stored)
    );
    println!("root        {root}");
    match raw_blake3 {
        Some(raw) => println!("b3sum       {raw}"),
        None => println!("b3sum       not known of an incremental image until it is verified"),
    }
    if let Some(base) = base {
        println!("base        {} ({base})", name_of(*base, &all));
    }
    match boot {
        Some(boot) => {
            println!("boot cache  {} bytes ({})", boot.file_length, HumanBytes(boot.file_length));
            println!("boot digest {}", boot.heads_digest);
            let until = match kind {
                ImageKind::Vm => boot.until.as_deref().unwrap_or("not stated"),
                ImageKind::Container => "the archive's end: all of it, in order",
            };
            println!("boot until  {until}");
        }
        None => println!("boot cache  none: `bootcache record {name}` makes one"),
    }
    println!("complete    {}", if shown.complete { "yes" } else { "no: it is arriving from peers" });
    println!("path        {}", shown.path.display());
    Ok(ExitCode::SUCCESS)
}

#[derive(Debug, Serialize)]
struct Verified {
    name: ImageName,
    /// None when what says it is damaged.
    root: Option<Digest>,
    raw_blake3: Option<Digest>,
    findings: Vec<String>,
}

fn verify_image(store: Store, name: ImageName, json: bool) -> anyhow::Result<ExitCode> {
    let entry = match store.resolve(&name) {
        Ok(entry) => entry,
        Err(
            error @ (bootcache::store::StoreError::Manifest { .. }
            | bootcache::store::StoreError::Damaged { .. }),
        ) => {
            if json {
                let root = store.root_of(&name).ok().flatten();
                print_json(&Verified { name, root, raw_blake3: None, findings: vec![error.to_string()] })?;
            } else {
                eprintln!("{name}: {error}");
            }
            return Ok(ExitCode::from(DIFFERENT));
        }
        Err(error) => return Err(error.into()),
    };
    let root = entry.root;
    let report = watched(move |watch| {
        let report = verify(&store, &entry, watch);
        (report, watch.is_cancelled())
    })?;
    let report = match report {
        (_, true) => return interrupted("interrupted"),
        (report, false) => report?,
    };
    let findings: Vec<String> = report.findings.iter().map(ToString::to_string).collect();
    let code = ExitCode::from(if findings.is_empty() { 0 } else { DIFFERENT });
    if json {
        print_json(&Verified { name, root: Some(root), raw_blake3: report.raw_blake3, findings })?;
        return Ok(code);
    }
    if findings.is_empty() {
        println!("{name}: all blocks are those of the image");
        if let Some(raw) = report.raw_blake3 {
            println!("b3sum {raw}");
        }
    }
    findings.iter().for_each(|finding| println!("{name}: {finding}"));
    Ok(code)
}

fn remove(store: &Store, name: &ImageName, json: bool) -> anyhow::Result<()> {
    let freed = match store.remove(name) {
        // Perhaps by the daemon alone, to which it is still coming.
        Err(error @ StoreError::InUse(_)) => remove_by_daemon(store, name, error)?,
        removed => removed?.freed(),
    };
    if json {
        println!(
            "{}",
            serde_json::json!({ "name": name, "content_removed": freed.is_some(), "freed": freed.unwrap_or(0) })
        );
        return Ok(());
    }
    match freed {
        Some(freed) => println!("removed {name}: {} freed", HumanBytes(freed)),
        None => println!("removed the name {name}; the image has other names"),
    }
    Ok(())
}

/// Has the daemon, if one runs, remove what cannot be removed here because of `in_use`. Bytes that the file
/// system got back; none when the image has other names.
fn remove_by_daemon(store: &Store, name: &ImageName, in_use: StoreError) -> anyhow::Result<Option<u64>> {
    super::block_on(async {
        let mut client = match Client::connect(&store.dir().join(CONTROL_SOCKET)).await {
            Err(ControlError::NoDaemon) => return Err(in_use.into()),
            connected => connected?,
        };
        match client.call(&Request::ImageRemove { name: name.clone() }).await? {
            Reply::Removed { freed } => Ok(freed),
            _ => bail!("the daemon answered out of turn"),
        }
    })
}

/// Without a format, only what the image adds to its base is written.
fn export_image(
    store: Store,
    name: &ImageName,
    file: PathBuf,
    format: Option<SourceFormat>,
    json: bool,
) -> anyhow::Result<ExitCode> {
    let entry = store.resolve(name)?;
    let target = file.clone();
    let exported = watched(move |watch| match format {
        Some(format) => export(&store, &entry, &target, format, watch),
        None => export_increment(&store, &entry, &target, watch),
    })?;
    let format = format.map_or_else(|| "increment".to_owned(), |format| format.to_string());
    match exported {
        Ok(()) if json => print_json(&serde_json::json!({ "name": name, "file": file, "format": format })),
        Ok(()) => {
            println!("exported {name} to {} ({format})", file.display());
            Ok(ExitCode::SUCCESS)
        }
        Err(error @ ExportError::Cancelled) => interrupted(&error),
        Err(error) => Err(error.into()),
    }
}

fn format_of(path: &Path) -> Option<SourceFormat> {
    path.extension()?.to_str().and_then(SourceFormat::of_extension)
}

fn interrupted(what: impl std::fmt::Display) -> anyhow::Result<ExitCode> {
    eprintln!("bootcache: {what}");
    Ok(ExitCode::from(INTERRUPTED))
}

fn print_json(value: &impl Serialize) -> anyhow::Result<ExitCode> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(ExitCode::SUCCESS)
}
