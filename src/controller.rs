//! The controller: knows the nodes, their images and their load, and has them carry out plans (thesis, section 3.2).
//!
//! ```text
//!  users ──► server ──►┌────────────┐◄── round    heartbeat: asks every node how it is, one transaction a round
//!  agents ─►           │  Database  │◄── report   guests say that they are up
//!                      └────────────┘──► dispatch gives nodes the orders that they have still to be given
//! ```
//!
//! The database is the only state that lasts; everything else can be made again from it and from what nodes answer. A
//! node is not driven step by step: it is told what should be, as often as it takes, and orders are the same however
//! often they are given. So a controller that is killed at any moment goes on where it was, and until it is back the
//! nodes go on without it.
//!
//! An instance:
//!
//! ```text
//!  deploy ──► preparing ──► booting ──► running ──► stopped
//!                 │  ▲          │ ▲        │ ▲
//!                 │  └─ lost ◄──┴─│────────┘ │        lost: its node is silent; back when the node is
//!                 ▼               ▼          │
//!               failed ◄── booting      lost ┘
//! ```
//!
//! A task:
//!
//! ```text
//!  deploy ──► starting ──► running ──► ending ──► (no row is left)
//!                │ ▲                      ▲
//!                ▼ │                      │
//!               failed ───────────────────┘
//! ```

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::choose::{Chooser, Draw, Item, Load, Weights};
use crate::name::HostName;
use crate::peer::transport::{PlainRefused, Security};
use crate::plan::Plan;
use crate::wire::cluster::{Found, Prefetch, Query};

pub mod client;
mod database;
mod deploy;
mod dispatch;
mod nodes;
mod report;
mod round;
mod server;
mod sources;
mod state;

pub use database::{Database, DatabaseError};
pub use deploy::DeployError;

/// The controller's own socket, in its folder.
pub const SOCKET: &str = "controller.sock";
/// The database, in its folder.
const DATABASE_FILE: &str = "bootcache.db";
const LOCK_FILE: &str = "controller.lock";

/// How a controller is to run.
#[derive(Debug)]
pub struct Options {
    /// Its folder: database, lock and socket.
    pub dir: PathBuf,
    /// Where agents and users connect, beside the socket in the folder.
    pub listen: Vec<SocketAddr>,
    /// Where guests report that they are up.
    pub report: Option<SocketAddr>,
    /// How guests reach that, where it is not the address itself.
    pub report_as: Option<SocketAddr>,
    /// What protects connections.
    pub security: Security,
    /// Time from one heartbeat round to the next.
    pub poll: Duration,
    /// Time after which a silent node is offline.
    pub silence: Duration,
    /// Picks the sources of images.
    pub chooser: Box<dyn Chooser>,
    /// How load items count when nodes are compared.
    pub weights: Weights,
    /// Plans may ask for privileged containers, and have domains of their own as templates.
    pub allow_privileged: bool,
}

impl Options {
    /// A controller with its folder in `dir`, reached by its socket alone.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        let weights = Weights::default();
        let chooser = crate::choose::by_name("least-load", &weights).expect("it is the default");
        Self {
            dir: dir.into(),
            listen: Vec::new(),
            report: None,
            report_as: None,
            security: Security::default(),
            poll: Duration::from_secs(2),
            silence: Duration::from_secs(8),
            chooser,
            weights,
            allow_privileged: false,
        }
    }
}

/// Why a controller cannot run, or did not do something.
#[derive(Debug, thiserror::Error)]
pub enum ControllerError {
    /// Another controller has the folder.
    #[error("another controller runs on {0}: end it, or give this one a folder of its own")]
    Locked(PathBuf),
    /// The folder or one of its files cannot be used.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// An address cannot be listened on.
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
    /// Guests cannot be told where to report.
    #[error("guests cannot report to {0}: say how they reach it, with --report-as ADDRESS:PORT")]
    ReportAddress(SocketAddr),
    /// The database.
    #[error(transparent)]
    Database(#[from] DatabaseError),
}

/// A running controller. Cheap to clone; clones are the same controller.
#[derive(Clone)]
pub struct Controller {
    shared: Arc<Shared>,
    addresses: Vec<SocketAddr>,
}

impl std::fmt::Debug for Controller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Controller").field("dir", &self.shared.options.dir).finish_non_exhaustive()
    }
}

/// What the parts of a controller share.
struct Shared {
    options: Options,
    database: Database,
    nodes: nodes::Nodes,
    told: round::Told,
    notices: round::Notices,
    /// All nodes were asked once since this controller began.
    asked: tokio::sync::watch::Sender<bool>,
    /// When this controller began to ask.
    started: Instant,
    /// The cluster's identity.
    cluster: String,
    /// Where guests report.
    report: Option<SocketAddr>,
    /// Orders may be waiting.
    orders: Notify,
    draw: std::sync::Mutex<Draw>,
    cancel: CancellationToken,
    /// Everything that runs, connections too.
    tasks: TaskTracker,
    /// Held until [`Controller::stop`] has returned.
    lock: std::sync::Mutex<Option<File>>,
}

impl Shared {
    /// The weighted score of a node's load items.
    fn score(&self, items: &std::collections::BTreeMap<u16, f32>) -> f32 {
        let load = Load::new(items.iter().map(|(item, value)| (Item(*item), *value)));
        self.options.weights.score(&load)
    }

