//! The parts of deployments that this node has: accepted, carried out, ended. Owner of the journal and of what is known
//! of each instance.
//!
//! Files are written on blocking threads, one after the other; what is known can be asked meanwhile, so that a slow disk
//! makes no node look dead. What changes in the journal changes here once it is on disk.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use super::journal::{Ended, Journal, JournalError, Record, Step};
use super::{Shared, instance};
use crate::hypervisor::{Hypervisor, Info, InstanceType};
use crate::name::HostName;
use crate::wire::cluster::{Fault, FaultCode, INSTANCES_MAX, InstanceState, InstanceStatus, Part};

mod end;
mod sweep;

pub(super) use end::{end, remove};
pub(super) use sweep::swept;

/// How long to wait before what could not be ended is tried again.
const RETRY: Duration = Duration::from_secs(2);

/// All parts.
pub(super) struct Parts {
    /// Held for moments, never while a file is written.
    inner: Mutex<Inner>,
    /// Held while a file is written, by the thread that writes it.
    journal: Arc<tokio::sync::Mutex<Journal>>,
    /// See [`Parts::networks`].
    networks: tokio::sync::Mutex<()>,
    /// Parts that are being ended.
    ends: TaskTracker,
    /// The kinds of which what belongs to no task has been ended: none of a kind is started before.
    swept: tokio::sync::watch::Sender<BTreeSet<InstanceType>>,
}

struct Inner {
    cluster: Option<String>,
    parts: BTreeMap<i64, Running>,
    ended: Ended,
}

impl Inner {
    /// The parts of the cluster that the node belongs to; those of one that it has left are being ended.
    fn own(&self) -> impl Iterator<Item = &Running> {
        self.parts.values().filter(|part| part.record.cluster == self.cluster)
    }
}

/// A part that is being carried out, or ended.
struct Running {
    record: Record,
    /// Steps that instances have come to and that are still to be written down, the last one last.
    unwritten: Vec<(HostName, Step)>,
    live: BTreeMap<HostName, Live>,
    /// Why it cannot be ended yet.
    trouble: Option<String>,
    /// Its instances have gone, and it needs its networks no longer.
    left_networks: bool,
    /// Ends the work on its instances.
    cancel: CancellationToken,
    /// The work on its instances, by kind: what hangs with one hypervisor keeps back no end by the other.
    tasks: BTreeMap<InstanceType, TaskTracker>,
}

/// What is known of an instance beside its step.
#[derive(Debug, Clone, Default)]
struct Live {
    info: Option<Info>,
    /// Milliseconds from the order until it was up.
    up_ms: Option<u64>,
    note: Option<String>,
}

