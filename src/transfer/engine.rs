//! The transfer of one image to this node: the handle, and what its tasks share.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bootcache_nbd::disk::SharedDisk;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::block::Extent;
use crate::choose::{Chooser, Weights, by_name, policy};
use crate::local_cache::{Fetch, LocalCache};
use crate::peer::holding::{Frames, Holding};
use crate::peer::message::{Hello, PROTOCOL_VERSION};
use crate::peer::transport::Security;
use crate::peer::uplink::Uplink;

use super::counters::{Counters, Kind};
use super::flight::Flights;
use super::guests::{Boot, Guests};
use super::keeping::Keeping;
use super::missed::Missed;
use super::receive;
use super::similar::{self, Looking, Others, Similar};
use super::sources::Sources;
use super::stream::StreamState;
use super::{demand, fill, stream};

/// How often what has come is made durable.
const SAVE_INTERVAL: Duration = Duration::from_secs(2);

/// From this rate of the link on, in bytes a second, a source's compressing (zstd, one core) takes longer than it saves.
const PACK_RATE_MAX: u64 = 160 << 20;

/// Pause after what has come could not be saved.
const SAVE_RETRY: Duration = Duration::from_secs(20);

/// How an image is fetched.
#[derive(Debug, Clone)]
pub struct Options {
    /// What protects connections.
    pub security: Security,
    /// What this node calls itself.
    pub node: String,
    /// What stands for this node in the order of the relay; that of its server, if it has one.
    pub key: u64,
    /// The port on which this node serves what it has, if it does.
    pub listen: Option<u16>,
    /// What this node has promised to send to others; its server's.
    pub uplink: Arc<Uplink>,
    /// What guests do with the images that arrive at this node; one for all its transfers.
    pub guests: Arc<Guests>,
    /// Fetch everything, not only what boots and what is read.
    pub fill: bool,
    /// Bytes a second that the fill may take; 0: as many as there are.
    pub fill_rate: u64,
    /// How long a source that lied is not used.
    pub ban: Duration,
    /// How long a source that another overtook is not the first choice.
    pub demotion: Duration,
    /// How long nobody may have asked for more than few sources give, before the others are let go; when not everything
    /// is fetched.
    pub idle: Duration,
    /// The other images that are searched for blocks before they are fetched.
    pub similar: Option<Arc<Others>>,
    /// How sources are chosen.
    pub chooser: Arc<dyn Chooser>,
}

impl Default for Options {
    fn default() -> Self {
        let chooser = by_name(policy::NAMES[0], &Weights::default()).expect("the first name is the default");
        Self {
            security: Security::default(),
            node: String::new(),
            key: 0,
            listen: None,
            uplink: Arc::default(),
            guests: Arc::default(),
            fill: true,
            fill_rate: 0,
            ban: Duration::from_secs(60),
            demotion: Duration::from_secs(30),
            idle: Duration::from_secs(30),
            similar: None,
            chooser: Arc::from(chooser),
        }
    }
}

impl Options {
    /// What this node says to others first.
    pub(super) fn hello(&self) -> Hello {
        Hello { version: PROTOCOL_VERSION, node: self.node.clone(), key: self.key, listen: self.listen }
    }
}

/// How far an image is.
#[derive(Debug, Clone, PartialEq)]
pub struct Progress {
    /// Bytes that are here, zeroes included.
    pub present: u64,
    /// Bytes of the disk.
    pub size: u64,
    /// Frames of the boot cache that are here.
    pub frames: u32,
    /// Frames of the boot cache; 0 when there is none, or the heads have not come.
    pub frames_total: u32,
    /// The boot cache is here, as far as it is needed.
    pub boot_complete: bool,
    /// Everything is here, and durable: no source is needed any more.
    pub complete: bool,
    /// Bytes that came over the network, by [`Kind`].
    pub bytes: [u64; 4],
    /// Why what comes cannot be kept on this node, and what to do about it; nothing is fetched meanwhile.
    pub trouble: Option<String>,
    /// The sources, and how they are.
    pub sources: Vec<SourceProgress>,
}

