//! Bytes that no honest peer would send, and operations in any order: no panic, no hang, no wrong byte.
//!
//! Each target runs for `BOOTCACHE_FUZZ_SECONDS`: 5 unless set, 60 in CI, and `make fuzz` takes 20 minutes. Inputs are
//! conversations of the seed corpus ([`seeds`]) that are spoilt at random places. Time is virtual: a wait that would
//! never end is found at once. `cargo bolero test` drives the same targets by coverage, where a nightly toolchain is.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "fuzz/seeds.rs"]
mod seeds;

use std::sync::Arc;
use std::time::Duration;

use bolero::TypeGenerator;
use bootcache_nbd::client::{Address, Client, Policy};
use bootcache_nbd::handshake::{parse_go, parse_queries};
use bootcache_nbd::layers::{DelayDisk, Delays, MemoryDisk};
use bootcache_nbd::request::{Action, Request, Terms, check};
use bootcache_nbd::{Export, Features, Limits, Server, SharedDisk, Tls, ZeroFlags};
use seeds::Spoilt;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::UnixListener;
use tokio::runtime::{Builder, Runtime};
use tokio_util::sync::CancellationToken;

const SIZE: usize = 1 << 20;

fn budget() -> Duration {
    let seconds = std::env::var("BOOTCACHE_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok());
    let usual = if std::env::var_os("CI").is_some() { 60 } else { 5 };
    Duration::from_secs(seconds.unwrap_or(usual))
}

/// Runs `check` on inputs of type `T` until the time is over.
fn fuzz<T>(check: impl Fn(&T))
where
    T: TypeGenerator + Clone + std::fmt::Debug + std::panic::RefUnwindSafe + 'static,
{
    let check = std::panic::AssertUnwindSafe(check);
    bolero::check!()
        .with_type::<T>()
        .with_iterations(usize::MAX)
        .with_test_time(budget())
        .cloned()
        .for_each(move |input: T| check(&input));
}

/// One thread, on a clock that jumps to the next timer whenever nothing else is left to do.
fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().start_paused(true).build().unwrap()
}

/// A server on one end of a pipe in memory.
fn serve(disk: SharedDisk) -> (DuplexStream, tokio::task::JoinHandle<()>) {
    let export = Export::new("disk", disk);
    let server = Server::new(Arc::new(export), Limits::default(), Tls::Off);
    let (near, far) = tokio::io::duplex(64 << 10);
    (near, tokio::spawn(async move { server.serve_stream(far, CancellationToken::new()).await }))
}

/// Says `bytes` and hangs up; returns all that the server said. It must end, and not by a panic.
async fn say(bytes: &[u8]) -> Vec<u8> {
    say_to(Arc::new(MemoryDisk::from(vec![7; SIZE])), bytes).await
}

async fn say_to(disk: SharedDisk, bytes: &[u8]) -> Vec<u8> {
    let (near, server) = serve(disk);
    let (mut reader, mut writer) = tokio::io::split(near);
    let talk = async {
        let sending = async {
            let _ = writer.write_all(bytes).await;
            let _ = writer.shutdown().await;
        };
        let mut said = Vec::new();
        let (_, _) = tokio::join!(sending, reader.read_to_end(&mut said));
        server.await.expect("the server panicked");
        said
    };
    tokio::time::timeout(Duration::from_secs(60), talk).await.expect("the server does not end")
}

#[test]
fn handshakes_of_any_bytes_end() {
    let (runtime, seeds) = (runtime(), seeds::handshakes());
    fuzz(|input: &Spoilt| {
        let said = runtime.block_on(say(&input.bytes(&seeds)));
        assert_eq!(&said[..16], b"NBDMAGICIHAVEOPT");
    });
}

