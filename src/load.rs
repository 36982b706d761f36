//! This host's load, as the kernel counts it: what the choice of a source weighs (thesis, section 3.3).
//!
//! Four items, each scaled to [0, 1]: processor time not idle, memory not available, time in which the busiest disk had
//! requests, and bytes over the busiest network interface against its speed. All but memory are rates between two samples.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::peer::message::Load;

/// Samples closer to each other than this are the same one.
const INTERVAL: Duration = Duration::from_millis(500);
/// Speed of a network interface that does not say, in bits per second.
const SPEED_UNKNOWN: f64 = 1e9;

/// Takes samples of this host's load. Owner of the last one.
#[derive(Debug)]
pub struct Sampler {
    last: Mutex<(Sample, Load)>,
}

/// What the kernel has counted since it started.
#[derive(Debug, Clone)]
struct Sample {
    at: Instant,
    cpu_busy: u64,
    cpu_all: u64,
    /// Milliseconds in which a disk had requests.
    disks: HashMap<String, u64>,
    /// Bytes in and out of an interface, and its speed in bits per second.
    interfaces: HashMap<String, (u64, f64)>,
    memory: f64,
}

impl Default for Sampler {
    fn default() -> Self {
        let load = Load { cpu: 0.0, memory: 0.0, disk: 0.0, network: 0.0 };
        Self { last: Mutex::new((Sample::take(), load)) }
    }
}

impl Sampler {
    /// The load since the last sample; reads a handful of files of `/proc` and `/sys`.
    pub fn load(&self) -> Load {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.0.at.elapsed() >= INTERVAL {
            let now = Sample::take();
            last.1 = now.since(&last.0);
            last.0 = now;
        }
        last.1
    }
}

impl Sample {
    fn take() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let (cpu_busy, cpu_all) = cpu(&read("/proc/stat"));
        let interfaces = interfaces(&read("/proc/net/dev"))
            .into_iter()
            .map(|(interface, bytes)| {
                let megabits = fs::read_to_string(Path::new("/sys/class/net").join(&interface).join("speed"))
                    .ok()
                    .and_then(|text| text.trim().parse::<f64>().ok())
                    .filter(|speed| *speed > 0.0);
                (interface, (bytes, megabits.map_or(SPEED_UNKNOWN, |speed| speed * 1e6)))
            })
            .collect();
        Self {
            at: Instant::now(),
            cpu_busy,
            cpu_all,
            disks: disks(&read("/proc/diskstats")),
            interfaces,
            memory: memory(&read("/proc/meminfo")),
        }
    }

    fn since(&self, earlier: &Self) -> Load {
        let seconds = self.at.duration_since(earlier.at).as_secs_f64().max(1e-3);
        let all = self.cpu_all.saturating_sub(earlier.cpu_all).max(1);
        let busy = self.cpu_busy.saturating_sub(earlier.cpu_busy);
        let disk = self.disks.iter().map(|(name, now)| {
            let before = earlier.disks.get(name).copied().unwrap_or(*now);
            precise(now.saturating_sub(before)) / 1000.0 / seconds
        });
        let network = self.interfaces.iter().map(|(name, (now, speed))| {
            let before = earlier.interfaces.get(name).map_or(*now, |(bytes, _)| *bytes);
            precise(now.saturating_sub(before)) * 8.0 / speed / seconds
        });
        Load {
            cpu: scaled(precise(busy) / precise(all)),
            memory: scaled(self.memory),
            disk: scaled(disk.fold(0.0, f64::max)),
            network: scaled(network.fold(0.0, f64::max)),
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "a load needs three digits")]
const fn precise(count: u64) -> f64 {
    count as f64
}

#[expect(clippy::cast_possible_truncation, reason = "it lies between 0 and 1")]
const fn scaled(value: f64) -> f32 {
    value.clamp(0.0, 1.0) as f32
}

/// Busy time and all time of `/proc/stat`, in ticks.
fn cpu(stat: &str) -> (u64, u64) {
    let line = stat.lines().next().unwrap_or_default();
    let times: Vec<u64> =
        line.split_whitespace().skip(1).take(8).filter_map(|text| text.parse().ok()).collect();
    let all = times.iter().sum();
    let idle: u64 = times.iter().skip(3).take(2).sum();
    (all - idle, all)
}

/// Milliseconds in which each whole disk of `/proc/diskstats` had requests.
fn disks(stats: &str) -> HashMap<String, u64> {
    let disk = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let name = *words.get(2)?;
        let made_up = ["loop", "ram", "zram", "dm-", "md", "nbd"].iter().any(|kind| name.starts_with(kind));
        if made_up { None } else { Some((name.to_owned(), words.get(12)?.parse().ok()?)) }
    };
    stats.lines().filter_map(disk).collect()
}

/// Bytes in and out of each interface of `/proc/net/dev` but the loopback.
fn interfaces(dev: &str) -> Vec<(String, u64)> {
    let interface = |line: &str| {
        let (name, counts) = line.split_once(':')?;
        let counts: Vec<u64> = counts.split_whitespace().filter_map(|text| text.parse().ok()).collect();
        let name = name.trim();
        if name == "lo" { None } else { Some((name.to_owned(), (*counts.first()?).max(*counts.get(8)?))) }
    };
    dev.lines().filter_map(interface).collect()
}

/// The part of memory that is not available, by `/proc/meminfo`.
fn memory(info: &str) -> f64 {
    let kib = |name: &str| {
        let line = info.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim_start_matches(':').split_whitespace().next()?.parse::<f64>().ok()
    };
    match (kib("MemTotal"), kib("MemAvailable")) {
        (Some(total), Some(available)) if total > 0.0 => 1.0 - available / total,
        _ => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_s_files_are_read() {
        assert_eq!(cpu("cpu  10 0 10 70 10 0 0 0 5 5\ncpu0 1\n"), (20, 100));
        assert!((memory("MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 250 kB\n") - 0.75).abs() < 1e-9);
        let stats = "   8 0 sda 1 2 3 4 5 6 7 8 9 1234 11\n   7 0 loop0 1 2 3 4 5 6 7 8 9 99 11\n";
        assert_eq!(disks(stats), HashMap::from([("sda".to_owned(), 1234)]));
        let dev = "Inter-|\n face |\n lo: 5 0 0 0 0 0 0 0 5 0\n eth0: 10 0 0 0 0 0 0 0 30 0\n";
        assert_eq!(interfaces(dev), vec![("eth0".to_owned(), 30)]);
    }

    #[test]
    fn a_sample_of_this_host_lies_between_0_and_1() {
        let sampler = Sampler::default();
        let load = sampler.load();
        for item in [load.cpu, load.memory, load.disk, load.network] {
            assert!((0.0..=1.0).contains(&item), "{item}");
        }
    }
}
