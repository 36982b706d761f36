//! A keeper as a process of its own, which outlives whoever starts it: the program `bootcache` with the words that
//! `cli/attach.rs` understands.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Child;

use super::{AttachError, Entry, Options, Table, Way};

/// The exit code of a keeper that ended because of something that may pass (`EX_TEMPFAIL` of sysexits.h).
pub const MAY_PASS: u8 = 75;
/// How long a keeper may take to attach a device: longer than each thing that it waits for itself.
const DEADLINE: Duration = Duration::from_secs(120);
/// How much of what a keeper said is looked at for the reason why it ended.
const SAID_BYTES_MAX: u64 = 64 << 10;

/// As [`start`], or nothing when it is attached and looked after already.
///
/// # Errors
///
/// As [`start`].
pub async fn ensure(program: &Path, store: &Path, options: &Options) -> Result<Entry, AttachError> {
    match Table::live(store, &options.name)? {
        Some(entry) if Table::of(store).is_kept(&options.name)? => Ok(entry),
        None if options.again => Err(AttachError::NotAttached(options.name.clone())),
        _ => start(program, store, options).await,
    }
}

/// Starts a keeper for the store in `store`, and waits until it has attached what `options` say. `program` is bootcache.
///
/// Dropped before that, it has the keeper end, which leaves everything as it was.
///
/// # Errors
///
/// [`AttachError`]; nothing is attached then that was not before.
pub async fn start(program: &Path, store: &Path, options: &Options) -> Result<Entry, AttachError> {
    let table = Table::open(store)?;
    let log_path = table.log_path(&options.name);
    let of_table = |error| AttachError::Table { path: log_path.display().to_string(), error };
    // Added to: a keeper of that name may run, and write there.
    let log = File::options().create(true).append(true).open(&log_path).map_err(of_table)?;
    let before = log.metadata().map_err(of_table)?.len();
    let of_program = |error| AttachError::Program { program: program.display().to_string(), error };
    let mut command = command(program, store, options).map_err(of_program)?;
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
    let keeper = tokio::process::Command::from(command).spawn().map_err(of_program)?;
    match tokio::time::timeout(DEADLINE, Starting(Some(keeper)).ended()).await {
        Ok(Ok(None)) => {
            table.get(&options.name)?.ok_or_else(|| AttachError::NotAttached(options.name.clone()))
        }
        Ok(Ok(Some(code))) => {
            let said = said_since(&log_path, before).unwrap_or_default();
            let reason = said.lines().rev().find_map(|line| line.strip_prefix("bootcache: "));
            let unknown =
                || format!("the process that looks after the device ended: see {}", log_path.display());
            Err(AttachError::Ended {
                reason: reason.map_or_else(unknown, str::to_owned),
                may_pass: code == i32::from(MAY_PASS),
            })
        }
        Ok(Err(error)) => Err(of_program(error)),
        Err(_) => Err(AttachError::Late {
            name: options.name.clone(),
            seconds: DEADLINE.as_secs(),
            log: log_path.display().to_string(),
        }),
    }
}

/// A keeper that has not attached its device yet. On drop it is told to end.
struct Starting(Option<Child>);

impl Starting {
    /// Waits for the keeper to say that it is ready, and leaves it alone then; or to end: gives its exit code.
    async fn ended(mut self) -> io::Result<Option<i32>> {
        let keeper = self.0.as_mut().expect("it is taken below alone");
        let mut line = String::new();
        if let Some(said) = keeper.stdout.take() {
            BufReader::new(said).read_line(&mut line).await?;
        }
        if line.is_empty() {
            return keeper.wait().await.map(|status| Some(status.code().unwrap_or_default()));
        }
        self.0 = None;
        Ok(None)
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        let id = self.0.as_ref().and_then(Child::id).and_then(|id| i32::try_from(id).ok());
        if let Some(pid) = id.and_then(Pid::from_raw) {
            // It may have ended meanwhile.
            let _ = kill_process(pid, Signal::TERM);
        }
    }
}

/// The command line of a keeper, which stays: in `/`, so that no mount is held by it, and with paths that hold there.
fn command(program: &Path, store: &Path, options: &Options) -> io::Result<Command> {
    let mut command = Command::new(program);
    command.arg("--store").arg(std::path::absolute(store)?);
    command.args(["attach", "--foreground", "--keeper", "-v", &options.name]);
    command.args(options.device.map(|device| device.to_string()));
    command.arg(format!("--connections={}", options.connections));
    command.arg(format!("--patience={}", options.patience.as_secs()));
    command.args((options.way == Some(Way::Ioctl)).then_some("--ioctl"));
    command.args(options.again.then_some("--again"));
    command.arg("--socket").arg(std::path::absolute(&options.socket)?);
    command.current_dir("/");
    Ok(command)
}

