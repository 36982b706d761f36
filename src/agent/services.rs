//! What an agent needs of its node beside hypervisors, as traits, so that it can be tested, and embedded, without.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bootcache_nbd::BoxFuture;
use tokio::io::AsyncRead;

use crate::attach::{AttachError, Device};
use crate::control::ControlError;
use crate::hypervisor::domain::DomainDisk;
use crate::hypervisor::{DiskBy, HypervisorError, LibvirtError};
use crate::image::manifest::ImageKind;
use crate::name::{HostName, ImageName};
use crate::network::NetworkSpec;
use crate::wire::cluster::{ImageHere, Needed};

/// A stream of an image's bytes.
pub type Bytes = Box<dyn AsyncRead + Send + Unpin>;

/// A VM's disk, and the file for its serial line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenDisk {
    /// The disk.
    pub disk: DomainDisk,
    /// The file; its hypervisor can write it.
    pub serial: PathBuf,
}

/// What was not done for an instance, and why: one line for a person.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ServiceError {
    /// What does it is away, or went away meanwhile; trying again may help.
    #[error("{0}")]
    Away(String),
    /// It refused; trying again does not help.
    #[error("{0}")]
    Refused(String),
}

impl From<HypervisorError> for ServiceError {
    fn from(error: HypervisorError) -> Self {
        match error {
            HypervisorError::Unreachable(text) | HypervisorError::TimedOut(text) => Self::Away(text),
            HypervisorError::Refused(text) => Self::Refused(text),
        }
    }
}

impl From<LibvirtError> for ServiceError {
    fn from(error: LibvirtError) -> Self {
        HypervisorError::from(error).into()
    }
}

impl From<ControlError> for ServiceError {
    fn from(error: ControlError) -> Self {
        let text = error.to_string();
        match error {
            ControlError::NoDaemon
            | ControlError::Connect { .. }
            | ControlError::Wire { .. }
            | ControlError::TimedOut(_)
            | ControlError::Away(_) => Self::Away(text),
            ControlError::Refused(_) | ControlError::Unexpected => Self::Refused(text),
        }
    }
}

impl From<AttachError> for ServiceError {
    fn from(error: AttachError) -> Self {
        if error.may_pass() { Self::Away(error.to_string()) } else { Self::Refused(error.to_string()) }
    }
}

/// The node's images and disks. Every call has a deadline of its own; those for one VM come one by one.
pub trait DataPlane: Send + Sync + 'static {
    /// What is here.
    fn images(&self) -> BoxFuture<'_, Result<Vec<ImageHere>, ServiceError>>;

    /// Why images that are on their way cannot be kept here, as of the last [`DataPlane::images`].
    fn troubles(&self) -> Vec<String> {
        Vec::new()
    }

    /// Where peers are served; see [`crate::wire::cluster::RegisterImage::peer`].
    fn peer(&self) -> Option<SocketAddr>;

    /// Makes the image readable, now or as it comes. An image that is here, or on its way, is left as it is.
    fn fetch<'a>(&'a self, image: &'a Needed, boot_only: bool) -> BoxFuture<'a, Result<(), ServiceError>>;

    /// Opens the disk of a VM, made from the image if there is none yet: of `size` bytes, or as large as the image. One
    /// that is open `by` the kernel is a device of the host until [`DataPlane::detach`], or until it is removed.
    fn open_disk<'a>(
        &'a self,
        image: &'a ImageName,
        vm: &'a HostName,
        size: Option<u64>,
        by: DiskBy,
    ) -> BoxFuture<'a, Result<OpenDisk, ServiceError>>;

    /// Has the device that is a VM's disk looked after, if nobody does so any more: otherwise it does not outlive its
    /// data plane. Nothing but that changes. Dropped, it may be asked for again.
    fn keep_device<'a>(&'a self, vm: &'a HostName) -> BoxFuture<'a, Result<(), ServiceError>>;

    /// Takes the device that is a VM's disk from the host; the VM has ended. What is not there is no error.
    fn detach<'a>(&'a self, vm: &'a HostName) -> BoxFuture<'a, Result<(), ServiceError>>;

    /// The file for the serial line of a VM whose disk is open.
    fn serial(&self, vm: &HostName) -> PathBuf;

    /// Detaches, closes and removes the disk of a VM that has ended. What is not there is no error.
    fn remove_disk<'a>(&'a self, vm: &'a HostName) -> BoxFuture<'a, Result<(), ServiceError>>;

    /// The bytes of an image that is here or on its way, from the first to the last: what cuts them short is an error.
    fn read<'a>(&'a self, image: &'a Needed) -> BoxFuture<'a, Result<Bytes, ServiceError>>;
}

/// The node's bridges.
pub trait Networks: Send + Sync + 'static {
    /// Makes the network, or leaves it as it is when it is there already.
    fn ensure<'a>(&'a self, network: &'a NetworkSpec) -> BoxFuture<'a, Result<(), ServiceError>>;

    /// Removes the network on the bridge of `network`, if it was made by [`Networks::ensure`].
    fn remove<'a>(&'a self, network: &'a NetworkSpec) -> BoxFuture<'a, Result<(), ServiceError>>;
}

/// Where container images are loaded.
pub trait ContainerImages: Send + Sync + 'static {
    /// The image as its hypervisor names it, loaded from `bytes` if it is not there. `bytes` is only called then.
    fn ensure<'a>(
        &'a self,
        image: &'a Needed,
        bytes: Box<dyn FnOnce() -> BoxFuture<'a, Result<Bytes, ServiceError>> + Send + 'a>,
    ) -> BoxFuture<'a, Result<String, ServiceError>>;
}