impl Parts {
    pub(super) fn new(journal: Journal) -> Result<Self, JournalError> {
        let (parts, ended) = (BTreeMap::new(), journal.ended()?);
        Ok(Self {
            inner: Mutex::new(Inner { cluster: journal.cluster()?, parts, ended }),
            journal: Arc::new(tokio::sync::Mutex::new(journal)),
            networks: tokio::sync::Mutex::default(),
            ends: TaskTracker::new(),
            swept: tokio::sync::watch::Sender::default(),
        })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Held while a network is made, and from the look whether somebody needs it until it is removed.
    pub(super) async fn networks(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.networks.lock().await
    }

    /// The tasks of the cluster of which there is a part.
    pub(super) fn tasks(&self) -> Vec<i64> {
        let inner = self.inner();
        inner.own().map(|part| part.record.task).collect()
    }

    /// The highest number of a task of the cluster that is known here.
    pub(super) fn last_task(&self) -> Option<i64> {
        let inner = self.inner();
        let ended = inner.ended.last(inner.cluster.as_deref());
        inner.own().map(|part| part.record.task).max().max(ended)
    }

    /// The cluster whose orders are taken.
    pub(super) fn cluster(&self) -> Option<String> {
        self.inner().cluster.clone()
    }

    /// What cannot be ended, and why, a line each.
    pub(super) fn troubles(&self) -> Vec<String> {
        let inner = self.inner();
        let parts = inner.parts.values();
        let troubles = parts.filter_map(|part| Some((part.record.task, part.trouble.as_ref()?)));
        troubles.map(|(task, trouble)| format!("task {task} cannot be ended yet: {trouble}")).collect()
    }

    /// How many instances run, or boot.
    pub(super) fn running(&self) -> usize {
        let inner = self.inner();
        let steps = inner.parts.values().flat_map(|part| part.record.steps.values());
        steps.filter(|step| matches!(step, Step::Launched | Step::Up)).count()
    }

    /// The state of every instance of the cluster, or of those called `names`.
    pub(super) fn states(&self, names: Option<&[HostName]>) -> Vec<InstanceState> {
        let inner = self.inner();
        let wanted = |name: &HostName| names.is_none_or(|names| names.contains(name));
        let parts = inner.own().flat_map(|part| {
            part.record
                .steps
                .iter()
                .map(move |(name, step)| (part.record.task, name, step, part.live.get(name)))
        });
        parts
            .filter(|(_, name, ..)| wanted(name))
            .map(|(task, name, step, live)| state(task, name, step, live))
            .collect()
    }

    /// Notes what the hypervisor says of an instance, and a word on it for people.
    pub(super) fn set_live(&self, task: i64, name: &HostName, info: Option<Info>, note: Option<String>) {
        if let Some(part) = self.inner().parts.get_mut(&task) {
            let live = part.live.entry(name.clone()).or_default();
            (live.info, live.note) = (info, note);
        }
    }

    /// Has a word for people on an instance that there is none on yet: why it has to wait says more than for what.
    pub(super) fn set_note(&self, task: i64, name: &HostName, note: &str) {
        if let Some(part) = self.inner().parts.get_mut(&task) {
            let live = part.live.entry(name.clone()).or_default();
            live.note.get_or_insert_with(|| note.to_owned());
        }
    }

    /// Notes that an instance of a part that is being ended has gone; false if it had ended before. Not in the journal: it is
    /// looked for again after a kill.
    fn set_gone(&self, task: i64, name: &HostName) -> bool {
        let mut inner = self.inner();
        let Some(part) = inner.parts.get_mut(&task) else { return false };
        let ended = |step: &Step| matches!(step, Step::Stopped | Step::Failed(_));
        let Some(step) = part.record.steps.get_mut(name).filter(|step| !ended(step)) else { return false };
        *step = Step::Stopped;
        let note = Some("it has ended with its task".to_owned());
        part.live.insert(name.clone(), Live { note, ..Live::default() });
        true
    }

    /// Notes how long an instance took to be up.
    pub(super) fn set_up(&self, task: i64, name: &HostName, up_ms: u64) {
        if let Some(part) = self.inner().parts.get_mut(&task) {
            part.live.entry(name.clone()).or_default().up_ms = Some(up_ms);
        }
    }
}

/// Has `work` use the journal on a blocking thread, after everybody who came before. It is done to its end even when the
/// future is dropped.
async fn with_journal<T: Send + 'static>(
    shared: &Arc<Shared>,
    work: impl FnOnce(&Arc<Shared>, &Journal) -> Result<T, JournalError> + Send + 'static,
) -> Result<T, JournalError> {
    let journal = Arc::clone(&shared.parts.journal).lock_owned().await;
    let (owner, dir) = (Arc::clone(shared), shared.options.dir.clone());
    match tokio::task::spawn_blocking(move || work(&owner, &journal)).await {
        Ok(result) => result,
        Err(error) => Err(JournalError::Io { path: dir, source: error.into() }),
    }
}

