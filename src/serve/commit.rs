//! Makes an image of an overlay: a sealed copy of its own blocks, a tree and a manifest.

use std::fs::File;

use super::node::{NodeError, at};
use crate::block::BLOCK_SIZE;
use crate::digest::Digest;
use crate::image::increment_tree::{Change, build_increment_tree};
use crate::image::manifest::{MANIFEST_VERSION, Manifest, SourceFormat};
use crate::image::tree::Tree;
use crate::name::ImageName;
use crate::overlay::{BlockState, Sealed};
use crate::store::{Scratch, Store, write_atomic};

/// Publishes what an overlay of `size` bytes over image `base` was sealed to, in `scratch`, as image `name`; returns
/// its root. Blocks.
pub(super) fn publish(
    store: &Store,
    scratch: Scratch,
    sealed: &Sealed,
    base: Digest,
    size: u64,
    name: &ImageName,
) -> Result<Digest, NodeError> {
    let failed = |error: &dyn std::fmt::Display| NodeError::Commit(error.to_string());
    let changes: Vec<Change> = sealed
        .runs
        .iter()
        .map(|run| Change { extent: run.extent, zero: run.state == BlockState::Zero })
        .collect();
    let below = store.image(base)?;
    let tree = Tree::open(&below.tree_path(), Some(base)).map_err(|error| failed(&error))?;
    let path = scratch.join("disk");
    let disk = File::open(&path).map_err(at(&path))?;
    let root = build_increment_tree(&tree, size, &changes, &disk, &scratch.join("tree"))
        .map_err(|error| failed(&error))?;
    let own: u64 = changes.iter().filter(|change| !change.zero).map(|change| change.extent.count).sum();
    let manifest = Manifest {
        version: MANIFEST_VERSION,
        size,
        root,
        raw_blake3: None,
        kind: below.manifest.kind,
        source_format: SourceFormat::Overlay,
        base: Some(base),
        allocated: own * BLOCK_SIZE,
        boot: None,
    };
    let path = scratch.join("manifest");
    write_atomic(&path, &manifest.to_bytes()).map_err(at(&path))?;
    store.publish(scratch, root, name)?;
    Ok(root)
}
