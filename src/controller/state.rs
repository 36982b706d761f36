//! How instances and tasks go from state to state. Pure; the diagrams are in [`super`].

use std::collections::BTreeMap;

use crate::wire::cluster::{InstanceStatus, TaskStatus};

/// What the controller itself knows of how far an instance has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Known {
    /// Its node says when it is up, and has not said so yet.
    Nothing,
    /// It is to report to the controller, and has not yet.
    Awaited,
    /// It was up: it may have reported that, so that its node still thinks that it boots.
    WasUp,
}

/// The state of an instance that was `old`, now that its node says `said`.
pub(crate) fn advance(old: InstanceStatus, said: InstanceStatus, known: Known) -> InstanceStatus {
    match (old, said) {
        // An answer that was under way when the guest reported may even say that it is still being prepared.
        (
            InstanceStatus::Preparing
            | InstanceStatus::Booting
            | InstanceStatus::Running
            | InstanceStatus::Lost,
            InstanceStatus::Preparing | InstanceStatus::Booting,
        ) if known == Known::WasUp => InstanceStatus::Running,
        // Its node knows no better: what nobody reported was never up.
        (_, InstanceStatus::Stopped) if known == Known::Awaited => InstanceStatus::Failed,
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
        use Known::{Awaited, Nothing, WasUp};
        assert_eq!(advance(Preparing, Booting, Awaited), Booting);
        assert_eq!(advance(Running, Booting, WasUp), Running);
        assert_eq!(advance(Running, Preparing, WasUp), Running);
        assert_eq!(advance(Lost, Booting, WasUp), Running);
        assert_eq!(advance(Lost, Booting, Awaited), Booting);
        assert_eq!(advance(Running, Stopped, WasUp), Stopped);
        assert_eq!(advance(Booting, Failed, Nothing), Failed);
        assert_eq!(advance(Failed, Booting, Awaited), Failed);
        assert_eq!(advance(Failed, Preparing, Nothing), Preparing);
    }

    #[test]
    fn a_guest_that_ends_before_it_reports_was_never_up() {
        use InstanceStatus::{Booting, Failed, Lost, Preparing, Stopped};
        for old in [Preparing, Booting, Lost, Failed] {
            assert_eq!(advance(old, Stopped, Known::Awaited), Failed);
            assert_eq!(advance(old, Stopped, Known::Nothing), Stopped);
            assert_eq!(advance(old, Stopped, Known::WasUp), Stopped);
        }
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
