//! How commands find a controller, and what protects the way to it.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use bootcache::controller::SOCKET;
use bootcache::controller::client::{Client, ClientError, Target};
use bootcache::peer::transport::Security;
use bootcache::tls::Identity;
use bootcache::wire::cluster::{Body, Found, Query};
use bootcache::wire::io::WireError;
use bootcache::wire::link::CallError;

/// What protects connections to other hosts.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct SecurityArgs {
    /// Folder with this member's certificate, for TLS within the cluster [default: tls in the store, if it is there]
    #[arg(long, value_name = "DIR")]
    pub(crate) tls_dir: Option<PathBuf>,
    /// Without a certificate, speak to other hosts too, neither encrypted nor authenticated
    #[arg(long)]
    pub(crate) plain: bool,
}

impl SecurityArgs {
    /// The certificate and the setting.
    pub(crate) fn load(&self, store: &Path) -> anyhow::Result<Security> {
        let found = Some(store.join("tls")).filter(|dir| dir.exists());
        let identity = match self.tls_dir.clone().or(found) {
            Some(dir) => Some(Identity::load(&dir)?),
            None => None,
        };
        Ok(Security { identity, plain: self.plain })
    }
}

/// Where the controller is.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ControllerArgs {
    /// The controller: HOST:PORT, or the path of its socket [default: the controller of this store]
    #[arg(long, value_name = "TARGET", env = "BOOTCACHE_CONTROLLER")]
    controller: Option<String>,
    #[command(flatten)]
    security: SecurityArgs,
}

impl ControllerArgs {
    /// Connects to it.
    pub(crate) async fn connect(&self, globals: &super::Globals) -> anyhow::Result<Client> {
        let (target, security) = self.target(globals)?;
        Ok(Client::connect(&target, &security).await?)
    }

    /// Connects to it, for longer.
    pub(crate) async fn steady(&self, globals: &super::Globals) -> anyhow::Result<Steady> {
        let (target, security) = self.target(globals)?;
        let client = Some(Client::connect(&target, &security).await?);
        Ok(Steady { target, security, client })
    }

    /// Where it is, and what protects the way there.
    pub(crate) fn target(&self, globals: &super::Globals) -> anyhow::Result<(Target, Security)> {
        let target = match &self.controller {
            Some(text) => target(text)?,
            None => Target::Socket(default_dir(globals).join(SOCKET)),
        };
        Ok((target, self.security.load(&globals.store_dir())?))
    }
}

/// The folder of the controller of a store.
pub(crate) fn default_dir(globals: &super::Globals) -> PathBuf {
    globals.store_dir().join("controller")
}

/// What `text` means: a path has a slash in it.
pub(crate) fn target(text: &str) -> anyhow::Result<Target> {
    if text.contains('/') {
        return Ok(Target::Socket(text.into()));
    }
    if let Ok(address) = text.parse() {
        return Ok(Target::Tcp(address));
    }
    let port = text.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
    port.with_context(|| format!("cannot find {text}: give it as HOST:PORT"))?;
    Ok(Target::Named(text.to_owned()))
}

/// How long a controller may be away before a command that waits for something gives up.
const PATIENCE: Duration = Duration::from_secs(60);
/// Pause between two tries to reach it again.
const RETRY: Duration = Duration::from_millis(500);

/// A connection that is made again when it breaks: whoever waits outlives a restart of the controller.
#[derive(Debug)]
pub(crate) struct Steady {
    target: Target,
    security: Security,
    client: Option<Client>,
}

impl Steady {
    /// Asks for something that may be asked for twice, until it is answered or refused.
    pub(crate) async fn call<B: Body>(&mut self, body: &B) -> anyhow::Result<B::Answer> {
        self.steadily(async |client| client.call(body).await).await
    }

    /// Asks for a whole list.
    pub(crate) async fn list(&mut self, query: &Query) -> anyhow::Result<Found> {
        self.steadily(async |client| client.list(query).await).await
    }

    async fn steadily<T>(
        &mut self,
        ask: impl AsyncFn(&mut Client) -> Result<T, ClientError>,
    ) -> anyhow::Result<T> {
        let mut away: Option<Instant> = None;
        loop {
            let error = match self.once(&ask).await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            if !may_pass(&error) || away.is_some_and(|since| since.elapsed() > PATIENCE) {
                return Err(error.into());
            }
            self.client = None;
            if away.is_none() {
                eprintln!("the controller is away ({error}): trying again for {} s", PATIENCE.as_secs());
                away = Some(Instant::now());
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    async fn once<T>(
        &mut self,
        ask: impl AsyncFn(&mut Client) -> Result<T, ClientError>,
    ) -> Result<T, ClientError> {
        let client = match &mut self.client {
            Some(client) => client,
            none => none.insert(Client::connect(&self.target, &self.security).await?),
        };
        ask(client).await
    }
}

/// Whether the same request may be answered by a controller that restarts.
const fn may_pass(error: &ClientError) -> bool {
    match error {
        ClientError::NotHere(_) | ClientError::Unreachable { .. } => true,
        ClientError::Call(error) => {
            matches!(error, CallError::Wire(WireError::Io(_)) | CallError::TimedOut(_))
        }
    }
}

#[cfg(test)]
mod tests {
    use bootcache::wire::frame::FrameError;

    use super::*;

    #[test]
    fn what_a_restart_does_not_mend_is_not_tried_again() {
        let broken = std::io::Error::from(std::io::ErrorKind::UnexpectedEof);
        assert!(may_pass(&CallError::from(broken).into()));
        assert!(may_pass(&ClientError::NotHere("c.sock".into())));
        let long = FrameError::TooLong { length: 2, limit: 1 };
        assert!(!may_pass(&CallError::Wire(long.into()).into()));
        assert!(!may_pass(&CallError::OutOfTurn.into()));
    }

    #[test]
    fn a_controller_is_a_socket_an_address_or_a_name_with_a_port() {
        assert_eq!(target("./c.sock").unwrap(), Target::Socket("./c.sock".into()));
        assert_eq!(target("[::1]:7600").unwrap(), Target::Tcp("[::1]:7600".parse().unwrap()));
        assert_eq!(target("localhost:7600").unwrap(), Target::Named("localhost:7600".to_owned()));
        for bad in ["localhost", "localhost:", "localhost:x", ""] {
            assert!(target(bad).unwrap_err().to_string().contains("give it as HOST:PORT"), "{bad}");
        }
    }
}
