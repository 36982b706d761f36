//! What plans may say, and what users are told.

use super::*;

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
