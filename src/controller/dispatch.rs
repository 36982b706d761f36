//! Gives nodes the orders that they have still to be given: what is in the database and was not acknowledged.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use tracing::{info, warn};

use super::database::{self, Host, Order, OrderKind};
use super::{DatabaseError, Shared, now_ms, sources};
use crate::wire::cluster::{EndPart, Fetch, RunPart};
use crate::wire::link::CallError;

/// How long a node may take to accept an order; it carries it out afterwards.
const ORDER_TIMEOUT: Duration = Duration::from_secs(5);
/// How soon a node that is ending its part is asked again.
const END_PAUSE: Duration = Duration::from_millis(300);
/// Nodes that are given orders at once.
const AT_ONCE: usize = 64;

/// Gives orders whenever there may be some, until the controller ends.
pub(super) async fn run(shared: Arc<Shared>) {
    loop {
        tokio::select! {
            () = shared.cancel.cancelled() => return,
            () = shared.orders.notified() => {}
        }
        if let Err(error) = dispatch(&shared).await {
            warn!("orders could not be given: {error}");
        }
    }
}

async fn dispatch(shared: &Arc<Shared>) -> Result<(), DatabaseError> {
    let (orders, hosts, standing) = shared
        .database
        .run::<_, DatabaseError, _>(|tx| {
            let standing = database::setting(tx, STANDING, || "off".to_owned())? == "on";
            let missing = if standing { database::without_boot_cache(tx)? } else { Vec::new() };
            Ok((database::orders(tx)?, database::all_hosts(tx)?, missing))
        })
        .await?;
    let host = |id| hosts.iter().find(|host| host.id == id);
    let orders = orders.into_iter().filter_map(|order| Some((host(order.host_id)?.clone(), order)));
    futures_util::stream::iter(orders)
        .for_each_concurrent(AT_ONCE, |(host, order)| async move {
            if let Err(error) = give(shared, &host, order).await {
                warn!("an order for node '{}' is lost: {error}", host.name);
            }
        })
        .await;
    for (host_id, image) in standing {
        let Some(host) = host(host_id) else { continue };
        if let Err(error) = fetch(shared, host, &image, true).await {
            warn!("node '{}' does not get the boot cache of '{image}': {error}", host.name);
        }
    }
    Ok(())
}

/// The setting that keeps the boot caches of all images on all nodes.
pub(super) const STANDING: &str = "standing prefetch";

/// Gives one order and writes down what came of it.
async fn give(shared: &Arc<Shared>, host: &Host, order: Order) -> Result<(), DatabaseError> {
    let (task, host_id, cluster) = (order.task, order.host_id, shared.cluster.clone());
    match order.kind {
        OrderKind::Run(mut part) => {
            for image in &mut part.images {
                image.sources = sources::of(shared, &image.name, host_id).await?;
            }
            let order = RunPart { cluster, task, part: *part };
            match shared.nodes.call(host.address, &order, ORDER_TIMEOUT).await {
                Ok(answer) => {
                    shared.database.run(move |tx| database::accepted(tx, task, host_id, answer.new)).await
                }
                Err(CallError::Refused(fault)) => {
                    warn!("node '{}' refuses its part of task {task}: {fault}", host.name);
                    shared
                        .database
                        .run(move |tx| database::refused(tx, task, host_id, &fault.message, now_ms()))
                        .await
                }
                Err(error) => {
                    info!("node '{}' did not take its part of task {task} yet: {error}", host.name);
                    Ok(())
                }
            }
        }
        OrderKind::End => {
            match shared.nodes.call(host.address, &EndPart { cluster, task }, ORDER_TIMEOUT).await {
                Ok(ended) if ended.gone => {
                    shared.database.run(move |tx| database::gone(tx, task, host_id)).await
                }
                Ok(_) => {
                    again_soon(shared);
                    Ok(())
                }
                Err(error) => {
                    info!("node '{}' did not end its part of task {task} yet: {error}", host.name);
                    Ok(())
                }
            }
        }
    }
}

/// Looks again in a moment: a part is being ended.
fn again_soon(shared: &Arc<Shared>) {
    let owner = Arc::clone(shared);
    shared.tasks.spawn(async move {
        tokio::select! {
            () = owner.cancel.cancelled() => {}
            () = tokio::time::sleep(END_PAUSE) => owner.orders.notify_one(),
        }
    });
}

/// Has a node fetch an image.
pub(super) async fn fetch(
    shared: &Arc<Shared>,
    host: &Host,
    image: &crate::name::ImageName,
    boot_only: bool,
) -> Result<(), CallError> {
    let failed = |error: DatabaseError| {
        let fault =
            crate::wire::cluster::Fault::new(crate::wire::cluster::FaultCode::Failed, error.to_string());
        CallError::Refused(fault)
    };
    let Some(image) = sources::needed(shared, image, host.id).await.map_err(failed)? else { return Ok(()) };
    let order = Fetch { cluster: shared.cluster.clone(), image, boot_only };
    shared.nodes.call(host.address, &order, ORDER_TIMEOUT).await.map(drop)
}
