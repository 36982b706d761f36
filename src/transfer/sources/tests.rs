use std::sync::mpsc;

use crate::choose::{Weights, by_name, policy};

use super::*;

/// Answers are noted while it is chosen whom to ask next: neither may wait for what the other holds.
#[test]
fn noting_an_answer_and_choosing_a_source_do_not_wait_for_each_other() {
    const ROUNDS: usize = 50_000;
    let hello = Hello { version: 1, node: String::new(), key: 1, listen: None };
    let chooser = Arc::from(by_name(policy::NAMES[0], &Weights::default()).unwrap());
    let root = Digest::of(b"an image");
    let sources = Sources::new(
        root,
        None,
        hello,
        Security::default(),
        chooser,
        Arc::default(),
        CancellationToken::new(),
    );
    let source = Source::new("127.0.0.1:1".parse().unwrap(), true, true);
    source.state().key = Some(2);
    sources.list.lock().unwrap().push(Arc::clone(&source));

    let (tell, ended) = mpsc::channel();
    let work: [fn(&Sources, &Source); 3] = [
        |sources, source| sources.answered(source, Duration::from_millis(1)),
        |sources, source| sources.failed(source),
        |sources, _| drop(sources.for_frame(0, 0, &[], Why::Needed)),
    ];
    for work in work {
        let (sources, source, tell) = (Arc::clone(&sources), Arc::clone(&source), tell.clone());
        std::thread::spawn(move || {
            (0..ROUNDS).for_each(|_| work(&sources, &source));
            tell.send(()).unwrap();
        });
    }
    for _ in 0..3 {
        ended.recv_timeout(Duration::from_secs(60)).expect("two threads wait for each other");
    }
}
