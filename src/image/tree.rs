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
//!
//! Of an open tree only the top is in memory: 32 bytes for 64 MiB of disk, 4 MiB for the largest. The rest is read when it is
//! wanted, a page of digests (4 KiB) for 512 KiB of disk, from the page cache as a rule. It is not mapped: a disk that
//! cannot be read, or a file that was cut, would then kill the process, and not fail the one request.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use crate::block::blocks_for;
use crate::digest::{DIGEST_BYTES, Digest};

use super::extents::data_extents;
use super::page::{self, BITMAP_BYTES, LastPage, PAGE_BLOCKS, PAGE_DIGEST_BYTES, Page};

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

/// A tree's file; what its parts say is not checked here.
#[derive(Debug)]
pub(super) struct TreeFile {
    pub(super) layout: Layout,
    pub(super) root: Digest,
    pub(super) path: PathBuf,
    file: File,
    /// The group digests, which have the root.
    top: Vec<u8>,
}

impl TreeFile {
    /// Takes `file`, after checks of magic, version, length, and that the top has the root which the header names.
    pub(super) fn new(file: File, path: &Path) -> Result<Self, TreeError> {
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
        let mut tree = Self { layout, root, path: path.to_owned(), file, top: Vec::new() };
        tree.top = tree.bytes(layout.top_at(), layout.top_length())?;
        if root_digest(layout.size, &tree.top) != root {
            return Err(damaged("its top does not have its root"));
        }
        Ok(tree)
    }

    pub(super) fn damaged(&self, what: &'static str) -> TreeError {
        TreeError::Damaged { path: self.path.clone(), what }
    }

