//! The control plane's own cost: `cargo bench --bench control`.
//!
//! A heartbeat round over 1,000 nodes (their agents run in another process, over loopback), in CPU time of the controller;
//! and a choice of a source among 1,000 nodes. It fails at ten times a goal: a machine may be slow, but not that slow.
#![allow(clippy::unwrap_used, reason = "a bench ends by panicking")]

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bootcache::agent::{self, Agent, MemoryDataPlane, Services};
use bootcache::choose::{Candidate, Draw, Has, Item, Load, Need, PeerKey, Weights, by_name, eligible};
use bootcache::controller::{Controller, Options, client::Target};
use bootcache::image::manifest::ImageKind;
use bootcache::wire::cluster::{Found, Query};

const NODES: usize = 1000;
const ROUNDS: u32 = 10;
const POLL: Duration = Duration::from_secs(2);
/// CPU time of the controller for a round over all nodes.
const ROUND_GOAL: Duration = Duration::from_millis(200);
/// Time to choose a source among all nodes.
const CHOICE_GOAL: Duration = Duration::from_micros(20);
/// How many times its goal a figure may be.
const TOLERANCE: u32 = 10;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    match arguments.iter().position(|argument| argument == "--agents") {
        Some(at) => runtime.block_on(agents(arguments[at + 1].parse().unwrap())),
        None => {
            let kept = [choice(), runtime.block_on(rounds())];
            if kept.contains(&false) {
                eprintln!("a figure is beyond {TOLERANCE} times its goal");
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}

/// Prints a figure; whether it is anywhere near its goal.
fn tell(what: &str, each: Duration, goal: Duration) -> bool {
    println!("{what}: {each:.2?} (goal {goal:.0?})");
    each <= goal * TOLERANCE
}

/// The other process: all the agents.
async fn agents(controller: SocketAddr) {
    let dir = tempfile::tempdir().unwrap();
    let mut running = Vec::new();
    for number in 0..NODES {
        let name = format!("n{number}");
        let mut options = agent::Options::new(name.parse().unwrap(), dir.path().join(&name));
        options.controller = Some(Target::Tcp(controller));
        let image = MemoryDataPlane::with_image("debian".parse().unwrap(), ImageKind::Vm, 1 << 30);
        let services = Services {
            data_plane: Arc::new(image),
            hypervisors: Vec::new(),
            networks: None,
            container_images: None,
        };
        running.push(Agent::start(options, services).await.unwrap());
    }
    println!("ready");
    std::future::pending::<()>().await;
}

/// Processor time of this process, its threads that have ended too: fields 14 and 15 of `/proc/self/stat`, in 1/100 s.
fn cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let behind_name = stat.rsplit(')').next().unwrap();
    let ticks: u64 =
        behind_name.split_whitespace().skip(11).take(2).map(|field| field.parse::<u64>().unwrap()).sum();
    Duration::from_millis(ticks * 10)
}

/// A child that does not outlive this, not even when a goal is missed by a panic.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _already_gone = self.0.kill();
        let _already_reaped = self.0.wait();
    }
}

async fn rounds() -> bool {
    let dir = tempfile::tempdir().unwrap();
    let listen = vec![SocketAddr::from(([127, 0, 0, 1], 0))];
    let options = Options { listen, poll: POLL, ..Options::new(dir.path().join("controller")) };
    let controller = Controller::start(options).await.unwrap();
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--agents", &controller.addresses()[0].to_string()])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut agents = Ended(child);
    let lines = BufReader::new(agents.0.stdout.take().unwrap());
    assert_eq!(lines.lines().next().unwrap().unwrap(), "ready");
    loop {
        let Found::Nodes(nodes) = controller.query(Query::nodes()).await.unwrap() else { unreachable!() };
        if nodes.len() == NODES {
            break;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    tokio::time::sleep(POLL * 2).await;
    let before = cpu();
    tokio::time::sleep(POLL * ROUNDS).await;
    let each = (cpu() - before) / ROUNDS;
    drop(agents);
    controller.stop().await;
    tell(&format!("CPU time of a heartbeat round over {NODES} nodes"), each, ROUND_GOAL)
}

fn choice() -> bool {
    let candidates: Vec<_> = (0..NODES)
        .map(|number| {
            let load = Load::new((0..4).map(|item| (Item(item), (number % 97) as f32 / 97.0)));
            let peer = PeerKey::of(&number.to_string());
            Candidate { load, ..Candidate::new(peer, Has::Complete, number == 0) }
        })
        .collect();
    let chooser = by_name("least-load", &Weights::default()).unwrap();
    let mut draw = Draw::new(1);
    let times = 10_000;
    let began = Instant::now();
    for _ in 0..times {
        let offered = eligible(Need::Frame(0), &candidates, 0, chooser.as_ref());
        std::hint::black_box(chooser.choose(Need::Frame(0), &offered, &mut draw));
    }
    let each = began.elapsed() / times;
    tell(&format!("choice of a source among {NODES} nodes"), each, CHOICE_GOAL)
}
