//! Containers by Docker, over the socket of its API (1.41, which dockerd 20.10 speaks, or newer).
//!
//! A container has the instance's name and the label `bootcache.node=NODE`: one without the label is somebody else's
//! and is never touched. Its first interface is made with it, the others before it starts. Images come by `images`
//! and `saved` ([`Docker::load`]) and never from a registry; networks of the engine on the node's bridges by `networks`.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bollard::ClientVersion;
use bollard::errors::Error;
use bollard::models::{
    ContainerCreateBody, ContainerInspectResponse, ContainerState, EndpointIpamConfig, EndpointSettings,
    HostConfig, HostConfigLogConfig, NetworkConnectRequest, NetworkingConfig,
};
use bollard::query_parameters::{
    CreateContainerOptions, ListContainersOptions, LogsOptions, RemoveContainerOptions, StatsOptions,
    StopContainerOptions,
};
use bootcache_nbd::BoxFuture;
use futures_util::StreamExt;
use tokio::sync::OnceCell;

use super::cpu::CpuUse;
use super::{Hypervisor, HypervisorError, Info, InstanceType, Launch, Log, Nic, Root, Running};
use crate::name::HostName;

mod images;
mod networks;
mod saved;

pub use images::LoadError;

/// The socket of a Docker that was installed by its package.
pub const DEFAULT_SOCKET: &str = "unix:///var/run/docker.sock";
/// Longest wait for a call. Starting one of fifty containers at once has taken 12 s on two cores.
const DEADLINE: Duration = Duration::from_secs(120);
/// How long a container's last words are waited for, and how many bytes of them are read.
const LAST_WORDS: Duration = Duration::from_secs(5);
const LAST_WORDS_MAX: usize = 64 << 10;
/// How often a name that is taken is looked at.
const TICK: Duration = Duration::from_millis(100);
/// The label of what belongs to a node.
const LABEL: &str = "bootcache.node";
/// The first version of the API in which each interface has an address of its own; before, the container has one.
const MAC_OF_CARD: ClientVersion = ClientVersion { major_version: 1, minor_version: 44 };

/// A Docker engine, and the containers, images and networks in it that belong to one node. Clones are the same one.
#[derive(Debug, Clone)]
pub struct Docker {
    address: String,
    node: HostName,
    client: OnceCell<bollard::Docker>,
    cpu: Arc<CpuUse>,
    /// Held for writing while an archive's own names are in the engine, and for reading by who goes by names: see `saved`.
    naming: Arc<tokio::sync::RwLock<()>>,
}

impl Docker {
    /// The engine at `address`, such as [`DEFAULT_SOCKET`], for the node of that name. Nothing is connected yet.
    pub fn new(address: impl Into<String>, node: HostName) -> Self {
        let (cpu, naming) = (Arc::default(), Arc::default());
        Self { address: address.into(), node, client: OnceCell::new(), cpu, naming }
    }

    /// A client of the API; survives restarts of the engine, since each call is a connection of its own.
    async fn client(&self) -> Result<&bollard::Docker, HypervisorError> {
        let connect = || async {
            let client = bollard::Docker::connect_with_unix(
                &self.address,
                DEADLINE.as_secs(),
                bollard::API_DEFAULT_VERSION,
            )?;
            client.negotiate_version().await
        };
        let client = self.client.get_or_try_init(connect);
        client.await.map_err(|error| self.failed("talk to it", error))
    }

    /// What a failed call comes to.
    fn failed(&self, action: &str, error: Error) -> HypervisorError {
        failed(&self.address, action, error)
    }

    /// The container of that name, whosoever it is.
    async fn find(&self, name: &HostName) -> Result<Option<ContainerInspectResponse>, HypervisorError> {
        match self.client().await?.inspect_container(name.as_str(), None).await {
            Err(error) if status(&error) == Some(404) => Ok(None),
            other => other.map(Some).map_err(|error| self.failed("inspect a container", error)),
        }
    }

    fn is_ours(&self, container: &ContainerInspectResponse) -> bool {
        let labels = container.config.as_ref().and_then(|config| config.labels.as_ref());
        labels.and_then(|labels| labels.get(LABEL)).is_some_and(|node| node == self.node.as_str())
    }

