//! `bootcache boot IMAGE`: VMs of an image, each with its own overlay and socket.

use std::collections::HashMap;
use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use bootcache::control::{Owner, Reply, Request};
use bootcache::hypervisor::libvirt::Libvirt;
use bootcache::name::{HostName, ImageName};
use bootcache::qemu::until::ParseUntilError;
use bootcache::qemu::{Accelerator, Until};
use bootcache::store::Store;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::boot_report::{self, BootReport};
use super::guest::{DiskWay, Guest, Plan, undo};
use super::reuse;
use super::signals::Ending;

/// Most VMs that one command starts.
const COUNT_MAX: u32 = 10_000;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The image to boot
    image: ImageName,
    /// Name of the VM; with --count the beginning of their names [default: IMAGE-vm]
    #[arg(long, value_name = "VM")]
    name: Option<HostName>,
    /// Go on with the overlays that are there, as `stop` leaves them; make those that are not
    #[arg(long)]
    reuse: bool,
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
    /// Give the VM a network interface on this bridge (libvirt only); may be given several times
    #[arg(long, conflicts_with = "qemu")]
    bridge: Vec<String>,
    /// When it has booted: serial:REGEX, tcp:PORT (of one VM) or idle:SECONDS [default: what the recording used]
    #[arg(long, value_name = "CONDITION", value_parser = condition)]
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
    /// Why it did not come up; none when it did.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

impl Outcome {
    fn started(name: HostName) -> Self {
        Self { name, seconds: None, report: None, error: None }
    }

    fn failed(name: HostName, error: &anyhow::Error) -> Self {
        Self { error: Some(format!("{error:#}")), ..Self::started(name) }
    }
}

/// A condition that can be waited for: a VM's QEMU does not exit when its guest has booted.
fn condition(text: &str) -> Result<Until, String> {
    match text.parse() {
        Ok(Until::Exit) | Err(ParseUntilError::Form(_)) => {
            Err("a VM can be waited for by serial:REGEX, tcp:PORT or idle:SECONDS".to_owned())
        }
        parsed => parsed.map_err(|error| error.to_string()),
    }
}

pub(crate) fn run(globals: &super::Globals, args: Args) -> anyhow::Result<ExitCode> {
    super::block_on(boot(globals, args))
}

async fn boot(globals: &super::Globals, args: Args) -> anyhow::Result<ExitCode> {
    let dir = globals.existing_store_dir()?;
    let store = Store::open(&dir)?;
    let entry = store.resolve(&args.image)?;
    super::image::refuse_container(&args.image, &entry)?;
    let recorded = entry.manifest.boot.as_ref().and_then(|boot| boot.until.as_ref());
    let until = match (&args.until, recorded) {
        (Some(until), _) => Some(until.clone()),
        (None, Some(recorded)) => match recorded.parse() {
            Err(_) if args.no_wait => None,
            parsed => Some(parsed.context("the boot cache names a condition of its own")?),
        },
        (None, None) if args.no_wait => None,
        (None, None) => bail!(
            "image '{0}' was not recorded, so nobody knows when it has booted: say --until CONDITION or \
             --no-wait, or record it with `bootcache record {0}`",
            args.image
        ),
    };
    let nat = matches!(until, Some(Until::Tcp(_))) && args.bridge.is_empty();
    let until = until.filter(|_| !args.no_wait);
    let names = names(&args)?;
    if matches!(until, Some(Until::Tcp(_))) && names.len() > 1 {
        bail!("--until tcp: waits for one VM: boot several with serial: or idle:, or one at a time");
    }
    if matches!(until, Some(Until::Exit)) {
        bail!("the image was recorded until its command ended: say --until CONDITION or --no-wait");
    }
    let libvirt = (!args.qemu).then(|| (Libvirt::new(&args.connect), args.connect.clone()));
    let (owner, accelerator) = tokio::join!(other_owner(libvirt.as_ref()), async {
        match args.accel {
            Some(accelerator) => accelerator,
            None => Accelerator::detect().await,
        }
    });
    let owner = owner?;
    let mut client = super::daemon::daemon(store.dir()).await?;
    let kept = if args.reuse {
        reuse::kept(&store, &mut client, &names, entry.root).await?
    } else {
        reuse::none_kept(&mut client, &names).await?;
        HashMap::new()
    };
    let plan = Plan {
        store: store.clone(),
        image: args.image.clone(),
        root: entry.root,
        kept,
        disk: args.disk,
        memory_mib: args.memory,
        cpus: args.cpus,
        accelerator,
        bridges: args.bridge.clone(),
        nat,
        until,
        time_limit: Duration::from_secs(args.time_limit),
        libvirt,
        owner,
        qemu_arguments: args.qemu_arg.clone(),
    };
    let (code, mut outcomes) = boot_all(&plan, names.clone(), args.keep).await?;
    if globals.json {
        // In the order of the names, whoever was up first.
        outcomes.sort_by_key(|outcome| names.iter().position(|name| *name == outcome.name));
        println!("{}", serde_json::to_string(&outcomes)?);
    }
    Ok(code)
}

