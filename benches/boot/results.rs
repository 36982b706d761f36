//! What was measured, kept: a file of JSON lines for each table, its setting first, then a line for each boot.
//!
//! A line is written when its boot is over, so that a run cut short loses nothing and the next goes on where it was. The
//! rows of a table are of one build of bootcache: another build starts the table anew and keeps the old file as `.old`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::boot::Boot;
use super::setting::Setting;

/// The first line.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Head {
    pub(crate) setting: Setting,
    /// Digest of the program that was measured.
    pub(crate) build: String,
    /// Of the rivals.
    pub(crate) versions: Vec<String>,
    pub(crate) machine: String,
    /// The recorded boot's own time, thinking already divided.
    pub(crate) local_ms: f64,
    /// The compressed boot set.
    pub(crate) stream_bytes: u64,
    /// What the boot reads.
    pub(crate) read_bytes: u64,
    /// Data of the disk, its holes left out.
    pub(crate) disk_bytes: u64,
}

/// A line after it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) way: String,
    pub(crate) round: usize,
    /// Payload bytes a second of a plain TCP copy, on the day.
    pub(crate) goodput: u64,
    /// How long a boot must wait on this link.
    pub(crate) bound_ms: f64,
    /// What it took with all that was set up for it.
    pub(crate) all_seconds: f64,
    pub(crate) commands: Vec<String>,
    /// None if it failed, for this reason.
    pub(crate) boot: Option<Boot>,
    pub(crate) error: Option<String>,
}

/// A table's file.
#[derive(Debug)]
pub(crate) struct Results {
    path: PathBuf,
    pub(crate) head: Option<Head>,
    pub(crate) records: Vec<Record>,
}

impl Results {
    /// What there is of `setting` in `folder`; nothing if there is no file.
    pub(crate) fn open(folder: &Path, setting: &Setting) -> Self {
        Self::read(folder.join(format!("{}.jsonl", setting.key())))
    }

    /// A line that was cut off, and what follows it, does not count.
    fn read(path: PathBuf) -> Self {
        let text = fs::read_to_string(&path).unwrap_or_default();
        let mut lines = text.lines();
        let head = lines.next().and_then(|line| serde_json::from_str(line).ok());
        let records = lines.map_while(|line| serde_json::from_str(line).ok()).collect();
        Self { path, head, records }
    }

    /// All of a folder, by name.
    pub(crate) fn all(folder: &Path) -> Vec<Self> {
        let entries = fs::read_dir(folder).map(|entries| entries.flatten().collect::<Vec<_>>());
        let mut paths: Vec<PathBuf> = entries.unwrap_or_default().iter().map(fs::DirEntry::path).collect();
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "jsonl"));
        paths.sort();
        paths.into_iter().map(Self::read).filter(|results| results.head.is_some()).collect()
    }

    /// Whether a boot of this way was tried in this round.
    pub(crate) fn has(&self, way: &str, round: usize) -> bool {
        self.of(way).any(|record| record.round == round)
    }

    pub(crate) fn of<'a>(&'a self, way: &'a str) -> impl Iterator<Item = &'a Record> {
        self.records.iter().filter(move |record| record.way == way)
    }

    /// Boots of `way` that went well, in the order of their rounds.
    pub(crate) fn boots(&self, way: &str) -> Vec<(usize, &Boot)> {
        let of_way = self.records.iter().filter(|record| record.way == way);
        let mut boots: Vec<(usize, &Boot)> =
            of_way.filter_map(|record| Some((record.round, record.boot.as_ref()?))).collect();
        boots.sort_by_key(|(round, _)| *round);
        boots
    }

    /// Sets aside what is of another build or setting, and writes the first line if there is none. What failed is
    /// forgotten, to be tried again.
    pub(crate) fn begin(&mut self, head: Head) -> io::Result<()> {
        let same = |old: &Head| old.build == head.build && old.setting == head.setting;
        if self.head.as_ref().is_some_and(same) {
            self.records.retain(|record| record.boot.is_some());
            let text: String = self.records.iter().map(line).collect();
            let head = self.head.as_ref().expect("it is there");
            return fs::write(&self.path, line(head) + &text);
        }
        if self.path.exists() {
            fs::rename(&self.path, self.path.with_extension("old"))?;
        }
        fs::create_dir_all(self.path.parent().expect("it is in a folder"))?;
        fs::write(&self.path, line(&head))?;
        self.records.clear();
        self.head = Some(head);
        Ok(())
    }

    pub(crate) fn add(&mut self, record: Record) -> io::Result<()> {
        let mut file: File = OpenOptions::new().append(true).open(&self.path)?;
        file.write_all(line(&record).as_bytes())?;
        self.records.push(record);
        Ok(())
    }
}

fn line(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("plain data") + "\n"
}
