//! `bootcache nodes`, `images`, `tasks` and `instances`: what the controller knows.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use bootcache::name::HostName;
use bootcache::wire::cluster::{
    Forget, Found, ImageRow, InstanceRow, InstanceStatus, NodeRow, Query, TaskRow,
};
use comfy_table::{Table, presets};
use indicatif::{HumanBytes, HumanDuration};

use super::remote::ControllerArgs;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    controller: ControllerArgs,
}

#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct NodesArgs {
    #[command(subcommand)]
    command: Option<NodesCommand>,
    #[command(flatten)]
    controller: ControllerArgs,
}

#[derive(Debug, clap::Subcommand)]
enum NodesCommand {
    /// Forget a node that is offline and does not come back: its instances are given up
    Forget {
        /// The node
        node: HostName,
        #[command(flatten)]
        controller: ControllerArgs,
    },
}

#[derive(Debug, clap::Args)]
pub(crate) struct OfTask {
    /// Only this task's
    #[arg(value_parser = super::deploy::task_number)]
    task: Option<i64>,
    #[command(flatten)]
    controller: ControllerArgs,
}

pub(crate) fn nodes(globals: &super::Globals, args: &NodesArgs) -> anyhow::Result<ExitCode> {
    if let Some(NodesCommand::Forget { node, controller }) = &args.command {
        return super::block_on(async {
            controller.connect(globals).await?.call(&Forget { node: node.clone() }).await?;
            if globals.json {
                println!("{}", serde_json::json!({ "forgotten": node }));
            } else {
                println!("node '{node}' is forgotten: when it comes back, it is a new one");
            }
            Ok(ExitCode::SUCCESS)
        });
    }
    list(globals, &args.controller, Query::nodes())
}

pub(crate) fn images(globals: &super::Globals, args: &Args) -> anyhow::Result<ExitCode> {
    list(globals, &args.controller, Query::images())
}

pub(crate) fn tasks(globals: &super::Globals, args: &OfTask) -> anyhow::Result<ExitCode> {
    list(globals, &args.controller, Query::tasks(args.task))
}

pub(crate) fn instances(globals: &super::Globals, args: &OfTask) -> anyhow::Result<ExitCode> {
    list(globals, &args.controller, Query::instances(args.task))
}

fn list(globals: &super::Globals, controller: &ControllerArgs, query: Query) -> anyhow::Result<ExitCode> {
    super::block_on(async {
        let found = controller.connect(globals).await?.list(&query).await?;
        match (&query, &found) {
            // A task has an instance at least.
            (Query::Tasks { task: Some(task), .. }, Found::Tasks(rows)) if rows.is_empty() => no_task(*task),
            (Query::Instances { task: Some(task), .. }, Found::Instances(rows)) if rows.is_empty() => {
                no_task(*task)
            }
            _ => show(globals, &found),
        }
    })
}

fn no_task(task: i64) -> anyhow::Result<ExitCode> {
    bail!("there is no task {task}: it may have ended")
}

/// Prints what was found.
fn show(globals: &super::Globals, found: &Found) -> anyhow::Result<ExitCode> {
    if globals.json {
        let text = match found {
            Found::Nodes(rows) => serde_json::to_string(rows),
            Found::Images(rows) => serde_json::to_string(rows),
            Found::Tasks(rows) => serde_json::to_string(rows),
            Found::Instances(rows) => serde_json::to_string(rows),
        };
        println!("{}", text?);
        return Ok(ExitCode::SUCCESS);
    }
    match found {
        Found::Nodes(rows) => show_nodes(rows),
        Found::Images(rows) => show_images(rows),
        Found::Tasks(rows) => show_tasks(rows),
        Found::Instances(rows) => show_instances(rows),
    }
    Ok(ExitCode::SUCCESS)
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(header);
    table
}

fn show_table(table: &Table, nothing: &str) {
    if table.is_empty() {
        println!("{nothing}");
    } else {
        println!("{}", table.trim_fmt());
    }
}

fn show_nodes(nodes: &[NodeRow]) {
    let mut lines = table(&["NODE", "STATE", "RUNS", "CPUS", "FREE MEMORY", "LOAD", "INSTANCES"]);
    for node in nodes {
        let silent = Duration::from_millis(node.silent_ms);
        lines.add_row([
            node.name.to_string(),
            if node.online { "online".to_owned() } else { format!("offline {}", HumanDuration(silent)) },
            node.kinds.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "),
            node.cpus.to_string(),
            format!("{} of {}", HumanBytes(node.memory_free), HumanBytes(node.memory_bytes)),
            format!("{:.2}", node.score),
            node.instances.to_string(),
        ]);
    }
    show_table(&lines, "no node has registered: start one with `bootcache agent --controller …`");
    for node in nodes {
        for trouble in &node.troubles {
            println!("{}: {trouble}", node.name);
        }
    }
}

fn show_images(images: &[ImageRow]) {
    let mut lines = table(&["IMAGE", "TYPE", "SIZE", "BOOT CACHE", "NODES", "COMING TO"]);
    for image in images {
        let names = |names: &[bootcache::name::HostName]| match names {
            [] => "-".to_owned(),
            [one] => one.to_string(),
            [one, other] => format!("{one} {other}"),
            [one, rest @ ..] => format!("{one} and {}", rest.len()),
        };
        lines.add_row([
            image.name.to_string(),
            image.kind.to_string(),
            HumanBytes(image.size).to_string(),
            if image.boot_bytes > 0 { HumanBytes(image.boot_bytes).to_string() } else { "-".to_owned() },
            names(&image.complete),
            names(&image.partial),
        ]);
    }
    show_table(&lines, "no node has an image: add one with `bootcache image add` where an agent runs");
}

fn show_tasks(tasks: &[TaskRow]) {
    let mut lines = table(&["TASK", "NAME", "STATE", "INSTANCES", "UP AFTER"]);
    for task in tasks {
        lines.add_row([
            task.task.to_string(),
            task.name.to_string(),
            task.status.to_string(),
            counts(&task.instances),
            seconds(task.up_ms),
        ]);
    }
    show_table(&lines, "there are no tasks: `bootcache deploy PLAN` starts one");
}

/// How many instances are in each state.
pub(super) fn counts(instances: &BTreeMap<InstanceStatus, u64>) -> String {
    let counts: Vec<_> = instances.iter().map(|(status, count)| format!("{count} {status}")).collect();
    counts.join(", ")
}

fn show_instances(instances: &[InstanceRow]) {
    let mut lines = table(&["INSTANCE", "STATE", "NODE", "ADDRESS", "UP AFTER", "CPU", "MEMORY"]);
    for instance in instances {
        lines.add_row([
            instance.name.to_string(),
            instance.status.to_string(),
            instance.node.to_string(),
            instance.addresses.first().map_or_else(|| "-".to_owned(), ToString::to_string),
            seconds(instance.up_ms),
            format!("{:.0} %", instance.cpu * 100.0),
            HumanBytes(instance.memory_bytes).to_string(),
        ]);
    }
    show_table(&lines, "there are no instances");
    for instance in instances {
        if let Some(reason) = &instance.reason {
            println!("{}: {reason}", instance.name);
        }
    }
}

fn seconds(ms: Option<u64>) -> String {
    ms.map_or_else(|| "-".to_owned(), |ms| format!("{:.2} s", Duration::from_millis(ms).as_secs_f64()))
}
