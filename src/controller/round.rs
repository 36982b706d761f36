//! The heartbeat: every node is asked how it is, and the answers of a whole round are written down in one transaction.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use tracing::{info, warn};

use super::database::{self, Heard, Host};
use super::{DatabaseError, Shared, now_ms};
use crate::wire::cluster::{AskNode, EndPart, NodeState};

/// How long a node may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(1500);
/// What the clock is set forward by less than this takes from nobody what matters.
const LEAP_MIN_MS: u64 = 500;
/// Nodes that are asked at once.
const AT_ONCE: usize = 256;

/// When each node told last, by itself, that instances have changed: an answer that came before says less.
#[derive(Debug, Default)]
pub(super) struct Told {
    at: Mutex<HashMap<i64, Instant>>,
}

impl Told {
    /// The node has told something just now.
    pub(super) fn note(&self, host_id: i64) {
        self.at.lock().unwrap_or_else(PoisonError::into_inner).insert(host_id, Instant::now());
    }

    /// Leaves out of answers what their nodes have told anew since.
    pub(super) fn leave_out(&self, heard: &mut [Heard]) {
        let at = self.at.lock().unwrap_or_else(PoisonError::into_inner);
        for node in heard {
            if let Some(state) = &mut node.state
                && at.get(&node.host_id).is_some_and(|told| *told > node.at)
            {
                state.instances.clear();
            }
        }
    }
}

/// What is wrong for longer is warned of once, when it begins.
#[derive(Debug, Default)]
pub(super) struct Notices {
    told: Mutex<BTreeSet<String>>,
}

impl Notices {
    /// What is wrong now; gives what was not before.
    fn renew(&self, now: BTreeSet<String>) -> Vec<String> {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let new = now.difference(&told).cloned().collect();
        *told = now;
        new
    }
}

/// Asks all nodes again and again until the controller ends.
pub(super) async fn run(shared: Arc<Shared>) {
    let mut ticks = tokio::time::interval(shared.options.poll);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut clock = Clock { at: Instant::now(), ms: now_ms() };
    loop {
        tokio::select! {
            () = shared.cancel.cancelled() => return,
            _ = ticks.tick() => {}
        }
        match round(&shared, &mut clock).await {
            Ok(()) => drop(shared.asked.send_replace(true)),
            Err(error) => warn!("a heartbeat round was lost: {error}"),
        }
    }
}

/// The host's clock as a round saw it, beside one that is never set.
#[derive(Debug, Clone, Copy)]
struct Clock {
    at: Instant,
    ms: u64,
}

impl Clock {
    /// By how much the clock was set forward since, in milliseconds, if it was.
    fn leap(self, now: Self) -> Option<u64> {
        let passed = now.at.saturating_duration_since(self.at).as_millis();
        let leap = now.ms.saturating_sub(self.ms.saturating_add(u64::try_from(passed).unwrap_or(u64::MAX)));
        (leap >= LEAP_MIN_MS).then_some(leap)
    }
}