/// Whether an order of `cluster` is taken. A node that has a controller joins by registering there, and not by an order:
/// the controller that it was moved away from still gives it some.
pub(super) async fn obey(shared: &Arc<Shared>, cluster: &str) -> Result<(), Fault> {
    if shared.options.controller.is_some() && shared.parts.cluster().is_none() {
        return Err(Fault::new(FaultCode::Failed, "this node has not registered with its controller yet"));
    }
    join_cluster(shared, cluster).await
}

/// Takes the orders of `cluster`, unless those of another are taken already.
pub(super) async fn join_cluster(shared: &Arc<Shared>, cluster: &str) -> Result<(), Fault> {
    let check = |known: Option<String>| match known {
        Some(known) if known == cluster => Ok(true),
        Some(_) => {
            let message =
                "this node belongs to another cluster: remove the file `cluster` of its agent to move it";
            Err(Fault::new(FaultCode::Forbidden, message))
        }
        None => Ok(false),
    };
    if check(shared.parts.cluster())? {
        return Ok(());
    }
    let wanted = cluster.to_owned();
    let joined = with_journal(shared, move |shared, journal| {
        // Two may ask at once: the first is obeyed from then on.
        if shared.parts.cluster().is_none() {
            journal.set_cluster(&wanted)?;
            shared.parts.inner().cluster = Some(wanted);
            leave_others(shared, journal);
        }
        Ok(shared.parts.cluster())
    });
    check(joined.await.map_err(failed)?).map(drop)
}

/// Ends the parts of clusters that the node has left.
fn leave_others(shared: &Arc<Shared>, journal: &Journal) {
    let others: Vec<Record> = {
        let inner = shared.parts.inner();
        let records = inner.parts.values().map(|part| &part.record);
        records.filter(|record| record.cluster != inner.cluster && !record.ending).cloned().collect()
    };
    for record in others {
        warn!("task {} is of a cluster that this node has left: it is ended", record.task);
        end::order(shared, journal, record);
    }
}

/// Writes down that an instance has come to `step`. Nothing when its part has gone meanwhile.
///
/// A part's file is written whole: whoever comes to write writes the steps of all who wait behind, so that a part of many
/// instances that come up together is not written as often as it has instances.
pub(super) async fn set_step(
    shared: &Arc<Shared>,
    task: i64,
    name: &HostName,
    step: Step,
) -> Result<(), JournalError> {
    if let Some(part) = shared.parts.inner().parts.get_mut(&task) {
        part.unwritten.push((name.clone(), step));
    }
    with_journal(shared, move |shared, journal| write_steps(shared, journal, task)).await
}

fn write_steps(shared: &Shared, journal: &Journal, task: i64) -> Result<(), JournalError> {
    let (steps, mut record) = match shared.parts.inner().parts.get_mut(&task) {
        Some(part) if !part.unwritten.is_empty() => {
            (std::mem::take(&mut part.unwritten), part.record.clone())
        }
        // It has gone, or another one wrote this step too.
        _ => return Ok(()),
    };
    record.steps.extend(steps.iter().cloned());
    let result = journal.save(&record);
    // What is so is told, even when the disk is full.
    if let Some(part) = shared.parts.inner().parts.get_mut(&task) {
        part.record.steps.extend(steps);
    }
    result
}

fn failed(error: JournalError) -> Fault {
    Fault::new(FaultCode::Failed, error.to_string())
}

fn state(task: i64, name: &HostName, step: &Step, live: Option<&Live>) -> InstanceState {
    let (status, reason) = match step {
        Step::Preparing => (InstanceStatus::Preparing, None),
        Step::Launched => (InstanceStatus::Booting, None),
        Step::Up => (InstanceStatus::Running, None),
        Step::Stopped => (InstanceStatus::Stopped, None),
        Step::Failed(reason) => (InstanceStatus::Failed, Some(reason.clone())),
    };
    let info = live.and_then(|live| live.info.clone());
    InstanceState {
        name: name.clone(),
        task,
        status,
        reason: reason.or_else(|| live.and_then(|live| live.note.clone())),
        up_ms: live.and_then(|live| live.up_ms),
        cpu: info.as_ref().map_or(0.0, |info| info.cpu),
        memory_bytes: info.as_ref().map_or(0, |info| info.memory_bytes),
        network_bytes: info.map_or([0; 2], |info| info.network_bytes),
    }
}

