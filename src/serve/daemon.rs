//! The running daemon: sockets in front of a [`Node`], until it is told to stop.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bootcache_nbd::{Server, Tls};
use tokio::net::{TcpListener, UnixListener};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::peer;
use crate::peer::transport::PlainRefused;
use crate::tls::Identity;

use super::exports::NodeExports;
use super::node::{Node, NodeError};
use super::{CONTROL_SOCKET, NBD_SOCKET, local, metrics, nbd_uri, vm_socket};

/// What a daemon listens on.
#[derive(Debug, Default)]
pub struct Options {
    /// Unix socket for NBD clients; `nbd.sock` in the store if none is given.
    pub socket: Option<PathBuf>,
    /// TCP addresses for NBD clients.
    pub listen: Vec<SocketAddr>,
    /// Export this name only.
    pub export: Option<String>,
    /// Allow plain TCP beyond loopback.
    pub insecure: bool,
    /// For TLS on TCP: required beyond loopback unless `insecure`, offered elsewhere.
    pub identity: Option<Identity>,
    /// Serve counters to Prometheus there.
    pub metrics: Option<SocketAddr>,
    /// Serve images to other nodes there, and how.
    pub peers: Option<(SocketAddr, peer::server::ServerOptions)>,
}

/// Why the daemon did not start, or did not end cleanly.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The node.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// A socket cannot be bound.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        /// Path or address.
        address: String,
        /// What the system says.
        source: io::Error,
    },
    /// Plain TCP beyond loopback was not asked for.
    #[error(
        "{0} is beyond loopback and NBD on it would be neither encrypted nor authenticated: \
         give --tls-dir (see `bootcache ca`), listen on 127.0.0.1, use the Unix socket, or say --insecure"
    )]
    Insecure(SocketAddr),
    /// Neither was it for other nodes.
    #[error("--peer-listen: {0}")]
    Plain(#[from] PlainRefused),
    /// The one export that was asked for is not there.
    #[error("cannot export it: {0}")]
    NoExport(String),
}

