//! `bootcache attach`, `detach` and `attached`: VMs' disks and images as `/dev/nbdX`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use bootcache::attach::{self, Device, Entry, Options, Table, Way};
use bootcache::name::{HostName, ImageName};
use indicatif::HumanBytes;
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::Globals;

/// Attach a VM's disk or an image to this host as /dev/nbdX
///
/// The device lives until `detach`, through restarts of `serve`: a process of its own stays behind and reconnects it.
#[derive(Debug, clap::Args)]
pub(crate) struct AttachArgs {
    /// The VM or image, as `serve` exports it
    #[arg(value_parser = export_name)]
    name: String,
    /// The device, such as /dev/nbd0 [default: the kernel chooses a free one]
    device: Option<Device>,
    /// Connections to the server, 15 at most: it has places for 16, and whoever looks after the device later needs one
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=15))]
    connections: u8,
    /// Seconds that reads and writes wait for a server that is gone before they fail
    #[arg(long, default_value_t = attach::PATIENCE.as_secs(), value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=31_536_000))]
    patience: u64,
    /// Attach by ioctl, as old kernels want it; the device then breaks when the server restarts
    #[arg(long)]
    ioctl: bool,
    /// The server's socket [default: nbd.sock in the store]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Stay and look after the device; SIGTERM or Ctrl-C detaches it
    #[arg(long)]
    foreground: bool,
    /// Started by `attach` itself: leave the session, say one line when ready.
    #[arg(long, hide = true, requires = "foreground")]
    keeper: bool,
    /// Only take over what is attached and has lost its keeper.
    #[arg(long, hide = true, requires = "keeper")]
    again: bool,
}

/// Detach a device that nothing uses any more
#[derive(Debug, clap::Args)]
pub(crate) struct DetachArgs {
    /// The VM, the image, or its /dev/nbdX
    name: String,
}

/// One line of `attached`.
#[derive(Debug, Serialize)]
struct Line {
    #[serde(flatten)]
    entry: Entry,
    state: &'static str,
}

fn export_name(text: &str) -> Result<String, String> {
    let image = text.parse::<ImageName>().map(|name| name.to_string());
    image
        .or_else(|error| text.parse::<HostName>().map(|name| name.to_string()).map_err(|_| error.to_string()))
}

/// Runs `attach`.
pub(crate) fn attach(globals: &Globals, args: &AttachArgs) -> anyhow::Result<ExitCode> {
    let store = globals.store_dir();
    let options = Options {
        name: args.name.clone(),
        socket: args.socket.clone().unwrap_or_else(|| store.join("nbd.sock")),
        device: args.device,
        connections: args.connections.into(),
        patience: Duration::from_secs(args.patience),
        way: args.ioctl.then_some(Way::Ioctl),
        again: args.again,
    };
    if args.foreground {
        return stay(globals, &store, &options, args.keeper);
    }
    super::block_on(async {
        let entry = attach::start(&super::daemon::program()?, &store, &options).await?;
        println!("{}", line(globals, &entry)?);
        Ok(ExitCode::SUCCESS)
    })
}

/// What is said of what was attached: the device alone, so that a script can use it.
fn line(globals: &Globals, entry: &Entry) -> anyhow::Result<String> {
    Ok(if globals.json { serde_json::to_string(entry)? } else { entry.device.to_string() })
}

/// Keeps the device in this process.
fn stay(globals: &Globals, store: &Path, options: &Options, keeper: bool) -> anyhow::Result<ExitCode> {
    if keeper {
        // Fails when this process leads a session already, which is as good.
        let _ = rustix::process::setsid();
    }
    let table = Table::open(store)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let kept = runtime.block_on(async {
        let stop = CancellationToken::new();
        let (mut terminate, mut interrupt) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let stopping = stop.clone();
        tokio::spawn(async move {
            tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
            stopping.cancel();
        });
        let ready = |entry: &Entry| {
            // Whoever started us may have gone away: that is no reason to leave the device alone.
            let mut out = std::io::stdout();
            let said =
                line(globals, entry).and_then(|line| Ok(writeln!(out, "{line}").and_then(|()| out.flush())?));
            if let Err(error) = said {
                tracing::warn!(%error, "nobody listens any more");
            }
        };
        anyhow::Ok(attach::keep(&table, options, &stop, ready).await)
    })?;
    match kept {
        Err(error) if keeper && error.may_pass() => {
            eprintln!("bootcache: {}", super::complaint(&error.into()));
            Ok(ExitCode::from(attach::MAY_PASS))
        }
        kept => Ok(kept.map(|()| ExitCode::SUCCESS)?),
    }
}

/// Runs `detach`.
pub(crate) fn detach(globals: &Globals, args: &DetachArgs) -> anyhow::Result<ExitCode> {
    let table = Table::open(&globals.store_dir())?;
    let entry = table.find(&args.name)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(attach::detach(&table, &entry))?;
    if globals.json {
        println!("{}", serde_json::json!({ "name": entry.name, "device": entry.device }));
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs `attached`.
pub(crate) fn attached(globals: &Globals) -> anyhow::Result<ExitCode> {
    let table = Table::open(&globals.store_dir())?;
    let mut lines = Vec::new();
    for entry in table.entries()? {
        let state = match (entry.is_live(), table.is_kept(&entry.name)?) {
            (false, _) => "gone",
            (true, true) => "attached",
            (true, false) => "unattended",
        };
        lines.push(Line { entry, state });
    }
    if globals.json {
        println!("{}", serde_json::to_string_pretty(&lines)?);
        return Ok(ExitCode::SUCCESS);
    }
    if lines.is_empty() {
        eprintln!("nothing is attached");
        return Ok(ExitCode::SUCCESS);
    }
    println!("{:<12} {:<30} {:>11} {:<5} STATE", "DEVICE", "NAME", "SIZE", "MODE");
    for Line { entry, state } in &lines {
        let mode = if entry.read_only { "read" } else { "write" };
        let size = HumanBytes(entry.size).to_string();
        println!("{:<12} {:<30} {size:>11} {mode:<5} {state}", entry.device.to_string(), entry.name);
    }
    if lines.iter().any(|line| line.state == "unattended") {
        eprintln!("unattended: nobody would reconnect it; `bootcache attach` the same name again");
    }
    Ok(ExitCode::SUCCESS)
}
