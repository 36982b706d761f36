//! A plan whose instances have their places, as the parts that the nodes carry out.
//!
//! Names, addresses, hardware addresses and bridges are decided here and nowhere else, from the plan, the task's number
//! and the cluster's identity alone.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};

use super::check::{Mistake, Step};
use super::place::Placed;
use super::{DiskSize, Group, Network, Plan, UntilUp};
use crate::digest::Digest;
use crate::hypervisor::{InstanceType, Nic};
use crate::name::{HostName, ImageName};
use crate::network::NetworkSpec;
use crate::wire::cluster::{Common, InstanceOrder, Needed, Part, UpWhen};

/// What a plan becomes.
#[derive(Debug, Clone, Copy)]
pub struct Context<'c> {
    /// The cluster's identity.
    pub cluster: &'c str,
    /// The task's number.
    pub task: i64,
    /// Where guests report, if anywhere.
    pub report: Option<SocketAddr>,
}

/// The parts of `plan`, by the index of their node in `nodes`; `images` are the images that it names.
///
/// # Errors
/// A network that has too few addresses for its nodes.
pub fn expand(
    plan: &Plan,
    placed: &[Placed],
    nodes: &[HostName],
    images: &HashMap<ImageName, Needed>,
    context: Context<'_>,
) -> Result<BTreeMap<usize, Part>, Vec<Mistake>> {
    let mut networks = BTreeMap::new();
    for (name, network) in &plan.networks {
        // Docker wants an address of the node beside its containers; VMs need none.
        let of_containers = |group: &Group| {
            group.kind == InstanceType::Container && group.networks.iter().any(|nic| nic.network == *name)
        };
        let with_address: BTreeSet<usize> =
            placed.iter().filter(|p| of_containers(&plan.groups[p.group])).map(|p| p.node).collect();
        let addresses = Addresses::new(plan, name, network, &with_address).ok_or_else(|| {
            let path = ["networks", name.as_str(), "subnet"].map(|key| Step::Key(key.to_owned())).to_vec();
            let message = format!("{} has too few addresses for instances and nodes", network.subnet);
            vec![Mistake { path, message }]
        })?;
        networks.insert(name, addresses);
    }
    let mut parts: BTreeMap<usize, Part> = BTreeMap::new();
    let mut ordered = placed.to_vec();
    ordered.sort_by_key(|p| (p.group, p.number));
    for place in ordered {
        let group = &plan.groups[place.group];
        let mut order = order(plan, group, place, &mut networks, context);
        let part = parts.entry(place.node).or_insert_with(|| Part {
            networks: Vec::new(),
            images: Vec::new(),
            common: Vec::new(),
            instances: Vec::new(),
            report: context.report,
        });
        if part.images.iter().all(|image| image.name != group.image) {
            part.images.push(images[&group.image].clone());
        }
        for nic in &group.networks {
            let known = part.networks.iter().position(|network| network.name == nic.network);
            let index = known.unwrap_or_else(|| {
                let addresses = &networks[&nic.network];
                let spec = spec(plan, &nic.network, &nodes[place.node], place.node, addresses, context);
                part.networks.push(spec);
                part.networks.len() - 1
            });
            part.networks[index].containers |= group.kind == InstanceType::Container;
        }
        let common = Common {
            env: std::mem::take(&mut order.env),
            command: std::mem::take(&mut order.command),
            template: order.template.take(),
        };
        let known = part.common.iter().position(|other| *other == common);
        order.common = Some(known.unwrap_or(part.common.len()));
        if known.is_none() {
            part.common.push(common);
        }
        part.instances.push(order);
    }
    Ok(parts)
}

fn order(
    plan: &Plan,
    group: &Group,
    place: Placed,
    networks: &mut BTreeMap<&HostName, Addresses>,
    context: Context<'_>,
) -> InstanceOrder {
    let name = format!("{}-{}-{}-{}", plan.name, context.task, group.name, place.number + 1);
    let name: HostName = name.parse().expect("the plan was checked: its names fit together");
    let nics = group
        .networks
        .iter()
        .enumerate()
        .map(|(index, nic)| {
            let network = &plan.networks[&nic.network];
            let addresses = networks.get_mut(&nic.network).expect("there is one for each network");
            let address = match nic.address {
                Some(first) => network
                    .subnet
                    .number(first)
                    .and_then(|number| network.subnet.host(number + u128::from(place.number)))
                    .expect("the plan was checked: its addresses are inside"),
                None => addresses.next().expect("they were counted"),
            };
            Nic {
                network: nic.network.clone(),
                bridge: bridge(plan, &nic.network, context),
                mac: mac(context.cluster, &name, index),
                address: Some((address, network.subnet.prefix())),
                gateway: network.gateway.filter(|gateway| *gateway != address),
                mtu: network.mtu,
            }
        })
        .collect();
    InstanceOrder {
        name,
        kind: group.kind,
        image: group.image.clone(),
        cpus: group.cpus,
        memory_mib: group.memory.0,
        disk_bytes: group.disk.map(DiskSize::bytes),
        disk_by: group.disk_by.unwrap_or_default(),
        nics,
        env: group.env.clone(),
        command: group.command.clone(),
        privileged: group.privileged,
        template: group.template.clone(),
        common: None,
        up_when: match &group.until {
            UntilUp::Started => UpWhen::Started,
            UntilUp::Report => UpWhen::Report,
            UntilUp::Serial(pattern) => UpWhen::Serial(pattern.clone()),
        },
        time_limit_s: group.time_limit,
    }
}

