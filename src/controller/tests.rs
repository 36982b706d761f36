//! A controller and agents in one process, over loopback, with instances in memory.

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
        nodes.len() == names.len() && nodes.iter().all(|node| !node.images.is_empty())
    })
    .await;
    (controller, members)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plan_comes_up_is_seen_and_goes_without_a_trace() {
    let dir = tempfile::tempdir().unwrap();
    let (controller, members) = cluster(dir.path(), &["n1", "n2"]).await;
    let task = controller.deploy("r1", plan(6, "started")).await.unwrap();
    assert_eq!(
        controller.deploy("r1", plan(6, "started")).await.unwrap(),
        task,
        "a replay is a new deployment"
    );
    eventually("all run", async || count(&controller, InstanceStatus::Running).await == 6).await;
    eventually("the task runs", async || tasks(&controller).await[0].status == TaskStatus::Running).await;
    assert_eq!((members[0].instances().await.len(), members[1].instances().await.len()), (3, 3));
    assert_eq!(members[0].data_plane.disks().len(), 3);
    controller.end(task).await.unwrap();
    eventually("the task has gone", async || tasks(&controller).await.is_empty()).await;
    assert!(instances(&controller).await.is_empty());
    for node in &members {
        assert_eq!((node.instances().await.len(), node.data_plane.disks().len()), (0, 0));
        assert_eq!(std::fs::read_dir(node.dir.path().join("tasks")).unwrap().count(), 0);
    }
    assert!(matches!(controller.end(task).await, Err(DeployError::NoTask(_))));
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn guests_report_that_they_are_up() {
    let dir = tempfile::tempdir().unwrap();
    let (controller, _members) = cluster(dir.path(), &["n1"]).await;
    controller.deploy("r1", plan(1, "report")).await.unwrap();
    eventually("it boots", async || count(&controller, InstanceStatus::Booting).await == 1).await;
    assert_eq!(report(&controller, "lab-1-g-9").await, "unknown\n");
    assert_eq!(report(&controller, "../../etc").await, "unknown\n");
    assert_eq!(report(&controller, "lab-1-g-1").await, "ok\n");
    assert_eq!(report(&controller, "lab-1-g-1").await, "unknown\n");
    tokio::time::sleep(Duration::from_millis(300)).await;
    let row = instances(&controller).await.remove(0);
    assert_eq!(row.status, InstanceStatus::Running, "its node, which still waits, was believed");
    assert!(row.up_ms.is_some());

    // One that its plan waits for in another way is not up because it says so.
    controller.deploy("r2", plan(1, "serial:never")).await.unwrap();
    eventually("it boots", async || count(&controller, InstanceStatus::Booting).await == 1).await;
    assert_eq!(report(&controller, "lab-2-g-1").await, "unknown\n");
    assert_eq!(count(&controller, InstanceStatus::Booting).await, 1);
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_ends_before_it_reports_has_failed() {
    let dir = tempfile::tempdir().unwrap();
    let (controller, members) = cluster(dir.path(), &["n1"]).await;
    controller.deploy("r1", plan(1, "report")).await.unwrap();
    let mut brief = plan(1, "report");
    brief.groups[0].time_limit = 1;
    controller.deploy("r2", brief).await.unwrap();
    controller.deploy("r3", plan(1, "started")).await.unwrap();
    eventually("one boots, one is too late, one runs", async || {
        let rows = instances(&controller).await;
        let status: Vec<_> = rows.iter().map(|row| row.status).collect();
        status == [InstanceStatus::Booting, InstanceStatus::Failed, InstanceStatus::Running]
    })
    .await;
    for task in 1..=3 {
        assert!(members[0].hypervisor.end(&format!("lab-{task}-g-1").parse().unwrap()));
    }
    eventually("that the last has ended is told", async || {
        count(&controller, InstanceStatus::Stopped).await == 1
    })
    .await;
    eventually("the first has failed", async || count(&controller, InstanceStatus::Failed).await == 2).await;
    // Rounds in which the node says of all three that they have ended.
    let address = nodes(&controller).await[0].address.parse().unwrap();
    eventually("the node knows it of all", async || {
        let limit = Duration::from_secs(5);
        let state =
            controller.shared.nodes.call((address, &n1()), &crate::wire::cluster::AskNode {}, limit).await;
        state.unwrap().instances.iter().all(|instance| instance.status == InstanceStatus::Stopped)
    })
    .await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let rows = instances(&controller).await;
    let reason = |index: usize| rows[index].reason.as_deref().unwrap_or_default();
    assert!(reason(0).starts_with("it ended before it reported"), "{}", reason(0));
    assert!(reason(1).starts_with("it did not report within 1 s"), "{}", reason(1));
    let status: Vec<_> = tasks(&controller).await.iter().map(|task| task.status).collect();
    assert_eq!(status, [TaskStatus::Failed, TaskStatus::Failed, TaskStatus::Running]);
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_launch_that_is_refused_fails_alone_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (controller, members) = cluster(dir.path(), &["n1"]).await;
    members[0].hypervisor.fail(Verb::Launch, 1, Fault::Refuse);
    controller.deploy("r1", plan(3, "started")).await.unwrap();
    eventually("the task has failed", async || tasks(&controller).await[0].status == TaskStatus::Failed)
        .await;
    let failed: Vec<_> = instances(&controller).await;
    let failed: Vec<_> = failed.iter().filter(|instance| instance.status == InstanceStatus::Failed).collect();
    assert_eq!(failed.len(), 1);
    assert!(failed[0].reason.is_some());
    assert_eq!(members[0].data_plane.disks().len(), 2);
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_controller_that_ends_anywhere_goes_on_where_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let (controller, mut members) = cluster(dir.path(), &["n1", "n2"]).await;
    let task = controller.deploy("r1", plan(4, "started")).await.unwrap();
    controller.stop().await;
    drop(controller);
    let controller = Controller::start(options(dir.path())).await.unwrap();
    // It has another port now: the agents are told.
    for node in &mut members {
        node.stop_agent().await;
        node.start_agent(controller.addresses()[0]).await;
    }
    eventually("all run", async || count(&controller, InstanceStatus::Running).await == 4).await;
    controller.end(task).await.unwrap();
    controller.stop().await;
    drop(controller);
    let controller = Controller::start(options(dir.path())).await.unwrap();
    for node in &mut members {
        node.stop_agent().await;
        node.start_agent(controller.addresses()[0]).await;
    }
    eventually("the task has gone", async || tasks(&controller).await.is_empty()).await;
    eventually("nothing is left", async || {
        members[0].instances().await.is_empty() && members[1].instances().await.is_empty()
    })
    .await;
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_comes_back_adopts_what_runs() {
    let dir = tempfile::tempdir().unwrap();
    let (controller, mut members) = cluster(dir.path(), &["n1"]).await;
    controller.deploy("r1", plan(3, "started")).await.unwrap();
    eventually("all run", async || count(&controller, InstanceStatus::Running).await == 3).await;
    let before = members[0].hypervisor.launches();
    members[0].stop_agent().await;
    eventually("the node is offline", async || !nodes(&controller).await[0].online).await;
    assert_eq!(count(&controller, InstanceStatus::Lost).await, 3);
    assert_eq!(members[0].instances().await.len(), 3, "instances do not need the agent");
    members[0].start_agent(controller.addresses()[0]).await;
    eventually("all run again", async || count(&controller, InstanceStatus::Running).await == 3).await;
    assert_eq!(members[0].hypervisor.launches(), before, "something was started twice");
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_starts_while_its_hypervisor_is_away_keeps_instances_and_disks() {
    let dir = tempfile::tempdir().unwrap();
    let (controller, mut members) = cluster(dir.path(), &["n1"]).await;
    let task = controller.deploy("r1", plan(2, "started")).await.unwrap();
    let booting = controller.deploy("r2", plan(1, "serial:never")).await.unwrap();
    let both = async || {
        (count(&controller, InstanceStatus::Running).await, count(&controller, InstanceStatus::Booting).await)
    };
    eventually("two run, one boots", async || both().await == (2, 1)).await;
    members[0].stop_agent().await;
    members[0].hypervisor.set_away(true);
    members[0].start_agent(controller.addresses()[0]).await;
    eventually("the node says so", async || {
        let node = nodes(&controller).await.remove(0);
        node.online && node.kinds.is_empty() && node.troubles.iter().any(|line| line.starts_with("no vms: "))
    })
    .await;
    eventually("the instances are said to be unknown", async || {
        instances(&controller).await.iter().all(|instance| instance.reason.is_some())
    })
    .await;
    assert_eq!(both().await, (2, 1), "they run without their hypervisor");
    let refused = controller.deploy("r3", plan(1, "started")).await.unwrap_err().to_string();
    assert!(refused.contains("runs no vms"), "{refused}");
    for task in [task, booting] {
        controller.end(task).await.unwrap();
    }
    let why = format!("task {task} cannot be ended yet: ");
    eventually("why they cannot be ended is said", async || {
        nodes(&controller).await[0].troubles.iter().any(|line| line.starts_with(&why))
    })
    .await;
    assert_eq!(members[0].data_plane.disks().len(), 3, "a disk was removed from under a guest");
    assert_eq!(tasks(&controller).await.len(), 2);
    members[0].hypervisor.set_away(false);
    eventually("the tasks have gone", async || tasks(&controller).await.is_empty()).await;
    assert_eq!((members[0].instances().await.len(), members[0].data_plane.disks().len()), (0, 0));
    eventually("it runs VMs again", async || !nodes(&controller).await[0].kinds.is_empty()).await;
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_to_start_waits_for_its_hypervisor_after_a_restart_too_and_no_longer_than_its_limit() {
    let dir = tempfile::tempdir().unwrap();
    let (controller, mut members) = cluster(dir.path(), &["n1"]).await;
    members[0].data_plane.set_away(true);
    controller.deploy("r1", plan(1, "started")).await.unwrap();
    let mut brief = plan(1, "started");
    brief.groups[0].time_limit = 5;
    controller.deploy("r2", brief).await.unwrap();
    eventually("the node has both", async || {
        instances(&controller).await.iter().all(|instance| instance.reason.is_some())
    })
    .await;
    members[0].stop_agent().await;
    members[0].hypervisor.set_away(true);
    members[0].data_plane.set_away(false);
    members[0].start_agent(controller.addresses()[0]).await;
    let why = "its hypervisor is away";
    eventually("why they wait is said", async || {
        let rows = instances(&controller).await;
        rows.iter().all(|row| row.reason.as_ref().is_some_and(|reason| reason.starts_with(why)))
    })
    .await;
    eventually("the second has waited long enough", async || {
        let rows = instances(&controller).await;
        rows.iter().map(|row| row.status).eq([InstanceStatus::Preparing, InstanceStatus::Failed])
    })
    .await;
    members[0].hypervisor.set_away(false);
    eventually("the first runs", async || count(&controller, InstanceStatus::Running).await == 1).await;
    assert_eq!(instances(&controller).await[0].reason, None);
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_data_plane_that_does_not_answer_for_a_while_takes_no_image_from_the_cluster() {
    let dir = tempfile::tempdir().unwrap();
    let (controller, members) = cluster(dir.path(), &["n1"]).await;
    members[0].data_plane.set_away(true);
    eventually("the node says so", async || !nodes(&controller).await[0].troubles.is_empty()).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(nodes(&controller).await[0].images.len(), 1);
    // What is started meanwhile waits, and says why.
    controller.deploy("r1", plan(1, "started")).await.unwrap();
    eventually("it waits", async || instances(&controller).await[0].reason.is_some()).await;
    assert_eq!(count(&controller, InstanceStatus::Preparing).await, 1);
    members[0].data_plane.set_away(false);
    eventually("it runs", async || count(&controller, InstanceStatus::Running).await == 1).await;
    assert_eq!(instances(&controller).await[0].reason, None);
    eventually("all is well", async || nodes(&controller).await[0].troubles.is_empty()).await;
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_part_whose_image_nobody_gives_waits_and_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let (controller, mut members) = cluster(dir.path(), &["n1", "n2"]).await;
    let with_image = std::mem::take(&mut members[1].data_plane);
    members[1].stop_agent().await;
    members[1].start_agent(controller.addresses()[0]).await;
    eventually("it has no image", async || nodes(&controller).await[1].images.is_empty()).await;
    let mut plan = plan(1, "started");
    plan.nodes = vec!["n2".parse().unwrap()];
    controller.deploy("r1", plan).await.unwrap();
    let why = "node 'n1' has image 'debian' and gives it to no other: start its agent with --peer-listen";
    eventually("it says why it waits", async || {
        instances(&controller).await[0].reason.as_ref().is_some_and(|reason| reason.starts_with(why))
    })
    .await;
    assert_eq!(count(&controller, InstanceStatus::Preparing).await, 1);
    let prefetch = Prefetch::Image { image: "debian".parse().unwrap(), nodes: Vec::new(), boot_only: true };
    let refused = controller.prefetch(prefetch).await.unwrap_err().to_string();
    assert!(refused.contains("--peer-listen"), "{refused}");
    // It has the image after all.
    members[1].stop_agent().await;
    members[1].data_plane = with_image;
    members[1].start_agent(controller.addresses()[0]).await;
    eventually("it runs", async || count(&controller, InstanceStatus::Running).await == 1).await;
    assert_eq!(instances(&controller).await[0].reason, None);
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_template_is_sent_once_for_all_instances_of_a_node() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options { allow_privileged: true, ..options(dir.path()) };
    let (controller, members) = cluster_of(options, &["n1"]).await;
    let mut plan = plan(120, "started");
    plan.groups[0].memory.0 = 4;
    let template = template(10 << 10);
    plan.groups[0].template = Some(template.clone());
    controller.deploy("r1", plan.clone()).await.unwrap();
    eventually("all run", async || count(&controller, InstanceStatus::Running).await == 120).await;
    let launched = members[0].hypervisor.launched(&"lab-1-g-120".parse().unwrap()).unwrap();
    assert_eq!(launched.template, Some(template));
    // Groups that have nothing in common are too long for one order in the end.
    plan.groups = (0..8)
        .map(|index| {
            let mut group = plan.groups[0].clone();
            group.name = format!("g{index}").parse().unwrap();
            group.count = Some(1);
            group.template = Some(self::template((200 << 10) + index));
            group
        })
        .collect();
    let refused = controller.deploy("r2", plan).await.unwrap_err().to_string();
    assert!(refused.contains("more than can be sent"), "{refused}");
    assert_eq!(tasks(&controller).await.len(), 1, "what was refused has left a task");
    controller.stop().await;
}

/// A template of so many bytes.
fn template(bytes: usize) -> String {
    let text = "<domain><name>@NAME@</name><uuid>@UUID@</uuid><devices>@DISK@@NICS@</devices></domain>";
    format!("{text}{}", " ".repeat(bytes - text.len()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_longer_than_a_frame_are_told_whole_and_a_node_has_so_many_instances_at_most() {
    let dir = tempfile::tempdir().unwrap();
    let (controller, _members) = cluster(dir.path(), &["n1"]).await;
    controller.deploy("r1", plan(1, "started")).await.unwrap();
    eventually("it runs", async || count(&controller, InstanceStatus::Running).await == 1).await;
    let more = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3000)
        INSERT INTO instance (inst_type, inst_status, host_id, task_id, name, image, addresses, reason)
        SELECT inst_type, 'failed', host_id, task_id, 'x-' || i, image, addresses, hex(zeroblob(500))
        FROM instance, n";
    let fill = move |tx: &database::Tx<'_>| Ok(tx.execute(more, []).map(drop)?);
    controller.shared.database.run::<_, DatabaseError, _>(fill).await.unwrap();
    let target = Target::Socket(dir.path().join(SOCKET));
    let mut client = Client::connect(&target, &Security::default()).await.unwrap();
    for query in [Query::instances(None), Query::instances(Some(1))] {
        let Found::Instances(rows) = client.list(&query).await.unwrap() else { panic!() };
        let names: std::collections::BTreeSet<_> = rows.iter().map(|row| row.name.clone()).collect();
        assert_eq!((rows.len(), names.len()), (3001, 3001));
    }
    for query in [Query::nodes(), Query::images(), Query::tasks(None), Query::tasks(Some(1))] {
        let count = match client.list(&query).await.unwrap() {
            Found::Nodes(rows) => rows.len(),
            Found::Images(rows) => rows.len(),
            Found::Tasks(rows) => rows.len(),
            Found::Instances(_) => panic!(),
        };
        assert_eq!(count, 1, "{query:?}");
    }
    let refused = controller.deploy("r2", plan(1, "started")).await.unwrap_err().to_string();
    assert!(refused.contains("a node has 1024 at most"), "{refused}");
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_older_than_an_order_or_a_change_takes_nothing_back() {
    let dir = tempfile::tempdir().unwrap();
    let (controller, _members) = cluster(dir.path(), &["n1"]).await;
    let task = controller.deploy("r1", plan(1, "started")).await.unwrap();
    eventually("it runs", async || count(&controller, InstanceStatus::Running).await == 1).await;
    let shared = &controller.shared;
    let address = nodes(&controller).await[0].address.parse().unwrap();
    let mut state = shared
        .nodes
        .call((address, &n1()), &crate::wire::cluster::AskNode {}, Duration::from_secs(5))
        .await
        .unwrap();
    state.instances[0].status = InstanceStatus::Stopped;
    state.tasks.clear();
    let answer = |accepted: Vec<i64>| database::Heard {
        host_id: 1,
        at: std::time::Instant::now(),
        accepted,
        other: None,
        peer: None,
        state: Some(state.clone()),
    };
    // What is written is looked at in the same piece of work: the heartbeat goes on meanwhile.
    let after = async |heard: database::Heard, told: bool, silence: Option<Duration>| {
        let owner = Arc::clone(shared);
        let work = move |tx: &database::Tx<'_>| {
            if told {
                owner.told.note(heard.host_id);
            }
            let mut heard = [heard];
            owner.told.leave_out(&mut heard);
            let later = silence.map_or(0, |_| 1000);
            database::write_round(tx, &heard, now_ms() + later, silence)?;
            let rows = database::instance_rows(tx, None, None, database::Page::whole())?;
            Ok(rows[0].status)
        };
        shared.database.run::<_, DatabaseError, _>(work).await.unwrap()
    };
    assert_eq!(after(answer(vec![]), true, None).await, InstanceStatus::Running, "it was told since");
    assert_eq!(after(answer(vec![]), false, None).await, InstanceStatus::Stopped);
    eventually("it runs", async || count(&controller, InstanceStatus::Running).await == 1).await;
    assert_eq!(after(answer(vec![task]), true, None).await, InstanceStatus::Lost, "it was forgotten");
    eventually("it runs", async || count(&controller, InstanceStatus::Running).await == 1).await;
    // A node that is silent since before this controller started is waited for.
    let silent = || database::Heard { state: None, ..answer(Vec::new()) };
    assert_eq!(after(silent(), false, None).await, InstanceStatus::Running);
    assert_eq!(after(silent(), false, Some(Duration::from_secs(1))).await, InstanceStatus::Lost);
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clock_that_is_set_back_holds_up_no_limit() {
    let dir = tempfile::tempdir().unwrap();
    let (controller, _members) = cluster(dir.path(), &["n1"]).await;
    controller.deploy("r1", plan(1, "started")).await.unwrap();
    controller.deploy("r2", plan(1, "report")).await.unwrap();
    let both = async |status: [InstanceStatus; 2]| {
        instances(&controller).await.iter().map(|row| row.status).eq(status)
    };
    eventually("one runs, one boots", async || {
        both([InstanceStatus::Running, InstanceStatus::Booting]).await
    })
    .await;
    let silent = || database::Heard {
        host_id: 1,
        at: std::time::Instant::now(),
        accepted: Vec::new(),
        other: None,
        peer: None,
        state: None,
    };
    let limit_ms = 600_000; // of a group that does not say another
    // In one piece of work: the heartbeat goes on meanwhile, by the host's clock.
    let work = move |tx: &database::Tx<'_>| {
        let status = || -> Result<Vec<_>, DatabaseError> {
            let rows = database::instance_rows(tx, None, None, database::Page::whole())?;
            Ok(rows.iter().map(|row| row.status).collect())
        };
        let earlier = now_ms() - 3_600_000;
        database::write_round(tx, &[], earlier, None)?;
        let at_first = status()?;
        database::write_round(tx, &[], earlier + limit_ms + 1, None)?;
        let past_its_limit = status()?;
        database::write_round(tx, &[silent()], earlier + limit_ms, Some(Duration::from_secs(1)))?;
        Ok([at_first, past_its_limit, status()?])
    };
    let found = controller.shared.database.run::<_, DatabaseError, _>(work).await.unwrap();
    let [running, booting] = [InstanceStatus::Running, InstanceStatus::Booting];
    let [failed, lost] = [InstanceStatus::Failed, InstanceStatus::Lost];
    assert_eq!(found, [[running, booting], [running, failed], [lost, failed]]);
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_gone_can_be_forgotten_and_comes_back_as_a_new_one() {
    let dir = tempfile::tempdir().unwrap();
    let (controller, mut members) = cluster(dir.path(), &["n1", "n2"]).await;
    let mut one = plan(1, "started");
    one.nodes = vec!["n2".parse().unwrap()];
    controller.deploy("r1", one).await.unwrap();
    controller.deploy("r2", plan(4, "started")).await.unwrap();
    eventually("all run", async || count(&controller, InstanceStatus::Running).await == 5).await;
    let gone: HostName = "n2".parse().unwrap();
    let error = controller.forget(gone.clone()).await.unwrap_err().to_string();
    assert!(error.contains("node 'n2' is online"), "{error}");
    members[1].stop_agent().await;
    eventually("it is offline", async || nodes(&controller).await.iter().any(|node| !node.online)).await;
    controller.forget(gone.clone()).await.unwrap();
    assert!(matches!(controller.forget(gone).await, Err(DeployError::NoNode(_))));
    assert_eq!(nodes(&controller).await.len(), 1);
    let left = tasks(&controller).await;
    assert_eq!((left.len(), left[0].task), (1, 2), "the task that it had alone has gone with it");
    assert!(instances(&controller).await.iter().all(|row| row.node.as_str() == "n1"));
    members[1].start_agent(controller.addresses()[0]).await;
    eventually("it is back, and has ended what it had", async || {
        nodes(&controller).await.len() == 2 && members[1].instances().await.is_empty()
    })
    .await;
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_ended_while_its_node_was_away_is_ended_when_it_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let (controller, mut members) = cluster(dir.path(), &["n1"]).await;
    let task = controller.deploy("r1", plan(2, "started")).await.unwrap();
    eventually("all run", async || count(&controller, InstanceStatus::Running).await == 2).await;
    members[0].stop_agent().await;
    eventually("the node is offline", async || !nodes(&controller).await[0].online).await;
    controller.end(task).await.unwrap();
    eventually("the task has gone", async || tasks(&controller).await.is_empty()).await;
    members[0].start_agent(controller.addresses()[0]).await;
    eventually("nothing is left", async || members[0].instances().await.is_empty()).await;
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn instances_of_no_task_are_ended_when_the_agent_starts() {
    let dir = tempfile::tempdir().unwrap();
    let (controller, mut members) = cluster(dir.path(), &["n1"]).await;
    controller.deploy("r1", plan(2, "started")).await.unwrap();
    eventually("all run", async || count(&controller, InstanceStatus::Running).await == 2).await;
    let address = controller.addresses()[0];
    controller.stop().await;
    members[0].stop_agent().await;
    std::fs::remove_file(members[0].dir.path().join("tasks/1.json")).unwrap();
    members[0].start_agent(address).await;
    eventually("nothing is left", async || members[0].instances().await.is_empty()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_part_that_its_node_refuses_is_ordered_once_and_stays_failed() {
    let dir = tempfile::tempdir().unwrap();
    let (controller, mut members) = cluster(dir.path(), &["n1"]).await;
    let count_orders = "CREATE TABLE given (task); CREATE TRIGGER giving AFTER UPDATE OF accepted ON part
        WHEN new.accepted = 1 BEGIN INSERT INTO given VALUES (new.task_id); END";
    let count = move |tx: &database::Tx<'_>| Ok(tx.execute_batch(count_orders)?);
    controller.shared.database.run::<_, DatabaseError, _>(count).await.unwrap();
    let given = async || {
        let count = |tx: &database::Tx<'_>| {
            Ok(tx.query_row("SELECT count(*) FROM given", [], |row| row.get::<_, i64>(0))?)
        };
        controller.shared.database.run::<_, DatabaseError, _>(count).await.unwrap()
    };
    members[0].stop_agent().await;
    controller.deploy("r1", plan(2, "started")).await.unwrap();
    members[0].runs_vms = false;
    members[0].start_agent(controller.addresses()[0]).await;
    let all = async |status: InstanceStatus| {
        instances(&controller).await.iter().all(|instance| instance.status == status)
    };
    eventually("it is refused", async || all(InstanceStatus::Failed).await).await;
    // Ten rounds.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(given().await, 1);
    members[0].stop_agent().await;
    members[0].runs_vms = true;
    members[0].start_agent(controller.addresses()[0]).await;
    eventually("it runs VMs", async || !nodes(&controller).await[0].kinds.is_empty()).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!((given().await, members[0].hypervisor.launches()), (1, 0), "what has failed has revived");
    assert!(all(InstanceStatus::Failed).await);
    assert_eq!(tasks(&controller).await[0].status, TaskStatus::Failed);
    controller.stop().await;
}

/// What a guest says when it is up, and what it is answered.
async fn report(controller: &Controller, name: &str) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(controller.report_address().unwrap()).await.unwrap();
    stream.write_all(format!("{name}\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_whose_node_forgot_it_has_to_come_up_again() {
    let dir = tempfile::tempdir().unwrap();
    let (controller, mut members) = cluster(dir.path(), &["n1"]).await;
    controller.deploy("r1", plan(1, "report")).await.unwrap();
    eventually("it boots", async || count(&controller, InstanceStatus::Booting).await == 1).await;
    assert_eq!(report(&controller, "lab-1-g-1").await, "ok\n");
    members[0].stop_agent().await;
    std::fs::remove_file(members[0].dir.path().join("tasks/1.json")).unwrap();
    members[0].start_agent(controller.addresses()[0]).await;
    eventually("it is started again", async || members[0].hypervisor.launches() == 2).await;
    eventually("it boots again", async || count(&controller, InstanceStatus::Booting).await == 1).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let row = instances(&controller).await.remove(0);
    assert_eq!((row.status, row.up_ms), (InstanceStatus::Booting, None), "it has not reported yet");
    assert_eq!(report(&controller, "lab-1-g-1").await, "ok\n");
    eventually("it runs", async || count(&controller, InstanceStatus::Running).await == 1).await;
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_reports_while_its_node_is_silent_is_up_when_the_node_is_back() {
    let dir = tempfile::tempdir().unwrap();
    let (controller, mut members) = cluster(dir.path(), &["n1"]).await;
    controller.deploy("r1", plan(1, "report")).await.unwrap();
    eventually("it boots", async || count(&controller, InstanceStatus::Booting).await == 1).await;
    members[0].stop_agent().await;
    eventually("it is lost", async || count(&controller, InstanceStatus::Lost).await == 1).await;
    assert_eq!(report(&controller, "lab-1-g-1").await, "ok\n");
    assert_eq!(count(&controller, InstanceStatus::Lost).await, 1, "its node is silent all the same");
    members[0].start_agent(controller.addresses()[0]).await;
    eventually("it runs", async || count(&controller, InstanceStatus::Running).await == 1).await;
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn orders_that_come_twice_late_or_for_another_cluster_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (controller, mut members) = cluster(dir.path(), &["n1"]).await;
    let task = controller.deploy("r1", plan(2, "started")).await.unwrap();
    eventually("all run", async || count(&controller, InstanceStatus::Running).await == 2).await;
    let shared = &controller.shared;
    let limit = Duration::from_secs(5);
    let (address, orders) = shared
        .database
        .run::<_, DatabaseError, _>(|tx| {
            tx.execute("UPDATE part SET accepted = 0", [])?;
            let found = (database::all_hosts(tx)?.remove(0).address, database::orders(tx)?);
            tx.execute("UPDATE part SET accepted = 1", [])?;
            Ok(found)
        })
        .await
        .unwrap();
    let database::OrderKind::Run(part) = orders[0].kind.clone() else { panic!() };
    let run = RunPart { cluster: shared.cluster.clone(), task, part: *part };
    let end = EndPart { cluster: shared.cluster.clone(), task };

    let other = RunPart { cluster: "another".into(), ..run.clone() };
    let error = shared.nodes.call((address, &n1()), &other, limit).await.unwrap_err().to_string();
    assert!(error.contains("another cluster"), "{error}");
    for _ in 0..3 {
        assert!(!shared.nodes.call((address, &n1()), &run, limit).await.unwrap().new);
    }
    assert_eq!((members[0].hypervisor.launches(), members[0].instances().await.len()), (2, 2));

    controller.end(task).await.unwrap();
    // While it is being ended, and when nothing is left of it.
    let _refused_or_old = shared.nodes.call((address, &n1()), &run, limit).await;
    eventually("the task has gone", async || tasks(&controller).await.is_empty()).await;
    let late = shared.nodes.call((address, &n1()), &run, limit).await.unwrap_err().to_string();
    assert!(late.contains("has ended on this node"), "{late}");
    assert_eq!(
        controller.deploy("r1", plan(2, "started")).await.unwrap(),
        task,
        "a replay is a new deployment"
    );
    assert!(tasks(&controller).await.is_empty());
    // Its agent remembers that too when it is started again.
    members[0].stop_agent().await;
    members[0].start_agent(controller.addresses()[0]).await;
    let address = members[0].agent.as_ref().unwrap().address();
    let late = shared.nodes.call((address, &n1()), &run, limit).await.unwrap_err().to_string();
    assert!(late.contains("has ended on this node"), "{late}");
    assert!(shared.nodes.call((address, &n1()), &end, limit).await.unwrap().gone);
    assert_eq!((members[0].hypervisor.launches(), members[0].instances().await.len()), (2, 0));
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_controllers_never_share_a_folder_and_a_node_serves_one_cluster() {
    let (dir, other_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (controller, mut members) = cluster(dir.path(), &["n1"]).await;
    let error = Controller::start(options(dir.path())).await.unwrap_err().to_string();
    assert!(error.contains("another controller runs"), "{error}");
    let other = Controller::start(options(other_dir.path())).await.unwrap();
    members[0].stop_agent().await;
    members[0].start_agent(other.addresses()[0]).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(nodes(&other).await.is_empty(), "a node of another cluster was taken");

    // It is moved: what it had of the first cluster is ended, and the same number is another task.
    members[0].stop_agent().await;
    members[0].start_agent(controller.addresses()[0]).await;
    controller.deploy("r1", plan(2, "started")).await.unwrap();
    eventually("all run", async || count(&controller, InstanceStatus::Running).await == 2).await;
    controller.stop().await;
    members[0].stop_agent().await;
    std::fs::remove_file(members[0].dir.path().join("cluster")).unwrap();
    members[0].start_agent(other.addresses()[0]).await;
    eventually("nothing is left of the first", async || members[0].instances().await.is_empty()).await;
    eventually("it is registered", async || {
        nodes(&other).await.first().is_some_and(|node| !node.images.is_empty())
    })
    .await;
    assert_eq!(other.deploy("r1", plan(1, "started")).await.unwrap(), 1);
    eventually("it runs", async || count(&other, InstanceStatus::Running).await == 1).await;
    other.stop().await;
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plans_that_cannot_be_are_refused_whole() {
    let dir = tempfile::tempdir().unwrap();
    let (controller, _members) = cluster(dir.path(), &["n1"]).await;
    let refused = async |change: fn(&mut Plan)| {
        let mut plan = plan(1, "started");
        change(&mut plan);
        controller.deploy("r", plan).await.unwrap_err().to_string()
    };
    assert!(refused(|p| p.groups[0].image = "nothing".parse().unwrap()).await.contains("no image 'nothing'"));
    assert!(refused(|p| p.nodes = vec!["n9".parse().unwrap()]).await.contains("no node 'n9'"));
    assert!(refused(|p| p.groups[0].count = Some(0)).await.contains("0 instances"));
    assert!(refused(|p| p.groups[0].kind = InstanceType::Container).await.contains("is for vms"));
    let small = refused(|p| p.groups[0].disk = Some(crate::plan::DiskSize(1023))).await;
    assert!(small.contains("a disk of 1023 MiB is smaller than image 'debian': say 1024 MiB"), "{small}");
    assert!(refused(|p| p.groups[0].memory.0 = 4 << 20).await.contains("more than node 'n1' has"));
    let short = refused(|p| p.groups[0].template = Some("domain.xml".into())).await;
    assert!(short.contains("does not allow domains"), "{short}");
    let privileged = |p: &mut Plan| {
        p.groups[0].kind = InstanceType::Container;
        p.groups[0].privileged = true;
    };
    assert!(refused(privileged).await.contains("does not allow privileged"));
    let own = refused(|p| p.groups[0].template = Some(template(1000))).await;
    assert!(own.contains("groups[0].template: the controller does not allow domains"), "{own}");
    assert!(tasks(&controller).await.is_empty() && instances(&controller).await.is_empty());
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_that_is_promised_is_not_promised_again() {
    let dir = tempfile::tempdir().unwrap();
    let (controller, members) = cluster(dir.path(), &["n1"]).await;
    let small = |tx: &database::Tx<'_>| Ok(tx.execute("UPDATE host SET memory = 100 << 20", []).map(drop)?);
    controller.shared.database.run::<_, DatabaseError, _>(small).await.unwrap();
    let mut plan = plan(1, "started");
    plan.groups[0].memory.0 = 60;
    // Neither is in use at any time: what runs is in this process.
    let task = controller.deploy("r1", plan.clone()).await.unwrap();
    let refused = controller.deploy("r2", plan.clone()).await.unwrap_err().to_string();
    assert!(refused.contains("no node has 60 MiB of memory free"), "{refused}");
    eventually("it runs", async || count(&controller, InstanceStatus::Running).await == 1).await;
    assert!(controller.deploy("r3", plan.clone()).await.is_err());
    assert!(members[0].hypervisor.end(&format!("lab-{task}-g-1").parse().unwrap()));
    eventually("it has ended", async || count(&controller, InstanceStatus::Stopped).await == 1).await;
    controller.deploy("r4", plan).await.unwrap();
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn images_are_brought_ahead_to_nodes_that_are_there() {
    let dir = tempfile::tempdir().unwrap();
    let (controller, _members) = cluster(dir.path(), &["n1"]).await;
    let ask = async |image: &str, node: &str| {
        let nodes = vec![node.parse().unwrap()];
        let request = Prefetch::Image { image: image.parse().unwrap(), nodes, boot_only: true };
        controller.prefetch(request).await.map_err(|error| error.to_string())
    };
    ask("debian", "n1").await.unwrap();
    assert!(ask("nothing", "n1").await.unwrap_err().contains("no image 'nothing'"));
    assert!(ask("debian", "n9").await.unwrap_err().contains("no node 'n9'"));
    for on in [true, false] {
        controller.prefetch(Prefetch::Standing { on }).await.unwrap();
    }
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn users_speak_to_it_over_its_socket() {
    let dir = tempfile::tempdir().unwrap();
    let (controller, _members) = cluster(dir.path(), &["n1"]).await;
    let target = Target::Socket(dir.path().join(SOCKET));
    let mut client = Client::connect(&target, &Security::default()).await.unwrap();
    let deploy = Deploy { request: "r1".into(), plan: plan(1, "started") };
    let task = client.call(&deploy).await.unwrap().task;
    let Found::Tasks(rows) = client.call(&Query::tasks(Some(task))).await.unwrap() else { panic!() };
    assert_eq!(rows[0].name.as_str(), "lab");
    client.call(&End { task }).await.unwrap();
    let error = client.call(&End { task: 99 }).await.unwrap_err().to_string();
    assert!(error.contains("no task 99"), "{error}");
    controller.stop().await;
    let error = Client::connect(&target, &Security::default()).await.unwrap_err().to_string();
    assert!(error.contains("no controller runs here"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_address_of_a_controller_s_name_is_tried() {
    let dir = tempfile::tempdir().unwrap();
    let controller = Controller::start(options(dir.path())).await.unwrap();
    // It listens on the second that the name has, or on the only one.
    let name = format!("localhost:{}", controller.addresses()[0].port());
    let mut client = Client::connect(&Target::Named(name), &Security::default()).await.unwrap();
    assert_eq!(client.call(&Query::nodes()).await.unwrap(), Found::Nodes(Vec::new()));
    controller.stop().await;
    let gone = Target::Named(format!("localhost:{}", controller.addresses()[0].port()));
    let error = Client::connect(&gone, &Security::default()).await.unwrap_err().to_string();
    assert!(error.contains("the controller at localhost:"), "{error}");
}
