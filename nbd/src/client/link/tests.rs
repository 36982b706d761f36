//! A link against a server that is played here.

use futures_util::poll;

use super::*;

/// A link to a server that has been sent at most `held` bytes that it has not read.
fn link(held: usize) -> (Link, tokio::io::DuplexStream) {
    let (near, far) = tokio::io::duplex(held);
    let description = ExportDescription {
        size: 1 << 20,
        flags: 0,
        block_sizes: (1, 4096, 1 << 20),
        style: Style::Simple,
        allocation: None,
    };
    (Link::new(Box::new(near), &description), far)
}

/// Once, whoever waited to send a request sent it behind half of one that was given up: the server took it for the
/// rest of that one's payload, and wrote it to the disk.
#[tokio::test]
async fn nothing_follows_a_request_that_was_given_up_half_sent() {
    const HELD: usize = 4096;
    let (link, mut far) = link(HELD);
    let payload = vec![1; 1 << 20];
    let write = Call { length: 1 << 20, payload: &payload, ..Call::new(command::WRITE, 0) };
    let read = Call { length: 4096, ..Call::new(command::READ, 0) };

    let mut given_up = Box::pin(link.call(&write));
    assert!(poll!(&mut given_up).is_pending());
    let mut behind = Box::pin(link.call(&read));
    assert!(poll!(&mut behind).is_pending());
    let mut goodbye = Box::pin(link.disconnect());
    assert!(poll!(&mut goodbye).is_pending());
    drop(given_up);

    let server = tokio::spawn(async move {
        let mut sent = Vec::new();
        far.read_to_end(&mut sent).await.map(|_| sent)
    });
    assert_eq!(behind.await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    goodbye.await;
    assert_eq!(link.call(&read).await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    drop(link);
    let sent = server.await.unwrap().unwrap();
    assert_eq!(sent.len(), HELD, "more than the first part of the write");
    assert!(sent[crate::request::COMPACT_BYTES..].iter().all(|byte| *byte == 1));
}

/// Once, it ended the connection for everybody, although the server had heard nothing of it.
#[tokio::test]
async fn a_request_that_was_given_up_before_its_first_byte_left_no_trace() {
    let (link, mut far) = link(crate::request::COMPACT_BYTES);
    let read = |offset| Call { length: 4, ..Call::new(command::READ, offset) };
    let (first, second, third) = (read(0), read(1), read(2));
    let mut first = Box::pin(link.call(&first));
    assert!(poll!(&mut first).is_pending());
    let mut given_up = Box::pin(link.call(&second));
    assert!(poll!(&mut given_up).is_pending());
    drop(given_up);
    assert_eq!(link.table().len(), 1, "of what was never sent no answer is waited for");

    let server = tokio::spawn(async move {
        for offset in [0, 2] {
            let mut request = [0; crate::request::COMPACT_BYTES];
            far.read_exact(&mut request).await.unwrap();
            assert_eq!(u64::from_be_bytes(request[16..24].try_into().unwrap()), offset);
            let cookie = u64::from_be_bytes(request[8..16].try_into().unwrap());
            let mut bytes = Vec::new();
            crate::chunk::Answer { style: Style::Simple, cookie, offset }.data(&mut bytes, offset, 4, true);
            bytes.extend([7; 4]);
            far.write_all(&bytes).await.unwrap();
        }
        far
    });
    let (first, third) = tokio::join!(first, link.call(&third));
    assert_eq!((first.unwrap().data, third.unwrap().data), (vec![7; 4], vec![7; 4]));
    drop(server.await.unwrap());
}

/// Once, a server that had stopped reading kept whoever closed its client for ever.
#[tokio::test(start_paused = true)]
async fn a_goodbye_that_cannot_be_sent_is_given_up() {
    let (link, far) = link(8);
    link.disconnect().await;
    assert!(link.is_broken(), "half of it was sent");
    drop(far);
}
