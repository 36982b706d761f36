//! Several hosts on one machine: network namespaces on one bridge, each link shaped in both directions.
//!
//! veth has no round-trip time to speak of, and segmentation offload stays on (the shaper cuts the segments up).
//! Say [`Net::goodput`] beside what is measured here.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// What a link lets through, in each direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rate {
    Megabits(u32),
    Unlimited,
}

/// Hosts `0..n` with the addresses 10.77.0.1, 10.77.0.2, …; gone on drop, with every process still in them.
#[derive(Debug)]
pub struct Net {
    prefix: String,
    hosts: usize,
}

impl Net {
    #[track_caller]
    pub fn new(hosts: usize, rate: Rate) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        remove_abandoned();
        let prefix = format!("bct-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let net = Self { prefix, hosts };
        let switch = net.switch();
        ip(&["netns", "add", &switch]);
        ip(&["-n", &switch, "link", "add", "bridge", "type", "bridge"]);
        ip(&["-n", &switch, "link", "set", "bridge", "up"]);
        for host in 0..hosts {
            let (name, port) = (net.namespace(host), format!("port{host}"));
            ip(&["netns", "add", &name]);
            ip(&["-n", &name, "link", "set", "lo", "up"]);
            ip(&[
                "-n", &switch, "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &name,
            ]);
            ip(&["-n", &switch, "link", "set", &port, "master", "bridge", "up"]);
            ip(&["-n", &name, "addr", "add", &format!("{}/24", net.address(host)), "dev", "eth0"]);
            ip(&["-n", &name, "link", "set", "eth0", "up"]);
            net.shape(host, rate);
        }
        net
    }

    /// Gives every host a second interface, `eth1`, without an address, on a switch of its own: an uplink for networks of
    /// instances, since an interface with the host's address cannot be in a bridge. Shaped in both directions too.
    #[track_caller]
    pub fn add_uplinks(&self, rate: Rate) {
        let switch = self.switch();
        ip(&["-n", &switch, "link", "add", "uplinks", "type", "bridge"]);
        ip(&["-n", &switch, "link", "set", "uplinks", "up"]);
        for host in 0..self.hosts {
            let (name, port) = (self.namespace(host), format!("uplink{host}"));
            ip(&[
                "-n", &switch, "link", "add", &port, "type", "veth", "peer", "name", "eth1", "netns", &name,
            ]);
            ip(&["-n", &switch, "link", "set", &port, "master", "uplinks", "up"]);
            shape(&name, "eth1", rate);
            shape(&switch, &port, rate);
        }
    }

    /// Changes a host's link, both directions.
    #[track_caller]
    pub fn shape(&self, host: usize, rate: Rate) {
        shape(&self.namespace(host), "eth0", rate);
        shape(&self.switch(), &format!("port{host}"), rate);
    }

    /// Pulls a host's cable, or puts it back.
    #[track_caller]
    pub fn connect(&self, host: usize, connected: bool) {
        ip(&[
            "-n",
            &self.switch(),
            "link",
            "set",
            &format!("port{host}"),
            if connected { "up" } else { "down" },
        ]);
    }

    pub fn address(&self, host: usize) -> IpAddr {
        assert!(host < self.hosts, "hosts are 0..{}", self.hosts);
        IpAddr::V4(Ipv4Addr::new(10, 77, 0, u8::try_from(host + 1).expect("fewer than 254 hosts")))
    }

    /// The name for `ip netns` and below `/run/netns`.
    pub fn namespace(&self, host: usize) -> String {
        format!("{}-{host}", self.prefix)
    }

    fn switch(&self) -> String {
        format!("{}-sw", self.prefix)
    }

