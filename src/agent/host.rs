//! A host's own bridges and Docker, as an agent needs them.

use std::sync::Arc;

use bootcache_nbd::BoxFuture;
use tokio::sync::Mutex;

use super::services::{Bytes, ContainerImages, Networks};
use crate::hypervisor::docker::Docker;
use crate::network::{self, NetworkSpec};
use crate::wire::cluster::Needed;

/// The host's bridges, and Docker's networks on them where there is a Docker.
#[derive(Debug, Clone)]
pub struct HostNetworks {
    bridges: network::Networks,
    docker: Option<Arc<Docker>>,
}

impl HostNetworks {
    /// Those of the host that this process runs on.
    pub const fn new(bridges: network::Networks, docker: Option<Arc<Docker>>) -> Self {
        Self { bridges, docker }
    }
}

impl Networks for HostNetworks {
    fn ensure<'a>(&'a self, network: &'a NetworkSpec) -> BoxFuture<'a, Result<(), String>> {
        Box::pin(async move {
            self.bridges.ensure(network).await.map_err(|error| error.to_string())?;
            match self.docker.as_ref().filter(|_| network.containers) {
                Some(docker) => docker.ensure_network(network).await.map_err(|error| error.to_string()),
                None => Ok(()),
            }
        })
    }

    fn remove<'a>(&'a self, bridge: &'a str) -> BoxFuture<'a, Result<(), String>> {
        Box::pin(async move {
            if let Some(docker) = &self.docker {
                docker.remove_network(bridge).await.map_err(|error| error.to_string())?;
            }
            self.bridges.remove(bridge).await.map_err(|error| error.to_string())
        })
    }
}

/// Docker's images, each loaded once however many containers wait for it.
#[derive(Debug, Clone)]
pub struct DockerImages {
    docker: Arc<Docker>,
    loading: Arc<Mutex<()>>,
}

impl DockerImages {
    /// Those of `docker`.
    pub fn new(docker: Arc<Docker>) -> Self {
        Self { docker, loading: Arc::default() }
    }
}

impl ContainerImages for DockerImages {
    fn ensure<'a>(
        &'a self,
        image: &'a Needed,
        bytes: Box<dyn FnOnce() -> BoxFuture<'a, Result<Bytes, String>> + Send + 'a>,
    ) -> BoxFuture<'a, Result<String, String>> {
        Box::pin(async move {
            let reference = Docker::reference(&image.name, image.root);
            let _one = self.loading.lock().await;
            if !self.docker.has_image(&reference).await.map_err(|error| error.to_string())? {
                let bytes = bytes().await?;
                self.docker.load(&image.name, image.root, bytes).await.map_err(|error| error.to_string())?;
            }
            Ok(reference)
        })
    }
}
