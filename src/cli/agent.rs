//! `bootcache agent`: runs this node's part of deployments.

use std::convert::Infallible;
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use bootcache::agent::{Agent, DockerImages, HostNetworks, NameLock, Options, Serve, Services, check_name};
use bootcache::control::Request;
use bootcache::controller::SOCKET;
use bootcache::controller::client::Target;
use bootcache::hypervisor::Hypervisor;
use bootcache::hypervisor::docker::Docker;
use bootcache::hypervisor::domains::Domains;
use bootcache::hypervisor::libvirt::Libvirt;
use bootcache::name::HostName;
use bootcache::network::Networks;
use bootcache::qemu::Accelerator;
use bootcache::store::Store;

use super::remote::{SecurityArgs, default_dir, target};

/// How often is looked whether the node's daemon runs.
const DAEMON_PAUSE: Duration = Duration::from_secs(2);

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The controller: HOST:PORT, or the path of its socket [default: the controller of this store]
    #[arg(long, value_name = "TARGET", env = "BOOTCACHE_CONTROLLER")]
    controller: Option<String>,
    /// The node's name in the cluster [default: the host's name]
    #[arg(long, value_name = "NAME")]
    name: Option<HostName>,
    /// Where the controller connects to this agent
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// The address of that as the controller sees it [default: the one this node connects from]
    #[arg(long, value_name = "ADDR")]
    advertise: Option<IpAddr>,
    /// Where this node's daemon serves images to other nodes, when the agent starts the daemon or it was started so
    #[arg(long, value_name = "ADDR:PORT")]
    peer_listen: Option<SocketAddr>,
    /// The libvirt daemon that runs VMs
    #[arg(long, value_name = "URI", default_value = "qemu:///system")]
    connect: String,
    /// The Docker engine that runs containers
    #[arg(long, value_name = "SOCKET", default_value = "/var/run/docker.sock")]
    docker: PathBuf,
    /// What runs VMs, kvm or tcg [default: kvm where it works]
    #[arg(long)]
    accel: Option<Accelerator>,
    /// Run no VMs
    #[arg(long)]
    no_vms: bool,
    /// Run no containers
    #[arg(long)]
    no_containers: bool,
    /// Instances of a type that are started at once
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=256))]
    starts: u32,
    /// How long this node's daemon may be silent before it is killed and another started, for which guests wait
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u32).range(5..=3600))]
    daemon_patience: u32,
    #[command(flatten)]
    security: SecurityArgs,
}

