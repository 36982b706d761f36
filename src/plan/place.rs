//! Which instance of a plan goes on which node.
//!
//! Where a plan says it, there. Otherwise where memory is free and load is low (mission C4): each instance goes to the
//! node that is left with the most, VMs counted with their memory, containers, which only have a limit, with a share.

use std::collections::HashMap;

use super::check::{Mistake, Step};
use super::{Group, GroupNodes, Plan};
use crate::hypervisor::InstanceType;
use crate::name::HostName;

/// What is to be known of a node.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeFacts {
    /// Its name.
    pub name: HostName,
    /// It answers.
    pub online: bool,
    /// What it runs.
    pub kinds: Vec<InstanceType>,
    /// Processors.
    pub cpus: u32,
    /// MiB of memory.
    pub memory_mib: u64,
    /// MiB of memory that are free.
    pub free_mib: u64,
    /// The weighted score of its load, from 0 to 1.
    pub score: f32,
}

/// An instance's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placed {
    /// Its group, by index in the plan.
    pub group: usize,
    /// Its number in the group, from 0.
    pub number: u32,
    /// Its node, by index in the nodes given.
    pub node: usize,
}

/// The share of its limit that a container is counted with.
const CONTAINER_SHARE: u64 = 8;

/// What is left of a node as instances are placed.
struct Room {
    free_mib: u64,
    /// Virtual processors of what was placed, in eighths; containers count one eighth.
    busy: u32,
}

/// Places all instances of `plan`, which has no mistakes by itself, on `nodes`.
///
/// # Errors
/// Nodes that are not there or cannot run what they should, and instances that fit nowhere.
pub fn place(plan: &Plan, nodes: &[NodeFacts]) -> Result<Vec<Placed>, Vec<Mistake>> {
    let by_name: HashMap<&HostName, usize> =
        nodes.iter().enumerate().map(|(index, node)| (&node.name, index)).collect();
    let mut mistakes = Vec::new();
    let mut wrong = |path: Vec<Step>, message: String| mistakes.push(Mistake { path, message });
    let key = |name: &str| Step::Key(name.to_owned());
    for (index, name) in plan.nodes.iter().enumerate() {
        if !by_name.contains_key(name) {
            wrong(vec![key("nodes"), Step::Index(index)], no_such_node(name));
        }
    }
    let mut rooms: Vec<Room> = nodes.iter().map(|node| Room { free_mib: node.free_mib, busy: 0 }).collect();
    let mut placed = Vec::new();
    // What has its place goes first, so that the rest is put where there is still room.
    let mut order: Vec<usize> = (0..plan.groups.len()).collect();
    order.sort_by_key(|index| !matches!(plan.groups[*index].nodes, Some(GroupNodes::Counts(_))));
    for index in order {
        let group = &plan.groups[index];
        let path = |field: &str| vec![key("groups"), Step::Index(index), key(field)];
        let result = match &group.nodes {
            Some(GroupNodes::Counts(counts)) => counts.iter().try_for_each(|(name, count)| {
                let node = *by_name.get(name).ok_or_else(|| no_such_node(name))?;
                can_run(&nodes[node], group)?;
                (0..*count).try_for_each(|_| put(group, index, node, nodes, &mut rooms, &mut placed))
            }),
            named => {
                let wanted = match named {
                    Some(GroupNodes::Any(names)) => Some(names),
                    _ if plan.nodes.is_empty() => None,
                    _ => Some(&plan.nodes),
                };
                anywhere(group, index, wanted, nodes, &mut rooms, &mut placed)
            }
        };
        if let Err(message) = result {
            let counts = matches!(group.nodes, Some(GroupNodes::Counts(_)));
            wrong(path(if counts || group.nodes.is_some() { "nodes" } else { "count" }), message);
        }
    }
    if mistakes.is_empty() { Ok(placed) } else { Err(mistakes) }
}

fn no_such_node(name: &HostName) -> String {
    format!("there is no node '{name}': `bootcache nodes` shows those there are")
}

