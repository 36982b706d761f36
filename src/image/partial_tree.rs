//! The digest tree of an image that is still arriving: parts come in any order, each is checked before it is kept.
//!
//! The file has the form of a whole tree ([`super::tree`]) from the start, with holes where nothing has come. No
//! record is kept of what has: when the file is opened again, each part is known if it has the digest that its parent
//! names. So a crash at any moment leaves nothing to be believed wrongly, and nothing has to be synced as it comes.
//! The pages that are all zero are known with their group; they never have to be sent.
//!
//! A sync that fails is told once, and the kernel may have dropped what it could not write. So the next one first writes
//! everything that is known again; what of it is not what it was is no longer known, and comes again.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::digest::Digest;

use super::page::{LastPage, PAGE_BLOCKS, Page};
use super::tree::{GROUP_PAGES, Layout, TreeError, TreeFile, group_digest, root_digest, zero_page_digest};
use super::tree_builder::write_page;

/// What is known of a block's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is what the image has there.
    Good,
    /// It is not.
    Bad,
    /// The block's page has not come yet: add it first.
    UnknownPage,
}

/// A digest tree that is being received. Shared between tasks; parts may be added from several at once.
#[derive(Debug)]
pub struct PartialTree {
    file: File,
    stored: TreeFile,
    groups: Known,
    pages: Known,
    /// The last sync failed. Held while one runs.
    sync_failed: Mutex<bool>,
    /// Lets the next sync fail.
    #[cfg(test)]
    fail_sync: std::sync::atomic::AtomicBool,
}