    fn read(&self, at: u64, buffer: &mut [u8]) -> Result<(), TreeError> {
        self.file.read_exact_at(buffer, at).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => self.damaged("it has become shorter"),
            _ => TreeError::Io { path: self.path.clone(), error },
        })
    }

    /// A part that is short: 4 MiB is the longest there is.
    fn bytes(&self, at: u64, length: u64) -> Result<Vec<u8>, TreeError> {
        let mut bytes = vec![0; usize::try_from(length).expect("the parts of a tree are short")];
        self.read(at, &mut bytes)?;
        Ok(bytes)
    }

    fn array<const LENGTH: usize>(&self, at: u64) -> Result<[u8; LENGTH], TreeError> {
        let mut bytes = [0; LENGTH];
        self.read(at, &mut bytes)?;
        Ok(bytes)
    }

    pub(super) fn top(&self) -> &[u8] {
        &self.top
    }

    pub(super) fn group(&self, group: u64) -> Result<Vec<u8>, TreeError> {
        self.bytes(self.layout.group_at(group), self.layout.group_length(group))
    }

    pub(super) fn group_digest(&self, group: u64) -> Digest {
        let at = usize::try_from(group).expect("a tree has few groups") * DIGEST_BYTES;
        Digest(self.top[at..at + DIGEST_BYTES].try_into().expect("a digest has 32 bytes"))
    }

    pub(super) fn page_digest(&self, page: u64) -> Result<Digest, TreeError> {
        Ok(Digest(self.array(self.layout.page_digest_at(page))?))
    }

    pub(super) fn bitmap(&self, page: u64) -> Result<u128, TreeError> {
        Ok(u128::from_le_bytes(self.array(self.layout.bitmap_at(page))?))
    }

    /// The bitmaps of the pages of `group`.
    pub(super) fn bitmaps(&self, group: u64) -> Result<Vec<u128>, TreeError> {
        let length = self.layout.pages_in_group(group) * BITMAP_BYTES as u64;
        let bytes = self.bytes(self.layout.bitmap_at(group * GROUP_PAGES), length)?;
        let (bitmaps, _) = bytes.as_chunks();
        Ok(bitmaps.iter().map(|bitmap| u128::from_le_bytes(*bitmap)).collect())
    }

    /// The places of the digests of page `page`; those of zero blocks are zero.
    fn slots(&self, page: u64) -> Result<[u8; PAGE_DIGEST_BYTES], TreeError> {
        self.array(self.layout.digest_at(page * PAGE_BLOCKS))
    }

    pub(super) fn page(&self, page: u64) -> Result<Page, TreeError> {
        match self.bitmap(page)? {
            0 => Ok(Page::zero()),
            bitmap => Ok(page_of(bitmap, &self.slots(page)?)),
        }
    }

    /// The pages of `group` with the digests that it names, and whether they have them; none when the group does not have
    /// its own.
    pub(super) fn sound_pages(&self, group: u64) -> Result<Option<Vec<bool>>, TreeError> {
        let bytes = self.group(group)?;
        if group_digest(&bytes) != self.group_digest(group) {
            return Ok(None);
        }
        let (digests, _) = bytes.as_chunks();
        let bitmaps = self.bitmaps(group)?;
        let is_sound = |((page, digest), bitmap): ((u64, &[u8; DIGEST_BYTES]), u128)| {
            let found = match bitmap {
                0 => zero_page_digest(),
                bitmap => page_of(bitmap, &self.slots(page)?).digest(),
            };
            Ok(found.0 == *digest)
        };
        (group * GROUP_PAGES..).zip(digests).zip(bitmaps).map(is_sound).collect::<Result<_, _>>().map(Some)
    }

    pub(super) fn is_zero(&self, block: u64) -> Result<bool, TreeError> {
        Ok(self.bitmap(block / PAGE_BLOCKS)? >> (block % PAGE_BLOCKS) & 1 == 0)
    }

    pub(super) fn block_digest(&self, block: u64) -> Result<Option<Digest>, TreeError> {
        match self.is_zero(block)? {
            true => Ok(None),
            false => Ok(Some(Digest(self.array(self.layout.digest_at(block))?))),
        }
    }

    /// Whether `data` is the content of `block`: 4096 bytes, or those that the disk has of its last block.
    pub(super) fn verify_block(
        &self,
        block: u64,
        data: &[u8],
        last: &mut LastPage,
    ) -> Result<bool, TreeError> {
        let page = last.get(block / PAGE_BLOCKS, |page| self.page(page))?;
        Ok(page.verify(page::place_in_page(block), data))
    }
}

/// The page with `bitmap` whose digests are among `slots`.
fn page_of(bitmap: u128, slots: &[u8; PAGE_DIGEST_BYTES]) -> Page {
    let (slots, _) = slots.as_chunks();
    let mut page = Page::zero();
    (0..128).filter(|i| bitmap >> i & 1 == 1).for_each(|i| page.push(i, Digest(slots[i])));
    page
}

/// A whole digest tree, checked when it was opened. Cheap to share; never changes. What is asked of it is within the disk.
#[derive(Debug)]
pub struct Tree {
    stored: TreeFile,
}

impl Tree {
    /// Opens the tree at `path` and checks all of it: about 2 MB of hashing per GB of data in the image.
    ///
    /// # Errors
    /// [`TreeError::Damaged`] when a byte is not what it was, [`TreeError::OtherImage`] when `expected` is given and
    /// is not the root, [`TreeError::Io`].
    pub fn open(path: &Path, expected: Option<Digest>) -> Result<Self, TreeError> {
        let file = File::open(path).map_err(|error| TreeError::Io { path: path.to_owned(), error })?;
        let stored = TreeFile::new(file, path)?;
        if let Some(expected) = expected.filter(|expected| *expected != stored.root) {
            return Err(TreeError::OtherImage { path: path.to_owned(), found: stored.root, expected });
        }
        let tree = Self { stored };
        tree.check()?;
        Ok(tree)
    }

