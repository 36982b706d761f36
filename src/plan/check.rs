//! What is wrong with a plan by itself, before any node is asked.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;
use std::net::IpAddr;

use super::{Group, GroupNic, GroupNodes, INSTANCES_MAX, Network, PARTS_MAX, Plan, UntilUp};
use crate::hypervisor::{InstanceType, template};
use crate::name::HostName;

/// Most virtual processors of an instance.
const CPUS_MAX: u32 = 256;
/// Longest argument or variable of a process, its end counted (`MAX_ARG_STRLEN` of `execve(2)`).
const ARGUMENT_MAX: usize = 128 << 10;
/// Least and most memory of an instance, in MiB.
const MEMORY_MIB: std::ops::RangeInclusive<u32> = 4..=(4 << 20);
/// The least memory that Docker gives a container, in MiB.
const CONTAINER_MEMORY_MIB: u32 = 6;
/// Least and most disk of a VM, in MiB: no more than an image may have, so that it can become one.
const DISK_MIB: std::ops::RangeInclusive<u32> = 1..=(8 << 20);
/// Most network interfaces of an instance.
const NICS_MAX: usize = 8;
/// Longest name of a network interface of Linux (IFNAMSIZ - 1).
const INTERFACE_BYTES_MAX: usize = 15;
/// The rule for names of network devices.
const DEVICE_RULE: &str = "1 to 15 letters, digits, '-', '_' or '.', and does not begin with '-'";
/// The longest instance name is PLAN-TASK-GROUP-NUMBER: this leaves 19 digits for the task and 5 for the number.
const NAMES_BYTES_MAX: usize = 63 - 19 - 5 - 3;

/// One step to a place in a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// A field.
    Key(String),
    /// An item of a list.
    Index(usize),
}

/// Something that is wrong, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// The way to it from the top of the plan.
    pub path: Vec<Step>,
    /// What is wrong, and what to do.
    pub message: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, step) in self.path.iter().enumerate() {
            match step {
                Step::Key(key) if index == 0 => f.write_str(key)?,
                Step::Key(key) => write!(f, ".{key}")?,
                Step::Index(number) => write!(f, "[{number}]")?,
            }
        }
        write!(f, ": {}", self.message)
    }
}

/// A place in a plan, from which mistakes are told.
struct Place<'m> {
    path: Vec<Step>,
    mistakes: &'m mut Vec<Mistake>,
}

impl Place<'_> {
    fn key(&mut self, key: &str) -> Place<'_> {
        let mut path = self.path.clone();
        path.push(Step::Key(key.to_owned()));
        Place { path, mistakes: self.mistakes }
    }

    fn index(&mut self, index: usize) -> Place<'_> {
        let mut path = self.path.clone();
        path.push(Step::Index(index));
        Place { path, mistakes: self.mistakes }
    }

    fn wrong(&mut self, message: impl Into<String>) {
        self.mistakes.push(Mistake { path: self.path.clone(), message: message.into() });
    }
}

