//! An agent that is given its orders by hand, with instances in memory.

use std::time::Duration;

use bootcache_nbd::BoxFuture;

use super::*;
use crate::digest::Digest;
use crate::hypervisor::memory::{Fault, MemoryHypervisor, Verb};
use crate::hypervisor::{DiskBy, InstanceType};
use crate::image::manifest::ImageKind;
use crate::name::ImageName;
use crate::network::NetworkSpec;
use crate::tls::Role;
use crate::wire::cluster::{
    AskNode, Body, EndPart, InstanceOrder, InstanceStatus, Needed, NodeState, Part, RunPart,
};
use crate::wire::link::Link;

fn image() -> ImageName {
    "debian".parse().unwrap()
}

/// One instance of the task, which has its name.
pub(super) fn part(task: i64) -> Part {
    let root = Digest::of(b"debian");
    let needed = Needed { name: image(), root, boot: None, size: 1 << 30, sources: Vec::new() };
    let order = InstanceOrder::of_vm(&format!("vm-{task}"));
    Part {
        networks: Vec::new(),
        images: vec![needed],
        common: Vec::new(),
        instances: vec![order],
        report: None,
    }
}

/// An agent, and its controller's end of a connection.
pub(super) struct Ordered {
    pub(super) agent: Agent,
    data_plane: Arc<MemoryDataPlane>,
    link: Link,
    pub(super) dir: tempfile::TempDir,
}

impl Ordered {
    pub(super) async fn start(
        hypervisor: Arc<MemoryHypervisor>,
        networks: Option<Arc<dyn Networks>>,
    ) -> Self {
        Self::start_with(vec![hypervisor], networks).await
    }

    async fn start_with(hypervisors: Vec<Arc<dyn Hypervisor>>, networks: Option<Arc<dyn Networks>>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let data_plane = Arc::new(MemoryDataPlane::with_image(image(), ImageKind::Vm, 1 << 30));
        let services = Services {
            data_plane: Arc::clone(&data_plane) as _,
            hypervisors,
            networks,
            container_images: None,
        };
        let agent = Agent::start(Options::new("n1".parse().unwrap(), dir.path()), services).await.unwrap();
        let stream = Security::default().connect_to(agent.address(), Role::Node).await.unwrap();
        Self { agent, data_plane, link: Link::new(stream), dir }
    }

    async fn call<B: Body>(&mut self, body: B) -> B::Answer {
        self.link.call(&body, Duration::from_secs(10)).await.unwrap()
    }

    pub(super) async fn run(&mut self, task: i64, part: Part) {
        assert!(self.call(RunPart { cluster: "lab".to_owned(), task, part }).await.new);
    }

