//! A machine whose disk has a volatile cache: what was written and not synced is there or not after a power loss, at random:
//! of guests' data block by block, of the overlay's own log sector by sector.
//!
//! Guests take a block for written or not: before Linux 6.11 JBD2 refuses to mount when half of a commit block has come
//! ("jbd2: avoid mount failed when commit block is partial submitted").
//!
//! `kill -9` of a server leaves the kernel's page cache alone, so it cannot show that a flush was one. This can.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard};

use bootcache::overlay::{DiffFile, LogFile, ReplaceError};
use bootcache_nbd::Attempt;
use rustix::fs::{FallocateFlags, fallocate};

const BLOCK: u64 = 4096;
const BLOCK_BYTES: usize = 4096;
const SECTOR_BYTES: usize = 512;

/// The two files of an overlay, on one disk.
#[derive(Debug)]
pub(crate) struct Machine(Mutex<State>);

#[derive(Debug)]
struct State {
    on: bool,
    /// The diff as a reader sees it.
    diff: File,
    /// What is on the disk of each block that was written since the last sync; empty for zeroes.
    durable: BTreeMap<u64, Vec<u8>>,
    log: Vec<u8>,
    durable_log: Vec<u8>,
}

impl Machine {
    /// A machine with an overlay's `log`, and the diff in an empty file of the disk's length.
    pub(crate) fn new(log: Vec<u8>, diff: File) -> Arc<Self> {
        let state = State { on: true, diff, durable: BTreeMap::new(), durable_log: log.clone(), log };
        Arc::new(Self(Mutex::new(state)))
    }

    /// Pulls the plug: nothing is written or answered from now on. Gives the machine that is switched on again, and how
    /// many blocks were lost. Each block that was not synced is kept with a chance of `kept` in 256.
    pub(crate) fn power_loss(&self, kept: u8, mut random: impl FnMut() -> u8) -> (Arc<Self>, usize) {
        let mut state = self.0.lock().unwrap();
        state.on = false;
        let mut lost = 0;
        for (block, bytes) in &state.durable {
            if random() >= kept {
                let bytes = if bytes.is_empty() { &[0; BLOCK_BYTES][..] } else { bytes };
                state.diff.write_all_at(bytes, block * BLOCK).unwrap();
                lost += 1;
            }
        }
        let (seen, durable) = (&state.log, &state.durable_log);
        let longer = seen.len().abs_diff(durable.len());
        let length = seen.len().min(durable.len()) + longer * usize::from(random()) / 255;
        let mut log = vec![0; length];
        for (index, piece) in log.chunks_mut(SECTOR_BYTES).enumerate() {
            let source = if random() < kept { seen } else { durable };
            let source = source.get(index * SECTOR_BYTES..).unwrap_or_default();
            let known = source.len().min(piece.len());
            piece[..known].copy_from_slice(&source[..known]);
        }
        (Self::new(log, state.diff.try_clone().unwrap()), lost)
    }

    fn running(&self) -> io::Result<MutexGuard<'_, State>> {
        let state = self.0.lock().unwrap();
        if state.on { Ok(state) } else { Err(io::Error::other("there is no power")) }
    }
}

impl State {
    /// Before a range of the diff is written: keeps what is on the disk.
    fn remember(&mut self, offset: u64, length: u64) -> io::Result<()> {
        for block in offset / BLOCK..(offset + length).div_ceil(BLOCK) {
            if !self.durable.contains_key(&block) {
                let mut bytes = vec![0; BLOCK_BYTES];
                self.diff.read_exact_at(&mut bytes, block * BLOCK)?;
                if bytes.iter().all(|byte| *byte == 0) {
                    bytes = Vec::new();
                }
                self.durable.insert(block, bytes);
            }
        }
        Ok(())
    }
}

impl DiffFile for Machine {
    fn try_read_at(&self, buf: &mut [u8], offset: u64) -> Attempt {
        Attempt::Ready(self.read_at(buf, offset))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.running()?.diff.read_exact_at(buf, offset)
    }

    fn write_at(&self, parts: [&[u8]; 3], offset: u64) -> io::Result<()> {
        let data = parts.concat();
        let mut state = self.running()?;
        state.remember(offset, data.len() as u64)?;
        state.diff.write_all_at(&data, offset)
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        let mut state = self.running()?;
        state.remember(offset, length)?;
        Ok(fallocate(&state.diff, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, length)?)
    }

    fn allocate_zeroes(&self, offset: u64, length: u64, _: bool) -> io::Result<()> {
        self.punch(offset, length)
    }

    fn sync(&self) -> io::Result<()> {
        self.running()?.durable.clear();
        Ok(())
    }

    fn read_ahead(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
}

impl LogFile for Machine {
    fn load(&self) -> io::Result<Vec<u8>> {
        Ok(self.running()?.log.clone())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut state = self.running()?;
        state.log.truncate(usize::try_from(offset).unwrap());
        state.log.extend_from_slice(bytes);
        Ok(())
    }

    fn truncate(&self, length: u64) -> io::Result<()> {
        self.running()?.log.truncate(usize::try_from(length).unwrap());
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.running()?;
        state.durable_log = state.log.clone();
        Ok(())
    }

    fn replace(&self, bytes: &[u8]) -> Result<(), ReplaceError> {
        let mut state = self.running().map_err(ReplaceError::Unchanged)?;
        state.log = bytes.to_vec();
        state.durable_log = bytes.to_vec();
        Ok(())
    }
}
