//! The map of a running overlay as a killed process leaves it: the file `live`, written as the map changes.
//!
//! A client counts on what was *answered*, not only on what it flushed: QEMU that finds its server again after a
//! crash repeats the requests that were not answered, and no others, and takes its next FLUSH to cover those that were.
//! So `kill -9` may lose no more here than it does to a process that writes to a plain file: nothing. The bytes in the
//! diff are the kernel's already when a write is answered; this makes the states the kernel's too, one `pwrite` for each
//! change of a state. A write over blocks that are data already changes none.
//!
//! The file is written and never mapped: of a mapping, a page that the disk cannot give back, or a copy-on-write file
//! system has no room for, ends the process, with the disks of all VMs in it. Here it is an error of one call. A file that
//! cannot be written is given up: it is removed, and the overlay goes on as one whose file could not be made.
//!
//! Never synced, and believed only on the boot of the machine on which it was written: after a power loss any part of
//! it may have reached the disk, and only the index counts.
//!
//! ```text
//! header   4096 bytes   identity 32 | batch u64 | replacing u64 | zeroes
//! words    8 bytes for each 32 blocks, as in memory
//! ```
//!
//! All integers are little-endian. The identity is BLAKE3 of the kernel's boot id, the diff's device and inode, and the
//! index's header. The batch is the last one that the index is known to have: an index put back from a copy has
//! another. While the index is written anew, which begins its batches at 1 again, `replacing` is 1.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use super::log::Header;
use super::map::{BlockMap, BlockState, WORD_BLOCKS};
use crate::block::Extent;
use crate::digest::{DIGEST_BYTES, Digest};

const MAGIC: &[u8] = b"bootcache live map 1\n";
const HEADER_BYTES: usize = 4096;
const WORD_BYTES: usize = size_of::<u64>();
/// Most words that are written at once.
const PART_WORDS: usize = 512;
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// What a live map belongs to.
#[derive(Debug)]
pub(super) struct Owner<'a> {
    pub(super) header: &'a Header,
    /// Last batch of the index.
    pub(super) batch: u32,
    pub(super) diff: &'a File,
}

impl Owner<'_> {
    fn identity(&self) -> io::Result<Digest> {
        let (boot, diff) = (std::fs::read(BOOT_ID)?, self.diff.metadata()?);
        let place = [diff.dev().to_le_bytes(), diff.ino().to_le_bytes()].concat();
        Ok(Digest::of(&[MAGIC, &boot, &place, &self.header.encode()].concat()))
    }
}

/// What the file says of itself.
#[derive(Debug, Clone, Copy)]
struct Head {
    identity: Digest,
    batch: u64,
    replacing: bool,
}

impl Head {
    fn write(self, file: &File) -> io::Result<()> {
        let words = [self.batch, self.replacing.into()].map(u64::to_le_bytes);
        file.write_all_at(&[&self.identity.0, words.as_flattened()].concat(), 0)
    }

    fn read(file: &File) -> io::Result<Self> {
        let mut bytes = [0; DIGEST_BYTES + 2 * WORD_BYTES];
        file.read_exact_at(&mut bytes, 0)?;
        let (identity, rest) = bytes.split_first_chunk().expect("the header begins with it");
        let (words, _) = rest.as_chunks();
        let [batch, replacing] = [0, 1].map(|index| u64::from_le_bytes(words[index]));
        Ok(Self { identity: Digest(*identity), batch, replacing: replacing != 0 })
    }

    /// Whether an index that now ends with batch `own` is the one that the file went with: a kill can come between the
    /// two.
    fn goes_with(&self, own: u64) -> bool {
        own == self.batch || own == self.batch + 1 || self.replacing && own <= 1
    }
}

/// The file `live` while the overlay is open: its owner. The lock on the diff keeps other processes away.
#[derive(Debug)]
pub(super) struct Live {
    path: PathBuf,
    /// None once it is given up. Held while a state changes, in the file and in memory, so that a word is never written
    /// without what another thread has changed in it.
    state: Mutex<Option<State>>,
}

#[derive(Debug)]
struct State {
    file: File,
    head: Head,
}

