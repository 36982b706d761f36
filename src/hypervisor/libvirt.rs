//! Guests by libvirt.
//!
//! Every call of libvirt's C library blocks, some without limit when its daemon hangs: each runs on a thread of its
//! own, with a deadline, on a connection of its own. A thread whose call never ends is left behind.

use std::time::Duration;

use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::{Error, clear_error_callback};
use virt::sys;

use crate::control::Owner;
use crate::name::HostName;

/// Longest wait for a call. Destroying a guest that hangs takes libvirt 10 s.
const DEADLINE: Duration = Duration::from_secs(60);

/// What libvirt did not do, and why.
#[derive(Debug, thiserror::Error)]
pub enum LibvirtError {
    /// It cannot be reached.
    #[error("libvirt at {uri} cannot be reached ({reason}): start libvirtd, or do without it (--qemu)")]
    Unreachable {
        /// Where.
        uri: String,
        /// What libvirt says.
        reason: String,
    },
    /// It refused.
    #[error("libvirt: {0}")]
    Refused(String),
    /// It does not answer.
    #[error("libvirt at {0} did not answer within {DEADLINE:?}: see whether libvirtd hangs")]
    TimedOut(String),
}

/// A libvirt daemon.
#[derive(Debug, Clone)]
pub struct Libvirt {
    uri: String,
}

impl Libvirt {
    /// The daemon at `uri`, such as `qemu:///system`. Nothing is connected yet.
    pub fn new(uri: impl Into<String>) -> Self {
        clear_error_callback();
        Self { uri: uri.into() }
    }

    /// Defines a domain from XML and starts it; returns when its QEMU runs. A domain that does not start is undefined.
    pub async fn launch(&self, xml: String) -> Result<(), LibvirtError> {
        self.call(move |connect| {
            let domain = connect.define_domain_xml(&xml).map_err(refused)?;
            domain.create().map_err(|error| {
                let _ = domain.undefine();
                refused(error)
            })
        })
        .await
    }

    /// Asks the guest to shut down; true if there was one running.
    pub async fn shut_down(&self, name: &HostName) -> Result<bool, LibvirtError> {
        self.with_domain(name, |domain| match domain.shutdown() {
            Err(error) if is(&error, sys::VIR_ERR_OPERATION_INVALID) => Ok(false),
            other => other.map(|()| true).map_err(refused),
        })
        .await
        .map(|found| found.unwrap_or(false))
    }

    /// Whether the guest runs.
    pub async fn is_running(&self, name: &HostName) -> Result<bool, LibvirtError> {
        let active = self.with_domain(name, |domain| domain.is_active().map_err(refused)).await?;
        Ok(active.unwrap_or(false))
    }

    /// Ends the guest at once and forgets it. What is not there is no error.
    pub async fn delete(&self, name: &HostName) -> Result<(), LibvirtError> {
        let gone =
            |error: &Error| is(error, sys::VIR_ERR_OPERATION_INVALID) || is(error, sys::VIR_ERR_NO_DOMAIN);
        self.with_domain(name, move |domain| {
            for result in [domain.destroy(), domain.undefine()] {
                match result {
                    Err(error) if !gone(&error) => return Err(refused(error)),
                    _ => {}
                }
            }
            Ok(())
        })
        .await
        .map(drop)
    }

    /// The user that QEMU runs as, where libvirt tells.
    pub async fn qemu_owner(&self) -> Result<Option<Owner>, LibvirtError> {
        self.call(|connect| Ok(owner(&connect.capabilities().map_err(refused)?))).await
    }

    async fn with_domain<T, F>(&self, name: &HostName, work: F) -> Result<Option<T>, LibvirtError>
    where
        T: Send + 'static,
        F: FnOnce(&Domain) -> Result<T, LibvirtError> + Send + 'static,
    {
        let name = name.to_string();
        self.call(move |connect| match connect.lookup_domain_by_name(&name) {
            Ok(domain) => work(&domain).map(Some),
            Err(error) if is(&error, sys::VIR_ERR_NO_DOMAIN) => Ok(None),
            Err(error) => Err(refused(error)),
        })
        .await
    }

    async fn call<T, F>(&self, work: F) -> Result<T, LibvirtError>
    where
        T: Send + 'static,
        F: FnOnce(&Connect) -> Result<T, LibvirtError> + Send + 'static,
    {
        let uri = self.uri.clone();
        let (send, receive) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || {
            let result = match Connect::open(Some(&uri)) {
                Ok(connect) => work(&connect),
                Err(error) => Err(LibvirtError::Unreachable { uri, reason: error.message().to_owned() }),
            };
            // Whoever asked may have given up.
            let _ = send.send(result);
        });
        match tokio::time::timeout(DEADLINE, receive).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(LibvirtError::Refused("its client library failed".to_owned())),
            Err(_) => Err(LibvirtError::TimedOut(self.uri.clone())),
        }
    }
}

fn refused(error: Error) -> LibvirtError {
    LibvirtError::Refused(error.message().to_owned())
}

fn is(error: &Error, code: sys::virErrorNumber) -> bool {
    error.code().to_raw() == code
}

/// The DAC label of QEMU processes in libvirt's capabilities: `<baselabel type='qemu'>+64055:+107</baselabel>`.
fn owner(capabilities: &str) -> Option<Owner> {
    let label = regex::Regex::new(r"<baselabel type='(?:qemu|kvm)'>\+(\d+):\+(\d+)</baselabel>")
        .expect("the pattern is valid")
        .captures(capabilities)?;
    Some(Owner { uid: label[1].parse().ok()?, gid: label[2].parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_owner_is_read_from_the_capabilities() {
        let text = "<model>dac</model>\n<baselabel type='kvm'>+64055:+106</baselabel>";
        assert_eq!(owner(text), Some(Owner { uid: 64055, gid: 106 }));
        assert_eq!(owner("<host/>"), None);
    }

    #[tokio::test]
    async fn a_daemon_that_is_not_there_is_named() {
        let libvirt = Libvirt::new("qemu+unix:///system?socket=/nowhere/sock");
        let error = libvirt.is_running(&"vm".parse().unwrap()).await.unwrap_err().to_string();
        assert!(error.contains("cannot be reached") && error.contains("--qemu"), "{error}");
    }
}