    /// The container of that name, if it is the node's.
    async fn inspect(&self, name: &HostName) -> Result<Option<ContainerInspectResponse>, HypervisorError> {
        Ok(self.find(name).await?.filter(|found| self.is_ours(found)))
    }

    /// Makes the container and connects its interfaces.
    async fn create(&self, launch: &Launch) -> Result<(), HypervisorError> {
        let client = self.client().await?;
        let body = self.body(launch)?;
        let creator = match launch.nics.first() {
            Some(nic) if client.client_version() < MAC_OF_CARD => with_mac(client.clone(), &body, &nic.mac)?,
            _ => client.clone(),
        };
        let options = CreateContainerOptions {
            name: Some(launch.name.to_string()),
            ..CreateContainerOptions::default()
        };
        let deadline = Instant::now() + DEADLINE;
        loop {
            let names = self.names().await?;
            let created = creator.create_container(Some(options.clone()), body.clone()).await;
            drop(names);
            match created {
                Ok(_) => break,
                Err(error)
                    if status(&error) == Some(409)
                        && Instant::now() < deadline
                        && self.clear(&launch.name).await? =>
                {
                    tokio::time::sleep(TICK).await;
                }
                Err(error) => return Err(self.failed(&format!("make the container {}", launch.name), error)),
            }
        }
        for nic in launch.nics.iter().skip(1) {
            let request = NetworkConnectRequest {
                container: launch.name.to_string(),
                endpoint_config: Some(endpoint(nic)),
            };
            let connected = client.connect_network(&nic.bridge, request).await;
            connected.map_err(|error| {
                self.failed(&format!("connect {} to the network {}", launch.name, nic.network), error)
            })?;
        }
        Ok(())
    }

    /// Sees to it that a name that is taken becomes free: false if somebody else's container has it. What an agent that was
    /// killed has asked for is made all the same, and has its name before there is anything to be seen of it.
    async fn clear(&self, name: &HostName) -> Result<bool, HypervisorError> {
        match self.find(name).await? {
            None => Ok(true),
            Some(found) if self.is_ours(&found) => self.remove(name).await.map(|()| true),
            Some(_) => Ok(false),
        }
    }

    fn body(&self, launch: &Launch) -> Result<ContainerCreateBody, HypervisorError> {
        let Root::Image(image) = &launch.root else {
            return Err(HypervisorError::Refused(format!(
                "{}: a container starts from an image, not from a disk",
                launch.name
            )));
        };
        let facts = launch.facts.iter().map(|(key, value)| (environment_name(key), value));
        let env = facts.chain(launch.env.iter().map(|(key, value)| (key.clone(), value)));
        let first = launch.nics.first();
        let memory = i64::from(launch.memory_mib) << 20;
        let logs = HashMap::from([("max-size", "10m"), ("max-file", "1")]);
        let host = HostConfig {
            memory: Some(memory),
            memory_swap: Some(memory), // both together: no swap beside it
            nano_cpus: Some(i64::from(launch.cpus) * 1_000_000_000),
            init: Some(true), // a command that ignores SIGTERM as process 1 ends at once all the same
            privileged: Some(launch.privileged),
            network_mode: Some(first.map_or_else(|| "none".to_owned(), |nic| nic.bridge.clone())),
            log_config: Some(HostConfigLogConfig {
                typ: Some("json-file".to_owned()),
                config: Some(
                    logs.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
                ),
            }),
            ..HostConfig::default()
        };
        let endpoints = first.map(|nic| HashMap::from([(nic.bridge.clone(), endpoint(nic))]));
        Ok(ContainerCreateBody {
            image: Some(image.clone()),
            hostname: Some(launch.name.to_string()),
            env: Some(env.map(|(key, value)| format!("{key}={value}")).collect()),
            cmd: (!launch.command.is_empty()).then(|| launch.command.clone()),
            labels: Some(self.labels()),
            host_config: Some(host),
            networking_config: endpoints
                .map(|endpoints| NetworkingConfig { endpoints_config: Some(endpoints) }),
            ..ContainerCreateBody::default()
        })
    }

