//! The map of a running overlay, kept where a killed process leaves it: a shared mapping of the file `live`.
//!
//! A client counts on what was *answered*, not only on what it flushed: QEMU that finds its server again after a
//! crash repeats the requests that were not answered, and no others, and takes its next FLUSH to cover those that were.
//! So `kill -9` may lose no more here than it does to a process that writes to a plain file: nothing. The bytes in the
//! diff are the kernel's already when a write is answered; this makes the states the kernel's too, without a system call.
//!
//! Never synced, and believed only on the boot of the machine on which it was written: after a power loss any part of
//! it may have reached the disk, and only the index counts.
//!
//! ```text
//! header   4096 bytes   identity 32 | batch u64 | zeroes
//! words    8 bytes for each 32 blocks, as in memory
//! ```
//!
//! The identity is BLAKE3 of the kernel's boot id, the diff's device and inode, and the index's header. The batch is the
//! last one that the index is known to have: an index put back from a copy has another.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use super::log::Header;
use super::map::BlockMap;
use crate::digest::{DIGEST_BYTES, Digest};

const MAGIC: &[u8] = b"bootcache live map 1\n";
const HEADER_BYTES: usize = 4096;
const WORD_BYTES: usize = size_of::<u64>();
const IDENTITY_WORDS: usize = DIGEST_BYTES / WORD_BYTES;
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

    /// Whether an index that now ends with batch `self.batch` is the one that a live map with `batch` went with: a kill
    /// can come between the two, and an index that was written anew begins at 0 or 1 again.
    fn goes_with(&self, batch: u64) -> bool {
        let own = u64::from(self.batch);
        own == batch || own == batch + 1 || own <= 1
    }
}

/// The mapping. Owner of the file `live` while the overlay is open; the lock on the diff keeps other processes away.
#[derive(Debug)]
pub(super) struct Live {
    map: MmapRaw,
    words: usize,
}

impl Live {
    /// Opens the file at `path`, or makes it. Its states are those that the last process left if it is `owner`'s and
    /// sound, else the ones in `states`.
    ///
    /// # Errors
    /// Those of the file system, a full one among them. A file that could not be made is not there then; one that stays may
    /// be that of a process that was killed.
    pub(super) fn open(path: &Path, owner: &Owner<'_>, states: &BlockMap) -> io::Result<Self> {
        let identity = owner.identity()?;
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
        let words = states.words().len();
        let length = (HEADER_BYTES + words * WORD_BYTES) as u64;
        let kept = file.metadata()?.len() == length;
        let map = Self::map(&file, kept, length).inspect_err(|_| {
            if !kept {
                // Where that fails the next process finds a file of no worth, and the same error.
                let _ = std::fs::remove_file(path);
            }
        })?;
        let live = Self { map, words };
        if kept && live.belongs_to(identity, owner) && states.admits(live.states()) {
            // The next kill may come, as the last one did, when the index has one batch more than is noted here.
            live.index_has(owner.batch);
        } else {
            live.fill(identity, owner, states);
        }
        Ok(live)
    }

    /// Maps the file, made anew unless it is to be `kept`.
    fn map(file: &File, kept: bool, length: u64) -> io::Result<MmapRaw> {
        if !kept {
            file.set_len(0)?;
            file.set_len(length)?;
        }
        // A page without space on the disk would end the process when it is first written to.
        match fallocate(file, FallocateFlags::empty(), 0, length) {
            Err(Errno::OPNOTSUPP) => {}
            result => result?,
        }
        MmapOptions::new().map_raw(file)
    }

    fn belongs_to(&self, identity: Digest, owner: &Owner<'_>) -> bool {
        let found = self.header()[..IDENTITY_WORDS].iter().map(|word| word.load(Ordering::Acquire));
        found.eq(identity_words(identity)) && owner.goes_with(self.batch().load(Ordering::Acquire))
    }

    /// The identity goes first when it is no longer true, and comes last when it is.
    fn fill(&self, identity: Digest, owner: &Owner<'_>, states: &BlockMap) {
        let name = |words: [u64; IDENTITY_WORDS]| {
            self.header().iter().zip(words).for_each(|(at, word)| at.store(word, Ordering::Release));
        };
        name([0; IDENTITY_WORDS]);
        for (at, word) in self.states().iter().zip(states.words()) {
            at.store(word.load(Ordering::Acquire), Ordering::Release);
        }
        self.index_has(owner.batch);
        name(identity_words(identity));
    }

    /// Makes the states nobody's: the next process goes by the index alone.
    pub(super) fn disown(&self) {
        self.header()[..IDENTITY_WORDS].iter().for_each(|word| word.store(0, Ordering::Release));
    }

    /// Notes that the index durably ends with `batch`.
    pub(super) fn index_has(&self, batch: u32) {
        self.batch().store(batch.into(), Ordering::Release);
    }

