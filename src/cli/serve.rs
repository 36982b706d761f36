//! `bootcache serve`: the node's daemon.

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;
use bootcache::peer::server::ServerOptions;
use bootcache::serve::{self, Node, Options};
use bootcache::store::Store;
use bootcache::tls::Role;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::session::Session;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Unix socket for NBD clients [default: nbd.sock in the store]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Also listen for NBD clients on TCP, beyond loopback with TLS; may be given several times
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Vec<SocketAddr>,
    /// Export this image or overlay only, and list no others
    #[arg(long, value_name = "NAME")]
    export: Option<String>,
    /// Serve images to other nodes here, those that are still arriving too
    #[arg(long, value_name = "ADDR:PORT")]
    peer_listen: Option<SocketAddr>,
    /// Serve counters for Prometheus on http://ADDR:PORT/metrics, to whoever reaches it
    #[arg(long, value_name = "ADDR:PORT")]
    metrics: Option<SocketAddr>,
    #[command(flatten)]
    peers: super::pull::PeerArgs,
    /// Allow NBD on TCP beyond loopback without TLS: whoever reaches the port reads, and writes overlays
    #[arg(long)]
    insecure: bool,
    /// Keep the images within this many bytes (K, M, G, T): what came from peers and is unused goes
    #[arg(long, value_name = "SIZE", value_parser = super::size::parse)]
    store_limit: Option<u64>,
}

pub(crate) fn run(globals: &super::Globals, args: Args) -> anyhow::Result<ExitCode> {
    super::allow_many_files();
    super::block_on(async {
        let transfer = args.peers.options(&globals.store_dir(), args.peer_listen)?;
        let identity = transfer.security.identity.clone();
        let is_no_node = identity.as_ref().is_some_and(|identity| !identity.is(Role::Node));
        if args.peer_listen.is_some() && is_no_node {
            bail!(
                "the certificate is not a node's, and no node would take anything from here: \
                 make one with `bootcache ca issue NAME`, and name its folder with --tls-dir"
            );
        }
        let server = ServerOptions {
            security: transfer.security.clone(),
            node: transfer.node.clone(),
            key: transfer.key,
            uplink: std::sync::Arc::clone(&transfer.uplink),
            faults: None,
        };
        let dir = globals.store_dir();
        let node = match Session::open_as(&dir, transfer.clone()).await? {
            Session::Direct(node) => *node,
            // The error says who it is.
            Session::Daemon(_) => Node::open_as(Store::open(&dir)?, transfer)?,
        };
        let options = Options {
            peers: args.peer_listen.map(|address| (address, server)),
            socket: args.socket,
            listen: args.listen,
            metrics: args.metrics,
            export: args.export,
            insecure: args.insecure,
            identity,
        };
        let cancel = CancellationToken::new();
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let stop = cancel.clone();
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            stop.cancel();
        });
        if let Some(limit) = args.store_limit {
            tokio::spawn(node.store().clone().keep_within(limit, cancel.clone()));
        }
        serve::run(node, options, cancel, |ready| {
            // Whoever started us may have gone away: that is no reason to end.
            let _ = writeln!(std::io::stdout(), "{ready}");
        })
        .await?;
        Ok(ExitCode::SUCCESS)
    })
}
