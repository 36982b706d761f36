//! A disk layer of one's own: `custom_layer IMAGE SOCKET` exports an image and counts the bytes that are read.
//!
//! A layer implements `Disk` over the disk below it. What it does not override keeps the trait's behaviour: this one is
//! read-only, since it inherits `write`, `trim` and `zero`.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Context;
use bootcache::image_disk::ImageDisk;
use bootcache_nbd::server::{Export, Server, Tls};
use bootcache_nbd::{Attempt, BoxFuture, Disk, Features, Limits, SharedDisk};
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;

struct Counting {
    below: SharedDisk,
    bytes: AtomicU64,
}

impl Disk for Counting {
    fn size(&self) -> u64 {
        self.below.size()
    }
    fn features(&self) -> Features {
        Features { prefetch: false, ..self.below.features() }
    }
    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Attempt {
        let attempt = self.below.try_read(offset, buf);
        if let Attempt::Ready(Ok(())) = attempt {
            self.bytes.fetch_add(buf.len() as u64, Ordering::Relaxed);
        }
        attempt
    }
    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> BoxFuture<'a, io::Result<()>> {
        self.bytes.fetch_add(buf.len() as u64, Ordering::Relaxed);
        self.below.read(offset, buf)
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, image, socket] = &arguments[..] else { anyhow::bail!("usage: custom_layer IMAGE SOCKET") };
    let below = Arc::new(ImageDisk::open(Path::new(image)).with_context(|| image.clone())?);
    let disk = Arc::new(Counting { below, bytes: AtomicU64::new(0) });
    let server = Server::new(Arc::new(Export::new("counted", disk.clone())), Limits::default(), Tls::Off);
    let (listener, cancel) = (UnixListener::bind(socket)?, CancellationToken::new());
    println!("ready");
    tokio::spawn({
        let cancel = cancel.clone();
        async move { tokio::signal::ctrl_c().await.map(|()| cancel.cancel()) }
    });
    server.serve_unix(listener, cancel).await;
    println!("{} bytes were read", disk.bytes.load(Ordering::Relaxed));
    Ok(())
}
