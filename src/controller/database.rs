//! The controller's database: the only code that speaks SQL. The tables are told in `schema.sql` and
//! `schema-2.sql`.
//!
//! One connection, one writer: [`Database`] runs each piece of work as one transaction on a blocking thread, one after the
//! other; those that wait have no thread, of which there are not so many as guests may report at once. What a piece of
//! work does is in the modules below, by what it is about; all of it is plain functions over a transaction.
//! WAL and full sync: what a call has returned survives a power loss, and a `kill -9` leaves what was committed.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, Transaction, params};
use tokio::sync::Mutex;

mod hosts;
mod images;
mod instances;
mod round;
mod tasks;

pub(super) use hosts::{
    Forgotten, Host, all as all_hosts, forget, id_of as host_id, loads, register as register_host,
    rows as node_rows, set_peer,
};
pub(super) use images::{
    Holder, Image, find as find_image, holders, nowhere, register as register_images, rows as image_rows,
    without_boot_cache,
};
pub(super) use instances::{reported, rows as instance_rows, update as update_instances};
pub(super) use round::{Heard, set_clocks_forward, write as write_round};
pub(super) use tasks::{
    NewTask, Order, OrderKind, accepted, accepted_parts, create as create_task, end as end_task, gone,
    of_request as task_of_request, orders, promised_mib, refused, rows as task_rows, waits,
};

/// A transaction, to those who only pass it on.
pub(super) type Tx<'t> = Transaction<'t>;

/// The version of the tables that this code reads and writes.
const VERSION: i64 = 2;
/// The steps from each version to the next: the first makes version 1 from nothing.
const MIGRATIONS: [&str; 2] = [include_str!("../../schema.sql"), include_str!("../../schema-2.sql")];
/// How long another program may hold the database, for instance somebody's `sqlite3`.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// Why the database did not do something.
#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    /// It cannot be opened.
    #[error("cannot open the database {path}: {source}")]
    Open {
        /// The file.
        path: PathBuf,
        /// What SQLite says.
        source: rusqlite::Error,
    },
    /// It was made by a newer program.
    #[error(
        "the database {path} is of version {found}, this bootcache knows {VERSION}: use a newer bootcache"
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: i64,
    },
    /// Another program is writing to it.
    #[error("the database is locked by another program: end it, and try again")]
    Locked,
    /// SQLite refused, or the file is damaged.
    #[error("the database failed: {0}")]
    Sqlite(rusqlite::Error),
    /// It holds something that this code did not write.
    #[error("the database holds something that is not understood: {0}")]
    Content(String),
}

impl From<rusqlite::Error> for DatabaseError {
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(rusqlite::ErrorCode::DatabaseBusy | rusqlite::ErrorCode::DatabaseLocked) => Self::Locked,
            _ => Self::Sqlite(error),
        }
    }
}

impl From<serde_json::Error> for DatabaseError {
    fn from(error: serde_json::Error) -> Self {
        Self::Content(error.to_string())
    }
}

/// What came of a piece of work.
pub(super) type Result<T, E = DatabaseError> = std::result::Result<T, E>;

/// The database. Cheap to clone; clones share the one connection.
#[derive(Debug, Clone)]
pub struct Database {
    connection: Arc<Mutex<Connection>>,
}

impl Database {
    /// Opens the database at `path`, makes it if it is not there, and brings an older one up to date.
    ///
    /// # Errors
    /// [`DatabaseError`].
    pub fn open(path: &Path) -> Result<Self> {
        let at = |source| DatabaseError::Open { path: path.to_owned(), source };
        let mut connection = Connection::open(path).map_err(at)?;
        connection.busy_timeout(BUSY_TIMEOUT).map_err(at)?;
        let version: i64 =
            connection.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(|error| {
                match DatabaseError::from(error) {
                    DatabaseError::Sqlite(source) => at(source),
                    other => other,
                }
            })?;
        let Some(steps) = usize::try_from(version).ok().and_then(|done| MIGRATIONS.get(done..)) else {
            return Err(DatabaseError::Newer { path: path.to_owned(), found: version });
        };
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.pragma_update(None, "foreign_keys", "ON")?;
        if !steps.is_empty() {
            let transaction = connection.transaction()?;
            for step in steps {
                transaction.execute_batch(step)?;
            }
            transaction.pragma_update(None, "user_version", VERSION)?;
            transaction.commit()?;
        }
        Ok(Self { connection: Arc::new(Mutex::new(connection)) })
    }