/// A data plane that has whatever it is asked for: for tests and examples with an in-memory hypervisor.
#[derive(Debug, Default)]
pub struct MemoryDataPlane {
    images: Mutex<BTreeMap<ImageName, ImageHere>>,
    disks: Mutex<BTreeMap<HostName, ImageName>>,
    devices: Mutex<BTreeMap<HostName, Attached>>,
    away: AtomicBool,
    no_kernel_client: AtomicBool,
}

/// The device that is a VM's disk.
#[derive(Debug)]
struct Attached {
    device: Device,
    /// Somebody looks after it.
    kept: bool,
}

impl MemoryDataPlane {
    /// One that has the image `name`, of `size` bytes.
    pub fn with_image(name: ImageName, kind: ImageKind, size: u64) -> Self {
        let root = crate::digest::Digest::of(name.as_str().as_bytes());
        let image = ImageHere {
            name: name.clone(),
            root,
            kind,
            size,
            boot_bytes: 0,
            boot: None,
            present: size,
            allocated: size,
            complete: true,
            boot_complete: true,
            received: 0,
        };
        Self { images: Mutex::new(BTreeMap::from([(name, image)])), ..Self::default() }
    }

    /// Makes it unreachable, or reachable again, as one that restarts: it neither says which images it has nor fetches.
    pub fn set_away(&self, away: bool) {
        self.away.store(away, Ordering::Relaxed);
    }

    fn is_away(&self) -> Result<(), ServiceError> {
        match self.away.load(Ordering::Relaxed) {
            true => Err(ServiceError::Away("the data plane in memory is away".to_owned())),
            false => Ok(()),
        }
    }

    /// Makes it refuse devices, as on a host whose kernel has no NBD client, or no longer.
    pub fn set_no_kernel_client(&self, none: bool) {
        self.no_kernel_client.store(none, Ordering::Relaxed);
    }

    /// Kills whoever looks after devices.
    pub fn lose_keepers(&self) {
        self.attached().values_mut().for_each(|attached| attached.kept = false);
    }

    /// The disks that are open.
    pub fn disks(&self) -> Vec<HostName> {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }

    /// The disks that are devices, and whether somebody looks after them.
    pub fn devices(&self) -> Vec<(HostName, Device, bool)> {
        self.attached().iter().map(|(vm, attached)| (vm.clone(), attached.device, attached.kept)).collect()
    }

    fn attached(&self) -> MutexGuard<'_, BTreeMap<HostName, Attached>> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self, vm: &HostName, by: DiskBy) -> Result<DomainDisk, ServiceError> {
        match by {
            DiskBy::Socket => {
                Ok(DomainDisk::Nbd { socket: PathBuf::from("/nowhere"), export: vm.to_string() })
            }
            DiskBy::Kernel if self.no_kernel_client.load(Ordering::Relaxed) => {
                Err(ServiceError::Refused("this kernel has no NBD client".to_owned()))
            }
            DiskBy::Kernel => {
                let mut attached = self.attached();
                let is_free = |device: &Device| attached.values().all(|other| other.device != *device);
                let free = (0..).map(Device).find(is_free).expect("there are fewer VMs than numbers");
                let ours = attached.entry(vm.clone()).or_insert(Attached { device: free, kept: true });
                ours.kept = true;
                Ok(DomainDisk::Block(ours.device.path()))
            }
        }
    }
}

impl DataPlane for MemoryDataPlane {
    fn images(&self) -> BoxFuture<'_, Result<Vec<ImageHere>, ServiceError>> {
        let images = self.images.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        let away = self.is_away();
        Box::pin(async move { away.map(|()| images) })
    }

    fn peer(&self) -> Option<SocketAddr> {
        None
    }

    fn fetch<'a>(&'a self, image: &'a Needed, _boot_only: bool) -> BoxFuture<'a, Result<(), ServiceError>> {
        let there = self.images.lock().unwrap_or_else(PoisonError::into_inner).contains_key(&image.name);
        let away = self.is_away();
        let result = if there {
            Ok(())
        } else {
            Err(ServiceError::Refused(format!("image {} is not here", image.name)))
        };
        Box::pin(async { away.and(result) })
    }

    fn open_disk<'a>(
        &'a self,
        image: &'a ImageName,
        vm: &'a HostName,
        _size: Option<u64>,
        by: DiskBy,
    ) -> BoxFuture<'a, Result<OpenDisk, ServiceError>> {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner).insert(vm.clone(), image.clone());
        let open = self.open(vm, by).map(|disk| OpenDisk { disk, serial: self.serial(vm) });
        Box::pin(async { open })
    }

    fn keep_device<'a>(&'a self, vm: &'a HostName) -> BoxFuture<'a, Result<(), ServiceError>> {
        self.attached().entry(vm.clone()).and_modify(|attached| attached.kept = true);
        Box::pin(async { Ok(()) })
    }

    fn detach<'a>(&'a self, vm: &'a HostName) -> BoxFuture<'a, Result<(), ServiceError>> {
        self.attached().remove(vm);
        Box::pin(async { Ok(()) })
    }

    fn serial(&self, _vm: &HostName) -> PathBuf {
        PathBuf::from("/dev/null")
    }

    fn remove_disk<'a>(&'a self, vm: &'a HostName) -> BoxFuture<'a, Result<(), ServiceError>> {
        self.attached().remove(vm);
        self.disks.lock().unwrap_or_else(PoisonError::into_inner).remove(vm);
        Box::pin(async { Ok(()) })
    }

    fn read<'a>(&'a self, _image: &'a Needed) -> BoxFuture<'a, Result<Bytes, ServiceError>> {
        Box::pin(async { Ok(Box::new(tokio::io::empty()) as Bytes) })
    }
}
