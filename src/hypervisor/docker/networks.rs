//! The engine's own networks on the bridges of a node, so that containers are on them with VMs.
//!
//! Such a network has the name of its bridge. Docker puts the address that it thinks the gateway has on the bridge, so
//! that each node needs another one ([`NetworkSpec::node_address`]); where the containers' packets really go is told by
//! an auxiliary address. It never removes a bridge that it did not make.

use std::collections::HashMap;
use std::net::IpAddr;

use bollard::models::{Ipam, IpamConfig, NetworkCreateRequest, NetworkInspect};
use bollard::query_parameters::ListNetworksOptions;

use super::{Docker, LABEL, status};
use crate::hypervisor::HypervisorError;
use crate::network::NetworkSpec;

/// Docker's option for the bridge of a network.
const BRIDGE: &str = "com.docker.network.bridge.name";
/// And for the largest packet of its containers.
const MTU: &str = "com.docker.network.driver.mtu";

impl Docker {
    /// Makes the engine's network on the bridge of `spec`, which is there already; again is no error.
    pub async fn ensure_network(&self, spec: &NetworkSpec) -> Result<(), HypervisorError> {
        let refused = |reason: &str| {
            Err(HypervisorError::Refused(format!("network {}: containers need {reason}", spec.name)))
        };
        let (IpAddr::V4(subnet), prefix) = spec.subnet else { return refused("an IPv4 subnet") };
        let Some(node) = spec.node_address else {
            return refused("an address for this node, and each node one of its own");
        };
        let subnet = format!("{subnet}/{prefix}");
        if let Some(found) = self.network(&spec.bridge).await? {
            if is_as_wanted(&found, spec, &subnet, node) {
                return Ok(());
            }
            if !self.owns(&found) {
                return Err(HypervisorError::Refused(format!(
                    "network {}: Docker has a network {} of somebody else's: take another bridge",
                    spec.name, spec.bridge
                )));
            }
            self.remove_network(&spec.bridge).await?;
        }
        let gateway = spec.gateway.filter(|gateway| *gateway != node);
        let config = IpamConfig {
            subnet: Some(subnet.clone()),
            gateway: Some(node.to_string()),
            auxiliary_addresses: gateway
                .map(|gateway| HashMap::from([("DefaultGatewayIPv4".to_owned(), gateway.to_string())])),
            ..IpamConfig::default()
        };
        let request = NetworkCreateRequest {
            name: spec.bridge.clone(),
            driver: Some("bridge".to_owned()),
            ipam: Some(Ipam { config: Some(vec![config]), ..Ipam::default() }),
            options: Some(options(spec)),
            labels: Some(self.labels()),
            ..NetworkCreateRequest::default()
        };
        match self.client().await?.create_network(request).await {
            Err(error) if status(&error) == Some(409) => Ok(()), // by another call for the same
            // What Docker says names neither of the two.
            Err(error) if error.to_string().contains("Pool overlaps") => {
                Err(HypervisorError::Refused(format!(
                    "network {}: another of Docker's networks on this node has addresses of {subnet} already: end the task \
                 that has it, or take another subnet",
                    spec.name
                )))
            }
            other => other
                .map(drop)
                .map_err(|error| self.failed(&format!("make the network {}", spec.name), error)),
        }
    }

    /// Removes the engine's network on a bridge, if it is the node's; the bridge stays.
    pub async fn remove_network(&self, bridge: &str) -> Result<(), HypervisorError> {
        if !self.network(bridge).await?.is_some_and(|found| self.owns(&found)) {
            return Ok(());
        }
        match self.client().await?.remove_network(bridge).await {
            Err(error) if status(&error) == Some(404) => Ok(()),
            other => other.map_err(|error| self.failed(&format!("remove the network {bridge}"), error)),
        }
    }

    /// The node's networks in the engine, by their bridges.
    pub async fn networks(&self) -> Result<Vec<String>, HypervisorError> {
        let filters = HashMap::from([("label".to_owned(), vec![format!("{LABEL}={}", self.node)])]);
        let found = self.client().await?.list_networks(Some(ListNetworksOptions { filters: Some(filters) }));
        let found = found.await.map_err(|error| self.failed("list networks", error))?;
        Ok(found.into_iter().filter_map(|network| network.name).collect())
    }

    async fn network(&self, bridge: &str) -> Result<Option<NetworkInspect>, HypervisorError> {
        match self.client().await?.inspect_network(bridge, None).await {
            Err(error) if status(&error) == Some(404) => Ok(None),
            other => other.map(Some).map_err(|error| self.failed("inspect a network", error)),
        }
    }

    fn owns(&self, network: &NetworkInspect) -> bool {
        let label = network.labels.as_ref().and_then(|labels| labels.get(LABEL));
        label.is_some_and(|node| node == self.node.as_str())
    }
}

/// What the engine's bridge driver is told of a network.
fn options(spec: &NetworkSpec) -> HashMap<String, String> {
    let mtu = spec.mtu.map(|mtu| (MTU.to_owned(), mtu.to_string()));
    [(BRIDGE.to_owned(), spec.bridge.clone())].into_iter().chain(mtu).collect()
}

fn is_as_wanted(found: &NetworkInspect, spec: &NetworkSpec, subnet: &str, node: IpAddr) -> bool {
    let configs = found.ipam.as_ref().and_then(|ipam| ipam.config.as_deref()).unwrap_or_default();
    let told = found.options.clone().unwrap_or_default();
    [BRIDGE, MTU].into_iter().all(|option| told.get(option) == options(spec).get(option))
        && configs.iter().any(|config| {
            config.subnet.as_deref() == Some(subnet)
                && config.gateway.as_deref() == Some(&*node.to_string())
                && spec.gateway.filter(|gateway| *gateway != node).is_none_or(|gateway| {
                    let others = config.auxiliary_addresses.iter().flat_map(HashMap::values);
                    others.into_iter().any(|address| *address == gateway.to_string())
                })
        })
}
