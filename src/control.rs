//! The local control socket: how the other commands, and the agent, talk to a running `serve`.
//!
//! One MFD frame a request ([`FrameType::LOCAL_REQUEST`]), one a reply ([`FrameType::LOCAL_REPLY`]), MessagePack with
//! field names, on the Unix socket `control.sock` in the store, which only its owner may open. One request at a time
//! on a connection; a connection may send many. [`Request`] and [`Reply`] are the whole vocabulary; `crate::serve`
//! carries them out.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;

use crate::digest::Digest;
use crate::image::manifest::ImageKind;
use crate::name::{HostName, ImageName};
use crate::transfer::Pin;
use crate::wire::frame::{self, CONTROL_PAYLOAD_MAX, FrameType};
use crate::wire::io::{WireError, read_frame, write_message};

/// What a running `serve` is asked to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// What there is, and how far it is.
    Status,
    /// Makes an empty overlay on an image.
    OverlayCreate {
        /// The image below.
        image: ImageName,
        /// Name of the overlay, and of its export.
        name: HostName,
        /// Bytes that a guest sees, no fewer than the image has; left out, just as many.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        size: Option<u64>,
    },
    /// Lists overlays.
    OverlayList,
    /// Shows one overlay.
    OverlayShow {
        /// The overlay.
        name: HostName,
    },
    /// Makes an incremental image of an overlay. The overlay stays; nobody may be using it.
    OverlayCommit {
        /// The overlay.
        name: HostName,
        /// Name of the new image.
        image: ImageName,
    },
    /// Deletes an overlay that is not in use.
    OverlayRemove {
        /// The overlay.
        name: HostName,
    },
    /// Fetches an image from other nodes. Answered when it can be read, though most of it is still to come.
    Pull {
        /// Its name, there and here.
        name: ImageName,
        /// Its root, if that is known: nothing else is taken for it.
        root: Option<Digest>,
        /// Its boot cache, as far as that is known.
        #[serde(default)]
        boot: Pin,
        /// Nodes that may have it.
        sources: Vec<SocketAddr>,
        /// Fetch everything, not only what boots and what is read.
        fill: bool,
        /// Bytes a second that the fill may take; 0: as many as it was told before, and as there are before that.
        fill_rate: u64,
    },
    /// Removes a name, and with its last name the image. The transfer of one that is on its way, and that nobody uses,
    /// ends first. Other images can be removed without the daemon.
    ImageRemove {
        /// The name.
        name: ImageName,
    },
    /// Opens the VM's own socket: one export, the overlay of the same name, and no list of others.
    VmOpen {
        /// The VM, and its overlay.
        name: HostName,
        /// User that may open the socket, beside the one `serve` runs as.
        owner: Option<Owner>,
    },
    /// Closes the VM's socket. The overlay stays.
    VmClose {
        /// The VM.
        name: HostName,
    },
}

/// A user and group by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// What came of a request.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// Done, and there is nothing to say.
    Done,
    /// Not done, and why: one line for a person.
    Failed(String),
    /// Not done since somebody else does not answer, who; the same request may succeed later.
    Away(String),
    /// Answer to [`Request::Status`].
    Status(Status),
    /// Answer to [`Request::OverlayCreate`] and [`Request::OverlayShow`].
    Overlay(OverlayInfo),
    /// Answer to [`Request::OverlayList`].
    Overlays(Vec<OverlayInfo>),
    /// Answer to [`Request::OverlayCommit`] and [`Request::Pull`].
    Image {
        /// Root digest of the new image.
        root: Digest,
    },
    /// Answer to [`Request::ImageRemove`].
    Removed {
        /// Bytes that the file system got back; none when the image has other names.
        freed: Option<u64>,
    },
    /// Answer to [`Request::VmOpen`].
    Vm(VmInfo),
}

/// A node's data plane at one moment.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    /// Process id of `serve`.
    pub pid: u32,
    /// Its version.
    pub version: String,
    /// Seconds since it was ready.
    pub uptime_seconds: u64,
    /// Images in the store.
    pub images: Vec<ImageStatus>,
    /// Overlays that are open.
    pub overlays: Vec<OverlayInfo>,
    /// Sockets of VMs.
    pub vms: Vec<VmInfo>,
}

/// One image on this node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ImageStatus {
    /// A name of it.
    pub name: ImageName,
    /// Its identity.
    pub root: Digest,
    /// What starts from it.
    pub kind: ImageKind,
    /// Bytes of its boot cache; 0 when it has none.
    pub boot_bytes: u64,
    /// Digest of its boot cache's heads, if it has one.
    pub boot: Option<Digest>,
    /// All of it is here.
    pub complete: bool,
    /// Bytes that a guest sees.
    pub size: u64,
    /// Whether this node has it open.
    pub open: bool,
    /// Bytes of it that are here.
    pub present: u64,
    /// Bytes of it that there are, zeroes left out.
    pub allocated: u64,
    /// It came from another node, and was not published here.
    #[serde(default)]
    pub pulled: bool,
    /// How its transfer is doing, while it is on its way.
    pub transfer: Option<TransferStatus>,
}

