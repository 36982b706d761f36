//! VMs as domains of libvirt.
//!
//! A domain has the instance's name, and a UUID that comes of the node's and the instance's name: that is how the node
//! knows its own again, from a template too. A domain of that name with another UUID is somebody else's and is never
//! touched.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bootcache_nbd::BoxFuture;
use tokio::sync::OnceCell;

use super::cpu::CpuUse;
use super::domain::{Domain, Interface, install_emulator};
use super::libvirt::Libvirt;
use super::{
    Hypervisor, HypervisorError, Info, InstanceType, Launch, LibvirtError, LibvirtGuest, Log, Root, Running,
    template,
};
use crate::name::HostName;
use crate::qemu::Accelerator;
use crate::qemu::ShutDown;

/// How often a guest that was asked to end is looked at.
const TICK: Duration = Duration::from_millis(200);

/// Longest wait for a guest that somebody else has begun to start.
const STARTING: Duration = Duration::from_secs(60);

/// The VMs of a node.
#[derive(Debug)]
pub struct Domains {
    libvirt: Libvirt,
    /// `node NAME`; not the folder of a store, whose guests are `bootcache boot`'s.
    owner: PathBuf,
    folder: PathBuf,
    accelerator: OnceCell<Accelerator>,
    cpu: CpuUse,
}

impl Domains {
    /// The VMs of the node of that name, run by libvirt. `folder` is there, and QEMU's user can read what is in it.
    pub fn new(libvirt: Libvirt, node: &HostName, folder: impl Into<PathBuf>) -> Self {
        Self {
            libvirt,
            owner: PathBuf::from(format!("node {node}")),
            folder: folder.into(),
            accelerator: OnceCell::new(),
            cpu: CpuUse::default(),
        }
    }

    /// Has guests run on `accelerator`; without this, KVM is taken where it works.
    pub fn with_accelerator(self, accelerator: Accelerator) -> Self {
        Self { accelerator: OnceCell::new_with(Some(accelerator)), ..self }
    }

    /// The node's guest of that name.
    async fn find(&self, name: &HostName) -> Result<Option<LibvirtGuest>, HypervisorError> {
        Ok(self.libvirt.find(&self.uuid(name), taps(&self.owner, name)).await?)
    }

    fn uuid(&self, name: &HostName) -> String {
        Domain::uuid(&self.owner, name)
    }

    /// Has libvirt look at the emulator of the node's guests, which takes a second the first time: the first guest does not
    /// wait for it then. Without this, nothing is different later.
    pub async fn prepare(&self) -> Result<(), HypervisorError> {
        let emulator = self.emulator().await?;
        self.libvirt.look_at(emulator.to_string_lossy().into_owned()).await?;
        self.accelerator.get_or_init(Accelerator::detect).await;
        Ok(())
    }

    /// The file that libvirt starts for each of the node's guests.
    async fn emulator(&self) -> Result<PathBuf, HypervisorError> {
        let folder = self.folder.clone();
        let written = tokio::task::spawn_blocking(move || install_emulator(&folder)).await;
        let written = written.unwrap_or_else(|panic| Err(io::Error::other(panic)));
        written.map_err(|error| HypervisorError::Refused(format!("the guests' emulator: {error}")))
    }

    async fn xml(&self, launch: &Launch) -> Result<String, HypervisorError> {
        let refused = |reason: String| HypervisorError::Refused(format!("{}: {reason}", launch.name));
        let Root::Disk(disk) = &launch.root else {
            return Err(refused("a VM starts from a disk, not from an image".to_owned()));
        };
        let names = taps(&self.owner, &launch.name);
        let interfaces = launch.nics.iter().zip(names).map(|(nic, tap)| Interface {
            bridge: Some(nic.bridge.clone()),
            mac: Some(nic.mac.clone()),
            tap: Some(tap),
            mtu: nic.mtu,
        });
        if launch.nics.len() > INTERFACES_MAX {
            return Err(refused(format!("a VM has at most {INTERFACES_MAX} network interfaces")));
        }
        let domain = Domain {
            name: launch.name.clone(),
            memory_mib: launch.memory_mib,
            cpus: launch.cpus,
            accelerator: *self.accelerator.get_or_init(Accelerator::detect).await,
            emulator: self.emulator().await?,
            disk: disk.clone(),
            interfaces: interfaces.collect(),
            serial: launch.serial.clone(),
            facts: launch.facts.clone(),
            guest_agent: true,
        };
        match &launch.template {
            None => Ok(domain.to_xml(&self.owner)),
            Some(text) => {
                template::fill(text, &domain, &self.owner).map_err(|error| refused(error.to_string()))
            }
        }
    }

