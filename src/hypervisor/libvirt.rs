//! A libvirt daemon: the few calls that guests need.
//!
//! Every call of libvirt's C library blocks, some without limit when its daemon hangs: each runs on a thread of its
//! own, with a deadline, on a connection of its own, which also survives restarts of the daemon. A thread whose call
//! never ends is left behind, and there is a limit to those.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use virt::connect::Connect;
use virt::domain::{Domain, DomainStateReason};
use virt::enumutil::Enum;
use virt::error::{Error, clear_error_callback};
use virt::sys;

use super::{LibvirtError, LibvirtGuest, Running};
use crate::control::Owner;
use crate::name::HostName;
use crate::qemu::ShutDown;

/// Longest wait for a call. Destroying a guest that hangs takes libvirt 10 s.
const DEADLINE: Duration = Duration::from_secs(60);
/// How many launches may be under way, and how many other calls, those that hang among them. They are counted apart: a
/// launch hangs as long as its guest's disk does, and what ends it is another call.
const CALLS_MAX: usize = 32;

/// A libvirt daemon.
#[derive(Debug, Clone)]
pub struct Libvirt {
    uri: String,
    deadline: Duration,
    launches: Arc<Semaphore>,
    calls: Arc<Semaphore>,
}

impl Libvirt {
    /// The daemon at `uri`, such as `qemu:///system`. Nothing is connected yet.
    pub fn new(uri: impl Into<String>) -> Self {
        clear_error_callback();
        let places = || Arc::new(Semaphore::new(CALLS_MAX));
        Self { uri: uri.into(), deadline: DEADLINE, launches: places(), calls: places() }
    }

    /// The same with another limit for every call; without, it is a minute.
    #[must_use]
    pub fn with_deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// Defines a domain from XML and starts it; returns when its QEMU runs. A domain that does not start is undefined.
    pub async fn launch(&self, xml: String) -> Result<(), LibvirtError> {
        self.call_while_wanted(&self.launches, move |connect, is_wanted| {
            let domain = connect.define_domain_xml(&xml).map_err(refused)?;
            let started = match is_wanted() {
                true => domain.create().map_err(refused),
                false => Err(LibvirtError::Interrupted("the launch was given up".to_owned())),
            };
            started.or_else(|error| {
                // Another try was given up after it had asked for the same.
                if domain.is_active().unwrap_or(false) {
                    return Ok(());
                }
                let _ = domain.undefine();
                Err(error)
            })
        })
        .await
    }

    /// Asks the guest to shut down, if there is one.
    pub async fn shut_down(&self, uuid: &str) -> Result<ShutDown, LibvirtError> {
        let asked = self.with_domain(uuid, |domain| {
            let state = domain.info().map_err(refused)?.state.to_raw();
            let stands_still = matches!(state, sys::VIR_DOMAIN_PAUSED | sys::VIR_DOMAIN_PMSUSPENDED);
            if stands_still && !is_starting(domain) {
                return Ok(ShutDown::Paused);
            }
            match domain.shutdown() {
                Err(error) if is(&error, sys::VIR_ERR_OPERATION_INVALID) => Ok(ShutDown::Off),
                other => other.map(|()| ShutDown::Asked).map_err(refused),
            }
        });
        Ok(asked.await?.unwrap_or(ShutDown::Off))
    }

    /// What a guest would lose if it were deleted and made again with the disk called `name` on the same export or device,
    /// as a sentence for its user; none when that is nothing.
    pub async fn would_lose(&self, uuid: &str, name: &HostName) -> Result<Option<String>, LibvirtError> {
        let name = name.clone();
        let found = self.with_domain(uuid, move |domain| {
            if domain.has_managed_save(0).map_err(refused)? {
                return Ok(Some(format!(
                    "VM '{name}' is saved: `virsh start {name}` brings it back, \
                     `virsh managedsave-remove {name}` gives up what it has in memory"
                )));
            }
            let moved = has_moved(&domain.xml_desc(0).map_err(refused)?, &name);
            Ok(moved.then(|| {
                format!(
                    "the disk of VM '{name}' is another one now, as after a snapshot or a block copy: \
                     `virsh blockcommit {name} vda --active --pivot` or the like brings it back"
                )
            }))
        });
        Ok(found.await?.flatten())
    }