    fn labels(&self) -> HashMap<String, String> {
        HashMap::from([(LABEL.to_owned(), self.node.to_string())])
    }

    async fn start(&self, name: &HostName) -> Result<(), HypervisorError> {
        match self.client().await?.start_container(name.as_str(), None).await {
            Err(error) if status(&error) == Some(304) => Ok(()),
            other => other.map_err(|error| self.failed(&format!("start the container {name}"), error)),
        }
    }

    async fn launch(&self, launch: &Launch) -> Result<(), HypervisorError> {
        if let Some(found) = self.inspect(&launch.name).await? {
            let state = found.state.unwrap_or_default();
            if state.running == Some(true) {
                return Ok(());
            }
            if has_started(&state) {
                return self.start(&launch.name).await;
            }
            // An earlier launch was interrupted, maybe before all interfaces were connected.
            self.remove(&launch.name).await?;
        }
        let result = match self.create(launch).await {
            Ok(()) => self.start(&launch.name).await,
            Err(error) => Err(error),
        };
        if let Err(HypervisorError::Refused(_)) = &result
            && self.inspect(&launch.name).await?.is_some()
        {
            self.remove(&launch.name).await?; // one that never ran is of no use to anybody
        }
        result
    }

    async fn remove(&self, name: &HostName) -> Result<(), HypervisorError> {
        let options = RemoveContainerOptions { force: true, v: true, ..RemoveContainerOptions::default() };
        let deadline = Instant::now() + DEADLINE;
        loop {
            match self.client().await?.remove_container(name.as_str(), Some(options.clone())).await {
                Err(error) if status(&error) == Some(404) => return Ok(()),
                // "removal is already in progress": its end is waited for, since the name is taken until then.
                Err(error) if status(&error) == Some(409) && Instant::now() < deadline => {
                    tokio::time::sleep(TICK).await;
                }
                other => {
                    return other
                        .map_err(|error| self.failed(&format!("remove the container {name}"), error));
                }
            }
        }
    }

    async fn info(&self, name: &HostName) -> Result<Option<Info>, HypervisorError> {
        let Some(found) = self.inspect(name).await? else { return Ok(None) };
        let state = found.state.unwrap_or_default();
        let mut info = Info { state: Running::Stopped, cpu: 0.0, memory_bytes: 0, network_bytes: [0; 2] };
        if state.running != Some(true) {
            return Ok(Some(info));
        }
        info.state = if state.paused == Some(true) { Running::Paused } else { Running::Running };
        // One look takes 6 ms; without `one_shot` Docker takes two of them, a second apart.
        let options = StatsOptions { stream: false, one_shot: true };
        let stats = match self.client().await?.stats(name.as_str(), Some(options)).next().await {
            Some(Ok(stats)) => stats,
            Some(Err(error)) if status(&error) == Some(404) => return Ok(None),
            Some(Err(error)) => return Err(self.failed("tell what a container uses", error)),
            None => return Ok(Some(info)),
        };
        let used = stats.cpu_stats.and_then(|cpu| cpu.cpu_usage?.total_usage).unwrap_or(0);
        info.cpu = self.cpu.since_last(name, Instant::now(), used);
        if let Some(memory) = stats.memory_stats {
            // What `docker stats` shows: without the page cache that nobody uses now.
            let idle = |key: &str| memory.stats.as_ref().and_then(|stats| stats.get(key).copied());
            let idle = idle("total_inactive_file").or_else(|| idle("inactive_file")).unwrap_or(0);
            info.memory_bytes = memory.usage.unwrap_or(0).saturating_sub(idle);
        }
        for interface in stats.networks.unwrap_or_default().into_values() {
            info.network_bytes[0] += interface.rx_bytes.unwrap_or(0);
            info.network_bytes[1] += interface.tx_bytes.unwrap_or(0);
        }
        Ok(Some(info))
    }