/// Accepts a part: it is written down when this returns, and carried out from then on. The same part a second time, or
/// one that is being ended, changes nothing, and gives false.
pub(super) async fn accept(
    shared: &Arc<Shared>,
    cluster: String,
    task: i64,
    part: Part,
) -> Result<bool, Fault> {
    if part.instances.len() > INSTANCES_MAX {
        let message = format!("a part has at most {INSTANCES_MAX} instances");
        return Err(Fault::new(FaultCode::Invalid, message));
    }
    let kinds = part.instances.iter().map(|instance| instance.kind);
    if let Some(kind) = kinds.into_iter().find(|kind| hypervisor(shared, *kind).is_none()) {
        return Err(Fault::new(FaultCode::Invalid, runs_none(kind)));
    }
    if part.instances.iter().any(|order| part.whole(order).is_none()) {
        let message = "an instance refers to something in common that the part does not have";
        return Err(Fault::new(FaultCode::Invalid, message));
    }
    with_journal(shared, move |shared, journal| {
        let known = known(&shared.parts.inner(), &cluster, task, &part);
        if let Some(known) = known {
            return Ok(known);
        }
        let record = Record::new(Some(cluster), task, part);
        journal.save(&record)?;
        info!("task {task}: {} instances to run", record.part.instances.len());
        begin(shared, &mut shared.parts.inner(), record);
        Ok(Ok(true))
    })
    .await
    .map_err(failed)?
}

/// What to answer to a part of a task that is known here.
fn known(inner: &Inner, cluster: &str, task: i64, wanted: &Part) -> Option<Result<bool, Fault>> {
    const OLDER: &str =
        "if the controller's database was restored from a backup, end the new task and deploy again";
    let invalid = |message: String| Some(Err(Fault::new(FaultCode::Invalid, message)));
    match inner.parts.get(&task) {
        Some(part) if part.record.cluster.as_deref() == Some(cluster) => {
            if of_same(&part.record.part, wanted) {
                Some(Ok(false))
            } else {
                invalid(format!("there is another task {task} on this node: {OLDER}"))
            }
        }
        Some(_) => {
            let message = format!("task {task} of the cluster that this node was in is still being ended");
            Some(Err(Fault::new(FaultCode::Failed, message)))
        }
        None if inner.ended.has(Some(cluster), task) => {
            invalid(format!("task {task} has ended on this node: {OLDER}"))
        }
        None => None,
    }
}

/// Whether two parts are the same order. Where its images come from, and where guests report, differs from time to time.
fn of_same(one: &Part, other: &Part) -> bool {
    let roots = |part: &Part| -> BTreeMap<_, _> {
        part.images.iter().map(|image| (image.name.clone(), image.root)).collect()
    };
    let same_orders = one.instances == other.instances && one.common == other.common;
    same_orders && one.networks == other.networks && roots(one) == roots(other)
}

/// Goes on with what was ordered before this agent started.
pub(super) async fn resume(shared: &Arc<Shared>) -> Result<(), JournalError> {
    let records = with_journal(shared, |_, journal| journal.records()).await?;
    {
        let mut inner = shared.parts.inner();
        for mut record in records {
            info!("task {}: goes on", record.task);
            let (task, ending) = (record.task, record.ending);
            record.cluster = record.cluster.or_else(|| inner.cluster.clone());
            begin(shared, &mut inner, record);
            if ending {
                end::begin(shared, &inner, task);
            }
        }
    }
    if shared.parts.cluster().is_some() {
        with_journal(shared, |shared, journal| {
            leave_others(shared, journal);
            Ok(())
        })
        .await?;
    }
    sweep::begin(shared);
    Ok(())
}