/// How the transfer of an image is doing.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TransferStatus {
    /// Frames of the boot cache that are here, without a gap from the first.
    pub frames: u32,
    /// Frames of the boot cache; 0 until that is known, or when there is none.
    pub frames_total: u32,
    /// What boots is here.
    pub boot_complete: bool,
    /// Bytes of blocks that are here, zeroes included.
    pub present: u64,
    /// Bytes that came over the network: boot stream, demand, fill, digests.
    pub bytes: [u64; 4],
    /// Of these, from the node where the image was published.
    pub origin_bytes: u64,
    /// Where the time of reads went, over all VMs.
    pub waits: WaitStatus,
    /// Milliseconds that the recorded boot has to wait at least at that goodput if it begins with the stream; none before
    /// frames have come.
    pub waiting_min_ms: Option<u64>,
    /// Bytes a second of the boot stream, from the first request to the last frame.
    pub goodput: Option<u64>,
    /// Bytes that were copied from other images on this node instead.
    pub similar_bytes: u64,
    /// Requests sent to a second source because the first was slow.
    pub hedges: u64,
    /// Requests sent again because a source broke, stalled, or did not have it.
    pub failovers: u64,
    /// Answers that were wrong, and were not used.
    #[serde(alias = "lies")]
    pub corrupt: u64,
    /// Times that a source was banned.
    pub bans: u64,
    /// Why what comes cannot be kept on this node, and what to do about it; nothing is fetched meanwhile.
    #[serde(default)]
    pub trouble: Option<String>,
    /// Where it comes from.
    pub sources: Vec<SourceStatus>,
}

/// A node that an image comes from.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SourceStatus {
    /// Where it is.
    pub address: SocketAddr,
    /// What it calls itself.
    pub node: String,
    /// It answers.
    pub up: bool,
    /// Why not, as of the last attempt; none before that.
    #[serde(default)]
    pub error: Option<String>,
    /// It sent wrong bytes, and is not used for a while.
    pub banned: bool,
    /// For how long it is not used.
    #[serde(default)]
    pub banned_seconds: u64,
    /// It has everything.
    pub complete: bool,
    /// Bytes that came from it.
    pub bytes: u64,
}

impl SourceStatus {
    /// How it is, as a person is told it.
    pub fn state(&self) -> String {
        match self {
            Self { banned: true, banned_seconds, .. } => {
                format!("sent wrong bytes, not used for {banned_seconds} s")
            }
            Self { up: false, error: Some(error), .. } => error.clone(),
            Self { up: false, .. } => "not reached yet".to_owned(),
            Self { complete: true, .. } => "has everything".to_owned(),
            _ => "has a part".to_owned(),
        }
    }

    /// Whether it can be asked.
    pub const fn is_usable(&self) -> bool {
        self.up && !self.banned
    }
}

/// One overlay.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OverlayInfo {
    /// Its name.
    pub name: HostName,
    /// Root digest of the image below; none when it cannot be told.
    pub base: Option<Digest>,
    /// A name of the image below, if it has one still.
    pub image: Option<ImageName>,
    /// Bytes that a guest sees.
    pub size: u64,
    /// Bytes that the overlay holds itself; of one that nobody has opened, as of its last flush.
    pub data: u64,
    /// NBD clients that have it open.
    pub connections: u32,
    /// Read requests of its clients since the daemon started.
    pub reads: u64,
    /// Bytes that they asked for.
    pub read_bytes: u64,
    /// Bytes that its clients wrote.
    pub written_bytes: u64,
    /// Where the time of its reads went; none when its image was all here when it was opened.
    pub waits: Option<WaitStatus>,
    /// Why it cannot be used, and nothing but its name is known; none when all is well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl OverlayInfo {
    /// One that nobody has opened, and of which nothing else is known yet.
    pub(crate) fn new(name: HostName, base: Option<Digest>) -> Self {
        Self {
            name,
            base,
            image: None,
            size: 0,
            data: 0,
            connections: 0,
            reads: 0,
            read_bytes: 0,
            written_bytes: 0,
            waits: None,
            error: None,
        }
    }

    /// The image below, as a person is told it.
    pub fn below(&self) -> String {
        let root = || self.base.map_or_else(|| "-".to_owned(), |base| base.short());
        self.image.as_ref().map_or_else(root, ToString::to_string)
    }
}