    pub(super) async fn until(&mut self, what: &str, condition: impl Fn(&NodeState) -> bool) {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
        loop {
            let state = self.call(AskNode {}).await;
            if condition(&state) {
                return;
            }
            assert!(tokio::time::Instant::now() < deadline, "did not come true: {what}: {state:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

pub(super) fn has(state: &NodeState, status: InstanceStatus) -> bool {
    state.instances.iter().all(|instance| instance.status == status) && !state.instances.is_empty()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_has_started_runs_on_though_that_cannot_be_written_down() {
    // As a disk that is full: the journal's folder is away from the moment of the launch.
    let tasks: Arc<std::sync::OnceLock<PathBuf>> = Arc::default();
    let folder = Arc::clone(&tasks);
    let hypervisor = MemoryHypervisor::new(InstanceType::Vm).observed_by(move |_| {
        let tasks = folder.get().unwrap();
        std::fs::rename(tasks, tasks.with_extension("away")).unwrap();
    });
    let hypervisor = Arc::new(hypervisor);
    let mut node = Ordered::start(Arc::clone(&hypervisor), None).await;
    let tasks = tasks.get_or_init(|| node.dir.path().join("tasks")).clone();
    node.run(1, part(1)).await;
    node.until("it runs", |state| has(state, InstanceStatus::Running)).await;
    assert_eq!(hypervisor.running(), 1);

    std::fs::rename(tasks.with_extension("away"), &tasks).unwrap();
    assert!(hypervisor.end(&"vm-1".parse().unwrap()));
    node.until("it has ended", |state| has(state, InstanceStatus::Stopped)).await;
    let written = std::fs::read_to_string(tasks.join("1.json")).unwrap();
    assert!(written.contains(r#""vm-1":"stopped""#), "{written}");
    node.agent.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_of_another_name_does_not_start_on_a_store_whose_tasks_run() {
    let hypervisor = Arc::new(MemoryHypervisor::new(InstanceType::Vm));
    let mut node = Ordered::start(Arc::clone(&hypervisor), None).await;
    node.run(1, part(1)).await;
    node.until("it runs", |state| has(state, InstanceStatus::Running)).await;
    node.agent.stop().await;

    // It would not find the VM by its own name: as on another hypervisor.
    let elsewhere = Arc::new(MemoryHypervisor::new(InstanceType::Vm));
    let (data_plane, dir) = (Arc::clone(&node.data_plane), node.dir.path().to_owned());
    let services = |hypervisor: &Arc<MemoryHypervisor>| Services {
        data_plane: Arc::clone(&data_plane) as _,
        hypervisors: vec![Arc::clone(hypervisor) as _],
        networks: None,
        container_images: None,
    };
    let options = |name: &str| Options::new(name.parse().unwrap(), &dir);
    let error = Agent::start(options("n5"), services(&elsewhere)).await.unwrap_err().to_string();
    assert!(error.contains("is that of node 'n1'") && error.contains("--name n1"), "{error}");
    assert_eq!(node.data_plane.disks().len(), 1, "a disk was removed from under a guest");

    node.agent = Agent::start(options("n1"), services(&hypervisor)).await.unwrap();
    let stream = Security::default().connect_to(node.agent.address(), Role::Node).await.unwrap();
    node.link = Link::new(stream);
    node.until("it goes on", |state| has(state, InstanceStatus::Running)).await;
    node.call(EndPart { cluster: "lab".to_owned(), task: 1 }).await;
    node.until("it has ended", |state| state.tasks.is_empty()).await;
    node.agent.stop().await;
    let renamed = Agent::start(options("n5"), services(&elsewhere)).await.unwrap();
    renamed.stop().await;
    assert_eq!(std::fs::read_to_string(node.dir.path().join("node")).unwrap(), "n5");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_ended_ends_though_that_cannot_be_written_down() {
    let hypervisor = Arc::new(MemoryHypervisor::new(InstanceType::Vm));
    let mut node = Ordered::start(Arc::clone(&hypervisor), None).await;
    let tasks = node.dir.path().join("tasks");
    node.run(1, part(1)).await;
    node.run(2, part(2)).await;
    node.until("they run", |state| has(state, InstanceStatus::Running)).await;
    hypervisor.set_away(true);
    std::fs::rename(&tasks, tasks.with_extension("away")).unwrap();
    let end = |task| EndPart { cluster: "lab".to_owned(), task };
    assert!(!node.call(end(1)).await.gone);
    node.until("why it has not ended is said", |state| {
        state.troubles.iter().any(|trouble| trouble.starts_with("task 1 cannot be ended yet: "))
    })
    .await;
    hypervisor.set_away(false);
    node.until("it has ended", |state| state.tasks == [2]).await;
    assert_eq!(hypervisor.running(), 1);

    // Neither can it be remembered that it has ended, but its order is forgotten.
    std::fs::rename(tasks.with_extension("away"), &tasks).unwrap();
    std::fs::remove_file(node.dir.path().join("ended.json")).unwrap();
    std::fs::create_dir(node.dir.path().join("ended.json")).unwrap();
    assert!(!node.call(end(2)).await.gone);
    node.until("it has ended", |state| state.tasks.is_empty()).await;
    assert!(!tasks.join("2.json").exists(), "it would begin again");
    node.agent.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removal_that_hangs_keeps_back_neither_what_went_wrong_with_others_nor_the_agent_s_end() {
    let hypervisor = Arc::new(MemoryHypervisor::new(InstanceType::Vm));
    let mut node = Ordered::start(Arc::clone(&hypervisor), None).await;
    let mut three = part(1);
    three.instances.extend(part(2).instances);
    three.instances.extend(part(3).instances);
    node.run(1, three).await;
    node.until("they run", |state| has(state, InstanceStatus::Running)).await;
    hypervisor.fail(Verb::Delete, 1, Fault::Hang);
    hypervisor.fail(Verb::Delete, 2, Fault::Refuse);
    node.call(EndPart { cluster: "lab".to_owned(), task: 1 }).await;
    node.until("why it has not ended is said", |state| {
        state.troubles.iter().any(|trouble| trouble.contains("was to be refused"))
    })
    .await;
    assert_eq!(hypervisor.running(), 2);
    let stopped = tokio::time::timeout(Duration::from_secs(5), node.agent.stop()).await;
    stopped.expect("it waits for what hangs");
}

/// Containers, more than are removed at once, and behind them VMs.
fn of_both_kinds() -> Part {
    let orders = (1..=12).map(|number| match number {
        1..=10 => {
            InstanceOrder { kind: InstanceType::Container, ..InstanceOrder::of_vm(&format!("box-{number}")) }
        }
        _ => InstanceOrder::of_vm(&format!("vm-{number}")),
    });
    Part { instances: orders.collect(), ..part(1) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vms_end_beside_containers_whose_hypervisor_hangs_and_are_said_to_have_ended() {
    // It hangs when they are removed, or already when one of them was to be started.
    for at in [Verb::Delete, Verb::Launch] {
        let vms = Arc::new(MemoryHypervisor::new(InstanceType::Vm));
        let containers = Arc::new(MemoryHypervisor::new(InstanceType::Container));
        let mut node =
            Ordered::start_with(vec![Arc::clone(&vms) as _, Arc::clone(&containers) as _], None).await;
        let calls = if at == Verb::Delete { 10 } else { 1 };
        (1..=calls).for_each(|nth| containers.fail(at, nth, Fault::Hang));
        node.run(1, of_both_kinds()).await;
        let up = 12 - usize::from(at == Verb::Launch);
        let with =
            |state: &NodeState, status| state.instances.iter().filter(|one| one.status == status).count();
        node.until("what does not hang runs", |state| with(state, InstanceStatus::Running) == up).await;
        assert!(!node.call(EndPart { cluster: "lab".to_owned(), task: 1 }).await.gone);
        node.until("the VMs have ended", |state| {
            let mut vms = state.instances.iter().filter(|one| one.name.as_str().starts_with("vm-"));
            vms.all(|vm| vm.status == InstanceStatus::Stopped && vm.reason.is_some())
        })
        .await;
        assert_eq!((vms.running(), node.data_plane.disks().len()), (0, 0));
        assert_eq!(containers.running(), up - 2, "it does not hang");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_agent_that_was_killed_had_asked_for_is_ended_when_it_comes_late() {
    let hypervisor = Arc::new(MemoryHypervisor::new(InstanceType::Vm));
    let node = Ordered::start(Arc::clone(&hypervisor), None).await;
    let late = crate::hypervisor::memory::tests::launch("late");
    tokio::time::timeout(Duration::from_secs(5), parts::swept(&node.agent.shared, InstanceType::Vm))
        .await
        .expect("nothing is there to be swept");
    hypervisor.launch(&late).await.unwrap();
    let gone = async {
        while hypervisor.running() > 0 {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), gone).await.expect("it is swept later");
    node.agent.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_is_a_device_stays_one_as_long_as_its_vm_may_run_and_no_longer() {
    let by_kernel = |task| {
        let mut part = part(task);
        part.instances[0].disk_by = DiskBy::Kernel;
        part
    };
    let hypervisor = Arc::new(MemoryHypervisor::new(InstanceType::Vm));
    let mut node = Ordered::start(Arc::clone(&hypervisor), None).await;
    let data_plane = Arc::clone(&node.data_plane);

    data_plane.set_no_kernel_client(true);
    node.run(1, by_kernel(1)).await;
    node.until("it has failed, and says why", |state| {
        let reason = state.instances[0].reason.as_deref().unwrap_or_default();
        has(state, InstanceStatus::Failed) && reason.contains("no NBD client")
    })
    .await;
    assert_eq!((hypervisor.launches(), data_plane.disks()), (0, Vec::new()), "something is left");
    data_plane.set_no_kernel_client(false);

    hypervisor.fail(Verb::Launch, 1, Fault::Refuse);
    node.run(2, by_kernel(2)).await;
    node.until("both have failed", |state| state.instances.len() == 2 && has(state, InstanceStatus::Failed))
        .await;
    assert_eq!((data_plane.devices(), data_plane.disks()), (Vec::new(), Vec::new()), "half a launch is left");

    node.run(3, by_kernel(3)).await;
    node.until("it runs", |state| {
        state.instances.iter().any(|instance| instance.status == InstanceStatus::Running)
    })
    .await;
    hypervisor.fail(Verb::Delete, 1, Fault::Refuse);
    node.call(EndPart { cluster: "lab".to_owned(), task: 3 }).await;
    node.until("it cannot be ended yet", |state| {
        state.troubles.iter().any(|trouble| trouble.starts_with("task 3 "))
    })
    .await;
    assert_eq!(data_plane.devices().len(), 1, "its VM may still run");
    node.until("it has ended", |state| !state.tasks.contains(&3)).await;
    assert_eq!((data_plane.devices(), data_plane.disks()), (Vec::new(), Vec::new()));
    node.agent.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_number_that_is_given_again_after_a_restore_is_no_order_for_the_task_that_has_it() {
    let hypervisor = Arc::new(MemoryHypervisor::new(InstanceType::Vm));
    let mut node = Ordered::start(Arc::clone(&hypervisor), None).await;
    node.until("it knows of no task", |state| state.last_task.is_none()).await;
    node.run(7, part(7)).await;
    node.until("it runs", |state| has(state, InstanceStatus::Running) && state.last_task == Some(7)).await;
    let mut moved = part(7);
    moved.images[0].sources.push("10.0.0.1:7602".parse().unwrap());
    let order = |part| RunPart { cluster: "lab".to_owned(), task: 7, part };
    assert!(!node.call(order(moved)).await.new, "the same order, from other sources, is another one");
    let error = node.link.call(&order(part(8)), Duration::from_secs(10)).await.unwrap_err().to_string();
    assert!(error.contains("there is another task 7") && error.contains("deploy again"), "{error}");
    node.call(EndPart { cluster: "lab".to_owned(), task: 7 }).await;
    node.until("it has ended, and is remembered", |state| {
        state.tasks.is_empty() && state.last_task == Some(7)
    })
    .await;
    let error = node.link.call(&order(part(8)), Duration::from_secs(10)).await.unwrap_err().to_string();
    assert!(error.contains("has ended on this node") && error.contains("deploy again"), "{error}");
    node.agent.stop().await;
}

/// The bridges that were made and not removed.
#[derive(Debug, Default)]
struct Bridges(std::sync::Mutex<std::collections::BTreeSet<String>>);

impl Networks for Bridges {
    fn ensure<'a>(&'a self, network: &'a NetworkSpec) -> BoxFuture<'a, Result<(), ServiceError>> {
        self.0.lock().unwrap().insert(network.bridge.clone());
        Box::pin(async { Ok(()) })
    }

    fn remove<'a>(&'a self, network: &'a NetworkSpec) -> BoxFuture<'a, Result<(), ServiceError>> {
        self.0.lock().unwrap().remove(&network.bridge);
        Box::pin(async { Ok(()) })
    }
}

fn on_a_bridge(part: Part) -> Part {
    Part { networks: vec![crate::network::tests::spec()], ..part }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bridge_stays_for_those_that_use_it_and_goes_with_the_last_of_many_that_end_at_once() {
    let (hypervisor, bridges) =
        (Arc::new(MemoryHypervisor::new(InstanceType::Vm)), Arc::<Bridges>::default());
    let there = || !bridges.0.lock().unwrap().is_empty();
    // Each removal takes longer than the order for the next one.
    hypervisor.slow_down(Duration::from_millis(20));
    let mut node = Ordered::start(Arc::clone(&hypervisor), Some(Arc::clone(&bridges) as _)).await;
    for round in 0..20 {
        let tasks = (1..=3).map(|number| 3 * round + number);
        for task in tasks.clone() {
            node.run(task, on_a_bridge(part(task))).await;
        }
        node.until("they run", |state| has(state, InstanceStatus::Running)).await;
        node.call(EndPart { cluster: "lab".to_owned(), task: 3 * round + 1 }).await;
        node.until("the first has ended", |state| state.tasks.len() == 2).await;
        assert!(there(), "two use it");
        for task in tasks.skip(1) {
            node.call(EndPart { cluster: "lab".to_owned(), task }).await;
        }
        node.until("all have ended", |state| state.tasks.is_empty()).await;
        assert!(!there(), "it was left in round {round}");
    }
    node.agent.stop().await;
}
