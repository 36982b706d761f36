//! One instance, from its order to its end: what it needs is made ready, it is launched, waited for, and watched.
//!
//! Every step can be taken again: after a kill, the instance goes on from the step that was written down last, and what
//! an interrupted step has left is found and used, not made twice.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use regex::bytes::Regex;
use tokio::sync::OnceCell;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use super::journal::Step;
use super::output::Output;
use super::services::ServiceError;
use super::{Shared, facts, parts};
use crate::hypervisor::{DiskBy, Hypervisor, InstanceType, Launch, Root, Running};
use crate::network::NetworkSpec;
use crate::wire::cluster::{InstanceOrder, Needed, UpWhen, shortened};

/// How often a hypervisor is asked how an instance is.
const WATCH: Duration = Duration::from_secs(2);
/// How often it is asked for all instances together that are only watched: a look takes a hypervisor some milliseconds.
const WATCH_ALL: Duration = Duration::from_millis(50);
/// How long what an instance has written is still read after it has ended.
const LAST_LOOK: Duration = Duration::from_secs(2);
/// How long a try to start an instance waits for what an earlier agent left to be ended.
const SWEPT_PATIENCE: Duration = Duration::from_secs(2);
/// A step of a launch that takes longer than this is told of.
const SLOW: Duration = Duration::from_secs(5);
/// Pause between two tries to start an instance.
const START_PAUSE: Duration = Duration::from_secs(2);
/// How often is looked whether somebody looks after the device that is a VM's disk.
const KEEP: Duration = Duration::from_secs(10);

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
        Step::Preparing => job.start().await,
        Step::Launched | Step::Up => Ok(()),
        Step::Stopped | Step::Failed(_) => return,
    };
    let result = match result {
        Ok(()) if step == Step::Up => Ok(()),
        Ok(()) => job.with_device(job.wait_until_up(ordered)).await,
        Err(reason) => Err(reason),
    };
    match result {
        Ok(()) => job.watch().await,
        Err(reason) => job.fail(reason).await,
    }
}

impl Job {
    /// Writes down that the instance has come to `step`, and has the controller told. What runs goes on when that cannot
    /// be written: the next step writes all of it, and after a kill the one before is taken again.
    async fn come_to(&self, step: Step) {
        if let Err(error) = parts::set_step(&self.shared, self.task, &self.order.name, step).await {
            warn!("{}: {error}", self.order.name);
        }
        // Whoever listened may have ended: the agent is ending then.
        let _ = self.shared.changes.send(self.order.name.clone());
    }

    /// Runs `work` to its end, even when the instance is given up meanwhile.
    async fn whole<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Result<T, ServiceError> {
        self.whole.spawn(work).await.map_err(|error| ServiceError::Refused(error.to_string()))
    }

    async fn fail(&self, reason: String) {
        let reason = shortened(reason);
        warn!("{}: {reason}", self.order.name);
        if let Err(error) = parts::remove(&self.shared, &self.order.name, self.order.kind).await {
            warn!("what is left of it stays until its task ends: {error}");
        }
        self.come_to(Step::Failed(reason)).await;
    }

    fn hypervisor(&self) -> Result<&Arc<dyn Hypervisor>, String> {
        parts::hypervisor(&self.shared, self.order.kind).ok_or_else(|| parts::runs_none(self.order.kind))
    }

    /// Starts the instance, again while something that it needs is away, as a daemon that restarts is; no longer than it
    /// may take to come up.
    async fn start(&self) -> Result<(), String> {
        let limit = Duration::from_secs(u64::from(self.order.time_limit_s));
        let began = Instant::now();
        loop {
            match self.try_to_start().await {
                Ok(()) => break,
                Err(ServiceError::Away(reason)) if began.elapsed() < limit => {
                    info!("{}: {reason}; it is tried again", self.order.name);
                    self.shared.parts.set_live(self.task, &self.order.name, None, Some(reason));
                }
                Err(error) => return Err(error.to_string()),
            }
            tokio::time::sleep(START_PAUSE).await;
        }
        self.shared.parts.set_live(self.task, &self.order.name, None, None);
        self.come_to(Step::Launched).await;
        Ok(())
    }

    /// Makes ready what the instance needs, and launches it.
    async fn try_to_start(&self) -> Result<(), ServiceError> {
        let ordered = Instant::now();
        let refused = |reason: &str| ServiceError::Refused(reason.to_owned());
        let hypervisor = self.hypervisor().map_err(ServiceError::Refused)?;
        let swept = tokio::time::timeout(SWEPT_PATIENCE, parts::swept(&self.shared, self.order.kind)).await;
        swept.map_err(|_| ServiceError::Away("its hypervisor is away, or hangs".to_owned()))?;
        let image =
            self.image.as_ref().ok_or_else(|| refused("the order does not say where its image is"))?;
        let data_plane = &self.shared.services.data_plane;
        self.told("its image is asked for", data_plane.fetch(image, false)).await?;
        let fetched = ordered.elapsed();
        let networks = self.networks_ready.get_or_try_init(|| self.make_networks());
        self.told("its networks are made", networks).await?;
        let opening = Instant::now();
        let (root, serial) = match self.order.kind {
            InstanceType::Vm => {
                let (owner, image, name) =
                    (Arc::clone(data_plane), image.name.clone(), self.order.name.clone());
                let (size, by) = (self.order.disk_bytes, self.order.disk_by);
                let open = self.whole(async move { owner.open_disk(&image, &name, size, by).await });
                let open = self.told("its disk is opened", open).await??;
                (Root::Disk(open.disk), open.serial)
            }
            InstanceType::Container => {
                (Root::Image(self.container_image(image).await?), std::path::PathBuf::new())
            }
        };
        // Bridges that had to be made are not waited for bytes.
        let (image_ms, all_ms) = (fetched.as_millis(), (fetched + opening.elapsed()).as_millis());
        info!(
            "{}: has its image after {image_ms} ms and what it starts from after {all_ms} ms",
            self.order.name
        );
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
        let starts = &self.shared.starts[&self.order.kind];
        let place = starts.acquire().await.map_err(|_| refused("the agent ends"))?;
        let runner = Arc::clone(hypervisor);
        let launched = self.whole(async move { runner.launch(&launch).await });
        self.told("its hypervisor is asked to start it", launched).await??;
        drop(place);
        Ok(())
    }

