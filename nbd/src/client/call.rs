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
        // The last block may be short.
        let (block, end) = (u64::from(export.block_sizes.0.max(1)), self.offset + self.length);
        if !self.offset.is_multiple_of(block) || (!end.is_multiple_of(block) && end != export.size) {
            return invalid("the NBD server takes whole blocks only");
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::Style;

    #[test]
    fn only_the_end_of_the_export_may_lie_within_a_block() {
        let export = |least| ExportDescription {
            size: 10_000,
            flags: flag::SEND_TRIM,
            block_sizes: (least, 4096, 1 << 20),
            style: Style::Simple,
            allocation: None,
        };
        for (offset, length, taken) in
            [(0, 4096, true), (8192, 1808, true), (0, 10_000, true), (5000, 5000, false), (8192, 1000, false)]
        {
            for command in [command::READ, command::WRITE, command::TRIM] {
                let call = Call { length, ..Call::new(command, offset) };
                assert_eq!(call.check(&export(4096)).is_ok(), taken, "{length} bytes at {offset}");
                // None is a server that does not know better.
                assert!(call.check(&export(0)).is_ok());
            }
        }
    }
}
