//! The MFD frame: `"MFD"`, type, payload length, payload (thesis, section 3.4).
//!
//! ```text
//! byte  0   1   2   3      4   5   6   7      8 ...
//!      'M' 'F' 'D' type   length, big-endian   payload
//! ```
//!
//! A *message* payload is one MessagePack map. A *bulk* payload carries raw bytes beside the message, so that data
//! never passes through serde: `head length (4 bytes, big-endian)`, head (MessagePack), then the bulk bytes to the end.
//!
//! Pure: bytes in, bytes out. A length is checked against the caller's limit before anything is allocated for it.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// The first three bytes of every frame.
pub const MAGIC: [u8; 3] = *b"MFD";
/// Bytes of magic, type and length.
pub const HEADER_BYTES: usize = 8;
/// Largest payload of a control message.
pub const CONTROL_PAYLOAD_MAX: usize = 1 << 20;
/// Largest payload of a bulk frame: its data and its head.
pub const BULK_PAYLOAD_MAX: usize = BULK_DATA_MAX + BULK_HEAD_MAX;
/// Most data of a bulk frame.
pub const BULK_DATA_MAX: usize = 4 << 20;
/// Largest MessagePack head of a bulk frame.
pub const BULK_HEAD_MAX: usize = 64 << 10;

/// The type byte. `0x00` to `0x09` are the thesis' and fixed; bootcache's own begin at `0x10`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FrameType(pub u8);

impl FrameType {
    /// Generic reply, either way.
    pub const REPLY: Self = Self(0x00);
    /// A node registers its compute service with the controller.
    pub const REGISTER_COMPUTE: Self = Self(0x01);
    /// A node registers its image service with the controller.
    pub const REGISTER_IMAGE: Self = Self(0x02);
    /// A user starts a deployment.
    pub const DEPLOY: Self = Self(0x03);
    /// A user ends a deployment.
    pub const END: Self = Self(0x04);
    /// A node's status.
    pub const NODE_STATUS: Self = Self(0x05);
    /// An instance's status.
    pub const INSTANCE_STATUS: Self = Self(0x06);
    /// A query of nodes' status.
    pub const QUERY_STATUS: Self = Self(0x07);
    /// The controller has a node run its part of a deployment.
    pub const RUN_PART: Self = Self(0x08);
    /// The controller has a node end its part of a deployment.
    pub const END_PART: Self = Self(0x09);

    /// A user has images brought to nodes ahead of demand.
    pub const PREFETCH: Self = Self(0x20);
    /// The controller has a node fetch an image.
    pub const FETCH: Self = Self(0x21);
    /// A user has the cluster forget a node that is gone.
    pub const FORGET: Self = Self(0x22);

    /// First message of a peer connection: version and who speaks.
    pub const PEER_HELLO: Self = Self(0x10);
    /// A request to a peer for data.
    pub const PEER_REQUEST: Self = Self(0x11);
    /// A peer's answer; bulk.
    pub const PEER_REPLY: Self = Self(0x12);
    /// A request on a node's local control socket.
    pub const LOCAL_REQUEST: Self = Self(0x18);
    /// The answer to it.
    pub const LOCAL_REPLY: Self = Self(0x19);
}

/// The fixed part of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What the payload is.
    pub frame_type: FrameType,
    /// Bytes of payload that follow.
    pub length: usize,
}

/// Bytes that are not a frame, or not one this program takes.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The connection does not speak MFD.
    #[error("not an MFD frame: it begins with {0:02x?}")]
    Magic([u8; 3]),
    /// The other side speaks TLS, and this connection does not.
    #[error("TLS is spoken there and not here: give --tls-dir (see `bootcache ca`)")]
    Tls,
    /// Longer than the limit for this connection.
    #[error("a frame of {length} bytes is over the limit of {limit}")]
    TooLong {
        /// What the header says.
        length: usize,
        /// What this connection takes.
        limit: usize,
    },
    /// The payload is not the MessagePack that its type asks for.
    #[error("malformed payload: {0}")]
    Payload(#[from] rmp_serde::decode::Error),
    /// A bulk payload is shorter than its own head.
    #[error("a bulk payload of {payload} bytes says its head has {head}")]
    Head {
        /// Bytes there are.
        payload: usize,
        /// Bytes the head is said to have.
        head: usize,
    },
    /// A message that cannot be written as MessagePack.
    #[error("cannot encode: {0}")]
    Encode(#[from] rmp_serde::encode::Error),
}

impl Header {
    /// The eight bytes of this header. `length` is at most `u32::MAX`, which [`encode`] and [`encode_bulk`] see to.
    fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let length = u32::try_from(self.length).expect("payloads are bounded well below 4 GiB").to_be_bytes();
        let [m, f, d] = MAGIC;
        [m, f, d, self.frame_type.0, length[0], length[1], length[2], length[3]]
    }

    /// Reads a header and holds its length against `limit`.
    pub fn parse(bytes: [u8; HEADER_BYTES], limit: usize) -> Result<Self, FrameError> {
        if is_tls(&bytes) {
            return Err(FrameError::Tls);
        }
        let [m, f, d, frame_type, length @ ..] = bytes;
        if [m, f, d] != MAGIC {
            return Err(FrameError::Magic([m, f, d]));
        }
        let length = u32::from_be_bytes(length) as usize;
        if length > limit {
            return Err(FrameError::TooLong { length, limit });
        }
        Ok(Self { frame_type: FrameType(frame_type), length })
    }
}

