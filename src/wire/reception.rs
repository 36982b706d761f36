//! How the control plane takes TCP connections, at the controller and at agents: who has not shown yet that it belongs to
//! the cluster waits in a [`Hall`], apart from the places of members, so that strangers keep nobody out.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::warn;

use super::hall::{Hall, Place};
use super::warnings::Warnings;
use crate::peer::transport::{Caller, Security, Transport};

/// The way in of one listener. Owner of its places.
#[derive(Debug)]
pub(crate) struct Reception {
    security: Security,
    hall: Arc<Hall>,
    places_max: usize,
    places: Arc<Semaphore>,
    /// Of what arrives and makes no sense.
    pub(crate) warnings: Warnings,
}

/// A member of the cluster that has come in.
pub(crate) struct Visitor {
    pub(crate) stream: Box<dyn Transport>,
    pub(crate) caller: Caller,
    pub(crate) from: SocketAddr,
    /// Given back when it leaves.
    _place: OwnedSemaphorePermit,
}

impl Reception {
    /// One with so many places for those of whom it is not known yet who they are, half of them for one address, and so many
    /// for members.
    pub(crate) fn new(security: Security, strangers: usize, places: usize) -> Arc<Self> {
        let hall = Hall::new(strangers, strangers / 2);
        let (places, places_max) = (Arc::new(Semaphore::new(places)), places);
        Arc::new(Self { security, hall, places_max, places, warnings: Warnings::default() })
    }

    /// Takes connections until `cancel`, and has `converse` speak with each member that `admits`, as a task of `tasks`.
    pub(crate) async fn run<F>(
        self: Arc<Self>,
        listener: TcpListener,
        (cancel, tasks): (CancellationToken, TaskTracker),
        admits: fn(&Caller) -> Result<(), &'static str>,
        converse: impl Fn(Visitor) -> F + Clone + Send + 'static,
    ) where
        F: Future<Output = ()> + Send + 'static,
    {
        loop {
            let accepted = tokio::select! {
                () = cancel.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            let (stream, from) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    warn!("cannot accept a connection: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let Some(place) = self.hall.enter(from.ip()).await else {
                self.warnings.tell(format_args!("too many strangers at {from}: a connection is closed"));
                continue;
            };
            let (owner, converse, cancel) = (Arc::clone(&self), converse.clone(), cancel.clone());
            tasks.spawn(async move {
                match cancel.run_until_cancelled(owner.greet(stream, from, place, admits)).await {
                    Some(Ok(visitor)) => converse(visitor).await,
                    Some(Err(why)) => {
                        owner.warnings.tell(format_args!("a connection from {from} is refused: {why}"));
                    }
                    None => {}
                }
            });
        }
    }

    /// Sees who it is, and gives a member a place.
    async fn greet(
        &self,
        stream: TcpStream,
        from: SocketAddr,
        hall: Place,
        admits: fn(&Caller) -> Result<(), &'static str>,
    ) -> Result<Visitor, String> {
        let (stream, caller) = tokio::select! {
            accepted = self.security.accept_from(stream) => accepted.map_err(|error| error.to_string())?,
            () = hall.evicted() => return Err("newer connections needed the place".to_owned()),
        };
        admits(&caller)?;
        let place = Arc::clone(&self.places).try_acquire_owned();
        let _place = place.map_err(|_| format!("there are {} connections already", self.places_max))?;
        Ok(Visitor { stream, caller, from, _place })
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpSocket;

    use super::*;
    use crate::tls::{self, Identity, Role};

    fn member(ca: &std::path::Path, name: &str, role: Role) -> Security {
        let out = tempfile::tempdir().unwrap();
        tls::issue(ca, &name.parse().unwrap(), role, &[], out.path()).unwrap();
        Security { identity: Some(Identity::load(out.path()).unwrap()), plain: false }
    }

    #[tokio::test]
    async fn strangers_that_say_nothing_keep_no_member_out() {
        let ca = tempfile::tempdir().unwrap();
        tls::init_ca(ca.path()).unwrap();
        let controller = member(ca.path(), "control", Role::Controller);
        let reception = Reception::new(member(ca.path(), "n1", Role::Node), 8, 1);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (cancel, tasks) = (CancellationToken::new(), TaskTracker::new());
        let controllers =
            |caller: &Caller| if caller.is(Role::Controller) { Ok(()) } else { Err("not the controller's") };
        let converse = async |mut visitor: Visitor| {
            let mut byte = [0];
            visitor.stream.read_exact(&mut byte).await.unwrap();
            visitor.stream.write_all(&byte).await.unwrap();
        };
        let converse = move |visitor| converse(visitor);
        tokio::spawn(reception.run(listener, (cancel.clone(), tasks.clone()), controllers, converse));

        // More than the hall has, from two addresses that are not the controller's.
        let mut silent = Vec::new();
        for number in 0..16 {
            let socket = TcpSocket::new_v4().unwrap();
            socket.bind(SocketAddr::from(([127, 0, 0, 2 + number % 2], 0))).unwrap();
            silent.push(socket.connect(address).await.unwrap());
        }
        let mut stream = controller.connect_to(address, Role::Node).await.unwrap();
        stream.write_all(b"x").await.unwrap();
        let mut byte = [0];
        let answered = tokio::time::timeout(Duration::from_secs(20), stream.read_exact(&mut byte)).await;
        answered.expect("it is kept out").unwrap();
        cancel.cancel();
    }
}
