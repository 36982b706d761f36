//! Keeps the controller told: who this node is, which images it has, and instances as they change.
//!
//! A controller that is away is tried again and again; nothing waits for it, and nothing is kept for it but the latest
//! states, which its next heartbeat asks for anyway.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::UnboundedReceiver;
use tracing::{info, warn};

use super::{Shared, facts, parts, server};
use crate::controller::client::{Client, ClientError};
use crate::name::HostName;
use crate::wire::cluster::{InstancesChanged, RegisterCompute, RegisterImage};

/// Pause between two tries to reach the controller: from the first to the last.
const PAUSES: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(10)];
/// How often a node registers anew, which brings back one that the controller has forgotten.
const AGAIN: Duration = Duration::from_secs(30);
/// Changes are gathered for this long, so that a burst is one message.
const GATHER: Duration = Duration::from_millis(50);
/// Most changes in one message.
const CHANGES_MAX: usize = 256;

/// Runs until the agent ends.
pub(super) async fn run(shared: Arc<Shared>, port: u16, mut changed: UnboundedReceiver<HostName>) {
    let mut pause = PAUSES[0];
    let mut told = String::new();
    tokio::select! {
        () = shared.cancel.cancelled() => return,
        () = shared.health.known(shared.services.hypervisors.len()) => {}
    }
    loop {
        let session = async {
            match session(&shared, port, &mut changed, &mut pause).await {
                Ok(()) => {}
                Err(error) => {
                    // Once for each reason: a controller may be away for long.
                    let text = error.to_string();
                    if text != told {
                        warn!("not registered: {text}");
                        told = text;
                    }
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSES[1]);
        };
        tokio::select! {
            () = shared.cancel.cancelled() => return,
            () = session => {}
        }
    }
}

/// One connection to the controller: registers, then tells changes until the connection breaks.
async fn session(
    shared: &Arc<Shared>,
    port: u16,
    changed: &mut UnboundedReceiver<HostName>,
    pause: &mut Duration,
) -> Result<(), ClientError> {
    let Some(target) = &shared.options.controller else { return std::future::pending().await };
    let mut client = Client::connect(target, &shared.options.security).await?;
    loop {
        let compute = compute(shared, port);
        let registered = client.call(&compute).await?;
        if let Err(fault) = parts::join_cluster(shared, &registered.cluster).await {
            warn!("{fault}");
        }
        let state = server::state(shared).await;
        if let Some(images) = state.images {
            let node = shared.options.name.clone();
            client.call(&RegisterImage { node, peer: state.peer, images }).await?;
        }
        if *pause != PAUSES[0] {
            info!("registered as host {} at {target}", registered.host_id);
        }
        *pause = PAUSES[0];
        let again = tokio::time::Instant::now() + AGAIN;
        loop {
            let first = tokio::select! {
                () = tokio::time::sleep_until(again) => break,
                () = shared.health.changed(&compute.kinds) => break,
                name = changed.recv() => match name {
                    Some(name) => name,
                    None => return Ok(()),
                },
            };
            tokio::time::sleep(GATHER).await;
            let mut names = vec![first];
            while let (true, Ok(name)) = (names.len() < CHANGES_MAX, changed.try_recv()) {
                names.push(name);
            }
            let instances = shared.parts.states(Some(&names));
            client.call(&InstancesChanged { node: shared.options.name.clone(), instances }).await?;
        }
    }
}

fn compute(shared: &Shared, port: u16) -> RegisterCompute {
    RegisterCompute {
        node: shared.options.name.clone(),
        ip: shared.options.advertise,
        port,
        kinds: shared.health.kinds(),
        cpus: facts::cpus(),
        memory_bytes: facts::memory().0,
        addresses: facts::addresses(),
    }
}
