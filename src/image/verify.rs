//! Whether an image in the store is what it was: every block against the digest tree, the whole disk against its plain
//! BLAKE3, and every block of the boot cache against the tree.
//!
//! What cannot be read as what it should be is a [`Finding`], not an error: verification goes on to find the rest.

use std::fmt;
use std::io;
use std::sync::Mutex;

use crate::block::{BLOCK_BYTES, BlockIndex};
use crate::boot_cache::{BootCache, BootCacheError, decode_frame};
use crate::digest::Digest;
use crate::store::{ImageEntry, Store, StoreError};

use super::page::PAGE_BLOCKS;
use super::scan::{PageView, ScanError, Watch, scan};
use super::stored_disk::StoredDisk;
use super::tree::Tree;

/// A difference between what is stored and what should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finding {
    /// Blocks of the disk are not those of the image.
    Blocks {
        /// How many.
        count: u64,
        /// Byte offset of the first.
        first: u64,
    },
    /// The disk as a whole does not have its plain BLAKE3, although every block has its digest.
    Raw {
        /// What it has.
        found: Digest,
    },
    /// A file of the image is damaged or missing; what it says of itself.
    File(String),
    /// The boot cache is sound in itself, but holds blocks that are not those of the image.
    BootBlocks {
        /// How many.
        count: u64,
    },
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blocks { count, first } => {
                write!(
                    f,
                    "{count} blocks of the disk differ from the image, the first at byte {first}: \
                     remove the image and add it again"
                )
            }
            Self::Raw { found } => write!(
                f,
                "the disk's BLAKE3 is {found}, not that of the manifest: remove the image and add it again"
            ),
            Self::File(what) => f.write_str(what),
            Self::BootBlocks { count } => {
                write!(f, "{count} blocks of the boot cache differ from the image: record the image again")
            }
        }
    }
}

/// What a verification came to.
#[derive(Debug, Clone)]
pub struct Report {
    /// The plain BLAKE3 of the disk, when it could be read to its end.
    pub raw_blake3: Option<Digest>,
    /// What is not as it should be; empty when all is well.
    pub findings: Vec<Finding>,
}

/// Why an image could not be verified.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// It is still arriving from peers.
    #[error("image {} has not arrived completely: wait for it, or use `bootcache pull`", .0.short())]
    Incomplete(Digest),
    /// The disk, or a file of the store, cannot be read.
    #[error("image {}: {error}", root.short())]
    Read { root: Digest, error: ScanError },
    /// The store cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Verifies `entry` as a whole.
///
/// # Errors
/// [`VerifyError`] when it cannot be told; that the image is damaged is in the report.
pub fn verify(store: &Store, entry: &ImageEntry, watch: &Watch) -> Result<Report, VerifyError> {
    if !entry.is_complete() {
        return Err(VerifyError::Incomplete(entry.root));
    }
    let damaged = |what: String| Report { raw_blake3: None, findings: vec![Finding::File(what)] };
    let tree = match Tree::open(&entry.tree_path(), Some(entry.root)) {
        Ok(tree) if tree.size() == entry.manifest.size => tree,
        Ok(_) => return Ok(damaged("the manifest's size is not that of the image".to_owned())),
        Err(error) => return Ok(damaged(error.to_string())),
    };
    let disk = match StoredDisk::open(store, entry) {
        Ok(disk) => disk,
        Err(error @ StoreError::Io { .. }) => return Err(error.into()),
        Err(error) => return Ok(damaged(error.to_string())),
    };
    watch.start("verifying", tree.size());
    let bad = Mutex::new((0, u64::MAX));
    let raw = scan(&disk, watch, |view| {
        let (count, first) = bad_blocks(&tree, view);
        if count > 0 {
            let mut bad = bad.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            *bad = (bad.0 + count, bad.1.min(first));
        }
        Ok(())
    })
    .map_err(|error| VerifyError::Read { root: entry.root, error })?;
    let mut findings = Vec::new();
    match bad.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
        (0, _) if entry.manifest.raw_blake3.is_some_and(|expected| expected != raw) => {
            findings.push(Finding::Raw { found: raw });
        }
        (0, _) => {}
        (count, first) => findings.push(Finding::Blocks { count, first }),
    }
    findings.extend(verify_boot(entry, &tree));
    Ok(Report { raw_blake3: Some(raw), findings })
}

/// How many blocks of a page are not what the tree says, and the byte offset of the first.
fn bad_blocks(tree: &Tree, view: &PageView<'_>) -> (u64, u64) {
    let first = view.index * PAGE_BLOCKS;
    let is_bad = |block: &u64| match view.data {
        Some(data) => {
            let at = usize::try_from((block - first) * BLOCK_BYTES as u64).expect("a page spans 512 KiB");
            !tree.verify_block(*block, &data[at..data.len().min(at + BLOCK_BYTES)])
        }
        None => !tree.is_zero(*block),
    };
    let mut bad = (first..tree.blocks().min(first + PAGE_BLOCKS)).filter(is_bad);
    match bad.next() {
        Some(block) => (1 + bad.count() as u64, BlockIndex(block).offset()),
        None => (0, 0),
    }
}

/// The boot cache of a pulled image lacks the frames whose blocks came in another way, and is missing when no source had
/// the one that the manifest names. Neither is damage: the blocks are on the disk.
fn verify_boot(entry: &ImageEntry, tree: &Tree) -> Option<Finding> {
    let boot = entry.manifest.boot.as_ref()?;
    let partial = entry.is_pulled();
    let checked = BootCache::open(&entry.boot_path(), entry.root).and_then(|cache| {
        if cache.heads_digest() != boot.heads_digest || cache.file_length() != boot.file_length {
            return Err(BootCacheError::Damaged("it is not the one that the manifest names"));
        }
        bad_boot_blocks(&cache, tree, partial)
    });
    match checked {
        Ok(0) => None,
        Ok(count) => Some(Finding::BootBlocks { count }),
        Err(BootCacheError::Io(error)) if partial && error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => Some(Finding::File(error.to_string())),
    }
}

/// How many blocks of the boot cache are not those of the image; of a `partial` one those of the frames that are there.
fn bad_boot_blocks(cache: &BootCache, tree: &Tree, partial: bool) -> Result<u64, BootCacheError> {
    let mut count = 0;
    for index in 0..cache.heads().frames().len() {
        let bytes = match cache.read_frame(index) {
            Err(BootCacheError::BadFrame(_)) if partial => continue,
            read => read?,
        };
        for (extent, data) in decode_frame(cache.heads(), index, &bytes)?.runs() {
            for (i, block) in extent.blocks().enumerate() {
                let good = match data {
                    _ if block >= tree.blocks() => false,
                    Some(data) => tree.verify_block(block, &data[i * BLOCK_BYTES..(i + 1) * BLOCK_BYTES]),
                    None => tree.is_zero(block),
                };
                count += u64::from(!good);
            }
        }
    }
    Ok(count)
}
