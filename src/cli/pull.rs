//! `bootcache pull`: fetches an image from other nodes, by the daemon if one runs, else by itself.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bootcache::choose::{self, PeerKey, Weights, policy};
use bootcache::control::{ImageStatus, Reply, Request, TransferStatus};
use bootcache::digest::Digest;
use bootcache::name::ImageName;
use bootcache::transfer::{Options, Pin};
use indicatif::{HumanBytes, HumanDuration, ProgressBar, ProgressStyle};
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

use super::fold::fold;
use super::session::Session;

const TICK: Duration = Duration::from_millis(200);
const INTERRUPTED: u8 = 130;
/// After so long without anything that came it is said why, and again at most so often.
const STALLED: Duration = Duration::from_secs(10);
const SAY_AGAIN: Duration = Duration::from_secs(60);

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The image, as it is called there, and will be here
    name: ImageName,
    /// A node that has it, or is getting it; may be given several times. Not needed to go on with a pull
    #[arg(long, value_name = "HOST:PORT")]
    from: Vec<String>,
    /// Take nothing but the image with this root digest
    #[arg(long, value_name = "ROOT")]
    digest: Option<Digest>,

    /// Take no boot cache but the one whose heads have this digest; `bootcache image show` has both
    #[arg(long, value_name = "DIGEST")]
    boot_digest: Option<Digest>,
    /// Only what boots, and what is read: end when the boot cache is here
    #[arg(long)]
    boot_only: bool,
    /// Bytes a second, such as 2M, that everything beyond the boot cache may take, 0 for as many as there are [default: as
    /// before, and without a limit at first]
    #[arg(long, value_name = "SIZE", value_parser = super::size::parse)]
    rate: Option<u64>,
    /// Return as soon as the image can be read; a daemon must run, and goes on with it
    #[arg(long)]
    background: bool,
    #[command(flatten)]
    peers: PeerArgs,
}

/// How this node speaks to others.
#[derive(Debug, clap::Args)]
pub(crate) struct PeerArgs {
    #[command(flatten)]
    pub(crate) security: super::remote::SecurityArgs,
    /// What this node calls itself [default: the host's name]
    #[arg(long, value_name = "NAME")]
    pub(crate) node_name: Option<String>,
    /// How sources of images are chosen
    #[arg(long, value_name = "NAME", env = "BOOTCACHE_CHOOSER", hide_env_values = true,
          default_value = policy::NAMES[0], value_parser = policy::NAMES)]
    chooser: String,
}

impl PeerArgs {
    /// The options of transfers for the store in `store`, by a node that serves peers on `listen`.
    pub(crate) fn options(&self, store: &Path, listen: Option<SocketAddr>) -> anyhow::Result<Options> {
        let security = self.security.load(store)?;
        let node = self
            .node_name
            .clone()
            .unwrap_or_else(|| rustix::system::uname().nodename().to_string_lossy().into_owned());
        // Several nodes may run on one host, in namespaces of the same name.
        let store = std::path::absolute(store).context("cannot tell where the store is")?;
        let key = PeerKey::of(&format!("{node} {} {listen:?}", store.display())).0;
        let chooser = choose::by_name(&self.chooser, &Weights::default()).context("clap knows the names")?;
        Ok(Options {
            chooser: Arc::from(chooser),
            security,
            node,
            key,
            listen: listen.map(|address| address.port()).filter(|port| *port != 0),
            ..Options::default()
        })
    }
}

/// What is printed at the end with `--json`.
#[derive(Debug, Serialize)]
struct Outcome<'a> {
    name: &'a ImageName,
    root: Digest,
    seconds: f64,
    complete: bool,
    status: Option<ImageStatus>,
}

