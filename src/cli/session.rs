//! How a subcommand reaches the store: through the daemon that runs on it, or directly when none does.

use std::path::Path;
use std::time::{Duration, Instant};

use bootcache::control::{Client, ControlError, Reply, Request};
use bootcache::serve::{CONTROL_SOCKET, Node, NodeError};
use bootcache::store::{Store, StoreError};
use bootcache::transfer;

/// How long another command is waited for that has the store, or a daemon that is about to listen.
const PATIENCE: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(20);

/// Somebody who carries out requests on one store.
pub(crate) enum Session {
    /// The daemon.
    Daemon(Client),
    /// Nobody else: this process holds the store's lock until it ends.
    Direct(Box<Node>),
}

impl Session {
    /// Talks to the daemon of the store in `dir`, or opens the store here if there is none.
    pub(crate) async fn open(dir: &Path) -> anyhow::Result<Self> {
        Self::open_as(dir, transfer::Options::default()).await
    }

    /// As [`Session::open`]; if there is no daemon, images are fetched as `options` say.
    pub(crate) async fn open_as(dir: &Path, options: transfer::Options) -> anyhow::Result<Self> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match Client::connect(&dir.join(CONTROL_SOCKET)).await {
                Ok(client) => return Ok(Self::Daemon(client)),
                Err(ControlError::NoDaemon) => {}
                Err(error) => return Err(error.into()),
            }
            match Node::open_as(Store::open(dir)?, options.clone()) {
                Err(NodeError::Store(StoreError::Locked { .. })) if Instant::now() < deadline => {
                    tokio::time::sleep(POLL).await;
                }
                opened => return Ok(Self::Direct(Box::new(opened?))),
            }
        }
    }

    /// Carries out one request.
    pub(crate) async fn call(&mut self, request: Request) -> anyhow::Result<Reply> {
        match self {
            Self::Daemon(client) => Ok(client.call(&request).await?),
            Self::Direct(node) => Ok(node.handle(request).await?),
        }
    }

    /// Ends the session; what a direct one has open is flushed first.
    pub(crate) async fn close(self) -> anyhow::Result<()> {
        if let Self::Direct(node) = self {
            node.close().await?;
        }
        Ok(())
    }
}
