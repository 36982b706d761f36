//! What an agent was ordered to do, and how far it is, on disk: one file a task, replaced whole.
//!
//! ```text
//! DIR/node                the name of the node, by which what it runs is marked
//! DIR/cluster             the cluster whose orders are taken
//! DIR/tasks/N.json        the part of task N: Record
//! DIR/ended.json          the last tasks of a cluster that have ended here: Ended
//! ```
//!
//! An order is written down before it is carried out, and a launch before it is reported. A file that cannot be read is
//! an error at the start: nothing is guessed about instances that may be running.

use std::collections::{BTreeMap, BTreeSet};
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
    /// Whose task it is; what was written down before it said so is the cluster's that the agent belongs to.
    #[serde(default)]
    pub(super) cluster: Option<String>,
    pub(super) task: i64,
    /// It is being ended.
    pub(super) ending: bool,
    pub(super) part: Part,
    pub(super) steps: BTreeMap<HostName, Step>,
}

impl Record {
    pub(super) fn new(cluster: Option<String>, task: i64, part: Part) -> Self {
        let steps = part.instances.iter().map(|instance| (instance.name.clone(), Step::Preparing)).collect();
        Self { version: VERSION, cluster, task, ending: false, part, steps }
    }
}

/// Tasks that have ended here and are remembered: an order that comes late starts none of them again.
const ENDED_MAX: usize = 1024;

/// The last tasks of a cluster that have ended here.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Ended {
    cluster: Option<String>,
    tasks: BTreeSet<i64>,
}

impl Ended {
    /// Whether it is among them.
    pub(super) fn has(&self, cluster: Option<&str>, task: i64) -> bool {
        self.cluster.as_deref() == cluster && self.tasks.contains(&task)
    }

    /// The highest of those of the cluster.
    pub(super) fn last(&self, cluster: Option<&str>) -> Option<i64> {
        self.tasks.last().copied().filter(|_| self.cluster.as_deref() == cluster)
    }

    /// Adds a task. Those of another cluster are forgotten: one that the node has left gives it no orders.
    pub(super) fn add(&mut self, cluster: Option<&str>, task: i64) {
        if self.cluster.as_deref() != cluster {
            *self = Self { cluster: cluster.map(str::to_owned), tasks: BTreeSet::new() };
        }
        self.tasks.insert(task);
        while self.tasks.len() > ENDED_MAX {
            self.tasks.pop_first();
        }
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

    /// The name that the folder's node has, if it has one that `name` cannot take the place of: what its tasks run is found
    /// by the name, and would be taken for gone, and its disks for left over.
    pub(super) fn other_node(dir: &Path, name: &HostName) -> Result<Option<String>, JournalError> {
        let Some(node) = text(dir.join("node"))? else { return Ok(None) };
        if node == name.as_str() {
            return Ok(None);
        }
        let path = dir.join("tasks");
        let files = match std::fs::read_dir(&path) {
            Ok(files) => files,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(JournalError::Io { path, source }),
        };
        for file in files {
            let file = file.map_err(|source| JournalError::Io { path: path.clone(), source })?;
            if is_record(&file.path()) {
                return Ok(Some(node));
            }
        }
        Ok(None)
    }

    /// Notes the node's name.
    pub(super) fn set_node(&self, name: &HostName) -> Result<(), JournalError> {
        let path = self.dir.join("node");
        match text(path.clone())? {
            Some(known) if known == name.as_str() => Ok(()),
            _ => self.write(&path, name.as_str().as_bytes()),
        }
    }

    /// The cluster whose orders are taken.
    pub(super) fn cluster(&self) -> Result<Option<String>, JournalError> {
        text(self.dir.join("cluster"))
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
            if is_record(&path) {
                records.push(read(&path)?);
            }
        }
        records.sort_by_key(|record| record.task);
        Ok(records)
    }

    /// The tasks that have ended.
    pub(super) fn ended(&self) -> Result<Ended, JournalError> {
        let path = self.dir.join("ended.json");
        let damaged = |reason: String| JournalError::Damaged { path: path.clone(), reason };
        match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Ended::default()),
            Err(source) => Err(JournalError::Io { path, source }),
        }
    }

    pub(super) fn save_ended(&self, ended: &Ended) -> Result<(), JournalError> {
        let bytes = serde_json::to_vec(ended).expect("it has nothing that JSON does not take");
        self.write(&self.dir.join("ended.json"), &bytes)
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

fn is_record(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "json")
}

/// The one line of a file, if it is there.
fn text(path: PathBuf) -> Result<Option<String>, JournalError> {
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(Some(text.trim().to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(JournalError::Io { path, source }),
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
        Record::new(Some("c1".to_owned()), task, part)
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
    fn a_node_is_renamed_when_it_has_no_tasks_and_not_before() {
        let dir = tempfile::tempdir().unwrap();
        let [n4, n5] = ["n4", "n5"].map(|name| name.parse::<HostName>().unwrap());
        assert_eq!(Journal::other_node(&dir.path().join("none"), &n4).unwrap(), None);
        let journal = Journal::open(dir.path()).unwrap();
        journal.save(&record(1)).unwrap();
        assert_eq!(Journal::other_node(dir.path(), &n4).unwrap(), None, "its name was not noted yet");
        journal.set_node(&n4).unwrap();
        assert_eq!(Journal::other_node(dir.path(), &n4).unwrap(), None);
        assert_eq!(Journal::other_node(dir.path(), &n5).unwrap().as_deref(), Some("n4"));
        journal.forget(1).unwrap();
        assert_eq!(Journal::other_node(dir.path(), &n5).unwrap(), None);
        journal.set_node(&n5).unwrap();
        journal.save(&record(2)).unwrap();
        assert_eq!(Journal::other_node(dir.path(), &n4).unwrap().as_deref(), Some("n5"));
    }

    #[test]
    fn tasks_that_have_ended_are_remembered_for_their_cluster_and_not_without_end() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        let mut ended = journal.ended().unwrap();
        (1..=1100).for_each(|task| ended.add(Some("c1"), task));
        journal.save_ended(&ended).unwrap();
        let mut ended = Journal::open(dir.path()).unwrap().ended().unwrap();
        assert!(ended.has(Some("c1"), 1100) && ended.has(Some("c1"), 77) && !ended.has(Some("c1"), 76));
        assert!(!ended.has(Some("c2"), 1100));
        ended.add(Some("c2"), 1);
        assert!(ended.has(Some("c2"), 1) && !ended.has(Some("c1"), 1100));
    }

    #[test]
    fn a_record_of_before_clusters_were_noted_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        let old = r#"{"version":1,"task":1,"ending":false,"steps":{},
            "part":{"networks":[],"images":[],"instances":[],"report":null}}"#;
        std::fs::write(dir.path().join("tasks/1.json"), old).unwrap();
        assert_eq!(journal.records().unwrap()[0].cluster, None);
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
