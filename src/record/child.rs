//! The process that is recorded: in a process group of its own, ended with all it started, and with us.

use std::ffi::OsStr;
use std::io;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, Signal};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::process::{Child, Command};
use tokio_util::sync::CancellationToken;

use super::{RecordError, Said};
use crate::qemu::accelerator;

/// Time to end by itself when asked to.
const GRACE: Duration = Duration::from_secs(3);
/// The most that is kept of what it says, in bytes.
const TAIL: usize = 4096;
/// Serial output that waits to be matched, in bytes.
const PIPE: usize = 64 << 10;

/// A process of which reads are seen. Dropping it kills its group.
#[derive(Debug)]
pub(super) struct Recorded {
    child: Child,
    group: Option<Pid>,
    said: Arc<Mutex<Vec<u8>>>,
    stuck: CancellationToken,
}

impl Recorded {
    /// Starts `command`; the stream is its stdout.
    pub(super) fn start(mut command: Command) -> Result<(Self, DuplexStream), RecordError> {
        let program = command.as_std().get_program().to_owned();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.process_group(0).kill_on_drop(true);
        // SAFETY: between fork and exec only prctl is called, which is async-signal-safe and allocates nothing.
        unsafe {
            command.pre_exec(|| {
                // A recorder that is killed with -9 leaves no guest behind.
                rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(io::Error::from)
            });
        }
        let mut child = command.spawn().map_err(|source| start_error(&program, source))?;
        let group = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        let said = Arc::<Mutex<Vec<u8>>>::default();
        let stuck = CancellationToken::new();
        let (serial, forward) = tokio::io::duplex(PIPE);
        if let Some(stdout) = child.stdout.take() {
            tokio::spawn(gather(stdout, Arc::clone(&said), Kind::Serial(Some(forward))));
        }
        if let Some(stderr) = child.stderr.take() {
            tokio::spawn(gather(stderr, Arc::clone(&said), Kind::Messages(stuck.clone())));
        }
        Ok((Self { child, group, said, stuck }, serial))
    }

    /// Cancelled when the guest stands still because KVM cannot go on with it.
    pub(super) fn stuck(&self) -> CancellationToken {
        self.stuck.clone()
    }

    /// Waits until it ends by itself.
    pub(super) async fn ended(&mut self) -> io::Result<ExitStatus> {
        self.child.wait().await
    }

    /// Asks its group to end, and makes it.
    pub(super) async fn stop(&mut self) {
        self.signal(Signal::TERM);
        let _ = tokio::time::timeout(GRACE, self.child.wait()).await;
        self.signal(Signal::KILL);
        let _ = tokio::time::timeout(GRACE, self.child.wait()).await;
    }

    /// The last line that it printed.
    pub(super) fn said(&self) -> Said {
        let said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(&said);
        let last = text.lines().rev().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default();
        // The guest's console may hold anything, terminal codes too.
        Said(last.chars().filter(|letter| !letter.is_control()).take(200).collect())
    }

    fn signal(&self, signal: Signal) {
        if let Some(group) = self.group {
            // Nobody left in it is what is wanted.
            let _ = rustix::process::kill_process_group(group, signal);
        }
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

/// What a process writes.
enum Kind {
    /// Its stdout, which is passed on for as long as someone wants it.
    Serial(Option<DuplexStream>),
    /// Its stderr, where QEMU says that KVM gave up.
    Messages(CancellationToken),
}

/// Reads `from` to its end and keeps the last of it.
async fn gather(mut from: impl tokio::io::AsyncRead + Unpin, said: Arc<Mutex<Vec<u8>>>, mut kind: Kind) {
    let mut chunk = [0; 4096];
    while let Ok(length @ 1..) = from.read(&mut chunk).await {
        {
            let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
            said.extend_from_slice(&chunk[..length]);
            let surplus = said.len().saturating_sub(TAIL);
            said.drain(..surplus);
        }
        match &mut kind {
            Kind::Serial(forward) => {
                if let Some(stream) = forward
                    && stream.write_all(&chunk[..length]).await.is_err()
                {
                    *forward = None;
                }
            }
            Kind::Messages(stuck) => {
                if accelerator::gave_up(&chunk[..length]) {
                    stuck.cancel();
                }
            }
        }
    }
}

fn start_error(program: &OsStr, source: io::Error) -> RecordError {
    RecordError::Start { program: program.to_string_lossy().into_owned(), source }
}
