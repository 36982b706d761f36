//! How instances and tasks go from state to state. Pure; the diagrams are in [`super`].

use std::collections::BTreeMap;

use crate::wire::cluster::{InstanceStatus, TaskStatus};

/// The state of an instance that was `old`, now that its node says `said`. `was_up` is whether it was ever up: a guest
/// reports that to the controller, so that its node may still think that it boots.
pub(crate) const fn advance(old: InstanceStatus, said: InstanceStatus, was_up: bool) -> InstanceStatus {
    match (old, said) {
        // An answer that was under way when the guest reported may even say that it is still being prepared.
        (
            InstanceStatus::Preparing
            | InstanceStatus::Booting
            | InstanceStatus::Running
            | InstanceStatus::Lost,
            InstanceStatus::Preparing | InstanceStatus::Booting,
        ) if was_up => InstanceStatus::Running,
        // It has not reported in time, which its node does not watch.
        (InstanceStatus::Failed, InstanceStatus::Booting) => InstanceStatus::Failed,
        _ => said,
    }
}

/// The state of a task that was `old` and has so many instances in each state.
pub(crate) fn task_status(old: TaskStatus, instances: &BTreeMap<InstanceStatus, u64>) -> TaskStatus {
    let some = |status| instances.get(&status).copied().unwrap_or(0) > 0;
    let on_the_way =
        some(InstanceStatus::Preparing) || some(InstanceStatus::Booting) || some(InstanceStatus::Lost);
    match old {
        TaskStatus::Ending | TaskStatus::Running => old,
        TaskStatus::Starting | TaskStatus::Failed if on_the_way => TaskStatus::Starting,
        _ if some(InstanceStatus::Failed) => TaskStatus::Failed,
        _ => TaskStatus::Running,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_reported_is_up_though_its_node_waits_for_it() {
        use InstanceStatus::{Booting, Failed, Lost, Preparing, Running, Stopped};
        assert_eq!(advance(Preparing, Booting, false), Booting);
        assert_eq!(advance(Running, Booting, true), Running);
        assert_eq!(advance(Running, Preparing, true), Running);
        assert_eq!(advance(Lost, Booting, true), Running);
        assert_eq!(advance(Lost, Booting, false), Booting);
        assert_eq!(advance(Running, Stopped, true), Stopped);
        assert_eq!(advance(Booting, Failed, false), Failed);
        assert_eq!(advance(Failed, Booting, false), Failed);
        assert_eq!(advance(Failed, Preparing, false), Preparing);
    }

    #[test]
    fn a_task_runs_when_all_its_instances_were_up() {
        use InstanceStatus::{Booting, Failed, Lost, Running, Stopped};
        let of = |old, counts: &[(InstanceStatus, u64)]| task_status(old, &counts.iter().copied().collect());
        assert_eq!(of(TaskStatus::Starting, &[(Running, 2), (Booting, 1)]), TaskStatus::Starting);
        assert_eq!(of(TaskStatus::Starting, &[(Running, 3)]), TaskStatus::Running);
        assert_eq!(of(TaskStatus::Starting, &[(Running, 2), (Failed, 1)]), TaskStatus::Failed);
        assert_eq!(of(TaskStatus::Running, &[(Running, 2), (Lost, 1)]), TaskStatus::Running);
        assert_eq!(of(TaskStatus::Starting, &[(Stopped, 1), (Running, 1)]), TaskStatus::Running);
        assert_eq!(of(TaskStatus::Ending, &[(Running, 1)]), TaskStatus::Ending);
    }
}