    /// Every group and page against its digest, and everything that carries no meaning against zero.
    fn check(&self) -> Result<(), TreeError> {
        let tree = &self.stored;
        let layout = tree.layout;
        for group in 0..layout.groups() {
            let pages =
                tree.sound_pages(group)?.ok_or_else(|| tree.damaged("a group does not have its digest"))?;
            if pages.contains(&false) {
                return Err(tree.damaged("a page does not have its digest"));
            }
        }
        let padding = [
            (12, 16),
            (HEADER_BYTES as u64, layout.top_at()),
            (layout.top_at() + layout.top_length(), layout.group_at(0)),
            (layout.page_digest_at(layout.pages()), layout.bitmap_at(0)),
            (layout.bitmap_at(layout.pages()), layout.digest_at(0)),
        ];
        for (from, to) in padding {
            if !page::is_zero(&tree.bytes(from, to - from)?) {
                return Err(tree.damaged("bytes without meaning are not zero"));
            }
        }
        // Only what is stored is looked at: most of a large tree may be holes.
        let io_error = |error| TreeError::Io { path: tree.path.clone(), error };
        for extent in data_extents(&tree.file, layout.digest_at(0)..layout.length()) {
            let extent = extent.map_err(io_error)?;
            let page_of = |at: u64| (at - layout.digest_at(0)) / PAGE_DIGEST_BYTES as u64;
            for page in page_of(extent.start)..=page_of(extent.end - 1) {
                let bitmap = tree.bitmap(page)?;
                if bitmap == u128::MAX {
                    continue;
                }
                let slots = tree.slots(page)?;
                let (slots, _) = slots.as_chunks::<DIGEST_BYTES>();
                if (0..128).any(|i| bitmap >> i & 1 == 0 && slots[i] != [0; DIGEST_BYTES]) {
                    return Err(tree.damaged("a zero block has a digest"));
                }
            }
        }
        Ok(())
    }

    /// The image's identity.
    pub const fn root(&self) -> Digest {
        self.stored.root
    }

    /// The disk's size in bytes.
    pub const fn size(&self) -> u64 {
        self.stored.layout.size
    }

    /// Number of blocks.
    pub const fn blocks(&self) -> u64 {
        self.stored.layout.blocks()
    }

    /// Number of pages.
    pub const fn pages(&self) -> u64 {
        self.stored.layout.pages()
    }

    /// Number of groups.
    pub const fn groups(&self) -> u64 {
        self.stored.layout.groups()
    }

    /// Number of blocks that are not all zeroes.
    ///
    /// # Errors
    /// As of [`Tree::page`].
    pub fn data_blocks(&self) -> Result<u64, TreeError> {
        (0..self.groups()).try_fold(0, |blocks, group| {
            let bitmaps = self.bitmaps(group)?;
            Ok(blocks + bitmaps.iter().map(|bitmap| u64::from(bitmap.count_ones())).sum::<u64>())
        })
    }

    /// For each page of `group` which of its blocks are not all zeroes: bit i set for block i.
    ///
    /// # Errors
    /// As of [`Tree::page`].
    pub fn bitmaps(&self, group: u64) -> Result<Vec<u128>, TreeError> {
        self.stored.bitmaps(group)
    }

    /// Whether `block` is all zeroes.
    ///
    /// # Errors
    /// As of [`Tree::page`].
    pub fn is_zero(&self, block: u64) -> Result<bool, TreeError> {
        self.stored.is_zero(block)
    }

    /// The digest of `block`; none when it is all zeroes.
    ///
    /// # Errors
    /// As of [`Tree::page`].
    pub fn block_digest(&self, block: u64) -> Result<Option<Digest>, TreeError> {
        self.stored.block_digest(block)
    }

    /// Whether `data` is the content of `block`: 4096 bytes, or those that the disk has of its last block. `last` is of
    /// this tree alone.
    ///
    /// # Errors
    /// As of [`Tree::page`].
    pub fn verify_block(&self, block: u64, data: &[u8], last: &mut LastPage) -> Result<bool, TreeError> {
        self.stored.verify_block(block, data, last)
    }

