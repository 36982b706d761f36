//! What there is, as users ask for it: nodes, images, tasks, instances. Lists may be longer than a frame: then the rest is
//! asked for behind the last row.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{Body, ImageHere, InstanceStatus};
use crate::digest::Digest;
use crate::hypervisor::InstanceType;
use crate::image::manifest::ImageKind;
use crate::name::{HostName, ImageName};
use crate::wire::frame::FrameType;

/// A user asks what there is. An answer has as many rows as fit; those that follow are asked for with `after`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Query {
    /// The nodes, by name.
    Nodes {
        /// Only those behind this one.
        #[serde(default)]
        after: Option<HostName>,
    },
    /// The images, and who has them, by name.
    Images {
        /// Only those behind this one.
        #[serde(default)]
        after: Option<ImageName>,
    },
    /// The tasks, by number; of one, its nodes too.
    Tasks {
        /// Only this one.
        #[serde(default)]
        task: Option<i64>,
        /// Only those behind this one.
        #[serde(default)]
        after: Option<i64>,
    },
    /// The instances, by number.
    Instances {
        /// Only those of this task.
        #[serde(default)]
        task: Option<i64>,
        /// Only those behind this one.
        #[serde(default)]
        after: Option<i64>,
    },
}

/// The answer to [`Query`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Found {
    /// To [`Query::Nodes`].
    Nodes(Vec<NodeRow>),
    /// To [`Query::Images`].
    Images(Vec<ImageRow>),
    /// To [`Query::Tasks`].
    Tasks(Vec<TaskRow>),
    /// To [`Query::Instances`].
    Instances(Vec<InstanceRow>),
}

body!(Query, FrameType::QUERY_STATUS, Found);

/// A node, as users see it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeRow {
    /// Its number.
    pub host_id: i64,
    /// Its name.
    pub name: HostName,
    /// It answers.
    pub online: bool,
    /// Where its agent listens.
    pub address: String,
    /// What it runs.
    pub kinds: Vec<InstanceType>,
    /// Processors.
    pub cpus: u32,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Bytes of it that are free.
    pub memory_free: u64,
    /// Load items.
    pub load: BTreeMap<u16, f32>,
    /// The weighted score of the load, from 0 to 1.
    pub score: f32,
    /// Instances on it.
    pub instances: u64,
    /// Images on it, and being fetched to it.
    pub images: Vec<ImageHere>,
    /// Milliseconds since it answered last.
    pub silent_ms: u64,
    /// What is wrong with it.
    pub troubles: Vec<String>,
}

/// An image, as users see it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageRow {
    /// Its name.
    pub name: ImageName,
    /// Its identity.
    pub root: Digest,
    /// What starts from it.
    pub kind: ImageKind,
    /// Bytes that a guest sees.
    pub size: u64,
    /// Bytes of its boot cache; 0 when it has none.
    pub boot_bytes: u64,
    /// The nodes that have all of it.
    pub complete: Vec<HostName>,
    /// The nodes that have a part of it.
    pub partial: Vec<HostName>,
}

/// The state of a task. The diagram is in `crate::controller`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaskStatus {
    /// Not all of its instances are up yet.
    Starting,
    /// All were up.
    Running,
    /// Some failed, and none is on its way any more.
    Failed,
    /// It is being ended.
    Ending,
}

impl TaskStatus {
    /// The word that people, the database and programs see.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Failed => "failed",
            Self::Ending => "ending",
        }
    }

    /// Every state.
    pub const ALL: [Self; 4] = [Self::Starting, Self::Running, Self::Failed, Self::Ending];
}

impl std::fmt::Display for TaskStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.word())
    }
}

/// A task, as users see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskRow {
    /// Its number.
    pub task: i64,
    /// The plan's name.
    pub name: HostName,
    /// How it is.
    pub status: TaskStatus,
    /// Milliseconds since 1970 at which it was ordered.
    pub created_ms: u64,
    /// Milliseconds from then until its last instance was up, once all are.
    pub up_ms: Option<u64>,
    /// Its instances by state.
    pub instances: BTreeMap<InstanceStatus, u64>,
    /// The same on each node.
    pub nodes: BTreeMap<HostName, BTreeMap<InstanceStatus, u64>>,
}

/// An instance, as users see it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InstanceRow {
    /// Its number.
    pub inst_id: i64,
    /// Its name.
    pub name: HostName,
    /// Whether it is a VM or a container.
    pub kind: InstanceType,
    /// Its image.
    pub image: ImageName,
    /// Its task.
    pub task: i64,
    /// Its node.
    pub node: HostName,
    /// How it is.
    pub status: InstanceStatus,
    /// Why it failed, or is not as it should be.
    pub reason: Option<String>,
    /// Milliseconds from the order to deploy until it was up.
    pub up_ms: Option<u64>,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Processors in use.
    pub cpu: f64,
    /// Bytes of memory in use.
    pub memory_bytes: u64,
    /// Bytes that it received and sent.
    pub network_bytes: [u64; 2],
}

impl Query {
    /// All nodes.
    pub const fn nodes() -> Self {
        Self::Nodes { after: None }
    }

    /// All images.
    pub const fn images() -> Self {
        Self::Images { after: None }
    }

    /// All tasks, or one.
    pub const fn tasks(task: Option<i64>) -> Self {
        Self::Tasks { task, after: None }
    }

    /// All instances, or those of one task.
    pub const fn instances(task: Option<i64>) -> Self {
        Self::Instances { task, after: None }
    }

    /// What asks for the rows behind those of `found`, which answered this; `None` when that was all.
    pub fn behind(&self, found: &Found) -> Option<Self> {
        match (self, found) {
            (Self::Nodes { .. }, Found::Nodes(rows)) => {
                rows.last().map(|row| Self::Nodes { after: Some(row.name.clone()) })
            }
            (Self::Images { .. }, Found::Images(rows)) => {
                rows.last().map(|row| Self::Images { after: Some(row.name.clone()) })
            }
            (Self::Tasks { task: None, .. }, Found::Tasks(rows)) => {
                rows.last().map(|row| Self::Tasks { task: None, after: Some(row.task) })
            }
            (Self::Instances { task, .. }, Found::Instances(rows)) => {
                rows.last().map(|row| Self::Instances { task: *task, after: Some(row.inst_id) })
            }
            _ => None,
        }
    }
}

impl Found {
    /// Adds the rows of `more`; false if they are of another list.
    pub fn extend(&mut self, more: Self) -> bool {
        match (self, more) {
            (Self::Nodes(rows), Self::Nodes(more)) => rows.extend(more),
            (Self::Images(rows), Self::Images(more)) => rows.extend(more),
            (Self::Tasks(rows), Self::Tasks(more)) => rows.extend(more),
            (Self::Instances(rows), Self::Instances(more)) => rows.extend(more),
            _ => return false,
        }
        true
    }
}
