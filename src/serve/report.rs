//! What is told of an image on its way: the transfer's counters as `status` and the boot report show them.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::block::BLOCK_SIZE;
use crate::control::{SourceStatus, TransferStatus, WaitStatus};
use crate::local_cache::ReadCounters;
use crate::transfer::Engine;

fn load(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

/// Where the time of reads went.
pub(super) fn waits(counters: &ReadCounters) -> WaitStatus {
    WaitStatus {
        hits: load(&counters.hits),
        stream_waits: load(&counters.stream_waits),
        stream_wait_ms: load(&counters.stream_wait_us) / 1000,
        demand_waits: load(&counters.demand_waits),
        demand_wait_ms: load(&counters.demand_wait_us) / 1000,
        misses: load(&counters.misses),
        local_ms: load(&counters.local_us) / 1000,
        blocked_ms: u64::try_from(counters.blocked_for().as_millis()).unwrap_or(u64::MAX),
        waiting: counters.waiting(),
    }
}

/// How the transfer of an image is doing.
pub(super) fn transfer(engine: &Engine) -> TransferStatus {
    let progress = engine.progress();
    let counters = engine.counters();
    let bound = engine.waiting_min();
    let sources = progress.sources.into_iter().map(|source| SourceStatus {
        address: source.address,
        node: source.node,
        up: source.up,
        error: source.error,
        banned: source.banned_for.is_some(),
        banned_seconds: source.banned_for.map_or(0, |time| time.as_secs() + 1),
        complete: source.complete,
        bytes: source.bytes,
    });
    TransferStatus {
        frames: progress.frames,
        frames_total: progress.frames_total,
        boot_complete: progress.boot_complete,
        present: progress.present,
        bytes: progress.bytes,
        origin_bytes: counters.origin_bytes.total(),
        waits: waits(engine.cache().counters()),
        waiting_min_ms: bound.map(|(ms, _)| ms),
        goodput: bound.map(|(_, goodput)| goodput),
        similar_bytes: load(&counters.similar_blocks) * BLOCK_SIZE,
        hedges: load(&counters.hedges),
        failovers: load(&counters.failovers),
        corrupt: load(&counters.corrupt),
        bans: load(&counters.bans),
        trouble: progress.trouble,
        sources: sources.collect(),
    }
}