impl PartialTree {
    /// Starts the tree of image `root`, a disk of `size` bytes, at `path`; what was there is replaced.
    /// `top` are the group digests, as the sender's [`super::tree::Tree::top_bytes`] gave them.
    ///
    /// # Errors
    /// [`TreeError::Malformed`] when `size` and `top` do not have this root, [`TreeError::TooLarge`],
    /// [`TreeError::Io`].
    pub fn create(path: &Path, root: Digest, size: u64, top: &[u8]) -> Result<Self, TreeError> {
        let layout = Layout::new(size)?;
        if top.len() as u64 != layout.top_length() || root_digest(size, top) != root {
            return Err(TreeError::Malformed("size and top do not have the image's root"));
        }
        let io_error = |error| TreeError::Io { path: path.to_owned(), error };
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)
            .map_err(io_error)?;
        let write = || {
            file.set_len(layout.length())?;
            file.write_all_at(top, layout.top_at())?;
            file.write_all_at(&layout.header(root), 0)
        };
        write().map_err(io_error)?;
        Self::load(file, path)
    }

    /// Opens what [`PartialTree::create`] began, and finds out what is known by checking it.
    ///
    /// # Errors
    /// [`TreeError::Damaged`] when the top is not sound: start again; [`TreeError::OtherImage`], [`TreeError::Io`].
    pub fn open(path: &Path, root: Digest) -> Result<Self, TreeError> {
        let io_error = |error| TreeError::Io { path: path.to_owned(), error };
        let file = File::options().read(true).write(true).open(path).map_err(io_error)?;
        let tree = Self::load(file, path)?;
        if tree.root() != root {
            return Err(TreeError::OtherImage { path: path.to_owned(), found: tree.root(), expected: root });
        }
        Ok(tree)
    }

    fn load(file: File, path: &Path) -> Result<Self, TreeError> {
        let io_error = |error| TreeError::Io { path: path.to_owned(), error };
        let stored = TreeFile::new(file.try_clone().map_err(io_error)?, path)?;
        let layout = stored.layout;
        let (groups, pages) = (Known::new(layout.groups()), Known::new(layout.pages()));
        for group in 0..layout.groups() {
            // What cannot be read is not known, comes again, and is written anew.
            let Ok(Some(sound)) = stored.sound_pages(group) else { continue };
            groups.set(group);
            let numbered = (group * GROUP_PAGES..).zip(sound);
            numbered.filter(|(_, sound)| *sound).for_each(|(page, _)| pages.set(page));
        }
        Ok(Self {
            file,
            stored,
            groups,
            pages,
            sync_failed: Mutex::new(false),
            #[cfg(test)]
            fail_sync: std::sync::atomic::AtomicBool::new(false),
        })
    }

    fn group_pages(&self, group: u64) -> std::ops::Range<u64> {
        let first = group * GROUP_PAGES;
        first..first + self.stored.layout.pages_in_group(group)
    }

    /// Takes the page digests of `group`.
    ///
    /// # Errors
    /// [`TreeError::Malformed`] when they are not this group's: the sender is wrong; [`TreeError::Io`].
    pub fn add_group(&self, group: u64, bytes: &[u8]) -> Result<(), TreeError> {
        let layout = self.stored.layout;
        if group >= layout.groups() {
            return Err(TreeError::Malformed("there is no such group"));
        }
        if bytes.len() as u64 != layout.group_length(group)
            || group_digest(bytes) != self.stored.group_digest(group)
        {
            return Err(TreeError::Malformed("a group does not have its digest"));
        }
        if self.groups.has(group) {
            return Ok(());
        }
        self.file.write_all_at(bytes, layout.group_at(group)).map_err(|error| self.io_error(error))?;
        let zero = zero_page_digest();
        let (digests, _) = bytes.as_chunks();
        let bitmaps = self.stored.bitmaps(group)?;
        for ((page, digest), bitmap) in self.group_pages(group).zip(digests).zip(bitmaps) {
            if *digest != zero.0 {
                continue;
            }
            // A crash may have left a torn page here before the group was known to be sound.
            if bitmap != 0 {
                write_page(&self.file, layout, page, &Page::zero()).map_err(|error| self.io_error(error))?;
            }
            self.pages.set(page);
        }
        // Last: when something of it fails, all of it is done again.
        self.groups.set(group);
        Ok(())
    }

    /// Takes page `page`; its group must be known.
    ///
    /// # Errors
    /// [`TreeError::Malformed`] when it is not this page, or its group is not known; [`TreeError::Io`].
    pub fn add_page(&self, page: u64, bytes: &[u8]) -> Result<(), TreeError> {
        let layout = self.stored.layout;
        if page >= layout.pages() {
            return Err(TreeError::Malformed("there is no such page"));
        }
        if !self.groups.has(page / GROUP_PAGES) {
            return Err(TreeError::Malformed("a page came before its group"));
        }
        let parsed = Page::parse(bytes, layout.blocks_in_page(page))?;
        if super::tree::page_digest(bytes) != self.stored.page_digest(page)? {
            return Err(TreeError::Malformed("a page does not have its digest"));
        }
        if self.pages.has(page) {
            return Ok(());
        }
        write_page(&self.file, layout, page, &parsed).map_err(|error| self.io_error(error))?;
        self.pages.set(page);
        Ok(())
    }

    /// Whether `data` is the content of `block`: 4096 bytes, or those that the disk has of its last block. `last` is of
    /// this tree alone.
    ///
    /// # Errors
    /// As of [`PartialTree::page`].
    pub fn verify_block(&self, block: u64, data: &[u8], last: &mut LastPage) -> Result<Verdict, TreeError> {
        if block >= self.stored.layout.blocks() {
            return Ok(Verdict::Bad);
        }
        Ok(match self.pages.has(block / PAGE_BLOCKS) {
            false => Verdict::UnknownPage,
            true if self.stored.verify_block(block, data, last)? => Verdict::Good,
            true => Verdict::Bad,
        })
    }

    /// Takes `page` for one that has not come: it cannot be read any more.
    pub fn forget_page(&self, page: u64) {
        self.pages.clear(page);
    }

    /// Whether `block` is all zeroes; none when its page is not known.
    ///
    /// # Errors
    /// As of [`PartialTree::page`].
    pub fn is_zero(&self, block: u64) -> Result<Option<bool>, TreeError> {
        self.pages.has(block / PAGE_BLOCKS).then(|| self.stored.is_zero(block)).transpose()
    }

    /// The digest of `block`; none when it is all zeroes or its page is not known.
    ///
    /// # Errors
    /// As of [`PartialTree::page`].
    pub fn block_digest(&self, block: u64) -> Result<Option<Digest>, TreeError> {
        match self.pages.has(block / PAGE_BLOCKS) {
            true => self.stored.block_digest(block),
            false => Ok(None),
        }
    }

    /// The image's identity.
    pub const fn root(&self) -> Digest {
        self.stored.root
    }

    /// The disk's size in bytes.
    pub const fn size(&self) -> u64 {
        self.stored.layout.size
    }

    /// Number of groups.
    pub const fn groups(&self) -> u64 {
        self.stored.layout.groups()
    }

    /// Number of pages.
    pub const fn pages(&self) -> u64 {
        self.stored.layout.pages()
    }

    /// Whether the page digests of `group` are known.
    pub fn knows_group(&self, group: u64) -> bool {
        self.groups.has(group)
    }

    /// Whether the block digests of `page` are known.
    pub fn knows_page(&self, page: u64) -> bool {
        self.pages.has(page)
    }

    /// The pages that have not come yet, in order.
    pub fn missing_pages(&self) -> impl Iterator<Item = u64> + '_ {
        (0..self.pages()).filter(|page| !self.pages.has(*page))
    }

    /// Whether everything has come; the file can then be opened as a [`super::tree::Tree`].
    pub fn is_complete(&self) -> bool {
        self.missing_pages().next().is_none()
    }

    /// The group digests, to send on.
    pub fn top_bytes(&self) -> &[u8] {
        self.stored.top()
    }

    /// The page digests of `group`, to send on, once they are known.
    ///
    /// # Errors
    /// As of [`PartialTree::page`].
    pub fn group_bytes(&self, group: u64) -> Result<Option<Vec<u8>>, TreeError> {
        self.groups.has(group).then(|| self.stored.group(group)).transpose()
    }

    /// Page `page`, once it is known.
    ///
    /// # Errors
    /// [`TreeError::Io`] when the file cannot be read, [`TreeError::Damaged`] when it has become shorter.
    pub fn page(&self, page: u64) -> Result<Option<Page>, TreeError> {
        self.pages.has(page).then(|| self.stored.page(page)).transpose()
    }

    /// Makes what has come durable; needed once, when the image is complete.
    ///
    /// # Errors
    /// [`TreeError::Io`], also when parts are no longer known that a sync before has lost.
    pub fn sync(&self) -> Result<(), TreeError> {
        let mut failed = self.sync_failed.lock().unwrap_or_else(PoisonError::into_inner);
        if *failed {
            self.write_again()?;
        }
        let result = self.sync_file();
        *failed = result.is_err();
        result.map_err(|error| self.io_error(error))
    }

    fn sync_file(&self) -> io::Result<()> {
        #[cfg(test)]
        if self.fail_sync.swap(false, Ordering::Relaxed) {
            return Err(io::Error::other("a sync that fails"));
        }
        self.file.sync_all()
    }

    /// Writes everything that is known, after a check of what the file now has of it. What cannot be read is lost as well:
    /// it comes again, and is written anew.
    fn write_again(&self) -> Result<(), TreeError> {
        let layout = self.stored.layout;
        let write =
            |bytes: &[u8], at| self.file.write_all_at(bytes, at).map_err(|error| self.io_error(error));
        self.file.set_len(layout.length()).map_err(|error| self.io_error(error))?;
        write(self.stored.top(), layout.top_at())?;
        write(&layout.header(self.stored.root), 0)?;
        let mut lost = 0;
        for group in (0..layout.groups()).filter(|group| self.groups.has(*group)) {
            match self.stored.group(group) {
                Ok(bytes) if group_digest(&bytes) == self.stored.group_digest(group) => {
                    write(&bytes, layout.group_at(group))?;
                }
                _ => {
                    lost += 1;
                    self.groups.clear(group);
                    self.group_pages(group).for_each(|page| self.pages.clear(page));
                }
            }
        }
        for index in (0..layout.pages()).filter(|page| self.pages.has(*page)) {
            match self.sound_page(index) {
                Ok(Some(page)) if page.is_zero() => {}
                Ok(Some(page)) => {
                    write_page(&self.file, layout, index, &page).map_err(|error| self.io_error(error))?;
                }
                _ => {
                    lost += 1;
                    self.pages.clear(index);
                }
            }
        }
        if lost == 0 {
            return Ok(());
        }
        let what = format!("{lost} parts were lost by a sync that failed, and come again");
        Err(self.io_error(io::Error::other(what)))
    }

    /// Page `page`, if it has its digest.
    fn sound_page(&self, page: u64) -> Result<Option<Page>, TreeError> {
        let found = self.stored.page(page)?;
        let digest = if found.is_zero() { zero_page_digest() } else { found.digest() };
        Ok((digest == self.stored.page_digest(page)?).then_some(found))
    }

    fn io_error(&self, error: io::Error) -> TreeError {
        TreeError::Io { path: self.stored.path.clone(), error }
    }
}

