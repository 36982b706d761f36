//! libvirt in a program that was built without it (`--no-default-features`): every call says so.

use super::{LibvirtError, LibvirtGuest};
use crate::control::Owner;
use crate::name::HostName;
use crate::qemu::ShutDown;

/// A libvirt daemon that this program cannot talk to.
#[derive(Debug, Clone)]
pub struct Libvirt;

impl Libvirt {
    /// The daemon at some URI.
    pub fn new(_uri: impl Into<String>) -> Self {
        Self
    }

    /// The same with another limit for every call.
    #[must_use]
    pub fn with_deadline(self, _deadline: std::time::Duration) -> Self {
        self
    }

    /// Not built.
    pub async fn launch(&self, _xml: String) -> Result<(), LibvirtError> {
        Err(LibvirtError::NotBuilt)
    }

    /// Not built.
    pub async fn shut_down(&self, _uuid: &str) -> Result<ShutDown, LibvirtError> {
        Err(LibvirtError::NotBuilt)
    }

    /// Not built.
    pub async fn would_lose(&self, _uuid: &str, _name: &HostName) -> Result<Option<String>, LibvirtError> {
        Err(LibvirtError::NotBuilt)
    }

    /// Not built.
    pub async fn destroy(&self, _uuid: &str) -> Result<(), LibvirtError> {
        Err(LibvirtError::NotBuilt)
    }

    /// Not built.
    pub async fn is_running(&self, _uuid: &str) -> Result<bool, LibvirtError> {
        Err(LibvirtError::NotBuilt)
    }

    /// Not built.
    pub async fn stands_still(&self, _uuid: &str) -> Result<Option<&'static str>, LibvirtError> {
        Err(LibvirtError::NotBuilt)
    }

    /// Not built.
    pub async fn delete(&self, _uuid: &str) -> Result<(), LibvirtError> {
        Err(LibvirtError::NotBuilt)
    }

    /// Not built.
    pub async fn find(&self, _uuid: &str, _taps: Vec<String>) -> Result<Option<LibvirtGuest>, LibvirtError> {
        Err(LibvirtError::NotBuilt)
    }

    /// Not built.
    pub async fn all(&self) -> Result<Vec<(String, String)>, LibvirtError> {
        Err(LibvirtError::NotBuilt)
    }

    /// Not built.
    pub async fn qemu_owner(&self) -> Result<Option<Owner>, LibvirtError> {
        Err(LibvirtError::NotBuilt)
    }

    /// Not built.
    pub async fn look_at(&self, _emulator: String) -> Result<(), LibvirtError> {
        Err(LibvirtError::NotBuilt)
    }
}
