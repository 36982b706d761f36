//! The layer-2 networks that instances of a plan share (thesis, section 3.6).
//!
//! A network is a Linux bridge of the host. [`NetworkSpec`] says which; `Networks` makes and removes them.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::name::HostName;

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
    /// The address that this node's bridge gets; Docker wants one of its own on every node.
    pub node_address: Option<IpAddr>,
    /// The host's card that joins the bridges of several hosts.
    pub uplink: Option<String>,
    /// VLAN on the uplink: 1 to 4094. Needs a kernel with VLAN filtering.
    pub vlan: Option<u16>,
    /// Largest packet in bytes.
    pub mtu: Option<u32>,
}
