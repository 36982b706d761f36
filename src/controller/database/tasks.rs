//! Tasks and their parts: made, ordered, ended.

use std::collections::BTreeMap;

use rusqlite::{OptionalExtension, Transaction, params};

use super::hosts::kind_of_word;
use super::{DatabaseError, Page, Result, instances, number, parsed, unsigned};
use crate::controller::state::task_status;
use crate::hypervisor::InstanceType;
use crate::plan::Plan;
use crate::wire::cluster::{InstanceStatus, Part, TaskRow, TaskStatus, UpWhen, shortened};

/// A task to be made.
#[derive(Debug)]
pub(crate) struct NewTask<'t> {
    /// The user's own number for the request.
    pub(crate) request: &'t str,
    pub(crate) plan: &'t Plan,
    pub(crate) now: u64,
}

/// An order that a node has still to be given.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Order {
    pub(crate) host_id: i64,
    pub(crate) task: i64,
    pub(crate) kind: OrderKind,
}

/// What a node is ordered to do.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum OrderKind {
    Run(Box<Part>),
    End,
}

/// The requests of so many last tasks are remembered when the tasks have ended.
const REQUESTS_KEPT: i64 = 10_000;

/// So many numbers of tasks are passed over at once, at most: what a node says is not believed to the last, since there is no
/// number after the highest of all.
const NUMBERS_PASSED_MAX: i64 = 1_000_000;

fn status_of_word(word: &str) -> Result<TaskStatus> {
    TaskStatus::ALL
        .into_iter()
        .find(|status| status.word() == word)
        .ok_or_else(|| DatabaseError::Content(word.to_owned()))
}

/// The task that the request has made already, whether or not it has ended.
pub(crate) fn of_request(tx: &Transaction<'_>, request: &str) -> Result<Option<i64>> {
    let sql = "SELECT task_id FROM task WHERE request = ?1
               UNION ALL SELECT task_id FROM request WHERE request = ?1";
    Ok(tx.query_row(sql, [request], |row| row.get(0)).optional()?)
}

/// The MiB of memory that instances which have not ended were promised: by node and kind.
pub(crate) fn promised_mib(tx: &Transaction<'_>) -> Result<Vec<(i64, InstanceType, u64)>> {
    let mut statement = tx.prepare_cached(
        "SELECT part.host_id, inst_type, sum(json_extract(ordered.value, '$.memory_mib'))
         FROM part JOIN json_each(part.body, '$.instances') AS ordered
         JOIN instance ON instance.name = json_extract(ordered.value, '$.name')
         WHERE inst_status NOT IN ('stopped', 'failed') GROUP BY part.host_id, inst_type",
    )?;
    let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get::<_, String>(1)?, row.get(2)?)))?;
    rows.map(|row| {
        let (host_id, kind, mib) = row?;
        Ok((host_id, kind_of_word(&kind)?, unsigned(mib)))
    })
    .collect()
}

/// Makes a task; `parts` says, from its number, what each host is to run.
pub(crate) fn create<E: From<DatabaseError>>(
    tx: &Transaction<'_>,
    new: &NewTask<'_>,
    parts: impl FnOnce(i64) -> Result<BTreeMap<i64, Part>, E>,
) -> Result<i64, E> {
    let inner = || -> Result<i64> {
        Ok(tx.query_row(
            "INSERT INTO task (task_status, name, request, plan, created) VALUES ('starting', ?1, ?2, ?3, ?4)
             RETURNING task_id",
            params![new.plan.name.as_str(), new.request, serde_json::to_string(new.plan)?, number(new.now)],
            |row| row.get(0),
        )?)
    };
    let task = inner()?;
    let parts = parts(task)?;
    write_parts(tx, task, &parts)?;
    Ok(task)
}

