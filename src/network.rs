//! The layer-2 networks that instances of a plan share (thesis, section 3.6).
//!
//! A network is a Linux bridge of the host, over which VMs (taps) and containers (veths) see each other; an uplink, an
//! interface or a bridge of the host, joins the bridges of several hosts (`uplink`). In a VLAN one cable carries many
//! networks apart from each other. [`NetworkSpec`] says what there is to be, [`Networks`] makes and removes it. Routers
//! between networks are instances (thesis, 3.6.2). Open vSwitch is not built.
//!
//! What is made here carries its node's and bridge's name as the link's alias, and so is found again by a later
//! process. A bridge without one was there before: it is used, and never changed nor removed.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::name::HostName;
use links::{Address, Link, Links};

mod links;
mod uplink;

/// The longest name of a device that Linux knows, in bytes.
pub const DEVICE_NAME_MAX: usize = 15;

/// A network as one node has to have it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkSpec {
    /// Its name in the plan.
    pub name: HostName,
    /// Its bridge: at most 15 bytes, unique on the host.
    pub bridge: String,
    /// Its subnet: the network's address and the length of its prefix.
    pub subnet: (IpAddr, u8),
    /// The router of its instances, if there is one.
    pub gateway: Option<IpAddr>,
    /// The address that this node's bridge gets when containers are on it: Docker wants one of its own on every node.
    pub node_address: Option<IpAddr>,
    /// The host's interface, or bridge, that joins the bridges of several hosts.
    pub uplink: Option<String>,
    /// VLAN on the uplink: 1 to 4094. Needs a kernel with 802.1Q, and on a bridge one that filters VLANs.
    pub vlan: Option<u16>,
    /// Largest packet in bytes.
    pub mtu: Option<u32>,
    /// Containers are on it, so that Docker has a network on the bridge.
    #[serde(default = "with_containers")]
    pub containers: bool,
}

/// What was written down before it said so may have containers.
const fn with_containers() -> bool {
    true
}

/// What was not done to a network, and what to do about it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum NetworkError {
    /// The description cannot be made on any host.
    #[error("network {network}: {reason}")]
    Invalid {
        /// The network.
        network: HostName,
        /// What is wrong with it.
        reason: String,
    },
    /// This host is not as the description wants it.
    #[error("network {network}: {reason}")]
    Host {
        /// The network.
        network: HostName,
        /// What is in the way, and what to do.
        reason: String,
    },
    /// Something is still connected.
    #[error("the bridge {bridge} is in use by {}", ports.join(", "))]
    InUse {
        /// Its bridge.
        bridge: String,
        /// Devices that are ports of it.
        ports: Vec<String>,
    },
    /// The process may not.
    #[error("changing networks needs the capability CAP_NET_ADMIN: run it as root")]
    NotAllowed,
    /// The kernel refused.
    #[error("cannot {action}: {reason}")]
    Kernel {
        /// What was tried.
        action: String,
        /// What it said.
        reason: String,
    },
}

/// The networks of one node, on the host whose network namespace this process is in.
///
/// Holds no state: the kernel has it. Calls for one network come one by one, which is the caller's to see to.
#[derive(Debug, Clone)]
pub struct Networks {
    node: HostName,
}

impl Networks {
    /// The networks of the node of that name.
    pub fn new(node: HostName) -> Self {
        Self { node }
    }

    /// Makes the network, or completes what there is of it; nothing to do is no error.
    ///
    /// # Errors
    /// When the description does not fit the host, nothing was made. When the kernel refuses, what was made stays for
    /// another try, or for [`Networks::remove`]; the bridge comes up last.
    pub async fn ensure(&self, spec: &NetworkSpec) -> Result<(), NetworkError> {
        check(spec)?;
        let links = Links::open()?;
        let refused = |reason: String| NetworkError::Host { network: spec.name.clone(), reason };
        let bridge = links.find(&spec.bridge).await?;
        if let Some(bridge) = bridge.as_ref().filter(|bridge| !bridge.is_bridge) {
            return Err(refused(format!("{} is there and is no bridge: take another name", bridge.name)));
        }
        // Docker's, which puts it on a bridge that was there before, too. VMs need no way to their host.
        let address = spec.node_address.filter(|_| spec.containers);
        if address.is_some() {
            check_subnet(&links, spec, bridge.as_ref()).await?;
        }
        if let Some(bridge) = &bridge
            && bridge.alias.as_deref() != Some(&*self.mark(&spec.bridge))
        {
            return self.check_foreign(&links, spec, bridge).await;
        }
        let uplink = self.uplink(&links, spec).await?;
        if let Some(port) = &uplink
            && let Some(other) =
                port.bridge.filter(|other| bridge.as_ref().map(|it| it.index) != Some(*other))
        {
            let other = links.name_of(other).await?;
            return Err(refused(format!(
                "{} is a port of the bridge {other} already: take {other} as the network's bridge, or give the network \
                 another interface or a VLAN",
                port.name
            )));
        }
        let bridge = match bridge {
            Some(bridge) => bridge,
            None => self.create(&links, spec).await?,
        };
        if let Some(port) = &uplink {
            if let Some(mtu) = spec.mtu {
                links.set_mtu(port, mtu).await?; // a bridge has no larger one than its ports
            }
            links.join(port, &bridge).await?;
        }
        if let Some(mtu) = spec.mtu {
            links.set_mtu(&bridge, mtu).await?;
        }
        if let Some(address) = address {
            links.add_address(&bridge, address, spec.subnet.1).await?;
        }
        links.set_up(&bridge).await
    }

