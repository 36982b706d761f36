//! Removing an image of which this node's own transfer may be the only user.

use super::{Node, NodeError};
use crate::digest::Digest;
use crate::name::ImageName;
use crate::store::remove::Removed;
use crate::store::{Store, StoreError};

impl Node {
    /// Removes `name`. Is it the last name of an image that is on its way, and nobody uses that, then its transfer ends
    /// first; it goes on when the image cannot be removed all the same.
    pub(super) async fn remove_image(&self, name: &ImageName) -> Result<Removed, NodeError> {
        let root = self.store.root_of(name)?.ok_or_else(|| StoreError::NoSuchImage(name.clone()))?;
        let nobody_begins = self.arrivals.keep_away(root).await;
        let (store, image) = (self.store.clone(), name.clone());
        let mut ended = false;
        if self.changing(move || Ok(goes(&store, &image, root)?)).await? {
            let taken = {
                let inner = self.inner.lock().await;
                if inner.images.get(&root).is_some_and(|image| image.strong_count() > 0) {
                    return Err(StoreError::InUse(root).into());
                }
                self.arrivals.take_out(root)
            };
            if let Some(taken) = taken {
                taken.end().await;
                ended = true;
            }
        }
        let (store, image) = (self.store.clone(), name.clone());
        let removed = self.changing(move || Ok(store.remove(&image)?)).await;
        drop(nobody_begins);
        if ended && removed.is_err() {
            self.arrivals.go_on(name.clone(), root).await;
        }
        removed
    }
}

/// Whether image `root` goes with `name`: it has no other, and nothing builds on it.
fn goes(store: &Store, name: &ImageName, root: Digest) -> Result<bool, StoreError> {
    if store.names()?.iter().any(|(other, other_root)| other != name && *other_root == root) {
        return Ok(false);
    }
    match store.dependent_of(root)? {
        Some(dependent) => Err(StoreError::HasDependent { root, dependent }),
        None => Ok(true),
    }
}
