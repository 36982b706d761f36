//! A way's boots as one row: medians, and differences within a round. Times are divided by the slow motion.

use super::boot::Boot;
use super::results::Results;
use super::statistics::{median, paired_interval};
use super::ways::{LOCAL, WAYS};

/// One way's row.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) way: String,
    pub(crate) rounds: usize,
    /// Of the last node, in seconds: the median of all rounds, and its spread.
    pub(crate) seconds: f64,
    pub(crate) least: f64,
    pub(crate) most: f64,
    /// Until there was something to boot from.
    pub(crate) ready: f64,
    /// In which at least one read had no answer, in seconds: as the replayer counts it, or bootcache for a real guest.
    pub(crate) reads: Option<f64>,
    /// In which at least one read waited for what was not there, in seconds, as bootcache counts it: of its own ways, for
    /// real guests and for the replayer alike.
    pub(crate) blocked: Option<f64>,
    /// Longer than the local boot of the same round, in seconds: the mean and half of its 95 % interval.
    pub(crate) over: Option<(f64, f64)>,
    pub(crate) wire_mb: f64,
    pub(crate) fill_mb: f64,
    pub(crate) origin_mb: f64,
    pub(crate) cpu_s: f64,
    pub(crate) memory_mb: f64,
    pub(crate) busy: f64,
}

impl Row {
    fn of(results: &Results, way: &str, slow: f64) -> Option<Self> {
        let boots = results.boots(way);
        let local = results.boots(LOCAL);
        let of = |what: &dyn Fn(&Boot) -> f64| boots.iter().map(|(_, boot)| what(boot)).collect::<Vec<_>>();
        let times = of(&|boot| boot.last() / slow);
        let pair = |(round, boot): &(usize, &Boot)| {
            let (_, beside) = local.iter().find(|(other, _)| other == round)?;
            Some((boot.last() - beside.last()) / slow)
        };
        let over: Vec<f64> = boots.iter().filter_map(pair).collect();
        let counted = |boot: &Boot| boot.waiting_ms.or(boot.blocked_ms);
        let waits: Vec<f64> = boots.iter().filter_map(|(_, boot)| counted(boot)).collect();
        let blocked: Vec<f64> = boots.iter().filter_map(|(_, boot)| boot.blocked_ms).collect();
        (!boots.is_empty()).then(|| Self {
            way: way.to_owned(),
            rounds: boots.len(),
            seconds: median(&times),
            least: times.iter().copied().fold(f64::INFINITY, f64::min),
            most: times.iter().copied().fold(0.0, f64::max),
            ready: median(&of(&|boot| boot.ready_seconds / slow)),
            reads: (!waits.is_empty()).then(|| median(&waits) / 1000.0 / slow),
            blocked: (!blocked.is_empty()).then(|| median(&blocked) / 1000.0 / slow),
            over: (over.len() > 1 && way != LOCAL).then(|| paired_interval(&over)),
            wire_mb: median(&of(&|boot| boot.wire_bytes as f64 / 1e6)),
            fill_mb: median(&of(&|boot| boot.fill_bytes as f64 / 1e6)),
            origin_mb: median(&of(&|boot| boot.origin_bytes as f64 / 1e6)),
            cpu_s: median(&of(&|boot| boot.cpu_seconds)),
            memory_mb: median(&of(&|boot| boot.memory_bytes as f64 / 1e6)),
            busy: median(&of(&|boot| boot.busy)),
        })
    }

    /// From the order to the guest's report without the guest's own thinking, as far as it was counted.
    pub(crate) fn waited(&self) -> Option<f64> {
        self.reads.map(|reads| self.ready + reads)
    }
}

/// A table that can be shown.
#[derive(Debug)]
pub(crate) struct Rows {
    pub(crate) title: String,
    pub(crate) key: String,
    pub(crate) nodes: usize,
    /// A local boot of the recorded guest, in seconds.
    pub(crate) local: f64,
    /// The least that it must wait on this link, in seconds.
    pub(crate) bound: f64,
    pub(crate) goodput_mbit: f64,
    pub(crate) slow: u32,
    pub(crate) rows: Vec<Row>,
}

impl Rows {
    /// None for a table without a first line.
    pub(crate) fn of(results: &Results) -> Option<Self> {
        let head = results.head.as_ref()?;
        let slow = f64::from(head.setting.slow);
        let of = |what: &dyn Fn(&super::results::Record) -> f64| {
            results.records.iter().map(what).collect::<Vec<_>>()
        };
        Some(Self {
            title: head.setting.title(),
            key: head.setting.key(),
            nodes: head.setting.nodes,
            local: head.local_ms / 1000.0 / slow,
            bound: median(&of(&|record| record.bound_ms)) / 1000.0 / slow,
            goodput_mbit: median(&of(&|record| record.goodput as f64)) * 8e-6 * slow,
            slow: head.setting.slow,
            rows: WAYS.iter().filter_map(|way| Row::of(results, way.name, slow)).collect(),
        })
    }

    pub(crate) fn row(&self, way: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.way == way)
    }
}