    /// Removes the network on `bridge` if [`Networks::ensure`] made it; what is not there, or was there before, is no
    /// error.
    ///
    /// # Errors
    /// [`NetworkError::InUse`] while an instance is connected.
    pub async fn remove(&self, bridge: &str) -> Result<(), NetworkError> {
        let links = Links::open()?;
        let mark = self.mark(bridge);
        let all = links.all().await?;
        let ours: Vec<&Link> = all.iter().filter(|link| link.alias.as_deref() == Some(&*mark)).collect();
        for bridge in ours.iter().filter(|link| link.is_bridge) {
            // An interface of the host is a port that stays; taps and veths are instances.
            let instances = all.iter().filter(|port| port.bridge == Some(bridge.index) && port.is_instance);
            let ports: Vec<String> = instances.map(|port| port.name.clone()).collect();
            if !ports.is_empty() {
                return Err(NetworkError::InUse { bridge: bridge.name.clone(), ports });
            }
        }
        for link in ours {
            links.delete(link).await?;
        }
        self.remove_half_made(&links, bridge).await
    }

    /// The bridges of this node's networks: those that [`Networks::ensure`] made, also in an earlier process.
    pub async fn list(&self) -> Result<Vec<String>, NetworkError> {
        let links = Links::open()?.all().await?;
        let ours =
            links.into_iter().filter(|link| link.is_bridge && link.alias == Some(self.mark(&link.name)));
        Ok(ours.map(|link| link.name).collect())
    }

    /// The alias of everything that belongs to a network of this node.
    fn mark(&self, bridge: &str) -> String {
        format!("{MARK}:{}:{bridge}", self.node)
    }

    /// Makes a marked bridge. It has another name until it is marked: a device of its final name without a mark is
    /// somebody else's, even after this process was killed at any moment.
    async fn create(&self, links: &Links, spec: &NetworkSpec) -> Result<Link, NetworkError> {
        self.remove_half_made(links, &spec.bridge).await?;
        let (half_made, digest) = self.half_made(&spec.bridge);
        // An address of its own (locally administered), or the bridge would change it with every port that comes.
        let [a, b, c, d, e, ..] = *digest.as_bytes();
        links.create_bridge(&half_made, [0x02, a, b, c, d, e]).await?;
        self.finish(links, spec, &half_made, &spec.bridge).await
    }

    /// The name of what is being made for the network on `bridge`, and what it comes of.
    fn half_made(&self, bridge: &str) -> (String, blake3::Hash) {
        let digest = blake3::hash(self.mark(bridge).as_bytes());
        (format!("bcnew{}", &digest.to_hex()[..8]), digest)
    }

    /// Removes what a process has left that was killed before it had marked it.
    async fn remove_half_made(&self, links: &Links, bridge: &str) -> Result<(), NetworkError> {
        match links.find(&self.half_made(bridge).0).await? {
            Some(left) => links.delete(&left).await,
            None => Ok(()),
        }
    }

    /// Marks what was made and gives it its final name.
    async fn finish(
        &self,
        links: &Links,
        spec: &NetworkSpec,
        half_made: &str,
        name: &str,
    ) -> Result<Link, NetworkError> {
        let link = links.expect(half_made).await?;
        links.mark_and_rename(&link, &self.mark(&spec.bridge), name).await?;
        links.expect(name).await
    }

    /// A bridge that was there before must be as the network needs it.
    async fn check_foreign(
        &self,
        links: &Links,
        spec: &NetworkSpec,
        bridge: &Link,
    ) -> Result<(), NetworkError> {
        let refused = |reason: String| NetworkError::Host { network: spec.name.clone(), reason };
        if let Some(other) = bridge.alias.as_deref().filter(|alias| alias.starts_with(&format!("{MARK}:"))) {
            return Err(refused(format!("{} is a bridge of {other}: take another name", spec.bridge)));
        }
        let Some(uplink) = &spec.uplink else { return Ok(()) };
        let port = links.find(uplink).await?.filter(|port| port.bridge == Some(bridge.index));
        if port.is_none() || spec.vlan.is_some() {
            return Err(refused(format!(
                "the bridge {} was there before, and {uplink} is not a port of it as the network wants: add it, or \
                 leave uplink and vlan out",
                spec.bridge
            )));
        }
        Ok(())
    }
}

