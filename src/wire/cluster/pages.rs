//! Lists that are longer than a frame: how the rest of one is asked for.

use super::{Found, Query};

impl Query {
    /// All nodes.
    pub const fn nodes() -> Self {
        Self::Nodes { after: None }
    }

    /// All images.
    pub const fn images() -> Self {
        Self::Images { after: None }
    }

    /// All tasks, or one.
    pub const fn tasks(task: Option<i64>) -> Self {
        Self::Tasks { task, after: None }
    }

    /// All instances, or those of one task.
    pub const fn instances(task: Option<i64>) -> Self {
        Self::Instances { task, after: None }
    }

    /// What asks for the rows behind those of `found`, which answered this; `None` when that was all.
    pub fn behind(&self, found: &Found) -> Option<Self> {
        match (self, found) {
            (Self::Nodes { .. }, Found::Nodes(rows)) => {
                rows.last().map(|row| Self::Nodes { after: Some(row.name.clone()) })
            }
            (Self::Images { .. }, Found::Images(rows)) => {
                rows.last().map(|row| Self::Images { after: Some(row.name.clone()) })
            }
            (Self::Tasks { task: None, .. }, Found::Tasks(rows)) => {
                rows.last().map(|row| Self::Tasks { task: None, after: Some(row.task) })
            }
            (Self::Instances { task, .. }, Found::Instances(rows)) => {
                rows.last().map(|row| Self::Instances { task: *task, after: Some(row.inst_id) })
            }
            _ => None,
        }
    }
}

impl Found {
    /// Adds the rows of `more`; false if they are of another list.
    pub fn extend(&mut self, more: Self) -> bool {
        match (self, more) {
            (Self::Nodes(rows), Self::Nodes(more)) => rows.extend(more),
            (Self::Images(rows), Self::Images(more)) => rows.extend(more),
            (Self::Tasks(rows), Self::Tasks(more)) => rows.extend(more),
            (Self::Instances(rows), Self::Instances(more)) => rows.extend(more),
            _ => return false,
        }
        true
    }
}
