//! The addresses of a network.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A subnet: its network's address and the length of its prefix, such as `10.0.0.0/24`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Subnet {
    first: u128,
    prefix: u8,
    is_v4: bool,
}

/// Text that is not a subnet.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubnetError {
    /// Not of the form.
    #[error("'{0}' is not a subnet: write ADDRESS/PREFIX, such as 10.0.0.0/24")]
    Form(String),
    /// Bits beyond the prefix are set.
    #[error("{given} has bits beyond its prefix: the network is {network}")]
    HostBits {
        /// What was written.
        given: String,
        /// What was meant.
        network: String,
    },
}

impl Subnet {
    /// The length of its prefix in bits.
    pub const fn prefix(&self) -> u8 {
        self.prefix
    }

    /// The number of bits that tell its hosts apart.
    const fn host_bits(&self) -> u32 {
        (if self.is_v4 { 32 } else { 128 }) - self.prefix as u32
    }

    /// The network's own address.
    pub fn network(&self) -> IpAddr {
        self.address(self.first)
    }

    /// Whether `address` is one that a host in it may have: not the network's, nor the broadcast address.
    pub fn has_host(&self, address: IpAddr) -> bool {
        self.number(address).is_some_and(|number| number != 0 && !(self.is_v4 && number == self.hosts() + 1))
    }

    /// Whether the two have an address in common.
    pub const fn overlaps(&self, other: &Self) -> bool {
        if self.is_v4 != other.is_v4 {
            return false;
        }
        let bits = if self.host_bits() > other.host_bits() { self.host_bits() } else { other.host_bits() };
        bits == 128 || self.first >> bits == other.first >> bits
    }

    /// How many hosts it can have.
    pub const fn hosts(&self) -> u128 {
        let bits = self.host_bits();
        let all = if bits >= 127 { u128::MAX } else { 1 << bits };
        if self.is_v4 { all.saturating_sub(2) } else { all - 1 }
    }

    /// The address of host `number`, counted from 1.
    pub fn host(&self, number: u128) -> Option<IpAddr> {
        (number >= 1 && number <= self.hosts()).then(|| self.address(self.first + number))
    }

    /// The number of a host, counted from 1; 0 is the network itself.
    pub fn number(&self, address: IpAddr) -> Option<u128> {
        let (value, is_v4) = match address {
            IpAddr::V4(ip) => (u128::from(u32::from(ip)), true),
            IpAddr::V6(ip) => (u128::from(ip), false),
        };
        let last = match self.host_bits() {
            128 => u128::MAX,
            bits => self.first + ((1 << bits) - 1),
        };
        (is_v4 == self.is_v4 && (self.first..=last).contains(&value)).then(|| value - self.first)
    }

    fn address(&self, value: u128) -> IpAddr {
        if self.is_v4 {
            IpAddr::V4(Ipv4Addr::from(u32::try_from(value).expect("an IPv4 address has 32 bits")))
        } else {
            IpAddr::V6(Ipv6Addr::from(value))
        }
    }
}

impl FromStr for Subnet {
    type Err = SubnetError;

    fn from_str(text: &str) -> Result<Self, SubnetError> {
        let form = || SubnetError::Form(text.chars().take(80).collect());
        let (address, prefix) = text.split_once('/').ok_or_else(form)?;
        let address: IpAddr = address.parse().map_err(|_| form())?;
        let prefix: u8 = prefix.parse().map_err(|_| form())?;
        let (value, is_v4, length) = match address {
            IpAddr::V4(ip) => (u128::from(u32::from(ip)), true, 32),
            IpAddr::V6(ip) => (u128::from(ip), false, 128),
        };
        // A prefix of 0, 31 or 32 (127 or 128) leaves no network that instances could share.
        if prefix == 0 || prefix > length - 2 {
            return Err(form());
        }
        let bits = u32::from(length - prefix);
        let first = value >> bits << bits;
        let subnet = Self { first, prefix, is_v4 };
        if first == value {
            Ok(subnet)
        } else {
            Err(SubnetError::HostBits { given: text.to_owned(), network: subnet.to_string() })
        }
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network(), self.prefix)
    }
}

impl TryFrom<String> for Subnet {
    type Error = SubnetError;

    fn try_from(text: String) -> Result<Self, SubnetError> {
        text.parse()
    }
}

impl From<Subnet> for String {
    fn from(subnet: Subnet) -> Self {
        subnet.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subnet(text: &str) -> Subnet {
        text.parse().unwrap()
    }

    #[test]
    fn hosts_are_counted_from_one() {
        let lan = subnet("10.0.0.0/24");
        assert_eq!(
            (lan.hosts(), lan.host(1), lan.host(254)),
            (254, Some("10.0.0.1".parse().unwrap()), Some("10.0.0.254".parse().unwrap()))
        );
        assert_eq!((lan.host(0), lan.host(255)), (None, None));
        assert_eq!(lan.number("10.0.0.7".parse().unwrap()), Some(7));
        assert_eq!(lan.number("10.0.1.7".parse().unwrap()), None);
        let six = subnet("fd00::/64");
        assert_eq!(six.host(255), Some("fd00::ff".parse().unwrap()));
        assert_eq!(six.number("10.0.0.7".parse().unwrap()), None);
    }

    #[test]
    fn the_network_and_broadcast_addresses_are_no_hosts() {
        let lan = subnet("10.0.0.0/24");
        for (address, is_host) in
            [("10.0.0.0", false), ("10.0.0.1", true), ("10.0.0.255", false), ("10.0.1.1", false)]
        {
            assert_eq!(lan.has_host(address.parse().unwrap()), is_host, "{address}");
        }
    }

    #[test]
    fn what_is_no_subnet_is_refused() {
        for bad in
            ["", "10.0.0.0", "10.0.0.0/0", "10.0.0.0/31", "10.0.0.0/33", "x/8", "fd00::/127", "10.0.0.1/24"]
        {
            assert!(bad.parse::<Subnet>().is_err(), "{bad}");
        }
        assert_eq!(subnet("0.0.0.0/1").hosts(), (1 << 31) - 2);
        assert_eq!(subnet("8000::/1").number("ffff::".parse().unwrap()), Some(0x7fff << 112));
    }

    #[test]
    fn subnets_overlap_when_one_holds_the_other() {
        assert!(subnet("10.0.0.0/8").overlaps(&subnet("10.1.0.0/16")));
        assert!(!subnet("10.0.0.0/24").overlaps(&subnet("10.0.1.0/24")));
        assert!(!subnet("10.0.0.0/24").overlaps(&subnet("fd00::/64")));
    }
}
