//! Nodes: registration, and what users see of them.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use rusqlite::{OptionalExtension, Row, Transaction, params};

use super::{DatabaseError, Page, Result, number, parsed, unsigned};
use crate::hypervisor::InstanceType;
use crate::name::HostName;
use crate::wire::cluster::{NodeRow, RegisterCompute, shortened};

/// A node, as the controller needs it to speak to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Host {
    pub(crate) id: i64,
    pub(crate) name: HostName,
    /// Its agent.
    pub(crate) address: SocketAddr,
    pub(crate) online: bool,
}

impl Host {
    /// Where it is, and who is to be there.
    pub(crate) const fn place(&self) -> (SocketAddr, &HostName) {
        (self.address, &self.name)
    }
}

fn kinds_to_text(kinds: &[InstanceType]) -> String {
    let mut words: Vec<String> = kinds.iter().map(ToString::to_string).collect();
    words.sort_unstable();
    words.dedup();
    words.join(" ")
}

fn kinds_of_text(text: &str) -> Result<Vec<InstanceType>> {
    text.split_whitespace().map(kind_of_word).collect()
}

/// The kind that is kept as `word`.
pub(super) fn kind_of_word(word: &str) -> Result<InstanceType> {
    match word {
        "vm" => Ok(InstanceType::Vm),
        "container" => Ok(InstanceType::Container),
        other => Err(DatabaseError::Content(other.to_owned())),
    }
}

/// Enters a node that was tested to be reachable at `address`, or brings its entry up to date; gives its number.
pub(crate) fn register(
    tx: &Transaction<'_>,
    node: &RegisterCompute,
    address: SocketAddr,
    now: u64,
) -> Result<i64> {
    let host_id: i64 = tx.query_row(
        "INSERT INTO host (status, type, name, address, kinds, cpus, memory, last_seen)
         VALUES ('online', ?1, ?2, ?3, ?4, ?5, ?6, ?7)
         ON CONFLICT (name) DO UPDATE SET status = 'online', type = excluded.type, address = excluded.address,
             kinds = excluded.kinds, cpus = excluded.cpus, memory = excluded.memory, last_seen = excluded.last_seen
         RETURNING host_id",
        params![
            if node.kinds.is_empty() { "image" } else { "compute" },
            node.node.as_str(),
            address.to_string(),
            kinds_to_text(&node.kinds),
            node.cpus,
            number(node.memory_bytes),
            number(now),
        ],
        |row| row.get(0),
    )?;
    tx.execute("DELETE FROM host_ip WHERE host_id = ?1", [host_id])?;
    for address in &node.addresses {
        let kind = match address.ip {
            IpAddr::V4(_) => "IPv4",
            IpAddr::V6(_) => "IPv6",
        };
        let text = address.ip.to_string();
        tx.execute("INSERT OR IGNORE INTO ip (ip_addr, ip_type) VALUES (?1, ?2)", params![text, kind])?;
        tx.execute(
            "INSERT OR REPLACE INTO host_ip SELECT ?1, ip_id, ?2 FROM ip WHERE ip_addr = ?3",
            params![host_id, shortened(address.mac.clone()), text],
        )?;
    }
    tx.execute("DELETE FROM ip WHERE ip_id NOT IN (SELECT ip_id FROM host_ip)", [])?;
    Ok(host_id)
}

/// The number of the node called `name`.
pub(crate) fn id_of(tx: &Transaction<'_>, name: &HostName) -> Result<Option<i64>> {
    Ok(tx
        .query_row("SELECT host_id FROM host WHERE name = ?1", [name.as_str()], |row| row.get(0))
        .optional()?)
}

/// What became of a node that was to be forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Forgotten {
    /// Nothing is left of it.
    Gone,
    /// It is online.
    Online,
    /// There is none of that name.
    Unknown,
}

