//! A host's own bridges and Docker, as an agent needs them.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, Weak};
use std::time::Duration;

use bootcache_nbd::BoxFuture;
use tokio::sync::Mutex;
use tracing::debug;

use super::services::{Bytes, ContainerImages, Networks, ServiceError};
use crate::hypervisor::docker::{Docker, LoadError};
use crate::network::{self, NetworkError, NetworkSpec};
use crate::wire::cluster::Needed;

/// How long a network that no container is on waits for Docker when it is removed.
const DOCKER_PATIENCE: Duration = Duration::from_secs(10);

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
    fn ensure<'a>(&'a self, network: &'a NetworkSpec) -> BoxFuture<'a, Result<(), ServiceError>> {
        Box::pin(async move {
            self.bridges.ensure(network).await.map_err(refused)?;
            match self.docker.as_ref().filter(|_| network.containers) {
                Some(docker) => Ok(docker.ensure_network(network).await?),
                None => Ok(()),
            }
        })
    }

    fn remove<'a>(&'a self, network: &'a NetworkSpec) -> BoxFuture<'a, Result<(), ServiceError>> {
        Box::pin(async move {
            if let Some(docker) = &self.docker {
                remove_from(docker, network).await?;
            }
            self.bridges.remove(&network.bridge).await.map_err(refused)
        })
    }
}

/// Removes Docker's network. VMs alone do not wait for a Docker that may never come: another task's containers may have
/// been on their bridge, so that it is asked all the same.
async fn remove_from(docker: &Docker, network: &NetworkSpec) -> Result<(), ServiceError> {
    let removal = docker.remove_network(&network.bridge);
    if network.containers {
        return Ok(removal.await?);
    }
    let removed = match tokio::time::timeout(DOCKER_PATIENCE, removal).await {
        Ok(removed) => removed.map_err(ServiceError::from),
        Err(_) => Err(ServiceError::Away(format!("Docker does not answer within {DOCKER_PATIENCE:?}"))),
    };
    match removed {
        Err(ServiceError::Away(reason)) => {
            debug!("network {}: {reason}", network.name);
            Ok(())
        }
        other => other,
    }
}

/// Docker's images, each loaded once however many containers wait for it.
#[derive(Debug, Clone)]
pub struct DockerImages {
    docker: Arc<Docker>,
    /// One for each image that is being loaded: others need not wait for it.
    loading: Arc<std::sync::Mutex<HashMap<String, Weak<Mutex<()>>>>>,
}

impl DockerImages {
    /// Those of `docker`.
    pub fn new(docker: Arc<Docker>) -> Self {
        Self { docker, loading: Arc::default() }
    }

    /// What is held while the image of that name is loaded.
    fn loading(&self, reference: &str) -> Arc<Mutex<()>> {
        let mut all = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, lock| lock.strong_count() > 0);
        let known = all.get(reference).and_then(Weak::upgrade);
        known.unwrap_or_else(|| {
            let lock = Arc::default();
            all.insert(reference.to_owned(), Arc::downgrade(&lock));
            lock
        })
    }
}

fn refused(error: NetworkError) -> ServiceError {
    ServiceError::Refused(error.to_string())
}

impl ContainerImages for DockerImages {
    fn ensure<'a>(
        &'a self,
        image: &'a Needed,
        bytes: Box<dyn FnOnce() -> BoxFuture<'a, Result<Bytes, ServiceError>> + Send + 'a>,
    ) -> BoxFuture<'a, Result<String, ServiceError>> {
        Box::pin(async move {
            let reference = Docker::reference(&image.name, image.root);
            if self.docker.has_image(&reference).await? {
                return Ok(reference);
            }
            let loading = self.loading(&reference);
            let _one = loading.lock().await;
            // Somebody may have loaded it meanwhile.
            if !self.docker.has_image(&reference).await? {
                let bytes = bytes().await?;
                self.docker.load(&image.name, image.root, bytes).await.map_err(|error| match error {
                    LoadError::Engine(error) => error.into(),
                    cut @ LoadError::Cut { .. } => ServiceError::Away(cut.to_string()),
                    archive @ LoadError::Archive { .. } => ServiceError::Refused(archive.to_string()),
                })?;
            }
            Ok(reference)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_image_waits_for_itself_and_for_no_other() {
        let docker = Docker::new("/nowhere/docker.sock", "n1".parse().unwrap());
        let images = DockerImages::new(Arc::new(docker));
        let one = images.loading("a");
        let held = one.lock().await;
        assert!(images.loading("a").try_lock().is_err());
        assert!(images.loading("b").try_lock().is_ok());
        drop(held);
        drop(one);
        assert!(images.loading("a").try_lock().is_ok());
        assert_eq!(images.loading.lock().unwrap().len(), 1, "what nobody loads is forgotten");
    }
}
