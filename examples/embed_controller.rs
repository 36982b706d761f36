//! A controller inside another program, with a chooser of its own: `embed_controller DIR`.
//!
//! It waits for a node called n1 that has the image of its plan (`embed_agent n1 DIR2 ADDR:PORT`, or a real
//! `bootcache agent`), has the plan carried out there, and ends it.

use std::path::Path;
use std::time::Duration;

use bootcache::choose::{Candidate, Chooser, Draw, Need};
use bootcache::controller::{Controller, Options};
use bootcache::wire::cluster::{Found, Query, TaskStatus};

/// Prefers the source that was registered first.
#[derive(Debug)]
struct Seniority;

impl Chooser for Seniority {
    fn name(&self) -> &'static str {
        "seniority"
    }
    fn choose(&self, _need: Need, candidates: &[&Candidate], _draw: &mut Draw) -> Option<usize> {
        (!candidates.is_empty()).then_some(0)
    }
}

const PLAN: &str =
    "name = 'demo'\n[[groups]]\nname = 'web'\ntype = 'vm'\nimage = 'debian'\nmemory = 16\ncount = 3";

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let dir = std::env::args().nth(1).unwrap_or_else(|| "embedded".into());
    let listen = vec![([127, 0, 0, 1], 0).into()];
    let options = Options { listen, chooser: Box::new(Seniority), ..Options::new(Path::new(&dir)) };
    let controller = Controller::start(options).await?;
    println!("ready on {}", controller.addresses()[0]);
    let has_image = |found| matches!(found, Found::Images(images) if !images.is_empty());
    while !has_image(controller.query(Query::images()).await?) {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let plan = bootcache::plan::read::parse(PLAN).map_err(|mistakes| anyhow::anyhow!("{mistakes:?}"))?;
    let task = controller.deploy("demo-1", plan).await?;
    let is_up = |found| matches!(found, Found::Tasks(rows) if rows[0].status == TaskStatus::Running);
    while !is_up(controller.query(Query::tasks(Some(task))).await?) {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    println!("task {task} is up");
    controller.end(task).await?;
    while !matches!(controller.query(Query::tasks(None)).await?, Found::Tasks(rows) if rows.is_empty()) {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    println!("task {task} is gone");
    controller.stop().await;
    Ok(())
}
