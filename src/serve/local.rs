//! Serves the control socket: reads requests, has the node carry them out, answers.

use std::sync::Arc;
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use super::node::{Node, NodeError};
use crate::control::Reply;
use crate::transfer::PullError;
use crate::wire::frame::{self, CONTROL_PAYLOAD_MAX, FrameType};
use crate::wire::io::{WireError, read_frame, write_message};

/// Connections that may wait at once; the socket is the owner's alone, so this only bounds mistakes.
const CONNECTIONS_MAX: usize = 256;

/// How long a client may take for its last answer when the daemon ends.
const LAST_ANSWER: Duration = Duration::from_secs(1);

/// Accepts control connections until `cancel`; returns when the last request has been answered. A client that does not
/// read its answer is not waited for then.
pub(super) async fn serve(node: Arc<Node>, listener: UnixListener, cancel: CancellationToken) {
    let connections = TaskTracker::new();
    loop {
        let stream = tokio::select! {
            () = cancel.cancelled() => break,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    warn!("cannot accept a control connection: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
        };
        if connections.len() >= CONNECTIONS_MAX {
            warn!("more than {CONNECTIONS_MAX} control connections: one is closed");
            continue;
        }
        let (node, cancel) = (Arc::clone(&node), cancel.clone());
        connections.spawn(async move {
            if let Err(error) = converse(&node, stream, &cancel).await {
                debug!("a control connection ended: {error}");
            }
        });
    }
    connections.close();
    connections.wait().await;
}

/// One connection: a request, its answer, and so on.
async fn converse(node: &Node, mut stream: UnixStream, cancel: &CancellationToken) -> Result<(), WireError> {
    loop {
        let frame = tokio::select! {
            () = cancel.cancelled() => return Ok(()),
            frame = read_frame(&mut stream, CONTROL_PAYLOAD_MAX) => frame?,
        };
        let Some((frame_type, payload)) = frame else { return Ok(()) };
        let reply = if frame_type == FrameType::LOCAL_REQUEST {
            match frame::decode(&payload) {
                Ok(request) => node.handle(request).await.unwrap_or_else(|error| refusal(&error)),
                Err(error) => Reply::Failed(format!(
                    "the request is not understood ({error}): are command and daemon of one version?"
                )),
            }
        } else {
            Reply::Failed(format!("frames of type {:#04x} are not for this socket", frame_type.0))
        };
        let late = async {
            cancel.cancelled().await;
            tokio::time::sleep(LAST_ANSWER).await;
        };
        tokio::select! {
            written = write_message(&mut stream, FrameType::LOCAL_REPLY, &reply) => written?,
            () = late => return Ok(()),
        }
    }
}

fn refusal(error: &NodeError) -> Reply {
    match error {
        NodeError::Pull(PullError::NoSource { .. }) => Reply::Away(error.to_string()),
        _ => Reply::Failed(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::Request;
    use crate::store::Store;

    #[tokio::test]
    async fn a_client_that_does_not_read_its_answers_does_not_hold_up_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let node = Arc::new(Node::open(Store::open(dir.path()).unwrap()).unwrap());
        let path = dir.path().join("control.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let cancel = CancellationToken::new();
        let serving = tokio::spawn(serve(node, listener, cancel.clone()));
        let mut client = UnixStream::connect(&path).await.unwrap();
        // Both directions are full when the daemon takes no more requests.
        let ask = async {
            for _ in 0..1_000_000 {
                write_message(&mut client, FrameType::LOCAL_REQUEST, &Request::Status).await.unwrap();
            }
        };
        tokio::time::timeout(Duration::from_secs(2), ask).await.unwrap_err();
        cancel.cancel();
        tokio::time::timeout(Duration::from_secs(10), serving).await.expect("it ends").unwrap();
        drop(client);
    }
}