/// Everything that is wrong with `plan` by itself; empty if nothing is.
pub fn check(plan: &Plan) -> Vec<Mistake> {
    let mut mistakes = Vec::new();
    let mut top = Place { path: Vec::new(), mistakes: &mut mistakes };
    if plan.groups.is_empty() || plan.groups.len() > PARTS_MAX {
        top.key("groups")
            .wrong(format!("a plan has 1 to {PARTS_MAX} groups, this one {}", plan.groups.len()));
    }
    if plan.networks.len() > PARTS_MAX {
        top.key("networks").wrong(format!("a plan has at most {PARTS_MAX} networks"));
    }
    twice(&mut top.key("nodes"), &plan.nodes);
    networks(plan, &mut top.key("networks"));
    let total: u64 = plan.groups.iter().map(Group::total).sum();
    if total > u64::from(INSTANCES_MAX) {
        top.key("groups").wrong(format!("a plan has at most {INSTANCES_MAX} instances, this one {total}"));
        return mistakes;
    }
    let mut names = HashSet::new();
    let mut taken: BTreeMap<&HostName, HashSet<IpAddr>> = BTreeMap::new();
    for (index, group) in plan.groups.iter().enumerate() {
        let mut groups = top.key("groups");
        let mut place = groups.index(index);
        if !names.insert(&group.name) {
            place
                .key("name")
                .wrong(format!("there are two groups '{}': give each a name of its own", group.name));
        }
        self::group(plan, group, &mut place);
        for (number, nic) in group.networks.iter().enumerate() {
            let of_ipv6 = |network: &Network| network.subnet.network().is_ipv6();
            if group.kind == InstanceType::Container && plan.networks.get(&nic.network).is_some_and(of_ipv6) {
                let message = "its addresses are IPv6: containers need a network with IPv4 addresses";
                place.key("networks").index(number).wrong(message);
            }
            let again = group.networks[..number].iter().any(|other| other.network == nic.network);
            if group.kind == InstanceType::Container && again {
                let message = "Docker gives a container one interface on each network: name it once";
                place.key("networks").index(number).wrong(message);
            }
            let taken = taken.entry(&nic.network).or_default();
            let mut networks = place.key("networks");
            addresses(plan, group, nic, &mut networks.index(number), taken);
        }
    }
    enough_addresses(plan, &mut top.key("networks"));
    mistakes
}

/// What is wrong with the templates of `plan`, once they are text: [`check`] sees a plan file, which has their paths.
pub fn check_templates(plan: &Plan) -> Vec<Mistake> {
    let templates = plan.groups.iter().enumerate();
    let templates = templates.filter_map(|(index, group)| Some((index, group.template.as_deref()?)));
    let wrong = templates.filter_map(|(index, text)| Some((index, template::check(text).err()?)));
    wrong
        .map(|(index, error)| Mistake {
            path: vec![Step::Key("groups".into()), Step::Index(index), Step::Key("template".into())],
            message: error.to_string(),
        })
        .collect()
}

fn twice(place: &mut Place<'_>, names: &[HostName]) {
    let mut seen = BTreeSet::new();
    for name in names {
        if !seen.insert(name) {
            place.wrong(format!("'{name}' is there twice"));
        }
    }
}

fn networks(plan: &Plan, place: &mut Place<'_>) {
    let all: Vec<_> = plan.networks.iter().collect();
    for (index, (name, network)) in all.iter().enumerate() {
        let mut place = place.key(name.as_str());
        if let Some(gateway) = network.gateway
            && !network.subnet.has_host(gateway)
        {
            place.key("gateway").wrong(format!("{gateway} is not an address of {}", network.subnet));
        }
        if let Some((other, _)) =
            all[..index].iter().find(|(_, other)| other.subnet.overlaps(&network.subnet))
        {
            place.key("subnet").wrong(format!("its addresses overlap with those of network '{other}'"));
        }
        let shares = |other: &Network| network.bridge.is_some() && other.bridge == network.bridge;
        if let Some((other, _)) = all[..index].iter().find(|(_, other)| shares(other)) {
            place.key("bridge").wrong(format!("it is the bridge of network '{other}' too"));
        }
        if network.vlan.is_some_and(|vlan| !(1..=4094).contains(&vlan)) {
            place.key("vlan").wrong("a VLAN is a number from 1 to 4094");
        }
        if network.mtu.is_some_and(|mtu| !(576..=65_535).contains(&mtu)) {
            place.key("mtu").wrong("an MTU is from 576 to 65535 bytes");
        }
        interface_names(network, &mut place);
    }
}

fn interface_names(network: &Network, place: &mut Place<'_>) {
    let sound = |name: &str| {
        let characters = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        let dots = name == "." || name == "..";
        let length = (1..=INTERFACE_BYTES_MAX).contains(&name.len());
        length && name.bytes().all(characters) && !dots && !name.starts_with('-')
    };
    if let Some(bridge) = &network.bridge
        && !sound(bridge)
    {
        place.key("bridge").wrong(format!("the name of a bridge has {DEVICE_RULE}"));
    }
    let uplinks: Vec<&String> = match &network.uplink {
        None => Vec::new(),
        Some(super::Uplink::Same(uplink)) => vec![uplink],
        Some(super::Uplink::PerNode(uplinks)) => uplinks.values().collect(),
    };
    if uplinks.into_iter().any(|uplink| !sound(uplink)) {
        place.key("uplink").wrong(format!("the name of a network interface has {DEVICE_RULE}"));
    }
    if network.vlan.is_some() && network.uplink.is_none() {
        place.key("vlan").wrong("a VLAN is one of an uplink: say which interface, with uplink");
    }
}

