//! How commands find a controller, and what protects the way to it.

use std::path::{Path, PathBuf};

use anyhow::Context;
use bootcache::controller::SOCKET;
use bootcache::controller::client::{Client, Target};
use bootcache::peer::transport::Security;
use bootcache::tls::Identity;

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
        let (target, security) = self.target(globals).await?;
        Ok(Client::connect(&target, &security).await?)
    }

    /// Where it is, and what protects the way there.
    pub(crate) async fn target(&self, globals: &super::Globals) -> anyhow::Result<(Target, Security)> {
        let target = match &self.controller {
            Some(text) => target(text).await?,
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
pub(crate) async fn target(text: &str) -> anyhow::Result<Target> {
    if text.contains('/') {
        return Ok(Target::Socket(text.into()));
    }
    let found = tokio::net::lookup_host(text).await;
    let address = found.with_context(|| format!("cannot find {text}: give it as HOST:PORT"))?.next();
    Ok(Target::Tcp(address.with_context(|| format!("{text} has no address"))?))
}