    /// Runs `work` as one transaction, which is durable when this returns; an error undoes all of it.
    ///
    /// When the future is dropped, the work is done all the same.
    pub(super) async fn run<T, E, F>(&self, work: F) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<DatabaseError> + Send + 'static,
        F: FnOnce(&Transaction<'_>) -> Result<T, E> + Send + 'static,
    {
        let connection = Arc::clone(&self.connection);
        let done = tokio::spawn(async move {
            let mut connection = connection.lock_owned().await;
            let work = move || {
                let transaction = connection.transaction().map_err(DatabaseError::from)?;
                let result = work(&transaction)?;
                transaction.commit().map_err(DatabaseError::from)?;
                Ok(result)
            };
            tokio::task::spawn_blocking(work).await
        });
        match done.await.flatten() {
            Ok(result) => result,
            Err(error) => Err(DatabaseError::Content(error.to_string()).into()),
        }
    }
}

/// The setting `name`; made by `first` when it is not there yet.
pub(super) fn setting(tx: &Transaction<'_>, name: &str, first: impl FnOnce() -> String) -> Result<String> {
    let found =
        tx.query_row("SELECT value FROM setting WHERE name = ?1", [name], |row| row.get(0)).optional()?;
    match found {
        Some(value) => Ok(value),
        None => {
            let value = first();
            set(tx, name, &value)?;
            Ok(value)
        }
    }
}

/// Changes the setting `name`.
pub(super) fn set(tx: &Transaction<'_>, name: &str, value: &str) -> Result<()> {
    tx.execute(
        "INSERT INTO setting VALUES (?1, ?2) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
        params![name, value],
    )?;
    Ok(())
}

/// Checks the whole file, as `PRAGMA integrity_check` and `PRAGMA foreign_key_check` do.
pub(super) fn integrity(tx: &Transaction<'_>) -> Result<()> {
    let answer: String = tx.query_row("PRAGMA integrity_check", [], |row| row.get(0))?;
    let orphans = tx.prepare("PRAGMA foreign_key_check")?.exists([])?;
    match (answer.as_str(), orphans) {
        ("ok", false) => Ok(()),
        ("ok", true) => Err(DatabaseError::Content("rows that refer to nothing".to_owned())),
        _ => Err(DatabaseError::Content(answer)),
    }
}

/// How much of a list is given at once.
#[derive(Debug)]
pub(super) struct Page {
    /// Bytes that further rows may have; `None`: any number.
    left: Option<usize>,
    is_empty: bool,
}

impl Page {
    /// All of it.
    pub(super) const fn whole() -> Self {
        Self { left: None, is_empty: true }
    }

    /// As many rows as fit into `bytes`, and one at least.
    pub(super) const fn of(bytes: usize) -> Self {
        Self { left: Some(bytes), is_empty: true }
    }