fn group(plan: &Plan, group: &Group, place: &mut Place<'_>) {
    if plan.name.as_str().len() + group.name.as_str().len() > NAMES_BYTES_MAX {
        place.key("name").wrong(format!(
            "the names of plan and group have more than {NAMES_BYTES_MAX} bytes together, too many for instances' names"
        ));
    }
    match (&group.nodes, group.count) {
        (Some(GroupNodes::Counts(_)), Some(_)) => {
            place.key("count").wrong("count and nodes both say how many: leave one out");
        }
        (Some(GroupNodes::Counts(counts)), None)
            if counts.values().any(|count| *count == 0) || counts.is_empty() =>
        {
            place.key("nodes").wrong("0 instances: leave the node out, or say how many");
        }
        (_, Some(0)) => place.key("count").wrong("0 instances: leave the group out, or say how many"),
        _ => {}
    }
    let nodes: Vec<HostName> = match &group.nodes {
        Some(GroupNodes::Any(nodes)) => {
            twice(&mut place.key("nodes"), nodes);
            if nodes.is_empty() {
                place.key("nodes").wrong("no nodes: leave it out for any node");
            }
            nodes.clone()
        }
        Some(GroupNodes::Counts(counts)) => counts.keys().cloned().collect(),
        None => Vec::new(),
    };
    if let Some(node) = nodes.iter().find(|node| !plan.nodes.is_empty() && !plan.nodes.contains(node)) {
        place.key("nodes").wrong(format!("'{node}' is not among the nodes of the plan"));
    }
    if group.cpus == 0 || group.cpus > CPUS_MAX {
        place.key("cpus").wrong(format!("an instance has 1 to {CPUS_MAX} processors"));
    }
    if !MEMORY_MIB.contains(&group.memory.0) {
        place.key("memory").wrong(format!(
            "an instance has {} MiB to {} TiB of memory",
            MEMORY_MIB.start(),
            MEMORY_MIB.end() >> 20
        ));
    }
    if group.kind == InstanceType::Container && group.memory.0 < CONTAINER_MEMORY_MIB {
        place.key("memory").wrong(format!("Docker gives a container {CONTAINER_MEMORY_MIB} MiB at least"));
    }
    if group.disk.is_some_and(|disk| !DISK_MIB.contains(&disk.0)) {
        place.key("disk").wrong(format!(
            "a disk has {} MiB to {} TiB, and its image's size at least",
            DISK_MIB.start(),
            DISK_MIB.end() >> 20
        ));
    }
    if !(1..=86_400).contains(&group.time_limit) {
        place.key("time_limit").wrong("the time limit is from 1 to 86400 seconds");
    }
    if group.networks.len() > NICS_MAX {
        place.key("networks").wrong(format!("an instance has at most {NICS_MAX} network interfaces"));
    }
    if group.until == UntilUp::Report && group.networks.is_empty() && group.kind == InstanceType::Container {
        place.key("until").wrong("a container without a network cannot report: use \"started\"");
    }
    only_for_one_kind(group, place);
}

