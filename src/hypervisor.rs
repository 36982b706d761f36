//! Hypervisors: who runs guests.
//!
//! [`domain`] describes a guest and writes it as libvirt's XML; [`libvirt`] runs it. A plain QEMU is `crate::qemu`'s.

pub mod domain;
#[cfg(feature = "libvirt")]
pub mod libvirt;
