//! The few calls of rtnetlink that networks need, each with a deadline, and with errors that name what was tried.

use std::net::IpAddr;
use std::time::Duration;

use futures_util::TryStreamExt;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::{
    BridgeVlanInfoFlags, InfoBridge, InfoData, InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use rtnetlink::{Handle, LinkBridge, LinkBridgeVlan, LinkMessageBuilder, LinkUnspec, LinkVeth, LinkVlan};
use rustix::io::Errno;

use super::NetworkError;

/// Longest wait for the kernel, which may hold its lock while it takes a large namespace down.
const DEADLINE: Duration = Duration::from_secs(20);

/// A device of the host.
#[derive(Debug, Clone, Default)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) alias: Option<String>,
    pub(super) is_bridge: bool,
    /// Whether it is an instance's interface, and not one of the host's.
    pub(super) is_instance: bool,
    /// The index of the bridge (or bond) that it is a port of.
    pub(super) bridge: Option<u32>,
    pub(super) mtu: Option<u32>,
    /// Of a bridge whose kernel can filter VLANs.
    pub(super) vlan_filter: Option<VlanFilter>,
    is_up: bool,
}

/// How a bridge filters VLANs.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct VlanFilter {
    /// Whether it does.
    pub(super) on: bool,
    /// The VLAN that every new port gets; 0: none.
    pub(super) default_vlan: u16,
}

impl VlanFilter {
    fn new(attributes: &[InfoBridge]) -> Option<Self> {
        let mut filter = None;
        for attribute in attributes {
            match attribute {
                InfoBridge::VlanFiltering(on) => filter.get_or_insert_with(Self::default).on = *on,
                InfoBridge::VlanDefaultPvid(vlan) => {
                    filter.get_or_insert_with(Self::default).default_vlan = *vlan;
                }
                _ => {}
            }
        }
        filter
    }
}

