//! What is to be known of this host, and what an instance is told of itself.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use crate::load::Sampler;
use crate::wire::cluster::{Address, InstanceOrder};

/// Processors of this host.
pub(super) fn cpus() -> u32 {
    std::thread::available_parallelism().map_or(1, |count| u32::try_from(count.get()).unwrap_or(u32::MAX))
}

/// Bytes of memory of this host: all, and free for new instances.
pub(super) fn memory() -> (u64, u64) {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    (meminfo(&text, "MemTotal:"), meminfo(&text, "MemAvailable:"))
}

fn meminfo(text: &str, field: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

/// The load items of this host.
pub(super) fn load(sampler: &Sampler) -> BTreeMap<u16, f32> {
    let load = sampler.load();
    BTreeMap::from([(0, load.cpu), (1, load.memory), (2, load.disk), (3, load.network)])
}

/// The addresses of this host, loopback left out, each with the hardware address of its interface.
pub(super) fn addresses() -> Vec<Address> {
    let macs = macs();
    let mut found: Vec<Address> = Vec::new();
    for (interface, ip) in interface_addresses() {
        if !ip.is_loopback() && found.iter().all(|address| address.ip != ip) {
            found.push(Address { ip, mac: macs.get(&interface).cloned().unwrap_or_default() });
        }
    }
    found.truncate(256);
    found
}

fn macs() -> BTreeMap<String, String> {
    let Ok(interfaces) = std::fs::read_dir("/sys/class/net") else { return BTreeMap::new() };
    interfaces
        .filter_map(|interface| {
            let interface = interface.ok()?;
            let mac = std::fs::read_to_string(interface.path().join("address")).ok()?.trim().to_owned();
            Some((interface.file_name().into_string().ok()?, mac))
        })
        .collect()
}

/// Interface and address: IPv6 from `/proc/net/if_inet6`, IPv4 by asking every interface.
fn interface_addresses() -> Vec<(String, IpAddr)> {
    let mut found = Vec::new();
    let text = std::fs::read_to_string("/proc/net/if_inet6").unwrap_or_default();
    for line in text.lines() {
        let fields: Vec<_> = line.split_whitespace().collect();
        let [address, _, _, _, _, interface] = fields[..] else { continue };
        if let Ok(value) = u128::from_str_radix(address, 16) {
            found.push((interface.to_owned(), IpAddr::from(value.to_be_bytes())));
        }
    }
    found.extend(ipv4());
    found
}

/// The local addresses in the kernel's routing trie, with the interface of the most specific connected route.
fn ipv4() -> Vec<(String, IpAddr)> {
    let routes: Vec<(String, u32, u32)> = std::fs::read_to_string("/proc/net/route")
        .unwrap_or_default()
        .lines()
        .skip(1)
        .filter_map(|line| {
            let fields: Vec<_> = line.split_whitespace().collect();
            let number = |index: usize| u32::from_str_radix(fields.get(index)?, 16).ok().map(u32::swap_bytes);
            Some((fields.first()?.to_string(), number(1)?, number(7)?))
        })
        .collect();
    let text = std::fs::read_to_string("/proc/net/fib_trie").unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for pair in lines.windows(2) {
        let is_local = pair[1].contains("/32 host LOCAL");
        let Some(Ok(ip)) = pair[0].split("-- ").nth(1).map(|text| text.trim().parse::<std::net::Ipv4Addr>())
        else {
            continue;
        };
        if is_local && !found.iter().any(|(_, other)| *other == IpAddr::V4(ip)) {
            let interface = routes
                .iter()
                .filter(|(_, network, mask)| *mask != 0 && u32::from(ip) & mask == *network)
                .max_by_key(|(_, _, mask)| *mask)
                .map_or_else(String::new, |(interface, _, _)| interface.clone());
            found.push((interface, IpAddr::V4(ip)));
        }
    }
    found
}

/// What an instance is told: its name, its addresses, where to report. The first interface's are `address` and `gateway`,
/// the second's `address1` and `gateway1`, and so on.
pub(super) fn of_instance(order: &InstanceOrder, report: Option<SocketAddr>) -> Vec<(String, String)> {
    let mut facts = vec![("instance".to_owned(), order.name.to_string())];
    for (index, nic) in order.nics.iter().enumerate() {
        let suffix = if index == 0 { String::new() } else { index.to_string() };
        facts.push((format!("mac{suffix}"), nic.mac.clone()));
        if let Some((address, prefix)) = nic.address {
            facts.push((format!("address{suffix}"), format!("{address}/{prefix}")));
        }
        if let Some(gateway) = nic.gateway {
            facts.push((format!("gateway{suffix}"), gateway.to_string()));
        }
    }
    facts.extend(report.map(|report| ("report".to_owned(), report.to_string())));
    facts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_has_processors_memory_and_a_load() {
        let (all, free) = memory();
        assert!(cpus() > 0 && all > 0 && free <= all);
        assert_eq!(load(&Sampler::default()).len(), 4);
        assert!(addresses().iter().all(|address| !address.ip.is_loopback()));
    }
}
