//! The port of a network's bridge that leads to other hosts.
//!
//! | uplink | without a VLAN | with one |
//! |---|---|---|
//! | an interface | itself | an 802.1Q device on it (`eth0.10`), which leaves the host its address |
//! | a bridge of the host | one end of a veth pair; the other is a port of that bridge | the same, and there an access port of the VLAN, where the bridge filters VLANs; else as with an interface |
//!
//! So every network has a bridge of its own, as Docker's networks need one, and a bridge that filters VLANs carries
//! many of them over the trunk that it has.

use super::links::{Address, Link, Links};
use super::{DEVICE_NAME_MAX, MARK, NetworkError, NetworkSpec, Networks};

impl Networks {
    /// The device that is to be the bridge's port to other hosts, made if it has to be.
    pub(super) async fn uplink(
        &self,
        links: &Links,
        spec: &NetworkSpec,
    ) -> Result<Option<Link>, NetworkError> {
        let Some(name) = &spec.uplink else { return Ok(None) };
        let Some(uplink) = links.find(name).await? else {
            return Err(refused(spec, format!("this host has no network interface {name} (see `ip link`)")));
        };
        match spec.vlan {
            Some(vlan) if !self.is_patched(links, spec, &uplink, vlan).await? => {
                self.vlan_device(links, spec, &uplink, vlan).await.map(Some)
            }
            _ if uplink.is_bridge => self.patch(links, spec, &uplink).await.map(Some),
            _ => {
                check_address(links, spec, &uplink).await?;
                Ok(Some(uplink))
            }
        }
    }

    /// Whether a network in `vlan` is joined to `uplink` by a port of it: that is a bridge which filters VLANs, and no
    /// 802.1Q device on it was made for the network before.
    async fn is_patched(
        &self,
        links: &Links,
        spec: &NetworkSpec,
        uplink: &Link,
        vlan: u16,
    ) -> Result<bool, NetworkError> {
        if !uplink.is_bridge || !uplink.vlan_filter.is_some_and(|filter| filter.on) {
            return Ok(false);
        }
        let earlier = links.find(&vlan_device_name(uplink, vlan)).await?;
        Ok(earlier.is_none_or(|link| link.alias != Some(self.mark(&spec.bridge))))
    }

    async fn vlan_device(
        &self,
        links: &Links,
        spec: &NetworkSpec,
        interface: &Link,
        vlan: u16,
    ) -> Result<Link, NetworkError> {
        let port = vlan_device_name(interface, vlan);
        if let Some(link) = self.made_before(links, spec, &port).await? {
            return Ok(link);
        }
        let half_made = self.half_made(&spec.bridge).0;
        if !links.create_vlan(&half_made, interface, vlan).await? {
            return Err(refused(
                spec,
                "this kernel has no VLANs (CONFIG_VLAN_8021Q, module 8021q): leave vlan out, or give each network an \
                 interface of its own"
                    .to_owned(),
            ));
        }
        links.set_up(interface).await?;
        self.finish(links, spec, &half_made, &port).await
    }

    /// A veth pair between the network's bridge and `uplink`, another bridge; gives the end for the network's.
    async fn patch(&self, links: &Links, spec: &NetworkSpec, uplink: &Link) -> Result<Link, NetworkError> {
        if let Some(other) = uplink.alias.as_deref().filter(|alias| alias.starts_with(&format!("{MARK}:"))) {
            return Err(refused(
                spec,
                format!("{} is a bridge of {other}: take another uplink", uplink.name),
            ));
        }
        let filters = spec.vlan.zip(uplink.vlan_filter.map(|filter| filter.default_vlan));
        if let (Some(mtu), Some(most)) = (spec.mtu, uplink.mtu)
            && mtu > most
        {
            return Err(refused(
                spec,
                format!(
                    "its uplink, the bridge {}, has an MTU of {most}: take that for mtu, or less",
                    uplink.name
                ),
            ));
        }
        let (near, far) = self.patch_names(spec, &uplink.name);
        let port = match self.made_before(links, spec, &near).await? {
            Some(port) => port,
            None => {
                let half_made = self.half_made(&spec.bridge).0;
                links.create_veth(&half_made, &far).await?;
                links.mark(&links.expect(&far).await?, &self.mark(&spec.bridge)).await?;
                self.finish(links, spec, &half_made, &near).await?
            }
        };
        let other = links.expect(&far).await?;
        if let Some(mtu) = uplink.mtu {
            // A bridge whose MTU nobody has set has that of its smallest port.
            links.set_mtu(&other, mtu).await?;
            links.set_mtu(&port, spec.mtu.unwrap_or(mtu)).await?;
        }
        links.join(&other, uplink).await?;
        if let Some((vlan, default_vlan)) = filters {
            links.set_access_vlan(&other, vlan, default_vlan).await?;
        }
        Ok(port)
    }

