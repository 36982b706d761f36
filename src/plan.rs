//! A plan: which instances of which images on which nodes and networks, as a user writes it (`docs/plan.md`).
//!
//! [`Plan`] is the file, in TOML or JSON of the same shape; [`read`] parses it, [`check`] says what is wrong with it by
//! itself, [`place`] puts its instances on nodes, and [`expand`] turns it into each node's part. All of it is pure.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::hypervisor::{DiskBy, InstanceType};
use crate::name::{HostName, ImageName};

pub mod check;
pub mod expand;
pub mod place;
pub mod read;
mod subnet;

pub use subnet::Subnet;

/// Most instances of a plan.
pub const INSTANCES_MAX: u32 = 10_000;
/// Most networks, and most groups, of a plan.
pub const PARTS_MAX: usize = 256;
/// Largest plan, in bytes of text.
pub const TEXT_BYTES_MAX: usize = 512 << 10;

/// What a user wants to be up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Its name; the instances' names begin with it.
    pub name: HostName,
    /// The nodes that it may use; empty: all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nodes: Vec<HostName>,
    /// Its networks.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub networks: BTreeMap<HostName, Network>,
    /// Its groups of equal instances.
    pub groups: Vec<Group>,
}

/// A layer-2 network that instances share, on all nodes that have some of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// Its addresses, such as `10.0.0.0/24`.
    pub subnet: Subnet,
    /// The router of its instances.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    /// A bridge that is on the nodes already; without it, one is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bridge: Option<String>,
    /// The nodes' network interface that joins their bridges; needed when instances on several nodes are to reach each other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uplink: Option<Uplink>,
    /// VLAN on the uplink.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vlan: Option<u16>,
    /// Largest packet in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
}

/// The network interface that joins the bridges of nodes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Uplink {
    /// It has the same name on all nodes.
    Same(String),
    /// A name for each node.
    PerNode(BTreeMap<HostName, String>),
}

impl Uplink {
    /// The interface's name on `node`.
    pub fn on(&self, node: &HostName) -> Option<&str> {
        match self {
            Self::Same(nic) => Some(nic),
            Self::PerNode(nics) => nics.get(node).map(String::as_str),
        }
    }
}

/// Equal instances.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// Its name; the instances' names have it.
    pub name: HostName,
    /// VMs or containers.
    #[serde(rename = "type")]
    pub kind: InstanceType,
    /// What they start from.
    pub image: ImageName,
    /// How many, placed where memory is free and load low; `nodes` may say how many where instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub count: Option<u32>,
    /// The nodes that they may be on, or how many on which.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nodes: Option<GroupNodes>,
    /// Virtual processors.
    #[serde(default = "one")]
    pub cpus: u32,
    /// Memory, such as `512M`.
    #[serde(default)]
    pub memory: Memory,
    /// Size of a VM's disk, such as `8G`, the image's at least; without it, as large as the image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<DiskSize>,
    /// Whose NBD client brings a VM its disk: `socket`, QEMU's own, or `kernel`, as a `/dev/nbdX` of its node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_by: Option<DiskBy>,
    /// Its network interfaces, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub networks: Vec<GroupNic>,
    /// Environment of containers.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Command of containers; without it, the image's own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
    /// Containers that may do what the host may; the controller must allow it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub privileged: bool,
    /// Domain XML of the user's own for VMs: a file's path in a plan file, its text once it is read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
    /// When they are up: `started`, `report`, or `serial:REGEX`.
    #[serde(default)]
    pub until: UntilUp,
    /// Seconds after which one that is not up has failed.
    #[serde(default = "ten_minutes")]
    pub time_limit: u32,
}

const fn one() -> u32 {
    1
}

const fn ten_minutes() -> u32 {
    600
}

/// Where the instances of a group go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum GroupNodes {
    /// To any of these.
    Any(Vec<HostName>),
    /// So many to each.
    Counts(BTreeMap<HostName, u32>),
}

/// A network interface of the instances of a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupNic {
    /// Its network.
    pub network: HostName,
    /// The first instance's address; the others have those that follow. Without it, free ones are taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
}

/// An amount of memory in MiB; written as `512M`, `2G`, or a number of MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory(pub u32);

impl Default for Memory {
    fn default() -> Self {
        Self(512)
    }
}

impl Serialize for Memory {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32(self.0)
    }
}

impl<'de> Deserialize<'de> for Memory {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        mebibytes(deserializer, "memory is a number of MiB, or one with M or G, such as \"512M\"").map(Self)
    }
}

/// The size of a disk in MiB; written as [`Memory`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskSize(pub u32);

impl DiskSize {
    /// The same in bytes.
    pub const fn bytes(self) -> u64 {
        (self.0 as u64) << 20
    }
}

impl Serialize for DiskSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32(self.0)
    }
}

impl<'de> Deserialize<'de> for DiskSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        mebibytes(deserializer, "disk is a number of MiB, or one with M or G, such as \"8G\"").map(Self)
    }
}

/// A number of MiB; `rule` is what to say of anything else.
fn mebibytes<'de, D: Deserializer<'de>>(deserializer: D, rule: &str) -> Result<u32, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Written {
        Number(u32),
        Text(String),
    }
    match Written::deserialize(deserializer).map_err(|_| serde::de::Error::custom(rule))? {
        Written::Number(mib) => Ok(mib),
        Written::Text(text) => {
            let (digits, factor) = match text.strip_suffix('G') {
                Some(digits) => (digits, 1024),
                None => (text.strip_suffix('M').unwrap_or(&text), 1),
            };
            let number = digits.parse::<u32>().ok().and_then(|number| number.checked_mul(factor));
            number.ok_or_else(|| serde::de::Error::custom(rule))
        }
    }
}

/// When an instance of a group is up.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum UntilUp {
    /// Its hypervisor runs it.
    #[default]
    Started,
    /// It has connected to the controller's report socket and said its name.
    Report,
    /// Its serial line, or a container's log, matches the regular expression.
    Serial(String),
}

impl Serialize for UntilUp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Started => serializer.serialize_str("started"),
            Self::Report => serializer.serialize_str("report"),
            Self::Serial(pattern) => serializer.collect_str(&format_args!("serial:{pattern}")),
        }
    }
}

impl<'de> Deserialize<'de> for UntilUp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        match text.as_str() {
            "started" => Ok(Self::Started),
            "report" => Ok(Self::Report),
            other => match other.strip_prefix("serial:") {
                Some(pattern) if !pattern.is_empty() && pattern.len() <= 1024 => {
                    match regex::Regex::new(pattern) {
                        Ok(_) => Ok(Self::Serial(pattern.to_owned())),
                        Err(_) => {
                            Err(serde::de::Error::custom("what follows serial: is not a regular expression"))
                        }
                    }
                }
                _ => Err(serde::de::Error::custom("until is \"started\", \"report\" or \"serial:REGEX\"")),
            },
        }
    }
}

impl Group {
    /// How many instances it has.
    pub fn total(&self) -> u64 {
        match &self.nodes {
            Some(GroupNodes::Counts(counts)) => counts.values().copied().map(u64::from).sum(),
            _ => u64::from(self.count.unwrap_or(1)),
        }
    }
}