    /// Ends the guest at once. What does not run is no error.
    pub async fn destroy(&self, uuid: &str) -> Result<(), LibvirtError> {
        self.with_domain(uuid, |domain| match domain.destroy() {
            Err(error) if !is_gone(&error) => Err(refused(error)),
            _ => Ok(()),
        })
        .await
        .map(drop)
    }

    /// Whether the guest runs.
    pub async fn is_running(&self, uuid: &str) -> Result<bool, LibvirtError> {
        let active = self.with_domain(uuid, |domain| domain.is_active().map_err(refused)).await?;
        Ok(active.unwrap_or(false))
    }

    /// Why the guest stands still, if it does and nobody asked for that, as a sentence about it.
    pub async fn stands_still(&self, uuid: &str) -> Result<Option<&'static str>, LibvirtError> {
        let state = self.with_domain(uuid, |domain| domain.state().map_err(refused)).await?;
        Ok(state.and_then(|(_, reason)| match reason {
            Enum::Known(DomainStateReason::Paused(reason)) => match reason.to_raw() {
                sys::VIR_DOMAIN_PAUSED_IOERROR => Some("its disk failed, and QEMU paused it"),
                // What libvirt makes of a stop of QEMU's own; KVM's errors are among them.
                sys::VIR_DOMAIN_PAUSED_UNKNOWN => Some("QEMU paused it"),
                _ => None,
            },
            _ => None,
        }))
    }

    /// Ends the guest at once and forgets it. What is not there is no error.
    pub async fn delete(&self, uuid: &str) -> Result<(), LibvirtError> {
        self.with_domain(uuid, |domain| {
            for result in [domain.destroy(), undefine(domain)] {
                match result {
                    Err(error) if !is_gone(&error) => return Err(refused(error)),
                    _ => {}
                }
            }
            Ok(())
        })
        .await
        .map(drop)
    }

    /// What there is of the guest, with the traffic of the taps of these names; `None` if nothing is.
    pub async fn find(&self, uuid: &str, taps: Vec<String>) -> Result<Option<LibvirtGuest>, LibvirtError> {
        self.with_domain(uuid, move |domain| {
            let info = domain.info().map_err(refused)?;
            // `Domain::state` would hide an error.
            let state = match info.state.to_raw() {
                sys::VIR_DOMAIN_RUNNING | sys::VIR_DOMAIN_BLOCKED | sys::VIR_DOMAIN_SHUTDOWN => {
                    Running::Running
                }
                sys::VIR_DOMAIN_PAUSED if is_starting(domain) => Running::Starting,
                sys::VIR_DOMAIN_PAUSED | sys::VIR_DOMAIN_PMSUSPENDED => Running::Paused,
                _ => Running::Stopped,
            };
            let mut guest =
                LibvirtGuest { state, cpu_ns: info.cpu_time, memory_bytes: 0, network_bytes: [0; 2] };
            // One that is being started has nobody yet who answers.
            if matches!(state, Running::Stopped | Running::Starting) {
                return Ok(guest);
            }
            let statistics = domain.memory_stats(0).unwrap_or_default();
            let resident = statistics.iter().find(|one| one.tag == sys::VIR_DOMAIN_MEMORY_STAT_RSS);
            guest.memory_bytes = resident.map_or(info.memory, |one| one.val) * 1024;
            for tap in taps {
                // A guest of a template need not have it.
                let Ok(traffic) = domain.interface_stats(&tap) else { continue };
                // Seen from the host: what the tap receives, the guest sent.
                guest.network_bytes[0] += u64::try_from(traffic.rx_bytes).unwrap_or(0);
                guest.network_bytes[1] += u64::try_from(traffic.tx_bytes).unwrap_or(0);
            }
            Ok(guest)
        })
        .await
    }

    /// Names and UUIDs of all domains, in whatever state.
    pub async fn all(&self) -> Result<Vec<(String, String)>, LibvirtError> {
        self.call(|connect| {
            let domains = connect.list_all_domains(0).map_err(refused)?;
            // One that has gone meanwhile is none.
            let known = |domain: Domain| Some((domain.name().ok()?, domain.uuid_string().ok()?));
            Ok(domains.into_iter().filter_map(known).collect())
        })
        .await
    }

    /// The user that QEMU runs as, where libvirt tells.
    pub async fn qemu_owner(&self) -> Result<Option<Owner>, LibvirtError> {
        self.call(|connect| Ok(owner(&connect.capabilities().map_err(refused)?))).await
    }

    /// Has the daemon look at an emulator, as it would before the first guest: it keeps what it sees.
    pub async fn look_at(&self, emulator: String) -> Result<(), LibvirtError> {
        self.call(move |connect| {
            connect.domain_capabilities(Some(&emulator), None, None, None, 0).map_err(refused)?;
            Ok(())
        })
        .await
    }

    /// Guests are known by their UUID and never by their name, which may be that of somebody else's.
    async fn with_domain<T, F>(&self, uuid: &str, work: F) -> Result<Option<T>, LibvirtError>
    where
        T: Send + 'static,
        F: FnOnce(&Domain) -> Result<T, LibvirtError> + Send + 'static,
    {
        let uuid = uuid.to_owned();
        self.call(move |connect| match connect.lookup_domain_by_uuid_string(&uuid) {
            Ok(domain) => work(&domain).map(Some),
            Err(error) if is(&error, sys::VIR_ERR_NO_DOMAIN) => Ok(None),
            Err(error) => Err(refused(error)),
        })
        .await
    }

    async fn call<T, F>(&self, work: F) -> Result<T, LibvirtError>
    where
        T: Send + 'static,
        F: FnOnce(&Connect) -> Result<T, LibvirtError> + Send + 'static,
    {
        self.call_while_wanted(&self.calls, |connect, _| work(connect)).await
    }

    /// Makes a call. One that hangs and is given up does not happen later, when it was tried again or its guest has been
    /// ended: `work` is not begun then, and can ask whether somebody still waits for it.
    async fn call_while_wanted<T, F>(&self, places: &Arc<Semaphore>, work: F) -> Result<T, LibvirtError>
    where
        T: Send + 'static,
        F: FnOnce(&Connect, &dyn Fn() -> bool) -> Result<T, LibvirtError> + Send + 'static,
    {
        let uri = self.uri.clone();
        let places = Arc::clone(places);
        let called = async move {
            // Kept by the thread until its call ends, however long this waits.
            let turn = places.acquire_owned().await;
            let (send, receive) = tokio::sync::oneshot::channel();
            let thread = std::thread::Builder::new().name("libvirt".to_owned()).spawn(move || {
                let _turn = turn;
                let is_wanted = || !send.is_closed();
                let result = match Connect::open(Some(&uri)) {
                    Ok(_) if !is_wanted() => return,
                    Ok(connect) => work(&connect, &is_wanted),
                    Err(error) => Err(LibvirtError::Unreachable { uri, reason: error.message().to_owned() }),
                };
                // Whoever asked may have given up.
                let _ = send.send(result);
            });
            // The host may have as many as it is allowed to, for now.
            thread.map_err(|error| LibvirtError::Interrupted(format!("no thread for it: {error}")))?;
            let failed = |_| LibvirtError::Refused("its client library failed".to_owned());
            receive.await.map_err(failed)?
        };
        match tokio::time::timeout(self.deadline, called).await {
            Ok(result) => result,
            Err(_) => Err(LibvirtError::TimedOut { uri: self.uri.clone(), after: self.deadline }),
        }
    }
}