/// A node knows of tasks up to `last`: none made from now on has their numbers, which nodes take for tasks that have ended. The
/// database may be older than those tasks, if it was restored.
pub(super) fn pass_over(tx: &Transaction<'_>, last: i64) -> Result<()> {
    let seen: Option<i64> = tx
        .prepare_cached("SELECT seq FROM sqlite_sequence WHERE name = 'task'")?
        .query_row([], |row| row.get(0))
        .optional()?;
    let own = seen.unwrap_or(0);
    let last = last.min(own.saturating_add(NUMBERS_PASSED_MAX));
    if last <= own {
        return Ok(());
    }
    // The table of SQLite's own has no key.
    let sql = match seen {
        Some(_) => "UPDATE sqlite_sequence SET seq = ?1 WHERE name = 'task'",
        None => "INSERT INTO sqlite_sequence (name, seq) VALUES ('task', ?1)",
    };
    tx.execute(sql, [last])?;
    Ok(())
}

fn write_parts(tx: &Transaction<'_>, task: i64, parts: &BTreeMap<i64, Part>) -> Result<()> {
    for (host_id, part) in parts {
        tx.execute(
            "INSERT INTO part (task_id, host_id, body) VALUES (?1, ?2, ?3)",
            params![task, host_id, serde_json::to_string(part)?],
        )?;
        for instance in &part.instances {
            let addresses: Vec<String> =
                instance.nics.iter().filter_map(|nic| nic.address).map(|(ip, _)| ip.to_string()).collect();
            tx.execute(
                "INSERT INTO instance (inst_type, inst_status, host_id, task_id, name, image, addresses, time_limit)
                 VALUES (?1, 'preparing', ?2, ?3, ?4, ?5, ?6, ?7)",
                params![
                    instance.kind.to_string(),
                    host_id,
                    task,
                    instance.name.as_str(),
                    instance.image.as_str(),
                    addresses.join(" "),
                    (instance.up_when == UpWhen::Report).then(|| i64::from(instance.time_limit_s) * 1000),
                ],
            )?;
        }
    }
    Ok(())
}

/// The task is to end; false if it is not there.
pub(crate) fn end(tx: &Transaction<'_>, task: i64) -> Result<bool> {
    Ok(tx.execute("UPDATE task SET task_status = 'ending' WHERE task_id = ?1", [task])? > 0)
}

/// What nodes have still to be told. A node that is offline cannot be told to end its part: that part is given up, and
/// ended as one that should not be there when the node comes back.
pub(crate) fn orders(tx: &Transaction<'_>) -> Result<Vec<Order>> {
    let given_up = "SELECT task_id, host_id FROM part JOIN task USING (task_id) JOIN host USING (host_id)
                    WHERE task_status = 'ending' AND host.status = 'offline'";
    let mut statement = tx.prepare_cached(given_up)?;
    let parts = statement
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<rusqlite::Result<Vec<(i64, i64)>>>()?;
    for (task, host_id) in parts {
        gone(tx, task, host_id)?;
    }
    let mut statement = tx.prepare_cached(
        "SELECT host_id, task_id, task_status, body FROM part JOIN task USING (task_id) JOIN host USING (host_id)
         WHERE host.status = 'online' AND (accepted = 0 OR task_status = 'ending') ORDER BY task_id, host_id",
    )?;
    let mut rows = statement.query([])?;
    let mut orders = Vec::new();
    while let Some(row) = rows.next()? {
        let kind = match status_of_word(&row.get::<_, String>(2)?)? {
            TaskStatus::Ending => OrderKind::End,
            _ => OrderKind::Run(Box::new(serde_json::from_str(&row.get::<_, String>(3)?)?)),
        };
        orders.push(Order { host_id: row.get(0)?, task: row.get(1)?, kind });
    }
    Ok(orders)
}