/// What was added to a log behind its first `before` bytes.
fn said_since(log: &Path, before: u64) -> io::Result<String> {
    let mut log = File::open(log)?;
    log.seek(SeekFrom::Start(before))?;
    let mut said = Vec::new();
    log.take(SAID_BYTES_MAX).read_to_end(&mut said)?;
    Ok(String::from_utf8_lossy(&said).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> Options {
        Options::of_vm(&"vm".parse().unwrap(), "relative.sock".into())
    }

    /// A program that does what the shell `text` says instead of what a keeper does.
    fn program(folder: &Path, text: &str) -> std::path::PathBuf {
        let (text_path, path) = (folder.join("text"), folder.join("program"));
        std::fs::write(&text_path, format!("#!/bin/sh\n{text}\n")).unwrap();
        // Not written by this process: what another test starts just then would have it open, and it could not be run.
        let copied = Command::new("install").args(["-m", "755"]).args([&text_path, &path]).status();
        assert!(copied.unwrap().success());
        path
    }

    #[test]
    fn a_keeper_s_paths_hold_in_its_own_folder() {
        let options = Options { again: true, ..options() };
        let command = command(Path::new("/bootcache"), Path::new("relative"), &options).unwrap();
        assert_eq!(command.get_current_dir(), Some(Path::new("/")));
        let words: Vec<&std::ffi::OsStr> = command.get_args().collect();
        let here = std::env::current_dir().unwrap();
        for (option, path) in [("--store", "relative"), ("--socket", "relative.sock")] {
            let at = words.iter().position(|word| *word == option).unwrap();
            assert_eq!(words[at + 1], here.join(path), "{option}");
        }
        assert!(words.contains(&std::ffi::OsStr::new("--again")));
    }

    #[test]
    fn only_what_was_said_since_counts() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("vm.log");
        std::fs::write(&log, "bootcache: an old reason\nbootcache: a new one\n").unwrap();
        assert_eq!(said_since(&log, 25).unwrap(), "bootcache: a new one\n");
        assert_eq!(said_since(&log, 100).unwrap(), "");
    }

    #[tokio::test]
    async fn a_keeper_that_ends_tells_why_and_whether_it_may_pass() {
        let folder = tempfile::tempdir().unwrap();
        for (code, passes) in [(1, false), (i32::from(MAY_PASS), true)] {
            let program = program(folder.path(), &format!("echo 'bootcache: no luck' >&2; exit {code}"));
            let error = start(&program, folder.path(), &options()).await.unwrap_err();
            assert_eq!((error.to_string().as_str(), error.may_pass()), ("no luck", passes));
        }
        let error = start(&folder.path().join("none"), folder.path(), &options()).await.unwrap_err();
        assert!(matches!(error, AttachError::Program { .. }), "{error}");
    }

    #[tokio::test]
    async fn a_keeper_that_nobody_waits_for_any_more_is_ended() {
        let folder = tempfile::tempdir().unwrap();
        let [began, ended] = ["began", "ended"].map(|name| folder.path().join(name));
        let (begins, ends) = (began.display(), ended.display());
        let program = program(
            folder.path(),
            &format!("trap 'touch {ends}; exit 0' TERM\ntouch {begins}\nwhile :; do sleep 0.05; done"),
        );
        let until = async |path: &Path| {
            while !path.exists() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let options = options();
        let limit = Duration::from_secs(60);
        tokio::select! {
            started = start(&program, folder.path(), &options) => panic!("{started:?}"),
            () = until(&began) => {}
            () = tokio::time::sleep(limit) => panic!("it did not begin"),
        }
        tokio::time::timeout(limit, until(&ended)).await.expect("it was told to end");
    }

    #[tokio::test]
    async fn what_is_not_attached_is_not_taken_over() {
        let folder = tempfile::tempdir().unwrap();
        let options = Options { again: true, ..options() };
        let error = ensure(Path::new("/none"), folder.path(), &options).await.unwrap_err();
        assert!(matches!(error, AttachError::NotAttached(_)), "{error}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
