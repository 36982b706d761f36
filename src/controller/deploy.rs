//! What users ask of a controller: deployments started and ended, images brought ahead, and what there is.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;

use super::database::{self, NewTask, Page};
use super::sources;
use super::{DatabaseError, Shared, dispatch, now_ms};
use crate::hypervisor::InstanceType;
use crate::image::manifest::ImageKind;
use crate::name::{HostName, ImageName};
use crate::plan::check::{Mistake, Step, check, check_templates};
use crate::plan::expand::{Context, expand};
use crate::plan::place::{NodeFacts, counted_mib, place};
use crate::plan::{Group, Plan, UntilUp};
use crate::wire::cluster::{Found, INSTANCES_MAX, Needed, NodeRow, Part, Prefetch, Query, RunPart};
use crate::wire::frame::CONTROL_PAYLOAD_MAX;
use crate::wire::link::CallError;

/// Longest name that a user's program gives a request.
const REQUEST_BYTES_MAX: usize = 64;
/// Mistakes that are told at once.
const MISTAKES_SHOWN: usize = 8;
/// Bytes of rows in one answer: half a frame, since the first row may be long.
const LIST_BYTES_MAX: usize = CONTROL_PAYLOAD_MAX / 2;
/// What is left free in the frame of an order for what is added when it is given: where each image comes from.
const ORDER_BYTES_FREE: usize = 128 << 10;

/// Nodes that are asked at once to fetch an image.
const FETCHES_MAX: usize = 64;

/// How long a deployment waits until all nodes were asked once: longer than a round takes.
const FIRST_ROUND_PATIENCE: Duration = Duration::from_secs(5);

