//! `bootcache boot IMAGE`: VMs of an image, each with its own overlay and socket.

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use bootcache::control::{Reply, Request};
use bootcache::hypervisor::libvirt::Libvirt;
use bootcache::name::{HostName, ImageName};
use bootcache::qemu::{Accelerator, Until};
use bootcache::store::Store;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::boot_report::{self, BootReport};
use super::guest::{DiskWay, Guest, Plan, undo};

/// Most VMs that one command starts.
const COUNT_MAX: u32 = 10_000;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The image to boot
    image: ImageName,
    /// Name of the VM; with --count the beginning of their names [default: the image's, where that is allowed]
    #[arg(long, value_name = "VM")]
    name: Option<HostName>,
    /// How many VMs, called VM-1, VM-2 and so on
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=i64::from(COUNT_MAX)))]
    count: Option<u32>,
    /// Run a plain QEMU instead of a libvirt domain
    #[arg(long)]
    qemu: bool,
    /// libvirt to use
    #[arg(long, value_name = "URI", env = "LIBVIRT_DEFAULT_URI", default_value = "qemu:///system")]
    connect: String,
    /// How a VM reaches its disk: QEMU's NBD client (socket), or the kernel's (a /dev/nbdX each)
    #[arg(long, value_enum, default_value = "socket", value_name = "WAY")]
    disk: DiskWay,
    /// Memory of a VM in MiB
    #[arg(long, default_value = "512", value_parser = clap::value_parser!(u32).range(16..=1 << 22))]
    memory: u32,
    /// Processors of a VM
    #[arg(long, default_value = "1", value_parser = clap::value_parser!(u32).range(1..=512))]
    cpus: u32,
    /// kvm or tcg [default: kvm where it works]
    #[arg(long)]
    accel: Option<Accelerator>,
    /// Give the VM a network card on this bridge (libvirt only); may be given several times
    #[arg(long, conflicts_with = "qemu")]
    bridge: Vec<String>,
    /// When it has booted: serial:REGEX, tcp:PORT (of one VM) or idle:SECONDS [default: what the recording used]
    #[arg(long, value_name = "CONDITION")]
    until: Option<Until>,
    /// Give up after this many seconds
    #[arg(long, value_name = "SECONDS", default_value = "300")]
    time_limit: u64,
    /// Do not wait for the boot
    #[arg(long)]
    no_wait: bool,
    /// Keep VMs that did not boot
    #[arg(long)]
    keep: bool,
    /// One more argument for a plain QEMU; may be given several times
    #[arg(long, value_name = "ARG", requires = "qemu", allow_hyphen_values = true)]
    qemu_arg: Vec<OsString>,
}

/// How one VM came up.
#[derive(Serialize)]
struct Outcome {
    name: HostName,
    /// Seconds from the start of its QEMU to its report; none if nobody waited.
    seconds: Option<f64>,
    /// Where the time of its reads went; none when its image was all here, or nobody waited.
    report: Option<BootReport>,
}

pub(crate) fn run(globals: &super::Globals, args: Args) -> anyhow::Result<ExitCode> {
    super::block_on(boot(globals, args))
}

async fn boot(globals: &super::Globals, args: Args) -> anyhow::Result<ExitCode> {
    let dir = globals.store_dir();
    let store = Store::open(&dir)?;
    let entry = store.resolve(&args.image)?;
    let until = match (&args.until, entry.manifest.boot.as_ref().and_then(|boot| boot.until.as_ref())) {
        _ if args.no_wait => None,
        (Some(until), _) => Some(until.clone()),
        (None, Some(recorded)) => {
            Some(recorded.parse().context("the boot cache names a condition of its own")?)
        }
        (None, None) => bail!(
            "image '{0}' was not recorded, so nobody knows when it has booted: say --until CONDITION or \
             --no-wait, or record it with `bootcache record {0}`",
            args.image
        ),
    };
    let names = names(&args)?;
    if matches!(until, Some(Until::Tcp(_))) && names.len() > 1 {
        bail!("--until tcp: waits for one VM: boot several with serial: or idle:, or one at a time");
    }
    if matches!(until, Some(Until::Exit)) {
        bail!("the image was recorded until its command ended: say --until CONDITION or --no-wait");
    }
    let libvirt = (!args.qemu).then(|| (Libvirt::new(&args.connect), args.connect.clone()));
    let owner = match &libvirt {
        Some((libvirt, _)) => libvirt.qemu_owner().await?.filter(|owner| {
            let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
            (owner.uid, owner.gid) != (uid, gid)
        }),
        None => None,
    };
    let accelerator = match args.accel {
        Some(accelerator) => accelerator,
        None => Accelerator::detect().await,
    };
    let plan = Plan {
        store: store.clone(),
        image: args.image.clone(),
        root: entry.root,
        disk: args.disk,
        memory_mib: args.memory,
        cpus: args.cpus,
        accelerator,
        bridges: args.bridge.clone(),
        libvirt,
        owner,
        qemu_arguments: args.qemu_arg.clone(),
    };
    let mut client = super::daemon::daemon(store.dir()).await?;
    let (code, mut outcomes) = boot_all(&plan, &mut client, names.clone(), until.as_ref(), &args).await;
    if globals.json {
        // In the order of the names, whoever was up first.
        outcomes.sort_by_key(|outcome| names.iter().position(|name| *name == outcome.name));
        println!("{}", serde_json::to_string(&outcomes)?);
    }
    Ok(code)
}

