//! A heartbeat round: what all nodes have answered, written down in one transaction.

use std::time::{Duration, Instant};

use rusqlite::{Transaction, params};

use super::{Result, hosts, images, instances, number, tasks};
use crate::name::{HostName, ImageName};
use crate::wire::cluster::{NodeState, lines};

/// Where the times stand from which a limit counts.
const CLOCKS: [(&str, &str); 2] = [("host", "last_seen"), ("instance", "began")];

/// What was heard of a node in a round: its answer, or nothing.
#[derive(Debug)]
pub(crate) struct Heard {
    pub(crate) host_id: i64,
    /// When it was asked.
    pub(crate) at: Instant,
    /// The tasks of which it had accepted its part before it was asked: only those can it have forgotten.
    pub(crate) accepted: Vec<i64>,
    /// For people: another node answered in its place.
    pub(crate) other: Option<String>,
    /// Where its data plane serves peers, resolved.
    pub(crate) peer: Option<std::net::SocketAddr>,
    pub(crate) state: Option<NodeState>,
}

/// What a round has brought to light.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct RoundOutcome {
    /// Nodes that have been silent for too long.
    pub(crate) lost: Vec<HostName>,
    /// Nodes that are back.
    pub(crate) back: Vec<HostName>,
    /// Parts that nodes have and should not.
    pub(crate) orphans: Vec<(i64, i64)>,
    /// Names by which a node has another image than the cluster.
    pub(crate) strangers: Vec<(HostName, ImageName)>,
}

/// Writes a round down. A node that was silent longer than `silence` is offline, and its instances are lost; without, none
/// is yet.
pub(crate) fn write(
    tx: &Transaction<'_>,
    heard: &[Heard],
    now: u64,
    silence: Option<Duration>,
) -> Result<RoundOutcome> {
    set_clocks_back(tx, now)?;
    let mut outcome = RoundOutcome::default();
    for node in heard {
        match (&node.state, silence) {
            (Some(state), _) => present(tx, node, state, now, &mut outcome)?,
            (None, Some(silence)) => silent(tx, node.host_id, now, silence, &mut outcome)?,
            (None, None) => {}
        }
    }
    instances::expire(tx, now)?;
    Ok(outcome)
}

/// The host's clock was set forward: from what was written down until then, no more time has passed than before.
pub(crate) fn set_clocks_forward(tx: &Transaction<'_>, leap_ms: u64) -> Result<()> {
    for (table, column) in CLOCKS {
        tx.execute(&format!("UPDATE {table} SET {column} = {column} + ?1"), [number(leap_ms)])?;
    }
    Ok(())
}

/// What was written down at a time that has still to come, since the host's clock was set back, counts from now on.
fn set_clocks_back(tx: &Transaction<'_>, now: u64) -> Result<()> {
    for (table, column) in CLOCKS {
        let sql = format!("UPDATE {table} SET {column} = ?1 WHERE {column} > ?1");
        tx.prepare_cached(&sql)?.execute([number(now)])?;
    }
    Ok(())
}

fn present(
    tx: &Transaction<'_>,
    node: &Heard,
    state: &NodeState,
    now: u64,
    outcome: &mut RoundOutcome,
) -> Result<()> {
    let host_id = node.host_id;
    let was: String = tx
        .prepare_cached("SELECT status FROM host WHERE host_id = ?1")?
        .query_row([host_id], |row| row.get(0))?;
    if was == "offline" {
        outcome.back.push(state.node.clone());
    }
    let mut troubles = state.troubles.clone();
    if let Some(images) = &state.images {
        hosts::set_peer(tx, host_id, node.peer)?;
        for image in images::register(tx, host_id, images)? {
            troubles
                .push(format!("it has another image called '{image}' than the cluster: that is not used"));
            outcome.strangers.push((state.node.clone(), image));
        }
    }
    tx.prepare_cached(
        "UPDATE host SET status = 'online', last_seen = ?2, memory_free = ?3, troubles = ?4 WHERE host_id = ?1",
    )?
    .execute(params![
        host_id,
        number(now),
        number(state.memory_free),
        lines(&troubles),
    ])?;
    for (item, value) in &state.load {
        let value = if value.is_finite() { value.clamp(0.0, 1.0) } else { 1.0 };
        tx.prepare_cached(
            "INSERT INTO host_load VALUES (?1, ?2, ?3)
             ON CONFLICT (host_id, item_id) DO UPDATE SET value = excluded.value",
        )?
        .execute(params![host_id, item, value])?;
    }
    if let Some(last) = state.last_task {
        tasks::pass_over(tx, last)?;
    }
    instances::update(tx, host_id, &state.instances, now)?;
    parts(tx, node, &state.tasks, outcome)
}

/// Compares the parts that a node has with those that it should have.
fn parts(tx: &Transaction<'_>, node: &Heard, has: &[i64], outcome: &mut RoundOutcome) -> Result<()> {
    let host_id = node.host_id;
    let mut statement = tx.prepare_cached("SELECT task_id FROM part WHERE host_id = ?1")?;
    let should =
        statement.query_map([host_id], |row| row.get::<_, i64>(0))?.collect::<rusqlite::Result<Vec<_>>>()?;
    for task in should.iter().filter(|task| !has.contains(task) && node.accepted.contains(task)) {
        // It has forgotten it: the order is given again. Not when all of it has failed, as a part that was refused has.
        let asked_again = tx
            .prepare_cached(
                "UPDATE part SET accepted = 0 WHERE task_id = ?1 AND host_id = ?2 AND accepted = 1 AND EXISTS
                 (SELECT 1 FROM instance WHERE instance.task_id = ?1 AND instance.host_id = ?2
                  AND inst_status <> 'failed')",
            )?
            .execute(params![task, host_id])?;
        if asked_again > 0 {
            instances::forgotten(tx, host_id, *task)?;
        }
    }
    outcome.orphans.extend(has.iter().filter(|task| !should.contains(task)).map(|task| (host_id, *task)));
    Ok(())
}

