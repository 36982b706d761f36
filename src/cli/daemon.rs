//! Starting the daemon of a store when none runs.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, bail};
use bootcache::control::{Client, ControlError};
use bootcache::serve::CONTROL_SOCKET;
use tokio::io::{AsyncBufReadExt, BufReader};

/// How long a daemon may take to be ready.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// Talks to the daemon of the store in `dir`, and starts one that outlives this process if there is none.
pub(crate) async fn daemon(dir: &Path) -> anyhow::Result<Client> {
    daemon_with(dir, &[]).await
}

/// As [`daemon`]; one that is started gets `more` arguments.
pub(crate) async fn daemon_with(dir: &Path, more: &[String]) -> anyhow::Result<Client> {
    let socket = dir.join(CONTROL_SOCKET);
    match Client::connect(&socket).await {
        Err(ControlError::NoDaemon) => {}
        other => return Ok(other?),
    }
    match start(dir, more).await {
        Ok(log) => {
            eprintln!("started a daemon on {} (its log: {})", dir.display(), log.display());
            Ok(Client::connect(&socket).await?)
        }
        // Another command may have started one meanwhile.
        Err(error) => Client::connect(&socket).await.map_err(|_| error),
    }
}

/// This program, where it was when this was asked first: an update may have put another one in its place since.
pub(super) fn program() -> anyhow::Result<PathBuf> {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    match PROGRAM.get() {
        Some(program) => Ok(program.clone()),
        None => {
            let program = std::env::current_exe().context("cannot find this program")?;
            Ok(PROGRAM.get_or_init(|| program).clone())
        }
    }
}

/// Starts `bootcache serve` in a process group of its own and waits until it says that it is ready.
async fn start(dir: &Path, more: &[String]) -> anyhow::Result<PathBuf> {
    std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let path = dir.join("serve.log");
    let log = File::options()
        .create(true)
        .append(true)
        .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed())
        .open(&path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    let mut command = std::process::Command::new(program()?);
    command
        .arg("--store")
        .arg(dir)
        .arg("serve")
        .args(more)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log);
    // A process group of its own: Ctrl-C in this terminal is not meant for the daemon.
    command.process_group(0);
    let mut child =
        tokio::process::Command::from(command).spawn().context("cannot start `bootcache serve`")?;
    let stdout = child.stdout.take().context("the daemon has no output")?;
    let mut lines = BufReader::new(stdout).lines();
    let ready = async {
        while let Some(line) = lines.next_line().await? {
            if line.starts_with("ready") {
                return Ok(true);
            }
        }
        Ok::<_, std::io::Error>(false)
    };
    match tokio::time::timeout(START_TIMEOUT, ready).await {
        Ok(Ok(true)) => Ok(path),
        Ok(_) => bail!("`bootcache serve` ended at once: {}", last_line(&path)),
        Err(_) => bail!("`bootcache serve` was not ready within {START_TIMEOUT:?}: see {}", path.display()),
    }
}

fn last_line(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().last().map_or_else(|| format!("see {}", path.display()), str::to_owned)
}
