//! Gives nodes the orders that they have still to be given: what is in the database and was not acknowledged. A node gets
//! one after the other, beside all other nodes: one that takes none keeps back no others.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing::{debug, info, warn};

use super::database::{self, Host, Order, OrderKind};
use super::{DatabaseError, Shared, now_ms, sources};
use crate::name::ImageName;
use crate::wire::cluster::{EndPart, Fault, FaultCode, Fetch, RunPart};
use crate::wire::link::CallError;

/// How long a node may take to accept an order; it carries it out afterwards.
const ORDER_TIMEOUT: Duration = Duration::from_secs(5);
/// How soon a node that is ending its part is asked again.
const END_PAUSE: Duration = Duration::from_millis(300);
/// How soon a node that lacks a boot cache is asked again to fetch it: it may be fetching.
const STANDING_PAUSE: Duration = Duration::from_secs(10);

/// Gives orders whenever there may be some, until the controller ends.
pub(super) async fn run(shared: Arc<Shared>) {
    let (errands, mut asked, mut ends) = (Arc::new(Errands::default()), Asked::new(), Ends::new());
    loop {
        tokio::select! {
            () = shared.cancel.cancelled() => return,
            () = shared.orders.notified() => {}
        }
        if let Err(error) = dispatch(&shared, &errands, &mut asked, &mut ends).await {
            warn!("orders could not be given: {error}");
        }
    }
}

/// What is being done with a node, by its number.
type Errand = (i64, What);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum What {
    Orders,
    Fetches,
}

/// The errands under way; whether there was to be another one meanwhile.
#[derive(Debug, Default)]
struct Errands {
    under_way: Mutex<HashMap<Errand, bool>>,
    /// Somebody will have orders looked for again in a moment.
    timer: AtomicBool,
}

impl Errands {
    fn under_way(&self) -> MutexGuard<'_, HashMap<Errand, bool>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_under_way(&self, errand: Errand) -> bool {
        self.under_way().contains_key(&errand)
    }

    /// Notes that it begins; false if it is under way, and to be looked at again.
    fn begin(&self, errand: Errand) -> bool {
        let mut under_way = self.under_way();
        let again = under_way.contains_key(&errand);
        under_way.insert(errand, again);
        !again
    }

    /// Notes that it has ended; whether there was to be another one.
    fn end(&self, errand: Errand) -> bool {
        self.under_way().remove(&errand).unwrap_or(false)
    }

    /// Has `work` done as `errand`, unless that is under way; then it is looked again once that has ended.
    fn spawn(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        errand: Errand,
        work: impl Future<Output = ()> + Send + 'static,
    ) {
        if !self.begin(errand) {
            return;
        }
        let under_way = UnderWay { shared: Arc::clone(shared), errands: Arc::clone(self), errand };
        shared.tasks.spawn(async move {
            let _under_way = under_way;
            work.await;
        });
    }

    /// Has orders looked for again in a moment: a part is being ended.
    fn again_soon(self: &Arc<Self>, shared: &Arc<Shared>) {
        if self.timer.swap(true, Ordering::AcqRel) {
            return;
        }
        let (owner, errands) = (Arc::clone(shared), Arc::clone(self));
        shared.tasks.spawn(async move {
            tokio::select! {
                () = owner.cancel.cancelled() => {}
                () = tokio::time::sleep(END_PAUSE) => {
                    errands.timer.store(false, Ordering::Release);
                    owner.orders.notify_one();
                }
            }
        });
    }
}

/// An errand, which ends with this however it does.
struct UnderWay {
    shared: Arc<Shared>,
    errands: Arc<Errands>,
    errand: Errand,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        if self.errands.end(self.errand) {
            self.shared.orders.notify_one();
        }
    }
}

/// Nodes that were asked to fetch boot caches, and when.
type Asked = HashMap<(i64, ImageName), Instant>;

/// Parts that were to be ended, by task and node, and when that was last asked for.
type Ends = HashMap<(i64, i64), Instant>;

