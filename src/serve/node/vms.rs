//! The sockets of a node's VMs.

use std::fs;

use tracing::warn;

use super::{Node, NodeError, at};
use crate::control::Owner;
use crate::control::VmInfo;
use crate::name::HostName;
use crate::serve::vm_socket::VmSocket;

impl Node {
    /// Opens the sockets of the VMs that had one when the last daemon ended, however it ended. One that cannot be opened
    /// stands in the way of no other.
    pub async fn reopen_vms(&self) -> Result<(), NodeError> {
        let dir = self.store.dir().join("vms");
        for entry in fs::read_dir(&dir).map_err(at(&dir))? {
            let entry = entry.map_err(at(&dir))?;
            let Some(name) = entry.file_name().to_str().and_then(|name| name.parse::<HostName>().ok()) else {
                continue;
            };
            let opened = match VmSocket::recorded(&entry.path()) {
                Ok(None) => continue,
                Ok(Some(owner)) => self.open_vm(&name, owner).await.map(drop),
                Err(error) => Err(at(&entry.path())(error)),
            };
            if let Err(error) = opened {
                warn!("the socket of VM '{name}' is not open again: {error}");
            }
        }
        Ok(())
    }

    pub(super) async fn open_vm(&self, name: &HostName, owner: Option<Owner>) -> Result<VmInfo, NodeError> {
        let mut inner = self.inner.lock().await;
        if let Some(socket) = inner.vms.get(name) {
            return Ok(socket.info(name));
        }
        let export = self.overlay_export(&mut inner, name)?;
        let dir = self.store.vm_dir(name);
        let socket = VmSocket::open(&dir, export, owner, self.nbd_limits.clone()).map_err(at(&dir))?;
        let info = socket.info(name);
        inner.vms.insert(name.clone(), socket);
        Ok(info)
    }

    pub(super) async fn close_vm(&self, name: &HostName) -> Result<(), NodeError> {
        let dir = self.store.vm_dir(name);
        let mut inner = self.inner.lock().await;
        // One whose socket could not be opened again has a record all the same, perhaps a damaged one.
        if !inner.vms.contains_key(name) && matches!(VmSocket::recorded(&dir), Ok(None)) {
            return Err(NodeError::NoVm(name.clone()));
        }
        VmSocket::forget(&dir).map_err(at(&dir))?;
        let socket = inner.vms.remove(name);
        drop(inner);
        if let Some(socket) = socket {
            socket.close().await;
        }
        Ok(())
    }
}
