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

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::name::ImageName;
use crate::peer::catalogue::Catalogue;
use crate::store::{Hold, Store, write_atomic};

use super::engine::{Engine, Options};
use super::pull::{PullError, Pulled, Target, pull};

const SOURCES: &str = "sources";
const SOURCES_BYTES_MAX: u64 = 64 << 10;

/// From where, and how, an image is fetched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Nodes that may have it.
    pub sources: Vec<SocketAddr>,
    /// Fetch everything, not only what boots and what is read.
    pub fill: bool,
    /// Bytes a second that the fill may take; 0: as many as there are.
    pub fill_rate: u64,
}

struct Arrival {
    engine: Arc<Engine>,
    _hold: Hold,
}

/// The images that are on their way to this node. Owned by its daemon.
pub struct Arrivals {
    store: Store,
    catalogue: Arc<Catalogue>,
    options: Options,
    arrivals: Mutex<BTreeMap<Digest, Arrival>>,
    /// Held by whoever begins to fetch an image of that name: two at once would each make its folder.
    begins: Mutex<BTreeMap<ImageName, Arc<tokio::sync::Mutex<()>>>>,
}

impl std::fmt::Debug for Arrivals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Arrivals").field("options", &self.options).finish_non_exhaustive()
    }
}

impl Arrivals {
    /// Nothing on its way to `store` yet. `options` hold for every image; what is on its way goes to `catalogue`.
    pub fn new(store: Store, catalogue: Arc<Catalogue>, options: Options) -> Self {
        Self { store, catalogue, options, arrivals: Mutex::default(), begins: Mutex::default() }
    }

    fn arrivals(&self) -> MutexGuard<'_, BTreeMap<Digest, Arrival>> {
        self.arrivals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The transfer of image `root`, while there is one.
    pub fn get(&self, root: Digest) -> Option<Arc<Engine>> {
        self.arrivals().get(&root).map(|arrival| Arc::clone(&arrival.engine))
    }

    /// Begins to fetch `target` as `plan` says; an image that is on its way gets the new sources and rate. Ends when
    /// the image can be read, though most of it is still to come. Its root.
    ///
    /// # Errors
    /// [`PullError`].
    pub async fn pull(&self, target: &Target, plan: &Plan) -> Result<Digest, PullError> {
        let io_error = |source| PullError::Io { name: target.name.clone(), source };
        let begin = Arc::clone(
            self.begins
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .entry(target.name.clone())
                .or_default(),
        );
        let _one = begin.lock().await;
        if let Some(root) = self.store.root_of(&target.name)?
            && target.root.is_none_or(|wanted| wanted == root)
            && let Some(engine) = self.get(root)
        {
            plan.sources.iter().for_each(|source| engine.add_source(*source));
            engine.set_fill_rate(plan.fill_rate);
            if plan.fill {
                engine.fill();
            }
            return Ok(root);
        }
        let similar = Some(self.store.clone());
        let options = Options { fill: plan.fill, fill_rate: plan.fill_rate, similar, ..self.options.clone() };
        match pull(&self.store, target, &plan.sources, options).await? {
            Pulled::Complete(entry) => Ok(entry.root),
            Pulled::Coming(engine) => {
                let root = engine.holding().root();
                let path = self.store.image_dir(root).join(SOURCES);
                let bytes = serde_json::to_vec(plan).map_err(io::Error::other).map_err(io_error)?;
                write_atomic(&path, &bytes).map_err(io_error)?;
                self.keep(engine)?;
                Ok(root)
            }
        }
    }

    fn keep(&self, engine: Engine) -> Result<(), PullError> {
        let hold = self.store.hold(engine.holding().root())?;
        self.catalogue.offer(Arc::clone(engine.holding()));
        let root = engine.holding().root();
        self.arrivals().insert(root, Arrival { engine: Arc::new(engine), _hold: hold });
        Ok(())
    }

    /// Goes on with every image that was on its way when the last daemon ended.
    pub async fn resume(&self) {
        let names: Vec<(ImageName, Digest)> = self.store.names().unwrap_or_default();
        for (name, root) in names {
            let Some(plan) = self.plan_of(root) else { continue };
            let target = Target { name: name.clone(), root: Some(root), verify: false };
            if let Err(error) = self.pull(&target, &plan).await {
                tracing::error!(image = %name, %error, "cannot go on with an image that was on its way");
            }
        }
    }

    /// How an incomplete image was fetched before.
    fn plan_of(&self, root: Digest) -> Option<Plan> {
        let entry = self.store.image(root).ok().filter(|entry| !entry.is_complete())?;
        let path = entry.dir.join(SOURCES);
        let length = std::fs::metadata(&path).ok()?.len();
        let bytes = (length <= SOURCES_BYTES_MAX).then(|| std::fs::read(&path).ok()).flatten()?;
        serde_json::from_slice(&bytes).ok()
    }

    /// Ends every transfer, and makes durable what has come.
    pub async fn stop(&self) {
        let arrivals = std::mem::take(&mut *self.arrivals());
        for arrival in arrivals.into_values() {
            arrival.engine.stop().await;
        }
    }
}
