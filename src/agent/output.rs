//! What an instance writes – a VM on its serial line, a container into its log – followed for the words that say that it
//! is up. Only the end of it is kept.

use std::path::Path;
use std::time::Duration;

use futures_util::StreamExt;
use regex::bytes::Regex;
use tokio::io::AsyncReadExt;

use crate::hypervisor::Hypervisor;
use crate::name::HostName;

/// How often a serial log is looked at.
const SERIAL: Duration = Duration::from_millis(50);
/// How long to wait before a log that broke off is followed again.
const LOG: Duration = Duration::from_millis(500);
/// The most output that a match may span, in bytes.
const WINDOW: usize = 8192;
/// Bytes that are taken in at once.
const PIECE: usize = 4096;
/// The most of a line that people are told, in characters.
const LINE_MAX: usize = 200;

/// The end of what an instance has written.
#[derive(Debug, Default)]
pub(super) struct Output {
    window: Vec<u8>,
}

impl Output {
    /// Returns when the instance has written what matches `pattern`: into the log that its hypervisor keeps, or else
    /// into the file `serial`. Dropping the future is safe.
    pub(super) async fn follow(
        &mut self,
        hypervisor: &dyn Hypervisor,
        name: &HostName,
        serial: &Path,
        pattern: &Regex,
    ) {
        loop {
            self.window.clear();
            match hypervisor.log(name).await {
                Ok(None) => return self.follow_file(serial, pattern).await,
                Ok(Some(mut log)) => {
                    while let Some(Ok(bytes)) = log.next().await {
                        if self.take(&bytes, pattern) {
                            return;
                        }
                    }
                }
                Err(error) => tracing::debug!("{name}: its log cannot be read: {error}"),
            }
            // It has ended, or its engine restarts: then the log is read from its beginning.
            tokio::time::sleep(LOG).await;
        }
    }

    /// The file may still have to be made, and grows.
    async fn follow_file(&mut self, path: &Path, pattern: &Regex) {
        let mut file = loop {
            match tokio::fs::File::open(path).await {
                Ok(file) => break file,
                Err(_) => tokio::time::sleep(SERIAL).await,
            }
        };
        let mut piece = [0; PIECE];
        loop {
            match file.read(&mut piece).await {
                Ok(0) | Err(_) => tokio::time::sleep(SERIAL).await,
                Ok(length) if self.take(&piece[..length], pattern) => return,
                Ok(_) => {}
            }
        }
    }

    /// Takes bytes in; whether the pattern matches now.
    fn take(&mut self, bytes: &[u8], pattern: &Regex) -> bool {
        bytes.chunks(PIECE).any(|piece| {
            self.window.drain(..self.window.len().saturating_sub(WINDOW));
            self.window.extend_from_slice(piece);
            pattern.is_match(&self.window)
        })
    }

    /// For people: the last line that it wrote, if any.
    pub(super) fn last_line(&self) -> String {
        let text = String::from_utf8_lossy(&self.window);
        let lines = text.lines().map(|line| line.trim_matches(|c: char| c.is_whitespace() || c.is_control()));
        match lines.rev().find(|line| !line.is_empty()) {
            Some(line) => {
                let line: String = line.chars().filter(|c| !c.is_control()).take(LINE_MAX).collect();
                format!("the last that it wrote is: {line}")
            }
            None => "it has written nothing".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_match_may_span_pieces_and_memory_is_bounded() {
        let pattern = Regex::new("service is ready").unwrap();
        let mut output = Output::default();
        assert_eq!(output.last_line(), "it has written nothing");
        assert!(!output.take(&vec![b'x'; 1 << 20], &pattern));
        assert!(!output.take(b"\x1b[1mthe service is", &pattern));
        assert!(output.window.len() <= WINDOW + PIECE);
        assert!(output.take(b" ready\r\n\r\n", &pattern));
        let mut output = Output::default();
        assert!(!output.take(b"first\nbad \x1b[1mconfiguration\r\n", &pattern));
        assert_eq!(output.last_line(), "the last that it wrote is: bad [1mconfiguration");
        output.take(&[b'y'; 5000], &pattern);
        assert!(output.last_line().len() < LINE_MAX + 50);
    }
}
