//! The digest tree: one BLAKE3 digest per 4 KiB block, and the small Merkle tree above them that is an image's identity.
//!
//! ```text
//! block   BLAKE3 of its 4 KiB, wherever it lies: equal blocks have equal digests in every image
//! page    128 blocks (512 KiB): derive_key("bootcache page v1") of the bytes of `image::page`
//! group   128 pages (64 MiB): derive_key("bootcache group v1") of its page digests in order
//! root    derive_key("bootcache root v1") of the disk's size (u64, little-endian), then the group digests
//! ```
//!
//! The position of a block is bound by the page it is in, that of a page by its group, that of a group by the root.
//!
//! On disk every part has a fixed place, so that a file that is still being filled ([`super::partial_tree`]) has the
//! same form as a whole one, and what is zero is a hole:
//!
//! ```text
//! header   4096 bytes: magic "BCTREE\r\n", version u32, zero u32, size u64, root 32 bytes, zeroes
//! top      group digests, padded to 4096
//! groups   page digests, 4096 bytes a group, the last padded
//! bitmaps  16 bytes a page, padded to 4096
//! digests  4096 bytes a page: 32 bytes a block, zeroes for a zero block
//! ```
//!
//! A [`Tree`] has been checked as a whole when it was opened; the accessors do not check again.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use memmap2::Mmap;

use crate::block::blocks_for;
use crate::digest::{DIGEST_BYTES, Digest};

use super::extents::data_extents;
use super::page::{self, BITMAP_BYTES, PAGE_BLOCKS, Page};

/// Pages in a group.
pub const GROUP_PAGES: u64 = 128;
/// Bytes of the longest group.
pub const GROUP_BYTES_MAX: usize = 128 * DIGEST_BYTES;
/// Blocks in a group.
pub const GROUP_BLOCKS: u64 = GROUP_PAGES * PAGE_BLOCKS;
/// The largest disk, in bytes: 8 TiB. It bounds the top of a tree to 4 MiB.
pub const SIZE_MAX: u64 = 8 << 40;

const MAGIC: &[u8; 8] = b"BCTREE\r\n";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 56;
const ALIGN: u64 = 4096;
const DIGEST_LENGTH: u64 = DIGEST_BYTES as u64;

/// Why a digest tree cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// The file cannot be read or written.
    #[error("digest tree {}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
    /// The file is not what was once written: the image must be fetched or added again.
    #[error("digest tree {}: {what}; the file is damaged, remove the image and add it again", path.display())]
    Damaged { path: PathBuf, what: &'static str },
    /// The tree is sound but belongs to another image.
    #[error("digest tree {}: belongs to image {}, not {}", path.display(), found.short(), expected.short())]
    OtherImage { path: PathBuf, found: Digest, expected: Digest },
    /// Bytes from outside are not a part of this tree.
    #[error("not a part of this digest tree: {0}")]
    Malformed(&'static str),
    /// The disk is larger than the format allows.
    #[error("a disk of {0} bytes is larger than the limit of 8 TiB")]
    TooLarge(u64),
}

/// Where everything is in the tree of a disk of a given size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) size: u64,
}

impl Layout {
    pub(super) const fn new(size: u64) -> Result<Self, TreeError> {
        if size > SIZE_MAX {
            return Err(TreeError::TooLarge(size));
        }
        Ok(Self { size })
    }

    pub(super) const fn blocks(self) -> u64 {
        blocks_for(self.size)
    }

    pub(super) const fn pages(self) -> u64 {
        self.blocks().div_ceil(PAGE_BLOCKS)
    }

    pub(super) const fn groups(self) -> u64 {
        self.pages().div_ceil(GROUP_PAGES)
    }

    /// Blocks in page `page`.
    pub(super) const fn blocks_in_page(self, page: u64) -> u64 {
        let rest = self.blocks() - page * PAGE_BLOCKS;
        if rest < PAGE_BLOCKS { rest } else { PAGE_BLOCKS }
    }

    /// Pages in group `group`.
    pub(super) const fn pages_in_group(self, group: u64) -> u64 {
        let rest = self.pages() - group * GROUP_PAGES;
        if rest < GROUP_PAGES { rest } else { GROUP_PAGES }
    }

    pub(super) const fn top_at(self) -> u64 {
        ALIGN
    }