/// What the host has in the subnet on other devices than the network's `bridge` would be sent into the bridge.
async fn check_subnet(links: &Links, spec: &NetworkSpec, bridge: Option<&Link>) -> Result<(), NetworkError> {
    let others = links.addresses().await?.into_iter().filter(|it| bridge.is_none_or(|b| b.index != it.link));
    let mut overlapping = others.filter(|address| overlap((address.ip, address.prefix), spec.subnet));
    let Some(Address { link, ip, prefix: length }) = overlapping.next() else { return Ok(()) };
    let (subnet, prefix) = spec.subnet;
    let device = links.name_of(link).await?;
    let reason = format!(
        "{device} of this host has {ip}/{length}, and what is there could not be reached through a bridge with \
         {subnet}/{prefix}: take another subnet, or end the task that has {device}"
    );
    Err(NetworkError::Host { network: spec.name.clone(), reason })
}

/// Whether two subnets, an address and the length of a prefix each, have an address in common.
fn overlap((a, a_length): (IpAddr, u8), (b, b_length): (IpAddr, u8)) -> bool {
    let same_bits = match (a, b) {
        (IpAddr::V4(a), IpAddr::V4(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros(),
        (IpAddr::V6(a), IpAddr::V6(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros(),
        _ => return false,
    };
    same_bits >= u32::from(a_length.min(b_length))
}

/// First word of the alias of what is made here.
const MARK: &str = "bootcache";

/// Whether the kernel can have a device of this name.
fn is_device_name(name: &str) -> bool {
    (1..=DEVICE_NAME_MAX).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'/' | b':'))
        && name != "."
        && name != ".."
}

/// What is wrong with a description whatever the host.
fn check(spec: &NetworkSpec) -> Result<(), NetworkError> {
    let invalid = |reason: String| Err(NetworkError::Invalid { network: spec.name.clone(), reason });
    for name in std::iter::once(&spec.bridge).chain(&spec.uplink) {
        if !is_device_name(name) {
            return invalid(format!(
                "'{name}' is no name of a device: 1 to {DEVICE_NAME_MAX} of a-z A-Z 0-9 . _ -"
            ));
        }
    }
    let (subnet, prefix) = spec.subnet;
    if prefix > if subnet.is_ipv4() { 32 } else { 128 } {
        return invalid(format!("{subnet}/{prefix} is no subnet"));
    }
    if spec.node_address.is_some_and(|address| address.is_ipv4() != subnet.is_ipv4()) {
        return invalid(format!("the node's address is not of the family of {subnet}/{prefix}"));
    }
    if spec.uplink.as_ref() == Some(&spec.bridge) {
        return invalid(format!("{} cannot be the uplink of itself", spec.bridge));
    }
    match spec.vlan {
        Some(vlan) if !(1..=4094).contains(&vlan) => invalid(format!("VLAN {vlan} is not 1 to 4094")),
        Some(_) if spec.uplink.is_none() => {
            invalid("a VLAN is one on an uplink, and there is none".to_owned())
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A network that every host can have.
    pub(crate) fn spec() -> NetworkSpec {
        NetworkSpec {
            name: "lab".parse().unwrap(),
            bridge: "br-lab".to_owned(),
            subnet: ("10.1.0.0".parse().unwrap(), 24),
            gateway: None,
            node_address: None,
            uplink: None,
            vlan: None,
            mtu: None,
            containers: false,
        }
    }

    #[test]
    fn subnets_overlap_when_one_holds_the_other() {
        let subnet = |text: &str| {
            let (ip, length) = text.split_once('/').unwrap();
            (ip.parse().unwrap(), length.parse().unwrap())
        };
        let overlap = |a: &str, b: &str| overlap(subnet(a), subnet(b));
        assert!(overlap("10.55.0.9/24", "10.55.0.0/24"));
        assert!(overlap("10.1.2.3/32", "10.0.0.0/8") && overlap("10.0.0.1/8", "10.1.2.0/24"));
        assert!(overlap("10.1.2.3/32", "10.1.2.3/32") && overlap("fd00::1/64", "fd00::/48"));
        assert!(!overlap("10.55.1.9/24", "10.55.0.0/24") && !overlap("127.0.0.1/8", "fd00::/8"));
    }

    #[test]
    fn what_no_host_can_have_is_refused_before_anything_is_touched() {
        assert!(check(&spec()).is_ok());
        let wrong: [fn(&mut NetworkSpec); 8] = [
            |spec| spec.bridge = "a-bridge-name-of-16".to_owned(),
            |spec| spec.bridge = String::new(),
            |spec| spec.bridge = "a/b".to_owned(),
            |spec| spec.subnet.1 = 33,
            |spec| spec.node_address = Some("fd00::1".parse().unwrap()),
            |spec| spec.vlan = Some(10),
            |spec| spec.uplink = Some(spec.bridge.clone()),
            |spec| (spec.vlan, spec.uplink) = (Some(4095), Some("eth0".to_owned())),
        ];
        for change in wrong {
            let mut spec = spec();
            change(&mut spec);
            assert!(matches!(check(&spec), Err(NetworkError::Invalid { .. })), "{spec:?}");
        }
    }
}