/// Forgets a node that is offline, with its parts of tasks.
pub(crate) fn forget(tx: &Transaction<'_>, name: &HostName, now: u64) -> Result<Forgotten> {
    let found: Option<(i64, String)> = tx
        .query_row("SELECT host_id, status FROM host WHERE name = ?1", [name.as_str()], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })
        .optional()?;
    let host_id = match found {
        None => return Ok(Forgotten::Unknown),
        Some((_, status)) if status == "online" => return Ok(Forgotten::Online),
        Some((host_id, _)) => host_id,
    };
    super::tasks::give_up(tx, host_id, now)?;
    tx.execute("DELETE FROM host WHERE host_id = ?1", [host_id])?;
    // Who has the very boot cache that it said takes its place.
    tx.execute(
        "UPDATE image SET publisher = (
             SELECT host_id FROM host_img
             WHERE host_img.img_id = image.img_id AND host_img.boot IS image.boot AND host_img.bt_size = image.bt_size
             ORDER BY complete DESC, host_id LIMIT 1)
         WHERE publisher IS NULL",
        [],
    )?;
    tx.execute("DELETE FROM ip WHERE ip_id NOT IN (SELECT ip_id FROM host_ip)", [])?;
    tx.execute("DELETE FROM image WHERE img_id NOT IN (SELECT img_id FROM host_img)", [])?;
    Ok(Forgotten::Gone)
}

/// Where a node serves peers.
pub(crate) fn set_peer(tx: &Transaction<'_>, host_id: i64, peer: Option<SocketAddr>) -> Result<()> {
    let peer = peer.map(|peer| peer.to_string());
    tx.execute("UPDATE host SET peer = ?2 WHERE host_id = ?1", params![host_id, peer])?;
    Ok(())
}

/// All nodes.
pub(crate) fn all(tx: &Transaction<'_>) -> Result<Vec<Host>> {
    let mut statement = tx.prepare_cached("SELECT host_id, name, address, status FROM host ORDER BY name")?;
    let rows = statement.query_map([], |row| {
        Ok((row.get(0)?, row.get::<_, String>(1)?, row.get::<_, String>(2)?, row.get::<_, String>(3)?))
    })?;
    rows.map(|row| {
        let (id, name, address, status) = row?;
        Ok(Host { id, name: parsed(&name)?, address: parsed(&address)?, online: status == "online" })
    })
    .collect()
}

/// The nodes, as users see them, from behind `after` on. The score is the caller's.
pub(crate) fn rows(
    tx: &Transaction<'_>,
    now: u64,
    after: Option<&HostName>,
    mut page: Page,
) -> Result<Vec<NodeRow>> {
    let loads = loads(tx)?;
    let mut statement = tx.prepare_cached(
        "SELECT host_id, name, status, address, kinds, cpus, memory, memory_free, troubles, last_seen,
                (SELECT count(*) FROM instance WHERE instance.host_id = host.host_id)
         FROM host WHERE ?1 IS NULL OR name > ?1 ORDER BY name",
    )?;
    let text = |row: &Row<'_>, index| row.get::<_, String>(index);
    let mut rows = statement.query([after.map(HostName::as_str)])?;
    let mut nodes = Vec::new();
    while let Some(row) = rows.next()? {
        let host_id = row.get(0)?;
        let row = NodeRow {
            host_id,
            name: parsed(&text(row, 1)?)?,
            online: text(row, 2)? == "online",
            address: text(row, 3)?,
            kinds: kinds_of_text(&text(row, 4)?)?,
            cpus: row.get(5)?,
            memory_bytes: unsigned(row.get(6)?),
            memory_free: unsigned(row.get(7)?),
            load: loads.get(&host_id).cloned().unwrap_or_default(),
            score: 0.0,
            instances: unsigned(row.get(10)?),
            images: super::images::of_host(tx, host_id)?,
            silent_ms: now.saturating_sub(unsigned(row.get(9)?)),
            troubles: text(row, 8)?.lines().map(str::to_owned).collect(),
        };
        if !page.takes(&row)? {
            break;
        }
        nodes.push(row);
    }
    Ok(nodes)
}

/// The load items of all nodes.
pub(crate) fn loads(tx: &Transaction<'_>) -> Result<BTreeMap<i64, BTreeMap<u16, f32>>> {
    let mut statement = tx.prepare_cached("SELECT host_id, item_id, value FROM host_load")?;
    let mut rows = statement.query([])?;
    let mut loads: BTreeMap<i64, BTreeMap<u16, f32>> = BTreeMap::new();
    while let Some(row) = rows.next()? {
        loads.entry(row.get(0)?).or_default().insert(row.get(1)?, row.get(2)?);
    }
    Ok(loads)
}
