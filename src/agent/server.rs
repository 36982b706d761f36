//! The agent's end of connections: the controller's questions and orders.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::net::TcpListener;
use tracing::debug;

use super::services::ServiceError;
use super::{Shared, facts, parts};
use crate::peer::transport::Caller;
use crate::tls::Role;
use crate::wire::cluster::{
    Accepted, AskNode, Done, EndPart, Ended, Fault, FaultCode, Fetch, INSTANCES_MAX, ImageHere, NodeState,
    RunPart, shortened_to,
};
use crate::wire::frame::{CONTROL_PAYLOAD_MAX, FrameType};
use crate::wire::io::WireError;
use crate::wire::link::{self, Answer, Arrived};
use crate::wire::reception::{Reception, Visitor};

/// Connections of a controller at once: it needs one for each kind of request.
const CONNECTIONS_MAX: usize = 16;
/// Connections at once of which it is not known yet whose they are.
const STRANGERS_MAX: usize = 64;
/// How long an order may take, and a question: longer than the controller waits for any, and so short that those on which it
/// gave up do not take all its places.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// How long a data plane may take to say what it has.
const DATA_PLANE_TIMEOUT: Duration = Duration::from_secs(1);
/// Most troubles in one state.
const TROUBLES_MAX: usize = 32;
/// What is left free in the frame of a state: for the controller's lists, which say more of a node than its images.
const STATE_BYTES_FREE: usize = 16 << 10;
/// Most bytes of instances' reasons in one state, so that it fits a frame however many have failed.
const REASONS_BYTES_MAX: usize = 256 << 10;

/// Serves the controller until the agent ends.
pub(super) async fn serve(shared: Arc<Shared>, listener: TcpListener) {
    let reception = Reception::new(shared.options.security.clone(), STRANGERS_MAX, CONNECTIONS_MAX);
    let (warned, owner) = (Arc::clone(&reception), Arc::clone(&shared));
    let converse = move |visitor| converse(Arc::clone(&owner), visitor, Arc::clone(&warned));
    reception.run(listener, (shared.cancel.clone(), shared.tasks.clone()), admits, converse).await;
}

fn admits(caller: &Caller) -> Result<(), &'static str> {
    if caller.is(Role::Controller) { Ok(()) } else { Err("its certificate is not the controller's") }
}

async fn converse(shared: Arc<Shared>, mut visitor: Visitor, reception: Arc<Reception>) {
    let (from, warnings) = (visitor.from, &reception.warnings);
    let nonsense =
        |fault: &Fault| warnings.tell(format_args!("a request from {from} makes no sense: {fault}"));
    let handler = |request| handle(&shared, request);
    match link::answer(&mut visitor.stream, &shared.cancel, ANSWER_MAX, nonsense, handler).await {
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
        Ok(images) => {
            troubles.extend(shared.services.data_plane.troubles());
            (Some(images), shared.services.data_plane.peer())
        }
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
    troubles.truncate(TROUBLES_MAX);
    let mut state = NodeState {
        node: shared.options.name.clone(),
        cluster: shared.parts.cluster(),
        memory_free: facts::memory().1,
        load: facts::load(&shared.sampler),
        peer,
        images: None,
        tasks: shared.parts.tasks(),
        instances,
        troubles,
        last_task: shared.parts.last_task(),
    };
    if let Some(images) = images {
        with_images(&mut state, images, CONTROL_PAYLOAD_MAX - STATE_BYTES_FREE);
    }
    state
}

/// Tells of as many images as fit into `limit` bytes with the rest: of too many, the controller would hear nothing at all.
fn with_images(state: &mut NodeState, mut images: Vec<ImageHere>, limit: usize) {
    fn bytes(part: &impl serde::Serialize) -> usize {
        rmp_serde::to_vec_named(part).map_or(usize::MAX, |bytes| bytes.len())
    }
    let mut left = limit.saturating_sub(bytes(state));
    // The same ones every time.
    images.sort_by(|one, other| one.name.cmp(&other.name));
    let count = images.len();
    let fit = images.iter().take_while(|image| {
        let bytes = bytes(image);
        let fits = bytes <= left;
        left = left.saturating_sub(bytes);
        fits
    });
    let fit = fit.count();
    images.truncate(fit);
    if fit < count {
        state.troubles.push(format!(
            "it has {count} images, of which the controller is told {fit}: remove some, `bootcache image list` shows them"
        ));
    }
    state.images = Some(images);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;
    use crate::image::manifest::ImageKind;

    #[test]
    fn of_too_many_images_as_many_are_told_as_a_frame_takes() {
        let image = |number: u32| ImageHere {
            name: format!("image-{number:05}").parse().unwrap(),
            root: Digest::of(&number.to_le_bytes()),
            kind: ImageKind::Vm,
            size: u64::MAX,
            boot_bytes: u64::MAX,
            boot: Some(Digest::of(b"boot")),
            present: u64::MAX,
            allocated: u64::MAX,
            complete: true,
            boot_complete: true,
            received: u64::MAX,
        };
        let state = || NodeState {
            node: "n1".parse().unwrap(),
            cluster: None,
            memory_free: 0,
            load: std::collections::BTreeMap::new(),
            peer: None,
            images: None,
            tasks: Vec::new(),
            instances: Vec::new(),
            troubles: Vec::new(),
            last_task: None,
        };
        let told = |count: u32| {
            let mut state = state();
            with_images(
                &mut state,
                (0..count).rev().map(image).collect(),
                CONTROL_PAYLOAD_MAX - STATE_BYTES_FREE,
            );
            state
        };
        let few = told(100);
        assert_eq!((few.images.unwrap().len(), few.troubles.len()), (100, 0));
        let many = told(10_000);
        assert!(rmp_serde::to_vec_named(&many).unwrap().len() < CONTROL_PAYLOAD_MAX - STATE_BYTES_FREE / 2);
        let images = many.images.unwrap();
        assert!(images.len() > 2000, "only {} are told", images.len());
        assert_eq!(images[0].name, image(0).name);
        assert!(many.troubles[0].starts_with("it has 10000 images"), "{:?}", many.troubles);
    }
}