/// The user that libvirt runs QEMU as, when that is another than this process's.
async fn other_owner(libvirt: Option<&(Libvirt, String)>) -> anyhow::Result<Option<Owner>> {
    let Some((libvirt, _)) = libvirt else { return Ok(None) };
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    Ok(libvirt.qemu_owner().await?.filter(|owner| (owner.uid, owner.gid) != (uid, gid)))
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
async fn boot_all(plan: &Plan, names: Vec<HostName>, keep: bool) -> anyhow::Result<(ExitCode, Vec<Outcome>)> {
    let mut ending = Ending::listen()?;
    let bar = progress(names.len());
    let mut outcomes: Vec<Outcome> = Vec::new();
    let mut names = names.into_iter();
    // One start at a time, while those that were started boot.
    let mut starts = FuturesUnordered::new();
    let mut waits = FuturesUnordered::new();
    // Those that are neither up nor undone.
    let mut pending: Vec<HostName> = Vec::new();
    let interrupted = loop {
        if starts.is_empty()
            && let Some(name) = names.next()
        {
            pending.push(name.clone());
            starts.push(async move { (name.clone(), Guest::start(plan, name).await) });
        }
        if starts.is_empty() && waits.is_empty() {
            break false;
        }
        bar.set_message(match pending.last() {
            Some(name) if !starts.is_empty() => format!("starting {name}"),
            _ => format!("{} booting", waits.len()),
        });
        let outcome = tokio::select! {
            () = ending.wait() => break true,
            Some((name, started)) = starts.next() => match started {
                Ok(guest) if plan.until.is_some() => {
                    waits.push(async move { (wait(plan, guest, keep).await, name) });
                    continue;
                }
                Ok(_) => Outcome::started(name),
                Err(error) => {
                    // What keeps one from starting keeps the others too.
                    let rest: Vec<HostName> = std::mem::replace(&mut names, Vec::new().into_iter()).collect();
                    if let [first, ..] = &rest[..] {
                        bar.suspend(|| eprintln!("not started: {first} and what follows, {} VMs", rest.len()));
                    }
                    Outcome::failed(name, &error)
                }
            },
            Some((waited, name)) = waits.next() => match waited {
                Ok((time, report)) => {
                    Outcome { seconds: Some(time.as_secs_f64()), report, ..Outcome::started(name) }
                }
                Err(error) => Outcome::failed(name, &error),
            },
        };
        pending.retain(|other| *other != outcome.name);
        bar.inc(1);
        bar.suspend(|| say(plan, &outcome));
        outcomes.push(outcome);
    };
    drop(waits);
    bar.finish_and_clear();
    if interrupted {
        // libvirt goes on with a start that nobody waits for.
        let clean_up = async {
            if let Some((name, Err(_))) = starts.next().await {
                pending.retain(|other| *other != name);
            }
            for name in &pending {
                if keep {
                    eprintln!("{name} goes on booting: `bootcache stop {name}` ends it");
                } else {
                    undo(plan, name).await;
                }
            }
        };
        tokio::select! {
            () = clean_up => {}
            () = ending.wait() => eprintln!("some VMs may go on: `bootcache status` shows them"),
        }
        return Ok((ExitCode::from(130), outcomes));
    }
    let all = outcomes.iter().all(|outcome| outcome.error.is_none());
    Ok((if all { ExitCode::SUCCESS } else { ExitCode::FAILURE }, outcomes))
}

/// Waits for a guest; one that does not come up is undone, unless it is to be kept.
async fn wait(plan: &Plan, guest: Guest, keep: bool) -> anyhow::Result<(Duration, Option<BootReport>)> {
    let name = guest.name().clone();
    match guest.booted(plan).await {
        Ok(time) => Ok((time, report(plan, &name).await)),
        Err(error) => {
            if !keep {
                undo(plan, &name).await;
            }
            Err(error)
        }
    }
}

/// Tells a person how a VM came up.
fn say(plan: &Plan, outcome: &Outcome) {
    let Outcome { name, seconds, report, error } = outcome;
    if let Some(error) = error {
        eprintln!("bootcache: {name}: {error}");
    }
    if let Some(seconds) = seconds {
        eprintln!("{name} booted in {seconds:.2} s");
    }
    let misses = plan.misses();
    report.iter().flat_map(|report| report.lines(&misses)).for_each(|line| eprintln!("  {line}"));
}

/// Where the time of a boot went. Without an answer the boot is none the worse.
async fn report(plan: &Plan, vm: &HostName) -> Option<BootReport> {
    match plan.client().await.ok()?.call(&Request::Status).await {
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
