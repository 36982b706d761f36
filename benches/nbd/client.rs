//! The client: fio with libnbd, and what it and the server's CPU clock say.

use std::process::Command;

use super::servers::Running;
use super::workloads::Workload;

/// What one run came to.
#[derive(Debug, Clone, serde::Serialize)]
pub(crate) struct Measured {
    /// Requests a second.
    pub(crate) requests: f64,
    /// 10⁶ bytes a second.
    pub(crate) megabytes: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    /// The server's CPU time for a request, in µs.
    pub(crate) cpu_us: f64,
    /// The server's CPU seconds for 10⁹ bytes.
    pub(crate) cpu_seconds_per_gb: f64,
}

/// Runs a workload for `seconds`, after one second that does not count.
pub(crate) fn run(server: &Running, workload: &Workload, seconds: u32) -> Measured {
    fio(server, workload, 1);
    let before = server.cpu_seconds();
    let job = fio(server, workload, seconds);
    let cpu = server.cpu_seconds() - before;
    let side = &job["jobs"][0][if workload.kind.contains("write") { "write" } else { "read" }];
    let number = |value: &serde_json::Value| value.as_f64().unwrap_or_else(|| panic!("{side:#}"));
    let (count, bytes) = (number(&side["total_ios"]), number(&side["io_bytes"]));
    let percentile = |name: &str| number(&side["clat_ns"]["percentile"][name]) / 1000.0;
    Measured {
        requests: number(&side["iops"]),
        megabytes: number(&side["bw_bytes"]) / 1e6,
        p50_us: percentile("50.000000"),
        p99_us: percentile("99.000000"),
        cpu_us: cpu / count * 1e6,
        cpu_seconds_per_gb: cpu / bytes * 1e9,
    }
}

fn fio(server: &Running, workload: &Workload, seconds: u32) -> serde_json::Value {
    let mut fio = Command::new("fio");
    fio.args(["--name=job", "--ioengine=nbd", "--time_based", "--group_reporting", "--output-format=json"])
        .args(["--thread", "--randrepeat=0", "--norandommap", "--percentile_list=50:99"])
        .arg(format!("--uri={}", server.uri))
        .arg(format!("--rw={}", workload.kind))
        .arg(format!("--bs={}", workload.size))
        .arg(format!("--iodepth={}", workload.depth))
        .arg(format!("--numjobs={}", workload.connections))
        .arg(format!("--runtime={seconds}"))
        .current_dir(&server.folder);
    let text = super::support::run(&mut fio);
    // libnbd may print notes before fio's own output.
    let start = text.find('{').unwrap_or_else(|| panic!("fio printed no figures:\n{text}"));
    serde_json::from_str(&text[start..]).unwrap_or_else(|error| panic!("{error}:\n{text}"))
}
