//! What came and cannot be written here, since the disk is full or fails.
//!
//! It stays in memory, no more than what was under way, and is written again every [`RETRY`]. Nothing else is asked for
//! until all of it is kept: it would be lost as well, and the links and disks of others would have carried it for nothing.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::digest::Digest;

use super::engine::Shared;
use super::receive::Wrong;

/// Pause after this node could not keep what came, before it tries again.
const RETRY: Duration = Duration::from_secs(1);
/// What the operating system says when there is no room, or the user's share of it is used up.
const FULL: [&str; 2] = ["(os error 28)", "(os error 122)"];

/// Whether one image's transfer can keep what comes.
#[derive(Debug)]
pub(super) struct Keeping {
    image: Digest,
    state: Mutex<State>,
    /// Told when something could be kept, or nobody tries any more.
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// Answers that wait to be kept.
    unkept: usize,
    /// Why, for a person, and since when.
    trouble: Option<(String, Instant)>,
}

/// An answer that waits to be kept, until this is dropped.
struct Unkept<'a>(&'a Keeping);

impl Keeping {
    pub(super) fn new(image: Digest) -> Self {
        Self { image, state: Mutex::default(), changed: Notify::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why what comes cannot be kept now, and what to do about it.
    pub(super) fn trouble(&self) -> Option<String> {
        self.state().trouble.as_ref().map(|(trouble, _)| trouble.clone())
    }

    /// Ends when what comes can be kept.
    pub(super) async fn well(&self) {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            if self.state().trouble.is_none() {
                return;
            }
            changed.await;
        }
    }

    fn cannot(&self, error: &io::Error) -> Unkept<'_> {
        let mut state = self.state();
        state.unkept += 1;
        if state.trouble.is_none() {
            let trouble = told(error);
            tracing::error!(image = %self.image.short(), "{trouble}; nothing more is fetched until then");
            state.trouble = Some((trouble, Instant::now()));
        }
        Unkept(self)
    }

    /// Has `attempt` keep something, again and again while this node cannot.
    async fn keep<T, Attempt>(&self, attempt: impl Fn() -> Attempt) -> Option<Result<T, &'static str>>
    where
        Attempt: Future<Output = Option<Result<T, Wrong>>>,
    {
        let mut unkept = None;
        loop {
            let error = match attempt().await? {
                Ok(kept) => return Some(Ok(kept)),
                Err(Wrong::Lie(what)) => return Some(Err(what)),
                Err(Wrong::Local(error)) => error,
            };
            unkept.get_or_insert_with(|| self.cannot(&error));
            // What could be kept elsewhere is a sign that there is room again.
            let _ = tokio::time::timeout(RETRY, self.changed.notified()).await;
        }
    }
}

impl Drop for Unkept<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.unkept -= 1;
        if state.unkept == 0
            && let Some((_, since)) = state.trouble.take()
        {
            let seconds = since.elapsed().as_secs();
            tracing::info!(image = %self.0.image.short(), seconds, "what comes can be kept again: fetching goes on");
        }
        drop(state);
        self.0.changed.notify_waiters();
    }
}

impl Shared {
    /// Has `work`, which blocks, keep what came: once it can be written. An error is a lie of who sent it. None when `work`
    /// panicked.
    pub(super) async fn keep<T: Send + 'static>(
        &self,
        work: impl Fn() -> Result<T, Wrong> + Send + Sync + 'static,
    ) -> Option<Result<T, &'static str>> {
        let work = Arc::new(work);
        let attempt = || {
            let work = Arc::clone(&work);
            let done = self.work.spawn_blocking(move || work());
            async { done.await.ok() }
        };
        self.keeping.keep(attempt).await
    }
}

fn told(error: &io::Error) -> String {
    let text = error.to_string();
    let remedy =
        if FULL.iter().any(|full| text.ends_with(full)) { "free some space" } else { "check this disk" };
    let text = text.split(" (os error").next().unwrap_or_default();
    format!("this node cannot keep what comes: {text}; {remedy}")
}

#[cfg(test)]
mod tests {
    use std::future::ready;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn full() -> Wrong {
        Wrong::Local(io::Error::from_raw_os_error(28))
    }

    #[tokio::test(start_paused = true)]
    async fn what_cannot_be_kept_is_tried_each_second_and_is_a_trouble_until_all_of_it_is_kept() {
        let keeping = Keeping::new(Digest::of(b"an image"));
        let (tried, room) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let attempt = || {
            tried.fetch_add(1, Ordering::Relaxed);
            let kept = room.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |room| room.checked_sub(1));
            ready(Some(kept.map(drop).map_err(|_| full())))
        };
        let two = async { tokio::join!(keeping.keep(attempt), keeping.keep(attempt)) };
        let mut two = std::pin::pin!(two);
        keeping.well().await;
        assert!(tokio::time::timeout(RETRY * 7 / 2, &mut two).await.is_err());
        assert_eq!(tried.load(Ordering::Relaxed), 8);
        let trouble = keeping.trouble().unwrap();
        assert_eq!(trouble, "this node cannot keep what comes: No space left on device; free some space");
        room.store(1, Ordering::Relaxed);
        assert!(tokio::time::timeout(RETRY, &mut two).await.is_err());
        assert!(tokio::time::timeout(RETRY, keeping.well()).await.is_err(), "one of them is not kept");
        room.store(1, Ordering::Relaxed);
        assert_eq!(two.await, (Some(Ok(())), Some(Ok(()))));
        keeping.well().await;
        assert_eq!(keeping.trouble(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_trouble_ends_with_the_last_who_tries() {
        let keeping = Keeping::new(Digest::of(b"an image"));
        let attempt = || ready(Some(Err::<(), _>(full())));
        let given_up = tokio::time::timeout(RETRY * 3, keeping.keep(attempt)).await;
        assert!(given_up.is_err());
        keeping.well().await;
        let lie = || ready(Some(Err::<(), _>(Wrong::Lie("no"))));
        assert_eq!(keeping.keep(lie).await, Some(Err("no")));
    }
}
