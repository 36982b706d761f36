//! The agent: runs a node's part of deployments (thesis, section 3.2).
//!
//! ```text
//!  controller ──► server ──► Parts ──► one task an instance ──► hypervisor, data plane, network
//!      ▲                       │ written down before it is done
//!      └── registrar ◄─────────┘ states, as they change
//! ```
//!
//! It owns the node's instances and networks, and drives its data plane (`bootcache serve`, another process, which
//! outlives it) over the control socket. What it was ordered to do and how far it is lies in its folder, so that an
//! agent that was killed at any moment goes on, adopts what runs and cleans up what was half-done. Instances do not
//! notice whether it, or the controller, runs.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::controller::client::Target;
use crate::hypervisor::{Hypervisor, InstanceType};
use crate::load::Sampler;
use crate::name::HostName;
use crate::peer::transport::{PlainRefused, Security};

mod data_plane;
mod facts;
mod health;
mod host;
mod image_bytes;
mod instance;
mod journal;
mod name_lock;
mod output;
mod parts;
mod registrar;
mod server;
mod services;

pub use data_plane::Serve;
pub use host::{DockerImages, HostNetworks};
pub use journal::JournalError;
pub use name_lock::NameLock;
pub use services::{Bytes, ContainerImages, DataPlane, MemoryDataPlane, Networks, OpenDisk, ServiceError};

/// How an agent is to run.
#[derive(Debug, Clone)]
pub struct Options {
    /// The node's name.
    pub name: HostName,
    /// Its folder.
    pub dir: PathBuf,
    /// Where the controller connects to it.
    pub listen: SocketAddr,
    /// The address of that as the controller sees it, where it is not the one this node connects from.
    pub advertise: Option<IpAddr>,
    /// The controller; without one, the agent waits for orders and registers nowhere.
    pub controller: Option<Target>,
    /// What protects connections.
    pub security: Security,
    /// Instances of a type that are started at once.
    pub starts: usize,
}

impl Options {
    /// An agent of node `name` with its folder in `dir`, which listens on loopback.
    pub fn new(name: HostName, dir: impl Into<PathBuf>) -> Self {
        Self {
            name,
            dir: dir.into(),
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            advertise: None,
            controller: None,
            security: Security::default(),
            starts: 4,
        }
    }
}

/// What an agent works with.
#[derive(Clone)]
pub struct Services {
    /// The node's images and disks.
    pub data_plane: Arc<dyn DataPlane>,
    /// What runs instances, one for each type at most; one that is away now belongs here too.
    pub hypervisors: Vec<Arc<dyn Hypervisor>>,
    /// The node's bridges; without, plans with networks are refused.
    pub networks: Option<Arc<dyn Networks>>,
    /// Where container images are loaded; without, containers start from what their hypervisor has.
    pub container_images: Option<Arc<dyn ContainerImages>>,
}

impl std::fmt::Debug for Services {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Services").field("hypervisors", &self.hypervisors.len()).finish_non_exhaustive()
    }
}

/// Why an agent cannot run.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Another agent has the folder.
    #[error("another agent runs on {0}: end it, or give this one a store of its own")]
    Locked(PathBuf),
    /// Another agent has the node's name.
    #[error(
        "another agent of node '{0}' runs on this host: end it, or give this one a name of its own with --name"
    )]
    NameTaken(HostName),
    /// The folder is that of a node with another name, which has tasks.
    #[error(
        "{} is that of node '{node}', and what its tasks run is known by that name: start the agent with --name {node}, or end its tasks first",
        dir.display()
    )]
    OtherNode {
        /// The folder.
        dir: PathBuf,
        /// The name that the node has.
        node: String,
    },
    /// The folder or one of its files cannot be used.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// What it was ordered to do cannot be read.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system says.
        source: io::Error,
    },
    /// Plain TCP beyond this host that nobody asked for.
    #[error(transparent)]
    Plain(#[from] PlainRefused),
}

/// A running agent.
pub struct Agent {
    shared: Arc<Shared>,
    address: SocketAddr,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent").field("name", &self.shared.options.name).finish_non_exhaustive()
    }
}

