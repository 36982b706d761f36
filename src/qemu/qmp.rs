//! The little that is asked of a running QEMU, over its QMP socket (QEMU's documentation, "QMP specification").

use std::io;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use super::ShutDown;

/// A QEMU that hangs answers nothing.
const DEADLINE: Duration = Duration::from_secs(5);
/// Longest line that is read; what is asked here is answered in far less.
const LINE_MAX: u64 = 1 << 20;

/// Presses the power button of the guest whose QEMU listens on `socket`.
///
/// # Errors
/// When nobody listens there, or does not answer within 5 s.
pub async fn shut_down(socket: &Path) -> io::Result<ShutDown> {
    let conversation = async {
        let (reader, mut writer) = UnixStream::connect(socket).await?.into_split();
        let mut reader = BufReader::new(reader);
        line(&mut reader).await?; // the greeting
        ask(&mut reader, &mut writer, "qmp_capabilities").await?;
        let status = ask(&mut reader, &mut writer, "query-status").await?;
        match status["status"].as_str() {
            Some("running") => {}
            // It can never go on.
            Some("shutdown" | "guest-panicked" | "internal-error") => return Ok(ShutDown::Off),
            _ => return Ok(ShutDown::Paused),
        }
        ask(&mut reader, &mut writer, "system_powerdown").await?;
        Ok(ShutDown::Asked)
    };
    let late = || Err(io::Error::new(io::ErrorKind::TimedOut, "QEMU does not answer"));
    tokio::time::timeout(DEADLINE, conversation).await.unwrap_or_else(|_| late())
}

/// Gives a command, and what it returns; events that come meanwhile are passed over.
async fn ask(
    reader: &mut BufReader<OwnedReadHalf>,
    writer: &mut OwnedWriteHalf,
    command: &str,
) -> io::Result<Value> {
    writer.write_all(format!("{}\n", json!({ "execute": command })).as_bytes()).await?;
    loop {
        let mut answer = line(reader).await?;
        if let Some(error) = answer.get("error") {
            return Err(io::Error::other(format!("QEMU refuses {command}: {error}")));
        }
        if let Some(value) = answer.get_mut("return") {
            return Ok(value.take());
        }
    }
}

async fn line(reader: &mut BufReader<OwnedReadHalf>) -> io::Result<Value> {
    let mut text = String::new();
    if reader.take(LINE_MAX).read_line(&mut text).await? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(serde_json::from_str(&text)?)
}
