//! Subcommands, one file each. `anyhow` lives here and nowhere else.
//!
//! Exit codes: 0 done, 1 failed, 2 the command line is wrong (clap's), 3 a difference was found where none was
//! expected (`image verify`), 130 interrupted.

mod agent;
mod analyze;
mod attach;
mod boot;
mod boot_report;
mod ca;
mod complaint;
mod completions;
mod controller;
mod daemon;
mod deploy;
mod fold;
mod guest;
mod image;
mod list;
mod overlay;
mod plan;
mod prefetch;
mod progress;
mod pull;
mod record;
mod remote;
mod replay;
mod reuse;
mod serve;
mod session;
mod signals;
mod simulate;
mod size;
mod status;
mod stop;
mod web;

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use bootcache::store::Store;
use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

pub(crate) use complaint::complaint;

/// Boots virtual machines, and starts containers, on many hosts before their disk image has arrived.
#[derive(Debug, Parser)]
#[command(name = "bootcache", version, propagate_version = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) globals: Globals,
    /// Say more on stderr; twice for debugging. BOOTCACHE_LOG takes a filter such as `bootcache=debug`.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
    #[command(subcommand)]
    command: Command,
}

/// Options that every subcommand takes.
#[derive(Debug, clap::Args)]
pub(crate) struct Globals {
    /// Folder for images, overlays and sockets [default: /var/lib/bootcache for root, else the XDG data folder]
    #[arg(long, global = true, env = "BOOTCACHE_STORE", value_name = "DIR")]
    store: Option<PathBuf>,
    /// Print JSON for programs
    #[arg(long, global = true)]
    pub(crate) json: bool,
}

impl Globals {
    /// The store's folder: as given, or the default for this user.
    pub(crate) fn store_dir(&self) -> PathBuf {
        self.store.clone().unwrap_or_else(|| {
            if rustix::process::geteuid().is_root() {
                return PathBuf::from("/var/lib/bootcache");
            }
            let folder = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
            let data = folder("XDG_DATA_HOME").or_else(|| Some(folder("HOME")?.join(".local/share")));
            let Some(data) = data else {
                say("bootcache: HOME is not set to a folder: say where the store is with --store DIR");
                std::process::exit(2);
            };
            data.join("bootcache")
        })
    }

    /// The same for commands that work on what is in the store: a mistyped path is no empty store.
    pub(crate) fn existing_store_dir(&self) -> anyhow::Result<PathBuf> {
        let dir = self.store_dir();
        anyhow::ensure!(
            Store::exists(&dir),
            "there is no store in {}: --store or BOOTCACHE_STORE names another; `image add`, `pull`, `serve` and \
             `agent` make one",
            dir.display()
        );
        Ok(dir)
    }