/// Where the time of reads went while their image was on its way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitStatus {
    /// Reads that found everything here.
    pub hits: u64,
    /// Reads that waited for the boot stream.
    pub stream_waits: u64,
    /// Milliseconds that they waited, summed over reads.
    pub stream_wait_ms: u64,
    /// Reads that waited for a fetch of their own.
    pub demand_waits: u64,
    /// Milliseconds that they waited, summed over reads.
    pub demand_wait_ms: u64,
    /// Reads that the boot cache did not foresee.
    pub misses: u64,
    /// Milliseconds that reads took on this node's own disk when all was here but not in memory, summed over reads.
    pub local_ms: u64,
    /// Milliseconds in which at least one read waited for what was not here.
    pub blocked_ms: u64,
    /// Reads that wait now.
    pub waiting: u64,
}

/// The socket of one VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmInfo {
    /// The VM.
    pub name: HostName,
    /// Its socket.
    pub socket: PathBuf,
    /// The name of the one export behind it.
    pub export: String,
}

/// Why a request was not answered, or was refused.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// No `serve` listens there.
    #[error("no bootcache daemon runs on this store: start one with `bootcache serve`")]
    NoDaemon,
    /// The daemon said no.
    #[error("{0}")]
    Refused(String),
    /// The daemon needs somebody who does not answer.
    #[error("{0}")]
    Away(String),
    /// Whether one listens there cannot be told.
    #[error("cannot look for a bootcache daemon on {}: {source}", path.display())]
    Connect {
        /// Its socket.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The connection broke or carried nonsense.
    #[error("the bootcache daemon on {path} does not answer properly")]
    Wire {
        /// Its socket.
        path: PathBuf,
        /// What went wrong.
        #[source]
        source: WireError,
    },
    /// The daemon did not answer in time.
    #[error("the bootcache daemon did not answer within {0:?}: see its log, or restart it")]
    TimedOut(Duration),
    /// The daemon answered something else than was asked.
    #[error("the bootcache daemon answered out of turn: are both of one version?")]
    Unexpected,
}

/// How long [`Client::call`] waits for an answer.
const CALL_TIMEOUT: Duration = Duration::from_secs(600);
/// And for that to [`Request::OverlayCommit`], which reads, writes and digests all that the overlay holds.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

/// The longest path that a Unix socket can have, in bytes (`unix(7)`).
const ADDRESS_MAX: usize = 107;

/// A connection to a running `serve`.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    path: PathBuf,
}

impl Client {
    /// Connects to the daemon that listens on `path`.
    ///
    /// # Errors
    ///
    /// [`ControlError::NoDaemon`] when the socket is not there, or is left from a daemon that is gone.
    pub async fn connect(path: &Path) -> Result<Self, ControlError> {
        match UnixStream::connect(path).await {
            Ok(stream) => Ok(Self { stream, path: path.to_owned() }),
            Err(error)
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) =>
            {
                Err(ControlError::NoDaemon)
            }
            Err(error) => {
                let is_long = path.as_os_str().len() > ADDRESS_MAX;
                let said = "a socket's path may have 107 bytes: use a --store with a shorter path";
                let source = if is_long { io::Error::new(error.kind(), said) } else { error };
                Err(ControlError::Connect { path: path.to_owned(), source })
            }
        }
    }

    /// The process at the other end; `None` where the kernel does not tell, as from another PID namespace.
    pub fn pid(&self) -> Option<rustix::process::Pid> {
        rustix::process::Pid::from_raw(self.stream.peer_cred().ok()?.pid()?)
    }

    /// Sends a request and waits for its answer. A refusal is an error here.
    ///
    /// Dropping the future leaves the connection unusable; the request may be carried out all the same.
    pub async fn call(&mut self, request: &Request) -> Result<Reply, ControlError> {
        let exchange = async {
            write_message(&mut self.stream, FrameType::LOCAL_REQUEST, request).await?;
            let closed = || io::Error::from(io::ErrorKind::UnexpectedEof);
            let (_, payload) = read_frame(&mut self.stream, CONTROL_PAYLOAD_MAX).await?.ok_or_else(closed)?;
            Ok(frame::decode(&payload)?)
        };
        let limit = match request {
            Request::OverlayCommit { .. } => COMMIT_TIMEOUT,
            _ => CALL_TIMEOUT,
        };
        match tokio::time::timeout(limit, exchange).await {
            Err(_) => Err(ControlError::TimedOut(limit)),
            Ok(Err(source)) => Err(ControlError::Wire { path: self.path.clone(), source }),
            Ok(Ok(Reply::Failed(reason))) => Err(ControlError::Refused(reason)),
            Ok(Ok(Reply::Away(reason))) => Err(ControlError::Away(reason)),
            Ok(Ok(reply)) => Ok(reply),
        }
    }
}
