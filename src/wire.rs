//! What crosses a TCP or control connection between bootcache processes: MFD frames.
//!
//! [`frame`] turns bytes into frames and back and does no I/O; [`io`] moves frames over a connection. What the
//! payloads mean is said where they are used: peers in `crate::peer`, the control plane in `crate::controller` and
//! `crate::agent`, the local control socket in `crate::control`.

pub mod frame;
pub mod io;
