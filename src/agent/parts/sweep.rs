//! What an earlier agent left and no task knows: it is found by this node's mark, and ended before anything of its kind is
//! started.

use std::sync::Arc;
use std::time::Duration;

use tracing::{debug, warn};

use super::{RETRY, hypervisor, remove};
use crate::agent::Shared;
use crate::hypervisor::{Hypervisor, InstanceType};

/// Pauses before the hypervisors are swept again: what an agent has asked for just before it was killed is made all the
/// same, maybe after its task has ended, and is not seen before it is made.
const LATER: [Duration; 2] = [Duration::from_secs(10), Duration::from_secs(60)];

/// Sweeps every hypervisor, again until it was there and nothing is left, and some time later.
pub(super) fn begin(shared: &Arc<Shared>) {
    for hypervisor in &shared.services.hypervisors {
        let (owner, hypervisor) = (Arc::clone(shared), Arc::clone(hypervisor));
        shared.parts.ends.spawn(async move {
            let sweep = async {
                for pause in LATER.map(Some).into_iter().chain([None]) {
                    while !sweep(&owner, hypervisor.as_ref()).await {
                        tokio::time::sleep(RETRY).await;
                    }
                    let Some(pause) = pause else { return };
                    tokio::time::sleep(pause).await;
                }
            };
            tokio::select! {
                () = owner.cancel.cancelled() => {}
                () = sweep => {}
            }
        });
    }
}

/// Returns when what belongs to no task has been ended among instances of `kind`, as far as that can be done.
pub(in crate::agent) async fn swept(shared: &Shared, kind: InstanceType) {
    if hypervisor(shared, kind).is_some() {
        // The sender is ours: it does not go away meanwhile.
        let _ = shared.parts.swept.subscribe().wait_for(|swept| swept.contains(&kind)).await;
    }
}

/// Ends instances that carry this node's mark and belong to no task: what was left when the journal was lost. False while
/// some may be left.
async fn sweep(shared: &Shared, hypervisor: &dyn Hypervisor) -> bool {
    let kind = hypervisor.instance_type();
    let names = match hypervisor.list().await {
        Ok(names) => names,
        Err(error) => {
            debug!("what is left of earlier tasks cannot be found yet: {error}");
            return false;
        }
    };
    let mut clean = true;
    for name in names {
        let known = shared.parts.inner().parts.values().any(|part| part.record.steps.contains_key(&name));
        if !known {
            warn!("{name} belongs to no task: it is ended");
            if let Err(error) = remove(shared, &name, kind).await {
                warn!("{error}");
                clean = false;
            }
        }
    }
    shared.parts.swept.send_modify(|swept| {
        swept.insert(kind);
    });
    clean
}
