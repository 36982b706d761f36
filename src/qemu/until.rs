//! When a boot is over: a text on the serial line, a connection from the guest, a disk that has become quiet.
//!
//! What is waited for comes from outside as a stream of bytes and a count of reads, so that it is the same for a child
//! process, for a domain of libvirt, and in tests.

use std::fmt;
use std::io;
use std::net::Ipv4Addr;
use std::str::FromStr;
use std::time::Duration;

use regex::bytes::Regex;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::net::TcpListener;
use tokio::time::Instant;

/// The most serial output that a match may span, in bytes.
const WINDOW: usize = 8192;
/// How often the number of reads is looked at.
const TICK: Duration = Duration::from_millis(100);

/// When a boot is over.
#[derive(Debug, Clone)]
pub enum Until {
    /// The serial line says something.
    Serial(Regex),
    /// The guest connects to this TCP port of its host (10.0.2.2 behind QEMU's NAT).
    Tcp(u16),
    /// Nothing was read for this long, after something was.
    Idle(Duration),
    /// The command ends by itself.
    Exit,
}

/// Text that is no condition.
#[derive(Debug, thiserror::Error)]
pub enum ParseUntilError {
    /// Not of a known form.
    #[error("'{0}' is not a condition: use serial:REGEX, tcp:PORT, idle:SECONDS or exit")]
    Form(String),
    /// Not a regular expression.
    #[error("serial: {0}")]
    Regex(String),
}

impl FromStr for Until {
    type Err = ParseUntilError;

    fn from_str(text: &str) -> Result<Self, ParseUntilError> {
        let form = || ParseUntilError::Form(text.chars().take(80).collect());
        let Some((kind, value)) = text.split_once(':') else {
            return if text == "exit" { Ok(Self::Exit) } else { Err(form()) };
        };
        match kind {
            "serial" if !value.is_empty() => match Regex::new(value) {
                Ok(regex) => Ok(Self::Serial(regex)),
                Err(error) => {
                    // The last line says what is wrong; those before it draw where.
                    let text = error.to_string();
                    Err(ParseUntilError::Regex(text.lines().last().unwrap_or_default().to_owned()))
                }
            },
            "tcp" => value.parse().ok().filter(|port| *port > 0).map(Self::Tcp).ok_or_else(form),
            "idle" => {
                let seconds: f64 = value.parse().map_err(|_| form())?;
                let valid = (0.1..=3600.0).contains(&seconds);
                if valid { Ok(Self::Idle(Duration::from_secs_f64(seconds))) } else { Err(form()) }
            }
            _ => Err(form()),
        }
    }
}

impl fmt::Display for Until {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Serial(regex) => write!(f, "serial:{}", regex.as_str()),
            Self::Tcp(port) => write!(f, "tcp:{port}"),
            Self::Idle(quiet) => write!(f, "idle:{}", quiet.as_secs_f64()),
            Self::Exit => f.write_str("exit"),
        }
    }
}

/// Why a wait for the end of a boot ended otherwise.
#[derive(Debug, thiserror::Error)]
pub enum WaitError {
    /// The port of [`Until::Tcp`] cannot be listened on.
    #[error("port {port} cannot be listened on ({source}): choose another for tcp:PORT")]
    Listen { port: u16, source: io::Error },
}

/// A condition that is ready to be waited for: a port is open before the guest starts.
#[derive(Debug)]
pub struct Condition {
    until: Until,
    listener: Option<TcpListener>,
}

impl Condition {
    /// Gets ready to wait. `address` is where the guest's connection arrives; 127.0.0.1 behind QEMU's NAT.
    ///
    /// # Errors
    /// [`WaitError::Listen`].
    pub async fn prepare(until: Until, address: Ipv4Addr) -> Result<Self, WaitError> {
        let listener = match until {
            Until::Tcp(port) => Some(
                TcpListener::bind((address, port))
                    .await
                    .map_err(|source| WaitError::Listen { port, source })?,
            ),
            _ => None,
        };
        Ok(Self { until, listener })
    }