fn only_for_one_kind(group: &Group, place: &mut Place<'_>) {
    match group.kind {
        InstanceType::Vm => {
            let given = [
                ("env", !group.env.is_empty()),
                ("command", !group.command.is_empty()),
                ("privileged", group.privileged),
            ];
            for (field, _) in given.into_iter().filter(|(_, given)| *given) {
                place.key(field).wrong("this is for containers: a VM has none");
            }
        }
        InstanceType::Container => {
            if group.template.is_some() {
                place.key("template").wrong("this is for VMs: a container has no domain");
            }
            if group.disk.is_some() {
                place.key("disk").wrong("this is for VMs: a container has no disk of its own");
            }
            if group.disk_by.is_some() {
                place.key("disk_by").wrong("this is for VMs: a container has no disk of its own");
            }
            let sound = |name: &String| {
                !name.is_empty() && !name.contains(['=', '\0']) && !name.starts_with("BOOTCACHE_")
            };
            if group.env.keys().any(|name| !sound(name)) {
                place
                    .key("env")
                    .wrong("a variable's name is not empty, has no '=', and does not begin with BOOTCACHE_");
            }
            if group.env.values().any(|value| value.contains('\0')) {
                place.key("env").wrong("a variable's value has no zero bytes");
            }
            if group.env.iter().any(|(name, value)| name.len() + value.len() + 2 > ARGUMENT_MAX) {
                place.key("env").wrong("a variable is too long: Linux takes 128 KiB, its name counted");
            }
            if group.command.iter().any(|word| word.contains('\0')) {
                place.key("command").wrong("a command has no zero bytes");
            }
            if group.command.iter().any(|word| word.len() + 1 > ARGUMENT_MAX) {
                place.key("command").wrong("a word of it is too long: Linux takes 128 KiB");
            }
        }
    }
}

fn addresses(plan: &Plan, group: &Group, nic: &GroupNic, place: &mut Place<'_>, taken: &mut HashSet<IpAddr>) {
    let Some(network) = plan.networks.get(&nic.network) else {
        return place.key("network").wrong(format!("there is no network '{}' in the plan", nic.network));
    };
    let Some(first) = nic.address else { return };
    let number = network.subnet.number(first);
    for index in 0..u128::from(group.total()) {
        let address = number.and_then(|number| network.subnet.host(number + index));
        let Some(address) = address.filter(|_| number != Some(0)) else {
            let which = if index == 0 {
                format!("{first}")
            } else {
                format!("the address of instance {}", index + 1)
            };
            return place.key("address").wrong(format!("{which} is not an address of {}", network.subnet));
        };
        if Some(address) == network.gateway {
            if group.kind == InstanceType::Container {
                let message = "Docker keeps it to itself, so that the router is a VM";
                return place.key("address").wrong(format!("{address} is the gateway's: {message}"));
            }
            if group.total() > 1 {
                return place.key("address").wrong(format!("{address} is the gateway's"));
            }
        }
        if !taken.insert(address) {
            return place.key("address").wrong(format!("{address} is another instance's too"));
        }
    }
}

