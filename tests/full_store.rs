//! A node on which what comes cannot be written: it waits in memory, and nothing more is fetched until it can.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod nodes;

use std::time::{Duration, Instant};

use nodes::{Node, Sample, SlowLink};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};

const DEADLINE: Duration = Duration::from_secs(120);
const SIGXFSZ: i32 = 25;

/// Lets this process write no file beyond `bytes`.
fn limit_files(bytes: Option<u64>) {
    let Rlimit { maximum, .. } = getrlimit(Resource::Fsize);
    setrlimit(Resource::Fsize, Rlimit { current: bytes, maximum }).unwrap();
}

/// It was fetched again and again, each time with a line in the log, and nobody was told.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_written_is_fetched_once_and_kept_when_it_can() {
    // The process would end where a disk only says no.
    let _caught = signal(SignalKind::from_raw(SIGXFSZ)).unwrap();
    let sample = Sample::new(24 << 20, 7);
    let origin = Node::origin(&sample, None).await;
    let slow = SlowLink::new(origin.address, 2 << 20).await;
    let node = Node::empty(None).await;
    let engine = node.pull(&[slow.address], |_| ()).await;
    limit_files(Some(1 << 20));

    let give_up = Instant::now() + DEADLINE;
    while engine.progress().trouble.is_none() {
        assert!(Instant::now() < give_up, "nobody is told");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let (mut came, mut since) = (engine.progress().bytes, Instant::now());
    while since.elapsed() < Duration::from_secs(3) {
        assert!(Instant::now() < give_up, "it is fetched again and again: {came:?}");
        let trouble = engine.progress().trouble.expect("nothing is better yet");
        assert_eq!(trouble, "this node cannot keep what comes: File too large; check this disk");
        tokio::time::sleep(Duration::from_millis(50)).await;
        let now = engine.progress().bytes;
        if now != came {
            (came, since) = (now, Instant::now());
        }
    }

    limit_files(None);
    engine.add_source(origin.address);
    assert!(tokio::time::timeout(DEADLINE, engine.done()).await.expect("it goes on by itself"));
    assert_eq!(engine.progress().trouble, None);
    engine.stop().await;
    assert!(node.read_file() == sample.disk);
    let [stream, demand, fill, _] = engine.progress().bytes;
    let limit = sample.data_bytes() + sample.data_bytes() / 10;
    assert!(stream + demand + fill < limit, "{stream} and {demand} and {fill} came for {limit}");
}
