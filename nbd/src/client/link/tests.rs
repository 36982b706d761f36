//! A link against a server that is played here.

use futures_util::poll;

use super::*;

/// Once, whoever waited to send a request sent it behind half of one that was given up: the server took it for the
/// rest of that one's payload, and wrote it to the disk.
#[tokio::test]
async fn nothing_follows_a_request_that_was_given_up_half_sent() {
    const HELD: usize = 4096;
    let (near, mut far) = tokio::io::duplex(HELD);
    let description = ExportDescription {
        size: 1 << 20,
        flags: 0,
        block_sizes: (1, 4096, 1 << 20),
        style: Style::Simple,
        allocation: None,
    };
    let link = Link::new(Box::new(near), &description);
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
