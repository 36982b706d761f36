//! A hypervisor that pretends: instances are entries of a table. For tests, and for examples that run anywhere.
//!
//! It can fail in the ways that the real ones do: refuse, be away, hang, be slow, carry a request out and lose the
//! answer, lose instances. Whoever holds an `Arc` of it steers it while an agent uses it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use bootcache_nbd::BoxFuture;

use super::{Hypervisor, HypervisorError, Info, InstanceType, Launch, Log, Running};
use crate::name::HostName;

/// A call of a hypervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verb {
    /// [`Hypervisor::launch`].
    Launch,
    /// [`Hypervisor::stop`].
    Stop,
    /// [`Hypervisor::delete`].
    Delete,
    /// [`Hypervisor::info`].
    Info,
    /// [`Hypervisor::list`].
    List,
    /// [`Hypervisor::check`].
    Check,
}

/// What goes wrong with one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It is refused, nothing is done.
    Refuse,
    /// It never ends, nothing is done.
    Hang,
    /// It is carried out, and its answer is lost.
    LoseAnswer,
}

/// Hears of every instance that starts.
type Observer = Box<dyn Fn(&Launch) + Send + Sync>;

/// The hypervisor. Owns its instances, which end with it.
pub struct MemoryHypervisor {
    instance_type: InstanceType,
    observer: Option<Observer>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    instances: BTreeMap<HostName, Instance>,
    away: bool,
    delay: Duration,
    /// For each verb what happens to its next calls; `None` is a call that goes well.
    faults: BTreeMap<Verb, VecDeque<Option<Fault>>>,
    launches: u64,
}

#[derive(Debug)]
struct Instance {
    launch: Launch,
    running: bool,
}

impl MemoryHypervisor {
    /// One without instances.
    pub fn new(instance_type: InstanceType) -> Self {
        Self { instance_type, observer: None, state: Mutex::default() }
    }

    /// Has `observer` hear of every instance that starts, as its guest would: to report that it is up, for example.
    pub fn observed_by(mut self, observer: impl Fn(&Launch) + Send + Sync + 'static) -> Self {
        self.observer = Some(Box::new(observer));
        self
    }

    /// Has the `nth` call of `verb` from now on fail, counted from 1; other faults to come stay.
    pub fn fail(&self, verb: Verb, nth: usize, fault: Fault) {
        let mut state = self.state();
        let next = state.faults.entry(verb).or_default();
        let index = nth.max(1) - 1;
        if next.len() <= index {
            next.resize(index + 1, None);
        }
        next[index] = Some(fault);
    }

    /// Makes every call take so long.
    pub fn slow_down(&self, delay: Duration) {
        self.state().delay = delay;
    }

    /// Makes it unreachable, or reachable again. Its instances stay, as those of a libvirtd that restarts do.
    pub fn set_away(&self, away: bool) {
        self.state().away = away;
    }

    /// Ends an instance from within, as a guest that powers off does; false if there is none that runs.
    pub fn end(&self, name: &HostName) -> bool {
        let mut state = self.state();
        state.instances.get_mut(name).is_some_and(|instance| std::mem::take(&mut instance.running))
    }

    /// Loses all instances at once, as a host that loses power does.
    pub fn lose_everything(&self) {
        self.state().instances.clear();
    }

    /// What is here under this name.
    pub fn launched(&self, name: &HostName) -> Option<Launch> {
        self.state().instances.get(name).map(|instance| instance.launch.clone())
    }

    /// How many instances run.
    pub fn running(&self) -> usize {
        self.state().instances.values().filter(|instance| instance.running).count()
    }

    /// How many times an instance was started: more than there are names means duplicates or restarts.
    pub fn launches(&self) -> u64 {
        self.state().launches
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics with the table")
    }

    /// Makes a call: waits, fails if it is to fail, and does `work`.
    async fn call<T>(&self, verb: Verb, work: impl FnOnce(&mut State) -> T) -> Result<T, HypervisorError> {
        let (delay, fault) = {
            let mut state = self.state();
            let fault = state.faults.get_mut(&verb).and_then(VecDeque::pop_front).flatten();
            (state.delay, fault)
        };
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        match fault {
            Some(Fault::Hang) => std::future::pending::<()>().await,
            Some(Fault::Refuse) => {
                return Err(HypervisorError::Refused(format!("{verb:?} was to be refused")));
            }
            Some(Fault::LoseAnswer) | None => {}
        }
        let mut state = self.state();
        if state.away {
            return Err(HypervisorError::Unreachable("the hypervisor in memory is away".to_owned()));
        }
        let done = work(&mut state);
        if fault == Some(Fault::LoseAnswer) {
            return Err(HypervisorError::TimedOut(format!("the answer to {verb:?} was to be lost")));
        }
        Ok(done)
    }
}

impl std::fmt::Debug for MemoryHypervisor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MemoryHypervisor").field("instance_type", &self.instance_type).finish_non_exhaustive()
    }
}

impl Hypervisor for MemoryHypervisor {
    fn instance_type(&self) -> InstanceType {
        self.instance_type
    }

