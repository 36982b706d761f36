//! `bootcache deploy` and `bootcache end`.

use std::collections::{BTreeMap, BTreeSet};
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::bail;
use bootcache::controller::client::ClientError;
use bootcache::name::HostName;
use bootcache::wire::cluster::{
    Deploy, End, FaultCode, Found, InstanceRow, InstanceStatus, NodeRow, Query, TaskRow, TaskStatus,
};
use bootcache::wire::link::CallError;
use indicatif::{HumanBytes, MultiProgress, ProgressBar, ProgressStyle};

use super::remote::{ControllerArgs, Steady};
use super::signals::Ending;

const TICK: Duration = Duration::from_millis(500);
const INTERRUPTED: u8 = 130;
/// How often is looked why instances are not up yet, and how many reasons are told.
const REASONS_PAUSE: Duration = Duration::from_secs(4);
const REASONS_TOLD_MAX: usize = 8;

#[derive(Debug, clap::Args)]
pub(crate) struct DeployArgs {
    /// The plan: TOML, or JSON of the same shape
    plan: PathBuf,
    /// Wait until every instance is up, or has failed
    #[arg(long)]
    wait: bool,
    /// Give up waiting after so many seconds; what is under way goes on
    #[arg(long, value_name = "SECONDS", requires = "wait")]
    timeout: Option<u64>,
    #[command(flatten)]
    controller: ControllerArgs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct EndArgs {
    /// The task's number, as `deploy` said it
    #[arg(value_parser = task_number)]
    task: i64,
    /// Return at once instead of when nothing is left of it
    #[arg(long)]
    background: bool,
    #[command(flatten)]
    controller: ControllerArgs,
}

/// The number of a task in `text`.
pub(crate) fn task_number(text: &str) -> Result<i64, String> {
    text.parse().map_err(|_| "a task's number is expected: `bootcache tasks` lists them".to_owned())
}

pub(crate) fn deploy(globals: &super::Globals, args: &DeployArgs) -> anyhow::Result<ExitCode> {
    super::block_on(async {
        let plan = super::plan::load(&args.plan)?;
        let mut client = args.controller.steady(globals).await?;
        // The same one is sent again when its answer is lost, and starts nothing twice.
        let request = std::fs::read_to_string("/proc/sys/kernel/random/uuid")?.trim().to_owned();
        let mut ending = Ending::listen()?;
        let deploy = Deploy { request, plan };
        let task = tokio::select! {
            answer = client.call(&deploy) => answer?.task,
            () = ending.wait() => return Ok(unanswered()),
        };
        if !args.wait {
            if globals.json {
                println!("{}", serde_json::json!({ "task": task }));
            } else {
                println!(
                    "task {task} is under way: `bootcache tasks` shows it, `bootcache end {task}` ends it"
                );
            }
            return Ok(ExitCode::SUCCESS);
        }
        // Now, since the rest may take long: this is how it is found again.
        eprintln!("task {task} is under way");
        let mut view = View::new();
        let limit = args.timeout.map_or(Duration::MAX, Duration::from_secs);
        let done = tokio::select! {
            done = wait(&mut client, task, &mut view) => done,
            () = ending.wait() => {
                view.clear();
                eprintln!("task {task} goes on: `bootcache tasks` shows it, `bootcache end {task}` ends it");
                return Ok(ExitCode::from(INTERRUPTED));
            }
            () = tokio::time::sleep(limit) => {
                view.clear();
                bail!("task {task} is not up after {} s, and goes on: `bootcache instances` shows it", limit.as_secs());
            }
        };
        view.clear();
        finish(globals, &done?)
    })
}

/// Somebody was interrupted before the controller had answered to an order.
fn unanswered() -> ExitCode {
    eprintln!("the controller has not answered, and it may have begun: `bootcache tasks` shows it");
    ExitCode::from(INTERRUPTED)
}

/// A task that is on its way no longer.
struct DoneTask {
    task: TaskRow,
    instances: Vec<InstanceRow>,
}

async fn wait(client: &mut Steady, task: i64, view: &mut View) -> anyhow::Result<DoneTask> {
    let mut told = BTreeSet::new();
    let mut looked = Instant::now();
    loop {
        let row = wanted_yet(task, task_row(client, task).await?)?;
        if view.shown {
            view.show(&row, &nodes(client).await?);
        }
        if row.status != TaskStatus::Starting {
            return Ok(DoneTask { task: row, instances: instances(client, task).await? });
        }
        if looked.elapsed() >= REASONS_PAUSE {
            looked = Instant::now();
            for instance in instances(client, task).await? {
                let Some(reason) = instance.reason else { continue };
                if told.len() < REASONS_TOLD_MAX && told.insert(reason.clone()) {
                    view.say(&format!("{} on {}: {reason}", instance.name, instance.node));
                }
            }
        }
        tokio::time::sleep(TICK).await;
    }
}

/// The task, unless somebody else has ended it: there is nothing to wait for then, and nothing left to end.
fn wanted_yet(task: i64, row: Option<TaskRow>) -> anyhow::Result<TaskRow> {
    match row {
        Some(row) if row.status != TaskStatus::Ending => Ok(row),
        _ => bail!("task {task} was ended meanwhile, by somebody else"),
    }
}

async fn instances(client: &mut Steady, task: i64) -> anyhow::Result<Vec<InstanceRow>> {
    match client.list(&Query::instances(Some(task))).await? {
        Found::Instances(instances) => Ok(instances),
        _ => bail!("the controller answered out of turn"),
    }
}

fn finish(globals: &super::Globals, done: &DoneTask) -> anyhow::Result<ExitCode> {
    let DoneTask { task, instances } = done;
    let failed: Vec<_> = instances.iter().filter(|i| i.status == InstanceStatus::Failed).collect();
    if globals.json {
        println!("{}", serde_json::json!({ "task": task, "instances": instances }));
    } else {
        let up = instances.iter().filter(|i| i.status == InstanceStatus::Running).count();
        let seconds = task.up_ms.map(|ms| format!(" in {:.2} s", Duration::from_millis(ms).as_secs_f64()));
        println!(
            "task {}: {up} of {} instances are up{}",
            task.task,
            instances.len(),
            seconds.unwrap_or_default()
        );
        for instance in &failed {
            let reason = instance.reason.as_deref().unwrap_or("no reason is known");
            eprintln!("{} on {}: {reason}", instance.name, instance.node);
        }
    }
    if failed.is_empty() && task.status == TaskStatus::Running {
        Ok(ExitCode::SUCCESS)
    } else {
        if !globals.json {
            eprintln!("`bootcache end {}` ends what is up", task.task);
        }
        Ok(ExitCode::FAILURE)
    }
}

/// A line for each node, and one for the whole, while a person is looking.
struct View {
    bars: MultiProgress,
    nodes: BTreeMap<HostName, ProgressBar>,
    whole: ProgressBar,
    shown: bool,
}

impl View {
    fn new() -> Self {
        let bars = MultiProgress::new();
        let style = ProgressStyle::with_template("{elapsed:>12} {wide_msg}").expect("the template is sound");
        let whole = bars.add(ProgressBar::new_spinner().with_style(style));
        Self { bars, nodes: BTreeMap::new(), whole, shown: std::io::stderr().is_terminal() }
    }

