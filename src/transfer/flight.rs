//! Which blocks are being fetched: one fetch a block, however many readers wait for it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::block::Extent;

/// A demand does not wait longer for a fetch that no reader asked for.
const PATIENCE: Duration = Duration::from_millis(100);

#[derive(Debug, Clone, Copy)]
struct Fetching {
    /// The flight that it belongs to: another may have taken it over.
    flight: u64,
    since: Instant,
    demanded: bool,
}

/// The blocks of one image that are being fetched.
#[derive(Debug, Default)]
pub(super) struct Flights(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    map: HashMap<u64, Fetching>,
    /// Flights so far.
    flights: u64,
}

/// Blocks that this task fetches; given back when dropped.
#[derive(Debug)]
pub(super) struct Flight {
    flights: Arc<Flights>,
    number: u64,
    pub(super) extents: Vec<Extent>,
}

impl Flights {
    /// Takes those blocks of `extents` that nobody fetches yet, `most` at most. A fetch that is `demanded` does not wait
    /// long for one that is not.
    pub(super) fn take(
        self: &Arc<Self>,
        extents: impl IntoIterator<Item = Extent>,
        most: u64,
        demanded: bool,
    ) -> Option<Flight> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let State { map, flights } = &mut *state;
        let mut taken: Vec<Extent> = Vec::new();
        let blocks = extents.into_iter().flat_map(Extent::blocks);
        let now = Instant::now();
        let free = blocks.filter(|block| {
            map.get(block).is_none_or(|fetching| {
                demanded && !fetching.demanded && now.duration_since(fetching.since) > PATIENCE
            })
        });
        for block in free.take(usize::try_from(most).unwrap_or(usize::MAX)) {
            match taken.last_mut() {
                Some(last) if last.end() == block => last.count += 1,
                _ => taken.push(Extent::new(block, 1)),
            }
        }
        for block in taken.iter().copied().flat_map(Extent::blocks) {
            map.insert(block, Fetching { flight: *flights + 1, since: now, demanded });
        }
        (!taken.is_empty()).then(|| {
            *flights += 1;
            Flight { flights: Arc::clone(self), number: *flights, extents: taken }
        })
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        let mut state = self.flights.0.lock().unwrap_or_else(PoisonError::into_inner);
        for block in self.extents.iter().copied().flat_map(Extent::blocks) {
            if state.map.get(&block).is_some_and(|fetching| fetching.flight == self.number) {
                state.map.remove(&block);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_block_is_taken_once_until_it_is_given_back() {
        let flights = Arc::new(Flights::default());
        let first = flights.take([Extent::new(10, 4)], 100, true).unwrap();
        assert!(flights.take([Extent::new(11, 2)], 100, true).is_none());
        let second = flights.take([Extent::new(8, 10)], 100, false).unwrap();
        assert_eq!(second.extents, [Extent::new(8, 2), Extent::new(14, 4)]);
        assert!(flights.take([Extent::new(14, 1)], 100, true).is_none());
        tokio::time::advance(PATIENCE * 2).await;
        assert!(flights.take([Extent::new(10, 1)], 100, true).is_none(), "demanded already");
        let over =
            flights.take([Extent::new(14, 1)], 100, true).expect("a fill that hangs is not waited for");
        drop((first, second));
        assert!(flights.take([Extent::new(14, 1)], 100, true).is_none(), "the one that took it over goes on");
        drop(over);
        assert_eq!(flights.take([Extent::new(0, 50)], 7, false).unwrap().extents, [Extent::new(0, 7)]);
    }
}
