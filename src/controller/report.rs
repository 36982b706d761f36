//! Where guests and containers say that they are up (thesis, section 4.1): a TCP connection, the instance's name, a
//! newline. `ok` comes back, or `unknown` when no instance of that name waits to be up.
//!
//! Guests are strangers: whoever speaks here can do nothing but end the wait for an instance that boots.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tracing::{debug, warn};

use super::{Shared, database, now_ms};
use crate::name::HostName;

/// Guests that may speak at once; more wait to be accepted.
const AT_ONCE: usize = 512;
/// How long a guest may take to say its name.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The longest name, with its end.
const LINE_BYTES_MAX: u64 = 80;

/// Takes reports until the controller ends.
pub(super) async fn serve(shared: Arc<Shared>, listener: TcpListener) {
    let places = Arc::new(Semaphore::new(AT_ONCE));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let stream = tokio::select! {
            () = shared.cancel.cancelled() => return,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    warn!("cannot accept a guest's report: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
        };
        let owner = Arc::clone(&shared);
        shared.tasks.spawn(async move {
            let shared = owner;
            if let Err(error) = tokio::time::timeout(TIMEOUT, take(&shared, stream)).await {
                debug!("a guest did not say its name in time: {error}");
            }
            drop(place);
        });
    }
}

async fn take(shared: &Shared, mut stream: TcpStream) {
    let Some(name) = read_name(&mut stream).await else {
        let _ = stream.write_all(b"unknown\n").await;
        return;
    };
    let asked = name.clone();
    let answer = match shared.database.run(move |tx| database::reported(tx, &asked, now_ms())).await {
        Ok(true) => "ok\n",
        Ok(false) => "unknown\n",
        Err(error) => {
            warn!("the report of '{name}' is lost: {error}");
            "try again\n"
        }
    };
    // The guest may have gone: its report counts all the same.
    let _ = stream.write_all(answer.as_bytes()).await;
}

/// The name that a guest says; it ends with the line, or with the connection.
async fn read_name(stream: &mut TcpStream) -> Option<HostName> {
    let mut line = Vec::new();
    let mut limited = stream.take(LINE_BYTES_MAX);
    while !line.contains(&b'\n') {
        match limited.read_buf(&mut line).await {
            Ok(0) => break,
            Ok(_) => {}
            Err(_) => return None,
        }
    }
    let text = std::str::from_utf8(&line).ok()?;
    text.lines().next()?.trim().parse().ok()
}
