//! A child process whose lines can be waited for and that never outlives its guard.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What a process has printed so far, stdout and stderr in one list.
#[derive(Debug)]
struct Lines {
    said: Mutex<Said>,
    more: Condvar,
}

#[derive(Debug)]
struct Said {
    lines: Vec<String>,
    /// Of stdout and stderr, those that more may come from.
    open: usize,
}

/// A running process; killed and reaped on drop.
#[derive(Debug)]
pub struct Process {
    child: Child,
    command: String,
    lines: Arc<Lines>,
}

impl Process {
    /// Starts it with stdout and stderr gathered line by line.
    #[track_caller]
    pub fn start(command: &mut Command) -> Self {
        let name = format!("{command:?}");
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let said = Said { lines: Vec::new(), open: 2 };
        let lines = Arc::new(Lines { said: Mutex::new(said), more: Condvar::new() });
        gather(child.stdout.take().expect("stdout is piped"), &lines);
        gather(child.stderr.take().expect("stderr is piped"), &lines);
        Self { child, command: name, lines }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a line that contains `text`, also among those already said, and returns it. Fails at once when the
    /// process can say no more.
    #[track_caller]
    pub fn wait_for(&self, text: &str, within: Duration) -> String {
        let deadline = Instant::now() + within;
        let mut said = self.lines.said.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(line) = said.lines.iter().find(|line| line.contains(text)) {
                return line.clone();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let all = || said.lines.join("\n");
            assert!(said.open > 0, "{} ended without `{text}`:\n{}", self.command, all());
            assert!(!left.is_zero(), "{}: no `{text}` within {within:?}:\n{}", self.command, all());
            said = self.lines.more.wait_timeout(said, left).expect("no reader panics").0;
        }
    }

    /// Everything said so far.
    pub fn said(&self) -> String {
        self.lines.said.lock().unwrap_or_else(PoisonError::into_inner).lines.join("\n")
    }

    /// Waits for the end, and for its last words.
    #[track_caller]
    pub fn wait(&mut self, within: Duration) -> ExitStatus {
        let deadline = Instant::now() + within;
        loop {
            if let Some(status) = self.child.try_wait().expect("it is our child") {
                self.wait_for_last_words();
                return status;
            }
            assert!(
                Instant::now() < deadline,
                "{} still runs after {within:?}:\n{}",
                self.command,
                self.said()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// A child that it left behind may keep the pipes open: those are not waited for.
    fn wait_for_last_words(&self) {
        let said = self.lines.said.lock().unwrap_or_else(PoisonError::into_inner);
        let patience = Duration::from_secs(2);
        let _said = self.lines.more.wait_timeout_while(said, patience, |said| said.open > 0);
    }

    /// SIGTERM, then waits for the end.
    #[track_caller]
    pub fn terminate(&mut self, within: Duration) -> ExitStatus {
        self.signal(rustix::process::Signal::TERM);
        self.wait(within)
    }

    /// SIGKILL, as a crash would; reaped when this returns.
    pub fn kill(&mut self) {
        let _already_gone = self.child.kill();
        let _already_reaped = self.child.wait();
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        let _already_gone = rustix::process::kill_process(pid, signal);
    }

    /// A field of `/proc/PID/io`, such as `read_bytes`.
    pub fn io(&self, field: &str) -> u64 {
        proc_field(&format!("/proc/{}/io", self.id()), field)
    }

    /// A field of `/proc/PID/status` in bytes, such as `RssAnon`.
    pub fn memory(&self, field: &str) -> u64 {
        proc_field(&format!("/proc/{}/status", self.id()), field) * 1024
    }

    /// User and system time so far.
    pub fn cpu(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.id())).expect("it runs");
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks: u64 = fields[11..13].iter().map(|ticks| ticks.parse::<u64>().expect("a number")).sum();
        Duration::from_millis(ticks * 10) // USER_HZ is 100 everywhere
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

fn gather(pipe: impl Read + Send + 'static, lines: &Arc<Lines>) {
    let lines = Arc::clone(lines);
    std::thread::spawn(move || {
        let mut pipe = BufReader::new(pipe);
        let mut line = Vec::new();
        while pipe.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            lines.said.lock().unwrap_or_else(PoisonError::into_inner).lines.push(text);
            lines.more.notify_all();
            line.clear();
        }
        lines.said.lock().unwrap_or_else(PoisonError::into_inner).open -= 1;
        lines.more.notify_all();
    });
}

fn proc_field(path: &str, field: &str) -> u64 {
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}"));
    text.lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':')?.split_whitespace().next()?.parse().ok())
        .unwrap_or_else(|| panic!("no {field} in {path}"))
}