/// Whether a node may get instances of `group` at all.
fn can_run(node: &NodeFacts, group: &Group) -> Result<(), String> {
    if !node.online {
        Err(format!("node '{}' is offline", node.name))
    } else if !node.kinds.contains(&group.kind) {
        Err(format!("node '{}' runs no {}s", node.name, group.kind))
    } else if group.kind == InstanceType::Container && group.cpus > node.cpus {
        // Docker refuses that; a VM's processors are threads.
        Err(format!("{} processors are more than node '{}' has ({})", group.cpus, node.name, node.cpus))
    } else if u64::from(group.memory.0) > node.memory_mib {
        Err(format!(
            "{} MiB of memory are more than node '{}' has ({} MiB)",
            group.memory.0, node.name, node.memory_mib
        ))
    } else {
        Ok(())
    }
}

fn need_mib(group: &Group) -> u64 {
    counted_mib(group.kind, u64::from(group.memory.0))
}

/// The MiB of memory that instances of `kind` are counted with that may have `memory_mib`.
pub const fn counted_mib(kind: InstanceType, memory_mib: u64) -> u64 {
    match kind {
        InstanceType::Vm => memory_mib,
        InstanceType::Container => memory_mib / CONTAINER_SHARE,
    }
}

fn put(
    group: &Group,
    index: usize,
    node: usize,
    nodes: &[NodeFacts],
    rooms: &mut [Room],
    placed: &mut Vec<Placed>,
) -> Result<(), String> {
    let number = placed.iter().filter(|other| other.group == index).count();
    let number = u32::try_from(number).expect("a plan has at most 10,000 instances");
    let room = &mut rooms[node];
    room.free_mib = room.free_mib.checked_sub(need_mib(group)).ok_or_else(|| {
        format!(
            "node '{}' has no memory free for instance {} of '{}'",
            nodes[node].name,
            number + 1,
            group.name
        )
    })?;
    room.busy = room.busy.saturating_add(match group.kind {
        InstanceType::Vm => group.cpus.saturating_mul(8),
        InstanceType::Container => 1,
    });
    placed.push(Placed { group: index, number, node });
    Ok(())
}

fn anywhere(
    group: &Group,
    index: usize,
    wanted: Option<&Vec<HostName>>,
    nodes: &[NodeFacts],
    rooms: &mut [Room],
    placed: &mut Vec<Placed>,
) -> Result<(), String> {
    let (mut reason, mut told) = ("no node is online".to_owned(), false);
    let mut able = Vec::new();
    let named = |name: &HostName| wanted.is_none_or(|wanted| wanted.contains(name));
    for (number, node) in nodes.iter().enumerate().filter(|(_, node)| named(&node.name)) {
        match can_run(node, group) {
            Ok(()) => able.push(number),
            // The most telling reason: of a node that is there but cannot, rather one that runs such things at all.
            Err(why) if node.online && (node.kinds.contains(&group.kind) || !told) => {
                (reason, told) = (why, node.kinds.contains(&group.kind));
            }
            Err(_) => {}
        }
    }
    if let Some(missing) =
        wanted.and_then(|wanted| wanted.iter().find(|name| nodes.iter().all(|node| node.name != **name)))
    {
        return Err(no_such_node(missing));
    }
    if able.is_empty() {
        return Err(reason);
    }
    let need = need_mib(group);
    for _ in 0..group.total() {
        let best = able
            .iter()
            .copied()
            .filter(|node| rooms[*node].free_mib >= need)
            .min_by(|a, b| cost(&nodes[*a], &rooms[*a]).total_cmp(&cost(&nodes[*b], &rooms[*b])));
        let Some(node) = best else {
            let counted = match group.kind {
                InstanceType::Vm => "",
                InstanceType::Container => " (containers count with an eighth of their memory)",
            };
            return Err(format!(
                "no node has {need} MiB of memory free for another instance of '{}'{counted}",
                group.name
            ));
        };
        put(group, index, node, nodes, rooms, placed)?;
    }
    Ok(())
}

