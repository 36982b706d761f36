//! An asynchronous NBD server and client: structured replies, block status, TLS, many requests in flight.
//!
//! [`disk::Disk`] is what an export shows; [`layers`] are disks to begin with; [`server::Server`] serves them,
//! [`client::Client`] reads them from afar. The codecs ([`handshake`], [`request`], [`chunk`]) take bytes and give bytes.

#![forbid(unsafe_code)]

pub mod chunk;
pub mod client;
mod connection;
pub mod consts;
pub mod disk;
pub mod handshake;
pub mod layers;
pub mod limits;
mod negotiate;
pub mod request;
pub mod server;
mod tcp;

pub use client::Client;
pub use disk::{Attempt, BoxFuture, Disk, Features, SharedDisk, StatusExtent, ZeroFlags};
pub use limits::{Limits, SharedLimits};
pub use server::{Export, ExportStats, Exports, OpenError, Server, Tls};

/// The README's program compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