/// Leaves out those ends of which was asked a moment ago. Whether there were some.
fn leave_out_recent(ends: &mut Ends, orders: &mut Vec<Order>, now: Instant) -> bool {
    ends.retain(|_, at| now.duration_since(*at) < END_PAUSE);
    let before = orders.len();
    orders.retain(|order| {
        !matches!(order.kind, OrderKind::End) || !ends.contains_key(&(order.task, order.host_id))
    });
    for order in orders.iter().filter(|order| matches!(order.kind, OrderKind::End)) {
        ends.insert((order.task, order.host_id), now);
    }
    orders.len() < before
}

/// Those of `missing` that are to be asked for now; they count as asked then.
fn due(asked: &mut Asked, missing: Vec<(i64, ImageName)>, now: Instant) -> Vec<(i64, ImageName)> {
    asked.retain(|_, at| now.duration_since(*at) < STANDING_PAUSE);
    let due: Vec<_> = missing.into_iter().filter(|pair| !asked.contains_key(pair)).collect();
    asked.extend(due.iter().cloned().map(|pair| (pair, now)));
    due
}

/// Begins with what there is to be ordered.
async fn dispatch(
    shared: &Arc<Shared>,
    errands: &Arc<Errands>,
    asked: &mut Asked,
    ends: &mut Ends,
) -> Result<(), DatabaseError> {
    let (mut orders, hosts, standing) = shared
        .database
        .run::<_, DatabaseError, _>(|tx| {
            let standing = database::setting(tx, STANDING, || "off".to_owned())? == "on";
            let missing = if standing { database::without_boot_cache(tx)? } else { Vec::new() };
            Ok((database::orders(tx)?, database::all_hosts(tx)?, missing))
        })
        .await?;
    if leave_out_recent(ends, &mut orders, Instant::now()) {
        errands.again_soon(shared);
    }
    let mut orders_of: BTreeMap<i64, Vec<Order>> = BTreeMap::new();
    for order in orders {
        orders_of.entry(order.host_id).or_default().push(order);
    }
    let is_free = |host_id: &i64| !errands.is_under_way((*host_id, What::Fetches));
    let missing = standing.into_iter().filter(|(host_id, _)| is_free(host_id)).collect();
    let mut fetches_of: BTreeMap<i64, Vec<ImageName>> = BTreeMap::new();
    for (host_id, image) in due(asked, missing, Instant::now()) {
        fetches_of.entry(host_id).or_default().push(image);
    }
    for host in hosts {
        if let Some(orders) = orders_of.remove(&host.id) {
            let work = give_all(Arc::clone(shared), Arc::clone(errands), host.clone(), orders);
            errands.spawn(shared, (host.id, What::Orders), work);
        }
        if let Some(images) = fetches_of.remove(&host.id) {
            errands.spawn(shared, (host.id, What::Fetches), fetch_all(Arc::clone(shared), host, images));
        }
    }
    Ok(())
}

/// Gives a node its orders, one after the other.
async fn give_all(shared: Arc<Shared>, errands: Arc<Errands>, host: Host, orders: Vec<Order>) {
    for order in orders {
        if shared.cancel.is_cancelled() {
            return;
        }
        if let Err(error) = give(&shared, &errands, &host, order).await {
            warn!("an order for node '{}' is lost: {error}", host.name);
        }
    }
}

/// Has a node fetch boot caches, one after the other.
async fn fetch_all(shared: Arc<Shared>, host: Host, images: Vec<ImageName>) {
    for image in images {
        if shared.cancel.is_cancelled() {
            return;
        }
        if let Err(error) = fetch(&shared, &host, &image, true).await {
            warn!("node '{}' does not get the boot cache of '{image}': {error}", host.name);
        }
    }
}

/// The setting that keeps the boot caches of all images on all nodes.
pub(super) const STANDING: &str = "standing prefetch";