    /// A command that will run on the host; it keeps this machine's file system and process ids.
    pub fn on(&self, host: usize, command: &Command) -> Command {
        let mut there = Command::new("nsenter");
        there.arg(format!("--net=/run/netns/{}", self.namespace(host))).arg("--");
        there.arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => there.env(name, value),
                None => there.env_remove(name),
            };
        }
        there
    }

    /// Runs `work` on a thread that lives on the host: its sockets are the host's.
    pub fn within<T: Send>(&self, host: usize, work: impl FnOnce() -> T + Send) -> T {
        let path = format!("/run/netns/{}", self.namespace(host));
        std::thread::scope(|scope| {
            let there = scope.spawn(|| {
                let namespace = std::fs::File::open(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
                rustix::thread::move_into_link_name_space(
                    std::os::fd::AsFd::as_fd(&namespace),
                    Some(rustix::thread::LinkNameSpaceType::Network),
                )
                .expect("root may enter a namespace");
                work()
            });
            there.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Bytes that a host has sent and received on its link, headers included.
    pub fn traffic(&self, host: usize) -> (u64, u64) {
        let text = super::run(Command::new("ip").args([
            "-n",
            &self.namespace(host),
            "-s",
            "-j",
            "link",
            "show",
            "eth0",
        ]));
        let links: serde_json::Value = serde_json::from_str(&text).expect("JSON from ip");
        let bytes = |way: &str| links[0]["stats64"][way]["bytes"].as_u64().expect("a counter");
        (bytes("tx"), bytes("rx"))
    }

    /// Mbit/s that a plain TCP copy of so many bytes gets between two hosts.
    #[track_caller]
    pub fn goodput(&self, from: usize, to: usize, bytes: usize) -> f64 {
        let listener = self.within(to, || TcpListener::bind((self.address(to), 0)).expect("a free port"));
        let address: SocketAddr = listener.local_addr().expect("it is bound");
        let receiver = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("the sender connects");
            std::io::copy(&mut stream, &mut std::io::sink()).expect("a whole copy");
        });
        let began = Instant::now();
        let mut stream = self.within(from, || {
            TcpStream::connect_timeout(&address, Duration::from_secs(5)).expect("the receiver listens")
        });
        let piece = vec![0x5a; 1 << 16];
        let mut left = bytes;
        while left > 0 {
            let length = left.min(piece.len());
            stream.write_all(&piece[..length]).expect("the receiver reads");
            left -= length;
        }
        drop(stream);
        receiver.join().expect("the receiver saw the end");
        bytes as f64 * 8.0 / 1e6 / began.elapsed().as_secs_f64()
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for name in (0..self.hosts).map(|host| self.namespace(host)).chain([self.switch()]) {
            remove(&name);
        }
    }
}

/// Changes what a device lets out.
#[track_caller]
fn shape(namespace: &str, device: &str, rate: Rate) {
    match rate {
        Rate::Unlimited => {
            let mut command = Command::new("/sbin/tc");
            let _none_there = command.args(["-n", namespace, "qdisc", "del", "dev", device, "root"]).output();
        }
        Rate::Megabits(rate) => {
            let burst = if rate > 300 { "256kb" } else { "32kb" };
            super::run(
                Command::new("/sbin/tc")
                    .args(["-n", namespace, "qdisc", "replace", "dev", device, "root", "tbf"])
                    .args(["rate", &format!("{rate}mbit"), "burst", burst, "latency", "20ms"]),
            );
        }
    }
}

/// Ends what still runs in a namespace, and removes it.
fn remove(name: &str) {
    if let Ok(output) = Command::new("ip").args(["netns", "pids", name]).output() {
        for pid in String::from_utf8_lossy(&output.stdout).split_whitespace() {
            let pid = pid.parse().ok().and_then(rustix::process::Pid::from_raw);
            if let Some(pid) = pid {
                let _already_gone = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }
    let _already_gone = Command::new("ip").args(["netns", "del", name]).output();
}

/// Namespaces of a test program that was itself killed.
fn remove_abandoned() {
    let Ok(names) = std::fs::read_dir("/run/netns") else { return };
    for name in names.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        let owner = name.strip_prefix("bct-").and_then(|rest| rest.split('-').next());
        if owner.is_some_and(|pid| !std::path::Path::new("/proc").join(pid).exists()) {
            remove(&name);
        }
    }
}

#[track_caller]
fn ip(arguments: &[&str]) {
    super::run(Command::new("/sbin/ip").args(arguments));
}