    pub(super) const fn top_length(self) -> u64 {
        self.groups() * DIGEST_LENGTH
    }

    pub(super) const fn group_at(self, group: u64) -> u64 {
        self.top_at() + self.top_length().next_multiple_of(ALIGN) + group * GROUP_PAGES * DIGEST_LENGTH
    }

    pub(super) const fn group_length(self, group: u64) -> u64 {
        self.pages_in_group(group) * DIGEST_LENGTH
    }

    pub(super) const fn page_digest_at(self, page: u64) -> u64 {
        self.group_at(0) + page * DIGEST_LENGTH
    }

    pub(super) const fn bitmap_at(self, page: u64) -> u64 {
        self.group_at(self.groups()) + page * BITMAP_BYTES as u64
    }

    pub(super) const fn digest_at(self, block: u64) -> u64 {
        let digests = self.bitmap_at(0) + (self.pages() * BITMAP_BYTES as u64).next_multiple_of(ALIGN);
        digests + block * DIGEST_LENGTH
    }

    /// Length of the file.
    pub(super) const fn length(self) -> u64 {
        self.digest_at(self.pages() * PAGE_BLOCKS)
    }

    /// The header of the tree with `root`.
    pub(super) fn header(self, root: Digest) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        header[..8].copy_from_slice(MAGIC);
        header[8..12].copy_from_slice(&VERSION.to_le_bytes());
        header[16..24].copy_from_slice(&self.size.to_le_bytes());
        header[24..].copy_from_slice(&root.0);
        header
    }
}

macro_rules! derived {
    ($context:literal) => {{
        static PREPARED: LazyLock<blake3::Hasher> =
            LazyLock::new(|| blake3::Hasher::new_derive_key($context));
        PREPARED.clone()
    }};
}

/// The digest of a page's bytes ([`Page::to_bytes`]).
pub fn page_digest(bytes: &[u8]) -> Digest {
    derived!("bootcache page v1").update(bytes).finalize().into()
}

/// The digest of a group's bytes: its page digests in order.
pub fn group_digest(bytes: &[u8]) -> Digest {
    derived!("bootcache group v1").update(bytes).finalize().into()
}

/// The root over a disk of `size` bytes whose group digests are `top`.
pub fn root_digest(size: u64, top: &[u8]) -> Digest {
    derived!("bootcache root v1").update(&size.to_le_bytes()).update(top).finalize().into()
}

/// The digest of a page whose blocks are all zero.
pub fn zero_page_digest() -> Digest {
    static ZERO: LazyLock<Digest> = LazyLock::new(|| Page::zero().digest());
    *ZERO
}

/// A tree's file, mapped; what its parts say is not checked here.
#[derive(Debug)]
pub(super) struct MappedTree {
    pub(super) layout: Layout,
    pub(super) root: Digest,
    pub(super) path: PathBuf,
    map: Mmap,
}

