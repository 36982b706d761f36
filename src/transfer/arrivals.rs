//! The images that are on their way to this node: one engine each, offered to others from the first frame on.
//!
//! The sources of each are kept beside it, so that a daemon that was stopped or killed goes on when it is back:
//!
//! ```text
//! images/ROOT/sources   JSON: the addresses, whether everything is wanted, bytes a second
//! ```

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::name::ImageName;
use crate::peer::catalogue::Catalogue;
use crate::store::{Hold, Store, StoreError, write_atomic};

use super::engine::{Engine, Options};
use super::pull::{self, Pin, PullError, Pulled, Target};

const SOURCES: &str = "sources";
const SOURCES_BYTES_MAX: u64 = 64 << 10;
/// Sources that are written down: the newest.
const SOURCES_MAX: usize = 64;
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

struct Arrival {
    engine: Arc<Engine>,
    /// Keeps the image from being removed until all of it is here.
    hold: Option<Hold>,
}

/// A transfer that nobody finds any more, and the hold on its image.
pub(crate) struct TakenOut {
    engine: Arc<Engine>,
    _hold: Option<Hold>,
}

impl TakenOut {
    /// Ends the transfer, and lets the image be removed.
    pub(crate) async fn end(self) {
        self.engine.end().await;
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
    arrivals: Arc<Mutex<ByRoot>>,
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
        Self { store, catalogue, options, arrivals: Arc::default(), begins: Mutex::default() }
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
        let io_error = |source| PullError::Io { name: target.name.clone(), source };
        let similar = Some(self.store.clone());
        let options = Options { fill: plan.fill, fill_rate: plan.fill_rate, similar, ..self.options.clone() };
        let name = self.begin(Begin::Name(target.name.clone()));
        let _one_of_name = name.lock().await;
        let found = pull::find(&self.store, target, &plan.sources, &options).await?;
        let root = found.root();
        let image = self.begin(Begin::Root(root));
        let _one_of_image = image.lock().await;
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
            return Ok(root);
        }
        if let Pulled::Coming(engine, hold) =
            pull::take(&self.store, target, found, &plan.sources, options).await?
        {
            engine.set_fill_rate(self.remember(root, plan).await.map_err(io_error)?);
            self.keep(engine, hold);
        }
        Ok(root)
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
                let known: Vec<SocketAddr> =
                    before.sources.into_iter().filter(|source| !plan.sources.contains(source)).collect();
                plan.sources.extend(known);
                plan.sources.truncate(SOURCES_MAX);
                plan.fill |= before.fill;
                if plan.fill_rate == 0 {
                    plan.fill_rate = before.fill_rate;
                }
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

    /// Goes on with every image that was on its way when the last daemon ended.
    pub async fn resume(&self) {
        let (names, unreadable) = self.store.read_names().unwrap_or_else(|error| (Vec::new(), vec![error]));
        for error in unreadable {
            tracing::warn!(%error, "a name of the store cannot be read");
        }
        for (name, root) in names {
            self.go_on(name, root).await;
        }
    }

    /// Goes on with image `root`, called `name`, if it was on its way.
    pub(crate) async fn go_on(&self, name: ImageName, root: Digest) {
        let Some(plan) = plan_of(&self.store, root) else { return };
        let target = Target { name: name.clone(), root: Some(root), boot: Pin::Any, verify: false };
        if let Err(error) = self.pull(&target, &plan).await {
            tracing::error!(image = %name, %error, "cannot go on with an image that was on its way");
        }
    }

    /// Nobody begins to fetch image `root` for as long as the result lives.
    pub(crate) async fn keep_away(&self, root: Digest) -> tokio::sync::OwnedMutexGuard<()> {
        self.begin(Begin::Root(root)).lock_owned().await
    }

    /// Image `root` is no longer on its way to anybody here or elsewhere; whoever gets its transfer ends it.
    pub(crate) fn take_out(&self, root: Digest) -> Option<TakenOut> {
        let Arrival { engine, hold } = lock(&self.arrivals).remove(&root)?;
        self.catalogue.withdraw(root);
        Some(TakenOut { engine, _hold: hold })
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