impl Link {
    fn new(message: LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            is_up: message.header.flags.contains(LinkFlags::Up),
            ..Self::default()
        };
        let mut kind = None;
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::IfAlias(alias) => link.alias = Some(alias),
                LinkAttribute::Controller(bridge) => link.bridge = (bridge != 0).then_some(bridge),
                LinkAttribute::Mtu(mtu) => link.mtu = Some(mtu),
                LinkAttribute::LinkInfo(infos) => {
                    for info in infos {
                        match info {
                            LinkInfo::Kind(it) => kind = Some(it),
                            LinkInfo::Data(InfoData::Bridge(bridge)) => {
                                link.vlan_filter = VlanFilter::new(&bridge)
                            }
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        link.is_bridge = kind == Some(InfoKind::Bridge);
        link.is_instance = match kind {
            Some(InfoKind::Tun) => true,
            // Docker's name for the host's end of a container's interface; other veths are cables of the host.
            Some(InfoKind::Veth) => link.name.starts_with("veth"),
            _ => false,
        };
        link
    }
}

/// An address of the host.
#[derive(Debug, Clone, Copy)]
pub(super) struct Address {
    /// The index of the device that has it.
    pub(super) link: u32,
    pub(super) ip: IpAddr,
    /// The length of its subnet's prefix.
    pub(super) prefix: u8,
}

/// A conversation with the kernel about devices.
pub(super) struct Links {
    handle: Handle,
    connection: tokio::task::JoinHandle<()>,
}

impl Drop for Links {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Links {
    /// Talks about the network namespace of the calling thread.
    pub(super) fn open() -> Result<Self, NetworkError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(|error| NetworkError::Kernel {
            action: "open a netlink socket".to_owned(),
            reason: error.to_string(),
        })?;
        Ok(Self { handle, connection: tokio::spawn(connection) })
    }

    /// All devices.
    pub(super) async fn all(&self) -> Result<Vec<Link>, NetworkError> {
        let links = self.handle.link().get().execute().map_ok(Link::new).try_collect();
        call(|| "list network devices".to_owned(), links).await
    }

    /// The device of that name.
    pub(super) async fn find(&self, name: &str) -> Result<Option<Link>, NetworkError> {
        let mut found = self.handle.link().get().match_name(name).execute();
        let looked = async {
            match found.try_next().await {
                Err(rtnetlink::Error::NetlinkError(error)) if errno(&error) == Some(Errno::NODEV) => Ok(None),
                other => other,
            }
        };
        Ok(call(|| format!("look for {name}"), looked).await?.map(Link::new))
    }

    /// The device of that name, which was there a moment ago.
    pub(super) async fn expect(&self, name: &str) -> Result<Link, NetworkError> {
        self.find(name).await?.ok_or_else(|| NetworkError::Kernel {
            action: format!("find {name}"),
            reason: "it was removed meanwhile".to_owned(),
        })
    }

    /// The name of the device with that index.
    pub(super) async fn name_of(&self, index: u32) -> Result<String, NetworkError> {
        let found = self.all().await?.into_iter().find(|link| link.index == index);
        Ok(found.map_or_else(|| format!("number {index}"), |link| link.name))
    }

    /// A bridge that is down, with that hardware address.
    pub(super) async fn create_bridge(&self, name: &str, mac: [u8; 6]) -> Result<(), NetworkError> {
        let message = LinkMessageBuilder::<LinkBridge>::new(name).address(mac.to_vec()).build();
        call(|| format!("make the bridge {name}"), self.handle.link().add(message).execute()).await
    }

    /// An 802.1Q device that is down; false if the kernel knows no VLANs.
    pub(super) async fn create_vlan(
        &self,
        name: &str,
        interface: &Link,
        vlan: u16,
    ) -> Result<bool, NetworkError> {
        let message = LinkVlan::new(name, interface.index, vlan).build();
        let made = async {
            match self.handle.link().add(message).execute().await {
                Err(rtnetlink::Error::NetlinkError(error)) if errno(&error) == Some(Errno::OPNOTSUPP) => {
                    Ok(false)
                }
                other => other.map(|()| true),
            }
        };
        call(|| format!("make VLAN {vlan} on {}", interface.name), made).await
    }

    /// A veth pair whose ends are down.
    pub(super) async fn create_veth(&self, name: &str, peer: &str) -> Result<(), NetworkError> {
        let made = self.handle.link().add(LinkVeth::new(name, peer).build()).execute();
        call(|| format!("make the veth pair {name}, {peer}"), made).await
    }

    /// Makes a port of a bridge that filters VLANs an access port of `vlan`: what comes in untagged is in it, and what goes
    /// out of it is untagged. It leaves `default_vlan`, which it got as it became a port.
    pub(super) async fn set_access_vlan(
        &self,
        port: &Link,
        vlan: u16,
        default_vlan: u16,
    ) -> Result<(), NetworkError> {
        let access = BridgeVlanInfoFlags::Pvid | BridgeVlanInfoFlags::Untagged;
        let message = LinkBridgeVlan::new(port.index).vlan(vlan, access).build();
        let set = self.handle.link().set(message).execute();
        call(|| format!("make {} a port of VLAN {vlan}", port.name), set).await?;
        if default_vlan == 0 || default_vlan == vlan {
            return Ok(());
        }
        let message =
            LinkBridgeVlan::new(port.index).vlan(default_vlan, BridgeVlanInfoFlags::empty()).build();
        let left = async {
            match self.handle.link().del_with_message(message).execute().await {
                Err(rtnetlink::Error::NetlinkError(error)) if errno(&error) == Some(Errno::NOENT) => Ok(()),
                other => other,
            }
        };
        call(|| format!("take {} out of VLAN {default_vlan}", port.name), left).await
    }

    /// Gives a device an alias.
    pub(super) async fn mark(&self, link: &Link, mark: &str) -> Result<(), NetworkError> {
        let change = LinkUnspec::new_with_index(link.index);
        self.change(|| format!("mark {}", link.name), change.alias(mark)).await
    }

    /// Gives a device that is down an alias, and then another name.
    pub(super) async fn mark_and_rename(
        &self,
        link: &Link,
        mark: &str,
        name: &str,
    ) -> Result<(), NetworkError> {
        self.mark(link, mark).await?;
        let change = LinkUnspec::new_with_index(link.index);
        self.change(|| format!("give {} the name {name}", link.name), change.name(name)).await
    }

    /// Makes a device a port of a bridge, and brings it up.
    pub(super) async fn join(&self, port: &Link, bridge: &Link) -> Result<(), NetworkError> {
        if port.bridge == Some(bridge.index) && port.is_up {
            return Ok(());
        }
        let change = LinkUnspec::new_with_index(port.index).controller(bridge.index).up();
        self.change(|| format!("make {} a port of {}", port.name, bridge.name), change).await
    }

    pub(super) async fn set_mtu(&self, link: &Link, mtu: u32) -> Result<(), NetworkError> {
        if link.mtu == Some(mtu) {
            return Ok(());
        }
        let change = LinkUnspec::new_with_index(link.index).mtu(mtu);
        self.change(|| format!("set the MTU of {} to {mtu}", link.name), change).await
    }

    pub(super) async fn set_up(&self, link: &Link) -> Result<(), NetworkError> {
        if link.is_up {
            return Ok(());
        }
        self.change(|| format!("bring {} up", link.name), LinkUnspec::new_with_index(link.index).up()).await
    }

    pub(super) async fn delete(&self, link: &Link) -> Result<(), NetworkError> {
        let deleted = async {
            match self.handle.link().del(link.index).execute().await {
                Err(rtnetlink::Error::NetlinkError(error)) if errno(&error) == Some(Errno::NODEV) => Ok(()),
                other => other,
            }
        };
        call(|| format!("remove {}", link.name), deleted).await
    }

    /// The addresses of all devices.
    pub(super) async fn addresses(&self) -> Result<Vec<Address>, NetworkError> {
        let found = self.handle.address().get().execute();
        let addresses = found.try_fold(Vec::new(), |mut addresses, message| async move {
            let (link, prefix) = (message.header.index, message.header.prefix_len);
            addresses.extend(message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Address(ip) => Some(Address { link, ip: *ip, prefix }),
                _ => None,
            }));
            Ok(addresses)
        });
        call(|| "list the host's addresses".to_owned(), addresses).await
    }