    /// Does `work`, a step of the launch; has it told what the instance waits for when that takes long.
    async fn told<T>(&self, step: &str, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        if let Ok(done) = tokio::time::timeout(SLOW, work.as_mut()).await {
            return done;
        }
        warn!("{}: {step}, for {SLOW:?} already", self.order.name);
        self.shared.parts.set_note(self.task, &self.order.name, step);
        work.await
    }

    async fn make_networks(&self) -> Result<(), ServiceError> {
        for network in &self.networks {
            let Some(networks) = &self.shared.services.networks else {
                return Err(ServiceError::Refused("this node's agent makes no networks".to_owned()));
            };
            let _alone = self.shared.parts.networks().await;
            networks.ensure(network).await?;
        }
        Ok(())
    }

    async fn container_image(&self, image: &Needed) -> Result<String, ServiceError> {
        match &self.shared.services.container_images {
            None => Ok(image.name.to_string()),
            Some(images) => {
                let data_plane = &self.shared.services.data_plane;
                images.ensure(image, Box::new(move || data_plane.read(image))).await
            }
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
        self.come_to(Step::Up).await;
        Ok(())
    }

    /// Waits until the instance has written what matches `pattern`.
    async fn wait_until_written(&self, pattern: &Regex, limit: Duration) -> Result<(), String> {
        let (hypervisor, name) = (self.hypervisor()?.as_ref(), &self.order.name);
        let serial = self.shared.services.data_plane.serial(name);
        let mut output = Output::default();
        tokio::select! {
            () = output.follow(hypervisor, name, &serial, pattern) => Ok(()),
            () = self.ended(|_| WATCH) => {
                // A short command has written its last words and ended before they were looked at.
                let rest = tokio::time::timeout(LAST_LOOK, output.follow(hypervisor, name, &serial, pattern)).await;
                rest.map_err(|_| format!("it ended before it was up: {}", output.last_line()))
            }
            () = tokio::time::sleep(limit) => {
                Err(format!("it was not up after {} s: {}", limit.as_secs(), output.last_line()))
            }
        }
    }

    /// Watches the instance until it has ended. Its disk stays, but is no device of the host any longer.
    async fn watch(&self) {
        self.with_device(self.ended(watch_pause)).await;
        let fault = match self.hypervisor() {
            Ok(hypervisor) => hypervisor.fault(&self.order.name).await,
            Err(_) => None,
        };
        info!("{}: {}", self.order.name, fault.as_deref().unwrap_or("has ended"));
        if self.has_device()
            && let Err(error) = self.shared.services.data_plane.detach(&self.order.name).await
        {
            warn!("{}: its device stays until its task ends: {error}", self.order.name);
        }
        self.come_to(fault.map_or(Step::Stopped, Step::Failed)).await;
    }

    /// Whether its disk is a device of the host.
    fn has_device(&self) -> bool {
        self.order.kind == InstanceType::Vm && self.order.disk_by == DiskBy::Kernel
    }

    /// Does `work`, and meanwhile has the device that is the instance's disk looked after, if it is one.
    async fn with_device<T>(&self, work: impl Future<Output = T>) -> T {
        if !self.has_device() {
            return work.await;
        }
        tokio::select! {
            done = work => done,
            never = self.keep_device() => match never {},
        }
    }

    /// Has the device looked after, again whenever whoever did so has gone.
    async fn keep_device(&self) -> Infallible {
        let mut told = None;
        loop {
            let kept = self.shared.services.data_plane.keep_device(&self.order.name).await;
            let reason = kept.err().map(|error| error.to_string());
            // Once for each reason: it may be so for long.
            if let Some(reason) = reason.as_ref().filter(|_| reason != told) {
                warn!("{}: nobody looks after its device: {reason}", self.order.name);
            }
            told = reason;
            tokio::time::sleep(KEEP).await;
        }
    }

    /// Returns when the instance has ended; notes what its hypervisor says of it until then. It is asked again after
    /// `pause`, for as many instances as the node has.
    async fn ended(&self, pause: fn(usize) -> Duration) {
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
                    let note = (info.state == Running::Paused).then(|| paused(&self.order));
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
            tokio::time::sleep(pause(self.shared.parts.running())).await;
        }
    }
}

/// How long to leave an instance alone that is only watched, on a node where so many run.
fn watch_pause(running: usize) -> Duration {
    WATCH.max(WATCH_ALL * u32::try_from(running).unwrap_or(u32::MAX))
}

/// What is said of an instance that is paused.
fn paused(order: &InstanceOrder) -> String {
    match order.kind {
        InstanceType::Vm => {
            format!("it is paused, by hand or since its disk or KVM failed: `virsh resume {}`", order.name)
        }
        InstanceType::Container => format!("it is paused: `docker unpause {}`", order.name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_instances_are_looked_at_no_more_often_together_than_some() {
        assert_eq!([0, 1, 40].map(watch_pause), [WATCH; 3]);
        assert_eq!(watch_pause(1024).as_secs(), 51);
    }
}