/// Whether `replies` is a row of whole replies, each with a magic that was negotiated.
fn well_formed(mut replies: &[u8], extended: bool) -> Result<(), String> {
    while !replies.is_empty() {
        let word = |at: usize, bytes: usize| -> Result<u64, String> {
            let slice = replies.get(at..at + bytes).ok_or("a header is cut short")?;
            Ok(slice.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
        };
        let length = match (word(0, 4)?, extended) {
            (0x6744_6698, false) => 16,
            (0x668e_33ef, false) => 20 + word(16, 4)?,
            (0x6e8a_278c, true) => 32 + word(24, 8)?,
            (magic, _) => return Err(format!("a reply begins with {magic:#x}")),
        };
        replies = replies.get(usize::try_from(length).unwrap()..).ok_or("a reply is cut short")?;
    }
    Ok(())
}

#[test]
fn requests_of_any_bytes_get_whole_replies() {
    let runtime = runtime();
    let openings = seeds::openings();
    let greetings = openings.each_ref().map(|opening| runtime.block_on(say(opening)).len());
    let corpora = [seeds::transmissions(false), seeds::transmissions(false), seeds::transmissions(true)];
    fuzz(|(style, waits, input): &(u8, bool, Spoilt)| {
        let style = usize::from(*style) % 3;
        let bytes = [openings[style].clone(), input.bytes(&corpora[style])].concat();
        let memory = Arc::new(MemoryDisk::from(vec![7; SIZE]));
        // On one that never waits all requests but flushes and the like are answered where they are read.
        let delays = Delays::all(Duration::from_millis(1));
        let disk: SharedDisk = if *waits { Arc::new(DelayDisk::new(memory, delays)) } else { memory };
        let said = runtime.block_on(say_to(disk, &bytes));
        // Simple replies do not tell their length.
        if style > 0 {
            let replies = &said[greetings[style]..];
            well_formed(replies, style == 2).unwrap_or_else(|why| panic!("{why}: {replies:x?}"));
        }
    });
}

#[derive(Debug, Clone, TypeGenerator)]
enum Operation {
    Read { at: u32, length: u16 },
    Write { at: u32, length: u16, fill: u8, fua: bool },
    Zero { at: u32, length: u32, no_hole: bool },
    Trim { at: u32, length: u16 },
    Status { at: u32, length: u32 },
    Flush,
}

/// A range within the disk.
fn range(at: u32, length: u32) -> (u64, u32) {
    let size = u32::try_from(SIZE).unwrap();
    let at = at % size;
    (at.into(), 1 + length % (size - at))
}

async fn agree(client: &Client, operations: &[Operation], model: &mut [u8]) {
    let part =
        |at: u64, length: u32| usize::try_from(at).unwrap()..usize::try_from(at).unwrap() + length as usize;
    for operation in operations {
        match *operation {
            Operation::Read { at, length } => {
                let (at, length) = range(at, length.into());
                let data = client.read(at, length).await.unwrap();
                assert!(data == model[part(at, length)], "{operation:?}");
            }
            Operation::Write { at, length, fill, fua } => {
                let (at, length) = range(at, length.into());
                client.write(at, &vec![fill; length as usize], fua).await.unwrap();
                model[part(at, length)].fill(fill);
            }
            Operation::Zero { at, length, no_hole } => {
                let (at, length) = range(at, length);
                client.zero(at, length.into(), ZeroFlags { no_hole, fast: false }, false).await.unwrap();
                model[part(at, length)].fill(0);
            }
            Operation::Trim { at, length } => {
                let (at, length) = range(at, length.into());
                client.trim(at, length.into(), false).await.unwrap();
                // Memory reads as zeroes after a trim.
                model[part(at, length)].fill(0);
            }
            Operation::Status { at, length } => {
                let (at, length) = range(at, length);
                let extents = client.status(at, length.into()).await.unwrap();
                assert!(!extents.is_empty() && extents.iter().all(|extent| extent.length > 0));
            }
            Operation::Flush => client.flush().await.unwrap(),
        }
    }
}

#[test]
fn operations_in_any_order_agree_with_a_vector_of_bytes() {
    let runtime = Runtime::new().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nbd.sock");
    let client = runtime.block_on(async {
        let listener = UnixListener::bind(&path).unwrap();
        let export = Export::new("disk", Arc::new(MemoryDisk::new(SIZE)));
        let server = Server::new(Arc::new(export), Limits::default(), Tls::Off);
        tokio::spawn(async move { server.serve_unix(listener, CancellationToken::new()).await });
        Client::connect(Address::Unix(path), "disk", Policy::default()).await.unwrap()
    });
    fuzz(|operations: &Vec<Operation>| {
        runtime.block_on(async {
            client.zero(0, SIZE as u64, ZeroFlags::default(), false).await.unwrap();
            agree(&client, operations, &mut vec![0; SIZE]).await;
        });
    });
}

#[test]
fn a_client_of_a_hostile_server_gets_an_answer_or_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nbd.sock");
    let (runtime, corpus) = (runtime(), seeds::servers());
    let listener = runtime.block_on(async { UnixListener::bind(&path).unwrap() });
    fuzz(|(reconnects, input): &(bool, Spoilt)| {
        let bytes = Arc::new(input.bytes(&corpus));
        runtime.block_on(async {
            let serve = async {
                // Until the client has had enough, each time the same.
                loop {
                    let (stream, _) = listener.accept().await.unwrap();
                    let bytes = Arc::clone(&bytes);
                    tokio::spawn(async move {
                        let (mut reader, mut writer) = stream.into_split();
                        let _ = writer.write_all(&bytes).await;
                        drop(writer);
                        let _ = tokio::io::copy(&mut reader, &mut tokio::io::sink()).await;
                    });
                }
            };
            let ask = async {
                let reconnect = Duration::from_millis(if *reconnects { 500 } else { 0 });
                let policy =
                    Policy { connect_timeout: Duration::from_secs(10), reconnect, ..Policy::default() };
                let client = Client::connect(Address::Unix(path.clone()), "disk", policy).await?;
                let asked = tokio::join!(client.read(4096, 512), client.status(4096, 8192), client.flush());
                if let Ok(data) = asked.0 {
                    assert_eq!(data.len(), 512);
                }
                client.close().await;
                std::io::Result::Ok(())
            };
            let both = async {
                tokio::select! {
                    () = serve => unreachable!("it serves for ever"),
                    asked = ask => asked,
                }
            };
            let _ = tokio::time::timeout(Duration::from_secs(60), both).await.expect("the client hangs");
        });
    });
}