impl MappedTree {
    /// Maps `file`, after checks of magic, version, length, and that the top has the root which the header names.
    pub(super) fn new(file: &File, path: &Path) -> Result<Self, TreeError> {
        let io_error = |error| TreeError::Io { path: path.to_owned(), error };
        let damaged = |what| TreeError::Damaged { path: path.to_owned(), what };
        let mut header = [0; HEADER_BYTES];
        file.read_exact_at(&mut header, 0).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => damaged("it ends within its header"),
            _ => io_error(error),
        })?;
        if header[..8] != *MAGIC {
            return Err(damaged("it does not begin like one"));
        }
        if header[8..12] != VERSION.to_le_bytes() {
            return Err(damaged("its version is not known"));
        }
        let word = |at: usize| <[u8; 8]>::try_from(&header[at..at + 8]).expect("the slice has 8 bytes");
        let layout = Layout::new(u64::from_le_bytes(word(16)))?;
        if file.metadata().map_err(io_error)?.len() != layout.length() {
            return Err(damaged("its length does not fit the disk's size"));
        }
        let root = Digest(header[24..].try_into().expect("the rest of the header is the root"));
        // SAFETY: the map is read-only. The store writes a tree's file through `pwrite` only, at places that no
        // reader was told of yet, never shortens it, and replaces it by rename.
        let map = unsafe { Mmap::map(file) }.map_err(io_error)?;
        let tree = Self { layout, root, path: path.to_owned(), map };
        if root_digest(layout.size, tree.top()) != root {
            return Err(damaged("its top does not have its root"));
        }
        Ok(tree)
    }

    pub(super) fn damaged(&self, what: &'static str) -> TreeError {
        TreeError::Damaged { path: self.path.clone(), what }
    }

    pub(super) fn bytes(&self, at: u64, length: u64) -> &[u8] {
        let at = usize::try_from(at).expect("the file is mapped, so its offsets fit");
        let length = usize::try_from(length).expect("the file is mapped, so its offsets fit");
        &self.map[at..at + length]
    }

    pub(super) fn top(&self) -> &[u8] {
        self.bytes(self.layout.top_at(), self.layout.top_length())
    }

    pub(super) fn group(&self, group: u64) -> &[u8] {
        self.bytes(self.layout.group_at(group), self.layout.group_length(group))
    }

    pub(super) fn digest(&self, at: u64) -> Digest {
        Digest(self.bytes(at, DIGEST_LENGTH).try_into().expect("a digest has 32 bytes"))
    }

    pub(super) fn group_digest(&self, group: u64) -> Digest {
        self.digest(self.layout.top_at() + group * DIGEST_LENGTH)
    }

    pub(super) fn page_digest(&self, page: u64) -> Digest {
        self.digest(self.layout.page_digest_at(page))
    }

    pub(super) fn bitmap(&self, page: u64) -> u128 {
        let bytes = self.bytes(self.layout.bitmap_at(page), BITMAP_BYTES as u64);
        u128::from_le_bytes(bytes.try_into().expect("a bitmap has 16 bytes"))
    }

    pub(super) fn page(&self, page: u64) -> Page {
        let bitmap = self.bitmap(page);
        let mut result = Page::zero();
        for i in (0..128).filter(|i| bitmap >> i & 1 == 1) {
            result.push(i, self.digest(self.layout.digest_at(page * PAGE_BLOCKS + i as u64)));
        }
        result
    }

    /// Whether the stored group digest is that of the stored group.
    pub(super) fn group_is_sound(&self, group: u64) -> bool {
        group_digest(self.group(group)) == self.group_digest(group)
    }

    /// Whether the stored page digest is that of the stored page.
    pub(super) fn page_is_sound(&self, page: u64) -> bool {
        if self.bitmap(page) == 0 {
            return self.page_digest(page) == zero_page_digest();
        }
        self.page(page).digest() == self.page_digest(page)
    }

    pub(super) fn is_zero(&self, block: u64) -> bool {
        self.bitmap(block / PAGE_BLOCKS) >> (block % PAGE_BLOCKS) & 1 == 0
    }

    pub(super) fn block_digest(&self, block: u64) -> Option<Digest> {
        (!self.is_zero(block)).then(|| self.digest(self.layout.digest_at(block)))
    }

    /// Whether `data` is the content of `block`: 4096 bytes, or those that the disk has of its last block.
    pub(super) fn verify_block(&self, block: u64, data: &[u8]) -> bool {
        match self.block_digest(block) {
            Some(digest) => page::block_digest(data) == digest,
            None => page::is_zero(data),
        }
    }
}

/// A whole digest tree, checked when it was opened and mapped into memory. Cheap to share; never changes.
#[derive(Debug)]
pub struct Tree {
    mapped: MappedTree,
}

impl Tree {
    /// Opens the tree at `path` and checks all of it: about 2 MB of hashing per GB of data in the image.
    ///
    /// # Errors
    /// [`TreeError::Damaged`] when a byte is not what it was, [`TreeError::OtherImage`] when `expected` is given and
    /// is not the root, [`TreeError::Io`].
    pub fn open(path: &Path, expected: Option<Digest>) -> Result<Self, TreeError> {
        let io_error = |error| TreeError::Io { path: path.to_owned(), error };
        let file = File::open(path).map_err(io_error)?;
        let mapped = MappedTree::new(&file, path)?;
        if let Some(expected) = expected.filter(|expected| *expected != mapped.root) {
            return Err(TreeError::OtherImage { path: path.to_owned(), found: mapped.root, expected });
        }
        let tree = Self { mapped };
        tree.check(&file)?;
        Ok(tree)
    }

