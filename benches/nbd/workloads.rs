//! What is asked of the servers.

/// One fio job.
pub(crate) struct Workload {
    pub(crate) name: &'static str,
    /// fio's `rw`.
    pub(crate) kind: &'static str,
    /// Bytes of a request.
    pub(crate) size: u32,
    /// Requests in flight on each connection.
    pub(crate) depth: u32,
    pub(crate) connections: u32,
    /// On an overlay over the file instead of on the file.
    pub(crate) overlay: bool,
}

const fn workload(
    name: &'static str,
    kind: &'static str,
    size: u32,
    depth: u32,
    connections: u32,
) -> Workload {
    Workload { name, kind, size, depth, connections, overlay: false }
}

pub(crate) const WORKLOADS: &[Workload] = &[
    workload("4 KiB read, depth 1", "randread", 4 << 10, 1, 1),
    workload("4 KiB read, depth 16", "randread", 4 << 10, 16, 1),
    workload("4 KiB read, depth 64", "randread", 4 << 10, 64, 1),
    workload("4 KiB read, 4 × depth 16", "randread", 4 << 10, 16, 4),
    workload("4 KiB read, 8 × depth 16", "randread", 4 << 10, 16, 8),
    workload("64 KiB read, depth 16", "randread", 64 << 10, 16, 1),
    workload("1 MiB read in order, depth 4", "read", 1 << 20, 4, 1),
    workload("1 MiB write in order, depth 4", "write", 1 << 20, 4, 1),
    workload("4 KiB write, depth 16", "randwrite", 4 << 10, 16, 1),
    Workload { overlay: true, ..workload("4 KiB overlay write, depth 16", "randwrite", 4 << 10, 16, 1) },
    Workload { overlay: true, ..workload("4 KiB overlay read, depth 16", "randread", 4 << 10, 16, 1) },
];
