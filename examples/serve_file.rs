//! Exports a raw disk image, read-only: `serve_file IMAGE SOCKET`.
//!
//! Any number of clients read it through one page cache: `nbdcopy nbd+unix:///?socket=SOCKET copy.raw`.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use bootcache::image_disk::ImageDisk;
use bootcache_nbd::Limits;
use bootcache_nbd::server::{Export, Server, Tls};
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let mut argument = || arguments.next().context("usage: serve_file IMAGE SOCKET");
    let (image, socket) = (argument()?, argument()?);

    let disk = Arc::new(ImageDisk::open(&image)?);
    let export = Export::new("image", disk);
    let server = Server::new(Arc::new(export), Limits::default(), Tls::Off);
    let listener = UnixListener::bind(&socket)?;
    println!("ready");

    let cancel = CancellationToken::new();
    let interrupt = cancel.clone();
    tokio::spawn(async move {
        // Without a handler for the signal it would end the process at once, which is as good here.
        let _ = tokio::signal::ctrl_c().await;
        interrupt.cancel();
    });
    server.serve_unix(listener, cancel).await;
    std::fs::remove_file(&socket)?;
    Ok(())
}