fn spec(
    plan: &Plan,
    name: &HostName,
    node: &HostName,
    index: usize,
    addresses: &Addresses,
    context: Context<'_>,
) -> NetworkSpec {
    let network = &plan.networks[name];
    NetworkSpec {
        name: name.clone(),
        bridge: bridge(plan, name, context),
        subnet: (network.subnet.network(), network.subnet.prefix()),
        gateway: network.gateway,
        node_address: addresses.nodes.get(&index).copied(),
        uplink: network.uplink.as_ref().and_then(|uplink| uplink.on(node)).map(str::to_owned),
        vlan: network.vlan,
        mtu: network.mtu,
        containers: false,
    }
}

/// The bridge of a network: the user's, or one with a name that no other task has.
fn bridge(plan: &Plan, network: &HostName, context: Context<'_>) -> String {
    plan.networks[network].bridge.clone().unwrap_or_else(|| {
        let text = format!("{} {} {network}", context.cluster, context.task);
        format!("bc{}", &Digest::of(text.as_bytes()).to_string()[..10])
    })
}

/// A locally administered hardware address: 46 bits of a digest, so that thousands of instances do not meet.
fn mac(cluster: &str, instance: &HostName, nic: usize) -> String {
    let Digest([a, b, c, d, e, f, ..]) = Digest::of(format!("{cluster} {instance} {nic}").as_bytes());
    format!("{:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}", a & 0xfc | 0x02)
}

/// The addresses of a network: those of nodes that have containers on it, and those that are still free.
struct Addresses {
    nodes: BTreeMap<usize, IpAddr>,
    free: std::vec::IntoIter<IpAddr>,
}

impl Addresses {
    /// Each node of `with_address` has one of its own. `None` when there are too few.
    fn new(plan: &Plan, name: &HostName, network: &Network, with_address: &BTreeSet<usize>) -> Option<Self> {
        let mut taken: HashSet<IpAddr> = network.gateway.into_iter().collect();
        let mut wanted = 0;
        for group in &plan.groups {
            for nic in group.networks.iter().filter(|nic| nic.network == *name) {
                match nic.address.and_then(|first| network.subnet.number(first)) {
                    Some(first) => {
                        let numbers = first..first + u128::from(group.total());
                        taken.extend(numbers.filter_map(|number| network.subnet.host(number)));
                    }
                    None => wanted += group.total(),
                }
            }
        }
        // Nodes take theirs from the top, instances from the bottom.
        let hosts = network.subnet.hosts();
        let mut from_top = (1..=hosts).rev().filter_map(|number| network.subnet.host(number));
        let mut nodes = BTreeMap::new();
        for node in with_address {
            let address = from_top.by_ref().find(|address| !taken.contains(address))?;
            taken.insert(address);
            nodes.insert(*node, address);
        }
        let wanted = usize::try_from(wanted).expect("a plan has at most 10,000 instances");
        let free: Vec<IpAddr> = (1..=hosts)
            .filter_map(|number| network.subnet.host(number))
            .filter(|address| !taken.contains(address))
            .take(wanted)
            .collect();
        (free.len() == wanted).then(|| Self { nodes, free: free.into_iter() })
    }