/// One round.
async fn round(shared: &Arc<Shared>, clock: &mut Clock) -> Result<(), DatabaseError> {
    let read = |tx: &database::Tx<'_>| Ok((database::all_hosts(tx)?, database::accepted_parts(tx)?));
    let (hosts, accepted) = shared.database.run::<_, DatabaseError, _>(read).await?;
    shared.nodes.keep(&hosts.iter().map(|host| (host.address, host.name.clone())).collect());
    let mut heard: Vec<Heard> = futures_util::stream::iter(hosts.clone())
        .map(|host| {
            let parts = accepted.iter().filter(|(host_id, _)| *host_id == host.id);
            let parts = parts.map(|(_, task)| *task).collect();
            ask(shared, host, parts)
        })
        .buffer_unordered(AT_ONCE)
        .collect()
        .await;
    let silence = shared.options.silence;
    let others: Vec<String> = heard.iter().filter_map(|node| node.other.clone()).collect();
    let owner = Arc::clone(shared);
    let now = Clock { at: Instant::now(), ms: now_ms() };
    let leap = clock.leap(now);
    let write = move |tx: &database::Tx<'_>| {
        owner.told.leave_out(&mut heard);
        // Nobody can have answered while there was no controller.
        let judged = (owner.started.elapsed() >= silence).then_some(silence);
        if let Some(leap) = leap {
            database::set_clocks_forward(tx, leap)?;
        }
        database::write_round(tx, &heard, now.ms, judged)
    };
    let outcome = shared.database.run(write).await?;
    *clock = now;
    if let Some(leap) = leap {
        info!("the clock was set forward by {leap} ms: nobody has less time for that");
    }
    for node in &outcome.lost {
        warn!("node '{node}' is offline: it has not answered for {:?}", shared.options.silence);
    }
    for node in &outcome.back {
        info!("node '{node}' is back");
    }
    let strangers = outcome.strangers.iter().map(|(node, image)| {
        format!("node '{node}' has another image called '{image}' than the cluster: it is not used")
    });
    for notice in shared.notices.renew(strangers.chain(others).collect()) {
        warn!("{notice}");
    }
    shared.orders.notify_one();
    let orphans = outcome.orphans.into_iter();
    let orphans = orphans.filter_map(|(id, task)| Some((hosts.iter().find(|host| host.id == id)?, task)));
    futures_util::stream::iter(orphans)
        .for_each_concurrent(AT_ONCE, |(host, task)| end_orphan(shared, host, task))
        .await;
    Ok(())
}

/// Has a node end its part of a task that there is no longer.
async fn end_orphan(shared: &Shared, host: &Host, task: i64) {
    info!("node '{}' still has a part of task {task}, which has ended: it is told to end it", host.name);
    let order = EndPart { cluster: shared.cluster.clone(), task };
    if let Err(error) = shared.nodes.call(host.place(), &order, ANSWER_TIMEOUT).await {
        warn!("node '{}' did not end its part of task {task}: {error}", host.name);
    }
}

async fn ask(shared: &Shared, host: Host, accepted: Vec<i64>) -> Heard {
    // Of before it was asked: what the node tells by itself meanwhile is newer than its answer may be.
    let at = Instant::now();
    let answer = shared.nodes.call(host.place(), &AskNode {}, ANSWER_TIMEOUT).await;
    let silent = Heard { host_id: host.id, at, accepted: Vec::new(), other: None, peer: None, state: None };
    match answer {
        Ok(state) if state.node != host.name => {
            let other = format!("at {} there is node '{}', not '{}'", host.address, state.node, host.name);
            Heard { other: Some(other), ..silent }
        }
        Ok(state) if state.cluster.as_ref().is_some_and(|cluster| *cluster != shared.cluster) => {
            let other = format!(
                "node '{0}' belongs to another cluster now: `bootcache nodes forget {0}` if it is to stay there",
                host.name
            );
            Heard { other: Some(other), ..silent }
        }
        Ok(state) => {
            let peer = peer_address(&state, host.address);
            Heard { accepted, peer, state: Some(state), ..silent }
        }
        Err(error) => {
            if host.online {
                info!("node '{}' does not answer: {error}", host.name);
            }
            silent
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_set_forward_is_seen_and_one_that_runs_is_not() {
        let began = Clock { at: Instant::now(), ms: 1_000_000 };
        let later = |seconds: u64, ms: u64| Clock { at: began.at + Duration::from_secs(seconds), ms };
        assert_eq!(began.leap(later(2, 1_002_000)), None);
        assert_eq!(began.leap(later(2, 1_002_100)), None);
        assert_eq!(began.leap(later(2, 4_602_000)), Some(3_600_000));
        assert_eq!(began.leap(later(2, 400_000)), None, "what has still to come is set back by itself");
    }

    #[test]
    fn what_stays_wrong_is_told_once_and_again_when_it_comes_back() {
        let notices = Notices::default();
        let renew = |texts: &[&str]| notices.renew(texts.iter().map(|text| (*text).to_owned()).collect());
        assert_eq!(renew(&["a"]), ["a"]);
        assert_eq!(renew(&["a", "b"]), ["b"]);
        assert!(renew(&["a", "b"]).is_empty());
        assert!(renew(&["b"]).is_empty());
        assert_eq!(renew(&["a", "b"]), ["a"]);
    }
}
