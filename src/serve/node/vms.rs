//! The sockets of a node's VMs.

use std::fs;
use std::future::ready;
use std::sync::Arc;

use futures_util::StreamExt;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::turns::Turn;
use super::{Node, NodeError, at, lock};
use crate::control::Owner;
use crate::control::VmInfo;
use crate::name::HostName;
use crate::serve::vm_socket::VmSocket;

impl Node {
    /// Opens the sockets of the VMs that had one when the last daemon ended, however it ended; of no further ones after
    /// `until`. One that cannot be opened stands in the way of no other.
    pub async fn reopen_vms(&self, until: &CancellationToken) -> Result<(), NodeError> {
        let dir = self.store.dir().join("vms");
        let mut names = Vec::new();
        for entry in fs::read_dir(&dir).map_err(at(&dir))? {
            let name = entry.map_err(at(&dir))?.file_name();
            names.extend(name.to_str().and_then(|name| name.parse::<HostName>().ok()));
        }
        let names = futures_util::stream::iter(names).take_while(|_| ready(!until.is_cancelled()));
        let reopen = async |name| {
            if let Some(Err(error)) = until.run_until_cancelled(self.reopen_vm(&name)).await {
                warn!("the socket of VM '{name}' is not open again: {error}");
            }
        };
        // All at once: most of them may wait for one image, and the others are not to wait for those.
        names.for_each_concurrent(None, reopen).await;
        Ok(())
    }

    async fn reopen_vm(&self, name: &HostName) -> Result<(), NodeError> {
        let dir = self.store.vm_dir(name);
        loop {
            // It may have been closed while its image was waited for.
            let turn = self.turns.turn(name).await;
            let Some(owner) = VmSocket::recorded(&dir).map_err(at(&dir))? else { return Ok(()) };
            match self.open_in(turn, owner).await {
                // Its guest waits too.
                Err(NodeError::Resuming(_)) => {}
                opened => return opened.map(drop),
            }
        }
    }

    pub(super) async fn open_vm(&self, name: &HostName, owner: Option<Owner>) -> Result<VmInfo, NodeError> {
        self.open_in(self.turns.turn(name).await, owner).await
    }

    async fn open_in(&self, turn: Turn, owner: Option<Owner>) -> Result<VmInfo, NodeError> {
        let name = turn.name();
        if let Some(socket) = lock(&self.open).vms.get(name) {
            return Ok(socket.info(name));
        }
        let export = self.overlay_export(&turn).await?;
        let (dir, limits, open) = (self.store.vm_dir(name), self.nbd_limits.clone(), Arc::clone(&self.open));
        self.apart(move || {
            let socket = VmSocket::open(&dir, export, owner, limits).map_err(at(&dir))?;
            let info = socket.info(turn.name());
            lock(&open).vms.insert(turn.name().clone(), socket);
            Ok(info)
        })
        .await
    }

    pub(super) async fn close_vm(&self, name: &HostName) -> Result<(), NodeError> {
        let (turn, dir) = (self.turns.turn(name).await, self.store.vm_dir(name));
        let (open, its_turn) = (Arc::clone(&self.open), turn.clone());
        let closed = self.apart(move || {
            let turn = its_turn;
            let is_open = lock(&open).vms.contains_key(turn.name());
            // One whose socket could not be opened again has a record all the same, perhaps a damaged one.
            if !is_open && matches!(VmSocket::recorded(&dir), Ok(None)) {
                return Err(NodeError::NoVm(turn.name().clone()));
            }
            VmSocket::forget(&dir).map_err(at(&dir))?;
            Ok(lock(&open).vms.remove(turn.name()))
        });
        if let Some(socket) = closed.await? {
            socket.close().await;
        }
        drop(turn); // the next socket has the same path
        Ok(())
    }
}
