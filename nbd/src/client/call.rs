//! A request of a client, and whether a server takes such.

use std::io;

use super::negotiation::ExportDescription;
use crate::consts::{command, command_flag, flag};

/// A request to be sent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Call<'a> {
    pub(super) command: u16,
    pub(super) flags: u16,
    pub(super) offset: u64,
    pub(super) length: u64,
    pub(super) payload: &'a [u8],
}

impl Call<'_> {
    /// A request for no bytes.
    pub(super) const fn new(command: u16, offset: u64) -> Self {
        Self { command, flags: 0, offset, length: 0, payload: &[] }
    }

    /// Whether its effect is to be flushed.
    pub(super) const fn leaves_changes(&self) -> bool {
        matches!(self.command, command::WRITE | command::WRITE_ZEROES) && self.flags & command_flag::FUA == 0
    }

    /// Whether it may be sent to a server that says this of its export.
    pub(super) fn check(&self, export: &ExportDescription) -> io::Result<()> {
        let invalid = |reason: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
        if self.offset.checked_add(self.length).is_none_or(|end| end > export.size) {
            return invalid("the range leaves the export");
        }
        let carries_data = matches!(self.command, command::READ | command::WRITE);
        if carries_data && self.length > u64::from(export.block_sizes.2) {
            return invalid("more than the NBD server takes at once");
        }
        let of_command = match self.command {
            command::FLUSH => flag::SEND_FLUSH,
            command::TRIM => flag::SEND_TRIM,
            command::WRITE_ZEROES => flag::SEND_WRITE_ZEROES,
            command::CACHE => flag::SEND_CACHE,
            _ => 0,
        };
        let of_flags = [
            (command_flag::FUA, flag::SEND_FUA),
            (command_flag::DF, flag::SEND_DF),
            (command_flag::FAST_ZERO, flag::SEND_FAST_ZERO),
        ];
        let wanted = |(own, server)| if self.flags & own == 0 { 0 } else { server };
        let needed = of_flags.into_iter().map(wanted).fold(of_command, |all: u16, one: u16| all | one);
        let knows_contexts = self.command != command::BLOCK_STATUS || export.allocation.is_some();
        if export.flags & needed != needed || !knows_contexts {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "the NBD server does not offer that"));
        }
        Ok(())
    }
}