    /// The exit code of a container that has ended, if it is none of success, and its last words.
    async fn fault(&self, name: &HostName) -> Option<String> {
        let state = self.inspect(name).await.ok()??.state?;
        if state.running == Some(true) {
            return None;
        }
        let code = state.exit_code.filter(|code| *code != 0)?;
        if state.oom_killed == Some(true) {
            return Some("it was ended for want of memory: give it more with `memory`".to_owned());
        }
        let said = match state.error.filter(|error| !error.is_empty()) {
            Some(error) => error,
            None => self.last_words(name).await,
        };
        let said: String = said.trim().chars().filter(|letter| !letter.is_control()).take(200).collect();
        Some(format!("it ended with exit code {code}: {said}").trim_end_matches([':', ' ']).to_owned())
    }

    /// The last line that a container has written.
    async fn last_words(&self, name: &HostName) -> String {
        let tail = "1".to_owned();
        let options = LogsOptions { stdout: true, stderr: true, tail, ..LogsOptions::default() };
        let Ok(client) = self.client().await else { return String::new() };
        let mut pieces = client.logs(name.as_str(), Some(options));
        let mut said = Vec::new();
        while let Ok(Some(Ok(piece))) = tokio::time::timeout(LAST_WORDS, pieces.next()).await
            && said.len() < LAST_WORDS_MAX
        {
            said.extend_from_slice(&piece.into_bytes());
        }
        String::from_utf8_lossy(&said).into_owned()
    }

    async fn list(&self) -> Result<Vec<HostName>, HypervisorError> {
        let filters = HashMap::from([("label".to_owned(), vec![format!("{LABEL}={}", self.node)])]);
        let options =
            ListContainersOptions { all: true, filters: Some(filters), ..ListContainersOptions::default() };
        let found = self.client().await?.list_containers(Some(options)).await;
        let found = found.map_err(|error| self.failed("list containers", error))?;
        let names = found.into_iter().filter_map(|container| {
            container.names?.iter().find_map(|name| name.trim_start_matches('/').parse().ok())
        });
        Ok(names.collect())
    }
}

impl Hypervisor for Docker {
    fn instance_type(&self) -> InstanceType {
        InstanceType::Container
    }

    fn launch<'a>(&'a self, instance: &'a Launch) -> BoxFuture<'a, Result<(), HypervisorError>> {
        Box::pin(self.launch(instance))
    }

    fn stop<'a>(
        &'a self,
        name: &'a HostName,
        patience: Duration,
    ) -> BoxFuture<'a, Result<(), HypervisorError>> {
        Box::pin(async move {
            if self.inspect(name).await?.is_none() {
                return Ok(());
            }
            // Less than the client's own deadline, which would give up before Docker ends the container.
            let patience = patience.min(DEADLINE / 2);
            let seconds = i32::try_from(patience.as_millis().div_ceil(1000)).unwrap_or(i32::MAX);
            let options = StopContainerOptions { t: Some(seconds), ..StopContainerOptions::default() };
            match self.client().await?.stop_container(name.as_str(), Some(options)).await {
                Err(error) if matches!(status(&error), Some(304 | 404)) => Ok(()),
                other => other.map_err(|error| self.failed(&format!("stop the container {name}"), error)),
            }
        })
    }

    fn delete<'a>(&'a self, name: &'a HostName) -> BoxFuture<'a, Result<(), HypervisorError>> {
        Box::pin(async move {
            self.cpu.forget(name);
            match self.inspect(name).await? {
                Some(_) => self.remove(name).await,
                None => Ok(()),
            }
        })
    }

    fn info<'a>(&'a self, name: &'a HostName) -> BoxFuture<'a, Result<Option<Info>, HypervisorError>> {
        Box::pin(self.info(name))
    }

    fn log<'a>(&'a self, name: &'a HostName) -> BoxFuture<'a, Result<Option<Log>, HypervisorError>> {
        Box::pin(async move {
            let options = LogsOptions { follow: true, stdout: true, stderr: true, ..LogsOptions::default() };
            let address = self.address.clone();
            let pieces = self.client().await?.logs(name.as_str(), Some(options));
            let pieces = pieces.map(move |piece| match piece {
                Ok(piece) => Ok(piece.into_bytes()),
                Err(error) => Err(failed(&address, "read the log of a container", error)),
            });
            Ok(Some(pieces.boxed()))
        })
    }

    fn fault<'a>(&'a self, name: &'a HostName) -> BoxFuture<'a, Option<String>> {
        Box::pin(self.fault(name))
    }

    fn list(&self) -> BoxFuture<'_, Result<Vec<HostName>, HypervisorError>> {
        Box::pin(self.list())
    }

    fn check(&self) -> BoxFuture<'_, Result<(), HypervisorError>> {
        Box::pin(async move {
            let answer = self.client().await?.ping().await;
            answer.map(drop).map_err(|error| self.failed("answer", error))
        })
    }
}

