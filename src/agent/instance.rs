//! One instance, from its order to its end: what it needs is made ready, it is launched, waited for, and watched.
//!
//! Every step can be taken again: after a kill, the instance goes on from the step that was written down last, and what
//! an interrupted step has left is found and used, not made twice.

use std::sync::Arc;
use std::time::{Duration, Instant};

use regex::bytes::Regex;
use tokio::sync::OnceCell;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use super::journal::Step;
use super::output::Output;
use super::{Shared, facts, parts};
use crate::hypervisor::{Hypervisor, HypervisorError, InstanceType, Launch, Root, Running};
use crate::network::NetworkSpec;
use crate::wire::cluster::{InstanceOrder, Needed, UpWhen, shortened};

/// How often a hypervisor is asked how an instance is.
const WATCH: Duration = Duration::from_secs(2);
/// How long what an instance has written is still read after it has ended.
const LAST_LOOK: Duration = Duration::from_secs(2);
/// How often a launch is tried that a hypervisor could not be reached for, and how long apart.
const LAUNCHES: u32 = 10;
const LAUNCH_PAUSE: Duration = Duration::from_secs(2);

/// Something that all instances of a part need, made by the first that comes.
pub(super) type Once = Arc<OnceCell<()>>;

/// An instance to be run.
pub(super) struct Job {
    pub(super) shared: Arc<Shared>,
    pub(super) task: i64,
    pub(super) order: InstanceOrder,
    pub(super) image: Option<Needed>,
    pub(super) networks: Vec<NetworkSpec>,
    pub(super) networks_ready: Once,
    pub(super) report: Option<std::net::SocketAddr>,
    /// What must not be dropped half-way runs here: the end of the part waits for it.
    pub(super) whole: TaskTracker,
}

/// Carries an instance on from `step`, and watches it until it has ended. Dropping the future is safe at any point.
pub(super) async fn run(job: Job, step: Step) {
    let ordered = Instant::now();
    let result = match step {
        Step::Preparing => {
            parts::swept(&job.shared, job.order.kind).await;
            job.start().await
        }
        Step::Launched | Step::Up => Ok(()),
        Step::Stopped | Step::Failed(_) => return,
    };
    let result = match result {
        Ok(()) if step == Step::Up => Ok(()),
        Ok(()) => job.wait_until_up(ordered).await,
        Err(reason) => Err(reason),
    };
    match result {
        Ok(()) => job.watch().await,
        Err(reason) => job.fail(reason).await,
    }
}

impl Job {
    /// Writes down that the instance has come to `step`, and has the controller told.
    async fn come_to(&self, step: Step) -> Result<(), String> {
        let result = parts::set_step(&self.shared, self.task, &self.order.name, step).await;
        // Whoever listened may have ended: the agent is ending then.
        let _ = self.shared.changes.send(self.order.name.clone());
        result.map_err(|error| error.to_string())
    }

    /// Runs `work` to its end, even when the instance is given up meanwhile.
    async fn whole<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Result<T, String> {
        self.whole.spawn(work).await.map_err(|error| error.to_string())
    }

    async fn fail(&self, reason: String) {
        let reason = shortened(reason);
        warn!("{}: {reason}", self.order.name);
        if let Err(error) = parts::remove(&self.shared, &self.order.name, self.order.kind).await {
            warn!("what is left of it stays until its task ends: {error}");
        }
        if let Err(error) = self.come_to(Step::Failed(reason)).await {
            warn!("{}: {error}", self.order.name);
        }
    }

    fn hypervisor(&self) -> Result<&Arc<dyn Hypervisor>, String> {
        parts::hypervisor(&self.shared, self.order.kind).ok_or_else(|| parts::runs_none(self.order.kind))
    }

    /// Makes ready what the instance needs, and launches it.
    async fn start(&self) -> Result<(), String> {
        let ordered = Instant::now();
        let hypervisor = self.hypervisor()?;
        let image = self.image.as_ref().ok_or("the order does not say where its image is")?;
        let data_plane = &self.shared.services.data_plane;
        data_plane.fetch(image, false).await?;
        let fetched = ordered.elapsed();
        self.networks_ready.get_or_try_init(|| self.make_networks()).await?;
        let opening = Instant::now();
        let (root, serial) = match self.order.kind {
            InstanceType::Vm => {
                let (owner, image, name) =
                    (Arc::clone(data_plane), image.name.clone(), self.order.name.clone());
                let size = self.order.disk_bytes;
                let open = self.whole(async move { owner.open_disk(&image, &name, size).await }).await??;
                (Root::Disk(open.disk), open.serial)
            }
            InstanceType::Container => {
                (Root::Image(self.container_image(image).await?), std::path::PathBuf::new())
            }
        };
        // Bridges that had to be made are not waited for bytes.
        let ms = (fetched + opening.elapsed()).as_millis();
        info!("{}: has what it starts from after {ms} ms", self.order.name);
        let launch = Launch {
            name: self.order.name.clone(),
            root,
            cpus: self.order.cpus,
            memory_mib: self.order.memory_mib,
            nics: self.order.nics.clone(),
            env: self.order.env.clone(),
            command: self.order.command.clone(),
            privileged: self.order.privileged,
            facts: facts::of_instance(&self.order, self.report),
            serial,
            template: self.order.template.clone(),
        };
        let place = self.shared.starts.acquire().await.map_err(|error| error.to_string())?;
        self.launch(hypervisor, launch).await?;
        drop(place);
        self.come_to(Step::Launched).await
    }