    /// Lends the generator of the chooser.
    fn draw<T>(&self, work: impl FnOnce(&mut Draw) -> T) -> T {
        work(&mut self.draw.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Controller {
    /// Takes the folder, opens the database and the sockets, and begins to work.
    ///
    /// # Errors
    /// [`ControllerError`]; nothing is left running then.
    pub async fn start(options: Options) -> Result<Self, ControllerError> {
        let dir = options.dir.clone();
        let at = |path: &Path| {
            let path = path.to_owned();
            move |source| ControllerError::Io { path, source }
        };
        create_private(&dir).map_err(at(&dir))?;
        let lock = lock(&dir)?;
        let mut listeners = Vec::new();
        for address in &options.listen {
            options.security.check(*address)?;
            listeners.push(listen(*address).await?);
        }
        let report = match options.report {
            Some(address) => Some(listen(address).await?),
            None => None,
        };
        let report_as = match &report {
            None => None,
            Some((_, bound)) if options.report_as.is_none() && bound.ip().is_unspecified() => {
                return Err(ControllerError::ReportAddress(*bound));
            }
            Some((_, bound)) => Some(options.report_as.unwrap_or(*bound)),
        };
        let path = dir.join(DATABASE_FILE);
        let database = tokio::task::spawn_blocking(move || Database::open(&path))
            .await
            .map_err(|error| DatabaseError::Content(error.to_string()))??;
        let cluster = database
            .run::<_, DatabaseError, _>(|tx| {
                database::integrity(tx)?;
                database::setting(tx, "cluster", new_id)
            })
            .await?;
        let socket = dir.join(SOCKET);
        // The lock is ours, so a socket that is there is left from a controller that is gone.
        let _ = std::fs::remove_file(&socket);
        let unix = UnixListener::bind(&socket).map_err(at(&socket))?;
        let private = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(&socket, private).map_err(at(&socket))?;

        let seed = now_ms();
        let shared = Arc::new(Shared {
            nodes: nodes::Nodes::new(options.security.clone()),
            told: round::Told::default(),
            notices: round::Notices::default(),
            asked: tokio::sync::watch::Sender::new(false),
            started: Instant::now(),
            options,
            database,
            cluster,
            report: report_as,
            orders: Notify::new(),
            draw: std::sync::Mutex::new(Draw::new(seed)),
            cancel: CancellationToken::new(),
            tasks: TaskTracker::new(),
            lock: std::sync::Mutex::new(Some(lock)),
        });
        let tasks = &shared.tasks;
        let addresses = listeners.iter().map(|(_, address)| *address).collect();
        tasks.spawn(server::unix(Arc::clone(&shared), unix));
        for (listener, _) in listeners {
            tasks.spawn(server::tcp(Arc::clone(&shared), listener));
        }
        if let Some((listener, _)) = report {
            tasks.spawn(report::serve(Arc::clone(&shared), listener));
        }
        tasks.spawn(round::run(Arc::clone(&shared)));
        tasks.spawn(dispatch::run(Arc::clone(&shared)));
        tasks.close();
        Ok(Self { shared, addresses })
    }

    /// Where it listens for agents and users, ports filled in.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Where guests report.
    pub fn report_address(&self) -> Option<SocketAddr> {
        self.shared.report
    }

    /// Starts a deployment and gives its number. The same `request` a second time gives the same number and starts
    /// nothing.
    ///
    /// # Errors
    /// [`DeployError`]; nothing has been started then.
    pub async fn deploy(&self, request: &str, plan: Plan) -> Result<i64, DeployError> {
        deploy::deploy(&self.shared, request, plan).await
    }

    /// Ends a deployment. Returns when that is written down; what is left of it shows in [`Controller::query`].
    ///
    /// # Errors
    /// [`DeployError::NoTask`].
    pub async fn end(&self, task: i64) -> Result<(), DeployError> {
        deploy::end(&self.shared, task).await
    }

    /// What there is.
    ///
    /// # Errors
    /// [`DatabaseError`].
    pub async fn query(&self, query: Query) -> Result<Found, DatabaseError> {
        deploy::query(&self.shared, query).await
    }

    /// Brings images to nodes ahead of demand.
    ///
    /// # Errors
    /// [`DeployError`].
    pub async fn prefetch(&self, prefetch: Prefetch) -> Result<(), DeployError> {
        deploy::prefetch(&self.shared, prefetch).await
    }

    /// Forgets a node that is offline: its instances are given up, and its name is free again.
    ///
    /// # Errors
    /// [`DeployError::NoNode`], [`DeployError::NodeOnline`].
    pub async fn forget(&self, node: HostName) -> Result<(), DeployError> {
        deploy::forget(&self.shared, node).await
    }

    /// Ends the controller, not what it has deployed; returns when its last request has been answered, or hangs for five
    /// seconds.
    pub async fn stop(&self) {
        self.shared.cancel.cancel();
        self.shared.tasks.wait().await;
        let _ = std::fs::remove_file(self.shared.options.dir.join(SOCKET));
        self.shared.lock.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

/// Milliseconds since 1970.
fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// A new identity, from the kernel's generator.
fn new_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/uuid")
        .map_or_else(|_| format!("{:016x}", now_ms()), |text| text.trim().to_owned())
}

async fn listen(address: SocketAddr) -> Result<(TcpListener, SocketAddr), ControllerError> {
    let error = |source| ControllerError::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(error)?;
    let bound = listener.local_addr().map_err(error)?;
    Ok((listener, bound))
}

fn create_private(dir: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

/// Two controllers on one folder would both give orders: the second does not start.
fn lock(dir: &Path) -> Result<File, ControllerError> {
    let path = dir.join(LOCK_FILE);
    let at = |source| ControllerError::Io { path: path.clone(), source };
    let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(at)?;
    crate::store::lock::exclusive(file).map_err(at)?.ok_or_else(|| ControllerError::Locked(dir.to_owned()))
}

#[cfg(test)]
mod tests;
