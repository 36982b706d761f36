//! The heartbeat: every node is asked how it is, and the answers of a whole round are written down in one transaction.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use tracing::{info, warn};

use super::database::{self, Heard, Host};
use super::{DatabaseError, Shared, now_ms};
use crate::wire::cluster::{AskNode, EndPart, NodeState};

/// How long a node may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(1500);
/// Nodes that are asked at once.
const AT_ONCE: usize = 256;

/// Asks all nodes again and again until the controller ends.
pub(super) async fn run(shared: Arc<Shared>) {
    let mut ticks = tokio::time::interval(shared.options.poll);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = shared.cancel.cancelled() => return,
            _ = ticks.tick() => {}
        }
        if let Err(error) = round(&shared).await {
            warn!("a heartbeat round was lost: {error}");
        }
    }
}

/// One round.
async fn round(shared: &Arc<Shared>) -> Result<(), DatabaseError> {
    let hosts = shared.database.run(database::all_hosts).await?;
    shared.nodes.keep(&hosts.iter().map(|host| host.address).collect::<Vec<_>>());
    let heard: Vec<Heard> = futures_util::stream::iter(hosts.clone())
        .map(|host| ask(shared, host))
        .buffer_unordered(AT_ONCE)
        .collect()
        .await;
    let silence = u64::try_from(shared.options.silence.as_millis()).unwrap_or(u64::MAX);
    let outcome = shared.database.run(move |tx| database::write_round(tx, &heard, now_ms(), silence)).await?;
    for node in &outcome.lost {
        warn!("node '{node}' is offline: it has not answered for {:?}", shared.options.silence);
    }
    for node in &outcome.back {
        info!("node '{node}' is back");
    }
    for (node, image) in &outcome.strangers {
        warn!("node '{node}' has another image called '{image}' than the cluster: it is not used");
    }
    for (host_id, task) in outcome.orphans {
        let Some(host) = hosts.iter().find(|host| host.id == host_id) else { continue };
        info!("node '{}' still has a part of task {task}, which has ended: it is told to end it", host.name);
        let order = EndPart { cluster: shared.cluster.clone(), task };
        if let Err(error) = shared.nodes.call(host.address, &order, ANSWER_TIMEOUT).await {
            warn!("node '{}' did not end its part of task {task}: {error}", host.name);
        }
    }
    shared.orders.notify_one();
    Ok(())
}

async fn ask(shared: &Shared, host: Host) -> Heard {
    match shared.nodes.call(host.address, &AskNode {}, ANSWER_TIMEOUT).await {
        Ok(state) if state.node == host.name => {
            Heard { host_id: host.id, peer: peer_address(&state, host.address), state: Some(state) }
        }
        Ok(state) => {
            warn!("at {} there is node '{}', not '{}'", host.address, state.node, host.name);
            Heard { host_id: host.id, peer: None, state: None }
        }
        Err(error) => {
            if host.online {
                info!("node '{}' does not answer: {error}", host.name);
            }
            Heard { host_id: host.id, peer: None, state: None }
        }
    }
}

/// Where a node's data plane serves peers: on the agent's address, where it does not say another.
fn peer_address(state: &NodeState, agent: SocketAddr) -> Option<SocketAddr> {
    resolved(state.peer?, agent)
}

/// `peer`, with the agent's address in the place of the unspecified one.
pub(super) fn resolved(mut peer: SocketAddr, agent: SocketAddr) -> Option<SocketAddr> {
    if peer.ip().is_unspecified() {
        peer.set_ip(agent.ip());
    }
    (peer.port() != 0).then_some(peer)
}
