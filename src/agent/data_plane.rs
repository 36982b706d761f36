//! The node's data plane: a running `bootcache serve`, over its control socket.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bootcache_nbd::BoxFuture;
use bootcache_nbd::client::{Address, Client as NbdClient, Policy};
use tokio::sync::OnceCell;
use tracing::info;

use super::image_bytes::ImageBytes;
use super::services::{Bytes, DataPlane, OpenDisk, ServiceError};
use crate::attach;
use crate::control::{Client, ControlError, ImageStatus, Owner, Reply, Request, VmInfo};
use crate::hypervisor::DiskBy;
use crate::hypervisor::domain::DomainDisk;
use crate::hypervisor::libvirt::Libvirt;
use crate::name::{HostName, ImageName};
use crate::serve::{CONTROL_SOCKET, NBD_SOCKET};
use crate::store::Store;
use crate::transfer::Pin;
use crate::vm::{open_log, serial_path};
use crate::wire::cluster::{ImageHere, Needed};

/// How long a read of an image waits for a daemon that is started again.
const RECONNECT: Duration = Duration::from_secs(30);
/// How long the last writes of a device may take, and its end.
const DETACH: Duration = Duration::from_secs(120);

/// The data plane of a store.
#[derive(Debug, Clone)]
pub struct Serve {
    store: Store,
    /// Where its peers are served.
    peer: Option<SocketAddr>,
    /// Who starts QEMU, and knows as whom.
    libvirt: Option<Libvirt>,
    /// Who QEMU runs as, when that is somebody else; asked when it is needed first.
    owner: Arc<OnceCell<Option<Owner>>>,
    /// Bootcache itself, which looks after devices.
    program: Option<PathBuf>,
    /// Why what comes cannot be kept, as the daemon last said.
    troubles: Arc<Mutex<BTreeSet<String>>>,
}

impl Serve {
    /// The daemon that runs on `store` and serves peers on `peer`; VMs' sockets are for the user as whom `libvirt` runs
    /// QEMU.
    pub fn new(store: Store, peer: Option<SocketAddr>, libvirt: Option<Libvirt>) -> Self {
        Self { store, peer, libvirt, owner: Arc::default(), program: None, troubles: Arc::default() }
    }

    /// Has disks be devices of the host where plans want that. `program` is bootcache: a process of it looks after each,
    /// and outlives this one.
    #[must_use]
    pub fn with_devices(self, program: PathBuf) -> Self {
        Self { program: Some(program), ..self }
    }

    /// Who QEMU runs as, when that is somebody else.
    async fn owner(&self) -> Result<Option<Owner>, ServiceError> {
        let Some(libvirt) = &self.libvirt else { return Ok(None) };
        let us = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let ask = async {
            Ok::<_, ServiceError>(libvirt.qemu_owner().await?.filter(|user| (user.uid, user.gid) != us))
        };
        Ok(*self.owner.get_or_try_init(|| ask).await?)
    }

    async fn call(&self, request: &Request) -> Result<Reply, ControlError> {
        Client::connect(&self.store.dir().join(CONTROL_SOCKET)).await?.call(request).await
    }

    async fn open(
        &self,
        image: &ImageName,
        vm: &HostName,
        size: Option<u64>,
        by: DiskBy,
    ) -> Result<OpenDisk, ServiceError> {
        let owner = self.owner().await?;
        // It is there already when a start was interrupted: the VM's disk stays what it was.
        let there = self.call(&Request::OverlayShow { name: vm.clone() }).await;
        if let Err(ControlError::Refused(why)) = there {
            // A damaged one: another of its name cannot be made.
            if self.store.overlay_dir(vm).exists() {
                return Err(ServiceError::Refused(why));
            }
            let request = Request::OverlayCreate { image: image.clone(), name: vm.clone(), size };
            self.call(&request).await?;
        }
        let info = self.open_socket(vm, owner).await?;
        let serial = self.serial(vm);
        open_log(&serial, owner)
            .map_err(|error| ServiceError::Refused(format!("{}: {error}", serial.display())))?;
        let disk = match by {
            DiskBy::Socket => DomainDisk::Nbd { socket: info.socket, export: info.export },
            DiskBy::Kernel => DomainDisk::Block(self.attach(vm, info, false).await?.path()),
        };
        Ok(OpenDisk { disk, serial })
    }

    /// Opens a VM's socket; one that is open stays as it is.
    async fn open_socket(&self, vm: &HostName, owner: Option<Owner>) -> Result<VmInfo, ServiceError> {
        match self.call(&Request::VmOpen { name: vm.clone(), owner }).await? {
            Reply::Vm(info) => Ok(info),
            _ => Err(ControlError::Unexpected.into()),
        }
    }

