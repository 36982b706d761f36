//! bootcache boots virtual machines, and starts containers, on many hosts before their disk image has arrived.
//!
//! Modules in reading order: the vocabulary ([`block`], [`digest`], [`name`]), then what crosses a network ([`wire`]).

pub mod agent;
pub mod analyze;
pub mod attach;
pub mod block;
pub mod boot_cache;
pub mod choose;
pub mod control;
pub mod controller;
pub mod digest;
pub mod hypervisor;
pub mod image;
pub mod image_disk;
pub mod load;
pub mod local_cache;
pub mod name;
pub mod network;
pub mod overlay;
pub mod peer;
pub mod plan;
pub mod qemu;
pub mod record;
pub mod replay;
pub mod serve;
pub mod simulate;
pub mod store;
pub mod tls;
pub mod trace;
pub mod transfer;
pub mod vm;
pub mod web;
pub mod wire;
