//! Long work in a thread of its own: a bar when a person is looking, and a clean end on Ctrl-C or SIGTERM.

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Context;
use bootcache::image::scan::Watch;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::signal::unix::{SignalKind, signal};

const TICK: Duration = Duration::from_millis(100);

/// Runs `work` to its end, shows how far it is, and asks it to end when the user does.
pub(crate) fn watched<T: Send + 'static>(
    work: impl FnOnce(&Watch) -> T + Send + 'static,
) -> anyhow::Result<T> {
    let watch = Arc::new(Watch::default());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut tick = tokio::time::interval(TICK);
        let bar = bar();
        let worker_watch = watch.clone();
        let mut worker = tokio::task::spawn_blocking(move || work(&worker_watch));
        let result = loop {
            tokio::select! {
                result = &mut worker => break result,
                _ = interrupt.recv() => watch.cancelled.store(true, Ordering::Relaxed),
                _ = terminate.recv() => watch.cancelled.store(true, Ordering::Relaxed),
                _ = tick.tick() => {
                    bar.set_message(watch.stage());
                    bar.set_length(watch.total.load(Ordering::Relaxed));
                    bar.set_position(watch.done.load(Ordering::Relaxed));
                }
            }
        };
        bar.finish_and_clear();
        result.context("the work ended with a panic")
    })
}

fn bar() -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{msg:10} {wide_bar} {bytes}/{total_bytes} {eta:>4}")
        .expect("the template is sound");
    ProgressBar::new(0).with_style(style)
}