    /// Every group and page against its digest, and everything that carries no meaning against zero.
    fn check(&self, file: &File) -> Result<(), TreeError> {
        let tree = &self.mapped;
        let layout = tree.layout;
        if !(0..layout.groups()).all(|group| tree.group_is_sound(group)) {
            return Err(tree.damaged("a group does not have its digest"));
        }
        if !(0..layout.pages()).all(|page| tree.page_is_sound(page)) {
            return Err(tree.damaged("a page does not have its digest"));
        }
        let padding = [
            (12, 16),
            (HEADER_BYTES as u64, layout.top_at()),
            (layout.top_at() + layout.top_length(), layout.group_at(0)),
            (layout.page_digest_at(layout.pages()), layout.bitmap_at(0)),
            (layout.bitmap_at(layout.pages()), layout.digest_at(0)),
        ];
        if !padding.iter().all(|(from, to)| page::is_zero(tree.bytes(*from, to - from))) {
            return Err(tree.damaged("bytes without meaning are not zero"));
        }
        // Only what is stored is looked at: touching the holes would fill memory with zeroes.
        let io_error = |error| TreeError::Io { path: tree.path.clone(), error };
        for extent in data_extents(file, layout.digest_at(0)..layout.length()) {
            let extent = extent.map_err(io_error)?;
            let first = (extent.start - layout.digest_at(0)) / DIGEST_LENGTH;
            let end = (extent.end - layout.digest_at(0)).div_ceil(DIGEST_LENGTH);
            let clean =
                |block: u64| !tree.is_zero(block) || tree.digest(layout.digest_at(block)).0 == [0; 32];
            if !(first..end).all(clean) {
                return Err(tree.damaged("a zero block has a digest"));
            }
        }
        Ok(())
    }

    /// The image's identity.
    pub const fn root(&self) -> Digest {
        self.mapped.root
    }

    /// The disk's size in bytes.
    pub const fn size(&self) -> u64 {
        self.mapped.layout.size
    }

    /// Number of blocks.
    pub const fn blocks(&self) -> u64 {
        self.mapped.layout.blocks()
    }

    /// Number of pages.
    pub const fn pages(&self) -> u64 {
        self.mapped.layout.pages()
    }

    /// Number of groups.
    pub const fn groups(&self) -> u64 {
        self.mapped.layout.groups()
    }

    /// Number of blocks that are not all zeroes.
    pub fn data_blocks(&self) -> u64 {
        (0..self.pages()).map(|page| u64::from(self.mapped.bitmap(page).count_ones())).sum()
    }

    /// Whether `block` is all zeroes.
    pub fn is_zero(&self, block: u64) -> bool {
        self.mapped.is_zero(block)
    }

    /// The digest of `block`; none when it is all zeroes.
    pub fn block_digest(&self, block: u64) -> Option<Digest> {
        self.mapped.block_digest(block)
    }

    /// Whether `data` is the content of `block`: 4096 bytes, or those that the disk has of its last block.
    pub fn verify_block(&self, block: u64, data: &[u8]) -> bool {
        self.mapped.verify_block(block, data)
    }

    /// The group digests, to send: 32 bytes a group.
    pub fn top_bytes(&self) -> &[u8] {
        self.mapped.top()
    }

    /// The page digests of `group`, to send: 32 bytes a page, at most 4096.
    pub fn group_bytes(&self, group: u64) -> &[u8] {
        self.mapped.group(group)
    }

    /// Page `page`, to send: see [`super::page`].
    pub fn page_bytes(&self, page: u64) -> Vec<u8> {
        self.mapped.page(page).to_bytes()
    }