/// How a source is.
#[derive(Debug, Clone, PartialEq)]
pub struct SourceProgress {
    /// Where it is.
    pub address: SocketAddr,
    /// What it calls itself; empty before it has answered.
    pub node: String,
    /// It can be asked.
    pub up: bool,
    /// Why not, for a person; none before it was tried.
    pub error: Option<String>,
    /// It lied, and is not asked for so long.
    pub banned_for: Option<Duration>,
    /// It has all of the image.
    pub complete: bool,
    /// Bytes that came from it.
    pub bytes: u64,
}

/// What the tasks of one transfer share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) holding: Arc<Holding>,
    pub(super) cache: Arc<LocalCache>,
    pub(super) sources: Arc<Sources>,
    pub(super) counters: Arc<Counters>,
    pub(super) options: Options,
    /// The image's folder.
    pub(super) dir: PathBuf,
    pub(super) flights: Arc<Flights>,
    pub(super) keeping: Keeping,
    pub(super) stream: StreamState,
    /// Extents to fetch soon for which nobody waits.
    pub(super) hints: Mutex<VecDeque<Extent>>,
    pub(super) demand_wake: Notify,
    pub(super) missed: Missed,
    pub(super) boot: Mutex<Boot>,
    pub(super) fill_rate: AtomicU64,
    /// The other images here, while blocks are looked for in them.
    looking: Mutex<Option<Looking>>,
    /// It is not known yet whether boot frames should be looked for in other images.
    pub(super) probing: AtomicBool,
    /// Boot frames are first looked for in other images.
    pub(super) copies_boot: AtomicBool,
    /// Cancelled once everything is wanted.
    fill: CancellationToken,
    pub(super) stop: CancellationToken,
    /// What is done on threads of its own: it goes on when nobody waits for it any more, and may write by a file's name.
    pub(super) work: TaskTracker,
}

/// The transfer of one image; see `crate::transfer`. Dropping it ends the transfer; [`Engine::stop`] also saves.
#[derive(Debug)]
pub struct Engine {
    shared: Arc<Shared>,
    tasks: TaskTracker,
    done: watch::Receiver<bool>,
}

impl Engine {
    /// Starts to bring the image of `holding`, whose blocks go to `cache` in the folder `dir`, from `sources` and whom they know.
    pub fn start(
        holding: Arc<Holding>,
        cache: Arc<LocalCache>,
        dir: &Path,
        sources: &[SocketAddr],
        options: Options,
    ) -> Self {
        let stop = CancellationToken::new();
        let shared = Arc::new(Shared {
            sources: Sources::new(
                holding.root(),
                holding.manifest.boot.as_ref().map(|boot| boot.heads_digest),
                options.hello(),
                options.security.clone(),
                Arc::clone(&options.chooser),
                Arc::clone(&options.uplink),
                stop.clone(),
            ),
            counters: Arc::new(Counters::default()),
            flights: Arc::new(Flights::default()),
            keeping: Keeping::new(holding.root()),
            stream: StreamState::new(),
            hints: Mutex::new(VecDeque::new()),
            demand_wake: Notify::new(),
            missed: Missed::open(dir, holding.root()),
            boot: Mutex::default(),
            fill_rate: AtomicU64::new(options.fill_rate),
            fill: CancellationToken::new(),
            looking: Mutex::new(None),
            probing: AtomicBool::new(options.similar.is_some()),
            copies_boot: AtomicBool::new(false),
            stop,
            work: TaskTracker::new(),
            holding,
            cache,
            options,
            dir: dir.to_owned(),
        });
        shared.options.guests.add(&shared);
        if shared.options.fill {
            shared.fill.cancel();
        }
        for source in sources {
            shared.sources.add(*source, true);
        }
        let fetch: Arc<dyn Fetch> = Arc::clone(&shared) as Arc<_>;
        shared.cache.set_fetch(&fetch);
        let tasks = TaskTracker::new();
        let (tell, done) = watch::channel(false);
        let run = {
            let (shared, tasks) = (Arc::clone(&shared), tasks.clone());
            async move {
                tokio::select! {
                    () = shared.run(&tasks, &tell) => {}
                    () = shared.stop.cancelled() => {}
                }
            }
        };
        tasks.spawn(run);
        Self { shared, tasks, done }
    }

