//! Transmission requests: bytes to [`Request`], and the one function that holds every rule about them.
//!
//! Pure. NBD specification, "Request message" and the sections of the commands.

use crate::consts::{EXTENDED_REQUEST_MAGIC, Errno, REQUEST_MAGIC, command, command_flag};
use crate::disk::Features;

/// Bytes of a compact request.
pub const COMPACT_BYTES: usize = 28;
/// Bytes of an extended request.
pub const EXTENDED_BYTES: usize = 32;

/// A request as it stood on the wire; nothing about it is believed yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// `NBD_CMD_FLAG_*`.
    pub flags: u16,
    /// `NBD_CMD_*`.
    pub command: u16,
    /// Repeated in the reply.
    pub cookie: u64,
    /// Bytes.
    pub offset: u64,
    /// Bytes: of payload, or of effect.
    pub length: u64,
    /// Bytes of payload that follow the request.
    pub payload: u64,
}

/// The connection does not speak NBD any more and must be closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a request begins with {0:#010x}")]
pub struct BadMagic(pub u32);

impl Request {
    /// Reads one request from the front of `bytes`; `None` asks for more bytes.
    pub fn parse(bytes: &[u8], extended: bool) -> Result<Option<Self>, BadMagic> {
        let (magic, size) =
            if extended { (EXTENDED_REQUEST_MAGIC, EXTENDED_BYTES) } else { (REQUEST_MAGIC, COMPACT_BYTES) };
        if let Some(first) = bytes.first_chunk::<4>() {
            let found = u32::from_be_bytes(*first);
            if found != magic {
                return Err(BadMagic(found));
            }
        }
        let Some(bytes) = bytes.get(..size) else { return Ok(None) };
        let length = if extended { u64_at(bytes, 24) } else { u32_at(bytes, 24).into() };
        let (flags, command) = (u16_at(bytes, 4), u16_at(bytes, 6));
        let has_payload =
            if extended { flags & command_flag::PAYLOAD_LEN != 0 } else { command == command::WRITE };
        Ok(Some(Self {
            flags,
            command,
            cookie: u64_at(bytes, 8),
            offset: u64_at(bytes, 16),
            length,
            payload: if has_payload { length } else { 0 },
        }))
    }

    /// Appends the request as it stands on the wire; false if its length does not fit compact headers.
    #[must_use]
    pub fn encode(&self, out: &mut Vec<u8>, extended: bool) -> bool {
        let compact = u32::try_from(self.length);
        if !extended && compact.is_err() {
            return false;
        }
        out.extend_from_slice(&if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC }.to_be_bytes());
        out.extend_from_slice(&self.flags.to_be_bytes());
        out.extend_from_slice(&self.command.to_be_bytes());
        out.extend_from_slice(&self.cookie.to_be_bytes());
        out.extend_from_slice(&self.offset.to_be_bytes());
        match compact {
            Ok(length) if !extended => out.extend_from_slice(&length.to_be_bytes()),
            _ => out.extend_from_slice(&self.length.to_be_bytes()),
        }
        true
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes were sliced"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes were sliced"))
}

/// What a connection has agreed on, as far as the rules about requests depend on it.
#[derive(Debug, Clone, Copy)]
pub struct Terms {
    /// The disk's size in bytes.
    pub size: u64,
    /// What it can do.
    pub features: Features,
    /// Structured replies were negotiated.
    pub structured: bool,
    /// Extended headers were negotiated.
    pub extended: bool,
    /// Metadata contexts were selected.
    pub contexts: bool,
    /// Largest payload either way, in bytes.
    pub payload_max: u32,
}

/// A request that keeps every rule; lengths are not zero and lie within the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Action {
    Read {
        offset: u64,
        length: u32,
        dont_fragment: bool,
    },
    Write {
        offset: u64,
        length: u32,
        fua: bool,
    },
    Flush,
    Trim {
        offset: u64,
        length: u64,
        fua: bool,
    },
    Zero {
        offset: u64,
        length: u64,
        fua: bool,
        no_hole: bool,
        fast: bool,
    },
    Cache {
        offset: u64,
        length: u64,
    },
    Status {
        offset: u64,
        length: u64,
        one: bool,
    },
    /// Keeps the rules and does nothing: a length of zero, of which the specification says that the effect is undefined.
    Nothing,
    Disconnect,
}

