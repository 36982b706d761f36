//! Which hypervisors can be used now: each is asked again and again, from the agent's start on.
//!
//! One that is away is not left out: its instances may run on without it. What can be used is what a node registers
//! for, what cannot is among its troubles.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tracing::{info, warn};

use super::Shared;
use crate::hypervisor::{Hypervisor, InstanceType};

/// How long a hypervisor may take to say that it is there.
const CHECK_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause between two checks of a hypervisor.
const CHECK_PAUSE: Duration = Duration::from_secs(2);

/// What the last check of each hypervisor said: why it cannot be used, or nothing. Not there: not checked yet.
type Checked = BTreeMap<InstanceType, Option<String>>;

/// What is known of the hypervisors.
#[derive(Debug)]
pub(super) struct Health {
    checked: watch::Sender<Checked>,
}

impl Default for Health {
    fn default() -> Self {
        Self { checked: watch::Sender::new(Checked::new()) }
    }
}

impl Health {
    /// What can be run now.
    pub(super) fn kinds(&self) -> Vec<InstanceType> {
        let checked = self.checked.borrow();
        checked.iter().filter(|(_, trouble)| trouble.is_none()).map(|(kind, _)| *kind).collect()
    }

    /// Why something cannot be run now, a line each.
    pub(super) fn troubles(&self) -> Vec<String> {
        let checked = self.checked.borrow();
        let away = checked.iter().filter_map(|(kind, trouble)| Some((kind, trouble.as_ref()?)));
        away.map(|(kind, trouble)| format!("no {kind}s: {trouble}")).collect()
    }

    /// Returns when each of `count` hypervisors has been checked once.
    pub(super) async fn known(&self, count: usize) {
        // The sender is ours: it does not go away meanwhile.
        let _ = self.checked.subscribe().wait_for(|checked| checked.len() >= count).await;
    }

    /// Returns when something else can be run than `kinds`.
    pub(super) async fn changed(&self, kinds: &[InstanceType]) {
        let mut changes = self.checked.subscribe();
        while self.kinds() == kinds && changes.changed().await.is_ok() {}
    }

    fn note(&self, kind: InstanceType, trouble: Option<String>) {
        self.checked.send_if_modified(|checked| {
            let before = checked.insert(kind, trouble.clone());
            match (&before, &trouble) {
                (Some(Some(_)), None) => info!("{kind}s can be run again"),
                (Some(None) | None, Some(trouble)) => warn!("no {kind}s: {trouble}"),
                _ => {}
            }
            before != Some(trouble)
        });
    }
}

/// Checks one hypervisor until the agent ends.
pub(super) async fn watch(shared: Arc<Shared>, hypervisor: Arc<dyn Hypervisor>) {
    let kind = hypervisor.instance_type();
    let checks = async {
        loop {
            let mut check = hypervisor.check();
            let found = match tokio::time::timeout(CHECK_TIMEOUT, &mut check).await {
                Ok(found) => found,
                Err(_) => {
                    shared.health.note(kind, Some(format!("there is no answer within {CHECK_TIMEOUT:?}")));
                    // It is waited for all the same: a second call would hang beside the first.
                    check.await
                }
            };
            shared.health.note(kind, found.err().map(|error| error.to_string()));
            tokio::time::sleep(CHECK_PAUSE).await;
        }
    };
    tokio::select! {
        () = shared.cancel.cancelled() => {}
        () = checks => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_away_is_no_kind_and_a_trouble_until_it_is_back() {
        let health = Health::default();
        health.note(InstanceType::Vm, Some("gone".to_owned()));
        health.note(InstanceType::Container, None);
        health.known(2).await;
        assert_eq!(health.kinds(), [InstanceType::Container]);
        assert_eq!(health.troubles(), ["no vms: gone"]);
        let before = health.kinds();
        let changed = health.changed(&before);
        health.note(InstanceType::Vm, None);
        tokio::time::timeout(Duration::from_secs(5), changed).await.expect("it is told");
        assert!(health.troubles().is_empty());
    }
}
