//! Who came for which image: how nodes that start at the same moment find each other.
//!
//! Every server keeps one, so a burst works without a controller: each comer is told of the others. An entry
//! lives as long as its connection and [`KEEP`] longer. The address is the one the connection came from; only the
//! port is the comer's word.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::digest::Digest;

use super::message::{PEERS_MAX, Peer};

/// How long who has left is still named.
const KEEP: Duration = Duration::from_secs(30);
/// Most comers that are remembered for an image.
const COMERS_MAX: usize = 4096;

#[derive(Debug)]
struct Comer {
    connection: u64,
    peer: Option<Peer>,
    left: Option<Instant>,
}

/// The comers of every image of one server.
#[derive(Debug, Default)]
pub(super) struct Tracker(Mutex<HashMap<Digest, Vec<Comer>>>);

impl Tracker {
    /// Notes that a node came for image `root`, and where it serves, if it does; gives the others that do.
    pub(super) fn come(&self, root: Digest, connection: u64, peer: Option<Peer>) -> Vec<Peer> {
        let mut images = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let comers = images.entry(root).or_default();
        comers.retain(|comer| comer.left.is_none_or(|left| left.elapsed() < KEEP));
        let key = |peer: Option<Peer>| peer.map(|peer| peer.key);
        let same = |comer: &Comer| {
            comer.connection == connection || (peer.is_some() && key(comer.peer) == key(peer))
        };
        let comer = Comer { connection, peer, left: None };
        match comers.iter().position(same) {
            Some(at) => comers[at] = comer,
            None if comers.len() < COMERS_MAX => comers.push(comer),
            None => {}
        }
        let others =
            comers.iter().filter_map(|comer| comer.peer).filter(|other| Some(other.key) != key(peer));
        others.take(PEERS_MAX).collect()
    }

    /// The node that serves as `key` and came for image `root`, if it is still there.
    pub(super) fn find(&self, root: Digest, key: u64) -> Option<Peer> {
        let images = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let here = images.get(&root)?.iter().filter(|comer| comer.left.is_none());
        here.filter_map(|comer| comer.peer).find(|peer| peer.key == key)
    }

    /// Notes that `connection` has closed; says which nodes have gone with it, by their keys, and from which images.
    pub(super) fn leave(&self, connection: u64) -> Vec<(Digest, u64)> {
        let mut images = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut gone = Vec::new();
        for (root, comers) in images.iter_mut() {
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
        assert!(tracker.come(root, 1, peer(1)).is_empty());
        assert_eq!(keys(tracker.come(root, 2, None)), [1]);
        assert_eq!(keys(tracker.come(root, 3, peer(3))), [1]);
        assert_eq!(keys(tracker.come(root, 1, peer(1))), [3]);
        assert_eq!(tracker.leave(3), [(root, 3)]);
        assert!(tracker.leave(2).is_empty(), "it does not serve");
        assert!(tracker.find(root, 3).is_none() && tracker.find(root, 1) == peer(1));
        assert_eq!(keys(tracker.come(root, 4, peer(4))), [1, 3]);
        assert!(tracker.come(Digest::of(b"other"), 6, peer(6)).is_empty());
    }
}
