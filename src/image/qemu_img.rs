//! `qemu-img`, the well-kept reader of other disk formats: always with the format stated, an absolute path (so that
//! no file name is read as a protocol), a deadline where the work is bounded, and an end to it when ours ends.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use serde::Deserialize;

use super::manifest::SourceFormat;
use super::scan::Watch;

/// Looking at an image reads its tables only.
const LOOK_DEADLINE: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(20);
/// The longest that is kept of what it prints.
const OUTPUT_MAX: u64 = 1 << 20;

/// Why `qemu-img` did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum QemuImgError {
    /// It cannot be started.
    #[error("qemu-img cannot be started ({0}): install it (Debian: apt install qemu-utils)")]
    Start(std::io::Error),
    /// It said no.
    #[error("qemu-img: {0}")]
    Failed(String),
    /// The file system is full.
    #[error("the disk is full")]
    NoSpace,
    /// It answered with something else than JSON of the known form.
    #[error("qemu-img: its answer is not understood ({0})")]
    Answer(serde_json::Error),
    /// It took too long.
    #[error("qemu-img: no answer within {} s", LOOK_DEADLINE.as_secs())]
    Deadline,
    /// The watcher wanted it.
    #[error("interrupted")]
    Cancelled,
}

/// What `qemu-img info` says of one file of a chain.
#[derive(Debug, Deserialize)]
pub(super) struct Info {
    /// Bytes that a guest sees.
    #[serde(rename = "virtual-size")]
    pub(super) virtual_size: u64,
    /// The file below, as this one names it.
    #[serde(rename = "backing-filename")]
    pub(super) backing: Option<String>,
    /// The format of the file below, if this one states it.
    #[serde(rename = "backing-filename-format")]
    pub(super) backing_format: Option<String>,
    /// Whether it is encrypted.
    #[serde(default)]
    pub(super) encrypted: bool,
    #[serde(rename = "format-specific")]
    specific: Option<Specific>,
}

#[derive(Debug, Deserialize)]
struct Specific {
    data: Option<serde_json::Value>,
}

impl Info {
    /// Every file beside the image itself that holds a part of it, as qemu-img names them.
    pub(super) fn outside_files(&self, path: &Path) -> Vec<String> {
        let mut files: Vec<String> = self.backing.clone().into_iter().collect();
        let data = self.specific.as_ref().and_then(|specific| specific.data.as_ref());
        let text = |value: &serde_json::Value| value.as_str().map(str::to_owned);
        files.extend(data.and_then(|data| text(data.get("data-file")?)));
        let extents = data.and_then(|data| data.get("extents")?.as_array());
        let names = extents.into_iter().flatten().filter_map(|extent| text(extent.get("filename")?));
        files.extend(names.filter(|name| Path::new(name) != path));
        files
    }
}

/// What `qemu-img check` counts.
#[derive(Debug, Deserialize)]
struct Check {
    #[serde(default)]
    corruptions: u64,
    #[serde(rename = "check-errors", default)]
    errors: u64,
}

/// Looks at the image at the absolute `path`, and with `chain` at those below it, the lowest last.
pub(super) fn info(
    path: &Path,
    format: SourceFormat,
    chain: bool,
    watch: &Watch,
) -> Result<Vec<Info>, QemuImgError> {
    let mut command = command("info");
    command.args(["--output=json", "-f", &format.to_string()]);
    command.args(chain.then_some("--backing-chain")).arg(path);
    let output = run(command, Some(LOOK_DEADLINE), watch, |_| ())?;
    if !output.status.success() {
        return Err(failure(&output));
    }
    let infos = if chain {
        serde_json::from_slice(&output.stdout)
    } else {
        serde_json::from_slice(&output.stdout).map(|info| vec![info])
    };
    infos.map_err(QemuImgError::Answer)
}

/// Refuses an image whose tables are not sound. `convert` would read what lies past the end of a truncated file as
/// zeroes.
pub(super) fn check(path: &Path, format: SourceFormat, watch: &Watch) -> Result<(), QemuImgError> {
    const LEAKED: i32 = 3;
    const UNSUPPORTED: i32 = 63;
    let mut command = command("check");
    command.args(["--output=json", "-f", &format.to_string()]).arg(path);
    let output = run(command, Some(LOOK_DEADLINE), watch, |_| ())?;
    match output.status.code() {
        Some(0 | LEAKED | UNSUPPORTED) => Ok(()),
        _ => match serde_json::from_slice::<Check>(&output.stdout) {
            Ok(check) if check.corruptions + check.errors > 0 => Err(QemuImgError::Failed(format!(
                "the {format} image is damaged or truncated ({} errors)",
                check.corruptions + check.errors
            ))),
            _ => Err(failure(&output)),
        },
    }
}