    /// Waits for the condition and returns when it was met: for [`Until::Idle`], when the disk became quiet. `serial`
    /// is read to its end in any case, so that who writes it never waits; `reads` is the number of reads so far, and is
    /// asked for every 100 ms. Never returns for [`Until::Exit`]. Dropping the future ends the wait.
    pub async fn met(self, serial: impl AsyncRead + Unpin, reads: impl FnMut() -> u64) -> Instant {
        let text = match &self.until {
            Until::Serial(regex) => Some(regex.clone()),
            _ => None,
        };
        let quiet = match self.until {
            Until::Idle(quiet) => Some(quiet),
            _ => None,
        };
        tokio::select! {
            met = said(serial, text) => met,
            met = connected(self.listener) => met,
            met = is_quiet(reads, quiet) => met,
        }
    }
}

async fn said(mut serial: impl AsyncRead + Unpin, text: Option<Regex>) -> Instant {
    let mut window = Vec::new();
    let mut chunk = [0; 4096];
    // An error is the end of the line: whoever waits for the process learns why.
    while let Ok(length @ 1..) = serial.read(&mut chunk).await {
        let Some(text) = &text else { continue };
        window.extend_from_slice(&chunk[..length]);
        if text.is_match(&window) {
            return Instant::now();
        }
        window.drain(..window.len().saturating_sub(WINDOW));
    }
    std::future::pending().await
}

async fn connected(listener: Option<TcpListener>) -> Instant {
    if let Some(listener) = listener {
        while let Err(error) = listener.accept().await {
            tracing::debug!("the guest's report was not accepted: {error}");
            tokio::time::sleep(TICK).await;
        }
        return Instant::now();
    }
    std::future::pending().await
}

async fn is_quiet(mut reads: impl FnMut() -> u64, quiet: Option<Duration>) -> Instant {
    let mut tick = tokio::time::interval(TICK);
    let (mut seen, mut since) = (0, Instant::now());
    loop {
        let now = tick.tick().await;
        let count = reads();
        if count != seen {
            (seen, since) = (count, now);
        } else if quiet.is_some_and(|quiet| seen > 0 && now.duration_since(since) >= quiet) {
            return since;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn until(text: &str) -> Until {
        text.parse().unwrap()
    }

    #[test]
    fn conditions_are_read_as_they_are_written() {
        for text in ["serial:BOOTED|login:", "tcp:8080", "idle:2.5", "exit"] {
            assert_eq!(until(text).to_string(), text);
        }
        for bad in ["", "serial:", "serial:(", "tcp:0", "tcp:x", "idle:0", "idle:-1", "idle:inf", "never:1"] {
            let error = bad.parse::<Until>().expect_err(bad).to_string();
            assert!(!error.contains('\n'), "{error}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_text_is_found_across_chunks_and_after_much_else() {
        let condition = Condition::prepare(until("serial:READY [0-9]+"), Ipv4Addr::LOCALHOST).await.unwrap();
        let noise = vec![b'x'; 100_000];
        let serial = noise.as_slice().chain(b"REA".as_slice()).chain(b"DY 7".as_slice());
        tokio::time::timeout(Duration::from_secs(1), condition.met(serial, || 0)).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_disk_is_quiet_only_after_it_was_read() {
        let condition = Condition::prepare(until("idle:2"), Ipv4Addr::LOCALHOST).await.unwrap();
        let start = Instant::now();
        let reads = || match start.elapsed().as_secs() {
            0..5 => 0,
            second @ 5..9 => second,
            _ => 9,
        };
        let met = condition.met(tokio::io::empty(), reads).await;
        assert_eq!(met.duration_since(start).as_secs(), 9);
        assert_eq!(start.elapsed().as_secs(), 11);
    }

    #[tokio::test]
    async fn a_connection_from_the_guest_is_enough() {
        let free = || std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut port = free();
        let condition = loop {
            // Others on this machine look for free ports too.
            match Condition::prepare(Until::Tcp(port), Ipv4Addr::LOCALHOST).await {
                Ok(condition) => break condition,
                Err(_) => port = free(),
            }
        };
        let taken = Condition::prepare(Until::Tcp(port), Ipv4Addr::LOCALHOST).await;
        assert!(taken.unwrap_err().to_string().contains("choose another"));
        let guest = std::thread::spawn(move || std::net::TcpStream::connect(("127.0.0.1", port)).map(drop));
        condition.met(tokio::io::empty(), || 0).await;
        guest.join().unwrap().unwrap();
    }
}
