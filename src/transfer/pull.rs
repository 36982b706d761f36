//! Begins the transfer of an image, or takes it up again: the image's folder in the store, from what a source describes.
//!
//! What has to be trusted is the root: given by who asks, or by the name that the store has for it already, or else
//! taken from the first source that answers and kept with the name. The blocks follow from the root. The boot cache does
//! not: a guest reads its blocks before their digests are here, so that it is pinned beside the root ([`Pin`]).

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::boot_cache::BootCache;
use crate::digest::Digest;
use crate::image::manifest::Manifest;
use crate::image::page::LastPage;
use crate::image::partial_tree::PartialTree;
use crate::image::partial_tree::Verdict;
use crate::image::tree::TreeError;
use crate::local_cache::LocalCache;
use crate::name::ImageName;
use crate::peer::connection::Connection;
use crate::peer::holding::{Blocks, Frames, Holding, KnownTree};
use crate::peer::message::{Answer, Ask, Wanted};
use crate::store::{Hold, ImageEntry, Store, StoreError, write_atomic};

use super::engine::{Engine, Options};
use super::receive;
use super::sources::SourceError;

/// How long the first description of an image may take, over all sources.
const DESCRIBE_TIMEOUT: Duration = Duration::from_secs(10);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// How much later than the one before it a source is asked to describe the image.
const NEXT_SOURCE: Duration = Duration::from_millis(50);
const RETRY: Duration = Duration::from_millis(100);

/// Which image to fetch.
#[derive(Debug, Clone)]
pub struct Target {
    /// Its name, at the sources and here.
    pub name: ImageName,
    /// Its root, when that is known from elsewhere. Sources that mean another image by the name are not used.
    pub root: Option<Digest>,
    /// Its boot cache, as far as that is known from elsewhere.
    pub boot: Pin,
    /// Hold everything that is here already against the digests, instead of believing what was saved.
    pub verify: bool,
}

/// Which boot cache of an image is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pin {
    /// That of the first source that answers.
    #[default]
    Any,
    /// None: the image is not known to have one.
    Nothing,
    /// The one whose heads have this digest. From sources that have another, the image is taken without.
    Heads(Digest),
}

impl Pin {
    /// As who knows the image says: the digest of its boot cache's heads, if it has one.
    pub fn of(heads: Option<Digest>) -> Self {
        heads.map_or(Self::Nothing, Self::Heads)
    }

    /// `manifest` without a boot cache that is not the one to be taken, and whether it has the one that is.
    fn hold(self, mut manifest: Manifest) -> (Manifest, bool) {
        let heads = manifest.boot.as_ref().map(|boot| boot.heads_digest);
        let is_it = match self {
            Self::Any => return (manifest, true),
            Self::Nothing => heads.is_none(),
            Self::Heads(wanted) => heads == Some(wanted),
        };
        if !is_it {
            manifest.boot = None;
        }
        // Nothing better comes of asking others where no boot cache is wanted.
        (manifest, is_it || self == Self::Nothing)
    }
}

/// What became of a pull.
#[derive(Debug)]
pub enum Pulled {
    /// The whole image is here already.
    Complete(Box<ImageEntry>),
    /// It is on its way, and stays in the store for as long as the hold lives.
    Coming(Engine, Hold),
}

/// Why an image cannot be fetched.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// No source can be used; the reason of each.
    #[error("no source has image {name}: {reasons}")]
    NoSource {
        /// The image.
        name: ImageName,
        /// The reasons, one a source.
        reasons: String,
    },
    /// Not a single source was named.
    #[error("say where image {0} is to come from: --from HOST:PORT")]
    NoSourceNamed(ImageName),
    /// The store does not take it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The digest tree does not take it.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// A file cannot be used.
    #[error("image {name}: {source}")]
    Io {
        /// The image.
        name: ImageName,
        /// What the system says.
        source: io::Error,
    },
}

/// Which image a [`Target`] is.
#[derive(Debug)]
pub(super) enum Found {
    /// One that is in the store, whole or not.
    Here(Digest),
    /// One that a source describes: its manifest, and the top of its digest tree, which proves the manifest's size.
    There(Box<Manifest>, Vec<u8>),
}

impl Found {
    /// The image's identity.
    pub(super) fn root(&self) -> Digest {
        match self {
            Self::Here(root) => *root,
            Self::There(manifest, _) => manifest.root,
        }
    }
}