    /// Whether `row` belongs to it; those behind one that does not are of the next.
    fn takes(&mut self, row: &impl serde::Serialize) -> Result<bool> {
        let Some(left) = self.left else { return Ok(true) };
        let bytes =
            rmp_serde::to_vec_named(row).map_err(|error| DatabaseError::Content(error.to_string()))?;
        let takes = self.is_empty || bytes.len() <= left;
        self.is_empty = false;
        self.left = Some(left.saturating_sub(bytes.len()));
        Ok(takes)
    }
}

/// A number as SQLite keeps it; what does not fit becomes the largest that does.
fn number(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// A number as it was kept by [`number`].
fn unsigned(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

fn parsed<T: std::str::FromStr>(text: &str) -> Result<T> {
    text.parse()
        .map_err(|_| DatabaseError::Content(format!("'{}'", text.chars().take(80).collect::<String>())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_becomes_the_newest_version_and_stays_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        for _ in 0..2 {
            let database = Database::open(&path).unwrap();
            let connection = database.connection.blocking_lock();
            let version: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0)).unwrap();
            assert_eq!(version, VERSION);
            let mode: String = connection.query_row("PRAGMA journal_mode", [], |row| row.get(0)).unwrap();
            let synchronous: i64 = connection.query_row("PRAGMA synchronous", [], |row| row.get(0)).unwrap();
            assert_eq!((mode.as_str(), synchronous), ("wal", 2));
        }
    }

    #[test]
    fn every_older_version_can_be_brought_up_to_date() {
        for version in 0..MIGRATIONS.len() {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("db");
            let connection = Connection::open(&path).unwrap();
            for step in &MIGRATIONS[..version] {
                connection.execute_batch(step).unwrap();
            }
            connection.pragma_update(None, "user_version", i64::try_from(version).unwrap()).unwrap();
            drop(connection);
            let database = Database::open(&path).unwrap();
            let mut connection = database.connection.blocking_lock();
            integrity(&connection.transaction().unwrap()).unwrap();
        }
    }

    #[tokio::test]
    async fn a_cluster_of_version_1_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        let connection = Connection::open(&path).unwrap();
        connection.execute_batch(MIGRATIONS[0]).unwrap();
        // What version 1 wrote: every instance with its own environment and command.
        let part = r#"{"networks":[],"images":[],"report":null,"instances":[{"name":"lab-1-g-1","kind":"container",
            "image":"box","cpus":1,"memory_mib":16,"nics":[],"env":{"A":"b"},"command":["sh"],"privileged":false,
            "template":null,"up_when":"started","time_limit_s":60}]}"#;
        connection
            .execute_batch(&format!(
                "INSERT INTO host (status, type, name, address, kinds, cpus, memory, last_seen)
                 VALUES ('online', 'compute', 'n1', '127.0.0.1:1', 'container', 1, 1, 1);
                 INSERT INTO image (img_type, img_name, img_size, bt_size, root)
                 VALUES ('container', 'box', 1, 0, '{}');
                 INSERT INTO host_img VALUES (1, 1, 1, 1, 0, 1, 1);
                 INSERT INTO task (task_status, name, request, plan, created) VALUES ('starting', 'lab', 'r1', '{{}}', 1);
                 INSERT INTO part (task_id, host_id, body) VALUES (1, 1, '{part}');
                 INSERT INTO instance (inst_type, inst_status, host_id, task_id, name, image, addresses)
                 VALUES ('container', 'preparing', 1, 1, 'lab-1-g-1', 'box', '');
                 PRAGMA user_version = 1;",
                "0".repeat(64)
            ))
            .unwrap();
        drop(connection);
        let database = Database::open(&path).unwrap();
        let work = |tx: &Transaction<'_>| -> Result<()> {
            integrity(tx)?;
            assert_eq!(task_of_request(tx, "r1")?, Some(1));
            let orders = orders(tx)?;
            let [Order { kind: OrderKind::Run(part), .. }] = &orders[..] else { panic!("{orders:?}") };
            let order = part.whole(&part.instances[0]).unwrap();
            assert_eq!((order.env["A"].as_str(), &order.command[..]), ("b", &["sh".to_owned()][..]));
            assert_eq!(instance_rows(tx, None, None, Page::whole())?.len(), 1);
            assert_eq!(find_image(tx, &"box".parse().unwrap())?.map(|image| image.size), Some(1));
            assert!(end_task(tx, 1)?);
            gone(tx, 1, 1)?;
            assert!(task_rows(tx, None, None, Page::whole())?.is_empty());
            assert_eq!(task_of_request(tx, "r1")?, Some(1), "the request would start a second deployment");
            Ok(())
        };
        database.run(work).await.unwrap();
    }

    #[test]
    fn the_thesis_tables_have_its_columns() {
        let dir = tempfile::tempdir().unwrap();
        let database = Database::open(&dir.path().join("db")).unwrap();
        let connection = database.connection.blocking_lock();
        for (table, columns) in [
            ("host", "host_id,status,type"),
            ("ip", "ip_id,ip_addr,ip_type"),
            ("image", "img_id,img_type,img_name,os_type,img_size,bt_size"),
            ("instance", "inst_id,inst_type,inst_status,host_id,task_id"),
            ("task", "task_id,task_status"),
            ("host_load", "host_id,item_id,value"),
            ("host_ip", "host_id,ip_id,bind_mac"),
            ("host_img", "host_id,img_id"),
        ] {
            connection.prepare(&format!("SELECT {columns} FROM {table}")).unwrap();
        }
    }

    #[test]
    fn what_cannot_be_used_is_refused_with_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let newer = dir.path().join("newer");
        Connection::open(&newer).unwrap().pragma_update(None, "user_version", 99).unwrap();
        assert!(Database::open(&newer).unwrap_err().to_string().contains("newer bootcache"));
        let garbage = dir.path().join("garbage");
        std::fs::write(&garbage, "this is no database, and it is long enough to be looked at as one")
            .unwrap();
        assert!(Database::open(&garbage).unwrap_err().to_string().contains("garbage"));
        let missing = Database::open(&dir.path().join("no/such/folder")).unwrap_err().to_string();
        assert!(missing.contains("cannot open"), "{missing}");
    }

    #[tokio::test]
    async fn a_node_that_boasts_of_a_number_leaves_numbers_for_more_tasks() {
        let dir = tempfile::tempdir().unwrap();
        let database = Database::open(&dir.path().join("db")).unwrap();
        let plan = "name = 'lab'\n[[groups]]\nname = 'g'\ntype = 'vm'\nimage = 'debian'";
        let plan = crate::plan::read::parse(plan).unwrap();
        let work = move |tx: &Transaction<'_>| {
            let mut made = Vec::new();
            for (request, last) in [("r1", 41), ("r2", 7), ("r3", i64::MAX), ("r4", i64::MIN)] {
                tasks::pass_over(tx, last)?;
                let new = NewTask { request, plan: &plan, now: 1 };
                made.push(create_task::<DatabaseError>(tx, &new, |_| Ok(std::collections::BTreeMap::new()))?);
            }
            Ok::<_, DatabaseError>(made)
        };
        assert_eq!(database.run(work).await.unwrap(), [42, 43, 1_000_044, 1_000_045]);
    }

    #[tokio::test]
    async fn an_error_undoes_all_of_a_piece_of_work() {
        let dir = tempfile::tempdir().unwrap();
        let database = Database::open(&dir.path().join("db")).unwrap();
        let result: Result<()> = database
            .run(|tx| {
                set(tx, "a", "1")?;
                Err(DatabaseError::Content("no".into()))
            })
            .await;
        result.unwrap_err();
        let value: String = database.run(|tx| setting(tx, "a", || "first".into())).await.unwrap();
        assert_eq!(value, "first");
    }
}
