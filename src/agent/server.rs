//! The agent's end of connections: the controller's questions and orders.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tracing::{debug, warn};

use super::services::ServiceError;
use super::{Shared, facts, parts};
use crate::peer::transport::Transport;
use crate::tls::Role;
use crate::wire::cluster::{
    Accepted, AskNode, Done, EndPart, Ended, Fault, FaultCode, Fetch, INSTANCES_MAX, NodeState, RunPart,
    shortened_to,
};
use crate::wire::frame::FrameType;
use crate::wire::io::WireError;
use crate::wire::link::{self, Answer, Arrived};
use crate::wire::warnings::Warnings;

/// Connections of a controller at once: it needs one.
const CONNECTIONS_MAX: usize = 16;
/// Connections at once of which it is not known yet whose they are: strangers take none of the controller's places.
const STRANGERS_MAX: usize = 64;
/// How long a data plane may take to say what it has.
const DATA_PLANE_TIMEOUT: Duration = Duration::from_secs(1);
/// Most bytes of instances' reasons in one state, so that it fits a frame however many have failed.
const REASONS_BYTES_MAX: usize = 256 << 10;

/// Serves the controller until the agent ends.
pub(super) async fn serve(shared: Arc<Shared>, listener: TcpListener) {
    let (halls, warnings) = (Arc::new(Semaphore::new(STRANGERS_MAX)), Arc::new(Warnings::default()));
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let accepted = tokio::select! {
            () = shared.cancel.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let accepted = (accepted, Arc::clone(&halls).try_acquire_owned());
        match accepted {
            (Ok((stream, from)), Ok(hall)) => {
                let (owner, warnings, places) =
                    (Arc::clone(&shared), Arc::clone(&warnings), Arc::clone(&places));
                shared.tasks.spawn(async move {
                    let shared = owner;
                    match shared.options.security.accept_from(stream).await {
                        Ok((stream, caller)) if caller.is(Role::Controller) => {
                            let Ok(_place) = places.try_acquire() else {
                                return warnings.tell(format_args!(
                                    "more than {CONNECTIONS_MAX} connections of the controller: that from {from} is closed"
                                ));
                            };
                            drop(hall);
                            converse(&shared, stream, from, &warnings).await;
                        }
                        Ok(_) => warnings
                            .tell(format_args!("{from} is refused: its certificate is not the controller's")),
                        Err(error) => {
                            warnings.tell(format_args!("a connection from {from} is refused: {error}"))
                        }
                    }
                });
            }
            (Ok((_, from)), Err(_)) => warnings
                .tell(format_args!("more than {STRANGERS_MAX} connections: that from {from} is closed")),
            (Err(error), _) => {
                warn!("cannot accept a connection: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn converse(
    shared: &Arc<Shared>,
    mut stream: Box<dyn Transport>,
    from: SocketAddr,
    warnings: &Warnings,
) {
    let nonsense =
        |fault: &Fault| warnings.tell(format_args!("a request from {from} makes no sense: {fault}"));
    let handler = |request| handle(shared, request);
    match link::answer(&mut stream, &shared.cancel, nonsense, handler).await {
        Ok(()) => {}
        Err(WireError::Io(error)) => debug!("the connection from {from} ended: {error}"),
        Err(error) => warnings.tell(format_args!("the connection from {from} is closed: {error}")),
    }
}

async fn handle(shared: &Arc<Shared>, request: Arrived) -> Answer {
    match request.frame_type {
        FrameType::NODE_STATUS => {
            request.body::<AskNode>()?;
            request.reply::<AskNode>(state(shared).await)
        }
        FrameType::RUN_PART => {
            let order: RunPart = request.body()?;
            parts::obey(shared, &order.cluster).await?;
            let new = parts::accept(shared, order.cluster, order.task, order.part).await?;
            request.reply::<RunPart>(Accepted { new })
        }
        FrameType::END_PART => {
            let order: EndPart = request.body()?;
            parts::obey(shared, &order.cluster).await?;
            request.reply::<EndPart>(Ended { gone: parts::end(shared, order.task).await? })
        }
        FrameType::FETCH => {
            let order: Fetch = request.body()?;
            parts::obey(shared, &order.cluster).await?;
            let fetched = shared.services.data_plane.fetch(&order.image, order.boot_only).await;
            fetched.map_err(|error| Fault::new(FaultCode::Failed, error.to_string()))?;
            request.reply::<Fetch>(Done {})
        }
        _ => Err(request.unknown()),
    }
}

/// How the node is.
pub(super) async fn state(shared: &Shared) -> NodeState {
    let mut troubles = shared.health.troubles();
    troubles.extend(shared.parts.troubles());
    let identity = shared.options.security.identity.as_ref();
    troubles.extend(identity.and_then(|identity| identity.expiry_warning(SystemTime::now())));
    let images = tokio::time::timeout(DATA_PLANE_TIMEOUT, shared.services.data_plane.images()).await;
    let images =
        images.unwrap_or_else(|_| Err(ServiceError::Away("the data plane does not answer".to_owned())));
    let (images, peer) = match images {
        Ok(images) => (Some(images), shared.services.data_plane.peer()),
        Err(trouble) => {
            troubles.push(trouble.to_string());
            (None, None)
        }
    };
    let mut instances = shared.parts.states(None);
    instances.truncate(INSTANCES_MAX);
    let each = REASONS_BYTES_MAX / instances.len().max(1);
    for instance in &mut instances {
        instance.reason = instance.reason.take().map(|reason| shortened_to(reason, each));
    }
    NodeState {
        node: shared.options.name.clone(),
        cluster: shared.parts.cluster(),
        memory_free: facts::memory().1,
        load: facts::load(&shared.sampler),
        peer,
        images,
        tasks: shared.parts.tasks(),
        instances,
        troubles,
        last_task: shared.parts.last_task(),
    }
}