/// Every rule about a request. Past this nobody checks again.
///
/// # Errors
///
/// The error number that the client is told.
pub fn check(request: &Request, terms: &Terms) -> Result<Action, Errno> {
    let Request { flags, command, offset, length, .. } = *request;
    let features = terms.features;
    let allowed = match command {
        command::READ if terms.structured => command_flag::DF,
        command::READ | command::DISC => 0,
        command::WRITE if terms.extended => fua_flag(features) | command_flag::PAYLOAD_LEN,
        // nbd specification: FUA is allowed on every command once the server has SEND_FUA.
        command::WRITE | command::TRIM | command::FLUSH | command::CACHE => fua_flag(features),
        command::WRITE_ZEROES => {
            let fast = if features.fast_zero { command_flag::FAST_ZERO } else { 0 };
            fua_flag(features) | command_flag::NO_HOLE | fast
        }
        command::BLOCK_STATUS if terms.contexts => command_flag::REQ_ONE | fua_flag(features),
        _ => return Err(Errno::Inval),
    };
    let allowed = if command == command::READ { allowed | fua_flag(features) } else { allowed };
    if command == command::DISC {
        return Ok(Action::Disconnect);
    }
    if flags & !allowed != 0 {
        return Err(Errno::Inval);
    }
    if command == command::WRITE && terms.extended && flags & command_flag::PAYLOAD_LEN == 0 {
        return Err(Errno::Inval);
    }
    if command == command::FLUSH {
        let plain = offset == 0 && length == 0;
        return if features.flush && plain { Ok(Action::Flush) } else { Err(Errno::Inval) };
    }

    let writes = matches!(command, command::WRITE | command::TRIM | command::WRITE_ZEROES);
    if writes && features.read_only {
        return Err(Errno::Perm);
    }
    let supported = match command {
        command::TRIM => features.trim,
        command::WRITE_ZEROES => features.zero,
        command::CACHE => features.prefetch,
        _ => true,
    };
    if !supported {
        return Err(Errno::Inval);
    }
    let inside = offset.checked_add(length).is_some_and(|end| end <= terms.size);
    if !inside {
        let wants_space = matches!(command, command::WRITE | command::WRITE_ZEROES);
        return Err(if wants_space { Errno::NoSpc } else { Errno::Inval });
    }
    // The last block of a disk may be short.
    let parts = u64::from(features.block_min).saturating_sub(1);
    if offset & parts != 0 || (length & parts != 0 && offset + length != terms.size) {
        return Err(Errno::Inval);
    }
    if length == 0 {
        return Ok(Action::Nothing);
    }

    let payload = || match u32::try_from(length) {
        Ok(length) if length <= terms.payload_max => Ok(length),
        _ => Err(Errno::Overflow),
    };
    let has = |flag| flags & flag != 0;
    let fua = has(command_flag::FUA);
    Ok(match command {
        command::READ => Action::Read { offset, length: payload()?, dont_fragment: has(command_flag::DF) },
        command::WRITE => Action::Write { offset, length: payload()?, fua },
        command::TRIM => Action::Trim { offset, length, fua },
        command::CACHE => Action::Cache { offset, length },
        command::WRITE_ZEROES => Action::Zero {
            offset,
            length,
            fua,
            no_hole: has(command_flag::NO_HOLE),
            fast: has(command_flag::FAST_ZERO),
        },
        _ => Action::Status { offset, length, one: has(command_flag::REQ_ONE) },
    })
}

