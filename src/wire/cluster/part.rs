//! One node's part of a deployment: what it is ordered to run, and to end.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::Body;
use crate::digest::Digest;
use crate::hypervisor::{DiskBy, InstanceType, Nic};
use crate::name::{HostName, ImageName};
use crate::network::NetworkSpec;
use crate::wire::frame::FrameType;

/// An image that a part needs, and who can give it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Needed {
    /// Its name.
    pub name: ImageName,
    /// Its identity: nothing else is taken for it.
    pub root: Digest,
    /// Digest of its boot cache's heads, if it has one: no other is taken for it.
    pub boot: Option<Digest>,
    /// Bytes that a guest sees.
    pub size: u64,
    /// Nodes that have it or are getting it, the best first.
    pub sources: Vec<SocketAddr>,
}

/// When an instance counts as up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum UpWhen {
    /// Its hypervisor runs it.
    Started,
    /// It has reported to the controller.
    Report,
    /// Its serial line, or a container's log, matches the regular expression.
    Serial(String),
}

/// An instance to be run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InstanceOrder {
    /// Its name: unique in the cluster, also in time.
    pub name: HostName,
    /// VM or container.
    pub kind: InstanceType,
    /// Its image, one of the part's.
    pub image: ImageName,
    /// Virtual processors.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Bytes of a VM's disk, as many as its image has at least; left out, just as many.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_bytes: Option<u64>,
    /// Whose NBD client brings a VM its disk; left out, QEMU's own.
    #[serde(default, skip_serializing_if = "DiskBy::is_socket")]
    pub disk_by: DiskBy,
    /// Network interfaces.
    pub nics: Vec<Nic>,
    /// Environment of a container.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Command of a container; empty: the image's own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
    /// A container that may do what the host may.
    pub privileged: bool,
    /// Domain XML of the user's own, with named places.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
    /// Which of [`Part::common`] stands for environment, command and template, if one does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub common: Option<usize>,
    /// When it is up.
    pub up_when: UpWhen,
    /// Seconds after which it has failed when it is not up.
    pub time_limit_s: u32,
}

/// What instances of a group have in common, and what may be long: it is in a part once.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Common {
    /// As in [`InstanceOrder`].
    pub env: BTreeMap<String, String>,
    /// As in [`InstanceOrder`].
    pub command: Vec<String>,
    /// As in [`InstanceOrder`].
    pub template: Option<String>,
}

/// One node's part of a deployment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// The networks that its instances are on.
    pub networks: Vec<NetworkSpec>,
    /// The images that they start from.
    pub images: Vec<Needed>,
    /// What instances have in common.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub common: Vec<Common>,
    /// The instances.
    pub instances: Vec<InstanceOrder>,
    /// Where guests report, if anywhere.
    pub report: Option<SocketAddr>,
}

impl Part {
    /// The instance's order with what it has in common filled in; `None` if the part does not have that.
    pub fn whole(&self, order: &InstanceOrder) -> Option<InstanceOrder> {
        let Some(index) = order.common else { return Some(order.clone()) };
        let Common { env, command, template } = self.common.get(index)?.clone();
        Some(InstanceOrder { env, command, template, common: None, ..order.clone() })
    }
}

/// The controller has a node run its part. The same order twice changes nothing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunPart {
    /// The cluster that gives the order.
    pub cluster: String,
    /// The deployment.
    pub task: i64,
    /// What to run.
    pub part: Part,
}

/// Answer to [`RunPart`]: the node has the part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Accepted {
    /// It did not have it before.
    pub new: bool,
}

body!(RunPart, FrameType::RUN_PART, Accepted);

/// The controller has a node end its part. The same order twice changes nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndPart {
    /// The cluster that gives the order.
    pub cluster: String,
    /// The deployment.
    pub task: i64,
}

/// The answer to [`EndPart`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ended {
    /// Nothing of it is left; otherwise it is being ended.
    pub gone: bool,
}

body!(EndPart, FrameType::END_PART, Ended);

#[cfg(test)]
impl InstanceOrder {
    /// A small VM of the image `debian`, with nothing else.
    pub(crate) fn of_vm(name: &str) -> Self {
        Self {
            name: name.parse().unwrap(),
            kind: InstanceType::Vm,
            image: "debian".parse().unwrap(),
            cpus: 1,
            memory_mib: 16,
            disk_bytes: None,
            disk_by: DiskBy::Socket,
            nics: Vec::new(),
            env: BTreeMap::new(),
            command: Vec::new(),
            privileged: false,
            template: None,
            common: None,
            up_when: UpWhen::Started,
            time_limit_s: 60,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_says_nothing_of_what_an_older_agent_does_not_know_unless_it_asks_for_that() {
        let mut order = InstanceOrder::of_vm("vm-1");
        for (by, told) in [(DiskBy::Socket, None), (DiskBy::Kernel, Some("kernel"))] {
            order.disk_by = by;
            let json = serde_json::to_value(&order).unwrap();
            assert_eq!(json.get("disk_by").and_then(serde_json::Value::as_str), told);
            assert_eq!(json.get("disk_bytes"), None);
            let packed = rmp_serde::to_vec_named(&order).unwrap();
            assert_eq!(rmp_serde::from_slice::<InstanceOrder>(&packed).unwrap(), order);
        }
    }
}
