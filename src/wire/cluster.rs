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
use crate::hypervisor::InstanceType;
use crate::image::manifest::ImageKind;
use crate::name::{HostName, ImageName};
use crate::plan::Plan;

macro_rules! body {
    ($type:ty, $frame:expr, $answer:ty) => {
        impl Body for $type {
            const TYPE: FrameType = $frame;
            type Answer = $answer;
        }
    };
}

mod list;
mod part;

pub use list::{Found, ImageRow, InstanceRow, NodeRow, Query, TaskRow, TaskStatus};
pub use part::{Accepted, Common, EndPart, Ended, InstanceOrder, Needed, Part, RunPart, UpWhen};

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
    /// For a person; a line for each thing that is wrong.
    pub message: String,
}

impl Fault {
    /// A fault with its message, as [`lines()`] has it.
    pub fn new(code: FaultCode, message: impl Into<String>) -> Self {
        Self { code, message: lines(message.into().lines()) }
    }
}

/// As [`shortened_to`] [`TEXT_MAX`] bytes.
pub fn shortened(text: String) -> String {
    shortened_to(text, TEXT_MAX)
}

/// `text` as one line, cut to `length` bytes, and to [`TEXT_MAX`]. Spaces take the place of control characters: a terminal
/// would obey them, and a list would have lines that nobody has said.
pub fn shortened_to(text: String, length: usize) -> String {
    cut(text.replace(char::is_control, " "), length.min(TEXT_MAX))
}

/// Several texts, each as one line of its own, cut together to [`TEXT_MAX`] bytes.
pub fn lines<T: AsRef<str>>(texts: impl IntoIterator<Item = T>) -> String {
    let lines: Vec<_> = texts.into_iter().map(|text| text.as_ref().replace(char::is_control, " ")).collect();
    cut(lines.join("\n"), TEXT_MAX)
}

fn cut(mut text: String, length: usize) -> String {
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

/// An address of a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Address {
    /// The address.
    pub ip: IpAddr,
    /// Hardware address of the interface that has it; empty if it has none.
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
    /// Digest of its boot cache's heads, if it has one.
    #[serde(default)]
    pub boot: Option<Digest>,
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
    /// The highest number of a task of the cluster that it has, or remembers to have ended, if it knows of any: a controller
    /// whose database was restored gives none of them again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_task: Option<i64>,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_of_others_commands_a_terminal() {
        let said = "gone\x1b[2J\r\nnode 'n2' is fine\u{9b}1m\x7f".to_owned();
        let plain = "gone [2J  node 'n2' is fine 1m ";
        assert_eq!(shortened(said.clone()), plain);
        assert_eq!(shortened_to(said.clone(), 4), "gone");
        assert_eq!(lines([&said, "more"]), format!("{plain}\nmore"));
        let fault = Fault::new(FaultCode::Invalid, "one\x07\ntwo\x1b]0;x");
        assert_eq!(fault.message, "one \ntwo ]0;x");
    }

    #[test]
    fn a_text_is_cut_between_characters() {
        assert_eq!(shortened_to("aé".to_owned(), 2), "a");
        assert_eq!(shortened("é".repeat(TEXT_MAX)).len(), TEXT_MAX);
    }
}