pub(crate) fn run(globals: &super::Globals, args: Args) -> anyhow::Result<ExitCode> {
    super::allow_many_files();
    super::block_on(async {
        let dir = globals.store_dir();
        let name = match args.name {
            Some(name) => name,
            None => host_name()?,
        };
        // The daemon would be started under the name.
        check_name(&dir.join("agent"), &name)?;
        let _alone = match (args.no_vms, args.no_containers) {
            (true, true) => None,
            _ => Some(NameLock::take(&name).await?),
        };
        let security = args.security.load(&dir)?;
        let mut ending = super::signals::Ending::listen()?;
        // What it fetches it fetches as this node, whether or not it gives images to others.
        let mut more = vec!["--node-name".to_owned(), name.to_string()];
        more.extend(args.security.plain.then(|| "--plain".to_owned()));
        if let Some(tls) = &args.security.tls_dir {
            more.extend(["--tls-dir".to_owned(), tls.display().to_string()]);
        }
        if let Some(address) = args.peer_listen {
            if address.port() == 0 {
                bail!("--peer-listen needs a port: other nodes are told it");
            }
            more.extend(["--peer-listen".to_owned(), address.to_string()]);
        }
        super::daemon::daemon_with(&dir, &more).await?;
        let store = Store::open(&dir)?;

        // One that is away now is not left out: its instances may run, and it may come back.
        let mut hypervisors: Vec<Arc<dyn Hypervisor>> = Vec::new();
        let libvirt = (!args.no_vms).then(|| Libvirt::new(&args.connect));
        let domains = libvirt.clone().map(|libvirt| {
            let domains = Domains::new(libvirt, &name, store.dir());
            Arc::new(match args.accel {
                Some(accelerator) => domains.with_accelerator(accelerator),
                None => domains,
            })
        });
        if let Some(domains) = domains.clone() {
            // What is wrong with libvirt, the first VM says.
            tokio::spawn(async move { domains.prepare().await });
        }
        hypervisors.extend(domains.map(|domains| domains as _));
        let docker =
            (!args.no_containers).then(|| Arc::new(Docker::new(args.docker.to_string_lossy(), name.clone())));
        hypervisors.extend(docker.clone().map(|docker| docker as _));
        // As it is called now: an update may put another one in its place.
        let program = super::daemon::program()?;
        let networks = HostNetworks::new(Networks::new(name.clone()), docker.clone());
        let services = Services {
            data_plane: Arc::new(Serve::new(store, args.peer_listen, libvirt).with_devices(program)),
            hypervisors,
            networks: Some(Arc::new(networks)),
            container_images: docker.map(|docker| Arc::new(DockerImages::new(docker)) as _),
        };
        let controller = match &args.controller {
            Some(text) => target(text)?,
            None => Target::Socket(default_dir(globals).join(SOCKET)),
        };
        let options = Options {
            listen: args.listen,
            advertise: args.advertise,
            controller: Some(controller),
            security,
            starts: usize::try_from(args.starts).context("a small number")?,
            ..Options::new(name.clone(), dir.join("agent"))
        };
        let patience = Duration::from_secs(args.daemon_patience.into());
        let agent = Agent::start(options, services).await?;
        // Whoever started us may have gone away: that is no reason to end.
        let _ = writeln!(std::io::stdout(), "ready: agent of node '{name}' on {}", agent.address());
        let ended = async {
            ending.wait().await;
            // What was begun may wait for a daemon that hangs, which is looked after until then.
            agent.stop().await;
        };
        tokio::select! {
            () = ended => {}
            never = keep_daemon(&dir, &more, patience) => match never {},
        }
        Ok(ExitCode::SUCCESS)
    })
}

/// Starts the node's daemon again when it has ended or hangs: nothing can be started here without.
async fn keep_daemon(dir: &Path, more: &[String], patience: Duration) -> Infallible {
    let mut told = String::new();
    loop {
        tokio::time::sleep(DAEMON_PAUSE).await;
        let text = match look_after_daemon(dir, more, patience).await {
            Ok(()) => String::new(),
            Err(error) => format!("{error:#}"),
        };
        // Once for each reason: it may be away for long.
        if text != told && !text.is_empty() {
            super::say(&text);
        }
        told = text;
    }
}

/// Starts the daemon if there is none; kills one that is silent. Guests wait for the next, as they do for an update.
async fn look_after_daemon(dir: &Path, more: &[String], patience: Duration) -> anyhow::Result<()> {
    let mut daemon = super::daemon::daemon_with(dir, more).await?;
    // Whatever it answers.
    if tokio::time::timeout(patience, daemon.call(&Request::Status)).await.is_ok() {
        return Ok(());
    }
    let pid = daemon.pid().context("the daemon hangs, and cannot be seen from here: kill it")?;
    rustix::process::kill_process(pid, rustix::process::Signal::KILL)
        .with_context(|| format!("the daemon hangs: kill {pid:?}"))?;
    bail!(
        "the daemon, process {pid}, was silent for {patience:?}: it was killed, and another takes its place"
    );
}

/// The host's name, where it can be a node's.
fn host_name() -> anyhow::Result<HostName> {
    let name = rustix::system::uname().nodename().to_string_lossy().to_ascii_lowercase();
    let short = name.split('.').next().unwrap_or_default();
    short
        .parse()
        .with_context(|| format!("the host's name '{name}' cannot be a node's: give one with --name"))
}
