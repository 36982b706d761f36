//! The controller's end of connections: who may ask for what, and who answers.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tracing::{debug, info, warn};

use super::{DatabaseError, DeployError, Shared, database, deploy, now_ms, round};
use crate::name::HostName;
use crate::peer::transport::{Caller, Transport};
use crate::tls::Role;
use crate::wire::cluster::{
    AskNode, Deploy, Deployed, Done, End, Fault, FaultCode, Forget, InstancesChanged, Prefetch, Query,
    RegisterCompute, RegisterImage, Registered,
};
use crate::wire::frame::FrameType;
use crate::wire::io::WireError;
use crate::wire::link::{self, Answer, Arrived};
use crate::wire::reception::{Reception, Visitor};
use crate::wire::warnings::Warnings;

/// Connections at once: more than nodes and users of a large cluster need.
const CONNECTIONS_MAX: usize = 4096;
/// Connections at once of which it is not known yet whose they are.
const STRANGERS_MAX: usize = 1024;
/// How long a request may take: longer than anybody waits for it, since images are brought to many nodes on after that.
const ANSWER_MAX: Duration = Duration::from_secs(120);
/// How long a node that registers may take to be reached.
const REACH_TIMEOUT: Duration = Duration::from_secs(3);

/// Serves the socket in the controller's folder, which only its owner can open.
pub(super) async fn unix(shared: Arc<Shared>, listener: UnixListener) {
    let (places, warnings) = (Arc::new(Semaphore::new(CONNECTIONS_MAX)), Arc::new(Warnings::default()));
    loop {
        let accepted = tokio::select! {
            () = shared.cancel.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let accepted = (accepted, Arc::clone(&places).try_acquire_owned());
        match accepted {
            (Ok((stream, _)), Ok(place)) => {
                let (owner, warnings) = (Arc::clone(&shared), Arc::clone(&warnings));
                shared.tasks.spawn(async move {
                    let shared = owner;
                    let local = SocketAddr::from(([127, 0, 0, 1], 0));
                    let mut stream: Box<dyn Transport> = Box::new(stream);
                    converse(&shared, &mut stream, &Caller::trusted(), local, &warnings).await;
                    drop(place);
                });
            }
            (Ok(_), Err(_)) => {
                warnings.tell(format_args!("more than {CONNECTIONS_MAX} connections: one is closed"))
            }
            (Err(error), _) => {
                warn!("cannot accept a connection: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Serves agents and users over TCP.
pub(super) async fn tcp(shared: Arc<Shared>, listener: TcpListener) {
    let reception = Reception::new(shared.options.security.clone(), STRANGERS_MAX, CONNECTIONS_MAX);
    let (warned, owner) = (Arc::clone(&reception), Arc::clone(&shared));
    let converse = move |visitor: Visitor| {
        let (shared, reception) = (Arc::clone(&owner), Arc::clone(&warned));
        async move {
            let mut visitor = visitor;
            let Visitor { stream, caller, from, .. } = &mut visitor;
            converse(&shared, stream, caller, *from, &reception.warnings).await;
        }
    };
    // What each may ask for is looked at with each request.
    reception.run(listener, (shared.cancel.clone(), shared.tasks.clone()), |_| Ok(()), converse).await;
}

async fn converse(
    shared: &Arc<Shared>,
    stream: &mut Box<dyn Transport>,
    caller: &Caller,
    from: SocketAddr,
    warnings: &Warnings,
) {
    let nonsense =
        |fault: &Fault| warnings.tell(format_args!("a request from {from} makes no sense: {fault}"));
    let handler = |request| handle(shared, caller, from, request);
    match link::answer(stream, &shared.cancel, ANSWER_MAX, nonsense, handler).await {
        Ok(()) => {}
        Err(WireError::Io(error)) => debug!("the connection from {from} ended: {error}"),
        Err(error) => warnings.tell(format_args!("the connection from {from} is closed: {error}")),
    }
}

/// Carries out one request.
async fn handle(shared: &Arc<Shared>, caller: &Caller, from: SocketAddr, request: Arrived) -> Answer {
    match request.frame_type {
        FrameType::REGISTER_COMPUTE => {
            let body: RegisterCompute = request.body()?;
            allow_node(caller, &body.node, from)?;
            request.reply::<RegisterCompute>(register(shared, body, from).await?)
        }
        FrameType::REGISTER_IMAGE => {
            let body: RegisterImage = request.body()?;
            allow_node(caller, &body.node, from)?;
            register_images(shared, body).await?;
            request.reply::<RegisterImage>(Done {})
        }
        FrameType::INSTANCE_STATUS => {
            let body: InstancesChanged = request.body()?;
            allow_node(caller, &body.node, from)?;
            let owner = Arc::clone(shared);
            shared.database.run(move |tx| changed(tx, &owner.told, &body)).await?;
            request.reply::<InstancesChanged>(Done {})
        }
        FrameType::DEPLOY => {
            allow_user(caller, from)?;
            let body: Deploy = request.body()?;
            let task = deploy::deploy(shared, &body.request, body.plan).await?;
            request.reply::<Deploy>(Deployed { task })
        }
        FrameType::END => {
            allow_user(caller, from)?;
            deploy::end(shared, request.body::<End>()?.task).await?;
            request.reply::<End>(Done {})
        }
        FrameType::QUERY_STATUS => {
            allow_user(caller, from)?;
            request.reply::<Query>(deploy::query(shared, request.body()?).await?)
        }
        FrameType::PREFETCH => {
            allow_user(caller, from)?;
            deploy::prefetch(shared, request.body()?).await?;
            request.reply::<Prefetch>(Done {})
        }
        FrameType::FORGET => {
            allow_user(caller, from)?;
            deploy::forget(shared, request.body::<Forget>()?.node).await?;
            request.reply::<Forget>(Done {})
        }
        _ => Err(request.unknown()),
    }
}

fn allow_node(caller: &Caller, node: &HostName, from: SocketAddr) -> Result<(), Fault> {
    if caller.is(Role::Node) && caller.is_named(node) {
        return Ok(());
    }
    warn!("{from} is refused: its certificate is not that of node '{node}'");
    Err(Fault::new(FaultCode::Forbidden, format!("your certificate is not that of node '{node}'")))
}

fn allow_user(caller: &Caller, from: SocketAddr) -> Result<(), Fault> {
    if caller.is(Role::User) || caller.is(Role::Controller) {
        return Ok(());
    }
    warn!("{from} is refused: its certificate is not a user's");
    Err(Fault::new(
        FaultCode::Forbidden,
        "your certificate is not a user's (`bootcache ca issue --role user`)",
    ))
}

/// Enters a node once it has been reached.
async fn register(
    shared: &Arc<Shared>,
    body: RegisterCompute,
    from: SocketAddr,
) -> Result<Registered, Fault> {
    let address = SocketAddr::new(body.ip.unwrap_or_else(|| from.ip()), body.port);
    let unreachable = |error: String| {
        let message = format!("node '{}' cannot be reached at {address}: {error}", body.node);
        Fault::new(FaultCode::Failed, message)
    };
    let read = |tx: &database::Tx<'_>| Ok((database::all_hosts(tx)?, database::accepted_parts(tx)?));
    let (hosts, accepted) = shared.database.run::<_, DatabaseError, _>(read).await?;
    let other = hosts.iter().find(|host| host.name == body.node && host.address != address && host.online);
    if let Some(other) = other
        && shared
            .nodes
            .call(other.place(), &AskNode {}, REACH_TIMEOUT)
            .await
            .is_ok_and(|s| s.node == body.node)
    {
        let message = format!(
            "there is a node '{}' already, at {}: give this one another name",
            body.node, other.address
        );
        return Err(Fault::new(FaultCode::Invalid, message));
    }
    match shared.nodes.call((address, &body.node), &AskNode {}, REACH_TIMEOUT).await {
        Ok(state) if state.node != body.node => Err(unreachable(format!("node '{}' is there", state.node))),
        Ok(state) if state.cluster.as_ref().is_some_and(|cluster| *cluster != shared.cluster) => {
            let message = format!("node '{}' belongs to another cluster", body.node);
            Err(Fault::new(FaultCode::Invalid, message))
        }
        Ok(state) => {
            let (node, at) = (body.node.clone(), Instant::now());
            let peer = state.peer.and_then(|peer| round::resolved(peer, address));
            let host_id = shared
                .database
                .run::<_, DatabaseError, _>(move |tx| {
                    let host_id = database::register_host(tx, &body, address, now_ms())?;
                    let parts = accepted.into_iter().filter(|(host, _)| *host == host_id);
                    let accepted = parts.map(|(_, task)| task).collect();
                    let heard =
                        database::Heard { host_id, at, accepted, other: None, peer, state: Some(state) };
                    database::write_round(tx, &[heard], now_ms(), None)?;
                    Ok(host_id)
                })
                .await?;
            info!("node '{node}' is registered, at {address}");
            shared.orders.notify_one();
            Ok(Registered { host_id, cluster: shared.cluster.clone(), report: shared.report })
        }
        Err(error) => Err(unreachable(error.to_string())),
    }
}

async fn register_images(shared: &Arc<Shared>, body: RegisterImage) -> Result<(), Fault> {
    let hosts = shared.database.run(database::all_hosts).await?;
    let Some(host) = hosts.into_iter().find(|host| host.name == body.node) else {
        return Err(not_registered(&body.node));
    };
    let peer = body.peer.and_then(|peer| round::resolved(peer, host.address));
    let register = move |tx: &database::Tx<'_>| {
        database::set_peer(tx, host.id, peer)?;
        database::register_images(tx, host.id, &body.images)
    };
    // Those that have another image than the cluster by a name are told of by the heartbeat.
    shared.database.run(register).await?;
    Ok(())
}

fn not_registered(node: &HostName) -> Fault {
    Fault::new(FaultCode::NotFound, format!("node '{node}' is not registered"))
}

fn changed(tx: &database::Tx<'_>, told: &round::Told, body: &InstancesChanged) -> Result<(), Fault> {
    let host_id = database::host_id(tx, &body.node)?.ok_or_else(|| not_registered(&body.node))?;
    database::update_instances(tx, host_id, &body.instances, now_ms())?;
    told.note(host_id);
    Ok(())
}

impl From<DatabaseError> for Fault {
    fn from(error: DatabaseError) -> Self {
        Self::new(FaultCode::Failed, error.to_string())
    }
}

impl From<DeployError> for Fault {
    fn from(error: DeployError) -> Self {
        let code = match &error {
            DeployError::Plan(_) | DeployError::Request | DeployError::NodeOnline(_) => FaultCode::Invalid,
            DeployError::NoTask(_) | DeployError::NoImage(_) | DeployError::NoNode(_) => FaultCode::NotFound,
            DeployError::Nodes(_) | DeployError::Database(_) => FaultCode::Failed,
        };
        Self::new(code, error.to_string())
    }
}