    /// The store, where there is one.
    pub(crate) fn existing_store(&self) -> anyhow::Result<Store> {
        Ok(Store::open(&self.existing_store_dir()?)?)
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show what the recorded boots of an image read, compare them, draw them
    Analyze(analyze::Args),
    Attach(attach::AttachArgs),
    Detach(attach::DetachArgs),
    /// List what is attached
    Attached,
    /// Make the cluster's certificate authority, and certificates for its members
    Ca(ca::Args),
    /// Add, list, show, verify, remove and export images
    Image(image::Args),
    /// Boot VMs of an image, each with a disk of its own
    Boot(boot::Args),
    /// End VMs that `boot` started
    Stop(stop::Args),
    /// Make, list, commit and remove overlays: the disks of VMs
    Overlay(overlay::Args),
    /// Fetch an image from other nodes
    Pull(pull::Args),
    /// Show what this node's daemon has, and how far it is
    Status(status::Args),
    /// Run this node's daemon: exports images and overlays to NBD clients
    Serve(serve::Args),
    /// Boot an image, see what it reads, and make its boot cache
    Record(record::Args),
    /// Play a recorded boot against any NBD export, and see how long its reads wait
    Replay(replay::Args),
    /// Run the controller: knows the nodes, and has them carry out plans
    Controller(controller::Args),
    /// Run this node's part of deployments: VMs, containers, networks
    Agent(agent::Args),
    /// Check a plan
    Plan(plan::Args),
    /// Carry out a plan: VMs and containers on many nodes
    Deploy(deploy::DeployArgs),
    /// End what `deploy` started
    End(deploy::EndArgs),
    /// List the nodes of the cluster, or forget one that is gone
    Nodes(list::NodesArgs),
    /// List the images of the cluster, and who has them
    Images(list::Args),
    /// List what was deployed
    Tasks(list::OfTask),
    /// List VMs and containers of tasks
    Instances(list::OfTask),
    /// Serve a page with these lists to a browser on this host, and take plans from there
    Web(web::Args),
    /// Bring an image to nodes ahead of demand
    Prefetch(prefetch::Args),
    /// Simulate a burst of boots on many nodes, and compare how sources are chosen
    Simulate(simulate::Args),
    /// Print a completion script for a shell
    Completions(completions::Args),
}

/// Runs the chosen subcommand.
pub(crate) fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    match cli.command {
        Command::Analyze(args) => analyze::run(&cli.globals, &args),
        Command::Attach(args) => attach::attach(&cli.globals, &args),
        Command::Detach(args) => attach::detach(&cli.globals, &args),
        Command::Attached => attach::attached(&cli.globals),
        Command::Ca(args) => ca::run(&cli.globals, args),
        Command::Image(args) => image::run(&cli.globals, args),
        Command::Boot(args) => boot::run(&cli.globals, args),
        Command::Stop(args) => stop::run(&cli.globals, args),
        Command::Overlay(args) => overlay::run(&cli.globals, args),
        Command::Pull(args) => pull::run(&cli.globals, &args),
        Command::Status(args) => status::run(&cli.globals, &args),
        Command::Serve(args) => serve::run(&cli.globals, args),
        Command::Record(args) => record::run(&cli.globals, args),
        Command::Replay(args) => replay::run(&cli.globals, &args),
        Command::Controller(args) => controller::run(&cli.globals, args),
        Command::Agent(args) => agent::run(&cli.globals, args),
        Command::Plan(args) => plan::run(&cli.globals, &args),
        Command::Deploy(args) => deploy::deploy(&cli.globals, &args),
        Command::End(args) => deploy::end(&cli.globals, &args),
        Command::Nodes(args) => list::nodes(&cli.globals, &args),
        Command::Images(args) => list::images(&cli.globals, &args),
        Command::Tasks(args) => list::tasks(&cli.globals, &args),
        Command::Instances(args) => list::instances(&cli.globals, &args),
        Command::Web(args) => web::run(&cli.globals, &args),
        Command::Prefetch(args) => prefetch::run(&cli.globals, &args),
        Command::Simulate(args) => simulate::run(&cli.globals, &args),
        Command::Completions(args) => completions::run(&args),
    }
}

/// Logs go to stderr: warnings by default, more with `-v`, or what `BOOTCACHE_LOG` says. Colours are for terminals.
pub(crate) fn set_up_logging(verbose: u8) {
    let default = match verbose {
        0 => "warn",
        1 => "info",
        _ => "debug",
    };
    let filter = EnvFilter::try_from_env("BOOTCACHE_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let ansi = std::io::stderr().is_terminal() && !no_color;
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(ansi);
    // It would complain by `eprintln!`, which panics: the task that had something to say would be gone.
    logs.log_internal_errors(false).with_writer(|| Stderr).init();
}

/// Says a line on stderr, as far as that can be written: a log on a full disk, or whose reader has gone, ends nobody's work.
pub(crate) fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Stderr for logs, which takes what cannot be written as written.
struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let _ = std::io::stderr().write_all(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Runs a subcommand that waits for sockets.
pub(crate) fn block_on<T>(future: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(future)
}

/// Lets this process have as many files open as it may: 1024 are usual where nobody asks, and a VM takes several of a daemon,
/// a connection one of an agent or a controller, which who connects without end would leave none for the members.
pub(crate) fn allow_many_files() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) =
        setrlimit(Resource::Nofile, rustix::process::Rlimit { current: limit.maximum, ..limit })
    {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}
