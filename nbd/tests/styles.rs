//! The three styles of replies, as our client asks for them: each reads the same, and only one has 64-bit lengths.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{self, Seek, Write};
use std::sync::{Arc, Mutex};

use bootcache_nbd::chunk::Style;
use bootcache_nbd::client::{Address, Client, Policy};
use bootcache_nbd::layers::{FileDisk, MemoryDisk};
use bootcache_nbd::{
    BoxFuture, Disk, Export, Features, Limits, Server, SharedDisk, StatusExtent, Tls, ZeroFlags,
};
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;

const STYLES: [Style; 3] = [Style::Simple, Style::Structured, Style::Extended];

async fn client(disk: SharedDisk, style: Style) -> (Client, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nbd.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let server = Server::new(Arc::new(Export::new("disk", disk)), Limits::default(), Tls::Off);
    tokio::spawn(async move { server.serve_unix(listener, CancellationToken::new()).await });
    let policy = Policy { style, ..Policy::default() };
    (Client::connect(Address::Unix(path), "disk", policy).await.unwrap(), dir)
}

/// 8 TiB of which nothing is kept, only the ranges of zeroes and trims.
#[derive(Default)]
struct Vast {
    asked: Mutex<Vec<(u64, u64)>>,
}

const VAST: u64 = 8 << 40;

impl Disk for Vast {
    fn size(&self) -> u64 {
        VAST
    }

    fn features(&self) -> Features {
        Features { prefetch: true, ..Features::WRITABLE }
    }

    fn read<'a>(&'a self, _: u64, buf: &'a mut [u8]) -> BoxFuture<'a, io::Result<()>> {
        buf.fill(0);
        Box::pin(async { Ok(()) })
    }

    fn trim(&self, offset: u64, length: u64, _: bool) -> BoxFuture<'_, io::Result<()>> {
        self.asked.lock().unwrap().push((offset, length));
        Box::pin(async { Ok(()) })
    }

    fn zero(&self, offset: u64, length: u64, _: ZeroFlags, _: bool) -> BoxFuture<'_, io::Result<()>> {
        self.trim(offset, length, false)
    }

    fn prefetch(&self, offset: u64, length: u64) -> BoxFuture<'_, io::Result<()>> {
        self.trim(offset, length, false)
    }

    fn status(
        &self,
        _: &str,
        offset: u64,
        length: u64,
        _: usize,
    ) -> BoxFuture<'_, io::Result<Vec<StatusExtent>>> {
        self.asked.lock().unwrap().push((offset, length));
        Box::pin(async move { Ok(vec![StatusExtent { length, flags: 3 }]) })
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn extended_headers_carry_effects_and_status_of_more_than_4_gib() {
    let disk = Arc::new(Vast::default());
    let (client, _dir) = client(Arc::clone(&disk) as SharedDisk, Style::Extended).await;
    assert_eq!(client.description().style, Style::Extended);
    client.trim(4096, 5 << 40, false).await.unwrap();
    client.zero(1 << 40, 6 << 40, ZeroFlags::default(), true).await.unwrap();
    client.prefetch(0, VAST).await.unwrap();
    let extents = client.status(0, VAST).await.unwrap();
    assert_eq!(extents, [StatusExtent { length: VAST, flags: 3 }]);
    let asked = [(4096, 5 << 40), (1 << 40, 6 << 40), (0, VAST), (0, VAST)];
    assert_eq!(*disk.asked.lock().unwrap(), asked);
    assert!(client.trim(VAST - 1, 2, false).await.is_err());
    assert!(client.trim(u64::MAX, u64::MAX, false).await.is_err());
    assert_eq!(client.read(VAST - 4096, 4096).await.unwrap(), [0; 4096]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_them_such_lengths_are_refused_here_and_status_comes_in_parts() {
    let disk = Arc::new(Vast::default());
    let (client, _dir) = client(Arc::clone(&disk) as SharedDisk, Style::Structured).await;
    assert_eq!(client.description().style, Style::Structured);
    let refused = client.trim(0, 1 << 32, false).await.unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
    // The connection is as good as before.
    let most = u64::from(u32::MAX);
    client.trim(0, most, false).await.unwrap();
    assert_eq!(*disk.asked.lock().unwrap(), [(0, most)]);
    let extents = client.status(0, most).await.unwrap();
    assert_eq!(extents, [StatusExtent { length: most & !4095, flags: 3 }]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_style_reads_and_writes_the_same() {
    let mut content = vec![0; 2 << 20];
    for (byte, value) in content[300_000..900_000].iter_mut().zip((1..=255_u8).cycle()) {
        *byte = value;
    }
    for style in STYLES {
        let memory = Arc::new(MemoryDisk::from(content.clone()));
        let (client, _dir) = client(Arc::clone(&memory) as SharedDisk, style).await;
        assert_eq!(client.description().style, style);
        assert_eq!(client.description().allocation.is_some(), style != Style::Simple);
        for (offset, length) in [(0, 2 << 20), (299_999, 600_002), (1, 511), (262_143, 524_289)] {
            let data = client.read(offset, length).await.unwrap();
            let start = usize::try_from(offset).unwrap();
            assert!(data == content[start..start + length as usize], "{style:?} {offset} {length}");
        }
        // A chunk of data has a byte at least: for none there is another reply.
        assert_eq!(client.read(4096, 0).await.unwrap(), [0; 0], "{style:?}");
        client.write(4096, &[], false).await.unwrap();
        client.write(1000, &content[300_000..600_000], true).await.unwrap();
        assert!(memory.to_vec()[1000..301_000] == content[300_000..600_000], "{style:?}");
        assert_eq!(client.status(0, 4096).await.is_ok(), style != Style::Simple);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_read_of_a_file_is_whole_in_each_style_and_fails_where_the_file_has_ended() {
    const HOLE: std::ops::Range<usize> = 1 << 20..(1 << 20) + (600 << 10);
    let mut content: Vec<u8> = (0..(3 << 20) + 100_u32).map(|at| (at / 5 % 251).to_le_bytes()[0]).collect();
    content[HOLE].fill(0);
    for style in STYLES {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&content[..HOLE.start]).unwrap();
        file.seek(io::SeekFrom::Start(HOLE.end as u64)).unwrap();
        file.write_all(&content[HOLE.end..]).unwrap();
        let disk = FileDisk::new(file.try_clone().unwrap(), false).unwrap();
        let (client, _dir) = client(Arc::new(disk), style).await;
        let all = (0, content.len());
        let within_the_hole = (HOLE.start + 5, 300_000);
        let odd = [(1, 700_001), (4095, 65_536), (HOLE.start - 9, 262_144), (content.len() - 70_000, 70_000)];
        for (offset, length) in [all, within_the_hole].into_iter().chain(odd) {
            let got = client.read(offset as u64, u32::try_from(length).unwrap()).await.unwrap();
            assert!(got == content[offset..offset + length], "{style:?} {offset} {length}");
        }
        file.set_len(2 << 20).unwrap();
        assert!(client.read((2 << 20) - 4096, 1 << 20).await.is_err(), "{style:?}");
        assert!(client.read(0, 1 << 20).await.unwrap() == content[..1 << 20], "{style:?}");
    }
}
