//! The store's size limit: what came from peers, and nothing uses, goes when room is needed, the longest unused first.
//!
//! Images that a person added are never evicted, unless they have no name, as when they were added and there was no room
//! for it. What came from a peer has an empty file `pulled` beside its manifest,
//! whose modification time is when the image was last opened. An image stays while it is open (a [`super::Hold`]),
//! or an overlay or an increment builds on it.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::time::{Duration, SystemTime};

use tokio_util::sync::CancellationToken;

use crate::digest::Digest;

use super::lock::Hold;
use super::{ImageEntry, Store, StoreError, at, scratch};

/// How often a daemon looks.
const PERIOD: Duration = Duration::from_secs(60);

/// An image that was evicted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Evicted {
    /// Its identity.
    pub root: Digest,
    /// Bytes that the file system got back.
    pub freed: u64,
}

impl ImageEntry {
    /// Whether it came from a peer, and no person wanted to keep it since.
    pub fn is_pulled(&self) -> bool {
        self.dir.join("pulled").exists()
    }
}

impl Store {
    /// Says that image `root` came from a peer and was used just now.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn mark_pulled(&self, root: Digest) -> Result<(), StoreError> {
        let path = self.image_dir(root).join("pulled");
        File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .and_then(|file| file.set_modified(SystemTime::now()))
            .map_err(at(&path))
    }

    /// Says that image `root` was used just now; nothing to do for one that a person added, perhaps this moment.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn touch(&self, root: Digest) -> Result<(), StoreError> {
        let path = self.image_dir(root).join("pulled");
        let opened = File::options().write(true).open(&path);
        match opened.and_then(|file| file.set_modified(SystemTime::now())) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at(&path)(error)),
            _ => Ok(()),
        }
    }

    /// Says that a person wants to keep image `root`.
    pub(super) fn forget_pulled(&self, root: Digest) -> Result<(), StoreError> {
        let path = self.image_dir(root).join("pulled");
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at(&path)(error)),
            _ => Ok(()),
        }
    }

    /// When a pulled image was last used; none for one that a person added.
    fn last_use(&self, root: Digest) -> Option<SystemTime> {
        fs::metadata(self.image_dir(root).join("pulled")).and_then(|metadata| metadata.modified()).ok()
    }

    /// Bytes that all images take in the file system.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn images_bytes(&self) -> Result<u64, StoreError> {
        Ok(self.roots()?.into_iter().map(|root| scratch::stored_bytes(&self.image_dir(root))).sum())
    }

    /// Removes pulled images that nothing uses, the longest unused first, until all images together take at most
    /// `limit` bytes. Less may be removed than that needs: what is in use or was added by a person stays.
    ///
    /// # Errors
    /// [`StoreError::Io`], [`StoreError::Damaged`].
    pub fn evict(&self, limit: u64) -> Result<Vec<Evicted>, StoreError> {
        let mut stored = self.images_bytes()?;
        if stored <= limit {
            return Ok(Vec::new());
        }
        let change = self.change(|_| ())?;
        let (names, unreadable) = self.read_names()?;
        let named: HashSet<Digest> = names.into_iter().map(|(_, root)| root).collect();
        // A name that cannot be read may be that of any image.
        let has_name = |root| !unreadable.is_empty() || named.contains(&root);
        let age = |root| self.last_use(root).or_else(|| (!has_name(root)).then_some(SystemTime::UNIX_EPOCH));
        let mut candidates: Vec<(SystemTime, Digest)> =
            self.roots()?.into_iter().filter_map(|root| Some((age(root)?, root))).collect();
        candidates.sort();
        let mut evicted = Vec::new();
        let mut buried = Vec::new();
        // A base becomes free when the increment on it has gone, so one round may not be enough.
        while stored > limit {
            let Some((position, hold)) = self.first_unused(&candidates)? else { break };
            let (_, root) = candidates.remove(position);
            let image = self.delete_image(root, hold, &change)?;
            for (name, _) in self.names()?.into_iter().filter(|(_, named)| *named == root) {
                self.remove_name(&name)?;
            }
            stored = stored.saturating_sub(image.freed);
            evicted.push(Evicted { root, freed: image.freed });
            buried.push(image);
        }
        drop(change); // others need not wait for the rest
        Ok(evicted)
    }

    /// Evicts every minute until `cancel`. Dropping the future ends it as well.
    pub async fn keep_within(self, limit: u64, cancel: CancellationToken) {
        let mut minute = tokio::time::interval(PERIOD);
        while cancel.run_until_cancelled(minute.tick()).await.is_some() {
            let store = self.clone();
            match tokio::task::spawn_blocking(move || store.evict(limit)).await {
                Ok(Ok(evicted)) => evicted.iter().for_each(|Evicted { root, freed }| {
                    tracing::info!("evicted image {}: {freed} bytes freed", root.short());
                }),
                Ok(Err(error)) => tracing::warn!("cannot make room in the store: {error}"),
                Err(_) => return,
            }
        }
    }

    fn first_unused(&self, candidates: &[(SystemTime, Digest)]) -> Result<Option<(usize, Hold)>, StoreError> {
        for (position, (_, root)) in candidates.iter().enumerate() {
            if self.dependent_of(*root)?.is_some() {
                continue;
            }
            match Hold::exclusive(&self.image_dir(*root), *root) {
                Ok(hold) => return Ok(Some((position, hold))),
                Err(StoreError::InUse(_) | StoreError::NoSuchRoot(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }
}