/// Gives one order and writes down what came of it.
async fn give(
    shared: &Arc<Shared>,
    errands: &Arc<Errands>,
    host: &Host,
    order: Order,
) -> Result<(), DatabaseError> {
    let (task, host_id, cluster) = (order.task, order.host_id, shared.cluster.clone());
    match order.kind {
        OrderKind::Run(mut part) => {
            for image in &mut part.images {
                match sources::of(shared, &image.name, host_id).await? {
                    Ok(sources) => image.sources = sources,
                    // The node would fail for good; the next round sees whether somebody has it.
                    Err(reason) => {
                        debug!("node '{}' waits with its part of task {task}: {reason}", host.name);
                        return shared
                            .database
                            .run(move |tx| database::waits(tx, task, host_id, &reason))
                            .await;
                    }
                }
            }
            let order = RunPart { cluster, task, part: *part };
            match shared.nodes.call(host.place(), &order, ORDER_TIMEOUT).await {
                Ok(answer) => {
                    shared.database.run(move |tx| database::accepted(tx, task, host_id, answer.new)).await
                }
                // As it says, the same order may be taken later.
                Err(CallError::Refused(fault)) if fault.code == FaultCode::Failed => {
                    info!("node '{}' cannot take its part of task {task} yet: {fault}", host.name);
                    shared.database.run(move |tx| database::waits(tx, task, host_id, &fault.message)).await
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
            match shared.nodes.call(host.place(), &EndPart { cluster, task }, ORDER_TIMEOUT).await {
                Ok(ended) if ended.gone => {
                    shared.database.run(move |tx| database::gone(tx, task, host_id)).await
                }
                Ok(_) => {
                    errands.again_soon(shared);
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

/// Has a node fetch an image.
pub(super) async fn fetch(
    shared: &Arc<Shared>,
    host: &Host,
    image: &ImageName,
    boot_only: bool,
) -> Result<(), CallError> {
    let failed = |error: String| CallError::Refused(Fault::new(FaultCode::Failed, error));
    let needed = sources::needed(shared, image, host.id).await.map_err(|error| failed(error.to_string()))?;
    let Some(image) = needed else { return Ok(()) };
    let image = image.map_err(failed)?;
    let order = Fetch { cluster: shared.cluster.clone(), image, boot_only };
    shared.nodes.call(host.place(), &order, ORDER_TIMEOUT).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_part_is_asked_for_again_after_a_pause_and_not_with_every_look() {
        let end = |task, host_id| Order { task, host_id, kind: OrderKind::End };
        let (mut ends, now) = (Ends::new(), Instant::now());
        let at = |millis| now + Duration::from_millis(millis);
        let mut first = vec![end(1, 1), end(1, 2)];
        assert!(!leave_out_recent(&mut ends, &mut first, at(0)) && first.len() == 2);
        let mut soon = vec![end(1, 1), end(1, 2), end(2, 1)];
        assert!(leave_out_recent(&mut ends, &mut soon, at(100)));
        assert_eq!(soon.iter().map(|order| order.task).collect::<Vec<_>>(), [2]);
        let mut later = vec![end(1, 1)];
        assert!(!leave_out_recent(&mut ends, &mut later, at(301)) && later.len() == 1);
    }

    #[test]
    fn a_node_has_one_errand_of_a_kind_at_a_time_and_what_comes_meanwhile_is_looked_at_after_it() {
        let errands = Errands::default();
        let (orders, fetches, other) = ((1, What::Orders), (1, What::Fetches), (2, What::Orders));
        assert!(errands.begin(orders) && errands.begin(fetches) && errands.begin(other));
        assert!(!errands.begin(orders) && !errands.begin(orders));
        assert!(errands.end(orders), "what came meanwhile is forgotten");
        assert!(!errands.end(fetches) && !errands.end(other));
        assert!(errands.begin(orders) && !errands.end(orders));
        assert!(!errands.is_under_way(orders));
    }

    #[test]
    fn a_node_is_asked_again_for_what_it_still_lacks_after_a_while() {
        let mut asked = Asked::new();
        let pair = |host_id, image: &str| (host_id, image.parse::<ImageName>().unwrap());
        let (one, two) = (pair(1, "debian"), pair(2, "debian"));
        let began = Instant::now();
        assert_eq!(due(&mut asked, vec![one.clone()], began), std::slice::from_ref(&one));
        let both = vec![one.clone(), two.clone()];
        assert_eq!(due(&mut asked, both.clone(), began + STANDING_PAUSE / 2), [two]);
        assert_eq!(due(&mut asked, both, began + STANDING_PAUSE), [one]);
        assert!(due(&mut asked, Vec::new(), began + 3 * STANDING_PAUSE).is_empty());
        assert!(asked.is_empty());
    }
}
