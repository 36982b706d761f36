//! The controller's connections to agents, opened when needed, one request at a time on each: an agent has one for each kind
//! of request, so that an order that hangs keeps back neither the heartbeat nor other orders.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::name::HostName;
use crate::peer::transport::Security;
use crate::wire::cluster::{Body, Fault, shortened};
use crate::wire::frame::FrameType;
use crate::wire::link::{CallError, Link};

type Slot = Arc<tokio::sync::Mutex<Option<Link>>>;

/// The connections. Owner of them all.
#[derive(Debug)]
pub(super) struct Nodes {
    security: Security,
    /// By address and name – what is connected to has shown a certificate of that name – and what is asked on it.
    links: Mutex<HashMap<(SocketAddr, HostName), HashMap<FrameType, Slot>>>,
}

impl Nodes {
    pub(super) fn new(security: Security) -> Self {
        Self { security, links: Mutex::default() }
    }

    /// Asks the agent of node `name` at `address`, and opens a connection if there is none, or if the one there was has
    /// ended.
    pub(super) async fn call<B: Body>(
        &self,
        (address, name): (SocketAddr, &HostName),
        body: &B,
        limit: Duration,
    ) -> Result<B::Answer, CallError> {
        let slot = {
            let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(links.entry((address, name.clone())).or_default().entry(B::TYPE).or_default())
        };
        let work = async {
            let mut slot = slot.lock().await;
            // Taken out, so that a connection on which something went wrong, or was given up, is never used again.
            if let Some(mut link) = slot.take() {
                match link.call(body, limit).await {
                    Err(CallError::Wire(_)) => {}
                    result => {
                        if matches!(result, Ok(_) | Err(CallError::Refused(_))) {
                            *slot = Some(link);
                        }
                        return result;
                    }
                }
            }
            let mut link = Link::new(self.security.connect_to_node(address, name).await?);
            let result = link.call(body, limit).await;
            if matches!(result, Ok(_) | Err(CallError::Refused(_))) {
                *slot = Some(link);
            }
            result
        };
        let result = tokio::time::timeout(limit, work).await.unwrap_or(Err(CallError::TimedOut(limit)));
        // It is passed on to people, and kept.
        result.map_err(|error| match error {
            CallError::Refused(Fault { code, message }) => {
                CallError::Refused(Fault { code, message: shortened(message) })
            }
            other => other,
        })
    }

    /// Forgets the connections to all but these.
    pub(super) fn keep(&self, nodes: &HashSet<(SocketAddr, HostName)>) {
        self.links.lock().unwrap_or_else(PoisonError::into_inner).retain(|node, slots| {
            nodes.contains(node) || slots.values().any(|slot| Arc::strong_count(slot) > 1)
        });
    }
}
