//! Whose turn it is with a name: overlays, and the sockets of VMs, are opened, closed and removed one at a time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::OwnedMutexGuard;

use crate::name::HostName;

/// The names with which somebody is busy.
#[derive(Default)]
pub(super) struct Turns(Mutex<HashMap<HostName, Arc<tokio::sync::Mutex<()>>>>);

/// Nobody else is busy with the name while this, or a clone of it, lives. Work on a thread of its own takes a clone along:
/// it goes on when nobody waits for it any more.
#[derive(Clone)]
pub(super) struct Turn {
    name: HostName,
    _turn: Arc<OwnedMutexGuard<()>>,
}

impl Turns {
    /// Waits until nobody is busy with `name`.
    pub(super) async fn turn(&self, name: &HostName) -> Turn {
        let turn = {
            let mut turns = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            turns.retain(|_, turn| Arc::strong_count(turn) > 1);
            Arc::clone(turns.entry(name.clone()).or_default())
        };
        Turn { name: name.clone(), _turn: Arc::new(turn.lock_owned().await) }
    }
}

impl Turn {
    /// The name.
    pub(super) const fn name(&self) -> &HostName {
        &self.name
    }
}