/// Starts to fetch `target` from `sources` into `store`, or goes on with what is there. Not to be called for one image
/// twice at once.
///
/// # Errors
/// [`PullError`]. Sources that are not there yet are waited for some seconds; once begun, a transfer waits for ever.
pub async fn pull(
    store: &Store,
    target: &Target,
    sources: &[SocketAddr],
    options: Options,
) -> Result<Pulled, PullError> {
    let found = find(store, target, sources, &options).await?;
    take(store, target, found, sources, options).await
}

/// Finds out which image `target` is.
pub(super) async fn find(
    store: &Store,
    target: &Target,
    sources: &[SocketAddr],
    options: &Options,
) -> Result<Found, PullError> {
    if let Some(root) = here(store, target)? {
        return Ok(Found::Here(root));
    }
    if sources.is_empty() {
        return Err(PullError::NoSourceNamed(target.name.clone()));
    }
    describe_any(target, sources, options).await
}

/// The image that `target` is, if it is in the store.
fn here(store: &Store, target: &Target) -> Result<Option<Digest>, PullError> {
    let Some(root) = store.root_of(&target.name)?.or(target.root) else { return Ok(None) };
    match store.image(root) {
        Ok(_) => {}
        Err(StoreError::NoSuchRoot(_)) => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    if let Some(wanted) = target.root.filter(|wanted| *wanted != root) {
        store.check_name(&target.name, wanted)?;
    }
    Ok(Some(root))
}

/// Makes the folder of `found`, or takes up the one that is there, and starts to fetch what it lacks.
pub(super) async fn take(
    store: &Store,
    target: &Target,
    found: Found,
    sources: &[SocketAddr],
    options: Options,
) -> Result<Pulled, PullError> {
    let io_error = |source| PullError::Io { name: target.name.clone(), source };
    let work = {
        let (store, target) = (store.clone(), target.clone());
        move || {
            let (entry, hold) = match found {
                Found::Here(root) => {
                    // First: an image that is in use is not removed.
                    let hold = store.hold(root)?;
                    store.add_name(&target.name, root)?;
                    (store.image(root)?, hold)
                }
                Found::There(manifest, top) => make(&store, &target, &manifest, &top)?,
            };
            let opened = match entry.is_complete() {
                true => None,
                false => Some(open(&entry.dir, entry.manifest.clone(), target.verify)?),
            };
            Ok::<_, PullError>((entry, hold, opened))
        }
    };
    let taken = tokio::task::spawn_blocking(work).await;
    let (entry, hold, opened) = taken.map_err(io::Error::other).map_err(io_error)??;
    Ok(match opened {
        None => Pulled::Complete(Box::new(entry)),
        Some((holding, cache)) => {
            Pulled::Coming(Engine::start(holding, cache, &entry.dir, sources, options), hold)
        }
    })
}

/// Opens what has come of an image; verifies what was written after the last save, or everything.
///
/// # Errors
/// [`PullError::Tree`], [`PullError::Io`].
pub fn open(
    dir: &Path,
    manifest: Manifest,
    verify: bool,
) -> Result<(Arc<Holding>, Arc<LocalCache>), PullError> {
    let tree = PartialTree::open(&dir.join("tree"), manifest.root)?;
    let disk_error = |error| TreeError::Io { path: dir.join("disk"), error };
    let mut cache = LocalCache::open(dir, manifest.root, manifest.size).map_err(disk_error)?;
    let mut last = LastPage::default();
    let check = |block, bytes: &[u8]| {
        Ok(match tree.verify_block(block, bytes, &mut last).map_err(io::Error::other)? {
            Verdict::Good => Some(true),
            Verdict::Bad => Some(false),
            // Nothing says what it should be: with the saved bits distrusted, it is fetched again.
            Verdict::UnknownPage => verify.then_some(false),
        })
    };
    let recovered = cache.recover(!verify, check);
    recovered.map_err(|error| error.downcast::<TreeError>().unwrap_or_else(disk_error))?;
    let cache = Arc::new(cache);
    let frames = manifest.boot.as_ref().and_then(|boot| {
        let found = BootCache::open(&dir.join("boot"), manifest.root).ok()?;
        let ours = found.heads_digest() == boot.heads_digest && found.heads().size() == manifest.size;
        ours.then(|| Frames::check(found).ok()).flatten()
    });
    let blocks = Blocks::Cache(Arc::clone(&cache));
    let holding = Arc::new(Holding::new(manifest, blocks, KnownTree::Partial(tree), frames));
    receive::learn_all_zeroes(&holding, &cache);
    // Frames that were kept when their blocks were not yet saved.
    if let Some(frames) = holding.frames() {
        for index in (0..frames.count()).filter(|index| frames.has(*index)) {
            if frames.heads().frame_runs(index).iter().any(|run| !cache.has(run.extent))
                && let Ok(bytes) = frames.read(index)
                && let Err(error) = receive::keep_frame_blocks(&holding, &cache, index, &bytes)
            {
                tracing::warn!(%error, index, "cannot take up a boot frame again");
            }
        }
    }
    Ok((holding, cache))
}

/// The image as the first source that answers describes it.
async fn describe_any(
    target: &Target,
    sources: &[SocketAddr],
    options: &Options,
) -> Result<Found, PullError> {
    let may_not = sources.iter().filter_map(|source| options.security.check(*source).err());
    let may_not: Vec<String> = may_not.map(|refused| refused.to_string()).collect();
    if may_not.len() == sources.len() {
        return Err(PullError::NoSource { name: target.name.clone(), reasons: may_not.join("; ") });
    }
    let until = Instant::now() + DESCRIBE_TIMEOUT;
    loop {
        // All but at once: one that is dead or slow keeps nobody waiting, and in the rule the first answers.
        let mut asking: FuturesUnordered<_> = (0..)
            .zip(sources)
            .map(|(place, source)| async move {
                tokio::time::sleep(NEXT_SOURCE * place).await;
                (source, describe(*source, target, options).await)
            })
            .collect();
        let (mut reasons, mut found) = (Vec::new(), None);
        while let Some((source, described)) = asking.next().await {
            match described {
                Ok((manifest, top)) => {
                    let (manifest, has_boot) = target.boot.hold(manifest);
                    found = Some((manifest, top));
                    if has_boot {
                        break;
                    }
                    tracing::warn!(%source, image = %target.name, "a source has another boot cache of the image: it is not taken");
                }
                Err(error) => reasons.push(format!("{source}: {error}")),
            }
        }
        if let Some((manifest, top)) = found {
            return Ok(Found::There(Box::new(manifest), top));
        }
        if Instant::now() >= until {
            return Err(PullError::NoSource { name: target.name.clone(), reasons: reasons.join("; ") });
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// The manifest of the image, and the top of its digest tree, which proves the manifest's size.
async fn describe(
    source: SocketAddr,
    target: &Target,
    options: &Options,
) -> Result<(Manifest, Vec<u8>), SourceError> {
    // Not as one that serves: that is said when there is something to serve.
    let hello = crate::peer::message::Hello { listen: None, ..options.hello() };
    let connection = Connection::open(source, &options.security, &hello).await?;
    let call = async |ask| {
        tokio::time::timeout(ANSWER_TIMEOUT, connection.call(ask)).await.map_err(|_| SourceError::Silent)
    };
    let wanted = target.root.map_or_else(|| Wanted::Name(target.name.clone()), Wanted::Root);
    let described = call(Ask::Describe(wanted)).await??;
    if !matches!(described.answer, Answer::Described { .. }) {
        return Err(SourceError::of(&described.answer));
    }
    let manifest = Manifest::from_bytes(described.bulk()).map_err(|_| SourceError::OtherImage)?;
    if target.root.is_some_and(|root| root != manifest.root) {
        return Err(SourceError::OtherImage);
    }
    let top = call(Ask::Top { root: manifest.root }).await??;
    if top.answer != Answer::Data {
        return Err(SourceError::of(&top.answer));
    }
    if crate::image::tree::root_digest(manifest.size, top.bulk()) != manifest.root {
        return Err(SourceError::OtherImage);
    }
    Ok((manifest, top.bulk().to_vec()))
}

/// Makes the image's folder, unless there is one by now. Blocks.
fn make(
    store: &Store,
    target: &Target,
    manifest: &Manifest,
    top: &[u8],
) -> Result<(ImageEntry, Hold), PullError> {
    let io_error = |source| PullError::Io { name: target.name.clone(), source };
    let scratch = store.scratch("pull")?;
    LocalCache::create(scratch.path(), manifest.root, manifest.size).map_err(io_error)?;
    PartialTree::create(&scratch.join("tree"), manifest.root, manifest.size, top)?.sync()?;
    write_atomic(&scratch.join("manifest"), &manifest.to_bytes()).map_err(io_error)?;
    Ok(store.publish_arriving(scratch, manifest.root, &target.name)?)
}