/// Writes what a guest sees of the image at `path` to the file `target`; zeroes become holes in a raw target.
/// `watch` counts source bytes, of `size` in all. Nothing is made durable.
pub(super) fn convert(
    (path, format): (&Path, SourceFormat),
    (target, target_format): (&Path, SourceFormat),
    size: u64,
    watch: &Watch,
) -> Result<(), QemuImgError> {
    watch.start("converting", size);
    let mut command = command("convert");
    command.args(["-p", "-f", &format.to_string(), "-O", &target_format.to_string()]).arg(path).arg(target);
    let output = run(command, None, watch, |text| {
        if let Some(percent) = last_percent(text) {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a u64")]
            watch.done.store((size as f64 * percent / 100.0) as u64, Ordering::Relaxed);
        }
    })?;
    if output.status.success() { Ok(()) } else { Err(failure(&output)) }
}

fn command(verb: &str) -> Command {
    let mut command = Command::new("qemu-img");
    command.arg(verb).env("LC_ALL", "C").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // SAFETY: between fork and exec only one system call is made; it takes no memory and no lock.
    unsafe {
        command.pre_exec(|| {
            let signal = Some(rustix::process::Signal::KILL);
            Ok(rustix::process::set_parent_process_death_signal(signal)?)
        });
    }
    command
}

/// Runs `command` to its end, shows what it prints to `printed` as it comes, and kills it when it is to end early.
fn run(
    mut command: Command,
    deadline: Option<Duration>,
    watch: &Watch,
    printed: impl Fn(&str) + Send,
) -> Result<Output, QemuImgError> {
    let start = Instant::now();
    let mut child = command.spawn().map_err(QemuImgError::Start)?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    thread::scope(|scope| {
        let stdout = scope.spawn(move || read_all(stdout, printed));
        let stderr = scope.spawn(move || read_all(stderr, |_| ()));
        let ended = wait(&mut child, || match deadline {
            _ if watch.is_cancelled() => Some(QemuImgError::Cancelled),
            Some(deadline) if start.elapsed() > deadline => Some(QemuImgError::Deadline),
            _ => None,
        });
        let [stdout, stderr] = [stdout, stderr]
            .map(|reader| reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        Ok(Output { status: ended?, stdout, stderr })
    })
}

fn wait(
    child: &mut Child,
    early_end: impl Fn() -> Option<QemuImgError>,
) -> Result<std::process::ExitStatus, QemuImgError> {
    loop {
        let ended = child.try_wait().map_err(QemuImgError::Start)?;
        if let Some(status) = ended {
            return Ok(status);
        }
        if let Some(error) = early_end() {
            // It may have ended by itself just now, which is as good.
            let _ = child.kill();
            let _ = child.wait();
            return Err(error);
        }
        thread::sleep(POLL);
    }
}

fn read_all(pipe: Option<impl Read>, printed: impl Fn(&str)) -> Vec<u8> {
    let mut all = Vec::new();
    let Some(mut pipe) = pipe else { return all };
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = pipe.read(&mut buffer) {
        printed(&String::from_utf8_lossy(&buffer[..length]));
        if all.len() as u64 <= OUTPUT_MAX {
            all.extend_from_slice(&buffer[..length]);
        }
    }
    all
}

/// The share in the last whole `(12.34/100%)` of what `-p` printed.
fn last_percent(text: &str) -> Option<f64> {
    let before = &text[..text.rfind("/100%")?];
    before[before.rfind('(')? + 1..].trim().parse().ok()
}

fn failure(output: &Output) -> QemuImgError {
    let text = String::from_utf8_lossy(&output.stderr);
    if text.contains("No space left on device") {
        return QemuImgError::NoSpace;
    }
    let line = text.lines().find(|line| !line.trim().is_empty()).unwrap_or("it failed without a word");
    QemuImgError::Failed(line.trim_start_matches("qemu-img: ").chars().take(400).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_the_last_whole_share() {
        assert_eq!(last_percent("    (0.00/100%)\r    (12.50/100%)\r    (1"), Some(12.5));
        assert_eq!(last_percent("(100.00/100%)"), Some(100.0));
        assert_eq!(last_percent("nothing"), None);
    }
}