    fn show(&mut self, task: &TaskRow, nodes: &[NodeRow]) {
        let style =
            ProgressStyle::with_template("{prefix:12!} {bar:10} {wide_msg}").expect("the template is sound");
        for (name, counts) in &task.nodes {
            let all = counts.values().sum();
            let bar = self.nodes.entry(name.clone()).or_insert_with(|| {
                let bar = ProgressBar::new(all).with_style(style.clone()).with_prefix(name.to_string());
                self.bars.insert_before(&self.whole, bar)
            });
            bar.set_position(counts.get(&InstanceStatus::Running).copied().unwrap_or(0));
            bar.set_message(node_text(counts, nodes.iter().find(|node| node.name == *name)));
        }
        self.whole.set_message(format!("task {}: {}", task.task, super::list::counts(&task.instances)));
    }

    /// Tells something above the lines, or by itself where there are none.
    fn say(&self, line: &str) {
        if self.shown {
            // Whoever looked has gone.
            let _ = self.bars.println(line);
        } else {
            eprintln!("{line}");
        }
    }

    fn clear(&self) {
        self.nodes.values().chain([&self.whole]).for_each(ProgressBar::finish_and_clear);
    }
}

/// How the instances of a node are, and then what is coming to it, which is cut where the line ends.
fn node_text(counts: &BTreeMap<InstanceStatus, u64>, node: Option<&NodeRow>) -> String {
    let coming = node.map_or_else(String::new, on_the_way);
    let separator = if coming.is_empty() { "" } else { "; " };
    format!("{}{separator}{coming}", super::list::counts(counts))
}

/// What is coming to a node: the images that are not all there.
fn on_the_way(node: &NodeRow) -> String {
    if !node.online {
        return "offline".to_owned();
    }
    let coming = node.images.iter().filter(|image| !image.complete);
    let texts = coming.map(|image| {
        format!("{} {} of {}", image.name, HumanBytes(image.present), HumanBytes(image.allocated))
    });
    texts.collect::<Vec<_>>().join(", ")
}

pub(crate) fn end(globals: &super::Globals, args: &EndArgs) -> anyhow::Result<ExitCode> {
    super::block_on(async {
        let task = args.task;
        let mut client = args.controller.steady(globals).await?;
        let mut ending = Ending::listen()?;
        let on = tokio::select! {
            on = begin_to_end(&mut client, task) => on?,
            () = ending.wait() => return Ok(unanswered()),
        };
        let began = Instant::now();
        if args.background {
            return Ok(tell_end(globals, task, None));
        }
        let offline = tokio::select! {
            offline = wait_until_gone(&mut client, task, &on) => offline?,
            () = ending.wait() => {
                eprintln!("task {task} is being ended");
                return Ok(ExitCode::from(INTERRUPTED));
            }
        };
        Ok(tell_end(globals, task, Some((began.elapsed(), offline))))
    })
}

/// Has a task end; gives the nodes that it is on.
async fn begin_to_end(client: &mut Steady, task: i64) -> anyhow::Result<BTreeSet<HostName>> {
    let on = task_row(client, task).await?.map(|row| row.nodes).unwrap_or_default();
    match client.call(&End { task }).await {
        // The answer to the first try was lost, and it has gone since.
        Err(error) if !on.is_empty() && is_not_found(&error) => {}
        other => drop(other?),
    }
    Ok(on.into_keys().collect())
}

async fn task_row(client: &mut Steady, task: i64) -> anyhow::Result<Option<TaskRow>> {
    let Found::Tasks(tasks) = client.list(&Query::tasks(Some(task))).await? else {
        bail!("the controller answered out of turn");
    };
    Ok(tasks.into_iter().next())
}

async fn nodes(client: &mut Steady) -> anyhow::Result<Vec<NodeRow>> {
    match client.list(&Query::nodes()).await? {
        Found::Nodes(nodes) => Ok(nodes),
        _ => bail!("the controller answered out of turn"),
    }
}

fn is_not_found(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(ClientError::Call(CallError::Refused(fault))) if fault.code == FaultCode::NotFound)
}

