//! The network: every node's link in each direction, and every rack's to the core, as queues that serve in order.

use super::Scenario;

/// A link in one direction.
#[derive(Debug, Clone, Copy)]
struct Link {
    bytes_per_s: u64,
    free_ns: u64,
}

impl Link {
    const fn new(bytes_per_s: u64) -> Self {
        Self { bytes_per_s, free_ns: 0 }
    }

    fn time_ns(&self, bytes: u32) -> u64 {
        u64::from(bytes) * 1_000_000_000 / self.bytes_per_s.max(1)
    }

    /// Carries `bytes` that begin to come in at `begin_ns` and have all come in at `in_ns`; returns when they are out.
    /// While it waits for a slow sender it carries what others send.
    fn carry(&mut self, bytes: u32, begin_ns: u64, in_ns: u64) -> u64 {
        self.free_ns = self.free_ns.max(begin_ns) + self.time_ns(bytes);
        self.free_ns.max(in_ns)
    }
}

/// All links. Node 0 is the origin, in a rack of its own when there are several.
#[derive(Debug)]
pub(super) struct Links {
    up: Vec<Link>,
    down: Vec<Link>,
    racks: Option<Racks>,
}

#[derive(Debug)]
struct Racks {
    of: Vec<usize>,
    up: Vec<Link>,
    down: Vec<Link>,
}

impl Links {
    /// `slow` says which nodes send at a tenth.
    pub(super) fn new(scenario: &Scenario, slow: &[bool]) -> Self {
        let up = slow.iter().map(|slow| Link::new(if *slow { scenario.link / 10 } else { scenario.link }));
        let mut up: Vec<Link> = up.collect();
        let mut down = vec![Link::new(scenario.link); slow.len()];
        up[0] = Link::new(scenario.origin_link);
        down[0] = Link::new(scenario.origin_link);
        Self { up, down, racks: (scenario.racks > 1).then(|| Racks::new(scenario)) }
    }

    /// Bytes a second that `node` can send.
    pub(super) fn rate(&self, node: usize) -> u64 {
        self.up[node].bytes_per_s
    }

    /// Node `from` begins to send now. Returns when its link is free again, and when `to` has everything.
    pub(super) fn send(&mut self, from: usize, to: usize, bytes: u32, now_ns: u64) -> (u64, u64) {
        let sent_ns = self.up[from].carry(bytes, now_ns, now_ns);
        let mut in_ns = sent_ns;
        if let Some(racks) = &mut self.racks {
            let (source, target) = (racks.of[from], racks.of[to]);
            if source != target {
                in_ns = racks.up[source].carry(bytes, now_ns, in_ns);
                in_ns = racks.down[target].carry(bytes, now_ns, in_ns);
            }
        }
        (sent_ns, self.down[to].carry(bytes, now_ns, in_ns))
    }
}

impl Racks {
    fn new(scenario: &Scenario) -> Self {
        let racks = scenario.racks as usize;
        let of: Vec<usize> =
            (0..=scenario.nodes).map(|node| if node == 0 { racks } else { node as usize % racks }).collect();
        let share = f64::from(scenario.nodes) / racks as f64 / scenario.oversubscription.max(0.01);
        let bytes_per_s = bytes_per_s(scenario.link as f64 * share).max(scenario.link);
        let mut up = vec![Link::new(bytes_per_s); racks];
        up.push(Link::new(scenario.origin_link));
        Self { of, down: up.clone(), up }
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "saturates, which is what is wanted"
)]
fn bytes_per_s(value: f64) -> u64 {
    value as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_goes_through_at_the_rate_of_the_slowest_link_and_queues_in_order() {
        let scenario = Scenario { nodes: 2, link: 1000, origin_link: 4000, ..Scenario::default() };
        let mut links = Links::new(&scenario, &[false, false, true]);
        assert_eq!(links.send(0, 1, 1000, 0), (250_000_000, 1_000_000_000));
        assert_eq!(links.send(0, 1, 1000, 250_000_000), (500_000_000, 2_000_000_000));
        assert_eq!(links.send(2, 1, 100, 0).0, 1_000_000_000);
    }

    #[test]
    fn an_oversubscribed_rack_is_shared_by_its_nodes() {
        let scenario = Scenario {
            nodes: 40,
            racks: 2,
            oversubscription: 4.0,
            link: 1000,
            origin_link: 1000,
            ..Scenario::default()
        };
        let mut links = Links::new(&scenario, &[false; 41]);
        // Each rack carries 5,000 bytes a second: ten nodes at once, to ten others, are done after two seconds.
        let across = (0..10).map(|node| links.send(2 + 2 * node, 1 + 2 * node, 1000, 0).1).max();
        assert_eq!(across, Some(2_000_000_000));
        assert_eq!(links.send(22, 24, 1000, 0).1, 1_000_000_000, "within a rack the core does not matter");
    }
}
