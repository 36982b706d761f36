//! One agent of a name on a host.
//!
//! What belongs to a node carries its name as a mark, and an agent ends what carries the mark and is of no task of its
//! own: a second one of that name, on another store, would end all that the first runs. An abstract Unix socket keeps it
//! off: the kernel has it as long as the process lives, and once in each network namespace, as bridges are.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

use super::AgentError;
use crate::name::HostName;

/// How long is waited for another agent to end.
const PATIENCE: Duration = Duration::from_secs(1);

/// Held by the agent of a node while it runs. Nothing is ever sent to it.
#[derive(Debug)]
pub struct NameLock {
    _socket: UnixDatagram,
}

impl NameLock {
    /// Takes the name on this host.
    ///
    /// # Errors
    /// [`AgentError::NameTaken`], after a second: an agent that was killed a moment ago may still be ending.
    pub async fn take(name: &HostName) -> Result<Self, AgentError> {
        let text = format!("bootcache-agent-{name}");
        let at = |source| AgentError::Io { path: format!("@{text}").into(), source };
        let address = SocketAddr::from_abstract_name(&text).map_err(at)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            match UnixDatagram::bind_addr(&address) {
                Ok(socket) => return Ok(Self { _socket: socket }),
                Err(error) if error.kind() != io::ErrorKind::AddrInUse => return Err(at(error)),
                Err(_) if Instant::now() >= deadline => return Err(AgentError::NameTaken(name.clone())),
                Err(_) => tokio::time::sleep(PATIENCE / 20).await,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_name_is_taken_by_one_at_a_time() {
        // Other tests run in this namespace too.
        let name = |number: u32| format!("lock-{}-{number}", std::process::id()).parse::<HostName>().unwrap();
        let held = NameLock::take(&name(1)).await.unwrap();
        let error = NameLock::take(&name(1)).await.unwrap_err().to_string();
        assert!(error.contains("another agent of node 'lock-"), "{error}");
        drop(NameLock::take(&name(2)).await.unwrap());
        drop(held);
        drop(NameLock::take(&name(1)).await.unwrap());
    }
}