/// What a failed call of the engine at `address` comes to.
fn failed(address: &str, action: &str, error: Error) -> HypervisorError {
    match error {
        Error::DockerResponseServerError { message, .. } | Error::DockerStreamError { error: message } => {
            HypervisorError::Refused(format!("Docker: cannot {action}: {}", message.trim_end()))
        }
        Error::RequestTimeoutError => HypervisorError::TimedOut(format!(
            "Docker at {address} did not {action} within {DEADLINE:?}: see whether dockerd hangs"
        )),
        error => HypervisorError::Unreachable(format!(
            "Docker at {address} cannot be reached ({}): start dockerd",
            innermost(&error)
        )),
    }
}

/// A client that says the container's hardware address the way that API 1.43 and older want it: in a field of the
/// container, which bollard no longer knows.
fn with_mac(
    client: bollard::Docker,
    body: &ContainerCreateBody,
    mac: &str,
) -> Result<bollard::Docker, HypervisorError> {
    let written = serde_json::to_value(body).and_then(|mut body| {
        body["MacAddress"] = mac.into();
        serde_json::to_vec(&body)
    });
    let bytes: bytes::Bytes = written.map_err(|error| HypervisorError::Refused(error.to_string()))?.into();
    Ok(client.with_request_modifier(move |mut request| {
        *request.body_mut() = bollard::body_full(bytes.clone());
        request
    }))
}

/// An interface as Docker wants it.
fn endpoint(nic: &Nic) -> EndpointSettings {
    let address = nic.address.map(|(address, _)| address.to_string());
    EndpointSettings {
        ipam_config: address.map(|address| EndpointIpamConfig {
            ipv4_address: Some(address),
            ..EndpointIpamConfig::default()
        }),
        mac_address: Some(nic.mac.clone()),
        ..EndpointSettings::default()
    }
}

/// The name of a fact in a container's environment.
fn environment_name(fact: &str) -> String {
    let name = fact.bytes().map(|byte| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => char::from(byte.to_ascii_uppercase()),
        _ => '_',
    });
    format!("BOOTCACHE_{}", name.collect::<String>())
}

/// Whether a container ran at any time.
fn has_started(state: &ContainerState) -> bool {
    state.started_at.as_deref().is_some_and(|at| !at.is_empty() && !at.starts_with("0001-"))
}

/// The status of the engine's answer, if it gave one.
fn status(error: &Error) -> Option<u16> {
    match error {
        Error::DockerResponseServerError { status_code, .. } => Some(*status_code),
        _ => None,
    }
}

/// The cause that says most: of a chain of wrappers, the last.
fn innermost(error: &Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_are_named_as_variables_of_an_environment_are() {
        assert_eq!(environment_name("address"), "BOOTCACHE_ADDRESS");
        assert_eq!(environment_name("a-b=c"), "BOOTCACHE_A_B_C");
    }

    #[tokio::test]
    async fn an_engine_that_is_not_there_is_named() {
        let docker = Docker::new("unix:///nowhere/docker.sock", "node".parse().unwrap());
        let error = Hypervisor::check(&docker).await.unwrap_err();
        assert!(matches!(error, HypervisorError::Unreachable(_)));
        let error = error.to_string();
        assert!(error.contains("/nowhere/docker.sock") && error.contains("start dockerd"), "{error}");
    }
}
