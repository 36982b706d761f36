//! Hypervisors: who runs instances, VMs and containers alike (thesis, section 3.5).
//!
//! [`Hypervisor`] is the four verbs of the thesis, a list and a log. [`domains`] runs VMs by libvirt, [`docker`]
//! containers, and [`memory`] pretends to, with faults, for tests. A plain QEMU is `crate::qemu`'s.
//!
//! Every verb is idempotent by the instance's name, and returns when the hypervisor has accepted the request, not when
//! the guest is up. Not here: images, overlays and networks. Those are ready when [`Hypervisor::launch`] is called.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use bootcache_nbd::BoxFuture;
use futures_util::stream::BoxStream;
use serde::{Deserialize, Serialize};

use crate::name::HostName;

mod cpu;
pub mod docker;
pub mod domain;
pub mod domains;
#[cfg_attr(not(feature = "libvirt"), path = "hypervisor/without_libvirt.rs")]
pub mod libvirt;
pub mod memory;
pub mod template;

/// What kind of thing an instance is; also what kind of image it starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InstanceType {
    /// A virtual machine.
    Vm,
    /// A container.
    Container,
}

impl std::fmt::Display for InstanceType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Vm => "vm",
            Self::Container => "container",
        })
    }
}

/// Whose NBD client brings a VM its disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskBy {
    /// QEMU's own, on the VM's Unix socket.
    #[default]
    Socket,
    /// The one of the host's kernel: the disk is a `/dev/nbdX`.
    Kernel,
}

impl DiskBy {
    /// Whether it is the default, which orders leave out.
    pub fn is_socket(&self) -> bool {
        *self == Self::Socket
    }
}

/// A network interface of an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nic {
    /// The network's name in the plan; Docker's network on it has the name of the bridge.
    pub network: HostName,
    /// The bridge of the host that it is on.
    pub bridge: String,
    /// Its hardware address, `52:54:00:…` for instances of plans.
    pub mac: String,
    /// Its address and the length of its network's prefix.
    pub address: Option<(IpAddr, u8)>,
    /// Where packets for elsewhere go.
    pub gateway: Option<IpAddr>,
    /// Largest packet in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
}

/// What an instance starts from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Root {
    /// A VM's disk.
    Disk(domain::DomainDisk),
    /// A container's image, as its hypervisor names it.
    Image(String),
}

/// An instance to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// Its name, by which it is found again: a domain's or a container's.
    pub name: HostName,
    /// What it starts from.
    pub root: Root,
    /// Virtual processors; for a container, the most that it may use.
    pub cpus: u32,
    /// Memory in MiB; for a container, the most that it may use.
    pub memory_mib: u32,
    /// Network interfaces, in order.
    pub nics: Vec<Nic>,
    /// Environment of a container.
    pub env: BTreeMap<String, String>,
    /// Command of a container; empty: the image's own.
    pub command: Vec<String>,
    /// Whether a container may be privileged. The plan's author was allowed to ask for it.
    pub privileged: bool,
    /// Facts such as `("address", "10.0.0.2/24")`. A VM finds `bootcache:address=10.0.0.2/24` among the OEM strings of
    /// its SMBIOS, a container `BOOTCACHE_ADDRESS=10.0.0.2/24` in its environment.
    pub facts: Vec<(String, String)>,
    /// File for a VM's serial line.
    pub serial: PathBuf,
    /// The user's own domain XML, with places `@NAME@` … to be filled.
    pub template: Option<String>,
}

/// What a hypervisor says of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Running {
    /// It is being started: nothing is known yet of how that will end.
    Starting,
    /// It runs.
    Running,
    /// It stands still, by hand or since its disk failed, and can go on.
    Paused,
    /// It has ended, or never started.
    Stopped,
}

