//! Whether an image in the store is what it was: every block against the digest tree, the whole disk against its plain
//! BLAKE3, and every block of the boot cache against the tree.
//!
//! What is not what it should be is a [`Finding`], not an error: verification goes on to find the rest. A file that the
//! system does not read is an error: of what is in it nothing is known.

use std::fmt;
use std::io;
use std::sync::Mutex;

use crate::block::{BLOCK_BYTES, BlockIndex};
use crate::boot_cache::{BootCache, BootCacheError, decode_frame};
use crate::digest::Digest;
use crate::store::{ImageEntry, Store, StoreError};

use super::page::{LastPage, PAGE_BLOCKS};
use super::scan::{PageView, ScanError, Watch, scan};
use super::stored_disk::StoredDisk;
use super::tree::{Tree, TreeError};

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
                     add an intact copy of the image again, which repairs it (remove an increment first)"
                )
            }
            Self::Raw { found } => write!(
                f,
                "the disk's BLAKE3 is {found}, not that of the manifest: add an intact copy of the image again, which repairs it (remove an increment first)"
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
    let unreadable = |error| VerifyError::Read { root: entry.root, error };
    let tree = match Tree::open(&entry.tree_path(), Some(entry.root)) {
        Ok(tree) if tree.size() == entry.manifest.size => tree,
        Ok(_) => return Ok(damaged("the manifest's size is not that of the image".to_owned())),
        Err(TreeError::Io { path, error }) if is_unreadable(&error) => {
            return Err(unreadable(TreeError::Io { path, error }.into()));
        }
        Err(error) => return Ok(damaged(error.to_string())),
    };
    let disk = match StoredDisk::open(store, entry) {
        Ok(disk) => disk,
        Err(error @ StoreError::Io { .. }) => return Err(error.into()),
        Err(error) => return Ok(damaged(error.to_string())),
    };
    watch.start("verifying", tree.size());
    let bad = Mutex::new((0, u64::MAX));
    let scanned = scan(&disk, watch, |view| {
        let (count, first) = bad_blocks(&tree, view)?;
        if count > 0 {
            let mut bad = bad.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            *bad = (bad.0 + count, bad.1.min(first));
        }
        Ok(())
    });
    let raw = match scanned {
        Ok(raw) => raw,
        Err(ScanError::Tree(error @ TreeError::Damaged { .. })) => return Ok(damaged(error.to_string())),
        Err(error) => return Err(unreadable(error)),
    };
    let mut findings = Vec::new();
    match bad.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
        (0, _) if entry.manifest.raw_blake3.is_some_and(|expected| expected != raw) => {
            findings.push(Finding::Raw { found: raw });
        }
        (0, _) => {}
        (count, first) => findings.push(Finding::Blocks { count, first }),
    }
    findings.extend(verify_boot(entry, &tree).map_err(unreadable)?);
    Ok(Report { raw_blake3: Some(raw), findings })
}

/// Whether there is something that the system does not read; what is missing or cut short is damage.
fn is_unreadable(error: &io::Error) -> bool {
    !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof)
}

/// How many blocks of a page are not what the tree says, and the byte offset of the first.
fn bad_blocks(tree: &Tree, view: &PageView<'_>) -> Result<(u64, u64), TreeError> {
    let page = tree.page(view.index)?;
    let first = view.index * PAGE_BLOCKS;
    let blocks = usize::try_from(PAGE_BLOCKS.min(tree.blocks() - first)).expect("at most 128");
    let is_bad = |i: &usize| match view.data {
        Some(data) => {
            let at = i * BLOCK_BYTES;
            !page.verify(*i, &data[at..data.len().min(at + BLOCK_BYTES)])
        }
        None => !page.is_zero_at(*i),
    };
    let mut bad = (0..blocks).filter(is_bad);
    Ok(match bad.next() {
        Some(i) => (1 + bad.count() as u64, BlockIndex(first + i as u64).offset()),
        None => (0, 0),
    })
}

/// Why the blocks of a boot cache cannot be compared.
enum BootFailure {
    Boot(BootCacheError),
    Tree(TreeError),
}

impl From<BootCacheError> for BootFailure {
    fn from(error: BootCacheError) -> Self {
        Self::Boot(error)
    }
}

impl From<TreeError> for BootFailure {
    fn from(error: TreeError) -> Self {
        Self::Tree(error)
    }
}

/// The boot cache of a pulled image lacks the frames whose blocks came in another way, and is missing when no source had
/// the one that the manifest names. Neither is damage: the blocks are on the disk.
fn verify_boot(entry: &ImageEntry, tree: &Tree) -> Result<Option<Finding>, ScanError> {
    let Some(boot) = entry.manifest.boot.as_ref() else { return Ok(None) };
    let partial = entry.is_pulled();
    let check = || {
        let cache = BootCache::open(&entry.boot_path(), entry.root)?;
        if cache.heads_digest() != boot.heads_digest || cache.file_length() != boot.file_length {
            return Err(BootCacheError::Damaged("it is not the one that the manifest names").into());
        }
        bad_boot_blocks(&cache, tree, partial)
    };
    match check() {
        Ok(0) => Ok(None),
        Ok(count) => Ok(Some(Finding::BootBlocks { count })),
        Err(BootFailure::Boot(BootCacheError::Io(error)))
            if partial && error.kind() == io::ErrorKind::NotFound =>
        {
            Ok(None)
        }
        Err(BootFailure::Boot(BootCacheError::Io(error))) if is_unreadable(&error) => {
            Err(io::Error::other(BootCacheError::Io(error)).into())
        }
        Err(BootFailure::Boot(error)) => Ok(Some(Finding::File(error.to_string()))),
        Err(BootFailure::Tree(error @ TreeError::Damaged { .. })) => {
            Ok(Some(Finding::File(error.to_string())))
        }
        Err(BootFailure::Tree(error)) => Err(error.into()),
    }
}

/// How many blocks of the boot cache are not those of the image; of a `partial` one those of the frames that are there.
fn bad_boot_blocks(cache: &BootCache, tree: &Tree, partial: bool) -> Result<u64, BootFailure> {
    let (mut count, mut last) = (0, LastPage::default());
    for index in 0..cache.heads().frames().len() {
        let bytes = match cache.read_frame(index) {
            Err(BootCacheError::BadFrame(_)) if partial => continue,
            read => read?,
        };
        for (extent, data) in decode_frame(cache.heads(), index, &bytes)?.runs() {
            for (i, block) in extent.blocks().enumerate() {
                let good = match data {
                    _ if block >= tree.blocks() => false,
                    Some(data) => {
                        tree.verify_block(block, &data[i * BLOCK_BYTES..(i + 1) * BLOCK_BYTES], &mut last)?
                    }
                    None => tree.is_zero(block)?,
                };
                count += u64::from(!good);
            }
        }
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::image::import::tests::one_image;

    /// It passed for damage, and the advice was to remove the image.
    #[test]
    fn a_tree_that_cannot_be_read_is_an_error_and_no_finding() {
        let dir = tempfile::tempdir().unwrap();
        let (store, entry) = one_image(dir.path());
        fs::remove_file(entry.tree_path()).unwrap();
        let missing = verify(&store, &entry, &Watch::default()).unwrap();
        assert!(matches!(&missing.findings[..], [Finding::File(_)]), "{missing:?}");
        // It opens, and every read of it fails.
        fs::create_dir(entry.tree_path()).unwrap();
        let error = verify(&store, &entry, &Watch::default()).unwrap_err();
        assert!(
            matches!(error, VerifyError::Read { error: ScanError::Tree(TreeError::Io { .. }), .. }),
            "{error}"
        );
    }
}