    /// The image as guests read it.
    pub fn disk(&self) -> SharedDisk {
        Arc::clone(&self.shared.cache) as SharedDisk
    }

    /// The lower bound of what the recorded boot has to wait over the goodput that the stream had, in ms, and that
    /// goodput in bytes a second. None before frames have come.
    pub fn waiting_min(&self) -> Option<(u64, u64)> {
        let frames = self.shared.holding.frames()?;
        let goodput = self.shared.stream.goodput()?;
        Some((frames.heads().waiting_min_ms(goodput), goodput))
    }

    /// The image's local cache.
    pub fn cache(&self) -> &Arc<LocalCache> {
        &self.shared.cache
    }

    /// The image as it is served to others.
    pub fn holding(&self) -> &Arc<Holding> {
        &self.shared.holding
    }

    /// What was done so far.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.shared.counters
    }

    /// Asks the node at `address` too.
    pub fn add_source(&self, address: SocketAddr) {
        self.shared.sources.add(address, true);
    }

    /// Lets the fill take `bytes` a second from now on; 0: as many as there are.
    pub fn set_fill_rate(&self, bytes: u64) {
        self.shared.fill_rate.store(bytes, Ordering::Relaxed);
    }

    /// Fetches everything from now on.
    pub fn fill(&self) {
        self.shared.fill.cancel();
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        let shared = &self.shared;
        let frames = shared.holding.frames();
        let sources = shared.sources.all();
        Progress {
            present: (shared.cache.blocks_present() * crate::block::BLOCK_SIZE)
                .min(shared.holding.manifest.size),
            size: shared.holding.manifest.size,
            frames: frames.map_or(0, Frames::passed),
            frames_total: frames.map_or(0, |frames| u32::try_from(frames.count()).unwrap_or(u32::MAX)),
            boot_complete: shared.stream.is_over(),
            complete: *self.done.borrow(),
            bytes: Kind::ALL.map(|kind| shared.counters.bytes.get(kind)),
            trouble: shared.keeping.trouble(),
            sources: sources
                .iter()
                .map(|source| {
                    let banned_for = source.banned_for();
                    let state = source.state();
                    SourceProgress {
                        address: source.address,
                        node: state.node.clone(),
                        up: state.link.is_some(),
                        error: state.error.clone(),
                        banned_for,
                        complete: state.have.complete,
                        bytes: source.bytes.total(),
                    }
                })
                .collect(),
        }
    }

    /// Ends when the boot cache is here; when there is none, at once.
    pub async fn boot_complete(&self) {
        self.shared.stream.over().await;
    }

    /// Ends when everything is here and durable, or the transfer was stopped. Whether it is complete.
    pub async fn done(&self) -> bool {
        let mut done = self.done.clone();
        tokio::select! {
            result = done.wait_for(|done| *done) => result.is_ok(),
            () = self.shared.stop.cancelled() => *self.done.borrow(),
        }
    }

    /// Ends the transfer and makes durable what has come.
    pub async fn stop(&self) {
        self.end().await;
        self.shared.save().await;
    }

    /// Ends the transfer, for an image that is to be removed: nothing is written when this returns. Who waits for boot
    /// frames of this node is told that they do not come.
    pub async fn end(&self) {
        self.shared.stop.cancel();
        for tasks in [&self.tasks, &self.shared.work] {
            tasks.close();
            tasks.wait().await;
        }
        if let Some(frames) = self.shared.holding.frames() {
            frames.end();
        }
        self.shared.holding.changed();
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shared.stop.cancel();
    }
}

