//! `bootcache controller`: knows the nodes and carries out plans.

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use bootcache::choose::{self, Item, Weights};
use bootcache::controller::{Controller, Options, SOCKET};

use super::remote::{SecurityArgs, default_dir};

/// The load items by name.
const ITEMS: [(&str, Item); 4] =
    [("cpu", Item::CPU), ("memory", Item::MEMORY), ("disk", Item::DISK), ("network", Item::NETWORK)];

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder for its database and its socket [default: controller in the store]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Listen for agents and users of other hosts; may be given several times
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Vec<SocketAddr>,
    /// Listen for guests that report that they are up
    #[arg(long, value_name = "ADDR:PORT")]
    report: Option<SocketAddr>,
    /// How guests reach that, where it is not the address itself
    #[arg(long, value_name = "ADDR:PORT", requires = "report")]
    report_as: Option<SocketAddr>,
    /// Seconds between two heartbeats
    #[arg(long, value_name = "SECONDS", default_value_t = 2.0, value_parser = seconds)]
    poll: f64,
    /// Seconds of silence after which a node is offline
    #[arg(long, value_name = "SECONDS", default_value_t = 8.0, value_parser = seconds)]
    offline_after: f64,
    /// How sources of images are chosen
    #[arg(long, value_name = "NAME", default_value = choose::policy::NAMES[0], value_parser = choose::policy::NAMES)]
    chooser: String,
    /// How load items count, together 1, such as cpu=0.2,memory=0.1,disk=0.35,network=0.35; others by number
    #[arg(long, value_name = "ITEM=WEIGHT", value_delimiter = ',')]
    weight: Vec<String>,
    /// Let plans ask for privileged containers, and for VMs by templates of their own: both may do what their host may
    #[arg(long)]
    allow_privileged: bool,
    #[command(flatten)]
    security: SecurityArgs,
}

fn seconds(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| "give a number of seconds".to_owned())?;
    if (0.05..=3600.0).contains(&value) { Ok(value) } else { Err("from 0.05 to 3600 seconds".to_owned()) }
}

pub(crate) fn run(globals: &super::Globals, args: Args) -> anyhow::Result<ExitCode> {
    super::allow_many_files();
    super::block_on(async {
        let weights = weights(&args.weight)?;
        if args.offline_after <= args.poll {
            bail!("--offline-after must be longer than --poll: a node is silent between two heartbeats");
        }
        let dir = args.dir.unwrap_or_else(|| default_dir(globals));
        let options = Options {
            listen: args.listen,
            report: args.report,
            report_as: args.report_as,
            security: args.security.load(&globals.store_dir())?,
            poll: Duration::from_secs_f64(args.poll),
            silence: Duration::from_secs_f64(args.offline_after),
            chooser: choose::by_name(&args.chooser, &weights).context("clap knows the names")?,
            weights,
            allow_privileged: args.allow_privileged,
            ..Options::new(&dir)
        };
        let mut ending = super::signals::Ending::listen()?;
        let controller = Controller::start(options).await?;
        let mut listening = vec![dir.join(SOCKET).display().to_string()];
        listening.extend(controller.addresses().iter().map(ToString::to_string));
        let report = controller.report_address().map(|address| format!(", guests report to {address}"));
        // Whoever started us may have gone away: that is no reason to end.
        let _ = writeln!(
            std::io::stdout(),
            "ready: controller on {}{}",
            listening.join(", "),
            report.unwrap_or_default()
        );
        ending.wait().await;
        controller.stop().await;
        Ok(ExitCode::SUCCESS)
    })
}

fn weights(given: &[String]) -> anyhow::Result<Weights> {
    if given.is_empty() {
        return Ok(Weights::default());
    }
    let weights = given.iter().map(|text| {
        let (item, weight) =
            text.split_once('=').with_context(|| format!("--weight {text}: write ITEM=WEIGHT"))?;
        let named = ITEMS.iter().find(|(name, _)| *name == item).map(|(_, item)| *item);
        let item = match named {
            Some(item) => item,
            None => Item(
                item.parse().with_context(|| format!("--weight {text}: there is no load item '{item}'"))?,
            ),
        };
        let weight =
            weight.parse().with_context(|| format!("--weight {text}: a weight is a number from 0 to 1"))?;
        Ok((item, weight))
    });
    Ok(Weights::new(weights.collect::<anyhow::Result<Vec<_>>>()?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_read_by_name_and_by_number() {
        let read = |text: &str| weights(&text.split(',').map(str::to_owned).collect::<Vec<_>>());
        assert!(read("cpu=0.5,network=0.5").is_ok());
        assert!(read("cpu=0.5,17=0.5").is_ok());
        for bad in ["cpu=0.5", "cpu", "cpu=x", "soul=1", "cpu=2,disk=-1"] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }
}
