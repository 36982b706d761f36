//! Where the time of a VM's boot went, for people: printed when it has booted while its image was still coming.

use std::path::Path;

use bootcache::control::{ImageStatus, OverlayInfo, Status, TransferStatus, WaitStatus};
use bootcache::name::HostName;
use indicatif::HumanBytes;
use serde::Serialize;

/// What is told of one VM.
#[derive(Debug, Clone, Serialize)]
pub(super) struct BootReport {
    /// Where the time of its reads went.
    waits: WaitStatus,
    /// What the recorded boot, begun with the stream, waits at least at the goodput that this had.
    waiting_min_ms: Option<u64>,
    /// How the image came, for all its VMs together.
    transfer: TransferStatus,
}

/// What there is to tell of `vm`; none when its image was all here before it started.
pub(super) fn of(status: &Status, vm: &HostName) -> Option<BootReport> {
    let overlay: &OverlayInfo = status.overlays.iter().find(|overlay| overlay.name == *vm)?;
    let image: &ImageStatus = status.images.iter().find(|image| Some(image.root) == overlay.base)?;
    let transfer = image.transfer.clone()?;
    Some(BootReport { waits: overlay.waits?, waiting_min_ms: transfer.waiting_min_ms, transfer })
}

impl BootReport {
    /// Some lines; `misses` is the file with what was not foreseen.
    pub(super) fn lines(&self, misses: &Path) -> Vec<String> {
        let waits = &self.waits;
        let mut lines = vec![format!("waited {}", waited(waits, self.waiting_min_ms))];
        let transfer = &self.transfer;
        let [stream, demand, fill, tree] = transfer.bytes;
        lines.push(format!(
            "came: boot stream {}{}, demand {}, fill {}, digests {}; {} from the origin, {} copied from other images",
            HumanBytes(stream),
            transfer
                .goodput
                .map_or_else(String::new, |rate| format!(" at {:.0} Mbit/s", rate as f64 * 8e-6)),
            HumanBytes(demand),
            HumanBytes(fill),
            HumanBytes(tree),
            HumanBytes(transfer.origin_bytes),
            HumanBytes(transfer.similar_bytes),
        ));
        for source in transfer.sources.iter().filter(|source| source.bytes > 0) {
            lines.push(format!("  {} {}: {}", source.node, source.address, HumanBytes(source.bytes)));
        }
        if waits.misses > 0 {
            lines.push(format!(
                "{} reads were not foreseen: `bootcache record IMAGE --merge-misses {}` where the image was recorded",
                waits.misses,
                misses.display(),
            ));
        }
        lines
    }
}

/// One line on where the time of reads went.
pub(super) fn waited(waits: &WaitStatus, waiting_min_ms: Option<u64>) -> String {
    let seconds = |ms: u64| ms as f64 / 1000.0;
    let bound = waiting_min_ms.map_or_else(String::new, |ms| {
        format!(" ({:.2} s at least, had it begun with the stream)", seconds(ms))
    });
    format!(
        "{:.2} s{bound}: {} reads for the boot stream {:.2} s, {} for a fetch {:.2} s, {} unforeseen; own disk {:.2} s",
        seconds(waits.blocked_ms),
        waits.stream_waits,
        seconds(waits.stream_wait_ms),
        waits.demand_waits,
        seconds(waits.demand_wait_ms),
        waits.misses,
        seconds(waits.local_ms),
    )
}