    /// Has the disk behind a VM's socket be a device of the host, and be looked after; with `again`, only if it is one.
    async fn attach(&self, vm: &HostName, info: VmInfo, again: bool) -> Result<attach::Device, ServiceError> {
        let Some(program) = &self.program else {
            let reason = "this node's agent makes no devices: leave `disk_by` out of the plan";
            return Err(ServiceError::Refused(reason.to_owned()));
        };
        let options = attach::Options { again, ..attach::Options::of_vm(vm, info.socket) };
        Ok(attach::ensure(program, self.store.dir(), &options).await?.device)
    }

    async fn keep(&self, vm: &HostName) -> Result<(), ServiceError> {
        if attach::Table::is_unattended(self.store.dir(), vm.as_str())? {
            let info = self.open_socket(vm, self.owner().await?).await?;
            let device = self.attach(vm, info, true).await?;
            info!("{vm}: {device} is looked after again");
        }
        Ok(())
    }

    async fn detach(&self, vm: &HostName) -> Result<(), ServiceError> {
        if attach::Table::live(self.store.dir(), vm.as_str())?.is_some() {
            // Its last writes go to the daemon: without one, they would be waited for here.
            match self.call(&Request::OverlayShow { name: vm.clone() }).await {
                Ok(_) | Err(ControlError::Refused(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let forgotten = attach::forget(self.store.dir(), vm.as_str());
        match tokio::time::timeout(DETACH, forgotten).await {
            Ok(forgotten) => Ok(forgotten?),
            Err(_) => {
                Err(ServiceError::Away(format!("its device was not detached within {} s", DETACH.as_secs())))
            }
        }
    }

    async fn remove(&self, vm: &HostName) -> Result<(), ServiceError> {
        self.detach(vm).await?;
        let dir = self.store.vm_dir(vm);
        let refusable = |result: Result<Reply, ControlError>| match result {
            Ok(_) | Err(ControlError::Refused(_)) => Ok(()),
            Err(error) => Err(ServiceError::from(error)),
        };
        refusable(self.call(&Request::VmClose { name: vm.clone() }).await)?;
        match std::fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(ServiceError::Refused(format!("{}: {error}", dir.display())));
            }
            _ => {}
        }
        match self.call(&Request::OverlayRemove { name: vm.clone() }).await {
            Err(error) if self.store.overlay_dir(vm).exists() => Err(error.into()),
            _ => Ok(()),
        }
    }
}

impl DataPlane for Serve {
    fn images(&self) -> BoxFuture<'_, Result<Vec<ImageHere>, ServiceError>> {
        Box::pin(async {
            match self.call(&Request::Status).await {
                Ok(Reply::Status(status)) => {
                    let trouble = |image: &ImageStatus| image.transfer.as_ref()?.trouble.clone();
                    let troubles: BTreeSet<String> = status.images.iter().filter_map(trouble).collect();
                    *self.troubles.lock().unwrap_or_else(PoisonError::into_inner) = troubles;
                    Ok(status.images.into_iter().map(here).collect())
                }
                Ok(_) => Err(ControlError::Unexpected.into()),
                Err(error) => Err(error.into()),
            }
        })
    }

    fn troubles(&self) -> Vec<String> {
        self.troubles.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    fn peer(&self) -> Option<SocketAddr> {
        self.peer
    }

    fn fetch<'a>(&'a self, image: &'a Needed, boot_only: bool) -> BoxFuture<'a, Result<(), ServiceError>> {
        Box::pin(async move {
            let request = Request::Pull {
                name: image.name.clone(),
                root: Some(image.root),
                boot: Pin::of(image.boot),
                sources: image.sources.clone(),
                fill: !boot_only,
                fill_rate: 0, // as somebody may have said with `pull --rate`
            };
            Ok(self.call(&request).await.map(drop)?)
        })
    }

    fn open_disk<'a>(
        &'a self,
        image: &'a ImageName,
        vm: &'a HostName,
        size: Option<u64>,
        by: DiskBy,
    ) -> BoxFuture<'a, Result<OpenDisk, ServiceError>> {
        Box::pin(self.open(image, vm, size, by))
    }

    fn keep_device<'a>(&'a self, vm: &'a HostName) -> BoxFuture<'a, Result<(), ServiceError>> {
        Box::pin(self.keep(vm))
    }

    fn detach<'a>(&'a self, vm: &'a HostName) -> BoxFuture<'a, Result<(), ServiceError>> {
        Box::pin(self.detach(vm))
    }

