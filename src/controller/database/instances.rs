//! Instances: how they are, as their nodes and the guests themselves say.

use rusqlite::{OptionalExtension, Transaction, params};

use super::hosts::kind_of_word;
use super::{DatabaseError, Page, Result, number, parsed, tasks, unsigned};
use crate::controller::state::{Known, advance};
use crate::name::HostName;
use crate::wire::cluster::{InstanceRow, InstanceState, InstanceStatus, shortened};

/// Why an instance has failed that ended before it reported.
const NEVER_UP: &str = "it ended before it reported that it was up: look at its serial log on its node";

/// The state that is kept as `word`.
pub(super) fn status_of_word(word: &str) -> Result<InstanceStatus> {
    InstanceStatus::ALL
        .into_iter()
        .find(|status| status.word() == word)
        .ok_or_else(|| DatabaseError::Content(word.to_owned()))
}

/// Writes down what a node says of its instances. Those of tasks that are not there, or that another node has, are left
/// out. Gives the tasks of which some instance has changed its state.
pub(crate) fn update(
    tx: &Transaction<'_>,
    host_id: i64,
    instances: &[InstanceState],
    now: u64,
) -> Result<Vec<i64>> {
    let mut changed = Vec::new();
    for said in instances {
        let found: Option<(i64, String, Option<i64>, bool)> = tx
            .prepare_cached(
                "SELECT inst_id, inst_status, up, time_limit IS NOT NULL FROM instance
                 WHERE name = ?1 AND host_id = ?2 AND task_id = ?3",
            )?
            .query_row(params![said.name.as_str(), host_id, said.task], |row| {
                Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?))
            })
            .optional()?;
        let Some((inst_id, word, up, reports)) = found else { continue };
        let known = match up {
            Some(_) => Known::WasUp,
            None if reports => Known::Awaited,
            None => Known::Nothing,
        };
        let old = status_of_word(&word)?;
        let new = advance(old, said.status, known);
        let up = up.or_else(|| (new == InstanceStatus::Running).then(|| number(now)));
        // One that had failed before it ended keeps the reason of that.
        let never_up = (new, said.status) == (InstanceStatus::Failed, InstanceStatus::Stopped)
            && old != InstanceStatus::Failed;
        let reason = said.reason.clone().map(shortened).or_else(|| never_up.then(|| NEVER_UP.to_owned()));
        tx.prepare_cached(
            "UPDATE instance SET inst_status = ?2, up = ?4, cpu = ?5, memory = ?6, received = ?7, sent = ?8,
                 reason = CASE WHEN ?2 = 'failed' THEN coalesce(?3, reason) ELSE ?3 END,
                 began = CASE WHEN ?2 = 'booting' THEN coalesce(began, ?9) END
             WHERE inst_id = ?1",
        )?
        .execute(params![
            inst_id,
            new.word(),
            reason,
            up,
            if said.cpu.is_finite() { said.cpu } else { 0.0 },
            number(said.memory_bytes),
            number(said.network_bytes[0]),
            number(said.network_bytes[1]),
            number(now),
        ])?;
        if new != old && !changed.contains(&said.task) {
            changed.push(said.task);
        }
    }
    for task in &changed {
        tasks::refresh(tx, *task, now)?;
    }
    Ok(changed)
}

/// A guest has reported that it is up; false if no instance of that name waits for it, which only those do that their plan
/// has report (they have a time limit here). One whose node is silent stays
/// lost until the node is back, and is up then.
pub(crate) fn reported(tx: &Transaction<'_>, name: &HostName, now: u64) -> Result<bool> {
    let task: Option<i64> = tx
        .query_row(
            "UPDATE instance SET inst_status = CASE inst_status WHEN 'lost' THEN 'lost' ELSE 'running' END, up = ?2
             WHERE name = ?1 AND inst_status IN ('preparing', 'booting', 'failed', 'lost') AND up IS NULL
                 AND time_limit IS NOT NULL RETURNING task_id",
            params![name.as_str(), number(now)],
            |row| row.get(0),
        )
        .optional()?;
    match task {
        Some(task) => tasks::refresh(tx, task, now).map(|()| true),
        None => Ok(false),
    }
}