    async fn stop(&self, name: &HostName, patience: Duration) -> Result<(), HypervisorError> {
        let is_up = |guest: &LibvirtGuest| guest.state != Running::Stopped;
        if !self.find(name).await?.as_ref().is_some_and(is_up) {
            return Ok(());
        }
        let deadline = Instant::now() + patience;
        if !patience.is_zero() && self.libvirt.shut_down(&self.uuid(name)).await? == ShutDown::Asked {
            while Instant::now() < deadline {
                if !self.find(name).await?.as_ref().is_some_and(is_up) {
                    return Ok(());
                }
                tokio::time::sleep(TICK).await;
            }
        }
        Ok(self.libvirt.destroy(&self.uuid(name)).await?)
    }
}

impl Hypervisor for Domains {
    fn instance_type(&self) -> InstanceType {
        InstanceType::Vm
    }

    fn launch<'a>(&'a self, instance: &'a Launch) -> BoxFuture<'a, Result<(), HypervisorError>> {
        Box::pin(async move {
            let deadline = Instant::now() + STARTING;
            loop {
                match self.find(&instance.name).await?.map(|guest| guest.state) {
                    // Another try was given up, or its agent killed, after it had asked for the same.
                    Some(Running::Starting) if Instant::now() < deadline => tokio::time::sleep(TICK).await,
                    Some(Running::Starting) => {
                        let reason = "is still being started: see whether its disk can be read";
                        return Err(HypervisorError::TimedOut(format!("{} {reason}", instance.name)));
                    }
                    Some(Running::Running | Running::Paused) => return Ok(()),
                    Some(Running::Stopped) | None => break,
                }
            }
            let xml = self.xml(instance).await?;
            Ok(self.libvirt.launch(xml).await?)
        })
    }

    fn stop<'a>(
        &'a self,
        name: &'a HostName,
        patience: Duration,
    ) -> BoxFuture<'a, Result<(), HypervisorError>> {
        Box::pin(self.stop(name, patience))
    }

    fn delete<'a>(&'a self, name: &'a HostName) -> BoxFuture<'a, Result<(), HypervisorError>> {
        Box::pin(async move {
            self.cpu.forget(name);
            Ok(self.libvirt.delete(&self.uuid(name)).await?)
        })
    }

    fn info<'a>(&'a self, name: &'a HostName) -> BoxFuture<'a, Result<Option<Info>, HypervisorError>> {
        Box::pin(async move {
            let found = self.find(name).await?;
            Ok(found.map(|guest| Info {
                state: guest.state,
                cpu: match guest.state {
                    Running::Stopped | Running::Starting => 0.0,
                    _ => self.cpu.since_last(name, Instant::now(), guest.cpu_ns),
                },
                memory_bytes: guest.memory_bytes,
                network_bytes: guest.network_bytes,
            }))
        })
    }

    fn log<'a>(&'a self, _name: &'a HostName) -> BoxFuture<'a, Result<Option<Log>, HypervisorError>> {
        Box::pin(async { Ok(None) })
    }

    fn list(&self) -> BoxFuture<'_, Result<Vec<HostName>, HypervisorError>> {
        Box::pin(async move {
            let all = self.libvirt.all().await?;
            let ours = all.into_iter().filter_map(|(name, uuid)| {
                let name: HostName = name.parse().ok()?;
                (self.uuid(&name) == uuid).then_some(name)
            });
            Ok(ours.collect())
        })
    }

    fn check(&self) -> BoxFuture<'_, Result<(), HypervisorError>> {
        Box::pin(async move { Ok(self.libvirt.all().await.map(drop)?) })
    }
}

/// The most network interfaces of a VM.
const INTERFACES_MAX: usize = 8;

/// The names of the host's ends of a guest's interfaces: the same in every process, and at most 15 bytes.
fn taps(owner: &Path, name: &HostName) -> Vec<String> {
    let digest = blake3::hash(Domain::uuid(owner, name).as_bytes()).to_hex();
    (0..INTERFACES_MAX).map(|index| format!("bt{}.{index}", &digest[..10])).collect()
}

impl From<LibvirtError> for HypervisorError {
    fn from(error: LibvirtError) -> Self {
        let text = error.to_string();
        match error {
            LibvirtError::Unreachable { .. } | LibvirtError::Interrupted(_) => Self::Unreachable(text),
            LibvirtError::Refused(_) | LibvirtError::NotBuilt => Self::Refused(text),
            LibvirtError::TimedOut { .. } => Self::TimedOut(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taps_have_names_that_linux_can_hold_and_no_two_guests_share() {
        let name = |text: &str| text.parse::<HostName>().unwrap();
        let of = |node: &str, vm: &str| taps(Path::new(node), &name(vm));
        let one = of("node a", "vm-1");
        assert!(one.iter().all(|tap| tap.len() <= crate::network::DEVICE_NAME_MAX));
        assert_eq!(one, of("node a", "vm-1"));
        assert!(
            one.iter().all(|tap| !of("node a", "vm-2").contains(tap) && !of("node b", "vm-1").contains(tap))
        );
    }
}