impl Live {
    /// Opens the file at `path`, or makes it. With it comes the map that the last process left, if it is `owner`'s and
    /// sound; else the file says what `indexed` does.
    ///
    /// # Errors
    /// Those of the file system, a full one among them. A file that could not be made is not there then; one that stays may
    /// be that of a process that was killed.
    pub(super) fn open(
        path: &Path,
        owner: &Owner<'_>,
        indexed: &BlockMap,
    ) -> io::Result<(Self, Option<BlockMap>)> {
        let head = Head { identity: owner.identity()?, batch: owner.batch.into(), replacing: false };
        let left = match File::options().read(true).write(true).open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            file => {
                let left = believed(file?, head, indexed)?;
                if left.is_none() {
                    std::fs::remove_file(path)?;
                }
                left
            }
        };
        let (file, map) = match left {
            Some((file, map)) => {
                // The next kill may come, as the last one did, when the index has one batch more than is noted here.
                head.write(&file)?;
                (file, Some(map))
            }
            None => (create(path, head, indexed)?, None),
        };
        let state = Mutex::new(Some(State { file, head }));
        Ok((Self { path: path.to_owned(), state }, map))
    }

    fn state(&self) -> MutexGuard<'_, Option<State>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// [`BlockMap::set`] of `map`, in the file first: what anybody saw is there after a kill.
    ///
    /// # Errors
    /// The file can be neither written nor got rid of: the next process would believe what is no longer true.
    pub(super) fn set(
        &self,
        map: &BlockMap,
        extent: Extent,
        to: BlockState,
        mut changed: impl FnMut(usize, u32),
    ) -> io::Result<()> {
        if map.all(extent, to) {
            return Ok(());
        }
        let mut at = extent.start;
        while at < extent.end() {
            let mut state = self.state();
            let (words, first) = words_from(at, extent.end());
            let part = Extent::new(at, extent.end().min(words.end as u64 * WORD_BLOCKS) - at);
            at = part.end();
            if let Some(State { file, .. }) = &*state {
                let copy = map.part(words.clone());
                copy.set(Extent::new(part.start - first, part.count), to, |_, _| ());
                if let Err(error) = write_words(file, words.start, &copy) {
                    self.give_up(&mut state, &error)?;
                }
            }
            map.set(part, to, &mut changed);
        }
        Ok(())
    }

    /// Notes that the index durably ends with `batch`.
    pub(super) fn index_has(&self, batch: u32) {
        self.note(|head| *head = Head { batch: batch.into(), replacing: false, ..*head });
    }

    /// Notes that the index is about to be written anew.
    pub(super) fn index_is_replaced(&self) {
        self.note(|head| head.replacing = true);
    }

    fn note(&self, change: impl FnOnce(&mut Head)) {
        let mut state = self.state();
        let Some(State { file, head }) = &mut *state else { return };
        change(head);
        let noted = head.write(file);
        // A file that stays is still right about the states, whether it is believed or not.
        let _ = noted.or_else(|error| self.give_up(&mut state, &error));
    }

    fn give_up(&self, state: &mut Option<State>, error: &io::Error) -> io::Result<()> {
        tracing::warn!(live = %self.path.display(), %error, "the live map is given up: a kill would lose unflushed writes");
        self.remove(state)
    }

    /// Takes the file away: the next process goes by the index alone.
    ///
    /// # Errors
    /// Those of the file system; it is there, and may be believed.
    pub(super) fn disown(&self) -> io::Result<()> {
        self.remove(&mut self.state())
    }

    fn remove(&self, state: &mut Option<State>) -> io::Result<()> {
        let Some(State { file, .. }) = state else { return Ok(()) };
        // Cut off, it is as good as gone.
        std::fs::remove_file(&self.path).or_else(|error| file.set_len(0).map_err(|_| error))?;
        *state = None;
        Ok(())
    }
}

/// `file` and the map in it, if it may be believed by whoever has `head`. The words of a file of another boot or another
/// overlay are not looked at.
fn believed(file: File, head: Head, indexed: &BlockMap) -> io::Result<Option<(File, BlockMap)>> {
    if file.metadata()?.len() != file_length(indexed) {
        return Ok(None);
    }
    let found = Head::read(&file)?;
    if found.identity != head.identity || !found.goes_with(head.batch) {
        return Ok(None);
    }
    let mut words = vec![0; indexed.words().len() * WORD_BYTES];
    file.read_exact_at(&mut words, HEADER_BYTES as u64)?;
    let (words, _) = words.as_chunks();
    Ok(indexed.with_words(words.iter().map(|word| u64::from_le_bytes(*word))).map(|map| (file, map)))
}

/// Makes the file. The header comes last: without it, the rest is nobody's.
fn create(path: &Path, head: Head, states: &BlockMap) -> io::Result<File> {
    let file = File::options().read(true).write(true).create_new(true).open(path)?;
    let made = || -> io::Result<()> {
        let length = file_length(states);
        file.set_len(length)?;
        // Space that is there from the start is there when the guests have filled the disk.
        match fallocate(&file, FallocateFlags::empty(), 0, length) {
            Err(Errno::OPNOTSUPP) => {}
            result => result?,
        }
        let count = states.words().len();
        for first in (0..count).step_by(PART_WORDS) {
            let part = states.part(first..count.min(first + PART_WORDS));
            if part.counts() != (0, 0) {
                write_words(&file, first, &part)?;
            }
        }
        head.write(&file)
    };
    if let Err(error) = made() {
        std::fs::remove_file(path)?;
        return Err(error);
    }
    Ok(file)
}