    /// The group digests, to send: 32 bytes a group.
    pub fn top_bytes(&self) -> &[u8] {
        self.stored.top()
    }

    /// The page digests of `group`, to send: 32 bytes a page, at most 4096.
    ///
    /// # Errors
    /// As of [`Tree::page`].
    pub fn group_bytes(&self, group: u64) -> Result<Vec<u8>, TreeError> {
        self.stored.group(group)
    }

    /// Page `page`, to send: see [`super::page`].
    ///
    /// # Errors
    /// As of [`Tree::page`].
    pub fn page_bytes(&self, page: u64) -> Result<Vec<u8>, TreeError> {
        Ok(self.page(page)?.to_bytes())
    }

    /// Page `page`.
    ///
    /// # Errors
    /// [`TreeError::Io`] when the file cannot be read, [`TreeError::Damaged`] when it has become shorter.
    pub fn page(&self, page: u64) -> Result<Page, TreeError> {
        self.stored.page(page)
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
            let mut last = LastPage::default();
            for (i, block) in disk.chunks(BLOCK_BYTES).enumerate() {
                let i = i as u64;
                prop_assert!(tree.verify_block(i, block, &mut last).unwrap());
                let is_zero = block.iter().all(|byte| *byte == 0);
                prop_assert_eq!(tree.is_zero(i).unwrap(), is_zero);
                prop_assert_eq!(tree.block_digest(i).unwrap(), (!is_zero).then(|| page::block_digest(block)));
                let mut other = block.to_vec();
                other[0] ^= 1;
                prop_assert!(!tree.verify_block(i, &other, &mut last).unwrap());
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
        assert_eq!(tree.data_blocks().unwrap(), 4);
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

    /// Whoever looked at it was killed.
    #[test]
    fn a_file_that_is_cut_while_it_is_open_gives_an_error_for_what_is_asked() {
        let dir = tempfile::tempdir().unwrap();
        let tree = build(dir.path(), &[7; 3 << 20]);
        let file = File::options().write(true).open(dir.path().join("tree")).unwrap();
        let last = &mut LastPage::default();
        assert!(tree.verify_block(0, &[7; BLOCK_BYTES], last).unwrap());
        file.set_len(4096).unwrap();
        let damaged = |error| matches!(error, TreeError::Damaged { what: "it has become shorter", .. });
        assert!(tree.verify_block(1, &[7; BLOCK_BYTES], last).unwrap(), "of the page that was read");
        assert!(damaged(tree.verify_block(130, &[7; BLOCK_BYTES], last).unwrap_err()));
        let last = &mut LastPage::default();
        assert!(damaged(tree.verify_block(0, &[7; BLOCK_BYTES], last).unwrap_err()));
        assert!(damaged(tree.is_zero(0).unwrap_err()) && damaged(tree.block_digest(0).unwrap_err()));
        assert!(damaged(tree.page(0).unwrap_err()) && damaged(tree.page_bytes(1).unwrap_err()));
        assert!(damaged(tree.group_bytes(0).unwrap_err()) && damaged(tree.data_blocks().unwrap_err()));
        assert_eq!(tree.top_bytes().len(), 32);
    }

    #[test]
    fn a_tree_that_cannot_be_read_is_no_damaged_one() {
        let dir = tempfile::tempdir().unwrap();
        // It opens, and every read of it fails.
        std::fs::create_dir(dir.path().join("tree")).unwrap();
        let error = Tree::open(&dir.path().join("tree"), None).unwrap_err();
        assert!(matches!(&error, TreeError::Io { error, .. } if error.kind() == io::ErrorKind::IsADirectory));
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
        assert!(!tree.is_zero((5 << 30) / BLOCK_SIZE).unwrap());
        assert_eq!(tree.data_blocks().unwrap(), 1);
    }
}
