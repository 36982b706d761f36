//! `bootcache status`: what this node's daemon has, and how far it is.

use std::process::ExitCode;

use anyhow::bail;
use bootcache::control::{Client, ImageStatus, Reply, Request, Status};
use bootcache::serve::CONTROL_SOCKET;
use indicatif::HumanBytes;

use super::boot_report;
use super::fold::fold;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

pub(crate) fn run(globals: &super::Globals, _: &Args) -> anyhow::Result<ExitCode> {
    super::block_on(async {
        let mut client = Client::connect(&globals.store_dir().join(CONTROL_SOCKET)).await?;
        let Reply::Status(status) = client.call(&Request::Status).await? else {
            bail!("the daemon answered out of turn");
        };
        if globals.json {
            println!("{}", serde_json::to_string(&status)?);
        } else {
            show(&status);
        }
        Ok(ExitCode::SUCCESS)
    })
}

fn show(status: &Status) {
    println!("bootcache {}, process {}, up {} s", status.version, status.pid, status.uptime_seconds);
    let mut images = comfy_table::Table::new();
    images.load_preset(comfy_table::presets::NOTHING);
    images.set_header(["IMAGE", "SIZE", "DATA", "HERE", "OPEN"]);
    for image in &status.images {
        let here = if image.complete { "all".to_owned() } else { format!("{}", HumanBytes(image.present)) };
        images.add_row([
            image.name.to_string(),
            HumanBytes(image.size).to_string(),
            HumanBytes(image.allocated).to_string(),
            here,
            if image.open { "yes" } else { "no" }.to_owned(),
        ]);
    }
    println!("\n{}", images.trim_fmt());
    if !status.overlays.is_empty() {
        let mut overlays = comfy_table::Table::new();
        overlays.load_preset(comfy_table::presets::NOTHING);
        overlays.set_header(["VM OR OVERLAY", "IMAGE", "WRITTEN", "CLIENTS", "SOCKET"]);
        for overlay in &status.overlays {
            let socket = status.vms.iter().any(|vm| vm.name == overlay.name);
            overlays.add_row([
                overlay.name.to_string(),
                overlay.below(),
                HumanBytes(overlay.data).to_string(),
                overlay.connections.to_string(),
                if socket { "own" } else { "shared" }.to_owned(),
            ]);
        }
        println!("\n{}", overlays.trim_fmt());
    }
    status.images.iter().filter(|image| image.transfer.is_some()).for_each(show_transfer);
    for overlay in &status.overlays {
        if let Some(waits) = &overlay.waits {
            let image = status.images.iter().find(|image| Some(image.root) == overlay.base);
            let bound = image.and_then(|image| image.transfer.as_ref()?.waiting_min_ms);
            let waited = boot_report::waited(waits, bound);
            println!("\n{}", fold(&format!("{}: waited {waited}", overlay.name)));
        }
    }
}

/// How an image that is on its way is doing.
fn show_transfer(image: &ImageStatus) {
    let Some(transfer) = &image.transfer else { return };
    let [stream, demand, fill, tree] = transfer.bytes;
    let came = format!(
        "{}: boot frames {}/{}, {} of {} here; came: stream {}, demand {}, fill {}, digests {}",
        image.name,
        transfer.frames,
        transfer.frames_total,
        HumanBytes(transfer.present),
        HumanBytes(image.size),
        HumanBytes(stream),
        HumanBytes(demand),
        HumanBytes(fill),
        HumanBytes(tree),
    );
    println!("\n{}", fold(&came));
    let troubles = format!(
        "  {} hedges, {} failovers, {} corrupt answers, {} bans; {} copied from other images; {} reads wait",
        transfer.hedges,
        transfer.failovers,
        transfer.corrupt,
        transfer.bans,
        HumanBytes(transfer.similar_bytes),
        transfer.waits.waiting,
    );
    println!("{}", fold(&troubles));
    if let Some(trouble) = &transfer.trouble {
        println!("{}", fold(&format!("  {trouble}")));
    }
    for source in &transfer.sources {
        let (state, sent) = (source.state(), HumanBytes(source.bytes));
        let name = format!("{} {}", source.address, source.node);
        println!("{}", fold(&format!("  {}: {state}, sent {sent}", name.trim_end())));
    }
}