/// A set of indexes that grows, but for what a failed sync has lost. A set bit publishes the bytes that were written
/// before it.
#[derive(Debug)]
struct Known(Vec<AtomicU64>);

impl Known {
    fn new(length: u64) -> Self {
        Self((0..length.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    fn word(&self, index: u64) -> Option<&AtomicU64> {
        usize::try_from(index / 64).ok().and_then(|word| self.0.get(word))
    }

    fn has(&self, index: u64) -> bool {
        self.word(index).is_some_and(|word| word.load(Ordering::Acquire) >> (index % 64) & 1 == 1)
    }

    fn set(&self, index: u64) {
        self.word(index)
            .expect("indexes are checked against the disk's size")
            .fetch_or(1 << (index % 64), Ordering::Release);
    }

    fn clear(&self, index: u64) {
        if let Some(word) = self.word(index) {
            word.fetch_and(!(1 << (index % 64)), Ordering::AcqRel);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tree::Tree;
    use super::super::tree_builder::build_from;
    use super::*;
    use crate::block::BLOCK_BYTES;

    /// 130 MiB in three groups, mostly zero, with 5 data blocks.
    fn whole(dir: &Path) -> (Tree, Vec<(u64, [u8; BLOCK_BYTES])>) {
        let size = (130 << 20) + 100;
        let source = File::options().read(true).write(true).create_new(true).open(dir.join("disk")).unwrap();
        source.set_len(size).unwrap();
        let blocks: Vec<(u64, [u8; BLOCK_BYTES])> = [0, 129, 16_384, 16_385, 33_279]
            .into_iter()
            .zip(1..)
            .map(|(at, value)| (at, [value; _]))
            .collect();
        for (at, data) in &blocks {
            source.write_all_at(data, at * 4096).unwrap();
        }
        let path = dir.join("whole");
        build_from(&source, size, &path).unwrap();
        (Tree::open(&path, None).unwrap(), blocks)
    }

    fn verdict(partial: &PartialTree, block: u64, data: &[u8]) -> Verdict {
        partial.verify_block(block, data, &mut LastPage::default()).unwrap()
    }

    #[test]
    fn parts_that_come_make_the_same_file_as_the_whole_tree() {
        let dir = tempfile::tempdir().unwrap();
        let (tree, blocks) = whole(dir.path());
        let path = dir.path().join("partial");
        let partial = PartialTree::create(&path, tree.root(), tree.size(), tree.top_bytes()).unwrap();
        assert_eq!(verdict(&partial, 0, &blocks[0].1), Verdict::UnknownPage);
        for group in 0..tree.groups() {
            assert!(
                partial
                    .add_page(group * GROUP_PAGES, &tree.page_bytes(group * GROUP_PAGES).unwrap())
                    .is_err()
            );
            partial.add_group(group, &tree.group_bytes(group).unwrap()).unwrap();
        }
        assert_eq!(
            verdict(&partial, 300, &[0; BLOCK_BYTES]),
            Verdict::Good,
            "zero pages come with the group"
        );
        let missing: Vec<u64> = partial.missing_pages().collect();
        assert_eq!(missing, [0, 1, 128, 259]);
        for page in missing {
            partial.add_page(page, &tree.page_bytes(page).unwrap()).unwrap();
        }
        assert!(partial.is_complete());
        partial.forget_page(0);
        assert_eq!(verdict(&partial, 0, &blocks[0].1), Verdict::UnknownPage);
        partial.add_page(0, &tree.page_bytes(0).unwrap()).unwrap();
        assert!(partial.is_complete());
        for (at, data) in &blocks {
            assert_eq!(verdict(&partial, *at, data), Verdict::Good);
            assert_eq!(verdict(&partial, *at, &[9; BLOCK_BYTES]), Verdict::Bad);
        }
        partial.sync().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), std::fs::read(dir.path().join("whole")).unwrap());
        Tree::open(&path, Some(tree.root())).unwrap();
    }

    #[test]
    fn a_torn_page_is_asked_for_again_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let (tree, _) = whole(dir.path());
        let path = dir.path().join("partial");
        let partial = PartialTree::create(&path, tree.root(), tree.size(), tree.top_bytes()).unwrap();
        partial.add_group(0, &tree.group_bytes(0).unwrap()).unwrap();
        partial.add_page(0, &tree.page_bytes(0).unwrap()).unwrap();
        partial.add_page(1, &tree.page_bytes(1).unwrap()).unwrap();
        let layout = partial.stored.layout;
        drop(partial);
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(&[0; 32], layout.digest_at(129)).unwrap();
        file.write_all_at(&[0xff; 16], layout.bitmap_at(5)).unwrap();
        let partial = PartialTree::open(&path, tree.root()).unwrap();
        assert!(partial.knows_group(0) && !partial.knows_group(1));
        assert!(partial.knows_page(0) && !partial.knows_page(1) && !partial.knows_page(5));
        partial.add_page(1, &tree.page_bytes(1).unwrap()).unwrap();
        partial.add_page(5, &tree.page_bytes(5).unwrap()).unwrap();
        assert!(partial.missing_pages().all(|page| page >= GROUP_PAGES));
        assert_eq!(partial.is_zero(5 * PAGE_BLOCKS).unwrap(), Some(true));
    }

    /// What a tree has when everything has come.
    fn complete(dir: &Path) -> (Tree, PartialTree) {
        let (tree, _) = whole(dir);
        let path = dir.join("partial");
        let partial = PartialTree::create(&path, tree.root(), tree.size(), tree.top_bytes()).unwrap();
        bring(&partial, &tree);
        (tree, partial)
    }

    /// Adds what is missing.
    fn bring(partial: &PartialTree, tree: &Tree) {
        for group in (0..tree.groups()).filter(|group| !partial.knows_group(*group)) {
            partial.add_group(group, &tree.group_bytes(group).unwrap()).unwrap();
        }
        for page in partial.missing_pages().collect::<Vec<_>>() {
            partial.add_page(page, &tree.page_bytes(page).unwrap()).unwrap();
        }
    }

    /// The next sync succeeded, though nothing was written any more, and the image counted as complete.
    #[test]
    fn what_a_failed_sync_may_have_dropped_is_written_again_before_the_next_counts() {
        let dir = tempfile::tempdir().unwrap();
        let (_, mut partial) = complete(dir.path());
        partial.fail_sync.store(true, Ordering::Relaxed);
        partial.sync().unwrap_err();
        // The page cache has it all, and the disk nothing.
        let disk = dir.path().join("what is on the disk");
        partial.file = File::options().read(true).write(true).create_new(true).open(&disk).unwrap();
        partial.file.set_len(partial.stored.layout.length()).unwrap();
        partial.sync().unwrap();
        assert!(std::fs::read(&disk).unwrap() == std::fs::read(dir.path().join("whole")).unwrap());
    }

    #[test]
    fn what_a_failed_sync_has_dropped_is_not_known_any_more() {
        let dir = tempfile::tempdir().unwrap();
        let (tree, partial) = complete(dir.path());
        let layout = partial.stored.layout;
        partial.fail_sync.store(true, Ordering::Relaxed);
        partial.sync().unwrap_err();
        partial.file.write_all_at(&[0; 32], layout.digest_at(129)).unwrap();
        partial.file.write_all_at(&[0; 32], layout.group_at(1)).unwrap();
        partial.sync().unwrap_err();
        assert!(!partial.is_complete() && !partial.knows_page(1) && partial.knows_page(0));
        assert!(!partial.knows_group(1) && !partial.knows_page(129) && partial.knows_page(259));
        bring(&partial, &tree);
        partial.sync().unwrap();
        let file = std::fs::read(dir.path().join("partial")).unwrap();
        assert!(partial.is_complete() && file == std::fs::read(dir.path().join("whole")).unwrap());
        // The top, which cannot come again, is in memory.
        partial.fail_sync.store(true, Ordering::Relaxed);
        partial.sync().unwrap_err();
        partial.file.write_all_at(&[0; 32], layout.top_at()).unwrap();
        partial.sync().unwrap();
        assert!(std::fs::read(dir.path().join("partial")).unwrap() == file);
    }

    #[test]
    fn what_cannot_be_read_after_a_failed_sync_comes_again() {
        let dir = tempfile::tempdir().unwrap();
        let (tree, partial) = complete(dir.path());
        let layout = partial.stored.layout;
        partial.fail_sync.store(true, Ordering::Relaxed);
        partial.sync().unwrap_err();
        partial.file.set_len(layout.digest_at(PAGE_BLOCKS)).unwrap();
        let last = &mut LastPage::default();
        assert!(matches!(partial.verify_block(129, &[2; BLOCK_BYTES], last), Err(TreeError::Damaged { .. })));
        assert!(matches!(partial.page(1), Err(TreeError::Damaged { .. })));
        partial.sync().unwrap_err();
        assert!(partial.knows_group(0) && partial.knows_page(0) && !partial.knows_page(1));
        bring(&partial, &tree);
        partial.sync().unwrap();
        let file = std::fs::read(dir.path().join("partial")).unwrap();
        assert!(partial.is_complete() && file == std::fs::read(dir.path().join("whole")).unwrap());
    }

    #[test]
    fn a_wrong_top_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (tree, _) = whole(dir.path());
        let path = dir.path().join("partial");
        let create = |root, size, top: &[u8]| PartialTree::create(&path, root, size, top);
        assert!(create(tree.root(), tree.size() + 1, tree.top_bytes()).is_err());
        assert!(create(tree.root(), tree.size(), &tree.top_bytes()[32..]).is_err());
        assert!(create(Digest::of(b""), tree.size(), tree.top_bytes()).is_err());
        assert!(create(tree.root(), u64::MAX, tree.top_bytes()).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_flipped_bit_in_any_part_is_refused(at in any::<prop::sample::Index>(), bit in 0_u8..8, page in 0_u64..2) {
            let dir = tempfile::tempdir().unwrap();
            let (tree, _) = whole(dir.path());
            let path = dir.path().join("partial");
            let partial = PartialTree::create(&path, tree.root(), tree.size(), tree.top_bytes()).unwrap();
            let mut group = tree.group_bytes(0).unwrap();
            let place = at.index(group.len());
            group[place] ^= 1_u8 << bit;
            prop_assert!(partial.add_group(0, &group).is_err());
            prop_assert!(partial.add_group(1, &tree.group_bytes(0).unwrap()).is_err());
            partial.add_group(0, &tree.group_bytes(0).unwrap()).unwrap();
            let mut bytes = tree.page_bytes(page).unwrap();
            let place = at.index(bytes.len());
            bytes[place] ^= 1_u8 << bit;
            prop_assert!(partial.add_page(page, &bytes).is_err());
            prop_assert!(partial.add_page(1 - page, &tree.page_bytes(page).unwrap()).is_err());
            prop_assert!(!partial.knows_page(page));
        }
    }
}