/// Instances that should have reported by now have failed.
pub(super) fn expire(tx: &Transaction<'_>, now: u64) -> Result<()> {
    let mut statement = tx.prepare_cached(
        "UPDATE instance SET inst_status = 'failed',
             reason = 'it did not report within ' || (time_limit / 1000) || ' s: look at its serial log on its node'
         WHERE inst_status = 'booting' AND up IS NULL AND began + time_limit < ?1 RETURNING task_id",
    )?;
    let tasks =
        statement.query_map([number(now)], |row| row.get(0))?.collect::<rusqlite::Result<Vec<i64>>>()?;
    tasks.into_iter().try_for_each(|task| tasks::refresh(tx, task, now))
}

/// The node is silent: nobody knows how its instances are.
pub(super) fn lose(tx: &Transaction<'_>, host_id: i64) -> Result<()> {
    tx.execute(
        "UPDATE instance SET inst_status = 'lost', reason = 'its node does not answer', cpu = 0, memory = 0
         WHERE host_id = ?1 AND inst_status IN ('preparing', 'booting', 'running')",
        params![host_id],
    )?;
    Ok(())
}

/// The node knows nothing of its part of a task, and will begin anew with all of it: what was up once, also what has ended
/// since, has to come up again.
pub(super) fn forgotten(tx: &Transaction<'_>, host_id: i64, task: i64) -> Result<()> {
    tx.execute(
        "UPDATE instance SET inst_status = 'lost', reason = 'its node has forgotten it',
             up = NULL, began = NULL, cpu = 0, memory = 0
         WHERE host_id = ?1 AND task_id = ?2 AND inst_status <> 'failed'",
        params![host_id, task],
    )?;
    Ok(())
}

/// The node begins anew with its part of a task.
pub(super) fn begin_again(tx: &Transaction<'_>, task: i64, host_id: i64) -> Result<()> {
    tx.execute(
        "UPDATE instance SET inst_status = 'preparing', reason = NULL, up = NULL, began = NULL
         WHERE task_id = ?1 AND host_id = ?2 AND inst_status = 'lost'",
        params![task, host_id],
    )?;
    Ok(())
}

/// The instances, of one task or of all, as users see them, from behind `after` on.
pub(crate) fn rows(
    tx: &Transaction<'_>,
    task: Option<i64>,
    after: Option<i64>,
    mut page: Page,
) -> Result<Vec<InstanceRow>> {
    let mut statement = tx.prepare_cached(
        "SELECT inst_id, instance.name, inst_type, image, task_id, host.name, inst_status, reason,
                instance.up - task.created, addresses, cpu, instance.memory, received, sent
         FROM instance JOIN host USING (host_id) JOIN task USING (task_id)
         WHERE (?1 IS NULL OR task_id = ?1) AND (?2 IS NULL OR inst_id > ?2) ORDER BY inst_id",
    )?;
    let mut rows = statement.query([task, after])?;
    let mut instances = Vec::new();
    while let Some(row) = rows.next()? {
        let text = |index| row.get::<_, String>(index);
        let row = InstanceRow {
            inst_id: row.get(0)?,
            name: parsed(&text(1)?)?,
            kind: kind_of_word(&text(2)?)?,
            image: parsed(&text(3)?)?,
            task: row.get(4)?,
            node: parsed(&text(5)?)?,
            status: status_of_word(&text(6)?)?,
            reason: row.get(7)?,
            up_ms: row.get::<_, Option<i64>>(8)?.map(unsigned),
            addresses: text(9)?.split_whitespace().map(parsed).collect::<Result<_>>()?,
            cpu: row.get(10)?,
            memory_bytes: unsigned(row.get(11)?),
            network_bytes: [unsigned(row.get(12)?), unsigned(row.get(13)?)],
        };
        if !page.takes(&row)? {
            break;
        }
        instances.push(row);
    }
    Ok(instances)
}
