//! `bootcache pull`: fetches an image from other nodes, by the daemon if one runs, else by itself.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bootcache::choose::PeerKey;
use bootcache::control::{ImageStatus, Reply, Request};
use bootcache::digest::Digest;
use bootcache::name::ImageName;
use bootcache::transfer::{Options, Pin};
use indicatif::{HumanBytes, HumanDuration, ProgressBar, ProgressStyle};
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

use super::session::Session;

const TICK: Duration = Duration::from_millis(200);
const INTERRUPTED: u8 = 130;

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
    /// Bytes a second that everything beyond the boot cache may take [default: as many as there are]
    #[arg(long, value_name = "BYTES", default_value_t = 0, hide_default_value = true)]
    rate: u64,
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
        Ok(Options {
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
        let request = Request::Pull {
            name: args.name.clone(),
            root: args.digest,
            boot: args.boot_digest.map_or(Pin::Any, Pin::Heads),
            sources,
            fill: !args.boot_only,
            fill_rate: args.rate,
        };
        let mut interrupt = signal(SignalKind::interrupt())?;
        let root = tokio::select! {
            reply = session.call(request) => match reply? {
                Reply::Image { root } => root,
                _ => bail!("the daemon answered out of turn"),
            },
            _ = interrupt.recv() => return Ok(ExitCode::from(INTERRUPTED)),
        };
        let bar = bar(&args.name);
        let mut transfer = None;
        let (code, image) = loop {
            let image = image_status(&mut session, root).await?;
            if let Some(current) = &image.transfer {
                show(&bar, &image, current);
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
        report(globals.json, &outcome, code)?;
        Ok(code)
    })
}

fn report(json: bool, outcome: &Outcome<'_>, code: ExitCode) -> anyhow::Result<()> {
    if json {
        println!("{}", serde_json::to_string(outcome)?);
    } else if code != ExitCode::SUCCESS {
        eprintln!("interrupted: what has come is kept; `bootcache pull {}` goes on", outcome.name);
    } else {
        let bytes = outcome.status.as_ref().and_then(|status| status.transfer.as_ref());
        let bytes = bytes.map_or(0, |transfer| transfer.bytes.iter().sum());
        let took = HumanDuration(Duration::from_secs_f64(outcome.seconds));
        println!("{} {}: {} in {took:#}", outcome.name, outcome.root.short(), HumanBytes(bytes));
    }
    Ok(())
}

async fn image_status(session: &mut Session, root: Digest) -> anyhow::Result<ImageStatus> {
    let Reply::Status(status) = session.call(Request::Status).await? else {
        bail!("the daemon answered out of turn");
    };
    status.images.into_iter().find(|image| image.root == root).context("the image was removed")
}

fn show(bar: &ProgressBar, image: &ImageStatus, transfer: &bootcache::control::TransferStatus) {
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