/// Whether the disk of VM `name`, whose domain `xml` is as libvirt writes it, is neither the VM's export nor a kernel's NBD
/// device any more. What is below it in a chain does not count.
fn has_moved(xml: &str, name: &HostName) -> bool {
    let export = format!("protocol='nbd' name='{name}'");
    let disks = xml.split("<disk ").skip(1);
    let disk = disks.filter_map(|disk| disk.split("</disk>").next()).find(|disk| disk.contains("dev='vda'"));
    disk.is_some_and(|disk| {
        let own = disk.split("<backingStore").next().unwrap_or(disk);
        !own.contains(&export) && !own.contains("dev='/dev/nbd")
    })
}

/// Whether a paused domain is one whose QEMU is being started.
fn is_starting(domain: &Domain) -> bool {
    match domain.state() {
        Ok((_, Enum::Known(DomainStateReason::Paused(reason)))) => {
            reason.to_raw() == sys::VIR_DOMAIN_PAUSED_STARTING_UP
        }
        _ => false,
    }
}

/// Undefines a domain with everything that libvirt keeps of it; what a UEFI template brings would keep it otherwise.
fn undefine(domain: &Domain) -> Result<(), Error> {
    let all = sys::VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
        | sys::VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
        | sys::VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
        | sys::VIR_DOMAIN_UNDEFINE_NVRAM;
    match domain.undefine_flags(all) {
        Err(error) if is(&error, sys::VIR_ERR_INVALID_ARG) => domain.undefine(), // a driver that knows fewer
        other => other,
    }
}