fn fua_flag(features: Features) -> u16 {
    if features.fua { command_flag::FUA } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn terms() -> Terms {
        Terms {
            size: 1 << 20,
            features: Features::WRITABLE,
            structured: true,
            extended: false,
            contexts: true,
            payload_max: 32 << 20,
        }
    }

    fn request(command: u16, flags: u16, offset: u64, length: u64) -> Request {
        Request { flags, command, cookie: 1, offset, length, payload: 0 }
    }

    #[test]
    fn asks_for_more_on_every_prefix() {
        let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend([0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0x20, 0]);
        for end in 0..COMPACT_BYTES {
            assert_eq!(Request::parse(&bytes[..end], false), Ok(None), "{end}");
        }
        let parsed = Request::parse(&bytes, false).unwrap().unwrap();
        assert_eq!(parsed, Request { payload: 0x2000, ..request(command::WRITE, 0, 0x1000, 0x2000) }.with(9));
        assert!(Request::parse(b"GET ", false).is_err());
    }

    impl Request {
        fn with(mut self, cookie: u64) -> Self {
            self.cookie = cookie;
            self
        }
    }

    #[test]
    fn ranges_that_leave_the_disk_or_overflow_are_refused() {
        for (offset, length) in [(1 << 20, 1), (0, (1 << 20) + 1), (u64::MAX, 2), (u64::MAX, u64::MAX)] {
            for (command, errno) in [
                (command::READ, Errno::Inval),
                (command::TRIM, Errno::Inval),
                (command::BLOCK_STATUS, Errno::Inval),
                (command::WRITE, Errno::NoSpc),
                (command::WRITE_ZEROES, Errno::NoSpc),
            ] {
                assert_eq!(check(&request(command, 0, offset, length), &terms()), Err(errno), "{command}");
            }
        }
    }

    #[test]
    fn a_read_only_disk_refuses_everything_that_writes() {
        let terms = Terms { features: Features::READ_ONLY, ..terms() };
        for command in [command::WRITE, command::TRIM, command::WRITE_ZEROES] {
            assert_eq!(check(&request(command, 0, 0, 512), &terms), Err(Errno::Perm));
        }
    }

    #[test]
    fn unknown_commands_and_flags_are_invalid() {
        assert_eq!(check(&request(8, 0, 0, 1), &terms()), Err(Errno::Inval));
        assert_eq!(check(&request(command::READ, 1 << 9, 0, 1), &terms()), Err(Errno::Inval));
        assert_eq!(check(&request(command::WRITE, command_flag::DF, 0, 1), &terms()), Err(Errno::Inval));
    }

    #[test]
    fn fua_is_taken_on_every_command_where_it_is_offered() {
        for command in [0, 1, 3, 4, 5, 6, 7] {
            let (offset, length) = if command == command::FLUSH { (0, 0) } else { (0, 512) };
            let request = request(command, command_flag::FUA, offset, length);
            let offered = Features { prefetch: true, ..Features::WRITABLE };
            assert!(check(&request, &Terms { features: offered, ..terms() }).is_ok(), "{command}");
            let not_offered = Features { fua: false, ..offered };
            assert_eq!(
                check(&request, &Terms { features: not_offered, ..terms() }),
                Err(Errno::Inval),
                "{command}"
            );
        }
    }

    #[test]
    fn only_the_end_of_the_disk_may_lie_within_a_block() {
        let features = Features { block_min: 4096, ..Features::WRITABLE };
        let terms = Terms { size: 10_000, features, ..terms() };
        for (offset, length, taken) in
            [(0, 4096, true), (8192, 1808, true), (0, 10_000, true), (5000, 5000, false), (8192, 1000, false)]
        {
            let result = check(&request(command::READ, 0, offset, length), &terms);
            assert_eq!(result.is_ok(), taken, "{length} bytes at {offset}");
        }
    }

    #[test]
    fn payloads_over_the_limit_are_refused_and_effects_are_not() {
        let terms = Terms { size: 1 << 40, ..terms() };
        assert_eq!(check(&request(command::READ, 0, 0, 33 << 20), &terms), Err(Errno::Overflow));
        assert!(check(&request(command::TRIM, 0, 0, 1 << 32), &terms).is_ok());
    }
}
