//! A controller and agents in one process, over loopback, with instances in memory.

mod instances;
mod orders;
mod plans;
mod restarts;

use std::sync::Arc;
use std::time::Duration;

use super::client::{Client, Target};
use super::*;
use crate::agent::{Agent, MemoryDataPlane, Services};
use crate::hypervisor::memory::{Fault, MemoryHypervisor, Verb};
use crate::hypervisor::{Hypervisor, InstanceType};
use crate::image::manifest::ImageKind;
use crate::name::HostName;
use crate::wire::cluster::{
    Deploy, End, EndPart, InstanceRow, InstanceStatus, NodeRow, RunPart, TaskRow, TaskStatus,
};

/// A node whose hypervisor and disks outlive its agent.
struct TestNode {
    name: HostName,
    dir: tempfile::TempDir,
    hypervisor: Arc<MemoryHypervisor>,
    data_plane: Arc<MemoryDataPlane>,
    /// Its agent is to run VMs.
    runs_vms: bool,
    /// Where its agent is to listen.
    listen: SocketAddr,
    agent: Option<Agent>,
}

impl TestNode {
    async fn start(name: &str, controller: SocketAddr) -> Self {
        let image = "debian".parse().unwrap();
        let mut node = Self {
            name: name.parse().unwrap(),
            dir: tempfile::tempdir().unwrap(),
            hypervisor: Arc::new(MemoryHypervisor::new(InstanceType::Vm)),
            data_plane: Arc::new(MemoryDataPlane::with_image(image, ImageKind::Vm, 1 << 30)),
            runs_vms: true,
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            agent: None,
        };
        node.start_agent(controller).await;
        node
    }

    async fn start_agent(&mut self, controller: SocketAddr) {
        let hypervisor = Arc::clone(&self.hypervisor) as Arc<dyn Hypervisor>;
        let services = Services {
            data_plane: Arc::clone(&self.data_plane) as _,
            hypervisors: if self.runs_vms { vec![hypervisor] } else { Vec::new() },
            networks: None,
            container_images: None,
        };
        let mut options = crate::agent::Options::new(self.name.clone(), self.dir.path());
        options.controller = Some(Target::Tcp(controller));
        options.listen = self.listen;
        self.agent = Some(Agent::start(options, services).await.unwrap());
    }

    async fn stop_agent(&mut self) {
        if let Some(agent) = self.agent.take() {
            agent.stop().await;
        }
    }

    async fn instances(&self) -> Vec<String> {
        let mut names: Vec<_> =
            self.hypervisor.list().await.unwrap().iter().map(ToString::to_string).collect();
        names.sort_unstable();
        names
    }
}

fn options(dir: &Path) -> Options {
    Options {
        listen: vec![SocketAddr::from(([127, 0, 0, 1], 0))],
        report: Some(SocketAddr::from(([127, 0, 0, 1], 0))),
        poll: Duration::from_millis(100),
        silence: Duration::from_millis(700),
        ..Options::new(dir)
    }
}

async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    while !condition().await {
        assert!(tokio::time::Instant::now() < deadline, "did not come true: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn nodes(controller: &Controller) -> Vec<NodeRow> {
    let Found::Nodes(nodes) = controller.query(Query::nodes()).await.unwrap() else { panic!() };
    nodes
}

async fn tasks(controller: &Controller) -> Vec<TaskRow> {
    let Found::Tasks(tasks) = controller.query(Query::tasks(None)).await.unwrap() else { panic!() };
    tasks
}

async fn instances(controller: &Controller) -> Vec<InstanceRow> {
    let Found::Instances(rows) = controller.query(Query::instances(None)).await.unwrap() else { panic!() };
    rows
}

async fn count(controller: &Controller, status: InstanceStatus) -> usize {
    instances(controller).await.iter().filter(|instance| instance.status == status).count()
}

fn plan(count: u32, until: &str) -> Plan {
    let text = format!(
        "name = \"lab\"\n[[groups]]\nname = \"g\"\ntype = \"vm\"\nimage = \"debian\"\nmemory = 16\n\
         count = {count}\nuntil = \"{until}\""
    );
    crate::plan::read::parse(&text).unwrap()
}

fn n1() -> HostName {
    "n1".parse().unwrap()
}

/// A controller with nodes that are online and have registered their images.
async fn cluster(dir: &Path, names: &[&str]) -> (Controller, Vec<TestNode>) {
    cluster_of(options(dir), names).await
}

async fn cluster_of(options: Options, names: &[&str]) -> (Controller, Vec<TestNode>) {
    let controller = Controller::start(options).await.unwrap();
    let mut members = Vec::new();
    for name in names {
        members.push(TestNode::start(name, controller.addresses()[0]).await);
    }
    eventually("all nodes are registered", async || {
        let nodes = nodes(&controller).await;
        // It takes orders once it has heard which cluster it is in.
        let joined = members.iter().all(|node| node.dir.path().join("cluster").exists());
        joined && nodes.len() == names.len() && nodes.iter().all(|node| !node.images.is_empty())
    })
    .await;
    (controller, members)
}