    /// The device of that name, if this node's network made it; what an earlier try has left of it is removed.
    async fn made_before(
        &self,
        links: &Links,
        spec: &NetworkSpec,
        name: &str,
    ) -> Result<Option<Link>, NetworkError> {
        match links.find(name).await? {
            Some(link) if link.alias == Some(self.mark(&spec.bridge)) => Ok(Some(link)),
            Some(_) => {
                Err(refused(spec, format!("{name} was there before: take another VLAN, or remove it")))
            }
            None => {
                self.remove_half_made(links, &spec.bridge).await?;
                Ok(None)
            }
        }
    }

    /// The names of a veth pair's ends, on the network's bridge and on its uplink.
    fn patch_names(&self, spec: &NetworkSpec, uplink: &str) -> (String, String) {
        let which = format!("{} {uplink} {:?}", self.mark(&spec.bridge), spec.vlan);
        let digest = &blake3::hash(which.as_bytes()).to_hex()[..8];
        (format!("bcnet{digest}"), format!("bcupl{digest}"))
    }
}

/// In a bridge the address of an interface would stop working, and with it maybe the operator's own connection.
async fn check_address(links: &Links, spec: &NetworkSpec, interface: &Link) -> Result<(), NetworkError> {
    let mut all = links.addresses().await?.into_iter();
    let address = all.find(|address| address.link == interface.index && !is_link_local(address.ip));
    match address.filter(|_| interface.bridge.is_none()) {
        None => Ok(()),
        Some(Address { ip, .. }) => Err(refused(
            spec,
            format!(
                "{0} has the host's address {ip}, which would stop working in a bridge: give the network an interface \
                 of its own or a VLAN, or name a bridge that has {0} in it",
                interface.name
            ),
        )),
    }
}

fn refused(spec: &NetworkSpec, reason: String) -> NetworkError {
    NetworkError::Host { network: spec.name.clone(), reason }
}

fn is_link_local(address: std::net::IpAddr) -> bool {
    match address {
        std::net::IpAddr::V4(address) => address.is_link_local(),
        std::net::IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

/// Name of the 802.1Q device for a VLAN on an interface: `eth0.10`, or by the interface's number where that is too long.
fn vlan_device_name(interface: &Link, vlan: u16) -> String {
    let name = format!("{}.{vlan}", interface.name);
    if name.len() <= DEVICE_NAME_MAX { name } else { format!("bc{}.{vlan}", interface.index) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_made_has_names_that_linux_can_hold() {
        let interface = |name: &str| {
            let mut interface = Link::default();
            (interface.name, interface.index) = (name.to_owned(), 7);
            interface
        };
        assert_eq!(vlan_device_name(&interface("eth0"), 10), "eth0.10");
        assert_eq!(vlan_device_name(&interface("enp175s0f0np0"), 4094), "bc7.4094");
        let spec = crate::network::tests::spec();
        let (near, far) = Networks::new("n1".parse().unwrap()).patch_names(&spec, "vmbr0");
        assert!(near != far && near.len().max(far.len()) <= DEVICE_NAME_MAX);
    }
}
