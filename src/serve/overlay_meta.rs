//! `meta` of an overlay's folder: what must be known before the overlay is opened.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::node::{NodeError, at};
use crate::digest::Digest;
use crate::store::write_atomic;

const META_FILE: &str = "meta";
const VERSION: u32 = 1;

/// JSON beside an overlay's index and diff.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct OverlayMeta {
    version: u32,
    /// Root digest of the image below.
    pub(super) base: Digest,
}

impl OverlayMeta {
    pub(super) fn new(base: Digest) -> Self {
        Self { version: VERSION, base }
    }

    pub(super) fn read(dir: &Path) -> Result<Self, NodeError> {
        let path = dir.join(META_FILE);
        let text = std::fs::read(&path).map_err(at(&path))?;
        serde_json::from_slice(&text).map_err(|error| at(&path)(error.into()))
    }

    pub(super) fn write(&self, dir: &Path) -> Result<(), NodeError> {
        let path = dir.join(META_FILE);
        let text = serde_json::to_vec(self).expect("two digests and a number are always JSON");
        write_atomic(&path, &text).map_err(at(&path))
    }
}
