//! The end of a part: its instances, their disks and its networks go, and that it has ended is remembered.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures_util::{FutureExt, StreamExt};
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use super::{Inner, RETRY, failed, hypervisor, runs_none, with_journal};
use crate::agent::Shared;
use crate::agent::journal::{Journal, Record};
use crate::hypervisor::InstanceType;
use crate::name::HostName;
use crate::wire::cluster::{Fault, InstanceOrder, shortened};

/// Instances of a part that are removed at once.
const REMOVALS_MAX: usize = 8;

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
    for tasks in part.tasks.values() {
        tasks.close();
    }
    let (tasks, record, owner) = (part.tasks.clone(), part.record.clone(), Arc::clone(shared));
    shared.parts.ends.spawn(async move {
        let shared = owner;
        let cleaned = async {
            while let Err(error) = clean(&shared, &record, &tasks).await {
                warn!("task {task} cannot be ended yet: {error}");
                set_trouble(&shared, task, error);
                tokio::time::sleep(RETRY).await;
            }
        };
        // What is left when the agent ends goes when it starts again: a hypervisor that hangs does not keep it.
        if shared.cancel.run_until_cancelled(cleaned).await.is_none() {
            return;
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

/// Removes everything that belongs to a part: all of it that can be, though some cannot. Each kind by itself, once the work
/// `tasks` on it has ended: a hypervisor that hangs keeps back none of the other.
async fn clean(
    shared: &Shared,
    record: &Record,
    tasks: &BTreeMap<InstanceType, TaskTracker>,
) -> Result<(), String> {
    let (mut errors, mut left) = (Vec::new(), BTreeSet::new());
    let of_kinds = tasks.iter().map(|(kind, tasks)| {
        let orders = record.part.instances.iter().filter(|order| order.kind == *kind);
        let removals: Vec<_> = orders.map(|order| take_away(shared, record.task, order)).collect();
        let removals = async move {
            tasks.wait().await;
            futures_util::stream::iter(removals).buffer_unordered(REMOVALS_MAX)
        };
        removals.flatten_stream().boxed()
    });
    let mut removals = futures_util::stream::select_all(of_kinds);
    while let Some((order, removed)) = removals.next().await {
        let Err(error) = removed else { continue };
        // It is told now: the others may hang for minutes.
        if errors.is_empty() {
            set_trouble(shared, record.task, error.clone());
        }
        errors.push(error);
        left.extend(order.nics.iter().map(|nic| &nic.network));
    }
    drop(removals);
    if errors.is_empty()
        && let Some(part) = shared.parts.inner().parts.get_mut(&record.task)
    {
        part.left_networks = true;
    }
    // One that an instance may still be on stays.
    for network in record.part.networks.iter().filter(|network| !left.contains(&network.name)) {
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

/// Removes an instance of a part, and has the controller told that it has gone.
async fn take_away<'o>(
    shared: &Shared,
    task: i64,
    order: &'o InstanceOrder,
) -> (&'o InstanceOrder, Result<(), String>) {
    let removed = remove(shared, &order.name, order.kind).await;
    if removed.is_ok() && shared.parts.set_gone(task, &order.name) {
        // Whoever listened may have ended: the agent is ending then.
        let _ = shared.changes.send(order.name.clone());
    }
    (order, removed)
}

fn set_trouble(shared: &Shared, task: i64, trouble: String) {
    if let Some(part) = shared.parts.inner().parts.get_mut(&task) {
        part.trouble = Some(shortened(trouble));
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
