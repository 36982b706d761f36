//! Who came for which image: how nodes that start at the same moment find each other.
//!
//! Every server keeps one, so a burst works without a controller: each comer is told of the others, once a
//! connection, and now and then of a few again. An entry
//! lives as long as its connection and [`KEEP`] longer. The address is the one the connection came from; only the
//! port is the comer's word.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::choose::Draw;
use crate::digest::Digest;

use super::message::{PEERS_MAX, Peer};

/// How long who has left is still named.
const KEEP: Duration = Duration::from_secs(30);
/// Most comers that are remembered for an image.
const COMERS_MAX: usize = 4096;

/// Comers that are named although they were named before: who was told may have lost them since.
const AGAIN: usize = 8;

#[derive(Debug)]
struct Comer {
    /// In the order of coming, over all images.
    number: u64,
    connection: u64,
    peer: Option<Peer>,
    left: Option<Instant>,
}

/// The comers of every image of one server.
#[derive(Debug)]
pub(super) struct Tracker(Mutex<State>);

#[derive(Debug)]
struct State {
    images: HashMap<Digest, Vec<Comer>>,
    /// The number of the last comer.
    last: u64,
    draw: Draw,
}

impl Default for Tracker {
    fn default() -> Self {
        Self(Mutex::new(State { images: HashMap::new(), last: 0, draw: Draw::new(0) }))
    }
}

impl Tracker {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a node came for image `root`, and where it serves, if it does. Gives the others that do and came after
    /// number `after`, with a few of those before, and the number of the last of them. To name all of them each time, with
    /// each sign of life, would cost the square of their number.
    pub(super) fn come(
        &self,
        root: Digest,
        connection: u64,
        peer: Option<Peer>,
        after: u64,
    ) -> (Vec<Peer>, u64) {
        let mut state = self.state();
        let State { images, last, draw } = &mut *state;
        let comers = images.entry(root).or_default();
        comers.retain(|comer| comer.left.is_none_or(|left| left.elapsed() < KEEP));
        let key = |peer: Option<Peer>| peer.map(|peer| peer.key);
        let same = |comer: &Comer| {
            comer.connection == connection || (peer.is_some() && key(comer.peer) == key(peer))
        };
        match comers.iter().position(same) {
            Some(at) if comers[at].left.is_none() && comers[at].peer == peer => {
                comers[at].connection = connection;
            }
            known => {
                known.map(|at| comers.remove(at));
                if comers.len() < COMERS_MAX {
                    *last += 1;
                    comers.push(Comer { number: *last, connection, peer, left: None });
                }
            }
        }
        let others = comers.iter().filter_map(|comer| Some((comer.number, comer.peer?)));
        let (told, mut new): (Vec<_>, Vec<_>) = others
            .filter(|(_, other)| Some(other.key) != key(peer))
            .partition(|(number, _)| *number <= after);
        new.truncate(PEERS_MAX - AGAIN);
        let until = new.last().map_or(after, |(number, _)| *number);
        let first = draw.below(told.len().max(1));
        let again = told.iter().cycle().skip(first).take(told.len().min(AGAIN));
        (new.iter().chain(again).map(|(_, peer)| *peer).collect(), until)
    }

    /// The node that serves as `key` and came for image `root`, if it is still there.
    pub(super) fn find(&self, root: Digest, key: u64) -> Option<Peer> {
        let state = self.state();
        let here = state.images.get(&root)?.iter().filter(|comer| comer.left.is_none());
        here.filter_map(|comer| comer.peer).find(|peer| peer.key == key)
    }

    /// Notes that `connection` has closed; says which nodes have gone with it, by their keys, and from which images.
    pub(super) fn leave(&self, connection: u64) -> Vec<(Digest, u64)> {
        let mut gone = Vec::new();
        for (root, comers) in &mut self.state().images {
            for comer in comers.iter_mut().filter(|comer| comer.connection == connection) {
                comer.left = Some(Instant::now());
                gone.extend(comer.peer.map(|peer| (*root, peer.key)));
            }
        }
        gone
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    #[test]
    fn comers_learn_of_the_others_and_who_left_is_named_a_while() {
        let tracker = Tracker::default();
        let root = Digest::of(b"image");
        let peer =
            |key: u16| Some(Peer { address: SocketAddr::from(([10, 0, 0, 1], key)), key: u64::from(key) });
        let keys = |peers: Vec<Peer>| peers.iter().map(|peer| peer.key).collect::<Vec<_>>();
        let come = |connection, peer| keys(tracker.come(root, connection, peer, 0).0);
        assert!(come(1, peer(1)).is_empty());
        assert_eq!(come(2, None), [1]);
        assert_eq!(come(3, peer(3)), [1]);
        assert_eq!(come(1, peer(1)), [3]);
        assert_eq!(tracker.leave(3), [(root, 3)]);
        assert!(tracker.leave(2).is_empty(), "it does not serve");
        assert!(tracker.find(root, 3).is_none() && tracker.find(root, 1) == peer(1));
        assert_eq!(come(4, peer(4)), [1, 3]);
        assert!(tracker.come(Digest::of(b"other"), 6, peer(6), 0).0.is_empty());
    }

    /// All were named to all each second: at 300 nodes 25 Mbit/s, of the origin alone.
    #[test]
    fn each_comer_is_named_once_to_a_connection_and_few_of_them_again() {
        let tracker = Tracker::default();
        let root = Digest::of(b"image");
        let peer = |key: u64| Some(Peer { address: SocketAddr::from(([10, 0, 0, 1], 1)), key });
        for key in 1..=300 {
            tracker.come(root, key, peer(key), 0);
        }
        let (all, until) = tracker.come(root, 1, peer(1), 0);
        assert_eq!(all.len(), 299);
        tracker.come(root, 301, peer(301), 0);
        let (named, until) = tracker.come(root, 1, peer(1), until);
        assert!(named[0].key == 301 && named.len() == 1 + AGAIN);
        // Who comes again, having gone, may have been forgotten meanwhile; who has another connection has not.
        tracker.leave(200);
        tracker.come(root, 400, peer(200), 0);
        tracker.come(root, 401, peer(201), 0);
        let (named, mut until) = tracker.come(root, 1, peer(1), until);
        assert!(named[0].key == 200 && named.len() == 1 + AGAIN);
        let mut again = std::collections::HashSet::new();
        for _ in 0..1000 {
            let (named, now) = tracker.come(root, 1, peer(1), until);
            again.extend(named.iter().map(|peer| peer.key));
            until = now;
        }
        assert_eq!(again.len(), 300, "each of them in time");
    }
}
