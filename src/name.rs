//! Names that people give: the one rule for images, and the one for VMs, hosts, networks and groups.
//!
//! A name is checked once, where it enters, and is then a type. Nothing that is not one of these types becomes part
//! of a path, an export name or a domain's XML.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A name that breaks the rule; says which rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{given}' is not a valid {kind} name: use {rule}")]
pub struct NameError {
    given: String,
    kind: &'static str,
    rule: &'static str,
}

macro_rules! name_type {
    ($(#[$doc:meta])* $type:ident, $kind:literal, $rule:literal, $valid:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $type(String);

        impl $type {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $type {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                let valid: fn(&[u8]) -> bool = $valid;
                if valid(text.as_bytes()) {
                    Ok(Self(text.to_owned()))
                } else {
                    Err(NameError { given: text.chars().take(80).collect(), kind: $kind, rule: $rule })
                }
            }
        }

        impl TryFrom<String> for $type {
            type Error = NameError;

            fn try_from(text: String) -> Result<Self, NameError> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(name: $type) -> Self {
                name.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
    };
}

name_type!(
    /// The name of an image: `[a-z0-9][a-z0-9._-]{0,62}`.
    ImageName,
    "image",
    "1 to 63 of a-z 0-9 . _ - and begin with a letter or digit",
    |b| (1..=63).contains(&b.len())
        && b[0].is_ascii_alphanumeric()
        && b.iter().all(|c| matches!(c, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-'))
);

name_type!(
    /// The name of a VM, host, node, network or group: `[a-z0-9][a-z0-9-]{0,62}`.
    HostName,
    "VM or host",
    "1 to 63 of a-z 0-9 - and begin with a letter or digit",
    |b| (1..=63).contains(&b.len())
        && b[0] != b'-'
        && b.iter().all(|c| matches!(c, b'a'..=b'z' | b'0'..=b'9' | b'-'))
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_could_leave_a_folder() {
        for bad in ["", "..", ".a", "a/b", "A", "a b", "a\0", "-a", &"a".repeat(64)] {
            assert!(bad.parse::<ImageName>().is_err(), "{bad:?}");
        }
        for good in ["a", "debian-12.5_fast", "0"] {
            assert!(good.parse::<ImageName>().is_ok(), "{good:?}");
        }
        assert!("vm.1".parse::<HostName>().is_err());
        assert!("-rf".parse::<HostName>().is_err());
        assert!("vm-1".parse::<HostName>().is_ok());
    }

    #[test]
    fn is_checked_when_it_is_deserialized() {
        assert!(serde_json::from_str::<ImageName>("\"../x\"").is_err());
    }
}
