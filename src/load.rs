//! This host's load, as the kernel counts it: what the choice of a source weighs (thesis, section 3.3).
//!
//! Four items, each scaled to [0, 1]: processor time not idle, memory not available, time in which the busiest disk had
//! requests, and bytes over the busiest network interface against its speed. All but memory are rates between two samples.
//!
//! The interfaces are those of devices: a tap's speed is a number that its driver made up, and what a VM sends to
//! another host goes over a device too. Samples are taken on a thread of their own: the kernel answers for an
//! interface's speed when nobody else changes interfaces, and whoever asks for the load has requests to answer.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;

use crate::peer::message::Load;

/// A sample older than this is followed by another.
const INTERVAL: Duration = Duration::from_secs(1);
/// Speed of a network interface that does not say, in bits per second.
const SPEED_UNKNOWN: f64 = 1e9;
/// What the kernel says of each network interface.
const INTERFACES: &str = "/sys/class/net";

/// Takes samples of this host's load. Owner of the last one.
#[derive(Debug)]
pub struct Sampler {
    last: Arc<Mutex<Last>>,
}

#[derive(Debug)]
struct Last {
    sample: Sample,
    load: Load,
    /// Another one is being taken.
    sampling: bool,
}

/// What the kernel has counted since it started.
#[derive(Debug, Clone)]
struct Sample {
    at: Instant,
    cpu_busy: u64,
    cpu_all: u64,
    /// Milliseconds in which a disk had requests.
    disks: HashMap<String, u64>,
    interfaces: HashMap<String, Interface>,
    memory: f64,
}

#[derive(Debug, Clone, Copy)]
struct Interface {
    /// In or out, whichever are more.
    bytes: u64,
    /// Bits per second, if it says so.
    speed: Option<f64>,
}

impl Default for Sampler {
    fn default() -> Self {
        let load = Load { cpu: 0.0, memory: 0.0, disk: 0.0, network: 0.0 };
        let last = Last { sample: Sample::take(&HashMap::new()), load, sampling: false };
        Self { last: Arc::new(Mutex::new(last)) }
    }
}

impl Sampler {
    /// The load between the last two samples. Has another one taken when the last is old, and does not wait for it.
    pub fn load(&self) -> Load {
        let mut last = lock(&self.last);
        if last.sample.at.elapsed() >= INTERVAL && !last.sampling {
            last.sampling = true;
            let (shared, before) = (Arc::clone(&self.last), last.sample.clone());
            let sample = move || {
                let sample = Sample::take(&before.interfaces);
                let load = sample.since(&before);
                *lock(&shared) = Last { sample, load, sampling: false };
            };
            if let Ok(runtime) = Handle::try_current() {
                runtime.spawn_blocking(sample);
            } else {
                std::thread::spawn(sample);
            }
        }
        last.load
    }
}

fn lock(last: &Mutex<Last>) -> MutexGuard<'_, Last> {
    last.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Sample {
    /// `known` are the interfaces of the last sample: a speed is asked for until it is known. Blocks.
    fn take(known: &HashMap<String, Interface>) -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let (cpu_busy, cpu_all) = cpu(&read("/proc/stat"));
        let class = Path::new(INTERFACES);
        let interface = |(name, bytes): (String, u64)| {
            let speed = known.get(&name).and_then(|known| known.speed).or_else(|| speed(&class.join(&name)));
            (name, Interface { bytes, speed })
        };
        let interfaces = of_devices(interfaces(&read("/proc/net/dev")), class);
        let interfaces = interfaces.into_iter().map(interface).collect();
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
        let network = self.interfaces.iter().map(|(name, now)| {
            let before = earlier.interfaces.get(name).map_or(now.bytes, |before| before.bytes);
            let bits = precise(now.bytes.saturating_sub(before)) * 8.0;
            bits / now.speed.unwrap_or(SPEED_UNKNOWN) / seconds
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

/// Those of `interfaces` that are a device's, by the folder `class`; all of them when none is, as in a network namespace.
fn of_devices(mut interfaces: Vec<(String, u64)>, class: &Path) -> Vec<(String, u64)> {
    let is_device = |(name, _): &(String, u64)| class.join(name).join("device").exists();
    if interfaces.iter().any(is_device) {
        interfaces.retain(is_device);
    }
    interfaces
}

/// What the interface whose folder is `dir` says of its speed, in bits per second. Blocks while interfaces change.
fn speed(dir: &Path) -> Option<f64> {
    let megabits: f64 = fs::read_to_string(dir.join("speed")).ok()?.trim().parse().ok()?;
    (megabits > 0.0).then_some(megabits * 1e6)
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

    /// Once, a VM that sent 10 Mbit/s over its tap was a node whose network was full.
    #[test]
    fn a_tap_counts_only_where_there_is_no_device() {
        let class = tempfile::tempdir().unwrap();
        fs::create_dir_all(class.path().join("eth0/device")).unwrap();
        fs::create_dir_all(class.path().join("vnet0")).unwrap();
        fs::write(class.path().join("eth0/speed"), "25000\n").unwrap();
        fs::write(class.path().join("vnet0/speed"), "-1\n").unwrap();
        let named = |name: &str| (name.to_owned(), 1);
        let (eth0, vnet0) = (named("eth0"), named("vnet0"));
        assert_eq!(of_devices(vec![eth0.clone(), vnet0.clone()], class.path()), [eth0]);
        assert_eq!(of_devices(vec![vnet0.clone()], class.path()), [vnet0]);
        assert_eq!(speed(&class.path().join("eth0")), Some(25e9));
        assert_eq!(speed(&class.path().join("vnet0")), None);
    }

    #[test]
    fn a_sample_of_this_host_lies_between_0_and_1() {
        let before = Sample::take(&HashMap::new());
        let load = Sample::take(&before.interfaces).since(&before);
        for item in [load.cpu, load.memory, load.disk, load.network] {
            assert!((0.0..=1.0).contains(&item), "{item}");
        }
    }
}
