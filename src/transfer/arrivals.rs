//! The images that are on their way to this node: one engine each, offered to others from the first frame on.
//!
//! The sources of each are kept beside it, so that a daemon that was stopped or killed goes on when it is back:
//!
//! ```text
//! images/ROOT/sources   JSON: the addresses, whether everything is wanted, bytes a second
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::digest::Digest;
use crate::name::ImageName;
use crate::peer::catalogue::Catalogue;
use crate::store::{Hold, Store, StoreError, write_atomic};

use super::engine::{Engine, Options};
use super::pull::{self, Found, Pin, PullError, Pulled, Target};
use super::similar::Others;

const SOURCES: &str = "sources";
const SOURCES_BYTES_MAX: u64 = 64 << 10;
/// Sources that are written down: the newest.
const SOURCES_MAX: usize = 64;
/// Images that nobody waits for which are taken up at once after a restart: what was saved of them is read.
const RESUMED_AT_ONCE: usize = 2;
/// How often it is looked whether an image that is all here was removed.
const REMOVED_INTERVAL: Duration = Duration::from_secs(10);

/// From where, and how, an image is fetched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Nodes that may have it.
    pub sources: Vec<SocketAddr>,
    /// Fetch everything, not only what boots and what is read.
    pub fill: bool,
    /// Bytes a second that the fill may take; 0: as many as it was told before, and as there are before that.
    pub fill_rate: u64,
}

impl Plan {
    /// This, said of an image of which was said before how it is fetched: all sources, and everything if either wants that.
    fn after(mut self, before: Self) -> Self {
        let known = before.sources.into_iter().filter(|source| !self.sources.contains(source));
        let known: Vec<SocketAddr> = known.collect();
        self.sources.extend(known);
        self.sources.truncate(SOURCES_MAX);
        self.fill |= before.fill;
        if self.fill_rate == 0 {
            self.fill_rate = before.fill_rate;
        }
        self
    }
}

struct Arrival {
    engine: Arc<Engine>,
    /// Keeps the image from being removed until all of it is here.
    hold: Option<Hold>,
}

/// A transfer that nobody finds any more, if it had begun, and the hold on its image.
pub(crate) struct TakenOut {
    engine: Option<Arc<Engine>>,
    _hold: Option<Hold>,
}

/// Images that were on their way when the last daemon ended, and are not again.
#[derive(Default)]
struct Unfinished {
    /// Nobody has begun with them. The holds keep them from being removed meanwhile.
    waiting: BTreeMap<Digest, Option<Hold>>,
    under_way: BTreeSet<Digest>,
}

impl TakenOut {
    /// Ends the transfer, and lets the image be removed.
    pub(crate) async fn end(self) {
        if let Some(engine) = self.engine {
            engine.end().await;
        }
    }
}

type ByRoot = BTreeMap<Digest, Arrival>;

fn lock(arrivals: &Mutex<ByRoot>) -> MutexGuard<'_, ByRoot> {
    arrivals.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The images that are on their way to this node. Owned by its daemon.
pub struct Arrivals {
    store: Store,
    catalogue: Arc<Catalogue>,
    options: Options,
    /// The other images of the store, in which blocks are looked for.
    others: Arc<Others>,
    arrivals: Arc<Mutex<ByRoot>>,
    unfinished: watch::Sender<Unfinished>,
    /// Held by whoever begins to fetch an image: first by its name, so that its root is asked for once, then by its root,
    /// so that there is one engine, whatever names it has.
    begins: Mutex<BTreeMap<Begin, Arc<tokio::sync::Mutex<()>>>>,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Begin {
    Name(ImageName),
    Root(Digest),
}

impl std::fmt::Debug for Arrivals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Arrivals").field("options", &self.options).finish_non_exhaustive()
    }
}

impl Arrivals {
    /// Nothing on its way to `store` yet. `options` hold for every image; what is on its way goes to `catalogue`.
    pub fn new(store: Store, catalogue: Arc<Catalogue>, options: Options) -> Self {
        let others = Others::new(store.clone());
        let unfinished = watch::Sender::new(Unfinished::default());
        let (arrivals, begins) = (Arc::default(), Mutex::default());
        Self { store, catalogue, options, others, arrivals, unfinished, begins }
    }

    /// The transfer of image `root`, while there is one.
    pub fn get(&self, root: Digest) -> Option<Arc<Engine>> {
        lock(&self.arrivals).get(&root).map(|arrival| Arc::clone(&arrival.engine))
    }