    fn next(&mut self) -> Option<IpAddr> {
        self.free.next()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::DiskBy;

    fn names(names: &[&str]) -> Vec<HostName> {
        names.iter().map(|name| name.parse().unwrap()).collect()
    }

    fn expanded() -> BTreeMap<usize, Part> {
        let text = r#"
            name = "lab"
            [networks.lan]
            subnet = "10.0.0.0/24"
            gateway = "10.0.0.1"
            uplink = { n1 = "eth1" }
            [networks.back]
            subnet = "fd00::/64"
            bridge = "br-back"
            [[groups]]
            name = "web"
            type = "vm"
            image = "debian"
            count = 3
            networks = [{ network = "lan" }, { network = "back" }]
            [[groups]]
            name = "router"
            type = "vm"
            image = "debian"
            disk_by = "kernel"
            networks = [{ network = "lan", address = "10.0.0.1" }]
            "#;
        of(text, &[(0, 0, 0), (0, 1, 1), (0, 2, 0), (1, 0, 1)]).unwrap()
    }

    /// A plan of instances of debian, each placed by its group, its number and its node.
    fn of(text: &str, placed: &[(usize, u32, usize)]) -> Result<BTreeMap<usize, Part>, Vec<Mistake>> {
        let plan: Plan = toml::from_str(text).unwrap();
        let placed: Vec<_> = placed
            .iter()
            .map(|(group, number, node)| Placed { group: *group, number: *number, node: *node })
            .collect();
        let image = "debian".parse::<ImageName>().unwrap();
        let needed = Needed {
            name: image.clone(),
            root: Digest::of(b"i"),
            boot: None,
            size: 4096,
            sources: Vec::new(),
        };
        let images = HashMap::from([(image, needed)]);
        let context = Context { cluster: "c", task: 7, report: None };
        expand(&plan, &placed, &names(&["n1", "n2"]), &images, context)
    }

    #[test]
    fn every_instance_has_a_name_and_addresses_of_its_own() {
        let parts = expanded();
        let all: Vec<_> = parts.values().flat_map(|part| &part.instances).collect();
        let mut names: Vec<_> = all.iter().map(|instance| instance.name.as_str()).collect();
        names.sort_unstable();
        assert_eq!(names, ["lab-7-router-1", "lab-7-web-1", "lab-7-web-2", "lab-7-web-3"]);
        let nics: Vec<_> = all.iter().flat_map(|instance| &instance.nics).collect();
        for what in [
            nics.iter().map(|nic| nic.mac.clone()).collect::<BTreeSet<_>>(),
            nics.iter().map(|nic| nic.address.unwrap().0.to_string()).collect(),
        ] {
            assert_eq!(what.len(), nics.len(), "{what:?}");
        }
        let router = all.iter().find(|instance| instance.name.as_str() == "lab-7-router-1").unwrap();
        assert_eq!(router.nics[0].gateway, None);
        assert_eq!(router.nics[0].address, Some(("10.0.0.1".parse().unwrap(), 24)));
        let by_kernel: Vec<_> = all.iter().filter(|one| one.disk_by == DiskBy::Kernel).collect();
        assert_eq!(by_kernel, [router]);
    }

    /// Groups of both kinds on a network.
    fn on_one_network(subnet: &str) -> String {
        let group = |name: &str, kind: &str| {
            format!(
                "[[groups]]\nname = '{name}'\ntype = '{kind}'\nimage = 'debian'\ncount = 2\n\
                 networks = [{{ network = 'lan' }}]\n"
            )
        };
        let groups = group("vms", "vm") + &group("boxes", "container");
        format!("name = 'lab'\n[networks.lan]\nsubnet = '{subnet}'\n{groups}")
    }

    #[test]
    fn nodes_with_containers_on_a_network_have_addresses_that_no_instance_has() {
        let text = on_one_network("10.0.0.0/24");
        let addresses = |placed: &[(usize, u32, usize)]| {
            let parts = of(&text, placed).unwrap();
            let of_node = |part: &Part| part.networks[0].node_address.map(|address| address.to_string());
            parts.values().map(of_node).collect::<Vec<_>>()
        };
        let some = |last: u8| Some(format!("10.0.0.{last}"));
        assert_eq!(addresses(&[(0, 0, 0), (0, 1, 1), (1, 0, 0), (1, 1, 1)]), [some(254), some(253)]);
        assert_eq!(addresses(&[(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 1)]), [None, some(254)]);
        assert!(expanded().values().flat_map(|part| &part.networks).all(|spec| spec.node_address.is_none()));
    }

    #[test]
    fn vms_alone_leave_no_address_of_a_small_subnet_unused() {
        let text = on_one_network("10.0.0.0/30");
        let vms = text.split_inclusive("[[groups]]").take(2).collect::<String>();
        let vms = vms.trim_end_matches("[[groups]]");
        let parts = of(vms, &[(0, 0, 0), (0, 1, 1)]).unwrap();
        let nics =
            parts.values().flat_map(|part| &part.instances).map(|order| order.nics[0].address.unwrap().0);
        assert_eq!(nics.map(|ip| ip.to_string()).collect::<Vec<_>>(), ["10.0.0.1", "10.0.0.2"]);
        let mistakes = of(&text, &[(0, 0, 0), (0, 1, 1), (1, 0, 0), (1, 1, 1)]).unwrap_err();
        assert!(mistakes[0].message.contains("too few addresses"), "{mistakes:?}");
    }

    #[test]
    fn a_network_is_a_bridge_of_the_same_name_on_every_node() {
        let parts = expanded();
        let lan = |node: usize| parts[&node].networks.iter().find(|n| n.name.as_str() == "lan").unwrap();
        assert_eq!((lan(0).uplink.as_deref(), lan(1).uplink.as_deref()), (Some("eth1"), None));
        assert_eq!(lan(0).bridge, lan(1).bridge);
        assert_eq!(lan(0).bridge.len(), 12);
        assert!(parts.values().flat_map(|part| &part.networks).all(|network| !network.containers));
        let back = parts[&0].networks.iter().find(|n| n.name.as_str() == "back").unwrap();
        assert_eq!(back.bridge, "br-back");
    }

    #[test]
    fn the_same_plan_becomes_the_same_parts() {
        assert_eq!(expanded(), expanded());
    }
}
