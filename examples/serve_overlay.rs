//! Exports a writable overlay over a raw image: `serve_overlay IMAGE FOLDER SOCKET`. The image is never written.
//!
//! Try it with `nbdinfo nbd+unix:///overlay?socket=SOCKET`, or boot from it:
//! `qemu-system-x86_64 -drive driver=nbd,server.type=unix,server.path=SOCKET,export=overlay,if=virtio`.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use bootcache::digest::Digest;
use bootcache::image_disk::ImageDisk;
use bootcache::overlay::Overlay;
use bootcache_nbd::server::{Export, Server, Tls};
use bootcache_nbd::{Disk, Limits};
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let mut argument = || arguments.next().context("usage: serve_overlay IMAGE FOLDER SOCKET");
    let (image, folder, socket) = (argument()?, argument()?, argument()?);

    // An image's identity comes from its store; a lone file is told apart by its path.
    let base = Arc::new(ImageDisk::open(&image)?);
    let root = Digest::of(image.canonicalize()?.as_os_str().as_encoded_bytes());
    if !folder.exists() {
        Overlay::create(&folder, root, base.size())?;
    }
    let overlay = Overlay::open(&folder, base, root)?;

    let _stale = std::fs::remove_file(&socket); // of a server that was killed
    let listener = UnixListener::bind(&socket)?;
    let cancel = CancellationToken::new();
    let server =
        Server::new(Arc::new(Export::new("overlay", Arc::new(overlay.clone()))), Limits::default(), Tls::Off);
    let serving = tokio::spawn({
        let cancel = cancel.clone();
        async move { server.serve_unix(listener, cancel).await }
    });
    println!("ready");

    tokio::signal::ctrl_c().await?;
    cancel.cancel();
    serving.await?;
    overlay.flush().await?;
    let usage = overlay.usage();
    println!("{} blocks written, {} zeroed", usage.data_blocks, usage.zero_blocks);
    Ok(())
}