    fn serial(&self, vm: &HostName) -> PathBuf {
        serial_path(&self.store.vm_dir(vm))
    }

    fn remove_disk<'a>(&'a self, vm: &'a HostName) -> BoxFuture<'a, Result<(), ServiceError>> {
        Box::pin(self.remove(vm))
    }

    fn read<'a>(&'a self, image: &'a Needed) -> BoxFuture<'a, Result<Bytes, ServiceError>> {
        Box::pin(async move {
            let address = Address::Unix(self.store.dir().join(NBD_SOCKET));
            let policy = Policy { reconnect: RECONNECT, ..Policy::default() };
            let client = NbdClient::connect(address, image.name.as_str(), policy).await.map_err(|error| {
                ServiceError::Away(format!("image {} cannot be read: {error}", image.name))
            })?;
            Ok(Box::new(ImageBytes::new(client, image.size)) as Bytes)
        })
    }
}

fn here(image: ImageStatus) -> ImageHere {
    let transfer = image.transfer.as_ref();
    ImageHere {
        name: image.name,
        root: image.root,
        kind: image.kind,
        size: image.size,
        boot_bytes: image.boot_bytes,
        boot: image.boot,
        present: transfer.map_or(image.present, |transfer| transfer.present),
        allocated: image.allocated,
        complete: image.complete,
        boot_complete: image.complete || transfer.is_some_and(|transfer| transfer.boot_complete),
        // What came before its daemon was started again is not known; none at all came where it was published.
        received: transfer.map_or(0, |transfer| transfer.bytes.iter().sum()).max(u64::from(image.pulled)),
    }
}

#[cfg(test)]
mod tests {
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::digest::Digest;
    use crate::serve;

    /// A daemon on `store`, and what ends it.
    async fn serving(store: &Store) -> (tokio::task::JoinHandle<()>, CancellationToken) {
        let node = serve::Node::open(store.clone()).unwrap();
        let (cancel, (ready, is_ready)) = (CancellationToken::new(), tokio::sync::oneshot::channel());
        let ready = |_: &str| ready.send(()).unwrap();
        let running = serve::run(node, serve::Options::default(), cancel.clone(), ready);
        let serving = tokio::spawn(async { running.await.unwrap() });
        is_ready.await.unwrap();
        (serving, cancel)
    }

    #[tokio::test]
    async fn a_damaged_overlay_is_told_as_that() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let (serving, cancel) = serving(&store).await;
        let vm: HostName = "vm".parse().unwrap();
        std::fs::create_dir_all(store.overlay_dir(&vm)).unwrap();
        std::fs::write(store.overlay_dir(&vm).join("meta"), "{").unwrap();
        let plane = Serve::new(store, None, None);
        let why = plane.call(&Request::OverlayShow { name: vm.clone() }).await.unwrap_err().to_string();
        let told = plane.open_disk(&"debian".parse().unwrap(), &vm, None, DiskBy::Socket).await.unwrap_err();
        assert!(matches!(&told, ServiceError::Refused(told) if *told == why), "{told}, and not {why}");
        cancel.cancel();
        serving.await.unwrap();
    }

    #[test]
    fn an_image_that_was_pulled_was_received_though_nobody_knows_how_much() {
        let status = |pulled| ImageStatus {
            name: "debian".parse().unwrap(),
            root: Digest::of(b"debian"),
            kind: crate::image::manifest::ImageKind::Vm,
            boot_bytes: 0,
            boot: None,
            complete: true,
            size: 4096,
            open: false,
            present: 4096,
            allocated: 4096,
            pulled,
            transfer: None,
        };
        assert_eq!([false, true].map(|pulled| here(status(pulled)).received), [0, 1]);
    }

    #[tokio::test(start_paused = true)]
    async fn an_image_whose_sources_do_not_answer_may_be_asked_for_again() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let (serving, cancel) = serving(&store).await;
        let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let needed = Needed {
            name: "debian".parse().unwrap(),
            root: Digest::of(b"debian"),
            boot: None,
            size: 4096,
            sources: vec![nobody],
        };
        let plane = Serve::new(store, None, None);
        let error = plane.fetch(&needed, false).await.unwrap_err();
        assert!(matches!(error, ServiceError::Away(_)), "{error}");
        // Without a single source nothing would come of it.
        let error = plane.fetch(&Needed { sources: Vec::new(), ..needed }, false).await.unwrap_err();
        assert!(matches!(error, ServiceError::Refused(_)), "{error}");
        cancel.cancel();
        serving.await.unwrap();
    }
}