/// The names of the VMs to start.
fn names(args: &Args) -> anyhow::Result<Vec<HostName>> {
    let base = match &args.name {
        Some(name) => name.clone(),
        None => {
            let name = format!("{}-vm", args.image).replace(['.', '_'], "-");
            name.parse().context("give the VM a name with --name")?
        }
    };
    match args.count {
        None => Ok(vec![base]),
        Some(count) => (1..=count)
            .map(|number| format!("{base}-{number}").parse().context("--name is too long"))
            .collect(),
    }
}

/// Starts the guests one after the other and waits for all of them together.
async fn boot_all(
    plan: &Plan,
    client: &mut bootcache::control::Client,
    names: Vec<HostName>,
    until: Option<&Until>,
    args: &Args,
) -> (ExitCode, Vec<Outcome>) {
    let total = names.len();
    let bar = progress(total);
    let limit = Duration::from_secs(args.time_limit);
    let mut outcomes = Vec::new();
    let mut failed: Vec<HostName> = Vec::new();
    let mut waits = futures_util::stream::FuturesUnordered::new();
    let mut starts = names.into_iter();
    let mut interrupted = false;
    let mut pending: Vec<HostName> = Vec::new();
    let stop = tokio::signal::ctrl_c();
    tokio::pin!(stop);
    loop {
        // One start at a time, while those that were started boot.
        if !interrupted && let Some(name) = starts.next() {
            bar.set_message(format!("starting {name}"));
            match Guest::start(plan, client, name.clone()).await {
                Err(error) => {
                    bar.suspend(|| eprintln!("bootcache: {name}: {error:#}"));
                    // What keeps one from starting keeps the others too.
                    starts = Vec::new().into_iter();
                    failed.push(name);
                }
                Ok(_) if until.is_none() => {
                    outcomes.push(Outcome { name, seconds: None, report: None });
                    bar.inc(1);
                }
                Ok(mut guest) => {
                    pending.push(name);
                    let until = until.cloned();
                    waits.push(async move {
                        let until = until.expect("checked above");
                        let result = guest.booted(plan, &until, limit).await;
                        (guest.name().clone(), result)
                    });
                }
            }
            continue;
        }
        bar.set_message(format!("{} booting", waits.len()));
        let finished = tokio::select! {
            _ = &mut stop, if !interrupted => {
                interrupted = true;
                break;
            }
            finished = futures_util::StreamExt::next(&mut waits) => finished,
        };
        let Some((name, result)) = finished else { break };
        pending.retain(|other| *other != name);
        bar.inc(1);
        match result {
            Ok(time) => {
                let report = report(client, &name).await;
                let misses = plan.misses();
                bar.suspend(|| {
                    eprintln!("{name} booted in {:.2} s", time.as_secs_f64());
                    report.iter().flat_map(|report| report.lines(&misses)).for_each(|l| eprintln!("  {l}"));
                });
                outcomes.push(Outcome { name, seconds: Some(time.as_secs_f64()), report });
            }
            Err(error) => {
                bar.suspend(|| eprintln!("bootcache: {name}: {error:#}"));
                if !args.keep {
                    undo(plan, client, &name).await;
                }
                failed.push(name);
            }
        }
    }
    drop(waits);
    bar.finish_and_clear();
    if interrupted {
        for name in &pending {
            if args.keep {
                eprintln!("{name} goes on booting: `bootcache stop {name}` ends it");
            } else {
                undo(plan, client, name).await;
            }
        }
        return (ExitCode::from(130), outcomes);
    }
    let code = if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    (code, outcomes)
}

/// Where the time of a boot went. Without an answer the boot is none the worse.
async fn report(client: &mut bootcache::control::Client, vm: &HostName) -> Option<BootReport> {
    match client.call(&Request::Status).await {
        Ok(Reply::Status(status)) => boot_report::of(&status, vm),
        _ => None,
    }
}

fn progress(total: usize) -> ProgressBar {
    let bar = ProgressBar::new(total as u64);
    let style = ProgressStyle::with_template("{spinner} {pos}/{len} booted  {elapsed_precise}  {wide_msg}");
    bar.set_style(style.expect("the template is valid"));
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}
