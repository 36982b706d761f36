//! Messages of the kernel's `nbd` generic netlink family (Linux `include/uapi/linux/nbd-netlink.h`, version 1).
//!
//! Bytes in, bytes out; what they are sent for is in [`super::netlink`].

use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable, ErrorContext, Nla, NlaBuffer, NlasIterator, Parseable,
    ParseableParametrized,
};
use netlink_packet_generic::{GenlFamily, GenlHeader};

/// A request to the kernel's NBD client, or its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Message {
    /// What is wanted or told.
    pub(super) command: Command,
    /// The details.
    pub(super) attributes: Vec<Attribute>,
}

/// `NBD_CMD_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Command {
    Connect = 1,
    Disconnect = 2,
    Reconfigure = 3,
}

impl Command {
    fn from_byte(byte: u8) -> Option<Self> {
        [Self::Connect, Self::Disconnect, Self::Reconfigure]
            .into_iter()
            .find(|command| *command as u8 == byte)
    }
}

/// `NBD_ATTR_*`. Integers are in the machine's byte order, as netlink has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Attribute {
    /// Which device: X of `/dev/nbdX`.
    Index(u32),
    /// Size in bytes.
    SizeBytes(u64),
    /// Logical block size in bytes.
    BlockSizeBytes(u64),
    /// Seconds after which a request is tried on another connection; 0 for never.
    Timeout(u64),
    /// The transmission flags of the NBD specification.
    ServerFlags(u64),
    /// `NBD_CFLAG_*`.
    ClientFlags(u64),
    /// Connected sockets, as descriptors of the sender.
    Sockets(Vec<u32>),
    /// Seconds that requests wait for a new connection when all are dead.
    DeadConnectionTimeout(u64),
    /// A text that a reconnecting client must repeat; also shown in `/sys/block/nbdX/backend`. Linux 5.14.
    Backend(String),
    /// Something a newer kernel tells.
    Other(DefaultNla),
}

const ATTR_SOCKETS: u16 = 7;
const ATTR_BACKEND: u16 = 10;
const ITEM: u16 = 1;
const SOCK_FD: u16 = 1;

impl Nla for Attribute {
    fn value_len(&self) -> usize {
        match self {
            Self::Index(_) => 4,
            Self::Sockets(sockets) => sockets.iter().map(|fd| socket_item(*fd).buffer_len()).sum(),
            Self::Backend(text) => text.len() + 1,
            Self::Other(nla) => nla.value_len(),
            _ => 8,
        }
    }

    fn kind(&self) -> u16 {
        match self {
            Self::Index(_) => 1,
            Self::SizeBytes(_) => 2,
            Self::BlockSizeBytes(_) => 3,
            Self::Timeout(_) => 4,
            Self::ServerFlags(_) => 5,
            Self::ClientFlags(_) => 6,
            Self::Sockets(_) => ATTR_SOCKETS,
            Self::DeadConnectionTimeout(_) => 8,
            Self::Backend(_) => ATTR_BACKEND,
            Self::Other(nla) => nla.kind(),
        }
    }

    fn is_nested(&self) -> bool {
        matches!(self, Self::Sockets(_))
    }

    fn emit_value(&self, buffer: &mut [u8]) {
        match self {
            Self::Index(value) => buffer[..4].copy_from_slice(&value.to_ne_bytes()),
            Self::SizeBytes(value)
            | Self::BlockSizeBytes(value)
            | Self::Timeout(value)
            | Self::ServerFlags(value)
            | Self::ClientFlags(value)
            | Self::DeadConnectionTimeout(value) => buffer[..8].copy_from_slice(&value.to_ne_bytes()),
            Self::Sockets(sockets) => emit_all(sockets.iter().map(|fd| socket_item(*fd)), buffer),
            Self::Backend(text) => {
                buffer[..text.len()].copy_from_slice(text.as_bytes());
                buffer[text.len()] = 0;
            }
            Self::Other(nla) => nla.emit_value(buffer),
        }
    }
}

/// A nested attribute that holds `inner`.
fn nest(inner: &[DefaultNla]) -> DefaultNla {
    const NESTED: u16 = 1 << 15;
    let mut value = vec![0; inner.iter().map(Emitable::buffer_len).sum()];
    emit_all(inner.iter().cloned(), &mut value);
    DefaultNla::new(ITEM | NESTED, value)
}

fn socket_item(fd: u32) -> DefaultNla {
    nest(&[DefaultNla::new(SOCK_FD, fd.to_ne_bytes().to_vec())])
}

fn emit_all(nlas: impl Iterator<Item = DefaultNla>, mut buffer: &mut [u8]) {
    for nla in nlas {
        let length = nla.buffer_len();
        nla.emit(&mut buffer[..length]);
        buffer = &mut buffer[length..];
    }
}