    /// Page `page`.
    pub fn page(&self, page: u64) -> Page {
        self.mapped.page(page)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::super::tree_builder::build_from;
    use super::*;
    use crate::block::{BLOCK_BYTES, BLOCK_SIZE};

    /// The tree as the format's description reads, over a plain vector.
    fn model_root(disk: &[u8]) -> Digest {
        let mut top = Vec::new();
        for group in disk.chunks(64 << 20) {
            let mut pages = Vec::new();
            for page in group.chunks(512 << 10) {
                let mut bytes = vec![0; 16];
                for (i, block) in page.chunks(BLOCK_BYTES).enumerate() {
                    let mut block = block.to_vec();
                    block.resize(BLOCK_BYTES, 0);
                    if block.iter().any(|byte| *byte != 0) {
                        bytes[i / 8] |= 1 << (i % 8);
                        bytes.extend(blake3::hash(&block).as_bytes());
                    }
                }
                pages.extend(blake3::derive_key("bootcache page v1", &bytes));
            }
            top.extend(blake3::derive_key("bootcache group v1", &pages));
        }
        let mut bytes = (disk.len() as u64).to_le_bytes().to_vec();
        bytes.extend(top);
        Digest(blake3::derive_key("bootcache root v1", &bytes))
    }

    fn build(dir: &Path, disk: &[u8]) -> Tree {
        let source = dir.join("disk");
        std::fs::write(&source, disk).unwrap();
        let path = dir.join("tree");
        let root = build_from(&File::open(source).unwrap(), disk.len() as u64, &path).unwrap();
        Tree::open(&path, Some(root)).unwrap()
    }

    fn disk(size: usize, blocks: &BTreeMap<usize, u8>) -> Vec<u8> {
        let mut disk = vec![0; size];
        for (block, value) in blocks {
            let at = block * BLOCK_BYTES;
            if at < size {
                let end = size.min(at + BLOCK_BYTES);
                disk[at..end].fill(*value);
            }
        }
        disk
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn agrees_with_a_plain_model(
            size in 0_usize..3_000_000,
            blocks in prop::collection::btree_map(0_usize..800, any::<u8>(), 0..40),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let disk = disk(size, &blocks);
            let tree = build(dir.path(), &disk);
            prop_assert_eq!(tree.root(), model_root(&disk));
            prop_assert_eq!(tree.blocks(), disk.len().div_ceil(BLOCK_BYTES) as u64);
            for (i, block) in disk.chunks(BLOCK_BYTES).enumerate() {
                prop_assert!(tree.verify_block(i as u64, block));
                prop_assert_eq!(tree.is_zero(i as u64), block.iter().all(|byte| *byte == 0));
                let mut other = block.to_vec();
                other[0] ^= 1;
                prop_assert!(!tree.verify_block(i as u64, &other));
            }
        }
    }

    #[test]
    fn a_disk_of_several_groups_agrees_with_the_model() {
        let dir = tempfile::tempdir().unwrap();
        let disk = disk((129 << 20) + 513, &BTreeMap::from([(0, 1), (16_383, 2), (16_384, 3), (33_024, 9)]));
        let tree = build(dir.path(), &disk);
        assert_eq!((tree.groups(), tree.pages()), (3, 259));
        assert_eq!(tree.root(), model_root(&disk));
        assert_eq!(tree.data_blocks(), 4);
    }

    #[test]
    fn every_flipped_byte_is_detected_when_the_tree_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let disk = disk(700_000, &BTreeMap::from([(0, 1), (3, 2), (170, 9)]));
        let tree = build(dir.path(), &disk);
        let path = dir.path().join("tree");
        let sound = std::fs::read(&path).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        for (at, byte) in (0..).zip(&sound) {
            file.write_all_at(&[byte ^ 0x40], at).unwrap();
            let error = Tree::open(&path, Some(tree.root())).expect_err("a flipped byte");
            assert!(!error.to_string().contains('\n'), "byte {at}: {error}");
            file.write_all_at(&[*byte], at).unwrap();
        }
        for length in [0, 10, 100, sound.len() - 1] {
            std::fs::write(&path, &sound[..length]).unwrap();
            assert!(Tree::open(&path, None).is_err());
        }
    }

    #[test]
    fn the_tree_of_another_image_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        build(dir.path(), &[1; 5000]);
        let error = Tree::open(&dir.path().join("tree"), Some(Digest::of(b"other"))).unwrap_err();
        assert!(matches!(error, TreeError::OtherImage { .. }));
    }

    #[test]
    fn what_is_zero_takes_no_space_in_the_file() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("disk");
        let file = File::create_new(&source).unwrap();
        file.set_len(10 << 30).unwrap();
        file.write_all_at(b"x", 5 << 30).unwrap();
        let path = dir.path().join("tree");
        build_from(&File::open(source).unwrap(), 10 << 30, &path).unwrap();
        assert!(std::fs::metadata(&path).unwrap().blocks() * 512 < 2 << 20);
        let tree = Tree::open(&path, None).unwrap();
        assert!(!tree.is_zero((5 << 30) / BLOCK_SIZE));
        assert_eq!(tree.data_blocks(), 1);
    }
}