/// Returns when nothing is left of the task on nodes that are online, with those of its nodes `on` that are not; says what is
/// in the way, each thing once.
async fn wait_until_gone(
    client: &mut Steady,
    task: i64,
    on: &BTreeSet<HostName>,
) -> anyhow::Result<Vec<HostName>> {
    let prefix = format!("task {task} ");
    let mut told = BTreeSet::new();
    let mut looked = Instant::now();
    while task_row(client, task).await?.is_some() {
        if looked.elapsed() > 4 * TICK {
            looked = Instant::now();
            for node in nodes(client).await? {
                for trouble in node.troubles.into_iter().filter(|line| line.starts_with(&prefix)) {
                    let line = format!("{}: {trouble}", node.name);
                    if !told.contains(&line) {
                        eprintln!("{line}");
                        told.insert(line);
                    }
                }
            }
        }
        tokio::time::sleep(TICK / 5).await;
    }
    let offline = nodes(client).await?.into_iter().filter(|node| !node.online);
    Ok(offline.map(|node| node.name).filter(|name| on.contains(name)).collect())
}

/// What came of it: after how long it had gone, and where it could not be ended yet.
fn tell_end(globals: &super::Globals, task: i64, gone: Option<(Duration, Vec<HostName>)>) -> ExitCode {
    if globals.json {
        let offline = gone.as_ref().map(|(_, offline)| offline.as_slice()).unwrap_or_default();
        println!("{}", serde_json::json!({ "task": task, "gone": gone.is_some(), "offline": offline }));
        return ExitCode::SUCCESS;
    }
    match gone {
        None => println!("task {task} is being ended"),
        Some((after, offline)) if offline.is_empty() => {
            println!("task {task} has ended after {:.2} s: nothing is left of it", after.as_secs_f64());
        }
        Some((after, offline)) => {
            let names: Vec<_> = offline.iter().map(ToString::to_string).collect();
            println!(
                "task {task} has ended after {:.2} s; what is left on nodes that are offline ({}) is ended when they are back",
                after.as_secs_f64(),
                names.join(", ")
            );
        }
    }
    ExitCode::SUCCESS
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What name, bar and the spaces between leave of 80 columns.
    const ROOM: usize = 80 - 12 - 1 - 10 - 1;

    #[test]
    fn whoever_waits_is_told_that_somebody_else_has_ended_the_task() {
        let row = |status| TaskRow {
            task: 17,
            name: "lab".parse().unwrap(),
            status,
            created_ms: 0,
            up_ms: None,
            instances: BTreeMap::new(),
            nodes: BTreeMap::new(),
        };
        for status in [TaskStatus::Starting, TaskStatus::Running, TaskStatus::Failed] {
            assert_eq!(wanted_yet(17, Some(row(status))).unwrap().status, status);
        }
        for row in [Some(row(TaskStatus::Ending)), None] {
            let error = wanted_yet(17, row).unwrap_err().to_string();
            assert!(error.starts_with("task 17 was ended meanwhile"), "{error}");
        }
    }

    #[test]
    fn a_node_s_states_fit_a_line_of_eighty_columns() {
        use InstanceStatus::{Booting, Failed, Preparing, Running};
        let counts = |each: u64| [Preparing, Booting, Running, Failed].map(|status| (status, each)).into();
        assert_eq!(node_text(&counts(7), None), "7 preparing, 7 booting, 7 running, 7 failed");
        assert!(node_text(&counts(1024), None).len() <= ROOM);
    }
}