impl Shared {
    async fn run(self: &Arc<Self>, tasks: &TaskTracker, tell: &watch::Sender<bool>) {
        let transfer = async {
            let based = self.holding.manifest.base.is_some();
            if based {
                tokio::join!(stream::prepare(self), similar::prepare(self));
                stream::run(self).await;
            } else {
                tokio::join!(stream::run(self), similar::prepare(self));
            }
            if let Some(frames) = self.holding.frames() {
                frames.end();
            }
            self.stream.end();
            if !self.fill.is_cancelled() {
                // Perhaps for ever: images that are removed meanwhile should not keep their space.
                self.set_looking(None);
                tokio::select! {
                    () = self.fill.cancelled() => {}
                    () = self.sources.rest(self.options.idle) => {}
                }
                self.sources.need_all();
            }
            if self.looking().is_none() && !self.cache.is_complete() {
                similar::look(self).await;
            }
            fill::run(self).await;
            while !self.finish().await {
                tokio::time::sleep(SAVE_RETRY).await;
                fill::run(self).await;
            }
            self.set_looking(None);
            // Readers that came before the end have what they waited for; later ones find everything here.
            tell.send_replace(true);
            tracing::info!(image = %self.holding.root().short(), "the image is complete: no source is needed any more");
        };
        tokio::select! {
            () = transfer => {}
            () = demand::run(self, tasks) => {}
            () = self.sources.meet(&self.holding) => {}
            () = self.save_often() => {}
        }
        self.set_looking(None);
        self.stop.cancel();
    }

    /// The index of other images here, once it is built and as long as it is needed.
    pub(super) fn similar(&self) -> Option<Arc<Similar>> {
        self.looking().as_ref()?.similar()
    }

    pub(super) fn set_looking(&self, looking: Option<Looking>) {
        *self.looking() = looking;
    }

    fn looking(&self) -> MutexGuard<'_, Option<Looking>> {
        self.looking.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the stream, or a fill that is wanted by now, has blocks to bring.
    pub(super) fn lacks_blocks(&self) -> bool {
        let streams = || {
            self.holding.manifest.boot.is_some()
                && self.holding.frames().is_none_or(|frames| (frames.passed() as usize) < frames.count())
        };
        !self.cache.is_complete() && (self.fill.is_cancelled() || streams())
    }

    async fn save_often(self: &Arc<Self>) {
        loop {
            tokio::time::sleep(SAVE_INTERVAL).await;
            if self.save().await.is_none() {
                tokio::time::sleep(SAVE_RETRY).await;
            }
        }
    }

    /// Makes what has come durable; whether that is everything. None when it cannot: people are told, and what is not
    /// durable is fetched again.
    async fn save(self: &Arc<Self>) -> Option<bool> {
        let shared = Arc::clone(self);
        let work = move || {
            shared.missed.save();
            let (cache, tree) = (&shared.cache, &shared.holding.tree);
            // Without saved bits the image counts as complete: its tree has to be whole and durable before they go.
            let whole = cache.is_complete() && tree.is_complete();
            let synced = if whole { tree.sync().map_err(std::io::Error::other) } else { Ok(()) };
            let saved = synced.and_then(|()| cache.save(whole));
            if saved.is_err() {
                // Zero blocks were taken back with the others, and need not be fetched.
                receive::learn_all_zeroes(&shared.holding, cache);
            }
            saved
        };
        match self.work.spawn_blocking(work).await {
            Ok(Ok(everything)) => Some(everything),
            Ok(Err(error)) if self.keeping.trouble().is_some() => {
                tracing::debug!(image = %self.holding.root().short(), %error, "cannot save what has come");
                None
            }
            Ok(Err(error)) => {
                tracing::error!(
                    image = %self.holding.root().short(), %error,
                    "cannot save what has come: fetching it again; check this disk"
                );
                None
            }
            Err(_) => None,
        }
    }

    /// Makes everything durable; whether everything is.
    async fn finish(self: &Arc<Self>) -> bool {
        let saved = self.save().await;
        self.holding.changed();
        saved == Some(true)
    }

    /// Whether sources should compress blocks. The stream's frames are compressed beforehand, so that what it brought a
    /// second is what the link carries.
    pub(super) fn packing_pays(&self) -> bool {
        self.stream.goodput().is_none_or(|goodput| goodput < PACK_RATE_MAX)
    }

    /// Whether the boot stream is about to bring `block`.
    pub(super) fn is_on_its_way(&self, block: u64) -> bool {
        if self.holding.manifest.boot.is_none() || !self.stream.is_alive() {
            return false;
        }
        match self.holding.frames() {
            // The heads will say.
            None => true,
            Some(frames) => frames.heads().position(block).is_some_and(|frame| !frames.has(frame)),
        }
    }
}
