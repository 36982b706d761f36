//! A user's end of a connection to a controller.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::UnixStream;

use crate::peer::transport::{Security, Transport};
use crate::tls::Role;
use crate::wire::cluster::{Body, Found, Query};
use crate::wire::link::{CallError, Link};

/// How long a controller may take to answer.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Where a controller is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// On this host: its socket.
    Socket(PathBuf),
    /// Elsewhere.
    Tcp(SocketAddr),
    /// Elsewhere, as `HOST:PORT`: looked up whenever it is connected to, and every address that it has is tried.
    Named(String),
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Socket(path) => path.display().fmt(f),
            Self::Tcp(address) => address.fmt(f),
            Self::Named(name) => name.fmt(f),
        }
    }
}

/// Why a controller did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// None runs on this host.
    #[error("no controller runs here ({}): start one with `bootcache controller`, or say where it is (--controller)", .0.display())]
    NotHere(PathBuf),
    /// It cannot be reached.
    #[error("the controller at {target} cannot be reached: {error}")]
    Unreachable {
        /// Where.
        target: Target,
        /// What the system says.
        error: std::io::Error,
    },
    /// It refused, or the connection broke.
    #[error(transparent)]
    Call(#[from] CallError),
}

/// A connection to a controller.
#[derive(Debug)]
pub struct Client {
    link: Link,
}

impl Client {
    /// Connects to the controller at `target`.
    ///
    /// # Errors
    /// [`ClientError::NotHere`], [`ClientError::Unreachable`].
    pub async fn connect(target: &Target, security: &Security) -> Result<Self, ClientError> {
        let stream: Box<dyn Transport> = match target {
            Target::Socket(path) => Box::new(local(path).await?),
            Target::Tcp(address) => security
                .connect_to(*address, Role::Controller)
                .await
                .map_err(|error| ClientError::Unreachable { target: target.clone(), error })?,
            Target::Named(name) => named(name, security)
                .await
                .map_err(|error| ClientError::Unreachable { target: target.clone(), error })?,
        };
        Ok(Self { link: Link::new(stream) })
    }

    /// Asks for something and waits for the answer.
    ///
    /// # Errors
    /// [`ClientError::Call`]. After any but a refusal the client must not be used again.
    pub async fn call<B: Body>(&mut self, body: &B) -> Result<B::Answer, ClientError> {
        Ok(self.link.call(body, TIMEOUT).await?)
    }

    /// Asks for a whole list, however many answers that takes.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub async fn list(&mut self, query: &Query) -> Result<Found, ClientError> {
        let mut found = self.call(query).await?;
        let mut next = query.behind(&found);
        while let Some(query) = next {
            let more = self.call(&query).await?;
            next = query.behind(&more);
            if !found.extend(more) {
                return Err(CallError::OutOfTurn.into());
            }
        }
        Ok(found)
    }
}

async fn named(name: &str, security: &Security) -> std::io::Result<Box<dyn Transport>> {
    let addresses: Vec<_> = tokio::net::lookup_host(name).await?.collect();
    security.connect_to_any(&addresses, Role::Controller).await
}

async fn local(path: &Path) -> Result<UnixStream, ClientError> {
    UnixStream::connect(path).await.map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused => {
            ClientError::NotHere(path.to_owned())
        }
        _ => ClientError::Unreachable { target: Target::Socket(path.to_owned()), error },
    })
}
