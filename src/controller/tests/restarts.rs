//! Controllers and agents that end and come back, and hypervisors and data planes that are away.

use super::*;

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
async fn what_is_deployed_with_a_restored_database_runs_under_a_number_that_no_node_knows() {
    let (dir, backup) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let copy = |from: &Path, to: &Path| {
        for file in ["", "-wal", "-shm"].map(|end| format!("{DATABASE_FILE}{end}")) {
            let _ = std::fs::remove_file(to.join(&file));
            if from.join(&file).exists() {
                std::fs::copy(from.join(&file), to.join(&file)).unwrap();
            }
        }
    };
    let (controller, members) = cluster(dir.path(), &["n1"]).await;
    let again = || Options { listen: controller.addresses().to_vec(), ..options(dir.path()) };
    controller.stop().await;
    copy(dir.path(), backup.path());
    let later = Controller::start(again()).await.unwrap();
    for request in ["r1", "r2", "r3"] {
        later.deploy(request, plan(1, "started")).await.unwrap();
    }
    eventually("all run", async || count(&later, InstanceStatus::Running).await == 3).await;
    later.end(2).await.unwrap();
    eventually("the second has ended", async || tasks(&later).await.len() == 2).await;
    later.stop().await;
    drop(later);

    copy(backup.path(), dir.path());
    let restored = Controller::start(again()).await.unwrap();
    eventually("its node was heard", async || nodes(&restored).await[0].online).await;
    assert_eq!(restored.deploy("r4", plan(1, "started")).await.unwrap(), 4);
    eventually("it runs", async || count(&restored, InstanceStatus::Running).await == 1).await;
    eventually("the others have ended", async || members[0].instances().await == ["lab-4-g-1"]).await;
    restored.stop().await;
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
    let all_say = async |reason: Option<&str>| {
        instances(&controller).await.iter().all(|instance| instance.reason.as_deref() == reason)
    };
    assert!(all_say(Some("its node does not answer")).await, "nobody is told why they are lost");
    assert_eq!(members[0].instances().await.len(), 3, "instances do not need the agent");
    members[0].start_agent(controller.addresses()[0]).await;
    eventually("all run again", async || count(&controller, InstanceStatus::Running).await == 3).await;
    assert!(all_say(None).await);
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