#[test]
fn codecs_take_any_bytes() {
    fuzz(|(bytes, size, features): &(Vec<u8>, u32, u8)| {
        if let Some((name, wanted)) = parse_go(bytes) {
            assert_eq!(4 + name.len() + 2 + 2 * wanted.len(), bytes.len());
        }
        if let Some((name, queries)) = parse_queries(bytes, Limits::default().queries) {
            let told: usize = queries.iter().map(|query| 4 + query.len()).sum();
            assert_eq!(4 + name.len() + 4 + told, bytes.len());
        }
        let extended = features & 1 != 0;
        let mut request = seeds::request(extended, 0, 0, 0, 0);
        for (to, from) in request.iter_mut().skip(4).zip(bytes) {
            *to = *from;
        }
        let request = Request::parse(&request, extended).unwrap().unwrap();
        let all = Features { prefetch: true, fast_zero: true, ..Features::WRITABLE };
        let terms = Terms {
            size: (*size).into(),
            features: Features { read_only: features & 2 != 0, ..all },
            structured: features & 4 != 0,
            extended,
            contexts: features & 8 != 0,
            payload_max: 32 << 20,
        };
        let (offset, length) = match check(&request, &terms) {
            Ok(Action::Read { offset, length, .. } | Action::Write { offset, length, .. }) => {
                assert!(length <= terms.payload_max);
                (offset, length.into())
            }
            Ok(
                Action::Trim { offset, length, .. }
                | Action::Zero { offset, length, .. }
                | Action::Cache { offset, length }
                | Action::Status { offset, length, .. },
            ) => (offset, length),
            Ok(Action::Flush | Action::Nothing | Action::Disconnect) | Err(_) => return,
        };
        assert!(length > 0 && offset.checked_add(length).is_some_and(|end| end <= terms.size));
    });
}
