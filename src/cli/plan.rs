//! `bootcache plan check`: what is wrong with a plan file, before anything is asked to carry it out.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use bootcache::plan::check::check_templates;
use bootcache::plan::read::Located;
use bootcache::plan::{Plan, TEXT_BYTES_MAX, read};
use serde::Serialize;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Say what is wrong with a plan by itself, with line numbers
    Check {
        /// The plan: TOML, or JSON of the same shape
        plan: PathBuf,
    },
}

/// What `plan check --json` prints.
#[derive(Debug, Serialize)]
struct Checked {
    ok: bool,
    mistakes: Vec<Told>,
}

#[derive(Debug, Serialize)]
struct Told {
    line: Option<usize>,
    message: String,
}

pub(crate) fn run(globals: &super::Globals, args: &Args) -> anyhow::Result<ExitCode> {
    let Command::Check { plan: path } = &args.command;
    let text = text(path)?;
    let result = read::parse(&text).map_err(Problem::Mistakes).and_then(|mut plan| {
        templates(path, &mut plan).map_err(Problem::Other)?;
        match check_templates(&plan) {
            mistakes if mistakes.is_empty() => Ok(plan),
            mistakes => Err(Problem::Mistakes(read::located(&text, mistakes))),
        }
    });
    let mistakes = match &result {
        Ok(_) => Vec::new(),
        Err(Problem::Mistakes(mistakes)) => mistakes.clone(),
        Err(Problem::Other(error)) => vec![Located { line: None, message: format!("{error:#}") }],
    };
    if globals.json {
        let told = mistakes.iter().map(|m| Told { line: m.line, message: m.message.clone() }).collect();
        println!("{}", serde_json::to_string(&Checked { ok: result.is_ok(), mistakes: told })?);
    } else if let Ok(plan) = &result {
        let instances: u64 = plan.groups.iter().map(bootcache::plan::Group::total).sum();
        println!(
            "{}: fine (instances: {instances}, groups: {}, networks: {})",
            path.display(),
            plan.groups.len(),
            plan.networks.len()
        );
    } else {
        for mistake in &mistakes {
            eprintln!("{}: {mistake}", path.display());
        }
    }
    Ok(if result.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

enum Problem {
    Mistakes(Vec<Located>),
    Other(anyhow::Error),
}

/// Reads and checks the plan at `path`; templates are read in.
pub(crate) fn load(path: &Path) -> anyhow::Result<Plan> {
    let mut plan = match read::parse(&text(path)?) {
        Ok(plan) => plan,
        Err(mistakes) => {
            let lines: Vec<_> =
                mistakes.iter().map(|mistake| format!("{}: {mistake}", path.display())).collect();
            bail!("{}", lines.join("\n"));
        }
    };
    templates(path, &mut plan)?;
    Ok(plan)
}

fn text(path: &Path) -> anyhow::Result<String> {
    let context = || format!("cannot read {}", path.display());
    let length = std::fs::metadata(path).with_context(context)?.len();
    if length > TEXT_BYTES_MAX as u64 {
        bail!("{} is longer than {} KiB: is it a plan?", path.display(), TEXT_BYTES_MAX >> 10);
    }
    std::fs::read_to_string(path).with_context(context)
}

/// Puts the text of templates in the place of their paths, which are relative to the plan.
fn templates(path: &Path, plan: &mut Plan) -> anyhow::Result<()> {
    let dir = path.parent().unwrap_or_else(|| Path::new("."));
    for group in &mut plan.groups {
        if let Some(template) = &mut group.template {
            *template = text(&dir.join(&*template))
                .with_context(|| format!("the template of group '{}'", group.name))?;
        }
    }
    Ok(())
}