pub(crate) fn run(globals: &super::Globals, args: &Args) -> anyhow::Result<ExitCode> {
    super::block_on(async {
        let began = Instant::now();
        let dir = globals.store_dir();
        let mut sources = Vec::new();
        for source in &args.from {
            let found = tokio::net::lookup_host(source)
                .await
                .with_context(|| format!("cannot find {source}: give it as HOST:PORT"))?;
            sources.extend(found);
        }
        let mut session = Session::open_as(&dir, args.peers.options(&dir, None)?).await?;
        if args.background && matches!(session, Session::Direct(_)) {
            bail!("no daemon runs on this store to go on with it: start one with `bootcache serve`");
        }
        let by_daemon = matches!(session, Session::Daemon(_));
        let request = Request::Pull {
            name: args.name.clone(),
            root: args.digest,
            boot: args.boot_digest.map_or(Pin::Any, Pin::Heads),
            sources,
            fill: !args.boot_only,
            fill_rate: fill_rate(args.rate),
        };
        let mut interrupt = signal(SignalKind::interrupt())?;
        let root = tokio::select! {
            reply = session.call(request) => match reply? {
                Reply::Image { root } => root,
                _ => bail!("the daemon answered out of turn"),
            },
            _ = interrupt.recv() => {
                if by_daemon {
                    eprintln!("interrupted: {}", goes_on(&args.name));
                }
                return Ok(ExitCode::from(INTERRUPTED));
            }
        };
        let bar = bar(&args.name);
        let mut transfer = None;
        let mut stall = Stall::new(Instant::now());
        let (code, image) = loop {
            let image = image_status(&mut session, root).await?;
            if let Some(current) = &image.transfer {
                show(&bar, &image, current);
                if let Some(why) = stall.look(Instant::now(), current) {
                    bar.suspend(|| eprintln!("{}", fold(&format!("{}: {why}", args.name))));
                }
                transfer = Some(current.clone());
            }
            let boots = image.transfer.as_ref().is_some_and(|transfer| transfer.boot_complete);
            if image.complete || (args.boot_only && boots) || args.background {
                break (ExitCode::SUCCESS, image);
            }
            tokio::select! {
                () = tokio::time::sleep(TICK) => {}
                _ = interrupt.recv() => break (ExitCode::from(INTERRUPTED), image),
            }
        };
        bar.finish_and_clear();
        session.close().await?;
        let outcome = Outcome {
            name: &args.name,
            root,
            seconds: began.elapsed().as_secs_f64(),
            complete: image.complete,
            // The transfer may have ended since its last numbers.
            status: transfer.map(|transfer| ImageStatus { transfer: Some(transfer), ..image }),
        };
        let interrupted = code != ExitCode::SUCCESS;
        if globals.json || !interrupted {
            report(globals.json, &outcome)?;
        }
        if interrupted && by_daemon {
            eprintln!("interrupted: {}", goes_on(&args.name));
        } else if interrupted {
            eprintln!("interrupted: what has come is kept; `bootcache pull {}` goes on", args.name);
        }
        Ok(code)
    })
}

/// The rate as a daemon is told it: for one, 0 leaves what was said before.
const fn fill_rate(said: Option<u64>) -> u64 {
    match said {
        None => 0,
        Some(0) => u64::MAX,
        Some(rate) => rate,
    }
}

/// What becomes of a pull whose command ends before it.
fn goes_on(name: &ImageName) -> String {
    format!("the daemon goes on with it (`bootcache status`); `bootcache image remove {name}` ends that")
}

fn report(json: bool, outcome: &Outcome<'_>) -> anyhow::Result<()> {
    if json {
        println!("{}", serde_json::to_string(outcome)?);
    } else {
        let bytes = outcome.status.as_ref().and_then(|status| status.transfer.as_ref());
        let bytes = bytes.map_or(0, |transfer| transfer.bytes.iter().sum());
        let took = HumanDuration(Duration::from_secs_f64(outcome.seconds));
        println!("{} {}: {} in {took:#}", outcome.name, outcome.root.short(), HumanBytes(bytes));
    }
    Ok(())
}

/// When something last came, and when it was last said why nothing does.
#[derive(Debug)]
struct Stall {
    came: Option<(u64, [u64; 4])>,
    since: Instant,
    said: Option<Instant>,
}

impl Stall {
    const fn new(now: Instant) -> Self {
        Self { came: None, since: now, said: None }
    }