/// The parts that nodes have accepted: node and task.
pub(crate) fn accepted_parts(tx: &Transaction<'_>) -> Result<Vec<(i64, i64)>> {
    let mut statement = tx.prepare_cached("SELECT host_id, task_id FROM part WHERE accepted = 1")?;
    let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

/// A node has accepted its part; `new`: it did not have it before.
pub(crate) fn accepted(tx: &Transaction<'_>, task: i64, host_id: i64, new: bool) -> Result<()> {
    if new {
        instances::begin_again(tx, task, host_id)?;
    }
    tx.execute("UPDATE part SET accepted = 1 WHERE task_id = ?1 AND host_id = ?2", params![task, host_id])?;
    Ok(())
}

/// A node will not run its part, and says why: its instances have failed.
pub(crate) fn refused(tx: &Transaction<'_>, task: i64, host_id: i64, reason: &str, now: u64) -> Result<()> {
    tx.execute(
        "UPDATE instance SET inst_status = 'failed', reason = ?3 WHERE task_id = ?1 AND host_id = ?2",
        params![task, host_id, shortened(reason.to_owned())],
    )?;
    accepted(tx, task, host_id, false)?;
    refresh(tx, task, now)
}

/// A node has not been given its part yet: why, for people.
pub(crate) fn waits(tx: &Transaction<'_>, task: i64, host_id: i64, reason: &str) -> Result<()> {
    tx.execute(
        "UPDATE instance SET reason = ?3
         WHERE task_id = ?1 AND host_id = ?2 AND inst_status IN ('preparing', 'lost')",
        params![task, host_id, shortened(reason.to_owned())],
    )?;
    Ok(())
}

/// Nothing is left of a part; with the last one, the task goes.
pub(crate) fn gone(tx: &Transaction<'_>, task: i64, host_id: i64) -> Result<()> {
    let ending = "task_id = ?1 AND host_id = ?2 AND EXISTS
                  (SELECT 1 FROM task WHERE task.task_id = ?1 AND task_status = 'ending')";
    for table in ["instance", "part"] {
        tx.execute(&format!("DELETE FROM {table} WHERE {ending}"), params![task, host_id])?;
    }
    let ended =
        "task_id = ?1 AND task_status = 'ending' AND NOT EXISTS (SELECT 1 FROM part WHERE part.task_id = ?1)";
    tx.execute(
        &format!("INSERT OR IGNORE INTO request SELECT request, task_id FROM task WHERE {ended}"),
        [task],
    )?;
    if tx.execute(&format!("DELETE FROM task WHERE {ended}"), [task])? > 0 {
        // By their rank: numbers may have been passed over.
        let old = "DELETE FROM request WHERE task_id <=
                   (SELECT task_id FROM request ORDER BY task_id DESC LIMIT 1 OFFSET ?1)";
        tx.execute(old, [REQUESTS_KEPT])?;
    }
    Ok(())
}

/// Takes a node's parts from all tasks; a task that has no other part goes.
pub(super) fn give_up(tx: &Transaction<'_>, host_id: i64, now: u64) -> Result<()> {
    let mut statement = tx.prepare_cached("SELECT task_id FROM part WHERE host_id = ?1")?;
    let tasks = statement.query_map([host_id], |row| row.get(0))?.collect::<rusqlite::Result<Vec<i64>>>()?;
    for table in ["instance", "part"] {
        tx.execute(&format!("DELETE FROM {table} WHERE host_id = ?1"), [host_id])?;
    }
    for task in tasks {
        let has_parts = tx.prepare_cached("SELECT 1 FROM part WHERE task_id = ?1")?.exists([task])?;
        if !has_parts {
            end(tx, task)?;
        }
        gone(tx, task, host_id)?;
        refresh(tx, task, now)?;
    }
    Ok(())
}

/// Brings a task's state up to date with those of its instances.
pub(super) fn refresh(tx: &Transaction<'_>, task: i64, now: u64) -> Result<()> {
    let word: Option<String> = tx
        .query_row("SELECT task_status FROM task WHERE task_id = ?1", [task], |row| row.get(0))
        .optional()?;
    let Some(word) = word else { return Ok(()) };
    let new = task_status(status_of_word(&word)?, &counts(tx, task)?);
    tx.execute(
        "UPDATE task SET task_status = ?2, up = CASE WHEN ?2 = 'running' THEN coalesce(up, ?3) ELSE up END
         WHERE task_id = ?1",
        params![task, new.word(), number(now)],
    )?;
    Ok(())
}

fn counts(tx: &Transaction<'_>, task: i64) -> Result<BTreeMap<InstanceStatus, u64>> {
    let mut statement = tx.prepare_cached(
        "SELECT inst_status, count(*) FROM instance WHERE task_id = ?1 GROUP BY inst_status",
    )?;
    let rows = statement.query_map([task], |row| Ok((row.get::<_, String>(0)?, row.get(1)?)))?;
    rows.map(|row| {
        let (word, count) = row?;
        Ok((instances::status_of_word(&word)?, unsigned(count)))
    })
    .collect()
}

/// The tasks, or one of them, as users see them, from behind `after` on.
pub(crate) fn rows(
    tx: &Transaction<'_>,
    task: Option<i64>,
    after: Option<i64>,
    mut page: Page,
) -> Result<Vec<TaskRow>> {
    let mut statement = tx.prepare_cached(
        "SELECT task_id, name, task_status, created, up FROM task
         WHERE (?1 IS NULL OR task_id = ?1) AND (?2 IS NULL OR task_id > ?2) ORDER BY task_id",
    )?;
    let mut rows = statement.query([task, after])?;
    let mut tasks = Vec::new();
    while let Some(row) = rows.next()? {
        let task = row.get(0)?;
        let created = unsigned(row.get(3)?);
        let row = TaskRow {
            task,
            name: parsed(&row.get::<_, String>(1)?)?,
            status: status_of_word(&row.get::<_, String>(2)?)?,
            created_ms: created,
            up_ms: row.get::<_, Option<i64>>(4)?.map(|up| unsigned(up).saturating_sub(created)),
            instances: counts(tx, task)?,
            nodes: per_node(tx, task)?,
        };
        if !page.takes(&row)? {
            break;
        }
        tasks.push(row);
    }
    Ok(tasks)
}

/// A task's instances by node and state.
fn per_node(
    tx: &Transaction<'_>,
    task: i64,
) -> Result<BTreeMap<crate::name::HostName, BTreeMap<InstanceStatus, u64>>> {
    let mut statement = tx.prepare_cached(
        "SELECT host.name, inst_status, count(*)
         FROM instance JOIN host USING (host_id) WHERE task_id = ?1 GROUP BY host_id, inst_status",
    )?;
    let mut rows = statement.query([task])?;
    let mut nodes: BTreeMap<_, BTreeMap<_, _>> = BTreeMap::new();
    while let Some(row) = rows.next()? {
        let node = parsed(&row.get::<_, String>(0)?)?;
        let status = instances::status_of_word(&row.get::<_, String>(1)?)?;
        nodes.entry(node).or_default().insert(status, unsigned(row.get(2)?));
    }
    Ok(nodes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::database::Database;

    #[tokio::test]
    async fn numbers_that_are_passed_over_have_no_request_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let database = Database::open(&dir.path().join("db")).unwrap();
        let work = |tx: &Transaction<'_>| -> Result<()> {
            let ends = |request: &str| -> Result<i64> {
                let sql = "INSERT INTO task (task_status, name, request, plan, created)
                           VALUES ('ending', 'lab', ?1, '{}', 1) RETURNING task_id";
                let task = tx.query_row(sql, [request], |row| row.get(0))?;
                gone(tx, task, 1)?;
                Ok(task)
            };
            assert_eq!(ends("r1")?, 1);
            pass_over(tx, 500_000)?;
            assert_eq!(ends("r2")?, 500_001);
            assert_eq!((of_request(tx, "r1")?, of_request(tx, "r2")?), (Some(1), Some(500_001)));
            // So many as are kept, then one more.
            tx.execute_batch(&format!(
                "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {REQUESTS_KEPT} - 2)
                 INSERT INTO request SELECT 'x' || i, 1 + i FROM n"
            ))?;
            let kept = || tx.query_row("SELECT count(*) FROM request", [], |row| row.get::<_, i64>(0));
            assert_eq!(kept()?, REQUESTS_KEPT);
            ends("r3")?;
            assert_eq!((kept()?, of_request(tx, "r1")?), (REQUESTS_KEPT, None));
            assert_eq!(of_request(tx, "r2")?, Some(500_001));
            Ok(())
        };
        database.run(work).await.unwrap();
    }
}