/// Whether `bytes` begin a TLS record: an alert, which is less than a header, or a handshake. RFC 8446, section 5.1.
pub(super) fn is_tls(bytes: &[u8]) -> bool {
    const ALERT: u8 = 21;
    const HANDSHAKE: u8 = 22;
    const VERSION_MAJOR: u8 = 3;
    matches!(bytes, [ALERT | HANDSHAKE, VERSION_MAJOR, ..])
}

/// A whole message frame: MessagePack maps with field names, so that other languages can read it.
pub fn encode<T: Serialize>(frame_type: FrameType, message: &T) -> Result<Vec<u8>, FrameError> {
    let payload = rmp_serde::to_vec_named(message)?;
    if payload.len() > CONTROL_PAYLOAD_MAX {
        return Err(FrameError::TooLong { length: payload.len(), limit: CONTROL_PAYLOAD_MAX });
    }
    let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
    bytes.extend_from_slice(&Header { frame_type, length: payload.len() }.to_bytes());
    bytes.extend_from_slice(&payload);
    Ok(bytes)
}

/// The header and head of a bulk frame whose data, `bulk_length` bytes, the caller sends right behind.
pub fn encode_bulk<T: Serialize>(
    frame_type: FrameType,
    head: &T,
    bulk_length: usize,
) -> Result<Vec<u8>, FrameError> {
    let head = rmp_serde::to_vec_named(head)?;
    let length = 4 + head.len() + bulk_length;
    if head.len() > BULK_HEAD_MAX || length > BULK_PAYLOAD_MAX {
        return Err(FrameError::TooLong { length, limit: BULK_PAYLOAD_MAX });
    }
    let mut bytes = Vec::with_capacity(HEADER_BYTES + 4 + head.len());
    bytes.extend_from_slice(&Header { frame_type, length }.to_bytes());
    bytes.extend_from_slice(&u32::try_from(head.len()).expect("at most BULK_HEAD_MAX").to_be_bytes());
    bytes.extend_from_slice(&head);
    Ok(bytes)
}

/// Reads a message payload. Bytes behind the message are an error.
pub fn decode<T: DeserializeOwned>(payload: &[u8]) -> Result<T, FrameError> {
    let mut rest = payload;
    let message = rmp_serde::from_read(&mut rest)?;
    if rest.is_empty() {
        Ok(message)
    } else {
        Err(FrameError::Payload(rmp_serde::decode::Error::Uncategorized(format!(
            "{} bytes too many",
            rest.len()
        ))))
    }
}

/// Splits a bulk payload into its head and its data.
pub fn decode_bulk<T: DeserializeOwned>(payload: &[u8]) -> Result<(T, &[u8]), FrameError> {
    let error = |head| FrameError::Head { payload: payload.len(), head };
    let (length, rest) = payload.split_first_chunk::<4>().ok_or_else(|| error(4))?;
    let head_length = u32::from_be_bytes(*length) as usize;
    if head_length > rest.len().min(BULK_HEAD_MAX) {
        return Err(error(head_length));
    }
    let (head, bulk) = rest.split_at(head_length);
    Ok((decode(head)?, bulk))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Ping {
        id: u32,
        text: String,
    }

    fn ping() -> Ping {
        Ping { id: 7, text: "hello".into() }
    }

    #[test]
    fn golden_bytes() {
        let bytes = encode(FrameType::REPLY, &Ping { id: 7, text: "a".into() }).unwrap();
        assert_eq!(bytes, b"MFD\x00\x00\x00\x00\x0c\x82\xa2id\x07\xa4text\xa1a");
    }

    #[test]
    fn a_bulk_frame_round_trips() {
        let mut bytes = encode_bulk(FrameType::PEER_REPLY, &ping(), 3).unwrap();
        bytes.extend_from_slice(b"xyz");
        let header = Header::parse(bytes[..8].try_into().unwrap(), BULK_PAYLOAD_MAX).unwrap();
        assert_eq!(header.length, bytes.len() - 8);
        let (head, bulk) = decode_bulk::<Ping>(&bytes[8..]).unwrap();
        assert_eq!((head, bulk), (ping(), &b"xyz"[..]));
    }

    #[test]
    fn refuses_lengths_over_the_limit_and_foreign_bytes() {
        let huge = *b"MFD\x00\xff\xff\xff\xff";
        assert!(matches!(Header::parse(huge, CONTROL_PAYLOAD_MAX), Err(FrameError::TooLong { .. })));
        assert!(matches!(Header::parse(*b"GET / HT", 10), Err(FrameError::Magic(_))));
    }

    #[test]
    fn every_prefix_of_a_payload_is_an_error() {
        let bytes = encode(FrameType::REPLY, &ping()).unwrap();
        for end in 8..bytes.len() {
            assert!(decode::<Ping>(&bytes[8..end]).is_err(), "{end}");
        }
        assert!(decode_bulk::<Ping>(&[0, 0, 1]).is_err());
        assert!(decode_bulk::<Ping>(&[0xff, 0xff, 0xff, 0xff, 1]).is_err());
    }

    #[test]
    fn bytes_behind_a_message_are_refused() {
        let mut bytes = encode(FrameType::REPLY, &ping()).unwrap();
        bytes.push(0);
        assert!(decode::<Ping>(&bytes[8..]).is_err());
    }
}