fn begin(shared: &Arc<Shared>, inner: &mut Inner, record: Record) {
    let task = record.task;
    let cancel = shared.cancel.child_token();
    let kinds = record.part.instances.iter().map(|order| order.kind);
    let tasks: BTreeMap<_, _> = kinds.map(|kind| (kind, TaskTracker::new())).collect();
    if !record.ending {
        let networks = instance::Once::default();
        let orders = record.part.instances.iter().filter_map(|order| record.part.whole(order));
        for order in orders {
            let step = record.steps.get(&order.name).cloned().unwrap_or_default();
            let tasks = &tasks[&order.kind];
            let job = instance::Job {
                shared: Arc::clone(shared),
                task,
                image: record.part.images.iter().find(|image| image.name == order.image).cloned(),
                order,
                networks: record.part.networks.clone(),
                networks_ready: networks.clone(),
                report: record.part.report,
                whole: tasks.clone(),
            };
            let cancel = cancel.clone();
            tasks.spawn(async move {
                tokio::select! {
                    () = cancel.cancelled() => {}
                    () = instance::run(job, step) => {}
                }
            });
        }
    }
    inner.parts.insert(
        task,
        Running {
            record,
            unwritten: Vec::new(),
            live: BTreeMap::new(),
            trouble: None,
            left_networks: false,
            cancel,
            tasks,
        },
    );
}

/// What is said of instances of a kind that this agent was told not to run.
pub(super) fn runs_none(kind: InstanceType) -> String {
    format!("this node's agent runs no {kind}s: start it without --no-{kind}s")
}

/// What runs instances of `kind`.
pub(super) fn hypervisor(shared: &Shared, kind: InstanceType) -> Option<&Arc<dyn Hypervisor>> {
    shared.services.hypervisors.iter().find(|hypervisor| hypervisor.instance_type() == kind)
}

/// Waits for the work on instances to end, once the agent is to end.
pub(super) async fn join(shared: &Shared) {
    let all: Vec<_> =
        shared.parts.inner().parts.values().flat_map(|part| part.tasks.values().cloned()).collect();
    for tasks in all {
        tasks.close();
        tasks.wait().await;
    }
    shared.parts.ends.close();
    shared.parts.ends.wait().await;
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::agent::tests::{Ordered, has, part};
    use crate::hypervisor::memory::MemoryHypervisor;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn steps_that_wait_for_each_other_are_written_at_once() {
        let mut node = Ordered::start(Arc::new(MemoryHypervisor::new(InstanceType::Vm)), None).await;
        let mut three = part(1);
        three.instances.extend([part(2), part(3)].into_iter().flat_map(|part| part.instances));
        let names: Vec<_> = three.instances.iter().map(|order| order.name.clone()).collect();
        node.run(1, three).await;
        node.until("they run", |state| has(state, InstanceStatus::Running)).await;
        let shared = Arc::clone(&node.agent.shared);
        let held = Arc::clone(&shared.parts.journal).lock_owned().await;
        let mut steps: Vec<_> = names
            .iter()
            .map(|name| set_step(&shared, 1, name, Step::Failed("for a test".to_owned())).boxed())
            .collect();
        for step in &mut steps {
            assert!(step.now_or_never().is_none());
        }
        assert!(shared.parts.states(None).iter().all(|state| state.status == InstanceStatus::Running));
        drop(held);
        let first = steps.remove(0);
        tokio::time::timeout(Duration::from_secs(20), first).await.expect("it is written").unwrap();
        let written = std::fs::read_to_string(node.dir.path().join("tasks/1.json")).unwrap();
        assert_eq!(written.matches("for a test").count(), 3, "{written}");
        assert!(shared.parts.states(None).iter().all(|state| state.status == InstanceStatus::Failed));
        for step in steps {
            tokio::time::timeout(Duration::from_secs(20), step).await.expect("it was written").unwrap();
        }
        node.agent.stop().await;
    }
}
