//! Instances from the order to their end: up, failed, reported, forgotten.

use super::*;
use crate::hypervisor::domain::DomainDisk;
use crate::hypervisor::{DiskBy, Root};

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
async fn a_plan_s_disks_by_the_kernel_are_devices_that_outlive_the_agent_and_go_with_their_vms() {
    let dir = tempfile::tempdir().unwrap();
    let (controller, mut members) = cluster(dir.path(), &["n1"]).await;
    let node = &mut members[0];
    let mut by_kernel = plan(2, "started");
    by_kernel.groups[0].disk_by = Some(DiskBy::Kernel);
    let task = controller.deploy("r1", by_kernel).await.unwrap();
    controller.deploy("r2", plan(1, "started")).await.unwrap();
    eventually("all run", async || count(&controller, InstanceStatus::Running).await == 3).await;
    let disk = |name: &HostName| match node.hypervisor.launched(name).unwrap().root {
        Root::Disk(disk) => disk,
        Root::Image(image) => panic!("{image}"),
    };
    let devices = node.data_plane.devices();
    assert_eq!(devices.len(), 2);
    for (vm, device, kept) in devices {
        assert!(kept && vm.as_str().starts_with("lab-1-"), "{vm}");
        assert_eq!(disk(&vm), DomainDisk::Block(device.path()));
    }
    assert!(matches!(disk(&"lab-2-g-1".parse().unwrap()), DomainDisk::Nbd { .. }));

    // Whoever looks after the devices is killed with the agent, as a service manager may do; the next agent mends that.
    node.stop_agent().await;
    node.data_plane.lose_keepers();
    node.start_agent(controller.addresses()[0]).await;
    eventually("they are looked after again", async || {
        node.data_plane.devices().iter().all(|(_, _, kept)| *kept)
    })
    .await;
    assert_eq!((node.data_plane.devices().len(), node.hypervisor.launches()), (2, 3));

    assert!(node.hypervisor.end(&"lab-1-g-1".parse().unwrap()));
    eventually("it is told", async || count(&controller, InstanceStatus::Stopped).await == 1).await;
    assert_eq!((node.data_plane.devices().len(), node.data_plane.disks().len()), (1, 3));
    controller.end(task).await.unwrap();
    eventually("the task has gone", async || tasks(&controller).await.len() == 1).await;
    assert_eq!((node.data_plane.devices().len(), node.data_plane.disks().len()), (0, 1));
    node.stop_agent().await;
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
    for has_ended in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let (controller, mut members) = cluster(dir.path(), &["n1"]).await;
        controller.deploy("r1", plan(1, "report")).await.unwrap();
        eventually("it boots", async || count(&controller, InstanceStatus::Booting).await == 1).await;
        assert_eq!(report(&controller, "lab-1-g-1").await, "ok\n");
        if has_ended {
            assert!(members[0].hypervisor.end(&"lab-1-g-1".parse().unwrap()));
            eventually("that is told", async || count(&controller, InstanceStatus::Stopped).await == 1).await;
        }
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
async fn an_address_that_only_connects_keeps_few_places_for_reports() {
    use tokio::io::AsyncReadExt;
    let dir = tempfile::tempdir().unwrap();
    let controller = Controller::start(options(dir.path())).await.unwrap();
    let address = controller.report_address().unwrap();
    let mut silent = Vec::new();
    for _ in 0..crate::controller::report::SILENT_OF_ONE {
        silent.push(tokio::net::TcpStream::connect(address).await.unwrap());
    }
    // The listener takes them in order: this one comes behind the silent ones, and is closed before them.
    let mut next = tokio::net::TcpStream::connect(address).await.unwrap();
    assert!(matches!(next.read(&mut [0]).await, Ok(0) | Err(_)));
    let waits = |stream: &tokio::net::TcpStream| stream.try_read(&mut [0]).map_err(|error| error.kind());
    assert!(silent.iter().all(|stream| waits(stream) == Err(std::io::ErrorKind::WouldBlock)));
    // Guests at other addresses are heard, and those at this one when the silent ones have left.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
    let mut other = socket.connect(address).await.unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut other, b"lab-1-g-1\n").await.unwrap();
    let mut answer = String::new();
    other.read_to_string(&mut answer).await.unwrap();
    assert_eq!(answer, "unknown\n");
    drop(silent);
    eventually("its guests are heard again", async || {
        use tokio::io::AsyncWriteExt;
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let _closed_at_once = stream.write_all(b"lab-1-g-1\n").await;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.is_ok() && answer == "unknown\n"
    })
    .await;
    controller.stop().await;
}
