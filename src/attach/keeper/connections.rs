//! Connections that a keeper opens for the kernel, and what the kernel is told of their export.

use std::io;
use std::os::unix::net::UnixStream;

use bootcache_nbd::consts::flag;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::{BLOCK_SIZE, Keeper, LOOK};
use crate::attach::netlink::Setup;
use crate::attach::opening::{self, Opened};
use crate::attach::{AttachError, Entry, Options};

impl Keeper<'_> {
    pub(super) fn setup(&self, opened: &Opened) -> Setup {
        Setup {
            index: self.options.device.map(|device| device.0),
            size: opened.description.size / u64::from(BLOCK_SIZE) * u64::from(BLOCK_SIZE),
            block_size: BLOCK_SIZE,
            flags: opened.description.flags,
            dead_connection_timeout: self.options.patience,
            backend: Entry::backend(&self.options.name),
        }
    }

    /// The first connection, and as many more as are wanted and the server takes.
    pub(super) async fn open_all(&self) -> Result<(Setup, Vec<UnixStream>), AttachError> {
        let first = self.open().await?;
        let setup = self.setup(&first);
        let mut sockets = vec![first.socket];
        if setup.flags & flag::CAN_MULTI_CONN != 0 {
            while sockets.len() < self.options.connections {
                sockets.push(self.open().await?.socket);
            }
        }
        Ok((setup, sockets))
    }

    async fn open(&self) -> Result<Opened, AttachError> {
        let Options { socket, name, .. } = self.options;
        opening::open(socket, name).await.map_err(|error| AttachError::Server {
            name: name.clone(),
            socket: socket.display().to_string(),
            error,
        })
    }

    /// A connection, as soon as there is a server; none when the device is no longer live, or `stop` comes, before that.
    pub(super) async fn open_while(
        &self,
        is_live: impl Fn() -> bool,
        stop: &CancellationToken,
    ) -> Result<Option<Opened>, AttachError> {
        let gone = async {
            while is_live() {
                sleep(LOOK).await;
            }
        };
        tokio::select! {
            opened = self.open_patiently() => opened.map(Some),
            () = gone => Ok(None),
            () = stop.cancelled() => Ok(None),
        }
    }

    /// Opens a connection, however long it takes until there is a server. A refusal may pass too: a server that has just
    /// started may not know all its exports.
    async fn open_patiently(&self) -> Result<Opened, AttachError> {
        let patience = tokio::time::Instant::now() + self.options.patience;
        loop {
            match self.open().await {
                Err(_) if tokio::time::Instant::now() < patience => sleep(LOOK).await,
                result => return result,
            }
        }
    }

    /// A device keeps its size: a server with another one is not what it was attached to.
    pub(super) fn same_size(&self, entry: &Entry, opened: &Opened) -> Result<(), AttachError> {
        let size = self.setup(opened).size;
        if size == entry.size {
            return Ok(());
        }
        warn!(device = %entry.device, size, "the export has another size now; not reconnected");
        Err(AttachError::Kernel(io::Error::other("the export has changed its size").into()))
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;
    use crate::attach::Table;

    #[tokio::test(start_paused = true)]
    async fn waiting_for_a_server_ends_when_the_device_has_gone_and_when_the_keeper_is_to_end() {
        let folder = tempfile::tempdir().unwrap();
        let table = Table::open(folder.path()).unwrap();
        let socket = folder.path().join("nbd.sock");
        drop(std::os::unix::net::UnixListener::bind(&socket).unwrap()); // refuses from now on
        let options = Options {
            name: "vm".into(),
            socket,
            device: None,
            connections: 1,
            patience: Duration::from_secs(3600),
            way: None,
            again: false,
        };
        let lock = table.lock("vm").unwrap().unwrap();
        let keeper = Keeper { table: &table, options: &options, _lock: lock };
        let stop = CancellationToken::new();

        let looks = Cell::new(0);
        let is_live = || looks.replace(looks.get() + 1) < 3;
        let opened = timeout(Duration::from_secs(5), keeper.open_while(is_live, &stop)).await;
        assert!(opened.expect("it sees that the device has gone").unwrap().is_none());

        let stopping = async {
            sleep(LOOK).await;
            stop.cancel();
            std::future::pending().await
        };
        let opened = tokio::select! {
            opened = timeout(Duration::from_secs(5), keeper.open_while(|| true, &stop)) => opened,
            () = stopping => unreachable!("it is pending"),
        };
        assert!(opened.expect("it heeds the order").unwrap().is_none());
    }
}
