//! The end of a part: its instances, their disks and its networks go, and that it has ended is remembered.

use std::sync::Arc;

use tracing::{info, warn};

use super::{Inner, RETRY, failed, hypervisor, runs_none, with_journal};
use crate::agent::Shared;
use crate::agent::journal::{Journal, Record};
use crate::hypervisor::InstanceType;
use crate::name::HostName;
use crate::wire::cluster::{Fault, shortened};

/// Begins to end a part of the cluster; true if nothing of it is left.
pub(in crate::agent) async fn end(shared: &Arc<Shared>, task: i64) -> Result<bool, Fault> {
    with_journal(shared, move |shared, journal| {
        let known = shared.parts.inner().own().map(|part| &part.record).find(|r| r.task == task).cloned();
        let Some(record) = known else { return Ok(true) };
        if !record.ending {
            info!("task {task}: is ended");
            order(shared, journal, record);
        }
        Ok(false)
    })
    .await
    .map_err(failed)
}

/// Writes down that a part is to end, and begins with it. Also when that cannot be written: a full disk gets its room back
/// from what ends, and whoever wants the end asks again after a restart.
pub(super) fn order(shared: &Arc<Shared>, journal: &Journal, mut record: Record) {
    record.ending = true;
    let task = record.task;
    let saved = journal.save(&record);
    let mut inner = shared.parts.inner();
    let Some(part) = inner.parts.get_mut(&task) else { return };
    part.record = record;
    if let Err(error) = saved {
        warn!("task {task}: that it ends cannot be written down: {error}");
        part.trouble = Some(shortened(error.to_string()));
    }
    begin(shared, &inner, task);
}

/// Ends the work on a part, and removes what belongs to it, again until nothing is left; the record says so already.
pub(super) fn begin(shared: &Arc<Shared>, inner: &Inner, task: i64) {
    let part = &inner.parts[&task];
    part.cancel.cancel();
    part.tasks.close();
    let (tasks, record, owner) = (part.tasks.clone(), part.record.clone(), Arc::clone(shared));
    shared.parts.ends.spawn(async move {
        let shared = owner;
        tasks.wait().await;
        while let Err(error) = clean(&shared, &record).await {
            warn!("task {task} cannot be ended yet: {error}");
            if let Some(part) = shared.parts.inner().parts.get_mut(&task) {
                part.trouble = Some(shortened(error));
            }
            tokio::select! {
                () = shared.cancel.cancelled() => return,
                () = tokio::time::sleep(RETRY) => {}
            }
        }
        // All of it in one turn: an order that comes late finds the part, or that it has ended.
        let forgotten = with_journal(&shared, move |shared, journal| {
            let mut ended = shared.parts.inner().ended.clone();
            ended.add(record.cluster.as_deref(), task);
            let saved = journal.save_ended(&ended);
            // In any case: the file may not say that the task ends, and would have an agent go on with it.
            let result = journal.forget(task).and(saved);
            let mut inner = shared.parts.inner();
            inner.parts.remove(&task);
            inner.ended = ended;
            result
        });
        if let Err(error) = forgotten.await {
            warn!("task {task} has ended, but that cannot be written down: {error}");
        }
        info!("task {task}: has ended");
    });
}

/// Removes everything that belongs to a part: all of it that can be, though some cannot.
async fn clean(shared: &Shared, record: &Record) -> Result<(), String> {
    let mut errors = Vec::new();
    for order in &record.part.instances {
        errors.extend(remove(shared, &order.name, order.kind).await.err());
    }
    if errors.is_empty()
        && let Some(part) = shared.parts.inner().parts.get_mut(&record.task)
    {
        part.left_networks = true;
    }
    for network in &record.part.networks {
        let _alone = shared.parts.networks().await;
        // Of parts that end together, the last to come here removes it.
        let others = shared.parts.inner().parts.values().any(|part| {
            part.record.task != record.task
                && !part.left_networks
                && part.record.part.networks.iter().any(|other| other.bridge == network.bridge)
        });
        if let (false, Some(networks)) = (others, &shared.services.networks) {
            errors.extend(networks.remove(network).await.err().map(|error| error.to_string()));
        }
    }
    match &errors[..] {
        [] => Ok(()),
        [only] => Err(only.clone()),
        [first, more @ ..] => Err(format!("{first} (and {} more)", more.len())),
    }
}

/// Removes an instance, and then its disk: never that of one that may still run.
pub(in crate::agent) async fn remove(
    shared: &Shared,
    name: &HostName,
    kind: InstanceType,
) -> Result<(), String> {
    let hypervisor = hypervisor(shared, kind).ok_or_else(|| format!("{name}: {}", runs_none(kind)))?;
    hypervisor.delete(name).await.map_err(|error| format!("{name}: {error}"))?;
    if kind == InstanceType::Vm {
        shared.services.data_plane.remove_disk(name).await.map_err(|error| format!("{name}: {error}"))?;
    }
    Ok(())
}
