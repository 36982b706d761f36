//! How an image comes to a node while guests already read it, and is passed on.
//!
//! Per image one [`Engine`]: the *stream* brings the boot cache in order, *demand* what a guest waits for and the
//! stream does not bring, *fill* the rest. All three ask the same [`sources`], check what comes against the image's
//! digests ([`receive`]), and write the same `LocalCache`, which wakes the readers. `crate::peer::server` gives the
//! same holding to others from the first frame on. When everything is here, nobody is needed any more.
//!
//! [`pull()`] makes the image's folder from what the first source describes, or takes up a folder that is there.
//!
//! Choosing whom to ask for what is not done here but in `crate::choose`.

pub mod arrivals;
pub mod counters;
mod demand;
pub mod engine;
mod fill;
mod flight;
pub mod guests;
mod keeping;
pub mod missed;
pub mod pull;
mod receive;
mod request;
mod similar;
mod source;
mod sources;
mod stream;

pub use arrivals::{Arrivals, Plan};
pub use counters::{Counters, Kind};
pub use engine::{Engine, Options, Progress};
pub use pull::{Pin, PullError, Pulled, Target, pull};
pub use similar::Others;