impl<'a, T: AsRef<[u8]> + ?Sized> Parseable<NlaBuffer<&'a T>> for Attribute {
    fn parse(buffer: &NlaBuffer<&'a T>) -> Result<Self, DecodeError> {
        let value = buffer.value();
        Ok(match buffer.kind() {
            1 => Self::Index(u32_of(value)?),
            2 => Self::SizeBytes(u64_of(value)?),
            3 => Self::BlockSizeBytes(u64_of(value)?),
            4 => Self::Timeout(u64_of(value)?),
            5 => Self::ServerFlags(u64_of(value)?),
            6 => Self::ClientFlags(u64_of(value)?),
            ATTR_SOCKETS => Self::Sockets(sockets(value)?),
            8 => Self::DeadConnectionTimeout(u64_of(value)?),
            ATTR_BACKEND => {
                let text = value.strip_suffix(&[0]).unwrap_or(value);
                Self::Backend(String::from_utf8_lossy(text).into_owned())
            }
            _ => Self::Other(DefaultNla::parse(buffer)?),
        })
    }
}

fn sockets(value: &[u8]) -> Result<Vec<u32>, DecodeError> {
    NlasIterator::new(value).map(|item| find_u32(item?.value(), SOCK_FD)).collect()
}

fn find_u32(item: &[u8], kind: u16) -> Result<u32, DecodeError> {
    for nla in NlasIterator::new(item) {
        let nla = nla?;
        if nla.kind() == kind {
            return u32_of(nla.value());
        }
    }
    Err(DecodeError::from(format!("attribute {kind} is missing")))
}

fn u32_of(value: &[u8]) -> Result<u32, DecodeError> {
    let bytes = value.try_into().map_err(|_| DecodeError::from("an integer of 4 bytes was expected"))?;
    Ok(u32::from_ne_bytes(bytes))
}

fn u64_of(value: &[u8]) -> Result<u64, DecodeError> {
    let bytes = value.try_into().map_err(|_| DecodeError::from("an integer of 8 bytes was expected"))?;
    Ok(u64::from_ne_bytes(bytes))
}

impl GenlFamily for Message {
    fn family_name() -> &'static str {
        "nbd"
    }

    fn command(&self) -> u8 {
        self.command as u8
    }

    fn version(&self) -> u8 {
        1
    }
}

impl Emitable for Message {
    fn buffer_len(&self) -> usize {
        self.attributes.as_slice().buffer_len()
    }

    fn emit(&self, buffer: &mut [u8]) {
        self.attributes.as_slice().emit(buffer);
    }
}

impl ParseableParametrized<[u8], GenlHeader> for Message {
    fn parse_with_param(buffer: &[u8], header: GenlHeader) -> Result<Self, DecodeError> {
        let command = Command::from_byte(header.cmd)
            .ok_or_else(|| DecodeError::from(format!("unknown NBD command {}", header.cmd)))?;
        let attributes = NlasIterator::new(buffer)
            .map(|nla| Attribute::parse(&nla?).context("an NBD attribute is malformed"))
            .collect::<Result<_, _>>()?;
        Ok(Self { command, attributes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip(message: &Message) -> Message {
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        let header = GenlHeader { cmd: message.command(), version: 1 };
        Message::parse_with_param(&bytes, header).unwrap()
    }

    #[test]
    fn every_attribute_round_trips() {
        let message = Message {
            command: Command::Connect,
            attributes: vec![
                Attribute::Index(3),
                Attribute::SizeBytes(1 << 40),
                Attribute::BlockSizeBytes(4096),
                Attribute::Timeout(0),
                Attribute::ServerFlags(0x17d),
                Attribute::ClientFlags(0),
                Attribute::Sockets(vec![7, 8]),
                Attribute::DeadConnectionTimeout(3600),
                Attribute::Backend("vm-1".into()),
            ],
        };
        assert_eq!(round_trip(&message), message);
    }

    #[test]
    fn sockets_are_nested_as_the_kernel_wants_them() {
        let message = Message { command: Command::Connect, attributes: vec![Attribute::Sockets(vec![5])] };
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        let expected: [u16; 8] = [16, 0x8007, 12, 0x8001, 8, 1, 5, 0];
        let expected: Vec<u8> = expected.iter().flat_map(|word| word.to_ne_bytes()).collect();
        assert_eq!(bytes, expected);
    }

    #[test]
    fn garbage_is_an_error() {
        let header = GenlHeader { cmd: 1, version: 1 };
        for length in 1..4 {
            assert!(Message::parse_with_param(&vec![0xff; length], header).is_err());
        }
        assert!(Message::parse_with_param(&[], GenlHeader { cmd: 77, version: 1 }).is_err());
    }
}
