//! Serves a raw file, or memory, as one NBD export.
//!
//! `cargo run -p bootcache-nbd --example serve -- --memory 64M`, then `nbdinfo nbd://127.0.0.1/disk`; TLS with
//! `--features tls`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use bootcache_nbd::layers::{FileDisk, MemoryDisk};
use bootcache_nbd::{Export, Limits, Server, SharedDisk, Tls};
use clap::Parser;
use tokio::net::{TcpListener, UnixListener};
use tokio_util::sync::CancellationToken;

#[derive(Parser)]
struct Args {
    /// Raw file to serve
    file: Option<PathBuf>,
    /// TCP address; 127.0.0.1:10809 if neither this nor --socket is given
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Option<SocketAddr>,
    /// Unix socket
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Name of the export; the empty name means it too
    #[arg(long, default_value = "disk")]
    name: String,
    /// Refuse writes
    #[arg(long)]
    read_only: bool,
    /// Serve that many bytes of memory instead of a file: 4096, 512K, 64M, 1G
    #[arg(long, value_name = "SIZE", conflicts_with = "file", value_parser = size)]
    memory: Option<usize>,
    /// Require TLS: a folder with ca-cert.pem, server-cert.pem and server-key.pem
    #[arg(long, value_name = "DIR")]
    tls_dir: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let disk: SharedDisk = match (&args.file, args.memory) {
        (Some(path), _) => Arc::new(
            FileDisk::open(path, args.read_only).map_err(|error| format!("{}: {error}", path.display()))?,
        ),
        (None, Some(size)) => Arc::new(MemoryDisk::new(size)),
        (None, None) => return Err("name a file, or give --memory".into()),
    };
    let tls = args.tls_dir.as_deref().map_or(Ok(Tls::Off), tls)?;
    let server = Server::new(Arc::new(Export::new(args.name.as_str(), disk)), Limits::default(), tls);
    let cancel = CancellationToken::new();
    let mut tasks = tokio::task::JoinSet::new();
    let usual = args.socket.is_none().then_some(SocketAddr::from(([127, 0, 0, 1], 10809)));
    if let Some(address) = args.listen.or(usual) {
        let listener = TcpListener::bind(address).await.map_err(|error| format!("{address}: {error}"))?;
        println!("ready: nbd://{}/{}", listener.local_addr()?, args.name);
        let (server, cancel) = (server.clone(), cancel.clone());
        tasks.spawn(async move { server.serve_tcp(listener, cancel).await });
    }
    if let Some(path) = args.socket {
        let listener = UnixListener::bind(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        println!("ready: nbd+unix:///{}?socket={}", args.name, path.display());
        let (server, cancel) = (server.clone(), cancel.clone());
        tasks.spawn(async move { server.serve_unix(listener, cancel).await });
    }
    tokio::signal::ctrl_c().await?;
    cancel.cancel();
    tasks.join_all().await;
    Ok(())
}

/// A number of bytes, or of KiB, MiB or GiB.
fn size(text: &str) -> Result<usize, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number: usize = digits.parse().map_err(|_| "want bytes, or a number with K, M or G".to_owned())?;
    number.checked_mul(1 << shift).ok_or_else(|| "that is more than memory can be".to_owned())
}

#[cfg(not(feature = "tls"))]
fn tls(_: &std::path::Path) -> Result<Tls, Box<dyn std::error::Error>> {
    Err("this was built without TLS: build it with --features tls".into())
}

#[cfg(feature = "tls")]
fn tls(dir: &std::path::Path) -> Result<Tls, Box<dyn std::error::Error>> {
    use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(dir.join("ca-cert.pem"))?)?;
    let clients =
        rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider));
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(clients.build()?)
        .with_single_cert(
            vec![CertificateDer::from_pem_file(dir.join("server-cert.pem"))?],
            PrivateKeyDer::from_pem_file(dir.join("server-key.pem"))?,
        )?;
    Ok(Tls::Required(Arc::new(config)))
}
