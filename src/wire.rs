//! What crosses a TCP or control connection between bootcache processes: MFD frames.
//!
//! [`frame`] turns bytes into frames and back and does no I/O; [`io`] moves frames over a connection; [`link`] is a
//! connection of requests and replies, from either end. [`cluster`] is what controller, agents and users say to each
//! other, and [`warnings`] what is told of requests that make no sense; `hall` is where connections wait that have said nothing
//! yet, `reception` how the control plane takes them. What peers say is in `crate::peer`, what the local control socket carries in `crate::control`.

pub mod cluster;
pub mod frame;
pub(crate) mod hall;
pub mod io;
pub mod link;
pub(crate) mod reception;
pub mod warnings;