/// Serves `node` until `cancel`, then closes what is open. `ready` gets one line for a person once all sockets listen, those
/// of VMs too. Until then, and while images that were on their way are taken up again, requests are answered already.
pub async fn run(
    node: Node,
    options: Options,
    cancel: CancellationToken,
    ready: impl FnOnce(&str),
) -> Result<(), ServeError> {
    let looking = Arc::clone(node.arrivals());
    // Before anybody can ask: an image that is still to be taken up is waited for. Without an answer the runtime ends.
    let _ = tokio::task::spawn_blocking(move || looking.look_back()).await;
    if let Some(name) = &options.export {
        node.export(name).await.map_err(|error| ServeError::NoExport(error.to_string()))?;
    }
    let dir = node.store().dir().to_owned();
    let socket = options.socket.unwrap_or_else(|| dir.join(NBD_SOCKET));
    let control = dir.join(CONTROL_SOCKET);
    let node = Arc::new(node);
    let exports = Arc::new(NodeExports { node: Arc::clone(&node), only: options.export });

    let nbd_listener = bind_unix(&socket)?;
    let control_listener = bind_unix(&control)?;
    let mut tcp = Vec::new();
    for address in options.listen {
        let plain = address.ip().to_canonical().is_loopback() || options.insecure;
        let tls = match &options.identity {
            None if plain => Tls::Off,
            None => return Err(ServeError::Insecure(address)),
            Some(identity) if plain => Tls::Allowed(identity.nbd()),
            Some(identity) => Tls::Required(identity.nbd()),
        };
        let bind = |source| ServeError::Bind { address: address.to_string(), source };
        tcp.push((TcpListener::bind(address).await.map_err(bind)?, tls));
    }
    let tasks = TaskTracker::new();
    let mut places = vec![nbd_uri("", &socket)];
    let mut served = None;
    if let Some((address, options)) = options.peers {
        options.security.check(address)?;
        let server = peer::server::Server::new(Arc::clone(node.catalogue()) as Arc<_>, options);
        let bind = |source| ServeError::Bind { address: address.to_string(), source };
        let (listener, address) = server.listen(address).await.map_err(bind)?;
        places.push(format!("peers={address}"));
        served = Some(Arc::clone(server.counters()));
        tasks.spawn(server.run(listener, cancel.clone()));
        let tidied = Arc::clone(node.catalogue()).keep_tidy();
        let cancel = cancel.clone();
        tasks.spawn(async move {
            tokio::select! {
                () = tidied => {}
                () = cancel.cancelled() => {}
            }
        });
    }
    if let Some(address) = options.metrics {
        let bind = |source| ServeError::Bind { address: address.to_string(), source };
        let listener = metrics::bind(address).await.map_err(bind)?;
        if let Ok(address) = listener.local_addr() {
            places.push(format!("http://{address}/metrics"));
        }
        let source = metrics::Source { node: Arc::clone(&node), served };
        tasks.spawn(metrics::serve(source, listener, cancel.clone()));
    }
    let server = Server::new(exports, node.nbd_limits().clone(), Tls::Off);
    for (listener, tls) in tcp {
        if let Ok(address) = listener.local_addr() {
            let scheme = if matches!(tls, Tls::Required(_)) { "nbds" } else { "nbd" };
            places.push(format!("{scheme}://{address}"));
        }
        let (server, cancel) = (server.with_tls(tls), cancel.clone());
        tasks.spawn(async move { server.serve_tcp(listener, cancel).await });
    }
    {
        let cancel = cancel.clone();
        tasks.spawn(async move { server.serve_unix(nbd_listener, cancel).await });
    }
    tasks.spawn(local::serve(Arc::clone(&node), control_listener, cancel.clone()));
    // The guests wait. With their sockets come the images below them; the others come behind.
    node.reopen_vms(&cancel).await?;
    ready(&format!("ready: {}", places.join(" ")));
    {
        let (node, cancel) = (Arc::clone(&node), cancel.clone());
        let resume = async move { cancel.run_until_cancelled(node.arrivals().resume(&cancel)).await };
        tasks.spawn(resume);
    }

    cancel.cancelled().await;
    tasks.close();
    tasks.wait().await;
    node.close().await?;
    for path in [&socket, &control] {
        // It may be gone, or another's by now; either way the daemon has ended well.
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}

fn bind_unix(path: &Path) -> Result<UnixListener, ServeError> {
    vm_socket::bind(path, None)
        .map_err(|source| ServeError::Bind { address: path.display().to_string(), source })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::sync::oneshot;

    use super::*;
    use crate::control::{Client, Reply, Request};
    use crate::serve::node::tests::{add, add_unfinished};
    use crate::store::Store;

    const SOON: Duration = Duration::from_secs(60);

    /// Once, all images that were on their way were read before the first VM had its socket, and before anything was
    /// answered: an agent took that for a daemon that hangs, killed it, and began anew.
    #[tokio::test]
    async fn an_image_that_takes_long_to_be_taken_up_holds_up_no_vm_and_no_answer() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        add(&store, "base", 7);
        let (name, image) = ("a".parse().unwrap(), "base".parse().unwrap());
        {
            let node = Node::open(store.clone()).unwrap();
            let requests = [
                Request::OverlayCreate { image, name, size: None },
                Request::VmOpen { name: "a".parse().unwrap(), owner: None },
            ];
            for request in requests {
                node.handle(request).await.unwrap();
            }
            node.close().await.unwrap();
        }
        let slow = add_unfinished(&store, "slow", 9);
        let node = Node::open(store.clone()).unwrap();
        // As long as its file is read.
        let reading = node.arrivals().keep_away(slow).await;
        let (cancel, (tell, ready)) = (CancellationToken::new(), oneshot::channel());
        let serving = tokio::spawn(run(node, Options::default(), cancel.clone(), move |_| {
            tell.send(()).unwrap();
        }));
        tokio::time::timeout(SOON, ready).await.expect("it is ready").unwrap();
        let mut client = Client::connect(&dir.path().join(CONTROL_SOCKET)).await.unwrap();
        let asked = tokio::time::timeout(SOON, client.call(&Request::Status)).await.expect("an answer");
        let Reply::Status(status) = asked.unwrap() else { panic!("another answer") };
        assert_eq!(status.vms.len(), 1);
        // Who needs that image waits for it, and is not told that it is not there.
        let create =
            Request::OverlayCreate { image: "slow".parse().unwrap(), name: "b".parse().unwrap(), size: None };
        let mut creating = std::pin::pin!(client.call(&create));
        tokio::time::timeout(Duration::from_millis(200), &mut creating).await.unwrap_err();
        drop(reading);
        let created = tokio::time::timeout(SOON, creating).await.expect("an answer").unwrap();
        assert!(matches!(created, Reply::Overlay(_)));
        cancel.cancel();
        tokio::time::timeout(SOON, serving).await.expect("it ends").unwrap().unwrap();
    }
}
