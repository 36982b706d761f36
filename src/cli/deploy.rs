//! `bootcache deploy` and `bootcache end`.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::bail;
use bootcache::controller::client::Client;
use bootcache::name::HostName;
use bootcache::wire::cluster::{
    Deploy, End, Found, InstanceRow, InstanceStatus, NodeRow, Query, TaskRow, TaskStatus,
};
use indicatif::{HumanBytes, MultiProgress, ProgressBar, ProgressStyle};

use super::remote::ControllerArgs;
use super::signals::Ending;

const TICK: Duration = Duration::from_millis(500);
const INTERRUPTED: u8 = 130;

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
    task: i64,
    /// Return at once instead of when nothing is left of it
    #[arg(long)]
    background: bool,
    #[command(flatten)]
    controller: ControllerArgs,
}

pub(crate) fn deploy(globals: &super::Globals, args: &DeployArgs) -> anyhow::Result<ExitCode> {
    super::block_on(async {
        let plan = super::plan::load(&args.plan)?;
        let mut client = args.controller.connect(globals).await?;
        let request = std::fs::read_to_string("/proc/sys/kernel/random/uuid")?.trim().to_owned();
        let mut ending = Ending::listen()?;
        let task = client.call(&Deploy { request, plan }).await?.task;
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
        let mut view = View::new();
        let limit = args.timeout.map_or(Duration::MAX, Duration::from_secs);
        let done = tokio::select! {
            done = wait(&mut client, task, &mut view) => done?,
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
        finish(globals, &done)
    })
}

/// A task that is on its way no longer.
struct DoneTask {
    task: TaskRow,
    instances: Vec<InstanceRow>,
}

async fn wait(client: &mut Client, task: i64, view: &mut View) -> anyhow::Result<DoneTask> {
    loop {
        let Found::Tasks(tasks) = client.list(&Query::tasks(Some(task))).await? else {
            bail!("the controller answered out of turn");
        };
        let Some(row) = tasks.into_iter().next() else { bail!("task {task} was ended meanwhile") };
        let Found::Nodes(nodes) = client.list(&Query::nodes()).await? else {
            bail!("the controller answered out of turn");
        };
        view.show(&row, &nodes);
        if row.status != TaskStatus::Starting {
            let Found::Instances(instances) = client.list(&Query::instances(Some(task))).await? else {
                bail!("the controller answered out of turn");
            };
            return Ok(DoneTask { task: row, instances });
        }
        tokio::time::sleep(TICK).await;
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
        if !self.shown {
            return;
        }
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
        let mut client = args.controller.connect(globals).await?;
        let mut ending = Ending::listen()?;
        client.call(&End { task }).await?;
        let began = Instant::now();
        let gone = async {
            if args.background {
                return Ok(false);
            }
            loop {
                let Found::Tasks(tasks) = client.list(&Query::tasks(Some(task))).await? else {
                    bail!("the controller answered out of turn");
                };
                if tasks.is_empty() {
                    return Ok(true);
                }
                tokio::time::sleep(TICK / 5).await;
            }
        };
        let gone = tokio::select! {
            gone = gone => gone?,
            () = ending.wait() => {
                eprintln!("task {task} is being ended");
                return Ok(ExitCode::from(INTERRUPTED));
            }
        };
        if globals.json {
            println!("{}", serde_json::json!({ "task": task, "gone": gone }));
        } else if gone {
            println!(
                "task {task} has ended after {:.2} s: nothing is left of it",
                began.elapsed().as_secs_f64()
            );
        } else {
            println!("task {task} is being ended");
        }
        Ok(ExitCode::SUCCESS)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What name, bar and the spaces between leave of 80 columns.
    const ROOM: usize = 80 - 12 - 1 - 10 - 1;

    #[test]
    fn a_node_s_states_fit_a_line_of_eighty_columns() {
        use InstanceStatus::{Booting, Failed, Preparing, Running};
        let counts = |each: u64| [Preparing, Booting, Running, Failed].map(|status| (status, each)).into();
        assert_eq!(node_text(&counts(7), None), "7 preparing, 7 booting, 7 running, 7 failed");
        assert!(node_text(&counts(1024), None).len() <= ROOM);
    }
}