    /// Begins to fetch `target` as `plan` says; an image that is on its way gets the new sources and rate. Ends when
    /// the image can be read, though most of it is still to come. Its root.
    ///
    /// # Errors
    /// [`PullError`].
    pub async fn pull(&self, target: &Target, plan: &Plan) -> Result<Digest, PullError> {
        let name = self.begin(Begin::Name(target.name.clone()));
        let _one_of_name = name.lock().await;
        let found = pull::find(&self.store, target, &plan.sources, &self.options_of(plan)).await?;
        let root = found.root();
        let image = self.begin(Begin::Root(root));
        let _one_of_image = image.lock().await;
        let io_error = |source| PullError::Io { name: target.name.clone(), source };
        if let Some(engine) = self.current(root) {
            // Perhaps by another name, of which there may be many.
            let (store, name) = (self.store.clone(), target.name.clone());
            let named = tokio::task::spawn_blocking(move || store.add_name(&name, root)).await;
            named.map_err(io::Error::other).map_err(io_error)??;
            plan.sources.iter().for_each(|source| engine.add_source(*source));
            if plan.fill_rate > 0 {
                engine.set_fill_rate(plan.fill_rate);
            }
            if plan.fill {
                engine.fill();
            }
            self.remember(root, plan).await.map_err(io_error)?;
        } else {
            self.take(target, found, plan).await?;
        }
        Ok(root)
    }

    fn options_of(&self, plan: &Plan) -> Options {
        let similar = Some(Arc::clone(&self.others));
        Options { fill: plan.fill, fill_rate: plan.fill_rate, similar, ..self.options.clone() }
    }

    /// Starts the transfer of `found`, which has none, unless all of it is here. For who holds its [`Begin::Root`].
    async fn take(&self, target: &Target, found: Found, plan: &Plan) -> Result<(), PullError> {
        let io_error = |source| PullError::Io { name: target.name.clone(), source };
        // The last daemon may have been told more of it.
        let (store, root) = (self.store.clone(), found.root());
        let before = tokio::task::spawn_blocking(move || plan_of(&store, root)).await;
        let plan = &match before.map_err(io::Error::other).map_err(io_error)? {
            Some(before) => plan.clone().after(before),
            None => plan.clone(),
        };
        let taken = pull::take(&self.store, target, found, &plan.sources, self.options_of(plan)).await?;
        if let Pulled::Coming(engine, hold) = taken {
            engine.set_fill_rate(self.remember(engine.holding().root(), plan).await.map_err(io_error)?);
            self.keep(engine, hold);
        }
        Ok(())
    }

    fn begin(&self, begin: Begin) -> Arc<tokio::sync::Mutex<()>> {
        let mut begins = self.begins.lock().unwrap_or_else(PoisonError::into_inner);
        begins.retain(|_, begin| Arc::strong_count(begin) > 1);
        Arc::clone(begins.entry(begin).or_default())
    }

    /// The transfer of image `root`, unless the image was removed since it ended.
    fn current(&self, root: Digest) -> Option<Arc<Engine>> {
        let (engine, is_held) = {
            let arrivals = lock(&self.arrivals);
            let arrival = arrivals.get(&root)?;
            (Arc::clone(&arrival.engine), arrival.hold.is_some())
        };
        (is_held || self.store.image(root).is_ok()).then_some(engine)
    }

    /// Writes down how image `root` is fetched, for the daemon that goes on with it: what was written before, and `plan`.
    /// Gives the rate of the fill.
    async fn remember(&self, root: Digest, plan: &Plan) -> io::Result<u64> {
        let (store, mut plan) = (self.store.clone(), plan.clone());
        let work = move || {
            if let Some(before) = plan_of(&store, root) {
                plan = plan.after(before);
            } else if store.image(root).is_ok_and(|entry| entry.is_complete()) {
                return Ok(plan.fill_rate);
            }
            write_atomic(&store.image_dir(root).join(SOURCES), &serde_json::to_vec(&plan)?)?;
            Ok(plan.fill_rate)
        };
        tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
    }

    fn keep(&self, engine: Engine, hold: Hold) {
        let engine = Arc::new(engine);
        let arrival = Arrival { engine: Arc::clone(&engine), hold: Some(hold) };
        lock(&self.arrivals).insert(engine.holding().root(), arrival);
        self.catalogue.offer(Arc::clone(engine.holding()));
        tokio::spawn(let_go(
            engine,
            Arc::clone(&self.arrivals),
            Arc::clone(&self.catalogue),
            self.store.clone(),
        ));
    }

    /// Finds the images that were on their way when the last daemon ended: none of them counts as absent from now on, see
    /// [`Arrivals::resumed`]. Reads little of each. Blocks.
    pub fn look_back(&self) {
        let roots = self.store.roots().unwrap_or_else(|error| {
            tracing::error!(%error, "images that were on their way are not looked for");
            Vec::new()
        });
        let unfinished = roots.into_iter().filter(|root| plan_of(&self.store, *root).is_some());
        // One that another command removes just now has no hold, and is not there when it is taken up.
        let waiting = unfinished.map(|root| (root, self.store.hold(root).ok())).collect();
        self.unfinished.send_modify(|unfinished| unfinished.waiting = waiting);
    }

    /// Goes on with every image that [`Arrivals::look_back`] has found; with no further one after `until`.
    pub async fn resume(&self, until: &CancellationToken) {
        let next = || match until.is_cancelled() {
            true => None,
            false => self.begin_unfinished(None),
        };
        let some = async || {
            while let Some(root) = next() {
                self.take_up(root).await;
            }
        };
        join_all((0..RESUMED_AT_ONCE).map(|_| some())).await;
    }

