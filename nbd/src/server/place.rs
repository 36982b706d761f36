//! Places for connections: so many in all, and so many for each export.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use tokio::sync::OwnedSemaphorePermit;
use tracing::warn;

use super::{Export, ExportStats, Shared};

/// A connection's place, given back when it is dropped.
pub(crate) struct Place {
    shared: Arc<Shared>,
    name: String,
    stats: Arc<ExportStats>,
    _in_all: OwnedSemaphorePermit,
}

impl Place {
    /// Takes a place for a connection to `export`; the error is a message for the client's person.
    pub(crate) fn take(shared: &Arc<Shared>, export: &Export) -> Result<Self, &'static str> {
        let limits = &shared.limits;
        let Ok(in_all) = Arc::clone(&shared.connections).try_acquire_owned() else {
            warn!("more than {} NBD connections: one is refused", limits.connections);
            return Err("this server has no place for another connection");
        };
        let mut counts = shared.per_export.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(export.name.clone()).or_default();
        if *count >= limits.connections_per_export {
            let (most, name) = (limits.connections_per_export, &export.name);
            warn!("more than {most} connections to export '{name}': one is refused");
            return Err("the export has no place for another connection");
        }
        *count += 1;
        export.stats.connections.fetch_add(1, Ordering::Relaxed);
        let (name, stats) = (export.name.clone(), Arc::clone(&export.stats));
        drop(counts);
        Ok(Self { shared: Arc::clone(shared), name, stats, _in_all: in_all })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.stats.connections.fetch_sub(1, Ordering::Relaxed);
        let mut counts = self.shared.per_export.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.name) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.name);
            }
        }
    }
}