fn enough_addresses(plan: &Plan, place: &mut Place<'_>) {
    for (name, network) in &plan.networks {
        let nics = |group: &Group| group.networks.iter().filter(|nic| nic.network == *name).count() as u64;
        let wanted: u64 = plan.groups.iter().map(|group| group.total() * nics(group)).sum();
        let on_it =
            || plan.groups.iter().flat_map(|group| group.networks.iter().map(move |nic| (group, nic)));
        let on_it = || on_it().filter(|(_, nic)| nic.network == *name);
        // A node needs one beside its containers; the gateway is outside, or one of the instances.
        let nodes = on_it().any(|(group, _)| group.kind == InstanceType::Container);
        let gateway = network.gateway.is_some() && on_it().all(|(_, nic)| nic.address != network.gateway);
        let there = network.subnet.hosts().saturating_sub(u128::from(nodes) + u128::from(gateway));
        if u128::from(wanted) > there {
            let message = format!("{wanted} addresses are needed, {} has {there} free", network.subnet);
            place.key(name.as_str()).key("subnet").wrong(message);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::DiskBy;

    fn plan(change: impl Fn(&mut Plan)) -> Vec<String> {
        let text = r#"
            name = "lab"
            [networks.lan]
            subnet = "10.0.0.0/24"
            gateway = "10.0.0.1"
            [[groups]]
            name = "web"
            type = "vm"
            image = "debian"
            count = 3
            networks = [{ network = "lan" }]
            [[groups]]
            name = "db"
            type = "container"
            image = "busybox"
            nodes = { n1 = 2, n2 = 1 }
            networks = [{ network = "lan", address = "10.0.0.20" }]
        "#;
        let mut plan: Plan = toml::from_str(text).unwrap();
        change(&mut plan);
        check(&plan).iter().map(ToString::to_string).collect()
    }

    fn network(plan: &mut Plan) -> &mut Network {
        plan.networks.values_mut().next().unwrap()
    }

    #[test]
    fn a_sound_plan_has_no_mistakes() {
        assert_eq!(plan(|_| {}), [""; 0]);
    }

    #[test]
    fn a_template_that_no_domain_can_come_of_is_told_with_its_group() {
        let sound = "<domain><name>@NAME@</name><uuid>@UUID@</uuid><devices>@DISK@@NICS@</devices></domain>";
        for (text, expected) in [
            (sound.to_owned(), None),
            (sound.replace("@DISK@", ""), Some("groups[0].template: the template has no @DISK@")),
            (sound.replace("@DISK@", "@DISK@@X@"), Some("groups[0].template: the template's line 1: @X@")),
            (sound.replace("</devices>", ""), Some("groups[0].template: the template is not XML")),
        ] {
            let mut sample: Plan =
                toml::from_str("name = 'lab'\n[[groups]]\nname = 'web'\ntype = 'vm'\nimage = 'debian'")
                    .unwrap();
            sample.groups[0].template = Some(text.clone());
            let found: Vec<_> = check_templates(&sample).iter().map(ToString::to_string).collect();
            match expected {
                None => assert!(found.is_empty(), "{found:?}"),
                Some(start) => assert!(found[0].starts_with(start), "{found:?}"),
            }
        }
    }

    #[test]
    fn a_small_subnet_has_room_for_what_needs_an_address_and_no_more() {
        let small = |vms: u32, containers: u32, gateway: Option<&str>, router: bool| {
            plan(|p| {
                network(p).subnet = "10.0.0.0/30".parse().unwrap();
                network(p).gateway = gateway.map(|address| address.parse().unwrap());
                p.groups[0].count = Some(vms);
                p.groups[1].nodes = None;
                p.groups[1].count = Some(containers);
                p.groups[1].networks[0].address = None;
                if router {
                    let mut group = p.groups[0].clone();
                    (group.name, group.count) = ("router".parse().unwrap(), None);
                    group.networks[0].address = network(p).gateway;
                    p.groups.push(group);
                }
                p.groups.retain(|group| group.count != Some(0));
            })
        };
        let full = |wanted: u32, free: u32| {
            [format!("networks.lan.subnet: {wanted} addresses are needed, 10.0.0.0/30 has {free} free")]
        };
        assert_eq!(small(2, 0, None, false), [""; 0]);
        assert_eq!(small(3, 0, None, false), full(3, 2));
        assert_eq!(small(1, 0, Some("10.0.0.1"), false), [""; 0]);
        assert_eq!(small(2, 0, Some("10.0.0.1"), false), full(2, 1));
        assert_eq!(small(1, 0, Some("10.0.0.1"), true), [""; 0], "the router is the gateway");
        assert_eq!(small(2, 0, Some("10.0.0.1"), true), full(3, 2));
        assert_eq!(small(0, 1, None, false), [""; 0]);
        assert_eq!(small(1, 1, None, false), full(2, 1));
    }

    #[test]
    fn every_mistake_is_told_with_its_place() {
        type Change = fn(&mut Plan);
        let cases: [(&str, Change); 29] = [
            ("groups: a plan has 1 to 256 groups", |p| p.groups.clear()),
            ("groups: a plan has at most 10000 instances", |p| p.groups[0].count = Some(1_000_000_000)),
            ("groups[0].count: 0 instances", |p| p.groups[0].count = Some(0)),
            ("groups[1].count: count and nodes both", |p| p.groups[1].count = Some(3)),
            ("groups[1].name: there are two groups 'web'", |p| p.groups[1].name = "web".parse().unwrap()),
            ("groups[0].networks[0].network: there is no network 'wan'", |p| {
                p.groups[0].networks[0].network = "wan".parse().unwrap();
            }),
            ("groups[1].networks[0].address: the address of instance 2 is not", |p| {
                p.groups[1].networks[0].address = Some("10.0.0.254".parse().unwrap());
            }),
            ("groups[1].networks[0].address: 10.0.1.1 is not", |p| {
                p.groups[1].networks[0].address = Some("10.0.1.1".parse().unwrap());
            }),
            ("groups[1].networks[0].address: 10.0.0.22 is another", |p| {
                p.groups[0].networks[0].address = Some("10.0.0.22".parse().unwrap());
            }),
            ("networks.lan.gateway: 10.9.9.9 is not", |p| {
                network(p).gateway = Some("10.9.9.9".parse().unwrap())
            }),
            ("networks.lan.subnet: 6 addresses are needed", |p| {
                network(p).subnet = "10.0.0.0/29".parse().unwrap();
                p.groups[1].networks[0].address = None;
            }),
            ("networks.lan.vlan: a VLAN is a number", |p| {
                network(p).vlan = Some(4095);
                network(p).bridge = Some("br0".into());
            }),
            ("networks.lan.vlan: a VLAN is one of an uplink", |p| {
                (network(p).vlan, network(p).bridge) = (Some(12), Some("br0".into()));
            }),
            ("groups[1].networks[0].address: 10.0.0.30 is the gateway's: Docker keeps it", |p| {
                network(p).gateway = Some("10.0.0.30".parse().unwrap());
                p.groups[1].nodes = None;
                p.groups[1].networks[0].address = network(p).gateway;
            }),
            ("networks.lan.bridge: the name of a bridge", |p| network(p).bridge = Some("a/b".into())),
            ("networks.lan.bridge: the name of a bridge", |p| network(p).bridge = Some("-br".into())),
            ("networks.wan.bridge: it is the bridge of network 'lan' too", |p| {
                network(p).bridge = Some("br0".into());
                let subnet = "10.0.9.0/24".parse().unwrap();
                let wan = Network { subnet, gateway: None, ..network(p).clone() };
                p.networks.insert("wan".parse().unwrap(), wan);
            }),
            ("groups[1].memory: Docker gives a container 6 MiB", |p| p.groups[1].memory.0 = 5),
            ("groups[0].cpus: an instance has", |p| p.groups[0].cpus = 0),
            ("groups[0].memory: an instance has", |p| p.groups[0].memory.0 = 1),
            ("groups[0].disk: a disk has 1 MiB to 8 TiB", |p| {
                p.groups[0].disk = Some(super::super::DiskSize(0))
            }),
            ("groups[1].disk: this is for VMs", |p| p.groups[1].disk = Some(super::super::DiskSize(64))),
            ("groups[1].disk_by: this is for VMs", |p| p.groups[1].disk_by = Some(DiskBy::Socket)),
            ("groups[0].command: this is for containers", |p| p.groups[0].command = vec!["sh".into()]),
            ("groups[1].template: this is for VMs", |p| p.groups[1].template = Some("x".into())),
            ("groups[1].networks[0]: its addresses are IPv6", |p| {
                network(p).gateway = None;
                network(p).subnet = "fd00::/64".parse().unwrap();
                p.groups[1].networks[0].address = None;
            }),
            ("groups[1].networks[1]: Docker gives a container one", |p| {
                let again = GroupNic { address: None, ..p.groups[1].networks[0].clone() };
                p.groups[1].networks.push(again);
            }),
            ("groups[1].env: a variable is too long", |p| {
                p.groups[1].env.insert("A".to_owned(), "x".repeat(128 << 10));
            }),
            ("groups[1].nodes: 'n1' is not among", |p| p.nodes = vec!["n2".parse().unwrap()]),
        ];
        for (expected, change) in cases {
            let found = plan(change);
            assert!(found.iter().any(|mistake| mistake.starts_with(expected)), "{expected}: {found:?}");
        }
    }
}