    /// Ends when image `root` is on its way again, if it was when the last daemon ended; at once, if it was not. It is
    /// taken up before those that nobody waits for.
    pub async fn resumed(self: &Arc<Self>, root: Digest) {
        if self.begin_unfinished(Some(root)).is_some() {
            let arrivals = Arc::clone(self);
            // Goes on when nobody waits for it any more.
            tokio::spawn(async move { arrivals.take_up(root).await });
        }
        let mut unfinished = self.unfinished.subscribe();
        // The sender lives as long as this does.
        let _ = unfinished.wait_for(|unfinished| !unfinished.under_way.contains(&root)).await;
    }

    /// An unfinished image that nobody has begun with, that one if one is given: it is the caller's to take up now.
    fn begin_unfinished(&self, root: Option<Digest>) -> Option<Digest> {
        let mut begun = None;
        self.unfinished.send_if_modified(|unfinished| {
            let first = root.or_else(|| unfinished.waiting.keys().next().copied());
            begun = first.filter(|first| unfinished.waiting.remove(first).is_some());
            unfinished.under_way.extend(begun);
            false
        });
        begun
    }

    async fn take_up(&self, root: Digest) {
        /// Those who wait for it are told however that ends.
        struct UnderWay<'a>(&'a Arrivals, Digest);
        impl Drop for UnderWay<'_> {
            fn drop(&mut self) {
                self.0.unfinished.send_modify(|unfinished| _ = unfinished.under_way.remove(&self.1));
            }
        }
        let _under_way = UnderWay(self, root);
        self.go_on(root).await;
    }

    /// Goes on with image `root`, if it was on its way and has a name.
    pub(crate) async fn go_on(&self, root: Digest) {
        let image = self.begin(Begin::Root(root));
        let _one_of_image = image.lock().await;
        if self.current(root).is_some() {
            return;
        }
        let store = self.store.clone();
        let look = move || {
            let plan = plan_of(&store, root)?;
            let (names, _) = store.read_names().ok()?;
            let (name, _) = names.into_iter().find(|(_, other)| *other == root)?;
            Some((plan, name))
        };
        // Without an answer the runtime is ending.
        let Some((plan, name)) = tokio::task::spawn_blocking(look).await.ok().flatten() else { return };
        let target = Target { name, root: Some(root), boot: Pin::Any, verify: false };
        if let Err(error) = self.take(&target, Found::Here(root), &plan).await {
            tracing::error!(image = %target.name, %error, "cannot go on with an image that was on its way");
        }
    }

    /// Nobody begins to fetch image `root` for as long as the result lives.
    pub(crate) async fn keep_away(&self, root: Digest) -> tokio::sync::OwnedMutexGuard<()> {
        self.begin(Begin::Root(root)).lock_owned().await
    }

    /// Image `root` is no longer on its way to anybody here or elsewhere; whoever gets its transfer ends it.
    pub(crate) fn take_out(&self, root: Digest) -> Option<TakenOut> {
        let mut waiting = None;
        self.unfinished.send_if_modified(|unfinished| {
            waiting = unfinished.waiting.remove(&root);
            false
        });
        let arrival = lock(&self.arrivals).remove(&root);
        self.catalogue.withdraw(root);
        match arrival {
            Some(Arrival { engine, hold }) => Some(TakenOut { engine: Some(engine), _hold: hold }),
            None => waiting.map(|hold| TakenOut { engine: None, _hold: hold }),
        }
    }

    /// Ends every transfer, and makes durable what has come.
    pub async fn stop(&self) {
        let arrivals = std::mem::take(&mut *lock(&self.arrivals));
        for arrival in arrivals.into_values() {
            arrival.engine.stop().await;
        }
    }
}

/// How an incomplete image was fetched before.
fn plan_of(store: &Store, root: Digest) -> Option<Plan> {
    let entry = store.image(root).ok().filter(|entry| !entry.is_complete())?;
    let path = entry.dir.join(SOURCES);
    let length = std::fs::metadata(&path).ok()?.len();
    let bytes = (length <= SOURCES_BYTES_MAX).then(|| std::fs::read(&path).ok()).flatten()?;
    serde_json::from_slice(&bytes).ok()
}

/// Once all of the image is here, lets it be removed, and when it was, forgets it: the space is free when nobody has its
/// files open. Until then its figures can be asked for.
async fn let_go(engine: Arc<Engine>, arrivals: Arc<Mutex<ByRoot>>, catalogue: Arc<Catalogue>, store: Store) {
    if !engine.done().await {
        return;
    }
    let root = engine.holding().root();
    // It is served from the store from now on.
    catalogue.withdraw(root);
    let is_still = |arrival: &Arrival| Arc::ptr_eq(&arrival.engine, &engine);
    if let Some(arrival) = lock(&arrivals).get_mut(&root).filter(|arrival| is_still(arrival)) {
        arrival.hold = None;
    }
    while lock(&arrivals).get(&root).is_some_and(is_still) {
        if matches!(store.image(root), Err(StoreError::NoSuchRoot(_))) {
            lock(&arrivals).remove(&root);
            return;
        }
        tokio::time::sleep(REMOVED_INTERVAL).await;
    }
}
