//! Serves the control socket: reads requests, has the node carry them out, answers.

use std::sync::Arc;

use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use super::node::Node;
use crate::control::Reply;
use crate::wire::frame::{self, CONTROL_PAYLOAD_MAX, FrameType};
use crate::wire::io::{WireError, read_frame, write_message};

/// Connections that may wait at once; the socket is the owner's alone, so this only bounds mistakes.
const CONNECTIONS_MAX: usize = 256;

/// Accepts control connections until `cancel`; returns when the last request has been answered.
pub(super) async fn serve(node: Arc<Node>, listener: UnixListener, cancel: CancellationToken) {
    let connections = TaskTracker::new();
    loop {
        let stream = tokio::select! {
            () = cancel.cancelled() => break,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    warn!("cannot accept a control connection: {error}");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
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
                Ok(request) => {
                    node.handle(request).await.unwrap_or_else(|error| Reply::Failed(error.to_string()))
                }
                Err(error) => Reply::Failed(format!(
                    "the request is not understood ({error}): are command and daemon of one version?"
                )),
            }
        } else {
            Reply::Failed(format!("frames of type {:#04x} are not for this socket", frame_type.0))
        };
        write_message(&mut stream, FrameType::LOCAL_REPLY, &reply).await?;
    }
}