    fn launch<'a>(&'a self, launch: &'a Launch) -> BoxFuture<'a, Result<(), HypervisorError>> {
        Box::pin(async move {
            // The observer hears of it although the answer is lost: the guest does run.
            let mut started = false;
            let result = self
                .call(Verb::Launch, |state| {
                    let entry = state.instances.entry(launch.name.clone());
                    let instance =
                        entry.or_insert_with(|| Instance { launch: launch.clone(), running: false });
                    started = !std::mem::replace(&mut instance.running, true);
                    state.launches += u64::from(started);
                })
                .await;
            if let Some(observer) = self.observer.as_ref().filter(|_| started) {
                observer(launch);
            }
            result
        })
    }

    fn stop<'a>(
        &'a self,
        name: &'a HostName,
        _patience: Duration,
    ) -> BoxFuture<'a, Result<(), HypervisorError>> {
        Box::pin(self.call(Verb::Stop, |state| {
            if let Some(instance) = state.instances.get_mut(name) {
                instance.running = false;
            }
        }))
    }

    fn delete<'a>(&'a self, name: &'a HostName) -> BoxFuture<'a, Result<(), HypervisorError>> {
        Box::pin(self.call(Verb::Delete, |state| drop(state.instances.remove(name))))
    }

    fn info<'a>(&'a self, name: &'a HostName) -> BoxFuture<'a, Result<Option<Info>, HypervisorError>> {
        Box::pin(self.call(Verb::Info, |state| state.instances.get(name).map(Instance::info)))
    }

    fn log<'a>(&'a self, _name: &'a HostName) -> BoxFuture<'a, Result<Option<Log>, HypervisorError>> {
        Box::pin(async { Ok(None) })
    }

    fn list(&self) -> BoxFuture<'_, Result<Vec<HostName>, HypervisorError>> {
        Box::pin(self.call(Verb::List, |state| state.instances.keys().cloned().collect()))
    }

    fn check(&self) -> BoxFuture<'_, Result<(), HypervisorError>> {
        Box::pin(self.call(Verb::Check, |_| ()))
    }
}

impl Instance {
    /// One that runs keeps one processor and half of its memory busy.
    fn info(&self) -> Info {
        let state = if self.running { Running::Running } else { Running::Stopped };
        let busy = u8::from(self.running);
        Info {
            state,
            cpu: f64::from(busy),
            memory_bytes: (u64::from(busy) * u64::from(self.launch.memory_mib)) << 19,
            network_bytes: [0, 0],
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::PathBuf;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::hypervisor::Root;

    /// What there is to say of an instance of that name that needs nothing.
    pub(crate) fn launch(name: &str) -> Launch {
        Launch {
            name: name.parse().unwrap(),
            root: Root::Image("image".to_owned()),
            cpus: 1,
            memory_mib: 64,
            nics: Vec::new(),
            env: BTreeMap::new(),
            command: Vec::new(),
            privileged: false,
            facts: Vec::new(),
            serial: PathBuf::new(),
            template: None,
        }
    }

    #[tokio::test]
    async fn an_instance_starts_once_ends_and_is_forgotten() {
        let heard = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&heard);
        let hypervisor = MemoryHypervisor::new(InstanceType::Container).observed_by(move |_| {
            counter.fetch_add(1, Ordering::Relaxed);
        });
        let one = launch("one");
        hypervisor.launch(&one).await.unwrap();
        hypervisor.launch(&one).await.unwrap();
        assert_eq!((hypervisor.launches(), heard.load(Ordering::Relaxed)), (1, 1));
        assert_eq!(hypervisor.info(&one.name).await.unwrap().unwrap().state, Running::Running);

        assert!(hypervisor.end(&one.name));
        assert_eq!(hypervisor.info(&one.name).await.unwrap().unwrap().state, Running::Stopped);
        hypervisor.launch(&one).await.unwrap();
        assert_eq!(hypervisor.launches(), 2);

        hypervisor.stop(&one.name, Duration::ZERO).await.unwrap();
        assert_eq!(hypervisor.list().await.unwrap(), std::slice::from_ref(&one.name));
        hypervisor.delete(&one.name).await.unwrap();
        hypervisor.delete(&one.name).await.unwrap();
        assert_eq!(hypervisor.info(&one.name).await.unwrap(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn calls_fail_in_the_ways_and_at_the_times_that_were_asked_for() {
        let hypervisor = MemoryHypervisor::new(InstanceType::Vm);
        let [one, two] = [launch("one"), launch("two")];
        hypervisor.fail(Verb::Launch, 2, Fault::Refuse);
        hypervisor.fail(Verb::Launch, 3, Fault::LoseAnswer);
        hypervisor.fail(Verb::Delete, 1, Fault::Hang);
        hypervisor.launch(&one).await.unwrap();
        assert!(matches!(hypervisor.launch(&two).await, Err(HypervisorError::Refused(_))));
        assert_eq!(hypervisor.running(), 1);
        assert!(matches!(hypervisor.launch(&two).await, Err(HypervisorError::TimedOut(_))));
        assert_eq!(hypervisor.running(), 2);

        let hang = tokio::time::timeout(Duration::from_secs(3600), hypervisor.delete(&one.name)).await;
        assert!(hang.is_err());
        assert!(hypervisor.launched(&one.name).is_some());

        hypervisor.set_away(true);
        assert!(matches!(hypervisor.check().await, Err(HypervisorError::Unreachable(_))));
        hypervisor.set_away(false);
        hypervisor.slow_down(Duration::from_secs(5));
        let began = tokio::time::Instant::now();
        hypervisor.check().await.unwrap();
        assert_eq!(began.elapsed(), Duration::from_secs(5));
    }
}