/// Why something that a user asked for was not done.
#[derive(Debug, thiserror::Error)]
pub enum DeployError {
    /// The plan is wrong, or cannot be carried out here.
    #[error("{}", listed(.0))]
    Plan(Vec<Mistake>),
    /// The request has no proper name of its own.
    #[error("a request is named by 1 to {REQUEST_BYTES_MAX} printable ASCII characters, none a space")]
    Request,
    /// There is no such deployment.
    #[error("there is no task {0}: it may have ended; `bootcache tasks` shows those there are")]
    NoTask(i64),
    /// There is no such image.
    #[error("there is no image '{0}': `bootcache images` shows those there are")]
    NoImage(ImageName),
    /// There is no such node.
    #[error("there is no node '{0}': `bootcache nodes` shows those there are")]
    NoNode(HostName),
    /// The node is online: it would be back at once.
    #[error("node '{0}' is online: end its agent first")]
    NodeOnline(HostName),
    /// Nodes that did not do it, and what each says; the others did.
    #[error("{}", .0.iter().map(|(node, error)| format!("node '{node}': {error}")).collect::<Vec<_>>().join("\n"))]
    Nodes(Vec<(HostName, CallError)>),
    /// The database.
    #[error(transparent)]
    Database(#[from] DatabaseError),
}

fn listed(mistakes: &[Mistake]) -> String {
    let mut lines: Vec<_> = mistakes.iter().take(MISTAKES_SHOWN).map(ToString::to_string).collect();
    if mistakes.len() > MISTAKES_SHOWN {
        lines.push(format!("and {} more", mistakes.len() - MISTAKES_SHOWN));
    }
    lines.join("\n")
}

/// Starts a deployment.
pub(super) async fn deploy(shared: &Arc<Shared>, request: &str, plan: Plan) -> Result<i64, DeployError> {
    if request.is_empty()
        || request.len() > REQUEST_BYTES_MAX
        || !request.bytes().all(|b| b.is_ascii_graphic())
    {
        return Err(DeployError::Request);
    }
    let mistakes = check(&plan);
    if !mistakes.is_empty() {
        return Err(DeployError::Plan(mistakes));
    }
    if !shared.options.allow_privileged {
        let mistakes: Vec<_> = plan.groups.iter().enumerate().filter_map(privilege).collect();
        if !mistakes.is_empty() {
            return Err(DeployError::Plan(mistakes));
        }
    }
    let mut mistakes = check_templates(&plan);
    let waits = |group: &Group| group.until == UntilUp::Report && shared.report.is_none();
    mistakes.extend(plan.groups.iter().enumerate().filter(|(_, group)| waits(group)).map(|(index, _)| {
        mistake(index, "until", "guests cannot report to this controller: start it with --report ADDR:PORT")
    }));
    if !mistakes.is_empty() {
        return Err(DeployError::Plan(mistakes));
    }
    // Nodes may know of tasks that a restored database does not: their numbers are not given again.
    let asked = async { shared.asked.subscribe().wait_for(|asked| *asked).await.map(drop) };
    let _late = tokio::time::timeout(FIRST_ROUND_PATIENCE, asked).await;
    let (request, owner) = (request.to_owned(), Arc::clone(shared));
    let task = shared
        .database
        .run(move |tx| {
            if let Some(task) = database::task_of_request(tx, &request)? {
                return Ok(task);
            }
            let nodes = database::node_rows(tx, now_ms(), None, Page::whole())?;
            let promised = database::promised_mib(tx)?;
            let images = images(tx, &plan)?;
            let facts: Vec<_> = nodes.iter().map(|node| facts(&owner, node, &promised)).collect();
            let new = NewTask { request: &request, plan: &plan, now: now_ms() };
            database::create_task(tx, &new, |task| parts(&owner, &plan, &facts, &nodes, &images, task))
        })
        .await?;
    shared.orders.notify_one();
    Ok(task)
}

/// What a group asks for that gives its instances what their host may do.
fn privilege((index, group): (usize, &Group)) -> Option<Mistake> {
    if group.privileged {
        let message = "the controller does not allow privileged containers (--allow-privileged)";
        return Some(mistake(index, "privileged", message));
    }
    // A domain may have any device, disk and folder of its host.
    let message = "the controller does not allow domains of one's own (--allow-privileged)";
    group.template.as_ref().map(|_| mistake(index, "template", message))
}

fn mistake(group: usize, field: &str, message: impl Into<String>) -> Mistake {
    let path = vec![Step::Key("groups".into()), Step::Index(group), Step::Key(field.into())];
    Mistake { path, message: message.into() }
}

/// The images that the plan names, all of them there and of the right kind.
fn images(tx: &database::Tx<'_>, plan: &Plan) -> Result<HashMap<ImageName, Needed>, DeployError> {
    let mut images = HashMap::new();
    let mut mistakes = Vec::new();
    for (index, group) in plan.groups.iter().enumerate() {
        let wanted = match group.kind {
            InstanceType::Vm => ImageKind::Vm,
            InstanceType::Container => ImageKind::Container,
        };
        match database::find_image(tx, &group.image)? {
            Some(image) if image.kind == wanted => {
                if let Some(disk) = group.disk.filter(|disk| disk.bytes() < image.size) {
                    let message = format!(
                        "a disk of {} MiB is smaller than image '{}': say {} MiB or more, or leave it out",
                        disk.0,
                        group.image,
                        image.size.div_ceil(1 << 20)
                    );
                    mistakes.push(mistake(index, "disk", message));
                }
                images.insert(group.image.clone(), sources::needs(&group.image, &image, Vec::new()));
            }
            Some(image) => {
                let message = format!(
                    "image '{}' is for {}s, the group is of {}s",
                    group.image, image.kind, group.kind
                );
                mistakes.push(mistake(index, "image", message));
            }
            None => {
                mistakes.push(mistake(index, "image", DeployError::NoImage(group.image.clone()).to_string()));
            }
        }
    }
    if mistakes.is_empty() { Ok(images) } else { Err(DeployError::Plan(mistakes)) }
}

/// What placement is to know of a node, where instances of these kinds have been promised so many MiB of memory. What was
/// promised may not be in use yet.
fn facts(shared: &Shared, node: &NodeRow, promised: &[(i64, InstanceType, u64)]) -> NodeFacts {
    let promised = promised.iter().filter(|(host_id, ..)| *host_id == node.host_id);
    let promised: u64 = promised.map(|(_, kind, mib)| counted_mib(*kind, *mib)).sum();
    let memory_mib = node.memory_bytes >> 20;
    NodeFacts {
        name: node.name.clone(),
        online: node.online,
        kinds: node.kinds.clone(),
        cpus: node.cpus,
        memory_mib,
        free_mib: (node.memory_free >> 20).min(memory_mib.saturating_sub(promised)),
        score: shared.score(&node.load),
    }
}

/// What each host is to run, by its number.
fn parts(
    shared: &Shared,
    plan: &Plan,
    facts: &[NodeFacts],
    nodes: &[NodeRow],
    images: &HashMap<ImageName, Needed>,
    task: i64,
) -> Result<BTreeMap<i64, Part>, DeployError> {
    let placed = place(plan, facts).map_err(DeployError::Plan)?;
    let names: Vec<_> = nodes.iter().map(|node| node.name.clone()).collect();
    let context = Context { cluster: &shared.cluster, task, report: shared.report };
    let parts = expand(plan, &placed, &names, images, context).map_err(DeployError::Plan)?;
    let parts = parts.into_iter().map(|(index, part)| {
        let part = orderable(shared, &nodes[index], part, task)?;
        Ok((nodes[index].host_id, part))
    });
    parts.collect()
}

/// The part, which a node can be ordered to run in one frame, and can tell of in one.
fn orderable(shared: &Shared, node: &NodeRow, part: Part, task: i64) -> Result<Part, DeployError> {
    let wrong = |message: String| {
        Err(DeployError::Plan(vec![Mistake { path: vec![Step::Key("groups".into())], message }]))
    };
    let count = part.instances.len();
    if node.instances + count as u64 > INSTANCES_MAX as u64 {
        return wrong(format!(
            "node '{}' would get {count} instances beside {}: a node has {INSTANCES_MAX} at most, take more nodes",
            node.name, node.instances
        ));
    }
    let order = RunPart { cluster: shared.cluster.clone(), task, part };
    let bytes = rmp_serde::to_vec_named(&order).map_or(usize::MAX, |bytes| bytes.len());
    if bytes > CONTROL_PAYLOAD_MAX - ORDER_BYTES_FREE {
        return wrong(format!(
            "the order of the {count} instances on node '{}' has {bytes} bytes, more than can be sent: take more nodes, \
             or shorter templates and environments",
            node.name
        ));
    }
    Ok(order.part)
}

/// Ends a deployment.
pub(super) async fn end(shared: &Shared, task: i64) -> Result<(), DeployError> {
    let there = shared.database.run(move |tx| database::end_task(tx, task)).await?;
    shared.orders.notify_one();
    if there { Ok(()) } else { Err(DeployError::NoTask(task)) }
}

/// What there is.
pub(super) async fn query(shared: &Shared, query: Query) -> Result<Found, DatabaseError> {
    let found = shared
        .database
        .run::<_, DatabaseError, _>(move |tx| {
            let page = Page::of(LIST_BYTES_MAX);
            Ok(match query {
                Query::Nodes { after } => {
                    Found::Nodes(database::node_rows(tx, now_ms(), after.as_ref(), page)?)
                }
                Query::Images { after } => Found::Images(database::image_rows(tx, after.as_ref(), page)?),
                Query::Tasks { task, after } => Found::Tasks(database::task_rows(tx, task, after, page)?),
                Query::Instances { task, after } => {
                    Found::Instances(database::instance_rows(tx, task, after, page)?)
                }
            })
        })
        .await?;
    Ok(match found {
        Found::Nodes(mut nodes) => {
            nodes.iter_mut().for_each(|node| node.score = shared.score(&node.load));
            Found::Nodes(nodes)
        }
        other => other,
    })
}

/// Brings images to nodes ahead of demand.
pub(super) async fn prefetch(shared: &Arc<Shared>, prefetch: Prefetch) -> Result<(), DeployError> {
    match prefetch {
        Prefetch::Standing { on } => {
            let value = if on { "on" } else { "off" };
            shared.database.run(move |tx| database::set(tx, dispatch::STANDING, value)).await?;
            shared.orders.notify_one();
            Ok(())
        }
        Prefetch::Image { image, nodes, boot_only } => {
            let name = image.clone();
            let (found, hosts) = shared
                .database
                .run::<_, DatabaseError, _>(move |tx| {
                    Ok((database::find_image(tx, &name)?, database::all_hosts(tx)?))
                })
                .await?;
            if found.is_none() {
                return Err(DeployError::NoImage(image));
            }
            if let Some(missing) = nodes.iter().find(|node| hosts.iter().all(|host| host.name != **node)) {
                return Err(DeployError::NoNode(missing.clone()));
            }
            let chosen = hosts.into_iter().filter(|host| match nodes.is_empty() {
                true => host.online,
                false => nodes.contains(&host.name),
            });
            let failed: Vec<_> = futures_util::stream::iter(chosen.collect::<Vec<_>>())
                .map(|host| {
                    let (shared, image) = (Arc::clone(shared), image.clone());
                    async move {
                        let fetched = dispatch::fetch(&shared, &host, &image, boot_only).await;
                        fetched.err().map(|error| (host.name, error))
                    }
                })
                .buffer_unordered(FETCHES_MAX)
                .filter_map(std::future::ready)
                .collect()
                .await;
            if failed.is_empty() { Ok(()) } else { Err(DeployError::Nodes(failed)) }
        }
    }
}

/// Forgets a node that is offline.
pub(super) async fn forget(shared: &Shared, node: HostName) -> Result<(), DeployError> {
    let name = node.clone();
    match shared.database.run(move |tx| database::forget(tx, &name, now_ms())).await? {
        database::Forgotten::Gone => Ok(()),
        database::Forgotten::Online => Err(DeployError::NodeOnline(node)),
        database::Forgotten::Unknown => Err(DeployError::NoNode(node)),
    }
}
