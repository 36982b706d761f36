//! Node to node: the protocol in which nodes ask each other for images, its client and its server.
//!
//! [`message`] is what is said (docs/peer.md is the same for other languages), [`transport`] who may be spoken to and
//! how, [`connection`] asks, [`server`] answers from a node's [`holding`]s, complete or still arriving. [`fault`] is
//! the layer that makes a server lie, stall or break, for tests.
//!
//! Nothing here decides what to ask whom, and nothing that an answer says is believed here: `crate::transfer` does
//! the one and checks the other.

pub mod catalogue;
pub mod connection;
pub mod fault;
pub mod holding;
mod local_user;
pub mod message;
mod pace;
pub mod server;
pub mod tracker;
pub mod transport;
pub mod uplink;