    /// Gives a device an address; one that it has is no error.
    pub(super) async fn add_address(
        &self,
        link: &Link,
        address: IpAddr,
        prefix: u8,
    ) -> Result<(), NetworkError> {
        let added = async {
            match self.handle.address().add(link.index, address, prefix).execute().await {
                Err(rtnetlink::Error::NetlinkError(error)) if errno(&error) == Some(Errno::EXIST) => Ok(()),
                other => other,
            }
        };
        call(|| format!("give {} the address {address}/{prefix}", link.name), added).await
    }

    async fn change(
        &self,
        action: impl Fn() -> String,
        change: LinkMessageBuilder<LinkUnspec>,
    ) -> Result<(), NetworkError> {
        call(action, self.handle.link().set(change.build()).execute()).await
    }
}

/// What the kernel said, as the number that it gave.
fn errno(error: &rtnetlink::packet_core::ErrorMessage) -> Option<Errno> {
    error.code.map(|code| Errno::from_raw_os_error(code.get().abs()))
}

async fn call<T>(
    action: impl Fn() -> String,
    work: impl Future<Output = Result<T, rtnetlink::Error>>,
) -> Result<T, NetworkError> {
    let reason = match tokio::time::timeout(DEADLINE, work).await {
        Ok(Ok(done)) => return Ok(done),
        Ok(Err(rtnetlink::Error::NetlinkError(error))) => match errno(&error) {
            Some(Errno::PERM | Errno::ACCESS) => return Err(NetworkError::NotAllowed),
            _ => error.to_io().to_string(),
        },
        Ok(Err(error)) => error.to_string(),
        Err(_elapsed) => format!("the kernel did not answer within {DEADLINE:?}"),
    };
    Err(NetworkError::Kernel { action: action(), reason })
}