fn refused(error: Error) -> LibvirtError {
    match error.code().to_raw() {
        // The daemon ended, or restarts, while the call was under way.
        sys::VIR_ERR_RPC | sys::VIR_ERR_SYSTEM_ERROR | sys::VIR_ERR_NO_CONNECT => {
            LibvirtError::Interrupted(error.message().to_owned())
        }
        _ => LibvirtError::Refused(error.message().to_owned()),
    }
}

fn is(error: &Error, code: sys::virErrorNumber) -> bool {
    error.code().to_raw() == code
}

/// Whether a call had nothing to do.
fn is_gone(error: &Error) -> bool {
    is(error, sys::VIR_ERR_OPERATION_INVALID) || is(error, sys::VIR_ERR_NO_DOMAIN)
}

/// The DAC label of QEMU processes in libvirt's capabilities: `<baselabel type='qemu'>+64055:+107</baselabel>`.
fn owner(capabilities: &str) -> Option<Owner> {
    let label = regex::Regex::new(r"<baselabel type='(?:qemu|kvm)'>\+(\d+):\+(\d+)</baselabel>")
        .expect("the pattern is valid")
        .captures(capabilities)?;
    Some(Owner { uid: label[1].parse().ok()?, gid: label[2].parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: &str = "00000000-0000-8000-8000-000000000001";

    /// libvirt's test driver has one domain, which runs and is called `test`.
    const URI: &str = "test:///default";

    #[tokio::test]
    async fn somebody_else_s_domain_of_that_name_is_neither_ended_nor_replaced() {
        let libvirt = Libvirt::new(URI);
        // What the driver has lives as long as a connection to it.
        let theirs = Connect::open(Some(URI)).unwrap();
        let xml = format!(
            "<domain type='test'><name>test</name><uuid>{OURS}</uuid><memory>1024</memory>\
             <os><type>hvm</type></os></domain>"
        );
        let error = libvirt.launch(xml).await.unwrap_err().to_string();
        assert!(error.contains("already exists"), "{error}");
        assert!(!libvirt.is_running(OURS).await.unwrap());
        assert_eq!(libvirt.shut_down(OURS).await.unwrap(), ShutDown::Off);
        assert_eq!(libvirt.find(OURS, Vec::new()).await.unwrap().map(|guest| guest.state), None);
        libvirt.destroy(OURS).await.unwrap();
        libvirt.delete(OURS).await.unwrap();
        let domain = theirs.lookup_domain_by_name("test").unwrap();
        assert!(domain.is_active().unwrap());

        let uuid = domain.uuid_string().unwrap();
        assert!(libvirt.is_running(&uuid).await.unwrap());
        libvirt.destroy(&uuid).await.unwrap();
        assert!(!libvirt.is_running(&uuid).await.unwrap());
    }

    #[test]
    fn a_disk_that_a_snapshot_or_a_copy_has_moved_is_seen() {
        let name: HostName = "vm-1".parse().unwrap();
        let disk = |source: &str, rest: &str| {
            format!(
                "<domain><devices><disk type='x' device='disk'>{source}{rest}<target dev='vda' bus='virtio'/></disk></devices></domain>"
            )
        };
        let export =
            "<source protocol='nbd' name='vm-1' index='1'><host transport='unix' socket='/s'/></source>";
        let file = "<source file='/snapshot.qcow2' index='2'/>";
        let below = format!("<backingStore type='network'>{export}</backingStore>");
        assert!(!has_moved(&disk(export, "<backingStore/>"), &name));
        assert!(!has_moved(&disk("<source dev='/dev/nbd3'/>", ""), &name));
        assert!(has_moved(&disk(file, &below), &name));
        assert!(has_moved(&disk(file, "<backingStore/>"), &name));
        assert!(!has_moved("<domain/>", &name), "nothing is known of a disk that is not there");
    }

    #[tokio::test]
    async fn a_domain_that_another_try_has_started_is_launched() {
        // Unlike the default one, a node of the test driver that comes of a file is there for each connection anew.
        let node = tempfile::NamedTempFile::new().unwrap();
        let xml = format!(
            "<domain type='test'><name>ours</name><uuid>{OURS}</uuid><memory>1024</memory>\
             <os><type>hvm</type></os></domain>"
        );
        std::fs::write(node.path(), format!("<node>{xml}</node>")).unwrap();
        let libvirt = Libvirt::new(format!("test://{}", node.path().display()));
        assert!(libvirt.is_running(OURS).await.unwrap());
        libvirt.launch(xml).await.unwrap();
    }

    #[tokio::test]
    async fn a_call_learns_that_it_was_given_up() {
        let libvirt = Libvirt::new(URI).with_deadline(Duration::from_secs(1));
        let (go_on, waits) = std::sync::mpsc::channel();
        let (tell, told) = std::sync::mpsc::channel();
        let called = libvirt.call_while_wanted(&libvirt.launches, move |_, is_wanted| {
            tell.send(is_wanted()).unwrap();
            waits.recv().unwrap();
            tell.send(is_wanted()).unwrap();
            Ok(())
        });
        assert!(matches!(called.await, Err(LibvirtError::TimedOut { .. })));
        go_on.send(()).unwrap();
        assert_eq!([told.recv().unwrap(), told.recv().unwrap()], [true, false]);
    }

    #[test]
    fn the_owner_is_read_from_the_capabilities() {
        let text = "<model>dac</model>\n<baselabel type='kvm'>+64055:+106</baselabel>";
        assert_eq!(owner(text), Some(Owner { uid: 64055, gid: 106 }));
        assert_eq!(owner("<host/>"), None);
    }

    #[tokio::test]
    async fn a_daemon_that_is_not_there_is_named() {
        let libvirt = Libvirt::new("qemu+unix:///system?socket=/nowhere/sock");
        let error = libvirt.is_running(OURS).await.unwrap_err().to_string();
        assert!(error.contains("cannot be reached") && error.contains("start libvirtd"), "{error}");
    }
}