/// What the parts of an agent share.
struct Shared {
    options: Options,
    services: Services,
    parts: parts::Parts,
    health: health::Health,
    sampler: Sampler,
    /// Says that instances have changed.
    changes: tokio::sync::mpsc::UnboundedSender<HostName>,
    starts: BTreeMap<InstanceType, tokio::sync::Semaphore>,
    cancel: CancellationToken,
    /// Everything that runs but the parts, connections too.
    tasks: TaskTracker,
    /// Held until [`Agent::stop`] has returned.
    lock: std::sync::Mutex<Option<std::fs::File>>,
}

impl Agent {
    /// Takes the folder, goes on with what was ordered before, and listens for orders. What its hypervisors have of this
    /// node's name and no task knows is ended: whoever shares them with other programs holds a [`NameLock`].
    ///
    /// # Errors
    /// [`AgentError`]; nothing is left running then.
    pub async fn start(options: Options, services: Services) -> Result<Self, AgentError> {
        options.security.check(options.listen)?;
        let (dir, name) = (options.dir.clone(), options.name.clone());
        let opened = tokio::task::spawn_blocking(move || open(&dir, &name)).await;
        let at = |source| AgentError::Io { path: options.dir.clone(), source };
        let (lock, journal) = opened.map_err(|error| at(error.into()))??;
        let address = options.listen;
        let listen = |source| AgentError::Listen { address, source };
        let listener = TcpListener::bind(address).await.map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;
        let (changes, changed) = tokio::sync::mpsc::unbounded_channel();
        // VMs whose disks hang do not keep containers back.
        let starts = || tokio::sync::Semaphore::new(options.starts.max(1));
        let shared = Arc::new(Shared {
            starts: services.hypervisors.iter().map(|one| (one.instance_type(), starts())).collect(),
            options,
            services,
            parts: parts::Parts::new(journal)?,
            health: health::Health::default(),
            sampler: Sampler::default(),
            changes,
            cancel: CancellationToken::new(),
            tasks: TaskTracker::new(),
            lock: std::sync::Mutex::new(Some(lock)),
        });
        let tasks = &shared.tasks;
        parts::resume(&shared).await?;
        for hypervisor in &shared.services.hypervisors {
            tasks.spawn(health::watch(Arc::clone(&shared), Arc::clone(hypervisor)));
        }
        tasks.spawn(server::serve(Arc::clone(&shared), listener));
        tasks.spawn(registrar::run(Arc::clone(&shared), address.port(), changed));
        tasks.close();
        Ok(Self { shared, address })
    }

    /// Where it listens.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends the agent, not what it runs.
    pub async fn stop(&self) {
        self.shared.cancel.cancel();
        self.shared.tasks.wait().await;
        parts::join(&self.shared).await;
        self.shared.lock.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

/// Makes and takes the folder, for the node of that name.
fn open(dir: &Path, name: &HostName) -> Result<(std::fs::File, journal::Journal), AgentError> {
    create_private(dir).map_err(|source| AgentError::Io { path: dir.to_owned(), source })?;
    let lock = lock(dir)?;
    check_name(dir, name)?;
    let journal = journal::Journal::open(dir)?;
    journal.set_node(name)?;
    Ok((lock, journal))
}

/// Checks that the folder `dir` is not that of a node with another name than `name` which has tasks. [`Agent::start`] does so
/// too; a program that starts something else before asks here first.
///
/// # Errors
/// [`AgentError::OtherNode`], or [`AgentError::Journal`] when that cannot be seen.
pub fn check_name(dir: &Path, name: &HostName) -> Result<(), AgentError> {
    match journal::Journal::other_node(dir, name)? {
        Some(node) => Err(AgentError::OtherNode { dir: dir.to_owned(), node }),
        None => Ok(()),
    }
}

fn create_private(dir: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

fn lock(dir: &Path) -> Result<std::fs::File, AgentError> {
    let path = dir.join("agent.lock");
    let at = |source| AgentError::Io { path: path.clone(), source };
    let file = std::fs::File::options().create(true).truncate(false).write(true).open(&path).map_err(at)?;
    crate::store::lock::exclusive(file).map_err(at)?.ok_or_else(|| AgentError::Locked(dir.to_owned()))
}

#[cfg(test)]
mod tests;
