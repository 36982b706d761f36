//! What an agent was ordered to do, and how far it is, on disk: one file a task, replaced whole.
//!
//! ```text
//! DIR/cluster             the cluster whose orders are taken
//! DIR/tasks/N.json        the part of task N: Record
//! ```
//!
//! An order is written down before it is carried out, and a launch before it is reported. A file that cannot be read is
//! an error at the start: nothing is guessed about instances that may be running.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::name::HostName;
use crate::store::write_atomic;
use crate::wire::cluster::Part;

const VERSION: u32 = 1;

/// How far an instance is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Step {
    /// It has still to be started; perhaps a start was half-done.
    #[default]
    Preparing,
    /// Its hypervisor has taken it.
    Launched,
    /// It was up.
    Up,
    /// It has ended.
    Stopped,
    /// It could not be started, or did not come up.
    Failed(String),
}

/// A task's file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    version: u32,
    pub(super) task: i64,
    /// It is being ended.
    pub(super) ending: bool,
    pub(super) part: Part,
    pub(super) steps: BTreeMap<HostName, Step>,
}

impl Record {
    pub(super) fn new(task: i64, part: Part) -> Self {
        let steps = part.instances.iter().map(|instance| (instance.name.clone(), Step::Preparing)).collect();
        Self { version: VERSION, task, ending: false, part, steps }
    }
}

/// Why the folder cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// A file cannot be used.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A file is not one that an agent of this version wrote.
    #[error("{} is damaged, or of another version ({reason}): end what it names by hand, and remove it", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// The folder. Owner of its files.
#[derive(Debug)]
pub(super) struct Journal {
    dir: PathBuf,
}

impl Journal {
    pub(super) fn open(dir: &Path) -> Result<Self, JournalError> {
        let journal = Self { dir: dir.to_owned() };
        let tasks = journal.tasks_dir();
        let at = |source| JournalError::Io { path: tasks.clone(), source };
        std::fs::create_dir_all(&tasks).map_err(at)?;
        for entry in std::fs::read_dir(&tasks).map_err(at)? {
            let path = entry.map_err(at)?.path();
            // What a kill has left of a file that was about to replace another.
            if path.extension().is_some_and(|extension| extension == "new") {
                std::fs::remove_file(&path).map_err(at)?;
            }
        }
        Ok(journal)
    }

    fn tasks_dir(&self) -> PathBuf {
        self.dir.join("tasks")
    }

    fn path(&self, task: i64) -> PathBuf {
        self.tasks_dir().join(format!("{task}.json"))
    }

    /// The cluster whose orders are taken.
    pub(super) fn cluster(&self) -> Result<Option<String>, JournalError> {
        let path = self.dir.join("cluster");
        match std::fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text.trim().to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(JournalError::Io { path, source }),
        }
    }

    pub(super) fn set_cluster(&self, cluster: &str) -> Result<(), JournalError> {
        self.write(&self.dir.join("cluster"), cluster.as_bytes())
    }

    /// All tasks that were ordered and have not gone.
    pub(super) fn records(&self) -> Result<Vec<Record>, JournalError> {
        let dir = self.tasks_dir();
        let at = |source| JournalError::Io { path: dir.clone(), source };
        let mut records = Vec::new();
        for entry in std::fs::read_dir(&dir).map_err(at)? {
            let path = entry.map_err(at)?.path();
            if path.extension().is_some_and(|extension| extension == "json") {
                records.push(read(&path)?);
            }
        }
        records.sort_by_key(|record| record.task);
        Ok(records)
    }

    /// Writes a task down, durably.
    pub(super) fn save(&self, record: &Record) -> Result<(), JournalError> {
        let bytes = serde_json::to_vec(record).expect("a record has nothing that JSON does not take");
        self.write(&self.path(record.task), &bytes)
    }

    /// Forgets a task of which nothing is left.
    pub(super) fn forget(&self, task: i64) -> Result<(), JournalError> {
        let path = self.path(task);
        match std::fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(JournalError::Io { path, source }),
            _ => Ok(()),
        }
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> Result<(), JournalError> {
        write_atomic(path, bytes).map_err(|source| JournalError::Io { path: path.to_owned(), source })
    }
}

fn read(path: &Path) -> Result<Record, JournalError> {
    let damaged = |reason: String| JournalError::Damaged { path: path.to_owned(), reason };
    let bytes = std::fs::read(path).map_err(|source| JournalError::Io { path: path.to_owned(), source })?;
    let record: Record = serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
    if record.version == VERSION { Ok(record) } else { Err(damaged(format!("version {}", record.version))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(task: i64) -> Record {
        let part = Part {
            networks: Vec::new(),
            images: Vec::new(),
            common: Vec::new(),
            instances: Vec::new(),
            report: None,
        };
        Record::new(task, part)
    }

    #[test]
    fn what_was_written_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        assert_eq!(journal.cluster().unwrap(), None);
        journal.set_cluster("c1").unwrap();
        let mut first = record(1);
        first.steps.insert("vm".parse().unwrap(), Step::Failed("why".into()));
        journal.save(&first).unwrap();
        journal.save(&record(2)).unwrap();
        let again = Journal::open(dir.path()).unwrap();
        assert_eq!(again.cluster().unwrap().as_deref(), Some("c1"));
        assert_eq!(again.records().unwrap(), [first, record(2)]);
        again.forget(1).unwrap();
        again.forget(1).unwrap();
        assert_eq!(again.records().unwrap(), [record(2)]);
    }

    #[test]
    fn a_file_that_was_half_written_at_a_kill_goes() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        journal.save(&record(1)).unwrap();
        std::fs::write(dir.path().join("tasks/.1.json.77.0.new"), "{").unwrap();
        let again = Journal::open(dir.path()).unwrap();
        assert_eq!(again.records().unwrap(), [record(1)]);
        assert_eq!(std::fs::read_dir(dir.path().join("tasks")).unwrap().count(), 1);
    }

    #[test]
    fn a_damaged_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        journal.save(&record(1)).unwrap();
        let path = dir.path().join("tasks/1.json");
        let text = std::fs::read_to_string(&path).unwrap();
        for broken in [&text[..text.len() / 2], &text.replace("\"version\":1", "\"version\":9"), ""] {
            std::fs::write(&path, broken).unwrap();
            let error = journal.records().unwrap_err().to_string();
            assert!(error.contains("1.json is damaged"), "{error}");
        }
    }
}
