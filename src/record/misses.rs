//! A better boot cache of what production boots read that it did not foresee.
//!
//! Nodes keep what was missed as a recording (`crate::transfer::missed`). Each block that the boot cache does not have goes
//! to the place in its order at which it was missed; what it has stays as it is. The frames are made anew.

use std::collections::HashMap;

use tokio_util::sync::CancellationToken;

use super::save::{self, Order, Saved};
use super::{OnProgress, RecordError};
use crate::block::Extent;
use crate::boot_cache::merge::Touch;
use crate::boot_cache::recording::Recording;
use crate::boot_cache::{BootCache, Heads};
use crate::store::{ImageEntry, Store};

/// Merges `misses` into the boot cache of `entry`, compressed at `level`. Returns it, and how many blocks are new.
///
/// # Errors
/// [`RecordError::NoBootCache`] when there is none to make better; others of writing it.
pub async fn merge_misses(
    store: &Store,
    entry: &ImageEntry,
    misses: &[Recording],
    level: i32,
    progress: OnProgress<'_>,
    cancel: &CancellationToken,
) -> Result<(Saved, usize), RecordError> {
    let Some(boot) = &entry.manifest.boot else { return Err(RecordError::NoBootCache) };
    let hold = store.hold(entry.root)?;
    let old = BootCache::open(&entry.boot_path(), entry.root).map_err(|_| RecordError::NoBootCache)?;
    let heads = old.heads();
    let touches = merged(heads, misses);
    let new = touches.len() - usize::try_from(heads.blocks()).expect("they are in memory");
    let end_ns = u64::from(heads.end_ms()) * 1_000_000;
    let order = Order { touches, end_ns, until: boot.until.clone(), level };
    let saved = save::write(store, entry, order, &[], progress, cancel).await?;
    drop(hold);
    Ok((saved, new))
}

fn merged(heads: &Heads, misses: &[Recording]) -> Vec<Touch> {
    let blocks = crate::block::blocks_for(heads.size());
    let mut first: HashMap<u64, u64> = HashMap::new();
    for read in misses.iter().flat_map(|recording| &recording.reads) {
        for block in Extent::touching(read.offset, read.length).blocks().take_while(|block| *block < blocks) {
            if heads.position(block).is_none() {
                let time_ns = first.entry(block).or_insert(read.time_ns);
                *time_ns = read.time_ns.min(*time_ns);
            }
        }
    }
    let mut missed: Vec<Touch> = first.into_iter().map(|(block, time_ns)| Touch { block, time_ns }).collect();
    missed.sort_by_key(|touch| (touch.time_ns, touch.block));
    let mut missed = missed.into_iter().peekable();
    let mut touches = Vec::new();
    for (index, frame) in heads.frames().iter().enumerate() {
        let time_ns = u64::from(frame.due_ms) * 1_000_000;
        touches.extend(std::iter::from_fn(|| missed.next_if(|touch| touch.time_ns <= time_ns)));
        let blocks = heads.frame_runs(index).iter().flat_map(|run| run.extent.blocks());
        touches.extend(blocks.map(|block| Touch { block, time_ns }));
    }
    touches.extend(missed);
    touches
}
