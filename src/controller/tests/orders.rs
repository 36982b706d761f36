//! Orders and answers that are late, old, refused or for somebody else.

use super::*;

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
    // The agent's own word that it runs may come only now, and makes an answer old that was asked for before.
    eventually("a newer answer counts", async || {
        after(answer(vec![]), false, None).await == InstanceStatus::Stopped
    })
    .await;
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
    // The first controller finds it where it was, before the other is there to register with.
    let address = other.addresses()[0];
    other.stop().await;
    members[0].listen = members[0].agent.as_ref().unwrap().address();
    members[0].stop_agent().await;
    std::fs::remove_file(members[0].dir.path().join("cluster")).unwrap();
    members[0].start_agent(address).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!members[0].dir.path().join("cluster").exists(), "an order took it back");
    let again = Options { listen: vec![address], ..options(other_dir.path()) };
    let other = Controller::start(again).await.unwrap();
    eventually("nothing is left of the first", async || members[0].instances().await.is_empty()).await;
    eventually("the first has lost it", async || !nodes(&controller).await[0].online).await;
    eventually("it is registered", async || {
        nodes(&other).await.first().is_some_and(|node| !node.images.is_empty())
    })
    .await;
    assert_eq!(other.deploy("r1", plan(1, "started")).await.unwrap(), 1);
    eventually("it runs", async || count(&other, InstanceStatus::Running).await == 1).await;
    other.stop().await;
    controller.stop().await;
}

/// A node whose agent answers the heartbeat, and is silent on every order: it says when it got one.
async fn hanging_node(
    name: HostName,
    listener: tokio::net::TcpListener,
    got: tokio::sync::mpsc::UnboundedSender<()>,
) {
    use crate::agent::DataPlane;
    use crate::wire::cluster::{AskNode, NodeState};
    use crate::wire::frame::FrameType;
    use crate::wire::link::{self, Arrived};
    while let Ok((stream, _)) = listener.accept().await {
        let (name, got) = (name.clone(), got.clone());
        let data_plane = MemoryDataPlane::with_image("debian".parse().unwrap(), ImageKind::Vm, 1 << 30);
        tokio::spawn(async move {
            let mut stream: Box<dyn crate::peer::transport::Transport> = Box::new(stream);
            let handler = async |request: Arrived| {
                if request.frame_type != FrameType::NODE_STATUS {
                    let _ = got.send(());
                    std::future::pending::<()>().await;
                }
                request.reply::<AskNode>(NodeState {
                    node: name.clone(),
                    cluster: None,
                    memory_free: 1 << 40,
                    load: std::collections::BTreeMap::new(),
                    peer: None,
                    // It would not be ordered to run what it lacks.
                    images: Some(data_plane.images().await.unwrap()),
                    tasks: Vec::new(),
                    instances: Vec::new(),
                    troubles: Vec::new(),
                    last_task: None,
                })
            };
            let limit = Duration::from_secs(3600);
            let _ = link::answer(&mut stream, &CancellationToken::new(), limit, |_| {}, handler).await;
        });
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_hangs_in_an_order_keeps_its_heartbeat_and_no_other_s_orders() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (got, mut gets) = tokio::sync::mpsc::unbounded_channel();
    let hanging = tokio::spawn(hanging_node("hangs".parse().unwrap(), listener, got));
    let name: HostName = "hangs".parse().unwrap();
    let (patience, hour) = (Duration::from_secs(30), Duration::from_secs(3600));

    // On the connections alone: the question is answered while the order is under way.
    let nodes_of = Arc::new(nodes::Nodes::new(Security::default()));
    let ordering = tokio::spawn({
        let (nodes_of, name) = (Arc::clone(&nodes_of), name.clone());
        async move {
            let end = EndPart { cluster: "c".to_owned(), task: 1 };
            nodes_of.call((address, &name), &end, hour).await
        }
    });
    tokio::time::timeout(patience, gets.recv()).await.expect("it gets the order").unwrap();
    let asked = nodes_of.call((address, &name), &crate::wire::cluster::AskNode {}, hour);
    tokio::time::timeout(patience, asked).await.expect("it waits for the order").unwrap();
    assert!(!ordering.is_finished());
    ordering.abort();

    // In a cluster: another node's instances come up all the same.
    let dir = tempfile::tempdir().unwrap();
    let (controller, _members) = cluster(dir.path(), &["n1"]).await;
    let target = Target::Tcp(controller.addresses()[0]);
    let mut client = Client::connect(&target, &Security::default()).await.unwrap();
    let register = crate::wire::cluster::RegisterCompute {
        node: name.clone(),
        ip: None,
        port: address.port(),
        kinds: vec![InstanceType::Vm],
        cpus: 1,
        memory_bytes: 1 << 40,
        addresses: Vec::new(),
    };
    client.call(&register).await.unwrap();
    let on = |node: &str| {
        let mut plan = plan(1, "started");
        plan.nodes = vec![node.parse().unwrap()];
        plan
    };
    controller.deploy("r1", on("hangs")).await.unwrap();
    tokio::time::timeout(patience, gets.recv()).await.expect("it gets the order").unwrap();
    let task = controller.deploy("r2", on("n1")).await.unwrap();
    eventually("the other's runs", async || count(&controller, InstanceStatus::Running).await == 1).await;
    controller.end(task).await.unwrap();
    eventually("the other's has gone", async || tasks(&controller).await.len() == 1).await;
    assert!(nodes(&controller).await.iter().all(|node| node.online));
    controller.stop().await;
    hanging.abort();
}