    /// What to say at `now` of a transfer that is so far: why nothing comes, if it is the sources' fault or this node's.
    fn look(&mut self, now: Instant, transfer: &TransferStatus) -> Option<String> {
        let came = Some((transfer.present, transfer.bytes));
        if came != std::mem::replace(&mut self.came, came) {
            self.since = now;
        }
        let stalled = now.duration_since(self.since);
        let is_slow = transfer.trouble.is_none() && transfer.sources.iter().any(|source| source.is_usable());
        let said_lately = self.said.is_some_and(|said| now.duration_since(said) < SAY_AGAIN);
        if stalled < STALLED || is_slow || said_lately {
            return None;
        }
        self.said = Some(now);
        let sources = transfer.sources.iter().map(|source| format!("{} {}", source.address, source.state()));
        let why: Vec<String> = transfer.trouble.iter().cloned().chain(sources).collect();
        Some(match why.is_empty() {
            true => "nothing comes; no source is known".to_owned(),
            false => format!("nothing comes; {}", why.join("; ")),
        })
    }
}

async fn image_status(session: &mut Session, root: Digest) -> anyhow::Result<ImageStatus> {
    let Reply::Status(status) = session.call(Request::Status).await? else {
        bail!("the daemon answered out of turn");
    };
    status.images.into_iter().find(|image| image.root == root).context("the image was removed")
}

fn show(bar: &ProgressBar, image: &ImageStatus, transfer: &TransferStatus) {
    bar.set_length(image.size);
    bar.set_position(transfer.present);
    let up = transfer.sources.iter().filter(|source| source.up).count();
    bar.set_message(format!("boot {}/{}, {up} sources", transfer.frames, transfer.frames_total));
}

fn bar(name: &ImageName) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{prefix} {wide_bar} {bytes}/{total_bytes} {msg}")
        .expect("the template is sound");
    ProgressBar::new(0).with_style(style).with_prefix(name.to_string())
}

#[cfg(test)]
mod tests {
    use bootcache::control::{SourceStatus, WaitStatus};

    use super::*;

    fn source(up: bool, error: Option<&str>) -> SourceStatus {
        SourceStatus {
            address: "10.0.0.1:7602".parse().unwrap(),
            node: String::new(),
            up,
            error: error.map(str::to_owned),
            banned: false,
            banned_seconds: 0,
            complete: true,
            bytes: 0,
        }
    }

    fn transfer(present: u64, sources: Vec<SourceStatus>) -> TransferStatus {
        TransferStatus {
            frames: 0,
            frames_total: 0,
            boot_complete: false,
            present,
            bytes: [0; 4],
            origin_bytes: 0,
            waits: WaitStatus::default(),
            waiting_min_ms: None,
            goodput: None,
            similar_bytes: 0,
            hedges: 0,
            failovers: 0,
            corrupt: 0,
            bans: 0,
            trouble: None,
            sources,
        }
    }

    #[test]
    fn why_nothing_comes_is_said_after_ten_seconds_and_once_a_minute() {
        let began = Instant::now();
        let at = |seconds| began + Duration::from_secs(seconds);
        let absent = || vec![source(false, Some("has not this image"))];
        let mut stall = Stall::new(began);
        assert_eq!(stall.look(at(0), &transfer(1, absent())), None);
        assert_eq!(stall.look(at(9), &transfer(1, absent())), None);
        let said = stall.look(at(10), &transfer(1, absent())).unwrap();
        assert_eq!(said, "nothing comes; 10.0.0.1:7602 has not this image");
        assert_eq!(stall.look(at(69), &transfer(1, absent())), None);
        assert!(stall.look(at(70), &transfer(1, absent())).is_some());
        assert_eq!(stall.look(at(131), &transfer(2, absent())), None, "something came");
        assert!(stall.look(at(141), &transfer(2, absent())).is_some());
        let good = || vec![source(true, None)];
        assert_eq!(stall.look(at(999), &transfer(2, good())), None, "it may be slow for a reason");
        let full = TransferStatus { trouble: Some("this node is full".to_owned()), ..transfer(2, good()) };
        assert_eq!(
            stall.look(at(1000), &full).unwrap(),
            "nothing comes; this node is full; 10.0.0.1:7602 has everything"
        );
    }
}
