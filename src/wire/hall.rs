//! Connections of which nobody knows yet whether they say anything sensible: so many at a time, and so many of one
//! address. They wait apart from those that have, and strangers who only connect keep nobody out for long: when there is
//! no place, the oldest silent one leaves.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

/// The connections of one listener, oldest first. Owner of their places.
#[derive(Debug)]
pub(crate) struct Hall {
    places: usize,
    silent_of_one: usize,
    visits: Mutex<VecDeque<Arc<Visit>>>,
}

#[derive(Debug)]
struct Visit {
    from: IpAddr,
    spoke: AtomicBool,
    evicted: CancellationToken,
}

impl Visit {
    fn is_silent(&self) -> bool {
        !self.spoke.load(Ordering::Relaxed)
    }
}

/// A connection's place, given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    hall: Arc<Hall>,
    visit: Arc<Visit>,
}

impl Hall {
    /// A hall of `places`, of which those that are silent and of one address may have `silent_of_one`.
    pub(crate) fn new(places: usize, silent_of_one: usize) -> Arc<Self> {
        Arc::new(Self { places, silent_of_one, visits: Mutex::default() })
    }

    /// A place for a connection from `from`, if that address has not too many. Those that have left, or have said what they
    /// have to, are seen before anybody goes.
    pub(crate) async fn enter(self: &Arc<Self>, from: IpAddr) -> Option<Place> {
        if self.is_full(from) {
            tokio::task::yield_now().await;
        }
        self.take(from)
    }

    fn is_full(&self, from: IpAddr) -> bool {
        let visits = self.visits();
        visits.len() >= self.places || silent_of(&visits, from) >= self.silent_of_one
    }

    fn take(self: &Arc<Self>, from: IpAddr) -> Option<Place> {
        let mut visits = self.visits();
        if silent_of(&visits, from) >= self.silent_of_one {
            return None;
        }
        if visits.len() >= self.places {
            let silent = visits.iter().position(|visit| visit.is_silent());
            if let Some(oldest) = visits.remove(silent.unwrap_or(0)) {
                oldest.evicted.cancel();
            }
        }
        let (spoke, evicted) = (AtomicBool::new(false), CancellationToken::new());
        let visit = Arc::new(Visit { from: from.to_canonical(), spoke, evicted });
        visits.push_back(Arc::clone(&visit));
        drop(visits);
        Some(Place { hall: Arc::clone(self), visit })
    }

    fn visits(&self) -> MutexGuard<'_, VecDeque<Arc<Visit>>> {
        self.visits.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn silent_of(visits: &VecDeque<Arc<Visit>>, from: IpAddr) -> usize {
    let from = from.to_canonical();
    visits.iter().filter(|visit| visit.from == from && visit.is_silent()).count()
}

impl Place {
    /// Says that the connection has said what it has to.
    pub(crate) fn speaks(&self) {
        self.visit.spoke.store(true, Ordering::Relaxed);
    }

    /// Ends when a newer connection has the place.
    pub(crate) async fn evicted(&self) {
        self.visit.evicted.cancelled().await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.hall.visits().retain(|other| !Arc::ptr_eq(other, &self.visit));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    fn is_evicted(place: &Place) -> bool {
        place.visit.evicted.is_cancelled()
    }

    #[tokio::test]
    async fn one_address_takes_no_more_than_its_places() {
        let hall = Hall::new(100, 2);
        let first = hall.enter(ip(1)).await.unwrap();
        let _second = hall.enter(ip(1)).await.unwrap();
        assert!(hall.enter(ip(1)).await.is_none());
        assert!(hall.enter("::ffff:10.0.0.1".parse().unwrap()).await.is_none());
        let _other = hall.enter(ip(2)).await.unwrap();
        // Who has spoken is none of them: guests behind one address wait for nobody but the controller.
        first.speaks();
        let third = hall.enter(ip(1)).await.unwrap();
        drop(third);
        assert!(hall.enter(ip(1)).await.is_some());
    }

    #[tokio::test]
    async fn the_oldest_silent_one_leaves_a_full_hall() {
        let hall = Hall::new(3, 8);
        let mut places = Vec::new();
        for last in 1..=3 {
            places.push(hall.enter(ip(last)).await.unwrap());
        }
        places[0].speaks();
        let _fourth = hall.enter(ip(4)).await.unwrap();
        assert_eq!(places.iter().map(is_evicted).collect::<Vec<_>>(), [false, true, false]);
        assert_eq!(hall.visits().len(), 3);
        // It was counted out when it had to go.
        drop(places.remove(1));
        assert_eq!(hall.visits().len(), 3);
    }

    #[tokio::test]
    async fn where_all_have_spoken_the_oldest_leaves() {
        let hall = Hall::new(1, 8);
        let first = hall.enter(ip(1)).await.unwrap();
        first.speaks();
        let _second = hall.enter(ip(2)).await.unwrap();
        assert!(is_evicted(&first));
    }
}