/// An instance as its hypervisor sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Info {
    /// Whether it runs.
    pub state: Running,
    /// Processors in use since the last look, on average: 1.0 is one processor.
    pub cpu: f64,
    /// Bytes of memory in use.
    pub memory_bytes: u64,
    /// Bytes that it received and sent.
    pub network_bytes: [u64; 2],
}

/// What a hypervisor did not do, and why.
#[derive(Debug, Clone, thiserror::Error)]
pub enum HypervisorError {
    /// It cannot be reached; trying again may help.
    #[error("{0}")]
    Unreachable(String),
    /// It refused; trying again does not help.
    #[error("{0}")]
    Refused(String),
    /// It did not answer in time; the request may have been carried out.
    #[error("{0}")]
    TimedOut(String),
}

/// What libvirt did not do, and why.
#[derive(Debug, thiserror::Error)]
pub enum LibvirtError {
    /// It cannot be reached.
    #[error("libvirt at {uri} cannot be reached ({reason}): start libvirtd")]
    Unreachable {
        /// Where.
        uri: String,
        /// What libvirt says.
        reason: String,
    },
    /// The connection broke while it worked.
    #[error("libvirt: {0}")]
    Interrupted(String),
    /// It refused.
    #[error("libvirt: {0}")]
    Refused(String),
    /// It does not answer.
    #[error("libvirt at {uri} did not answer within {after:?}: see whether libvirtd hangs")]
    TimedOut {
        /// Where.
        uri: String,
        /// How long was waited.
        after: Duration,
    },
    /// This program cannot talk to it.
    #[error("this bootcache was built without libvirt: build it with the feature `libvirt`, or use --qemu")]
    NotBuilt,
}

/// A guest as libvirt sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LibvirtGuest {
    /// Whether it runs.
    pub state: Running,
    /// Processor time so far.
    pub cpu_ns: u64,
    /// Memory of the host that it takes.
    pub memory_bytes: u64,
    /// Bytes that it received and sent.
    pub network_bytes: [u64; 2],
}

/// What an instance writes, as it comes.
pub type Log = BoxStream<'static, Result<bytes::Bytes, HypervisorError>>;

/// Runs instances of one type. Calls for different instances may come at once, those for one instance come one by one.
pub trait Hypervisor: Send + Sync + 'static {
    /// What it runs.
    fn instance_type(&self) -> InstanceType;

    /// Starts an instance; one that runs already under this name is left as it is, one that has stopped starts again.
    fn launch<'a>(&'a self, instance: &'a Launch) -> BoxFuture<'a, Result<(), HypervisorError>>;

    /// Asks it to end, and ends it after `patience`. One that is not there has ended.
    fn stop<'a>(
        &'a self,
        name: &'a HostName,
        patience: Duration,
    ) -> BoxFuture<'a, Result<(), HypervisorError>>;

    /// Ends it at once and forgets it. What is not there is no error.
    fn delete<'a>(&'a self, name: &'a HostName) -> BoxFuture<'a, Result<(), HypervisorError>>;

    /// What it is doing; `None` if there is none of that name.
    fn info<'a>(&'a self, name: &'a HostName) -> BoxFuture<'a, Result<Option<Info>, HypervisorError>>;

    /// Why an instance that has ended did not end in order, as far as that is known; `None` when it did.
    fn fault<'a>(&'a self, name: &'a HostName) -> BoxFuture<'a, Option<String>> {
        let _ = name;
        Box::pin(std::future::ready(None))
    }

    /// What the instance has written and will write, from its first byte to its end; `None` when all that it writes is
    /// in the file for its serial line.
    fn log<'a>(&'a self, name: &'a HostName) -> BoxFuture<'a, Result<Option<Log>, HypervisorError>>;

    /// The names of all instances that carry this node's mark, in whatever state: what an earlier agent left too.
    fn list(&self) -> BoxFuture<'_, Result<Vec<HostName>, HypervisorError>>;

    /// Whether it can be used now.
    fn check(&self) -> BoxFuture<'_, Result<(), HypervisorError>>;
}