    async fn make_networks(&self) -> Result<(), String> {
        for network in &self.networks {
            let Some(networks) = &self.shared.services.networks else {
                return Err("this node's agent makes no networks".to_owned());
            };
            networks.ensure(network).await?;
        }
        Ok(())
    }

    async fn container_image(&self, image: &Needed) -> Result<String, String> {
        match &self.shared.services.container_images {
            None => Ok(image.name.to_string()),
            Some(images) => {
                let data_plane = &self.shared.services.data_plane;
                images.ensure(image, Box::new(move || data_plane.read(image))).await
            }
        }
    }

    /// Launches, again while the hypervisor cannot be reached: its daemon may be restarting.
    async fn launch(&self, hypervisor: &Arc<dyn Hypervisor>, launch: Launch) -> Result<(), String> {
        let mut left = LAUNCHES;
        loop {
            let (runner, instance) = (Arc::clone(hypervisor), launch.clone());
            match self.whole(async move { runner.launch(&instance).await }).await? {
                Ok(()) => return Ok(()),
                Err(HypervisorError::Refused(reason)) => return Err(reason),
                Err(error) if left == 0 => return Err(error.to_string()),
                Err(error) => info!("{}: {error}; it is tried again", launch.name),
            }
            left -= 1;
            tokio::time::sleep(LAUNCH_PAUSE).await;
        }
    }

    /// Waits until the instance is up, as its order says. One that is to report to the controller is waited for there.
    async fn wait_until_up(&self, ordered: Instant) -> Result<(), String> {
        let limit = Duration::from_secs(u64::from(self.order.time_limit_s));
        match &self.order.up_when {
            UpWhen::Report => return Ok(()),
            UpWhen::Started => {}
            UpWhen::Serial(pattern) => {
                let pattern =
                    Regex::new(pattern).map_err(|_| "until is not a regular expression".to_owned())?;
                self.wait_until_written(&pattern, limit).await?;
            }
        }
        let up_ms = u64::try_from(ordered.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.shared.parts.set_up(self.task, &self.order.name, up_ms);
        self.come_to(Step::Up).await
    }

    /// Waits until the instance has written what matches `pattern`.
    async fn wait_until_written(&self, pattern: &Regex, limit: Duration) -> Result<(), String> {
        let (hypervisor, name) = (self.hypervisor()?.as_ref(), &self.order.name);
        let serial = self.shared.services.data_plane.serial(name);
        let mut output = Output::default();
        tokio::select! {
            () = output.follow(hypervisor, name, &serial, pattern) => Ok(()),
            () = self.ended() => {
                // A short command has written its last words and ended before they were looked at.
                let rest = tokio::time::timeout(LAST_LOOK, output.follow(hypervisor, name, &serial, pattern)).await;
                rest.map_err(|_| format!("it ended before it was up: {}", output.last_line()))
            }
            () = tokio::time::sleep(limit) => {
                Err(format!("it was not up after {} s: {}", limit.as_secs(), output.last_line()))
            }
        }
    }

    /// Watches the instance until it has ended.
    async fn watch(&self) {
        self.ended().await;
        info!("{}: has ended", self.order.name);
        if let Err(error) = self.come_to(Step::Stopped).await {
            warn!("{}: {error}", self.order.name);
        }
    }

    /// Returns when the instance has ended; notes what its hypervisor says of it until then.
    async fn ended(&self) {
        let hypervisor = match self.hypervisor() {
            Ok(hypervisor) => hypervisor,
            // The agent was started without it: what runs is neither ended nor known.
            Err(reason) => {
                self.shared.parts.set_live(self.task, &self.order.name, None, Some(reason));
                return std::future::pending().await;
            }
        };
        loop {
            match hypervisor.info(&self.order.name).await {
                Ok(Some(info)) if info.state != Running::Stopped => {
                    let paused = info.state == Running::Paused;
                    let note = paused.then(|| "it is paused: its disk failed".to_owned());
                    self.shared.parts.set_live(self.task, &self.order.name, Some(info), note);
                }
                Ok(_) => {
                    self.shared.parts.set_live(self.task, &self.order.name, None, None);
                    return;
                }
                // The daemon may be restarting: what runs goes on.
                Err(error) => {
                    let note = Some(format!("its hypervisor does not answer: {error}"));
                    self.shared.parts.set_live(self.task, &self.order.name, None, note);
                }
            }
            tokio::time::sleep(WATCH).await;
        }
    }
}