fn file_length(states: &BlockMap) -> u64 {
    (HEADER_BYTES + states.words().len() * WORD_BYTES) as u64
}

/// The words with the blocks `start..end`, as many as are written at once, and the first block of them.
fn words_from(start: u64, end: u64) -> (Range<usize>, u64) {
    let word = |index: u64| usize::try_from(index).expect("the map of such a disk fits into memory");
    let first = start / WORD_BLOCKS;
    (word(first)..word(end.div_ceil(WORD_BLOCKS)).min(word(first) + PART_WORDS), first * WORD_BLOCKS)
}

/// Writes `part`, the words from word `first` on.
fn write_words(file: &File, first: usize, part: &BlockMap) -> io::Result<()> {
    let bytes: Vec<u8> = part.words().flat_map(u64::to_le_bytes).collect();
    file.write_all_at(&bytes, (HEADER_BYTES + first * WORD_BYTES) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: Header = Header { base: Digest([7; DIGEST_BYTES]), size: 1000 * 4096 };

    fn map_with(header: &Header, data: &[u64]) -> BlockMap {
        let map = BlockMap::new(header.size);
        data.iter().for_each(|block| map.set(Extent::new(*block, 1), BlockState::Data, |_, _| ()));
        map
    }

    fn blocks(map: &BlockMap) -> Vec<u64> {
        map.own_runs().iter().flat_map(|run| run.extent.blocks()).collect()
    }

    /// An open overlay as far as there is one here.
    struct Opened {
        live: Live,
        map: BlockMap,
    }

    impl Opened {
        fn write(&self, blocks: Extent) {
            self.live.set(&self.map, blocks, BlockState::Data, |_, _| ()).unwrap();
        }

        /// The blocks that it sees, after which it is gone as by a kill: nothing is written at the end.
        fn blocks(self) -> Vec<u64> {
            blocks(&self.map)
        }
    }

    /// What a process that opens the overlay sees, whose index has `indexed` and ends with `batch`.
    fn open(dir: &Path, diff: &File, header: &Header, batch: u32, indexed: &[u64]) -> Opened {
        let map = map_with(header, indexed);
        let owner = Owner { header, batch, diff };
        let (live, left) = Live::open(&dir.join("live"), &owner, &map).unwrap();
        Opened { live, map: left.unwrap_or(map) }
    }

    #[test]
    fn what_a_killed_process_had_answered_is_there_for_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let diff = tempfile::tempfile().unwrap();
        let first = open(dir.path(), &diff, &HEADER, 3, &[5]);
        first.write(Extent::new(900, 2));
        drop(first); // as a kill would: nothing is written at the end
        assert_eq!(open(dir.path(), &diff, &HEADER, 3, &[5]).blocks(), [5, 900, 901]);
        assert_eq!(
            open(dir.path(), &diff, &HEADER, 4, &[5]).blocks(),
            [5, 900, 901],
            "killed after an append"
        );
    }

    /// Once, the second of two processes that were killed just after an append left a map that went with no index.
    #[test]
    fn every_process_may_be_killed_just_after_an_append() {
        let dir = tempfile::tempdir().unwrap();
        let diff = tempfile::tempfile().unwrap();
        let first = open(dir.path(), &diff, &HEADER, 3, &[5]);
        first.write(Extent::new(900, 2));
        drop(first);
        for batch in 4..8 {
            assert_eq!(open(dir.path(), &diff, &HEADER, batch, &[5]).blocks(), [5, 900, 901], "{batch}");
        }
    }

    #[test]
    fn another_index_another_diff_and_another_base_are_not_believed() {
        let other_base = Header { base: Digest([8; DIGEST_BYTES]), ..HEADER };
        let (diff, other_diff) =
            (tempfile::NamedTempFile::new().unwrap(), tempfile::NamedTempFile::new().unwrap());
        for (header, file, batch) in [
            (&HEADER, diff.as_file(), 9),
            (&HEADER, other_diff.as_file(), 3),
            (&other_base, diff.as_file(), 3),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let first = open(dir.path(), diff.as_file(), &HEADER, 3, &[5]);
            first.write(Extent::new(900, 2));
            drop(first);
            assert_eq!(open(dir.path(), file, header, batch, &[6]).blocks(), [6]);
        }
    }

    /// Once, an index put back from a copy that was made right after a compaction was believed to be that of a compaction
    /// during which the process had been killed.
    #[test]
    fn an_index_that_begins_anew_is_believed_only_after_a_kill_while_it_was_replaced() {
        for (is_replaced, expected) in [(true, &[5, 900, 901][..]), (false, &[6])] {
            for batch in [0, 1] {
                let dir = tempfile::tempdir().unwrap();
                let diff = tempfile::tempfile().unwrap();
                let first = open(dir.path(), &diff, &HEADER, 3, &[5]);
                first.write(Extent::new(900, 2));
                first.live.index_is_replaced();
                if !is_replaced {
                    first.live.index_has(4);
                }
                drop(first);
                assert_eq!(open(dir.path(), &diff, &HEADER, batch, &[6]).blocks(), expected, "{batch}");
                let last = open(dir.path(), &diff, &HEADER, batch + 2, &[7]);
                assert_eq!(last.blocks(), [7], "noted once");
            }
        }
    }

    #[test]
    fn changes_of_any_length_are_kept_beside_each_other() {
        const PART_BLOCKS: u64 = PART_WORDS as u64 * WORD_BLOCKS;
        let (dir, diff) = (tempfile::tempdir().unwrap(), tempfile::tempfile().unwrap());
        let header = Header { size: (9 * PART_BLOCKS + 40) * 4096, ..HEADER };
        let states = |opened: &Opened| opened.map.own_runs();
        let first = {
            let map = BlockMap::new(header.size);
            map.set(Extent::new(7 * PART_BLOCKS + 9, 1), BlockState::Zero, |_, _| ());
            let owner = Owner { header: &header, batch: 1, diff: &diff };
            let (live, left) = Live::open(&dir.path().join("live"), &owner, &map).unwrap();
            assert!(left.is_none());
            Opened { live, map }
        };
        first.write(Extent::new(3, 1));
        first.write(Extent::new(5, 2 * PART_BLOCKS + 60));
        first.write(Extent::new(6 * PART_BLOCKS - 3, PART_BLOCKS));
        first.write(Extent::new(9 * PART_BLOCKS - 1, 41));
        let mut changes = 0;
        let count = |_, bits: u32| changes += u64::from(bits.count_ones());
        let across = Extent::new(PART_BLOCKS, 3 * PART_BLOCKS);
        first.live.set(&first.map, across, BlockState::Zero, count).unwrap();
        assert_eq!(changes, across.count);
        let expected = states(&first);
        drop(first);
        assert_eq!(states(&open(dir.path(), &diff, &header, 1, &[])), expected);
    }

    #[test]
    fn a_file_that_cannot_be_written_is_given_up_and_not_believed() {
        let (dir, diff) = (tempfile::tempdir().unwrap(), tempfile::tempfile().unwrap());
        let path = dir.path().join("live");
        let first = open(dir.path(), &diff, &HEADER, 3, &[5]);
        first.write(Extent::new(900, 1));
        first.live.state().as_mut().unwrap().file = File::open(&path).unwrap();
        first.write(Extent::new(901, 1));
        assert!(!path.exists());
        first.write(Extent::new(902, 1));
        first.live.index_has(4);
        assert_eq!(first.blocks(), [5, 900, 901, 902]);
        assert_eq!(open(dir.path(), &diff, &HEADER, 4, &[5, 6]).blocks(), [5, 6]);
    }

    #[test]
    fn a_file_that_can_neither_be_written_nor_got_rid_of_is_an_error() {
        let (dir, diff) = (tempfile::tempdir().unwrap(), tempfile::tempfile().unwrap());
        let path = dir.path().join("live");
        let first = open(dir.path(), &diff, &HEADER, 3, &[5]);
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        first.live.state().as_mut().unwrap().file = File::open(&path).unwrap();
        assert!(first.live.set(&first.map, Extent::new(900, 1), BlockState::Data, |_, _| ()).is_err());
        assert_eq!(first.blocks(), [5]);
    }

    #[test]
    fn states_are_not_believed_after_a_failed_sync() {
        let dir = tempfile::tempdir().unwrap();
        let diff = tempfile::tempfile().unwrap();
        let first = open(dir.path(), &diff, &HEADER, 3, &[5]);
        first.write(Extent::new(900, 2));
        first.live.disown().unwrap();
        drop(first);
        assert_eq!(open(dir.path(), &diff, &HEADER, 3, &[5]).blocks(), [5]);
    }

    #[test]
    fn states_that_there_are_not_and_other_lengths_are_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let diff = tempfile::tempfile().unwrap();
        let path = dir.path().join("live");
        drop(open(dir.path(), &diff, &HEADER, 3, &[5]));
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[HEADER_BYTES + 17] = 0xff;
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(open(dir.path(), &diff, &HEADER, 3, &[6]).blocks(), [6]);
        for length in [0, 100, bytes.len() - 1, bytes.len() + 1] {
            bytes.resize(length, 0);
            std::fs::write(&path, &bytes).unwrap();
            assert_eq!(open(dir.path(), &diff, &HEADER, 3, &[7]).blocks(), [7]);
        }
    }
}
