//! `bootcache attach`, `detach` and `attached`: VMs' disks and images as `/dev/nbdX`.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use bootcache::attach::{self, Device, Entry, Options, Table, Way};
use bootcache::name::{HostName, ImageName};
use indicatif::HumanBytes;
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::Globals;

/// How long requests wait for a server that is gone, unless it is said otherwise.
const PATIENCE_SECONDS: u64 = 3600;
/// How much of what a keeper said is looked at for the reason why it ended.
const SAID_BYTES_MAX: u64 = 64 << 10;

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
    #[arg(long, default_value_t = PATIENCE_SECONDS, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=31_536_000))]
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
    let table = Table::open(&store)?;
    let entry = if args.foreground {
        stay(globals, &store, &table, args)?
    } else {
        Some(leave(&store, &table, args)?)
    };
    if let Some(entry) = entry {
        say(globals, &entry)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Says what was attached: the device alone, so that a script can use it.
fn say(globals: &Globals, entry: &Entry) -> anyhow::Result<()> {
    if globals.json {
        println!("{}", serde_json::to_string(entry)?);
    } else {
        println!("{}", entry.device);
    }
    Ok(())
}

/// Keeps the device in this process.
fn stay(globals: &Globals, store: &Path, table: &Table, args: &AttachArgs) -> anyhow::Result<Option<Entry>> {
    if args.keeper {
        // Fails when this process leads a session already, which is as good.
        let _ = rustix::process::setsid();
    }
    let options = Options {
        name: args.name.clone(),
        socket: args.socket.clone().unwrap_or_else(|| store.join("nbd.sock")),
        device: args.device,
        connections: args.connections.into(),
        patience: Duration::from_secs(args.patience),
        way: args.ioctl.then_some(Way::Ioctl),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let stop = CancellationToken::new();
        let (mut terminate, mut interrupt) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let stopping = stop.clone();
        tokio::spawn(async move {
            tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
            stopping.cancel();
        });
        let ready = |entry: &Entry| {
            let said = say(globals, entry).and_then(|()| Ok(std::io::stdout().flush()?));
            if let Err(error) = said {
                tracing::warn!(%error, "nobody listens any more");
            }
        };
        anyhow::Ok(attach::keep(table, &options, &stop, ready).await?)
    })?;
    Ok(None)
}

/// Starts a keeper of its own and waits until it has attached the device.
fn leave(store: &Path, table: &Table, args: &AttachArgs) -> anyhow::Result<Entry> {
    let log_path = store.join("attached").join(format!("{}.log", args.name));
    // Added to: a keeper of that name may run, and write there.
    let log = File::options().create(true).append(true).open(&log_path);
    let log = log.with_context(|| format!("cannot write {}", log_path.display()))?;
    let before = log.metadata()?.len();
    let program = std::env::current_exe().context("cannot find this program")?;
    let mut command = keeper_command(&program, store, args)?;
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
    let mut keeper = command.spawn().context("cannot start the process that looks after the device")?;
    let mut line = String::new();
    BufReader::new(keeper.stdout.take().expect("it is piped")).read_line(&mut line)?;
    if line.is_empty() {
        keeper.wait()?;
        let said = said_since(&log_path, before).unwrap_or_default();
        let reason = said.lines().rev().find_map(|line| line.strip_prefix("bootcache: "));
        bail!("{}", reason.unwrap_or("the process that looks after the device ended; see its log"));
    }
    table.get(&args.name)?.context("the device went away at once")
}

/// The command line of a keeper, which stays: in `/`, so that no mount is held by it, and with paths that hold there.
fn keeper_command(program: &Path, store: &Path, args: &AttachArgs) -> std::io::Result<Command> {
    let mut command = Command::new(program);
    command.arg("--store").arg(std::path::absolute(store)?);
    command.args(["attach", "--foreground", "--keeper", "-v", &args.name]);
    command.args(args.device.map(|device| device.to_string()));
    command.arg(format!("--connections={}", args.connections)).arg(format!("--patience={}", args.patience));
    command.args(args.ioctl.then_some("--ioctl"));
    if let Some(socket) = &args.socket {
        command.arg("--socket").arg(std::path::absolute(socket)?);
    }
    command.current_dir("/");
    Ok(command)
}

/// What was added to a log behind its first `before` bytes.
fn said_since(log: &Path, before: u64) -> std::io::Result<String> {
    let mut log = File::open(log)?;
    log.seek(SeekFrom::Start(before))?;
    let mut said = Vec::new();
    log.take(SAID_BYTES_MAX).read_to_end(&mut said)?;
    Ok(String::from_utf8_lossy(&said).into_owned())
}

/// Attaches a VM's disk through the VM's own socket, for a guest that is about to start.
pub(super) fn attach_vm(store: &Path, vm: &HostName, socket: &Path) -> anyhow::Result<Device> {
    let args = AttachArgs {
        name: vm.to_string(),
        device: None,
        connections: 2,
        patience: PATIENCE_SECONDS,
        ioctl: false,
        socket: Some(socket.to_owned()),
        foreground: false,
        keeper: false,
    };
    Ok(leave(store, &Table::open(store)?, &args)?.device)
}

/// Detaches a VM's disk, if it is attached; the VM has ended.
pub(super) async fn detach_vm(store: &Path, vm: &HostName) -> anyhow::Result<()> {
    let table = Table::open(store)?;
    if let Some(entry) = table.get(vm.as_str())? {
        attach::detach(&table, &entry).await?;
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_keeper_s_paths_hold_in_its_own_folder() {
        let args = AttachArgs {
            name: "vm".into(),
            device: None,
            connections: 2,
            patience: 1,
            ioctl: false,
            socket: Some("relative.sock".into()),
            foreground: false,
            keeper: false,
        };
        let command = keeper_command(Path::new("/bootcache"), Path::new("relative"), &args).unwrap();
        assert_eq!(command.get_current_dir(), Some(Path::new("/")));
        let words: Vec<&std::ffi::OsStr> = command.get_args().collect();
        let here = std::env::current_dir().unwrap();
        for (option, path) in [("--store", "relative"), ("--socket", "relative.sock")] {
            let at = words.iter().position(|word| *word == option).unwrap();
            assert_eq!(words[at + 1], here.join(path), "{option}");
        }
    }

    #[test]
    fn only_what_was_said_since_counts() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("vm.log");
        std::fs::write(&log, "bootcache: an old reason\nbootcache: a new one\n").unwrap();
        assert_eq!(said_since(&log, 25).unwrap(), "bootcache: a new one\n");
        assert_eq!(said_since(&log, 100).unwrap(), "");
    }
}
