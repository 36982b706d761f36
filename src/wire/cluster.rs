//! What controller, agents and users say to each other (thesis, section 3.4). Wire structs only; `docs/protocol.md`
//! tells the same for other languages.
//!
//! ```text
//! asker                          answerer
//!   type, Request{id, version, body}  ──►
//!                                     ◄──  REPLY, Reply{id, ok | error}
//! ```
//!
//! One request at a time on a connection; the reply carries its id. The version stands in the first request and may
//! stand in later ones. Maps have field names; a field that is not known is an error.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::frame::FrameType;
use crate::digest::Digest;
use crate::hypervisor::{InstanceType, Nic};
use crate::image::manifest::ImageKind;
use crate::name::{HostName, ImageName};
use crate::network::NetworkSpec;
use crate::plan::Plan;

mod pages;

/// The version of this protocol. A request with another is refused.
pub const PROTOCOL_VERSION: u16 = 1;
/// Most instances of a node: in one part of a deployment, and in one report.
pub const INSTANCES_MAX: usize = 1024;
/// Longest text for a person: reasons, errors.
pub const TEXT_MAX: usize = 1024;

/// A request on its way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request<T> {
    /// Comes back in the reply; different from those before on this connection.
    pub id: u64,
    /// [`PROTOCOL_VERSION`]; needed in the first request of a connection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<u16>,
    /// What is asked.
    pub body: T,
}

/// A request of which only the id is looked at: its type or its body is not understood.
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct AnyRequest {
    /// As in [`Request`].
    pub id: u64,
    /// As in [`Request`].
    #[serde(default)]
    pub version: Option<u16>,
}

/// The answer to a request: one of the two is there.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reply<T> {
    /// The request's; 0 when the request was not readable.
    pub id: u64,
    /// What came of it.
    #[serde(default = "none", skip_serializing_if = "Option::is_none")]
    pub ok: Option<T>,
    /// Why nothing came of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Fault>,
}

fn none<T>() -> Option<T> {
    None
}

/// Why a request was not carried out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(deny_unknown_fields)]
#[error("{message}")]
pub struct Fault {
    /// What kind of reason it is.
    pub code: FaultCode,
    /// One line for a person.
    pub message: String,
}

impl Fault {
    /// A fault with its message, cut to [`TEXT_MAX`].
    pub fn new(code: FaultCode, message: impl Into<String>) -> Self {
        Self { code, message: shortened(message.into()) }
    }
}

/// `text` cut to [`TEXT_MAX`] bytes.
pub fn shortened(text: String) -> String {
    shortened_to(text, TEXT_MAX)
}

/// `text` cut to `length` bytes, and to [`TEXT_MAX`].
pub fn shortened_to(mut text: String, length: usize) -> String {
    let length = length.min(TEXT_MAX);
    if text.len() > length {
        let end = (0..=length).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        text.truncate(end);
    }
    text
}

/// What kind of reason a [`Fault`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FaultCode {
    /// This side does not know the frame type.
    UnknownType,
    /// The payload is not what the type asks for.
    Malformed,
    /// The protocol's version is another, or was not said.
    Version,
    /// The asker may not ask for that.
    Forbidden,
    /// There is no such thing.
    NotFound,
    /// The request makes no sense as it is; another one may.
    Invalid,
    /// It went wrong; the same request may succeed later.
    Failed,
}

/// A request's body: what frame type it travels in, and what answers it.
pub trait Body: Serialize + DeserializeOwned + Send + 'static {
    /// The frame type.
    const TYPE: FrameType;
    /// The answer when it was carried out.
    type Answer: Serialize + DeserializeOwned + Send + 'static;
}

/// An answer that says nothing but that it was done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Done {}

macro_rules! body {
    ($type:ty, $frame:expr, $answer:ty) => {
        impl Body for $type {
            const TYPE: FrameType = $frame;
            type Answer = $answer;
        }
    };
}

/// An address of a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Address {
    /// The address.
    pub ip: IpAddr,
    /// Hardware address of the card that has it; empty if it has none.
    pub mac: String,
}

/// A node offers to run instances. It is tested by connecting to it before it is answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegisterCompute {
    /// The node.
    pub node: HostName,
    /// Where its agent listens; the address that the connection comes from when it is left out.
    pub ip: Option<IpAddr>,
    /// The TCP port on which its agent listens.
    pub port: u16,
    /// What it can run.
    pub kinds: Vec<InstanceType>,
    /// Processors.
    pub cpus: u32,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Its addresses.
    pub addresses: Vec<Address>,
}

/// The answer to [`RegisterCompute`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Registered {
    /// The node's number in the cluster.
    pub host_id: i64,
    /// The cluster's identity. An agent takes orders for one cluster.
    pub cluster: String,
    /// Where guests report that they have booted, if anywhere.
    pub report: Option<SocketAddr>,
}

body!(RegisterCompute, FrameType::REGISTER_COMPUTE, Registered);

/// A node says which images its data plane has, and where it gives them to others.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegisterImage {
    /// The node.
    pub node: HostName,
    /// Where its data plane serves peers, if it does; the unspecified address stands for the agent's.
    pub peer: Option<SocketAddr>,
    /// What it has.
    pub images: Vec<ImageHere>,
}