fn silent(
    tx: &Transaction<'_>,
    host_id: i64,
    now: u64,
    silence: Duration,
    outcome: &mut RoundOutcome,
) -> Result<()> {
    let mut statement = tx.prepare_cached(
        "UPDATE host SET status = 'offline' WHERE host_id = ?1 AND status = 'online' AND last_seen <= ?2 RETURNING name",
    )?;
    let silence = u64::try_from(silence.as_millis()).unwrap_or(u64::MAX);
    let before = number(now.saturating_sub(silence));
    let names = statement
        .query_map(params![host_id, before], |row| row.get::<_, String>(0))?
        .collect::<rusqlite::Result<Vec<_>>>()?;
    for name in names {
        outcome.lost.push(super::parsed(&name)?);
        instances::lose(tx, host_id)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::database::{Database, tasks};
    use crate::wire::cluster::{InstanceState, InstanceStatus};

    #[tokio::test]
    async fn a_clock_that_is_set_forward_takes_no_time_from_anybody() {
        let dir = tempfile::tempdir().unwrap();
        let database = Database::open(&dir.path().join("db")).unwrap();
        let work = |tx: &Transaction<'_>| -> Result<()> {
            tx.execute_batch(
                "INSERT INTO host (host_id, status, type, name, address, kinds, cpus, memory, last_seen)
                 VALUES (1, 'online', 'compute', 'n1', '127.0.0.1:1', 'vm', 1, 1, 1000);
                 INSERT INTO task (task_status, name, request, plan, created)
                 VALUES ('starting', 'lab', 'r1', '{}', 1000);
                 INSERT INTO instance (inst_type, inst_status, host_id, task_id, name, image, addresses, began, time_limit)
                 VALUES ('vm', 'booting', 1, 1, 'lab-1-g-1', 'box', '', 1000, 60000)",
            )?;
            let status =
                || tx.query_row("SELECT inst_status FROM instance", [], |row| row.get::<_, String>(0));
            let silent = || Heard {
                host_id: 1,
                at: Instant::now(),
                accepted: Vec::new(),
                other: None,
                peer: None,
                state: None,
            };
            let (hour, silence) = (3_600_000, Some(Duration::from_secs(8)));
            set_clocks_forward(tx, hour)?;
            assert!(write(tx, &[silent()], 3000 + hour, silence)?.lost.is_empty());
            assert_eq!(status()?, "booting");
            // What had passed before counts.
            assert_eq!(write(tx, &[silent()], 9000 + hour, silence)?.lost.len(), 1);
            tx.execute("UPDATE instance SET inst_status = 'booting'", [])?;
            write(tx, &[], 61_001 + hour, None)?;
            assert_eq!(status()?, "failed");
            Ok(())
        };
        database.run(work).await.unwrap();
    }

    #[tokio::test]
    async fn what_a_node_says_is_kept_as_plain_lines() {
        let dir = tempfile::tempdir().unwrap();
        let database = Database::open(&dir.path().join("db")).unwrap();
        let work = |tx: &Transaction<'_>| -> Result<()> {
            tx.execute_batch(
                "INSERT INTO host (host_id, status, type, name, address, kinds, cpus, memory, last_seen)
                 VALUES (1, 'online', 'compute', 'n1', '127.0.0.1:1', 'vm', 1, 1, 1);
                 INSERT INTO task (task_status, name, request, plan, created)
                 VALUES ('starting', 'lab', 'r1', '{}', 1);
                 INSERT INTO instance (inst_type, inst_status, host_id, task_id, name, image, addresses)
                 VALUES ('vm', 'preparing', 1, 1, 'lab-1-g-1', 'box', '');",
            )?;
            let reason =
                || -> String { tx.query_row("SELECT reason FROM instance", [], |row| row.get(0)).unwrap() };
            let instance = InstanceState {
                name: "lab-1-g-1".parse().unwrap(),
                task: 1,
                status: InstanceStatus::Failed,
                reason: Some("\x1b]0;x\x07no\ndisk".to_owned()),
                up_ms: None,
                cpu: 0.0,
                memory_bytes: 0,
                network_bytes: [0; 2],
            };
            let state = NodeState {
                node: "n1".parse().unwrap(),
                cluster: None,
                memory_free: 0,
                load: std::collections::BTreeMap::new(),
                peer: None,
                images: None,
                tasks: Vec::new(),
                last_task: None,
                instances: vec![instance],
                troubles: vec!["full\x1b[2J\nof lies".to_owned(), "hot".to_owned()],
            };
            let heard = Heard {
                host_id: 1,
                at: Instant::now(),
                accepted: Vec::new(),
                other: None,
                peer: None,
                state: Some(state),
            };
            write(tx, &[heard], 2, None)?;
            let troubles: String = tx.query_row("SELECT troubles FROM host", [], |row| row.get(0))?;
            assert_eq!(troubles, "full [2J of lies\nhot");
            assert_eq!(reason(), " ]0;x no disk");
            tasks::refused(tx, 1, 1, "no\x1b[1m\nroom", 3)?;
            assert_eq!(reason(), "no [1m room");
            tx.execute("UPDATE instance SET inst_status = 'preparing'", [])?;
            tasks::waits(tx, 1, 1, "soon\r\n")?;
            assert_eq!(reason(), "soon  ");
            Ok(())
        };
        database.run(work).await.unwrap();
    }
}
