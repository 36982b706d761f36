//! Where guests and containers say that they are up (thesis, section 4.1): a TCP connection, the instance's name, a
//! newline. `ok` comes back, or `unknown` when no instance of that name waits to be up.
//!
//! Guests are strangers: whoever speaks here can do nothing but end the wait for an instance that boots, and whoever only
//! connects keeps no other's report out: an address has few places until it has said a name, and the oldest silent
//! connection leaves when there are too many.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tracing::{debug, warn};

use super::{Shared, database, now_ms};
use crate::name::HostName;
use crate::wire::hall::{Hall, Place};

/// Guests that may speak at once; with more, the oldest that has said nothing leaves.
const AT_ONCE: usize = 512;
/// Connections of one address that have not said a name yet; more are closed at once. A quarter of all: the guests of a node
/// may come from its address, all at once.
pub(super) const SILENT_OF_ONE: usize = 128;
/// How long a guest may take to say its name.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The longest name, with its end.
const LINE_BYTES_MAX: u64 = 80;

/// Takes reports until the controller ends.
pub(super) async fn serve(shared: Arc<Shared>, listener: TcpListener) {
    let hall = Hall::new(AT_ONCE, SILENT_OF_ONE);
    loop {
        let (stream, from) = tokio::select! {
            () = shared.cancel.cancelled() => return,
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    warn!("cannot accept a guest's report: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
        };
        let Some(place) = hall.enter(from.ip()).await else {
            debug!("{from} has {SILENT_OF_ONE} connections that say nothing: another is closed");
            continue;
        };
        let owner = Arc::clone(&shared);
        shared.tasks.spawn(async move {
            let shared = owner;
            tokio::select! {
                taken = tokio::time::timeout(TIMEOUT, take(&shared, stream, &place)) => if taken.is_err() {
                    debug!("a guest did not say its name in time");
                },
                () = place.evicted() => debug!("{from} says nothing, and newer reports need the place"),
            }
        });
    }
}

async fn take(shared: &Shared, mut stream: TcpStream, place: &Place) {
    let Some(name) = read_name(&mut stream).await else {
        let _ = stream.write_all(b"unknown\n").await;
        return;
    };
    place.speaks();
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
