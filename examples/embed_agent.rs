//! An agent inside another program: `embed_agent NAME DIR CONTROLLER_ADDR:PORT`.
//!
//! Its instances are in memory and its images pretended, so that the example runs anywhere. A program that runs things of
//! its own implements `Hypervisor`; one on a real node gives `agent::Serve` as its data plane.

use std::sync::Arc;

use bootcache::agent::{Agent, MemoryDataPlane, Options, Services};
use bootcache::controller::client::Target;
use bootcache::hypervisor::{InstanceType, memory::MemoryHypervisor};
use bootcache::image::manifest::ImageKind;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, name, dir, controller] = &arguments[..] else {
        anyhow::bail!("usage: embed_agent NAME DIR CONTROLLER")
    };
    let mut options = Options::new(name.parse()?, dir);
    options.controller = Some(Target::Tcp(controller.parse()?));
    let hypervisor = MemoryHypervisor::new(InstanceType::Vm)
        .observed_by(|instance| println!("{} starts with {} MiB", instance.name, instance.memory_mib));
    let services = Services {
        data_plane: Arc::new(MemoryDataPlane::with_image("debian".parse()?, ImageKind::Vm, 1 << 30)),
        hypervisors: vec![Arc::new(hypervisor)],
        networks: None,
        container_images: None,
    };
    let agent = Agent::start(options, services).await?;
    println!("ready on {}", agent.address());
    tokio::signal::ctrl_c().await?;
    agent.stop().await;
    Ok(())
}