/// What one more instance on a node costs: memory that is gone, processors that are promised, and load. A load is what it
/// was a moment ago, so that it counts half: equal nodes are filled evenly however it wavers.
fn cost(node: &NodeFacts, room: &Room) -> f32 {
    let gone = 1.0 - room.free_mib as f32 / node.memory_mib.max(1) as f32;
    let promised = room.busy as f32 / (8 * node.cpus.max(1)) as f32;
    gone + promised + node.score / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Plan;

    fn node(name: &str, free_mib: u64, score: f32) -> NodeFacts {
        NodeFacts {
            name: name.parse().unwrap(),
            online: true,
            kinds: vec![InstanceType::Vm, InstanceType::Container],
            cpus: 4,
            memory_mib: 8192,
            free_mib,
            score,
        }
    }

    fn plan(rest: &str) -> Plan {
        let text = format!("name = \"lab\"\n[[groups]]\nname = \"g\"\ntype = \"vm\"\nimage = \"i\"\n{rest}");
        toml::from_str(&text).unwrap()
    }

    fn per_node(plan: &Plan, nodes: &[NodeFacts]) -> Vec<usize> {
        let placed = place(plan, nodes).unwrap();
        (0..nodes.len()).map(|node| placed.iter().filter(|p| p.node == node).count()).collect()
    }

    fn refused(plan: &Plan, nodes: &[NodeFacts]) -> String {
        place(plan, nodes).unwrap_err()[0].to_string()
    }

    #[test]
    fn equal_nodes_get_equal_numbers_and_busy_ones_fewer() {
        let even = [node("a", 8000, 0.1), node("b", 8000, 0.1), node("c", 8000, 0.1), node("d", 8000, 0.1)];
        assert_eq!(per_node(&plan("count = 8"), &even), [2, 2, 2, 2]);
        let wavering =
            [node("a", 8000, 0.3), node("b", 7900, 0.1), node("c", 8000, 0.2), node("d", 7800, 0.0)];
        assert_eq!(per_node(&plan("count = 4"), &wavering), [1, 1, 1, 1]);
        let uneven = [node("a", 8000, 0.9), node("b", 8000, 0.1), node("c", 1000, 0.1)];
        let counts = per_node(&plan("count = 8"), &uneven);
        assert!(counts[1] > counts[0] && counts[1] > counts[2], "{counts:?}");
    }

    #[test]
    fn a_plan_that_says_where_is_obeyed() {
        let nodes = [node("a", 8000, 0.0), node("b", 8000, 0.9)];
        assert_eq!(per_node(&plan("nodes = { b = 3 }"), &nodes), [0, 3]);
        assert_eq!(per_node(&plan("count = 3\nnodes = [\"b\"]"), &nodes), [0, 3]);
    }

    #[test]
    fn what_cannot_be_is_said() {
        let mut nodes = [node("a", 1000, 0.0)];
        assert!(refused(&plan("nodes = { z = 1 }"), &nodes).contains("no node 'z'"));
        assert!(refused(&plan("nodes = [\"z\"]"), &nodes).contains("no node 'z'"));
        assert!(
            refused(&plan("memory = \"9G\""), &nodes).contains("9216 MiB of memory are more than node 'a'")
        );
        let mut golden = node("golden", 1000, 0.0);
        golden.kinds = Vec::new();
        let nodes_and_golden = [nodes[0].clone(), golden];
        assert!(refused(&plan("memory = \"9G\""), &nodes_and_golden).contains("than node 'a'"));
        assert!(refused(&plan("count = 3\nmemory = 400"), &nodes).contains("no node has 400 MiB"));
        assert!(refused(&plan("nodes = { a = 3 }\nmemory = 400"), &nodes).contains("no memory free"));
        nodes[0].kinds = vec![InstanceType::Container];
        assert!(refused(&plan("count = 1"), &nodes).contains("runs no vms"));
        nodes[0].online = false;
        assert!(refused(&plan("count = 1"), &nodes).contains("no node is online"));
        assert!(refused(&plan("nodes = { a = 1 }"), &nodes).contains("offline"));
    }
}
