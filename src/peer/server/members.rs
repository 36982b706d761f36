//! What each node may take of the server: so many connections, and memory for replies out of one budget for all.
//!
//! A reply's bytes are charged before they are read and until they are written. Beside the budget each member has a reply
//! of its own, one of those that guests wait for and one of the others: whoever reads slowly, or not at all, and fills the
//! budget, holds up nobody else for good.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::digest::Digest;
use crate::peer::transport::Caller;

/// Connections of one member: two for each image that it is getting.
pub(super) const CONNECTIONS_OF_ONE_MAX: usize = 256;
/// Bytes of replies that are read, compressed, wait or are being written, of all connections: far more than links have
/// under way.
const REPLY_BYTES_MAX: u32 = 96 << 20;
const NEVER: &str = "the semaphores are never closed";

/// A member by its certificate, or by its address where nobody shows one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Who {
    Certificate(Digest),
    Address(IpAddr),
}

/// The members that are connected. Owner of their counts.
#[derive(Debug)]
pub(super) struct Members {
    bytes: Arc<Semaphore>,
    present: Mutex<HashMap<Who, Present>>,
}

#[derive(Debug, Clone)]
struct Present {
    connections: usize,
    reserves: [Arc<Semaphore>; 2],
}

impl Default for Present {
    fn default() -> Self {
        Self { connections: 0, reserves: std::array::from_fn(|_| Arc::new(Semaphore::new(1))) }
    }
}

/// A connection of a member; counted until it is dropped.
#[derive(Debug)]
pub(super) struct Member {
    members: Arc<Members>,
    who: Who,
    reserves: [Arc<Semaphore>; 2],
}

/// A reply's share of the budget, given back when it is dropped.
#[derive(Debug)]
pub(super) enum Share {
    OfAll(OwnedSemaphorePermit),
    Own(#[expect(dead_code, reason = "it is held")] OwnedSemaphorePermit),
}

impl Members {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            bytes: Arc::new(Semaphore::new(REPLY_BYTES_MAX as usize)),
            present: Mutex::default(),
        })
    }

    /// Counts a connection in; none where the member has too many. On loopback without certificates any number of nodes
    /// has the one address, and nobody is a stranger.
    pub(super) fn enter(self: &Arc<Self>, caller: &Caller, address: SocketAddr) -> Option<Member> {
        let ip = address.ip().to_canonical();
        let who = caller.certificate().map_or(Who::Address(ip), Who::Certificate);
        let is_stranger = who != Who::Address(ip) || !ip.is_loopback();
        let mut all = self.present();
        let present = all.entry(who).or_default();
        if present.connections >= CONNECTIONS_OF_ONE_MAX && is_stranger {
            return None;
        }
        present.connections += 1;
        let reserves = present.reserves.clone();
        drop(all);
        Some(Member { members: Arc::clone(self), who, reserves })
    }

    fn present(&self) -> MutexGuard<'_, HashMap<Who, Present>> {
        self.present.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Member {
    /// Waits for a share of `bytes` for a reply that is about to be made: the member's own, or one of the budget, whichever
    /// is free first.
    pub(super) async fn share(&self, bytes: u64, is_waited_for: bool) -> Share {
        let bytes = u32::try_from(bytes).unwrap_or(REPLY_BYTES_MAX).min(REPLY_BYTES_MAX);
        let own = Arc::clone(&self.reserves[usize::from(is_waited_for)]);
        tokio::select! {
            biased;
            own = own.acquire_owned() => Share::Own(own.expect(NEVER)),
            of_all = Arc::clone(&self.members.bytes).acquire_many_owned(bytes) => Share::OfAll(of_all.expect(NEVER)),
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let mut all = self.members.present();
        if let Some(present) = all.get_mut(&self.who) {
            present.connections -= 1;
            if present.connections == 0 {
                all.remove(&self.who);
            }
        }
    }
}

impl Share {
    /// Gives back what is more than `bytes`: not all that was asked for is here.
    pub(super) fn shrink(&mut self, bytes: u64) {
        if let Self::OfAll(permit) = self {
            let more = u64::try_from(permit.num_permits()).unwrap_or(u64::MAX).saturating_sub(bytes);
            drop(permit.split(usize::try_from(more).unwrap_or(0)));
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    const REPLY: u64 = 1 << 20;

    fn member(members: &Arc<Members>, last: u8) -> Option<Member> {
        members.enter(&Caller::trusted(), SocketAddr::from(([10, 0, 0, last], 1)))
    }

    #[test]
    fn one_member_has_so_many_connections_and_no_more() {
        let members = Members::new();
        let mut mine: Vec<_> = (0..CONNECTIONS_OF_ONE_MAX).map(|_| member(&members, 1).unwrap()).collect();
        assert!(member(&members, 1).is_none());
        let other = member(&members, 2).unwrap();
        mine.pop();
        mine.push(member(&members, 1).unwrap());
        drop((mine, other));
        assert!(members.present().is_empty());
    }

    #[test]
    fn any_number_of_nodes_meet_on_loopback() {
        let members = Members::new();
        let loopback = SocketAddr::from(([127, 0, 0, 1], 1));
        let all: Vec<_> = (0..2 * CONNECTIONS_OF_ONE_MAX)
            .map(|_| members.enter(&Caller::trusted(), loopback).unwrap())
            .collect();
        drop(all);
    }

    #[test]
    fn who_fills_the_budget_leaves_every_other_member_a_reply() {
        let members = Members::new();
        let (greedy, good) = (member(&members, 1).unwrap(), member(&members, 2).unwrap());
        let again = member(&members, 1).unwrap();
        let mut held = Vec::new();
        while let Some(share) = greedy.share(REPLY, false).now_or_never() {
            held.push(share);
        }
        assert_eq!(held.len() as u64, u64::from(REPLY_BYTES_MAX) / REPLY + 1);
        assert!(again.share(REPLY, false).now_or_never().is_none(), "another connection is no other member");
        // One for a guest and one of the others at a time, as often as they are written.
        for _ in 0..3 {
            let guest = good.share(REPLY, true).now_or_never().unwrap();
            let fill = good.share(REPLY, false).now_or_never().unwrap();
            assert!(good.share(REPLY, false).now_or_never().is_none());
            drop((guest, fill));
        }
        held.pop();
        assert!(again.share(REPLY, false).now_or_never().is_some());
        held.clear();
        assert_eq!(members.bytes.available_permits(), REPLY_BYTES_MAX as usize);
    }

    #[test]
    fn what_is_not_here_is_not_charged() {
        let members = Members::new();
        let member = member(&members, 1).unwrap();
        let _own = member.share(REPLY, false).now_or_never().unwrap();
        let mut share = member.share(REPLY, false).now_or_never().unwrap();
        share.shrink(2 * REPLY);
        assert_eq!(members.bytes.available_permits() as u64, u64::from(REPLY_BYTES_MAX) - REPLY);
        share.shrink(4096);
        assert_eq!(members.bytes.available_permits() as u64, u64::from(REPLY_BYTES_MAX) - 4096);
    }
}
