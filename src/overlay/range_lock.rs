//! A lock over ranges of blocks: 64 stripes of 64 neighbouring blocks each, held together as bits of one word.
//!
//! All stripes of a request are taken at once, so there is no order to keep and no deadlock. Whole-disk requests take
//! every stripe. Not fair; held only while local files are written, never across an `await`.

use std::sync::{Condvar, Mutex, PoisonError};

use crate::block::Extent;

const STRIPE_BLOCKS: u64 = 64;

/// The lock.
#[derive(Debug, Default)]
pub(super) struct RangeLock {
    state: Mutex<State>,
    released: Condvar,
}

#[derive(Debug, Default)]
struct State {
    held: u64,
    waiting: usize,
}

/// Holds its stripes until dropped.
#[derive(Debug)]
pub(super) struct RangeGuard<'a> {
    lock: &'a RangeLock,
    stripes: u64,
}

impl RangeLock {
    /// Takes the stripes of `extent`, waiting for whoever holds one.
    pub(super) fn lock(&self, extent: Extent) -> RangeGuard<'_> {
        let stripes = stripes(extent);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.held & stripes != 0 {
            state.waiting += 1;
            state = self.released.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.waiting -= 1;
        }
        state.held |= stripes;
        RangeGuard { lock: self, stripes }
    }

    /// Takes the stripes of `extent` if nobody holds one.
    pub(super) fn try_lock(&self, extent: Extent) -> Option<RangeGuard<'_>> {
        let stripes = stripes(extent);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.held & stripes != 0 {
            return None;
        }
        state.held |= stripes;
        Some(RangeGuard { lock: self, stripes })
    }

    /// Whether somebody holds a stripe of `extent`.
    pub(super) fn is_held(&self, extent: Extent) -> bool {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).held & stripes(extent) != 0
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut state = self.lock.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.held &= !self.stripes;
        if state.waiting > 0 {
            self.lock.released.notify_all();
        }
    }
}

fn stripes(extent: Extent) -> u64 {
    let first = extent.start / STRIPE_BLOCKS;
    let last = extent.end().saturating_sub(1).max(extent.start) / STRIPE_BLOCKS;
    if last - first >= 63 {
        return u64::MAX;
    }
    (first..=last).fold(0, |bits, stripe| bits | 1 << (stripe % 64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ranges_that_share_a_stripe_exclude_each_other() {
        let lock = RangeLock::default();
        let first = lock.lock(Extent::new(0, 64));
        assert!(lock.try_lock(Extent::new(63, 1)).is_none());
        assert!(lock.is_held(Extent::new(63, 1)) && !lock.is_held(Extent::new(64, 1)));
        assert!(lock.try_lock(Extent::new(64, 1)).is_some());
        assert!(lock.try_lock(Extent::new(64, 1 << 20)).is_none(), "a long range takes every stripe");
        drop(first);
        assert!(lock.try_lock(Extent::new(0, 1 << 20)).is_some());
    }

    #[test]
    fn a_waiting_thread_goes_on_when_the_range_is_free() {
        let lock = RangeLock::default();
        let mut count = 0u64;
        let counter = Mutex::new(&mut count);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..1000 {
                        let _guard = lock.lock(Extent::new(5, 1));
                        **counter.try_lock().expect("the range lock admits one thread at a time") += 1;
                    }
                });
            }
        });
        assert_eq!(count, 4000);
    }
}