body!(RegisterImage, FrameType::REGISTER_IMAGE, Done);

/// An image that a node has, or is getting.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageHere {
    /// A name of it.
    pub name: ImageName,
    /// Its identity.
    pub root: Digest,
    /// What starts from it.
    pub kind: ImageKind,
    /// Bytes that a guest sees.
    pub size: u64,
    /// Bytes of its boot cache; 0 when it has none.
    pub boot_bytes: u64,
    /// Bytes of it that are here.
    pub present: u64,
    /// Bytes of it that there are, zeroes left out.
    pub allocated: u64,
    /// All of it is here.
    pub complete: bool,
    /// What boots is here.
    pub boot_complete: bool,
    /// Bytes of it that came over the network so far.
    pub received: u64,
}

/// The controller asks a node how it is: the heartbeat.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AskNode {}

/// How a node is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeState {
    /// The node.
    pub node: HostName,
    /// The cluster that it belongs to, if it has been told.
    pub cluster: Option<String>,
    /// Bytes of memory that are free for instances.
    pub memory_free: u64,
    /// Load items (0 processor, 1 memory, 2 disk, 3 network; more may follow), each from 0 to 1.
    pub load: BTreeMap<u16, f32>,
    /// Where its data plane serves peers, if it does; see [`RegisterImage::peer`].
    pub peer: Option<SocketAddr>,
    /// Its images; left out while its data plane does not answer, which says nothing of them, nor of `peer`.
    #[serde(default)]
    pub images: Option<Vec<ImageHere>>,
    /// The tasks of which it has a part.
    pub tasks: Vec<i64>,
    /// Its instances.
    pub instances: Vec<InstanceState>,
    /// What is wrong with it, one line each, for people.
    pub troubles: Vec<String>,
}

body!(AskNode, FrameType::NODE_STATUS, NodeState);

/// The state of an instance. The diagram is in `crate::controller`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InstanceStatus {
    /// Its image is being made ready, or its hypervisor has not taken it yet.
    Preparing,
    /// It runs, and has not said yet that it is up.
    Booting,
    /// It is up.
    Running,
    /// It has ended by itself.
    Stopped,
    /// It could not be started, or did not come up.
    Failed,
    /// Its node is silent.
    Lost,
}

impl InstanceStatus {
    /// The word that people, the database and programs see.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Preparing => "preparing",
            Self::Booting => "booting",
            Self::Running => "running",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
            Self::Lost => "lost",
        }
    }

    /// Every state.
    pub const ALL: [Self; 6] =
        [Self::Preparing, Self::Booting, Self::Running, Self::Stopped, Self::Failed, Self::Lost];
}

impl std::fmt::Display for InstanceStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.word())
    }
}

/// An instance as its node sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InstanceState {
    /// Its name.
    pub name: HostName,
    /// The task that it is of.
    pub task: i64,
    /// How it is.
    pub status: InstanceStatus,
    /// Why, when it failed.
    pub reason: Option<String>,
    /// Milliseconds from the order to run it until it was up.
    pub up_ms: Option<u64>,
    /// Processors in use.
    pub cpu: f64,
    /// Bytes of memory in use.
    pub memory_bytes: u64,
    /// Bytes that it received and sent.
    pub network_bytes: [u64; 2],
}

/// A node says that instances have changed, as they do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InstancesChanged {
    /// The node.
    pub node: HostName,
    /// Those that have changed.
    pub instances: Vec<InstanceState>,
}

body!(InstancesChanged, FrameType::INSTANCE_STATUS, Done);

/// A user starts a deployment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Deploy {
    /// Chosen by the user's program, different for every deployment: the same request twice is one deployment.
    pub request: String,
    /// What to deploy.
    pub plan: Plan,
}

/// The answer to [`Deploy`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Deployed {
    /// The deployment's number.
    pub task: i64,
}

body!(Deploy, FrameType::DEPLOY, Deployed);

/// A user ends a deployment: its instances, their disks and their networks go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct End {
    /// Which.
    pub task: i64,
}

body!(End, FrameType::END, Done);

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
    /// Why, when it failed.
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

/// An image that a part needs, and who can give it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Needed {
    /// Its name.
    pub name: ImageName,
    /// Its identity: nothing else is taken for it.
    pub root: Digest,
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
    /// Network cards.
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

/// A user has images brought to nodes ahead of demand.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Prefetch {
    /// One image, now.
    Image {
        /// The image.
        image: ImageName,
        /// To these nodes; empty: all that are online.
        nodes: Vec<HostName>,
        /// Only what boots.
        boot_only: bool,
    },
    /// From now on, or no longer: the boot caches of all images on all nodes.
    Standing {
        /// Whether.
        on: bool,
    },
}

body!(Prefetch, FrameType::PREFETCH, Done);

/// The controller has a node fetch an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fetch {
    /// The cluster that gives the order.
    pub cluster: String,
    /// The image and its sources.
    pub image: Needed,
    /// Only what boots.
    pub boot_only: bool,
}

body!(Fetch, FrameType::FETCH, Done);

/// A user has the cluster forget a node that is offline: its instances are given up, and its images and its name are free
/// again. When it comes back it is a new node, and ends what it had.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Forget {
    /// The node.
    pub node: HostName,
}

body!(Forget, FrameType::FORGET, Done);