    fn batch(&self) -> &AtomicU64 {
        &self.header()[IDENTITY_WORDS]
    }

    fn header(&self) -> &[AtomicU64] {
        &self.all()[..HEADER_BYTES / WORD_BYTES]
    }

    /// Two bits a block, as in [`BlockMap`].
    pub(super) fn states(&self) -> &[AtomicU64] {
        &self.all()[HEADER_BYTES / WORD_BYTES..]
    }

    fn all(&self) -> &[AtomicU64] {
        let count = HEADER_BYTES / WORD_BYTES + self.words;
        // SAFETY: the mapping is `count` words long, begins at a page and lives as long as `self`. It is shared and
        // writable, and only ever looked at through atomics. The file is not made shorter while it is mapped: only
        // `open` does that, and the lock on the diff lets one process have the overlay open, once.
        unsafe { std::slice::from_raw_parts(self.map.as_mut_ptr().cast::<AtomicU64>(), count) }
    }
}

fn identity_words(identity: Digest) -> [u64; IDENTITY_WORDS] {
    let (words, _) = identity.0.as_chunks::<WORD_BYTES>();
    std::array::from_fn(|index| u64::from_le_bytes(words[index]))
}

#[cfg(test)]
mod tests {
    use super::super::map::BlockState;
    use super::*;
    use crate::block::Extent;

    const HEADER: Header = Header { base: Digest([7; DIGEST_BYTES]), size: 1000 * 4096 };

    fn map_with(data: &[u64]) -> BlockMap {
        let map = BlockMap::new(HEADER.size);
        data.iter().for_each(|block| map.set(Extent::new(*block, 1), BlockState::Data, |_, _| ()));
        map
    }

    fn blocks(map: &BlockMap) -> Vec<u64> {
        map.own_runs().iter().flat_map(|run| run.extent.blocks()).collect()
    }

    /// What a process that opens the overlay sees, whose index has `indexed` and ends with `batch`.
    fn open(dir: &Path, diff: &File, header: &Header, batch: u32, indexed: &[u64]) -> BlockMap {
        let map = map_with(indexed);
        let owner = Owner { header, batch, diff };
        let live = Live::open(&dir.join("live"), &owner, &map).unwrap();
        BlockMap::over(live, header.size)
    }

    #[test]
    fn what_a_killed_process_had_answered_is_there_for_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let diff = tempfile::tempfile().unwrap();
        let first = open(dir.path(), &diff, &HEADER, 3, &[5]);
        first.set(Extent::new(900, 2), BlockState::Data, |_, _| ());
        drop(first); // as a kill would: nothing is written at the end
        assert_eq!(blocks(&open(dir.path(), &diff, &HEADER, 3, &[5])), [5, 900, 901]);
        assert_eq!(
            blocks(&open(dir.path(), &diff, &HEADER, 4, &[5])),
            [5, 900, 901],
            "killed after an append"
        );
        assert_eq!(
            blocks(&open(dir.path(), &diff, &HEADER, 1, &[5])),
            [5, 900, 901],
            "killed after a compaction"
        );
    }

    /// Once, the second of two processes that were killed just after an append left a map that went with no index.
    #[test]
    fn every_process_may_be_killed_just_after_an_append() {
        let dir = tempfile::tempdir().unwrap();
        let diff = tempfile::tempfile().unwrap();
        let first = open(dir.path(), &diff, &HEADER, 3, &[5]);
        first.set(Extent::new(900, 2), BlockState::Data, |_, _| ());
        drop(first);
        for batch in 4..8 {
            assert_eq!(blocks(&open(dir.path(), &diff, &HEADER, batch, &[5])), [5, 900, 901], "{batch}");
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
            first.set(Extent::new(900, 2), BlockState::Data, |_, _| ());
            drop(first);
            assert_eq!(blocks(&open(dir.path(), file, header, batch, &[6])), [6]);
        }
    }

    #[test]
    fn states_are_not_believed_after_a_failed_sync() {
        let dir = tempfile::tempdir().unwrap();
        let diff = tempfile::tempfile().unwrap();
        let first = open(dir.path(), &diff, &HEADER, 3, &[5]);
        first.set(Extent::new(900, 2), BlockState::Data, |_, _| ());
        first.live().unwrap().disown();
        drop(first);
        assert_eq!(blocks(&open(dir.path(), &diff, &HEADER, 3, &[5])), [5]);
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
        assert_eq!(blocks(&open(dir.path(), &diff, &HEADER, 3, &[6])), [6]);
        for length in [0, 100, bytes.len() - 1, bytes.len() + 1] {
            bytes.resize(length, 0);
            std::fs::write(&path, &bytes).unwrap();
            assert_eq!(blocks(&open(dir.path(), &diff, &HEADER, 3, &[7])), [7]);
        }
    }
}
