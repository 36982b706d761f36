//! The client's half of the NBD handshake, up to the point where a socket can be given to the kernel.
//!
//! Only what the kernel's client understands is agreed: simple replies, no contexts, no TLS. Every length from the
//! server is bounded, every wait has a deadline. The sockets carry no time-out afterwards, since the kernel would heed it.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use bootcache_nbd::consts::{
    FLAG_NO_ZEROES, IHAVEOPT, NBDMAGIC, OPTION_REPLY_MAGIC, STRING_MAX, info, option, reply,
};

/// The longest wait for the server.
const DEADLINE: Duration = Duration::from_secs(10);
/// `NBD_FLAG_C_FIXED_NEWSTYLE`.
const FIXED_NEWSTYLE: u16 = 1;
/// Replies to one option; a server of ours sends three.
const REPLIES_MAX: usize = 64;

/// Why a server was not agreed with.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// There is no server.
    #[error("no server listens there; start one with `bootcache serve`")]
    NoServer,
    /// The connection broke, or nothing came for [`DEADLINE`].
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It refused.
    #[error("the server says: {0}")]
    Refused(String),
    /// It does not speak the protocol.
    #[error("what answers is not an NBD server that can be used: {0}")]
    Protocol(&'static str),
}

/// An export that was opened.
#[derive(Debug)]
pub(super) struct Opened {
    /// Past the handshake; the next byte is a request.
    pub(super) socket: UnixStream,
    /// Bytes.
    pub(super) size: u64,
    /// Transmission flags of the NBD specification.
    pub(super) flags: u16,
}

/// Opens export `name` at the server's Unix socket. Blocks for up to 10 s a step.
pub(super) fn open(path: &Path, name: &str) -> Result<Opened, HandshakeError> {
    let socket = UnixStream::connect(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => HandshakeError::NoServer,
        _ => error.into(),
    })?;
    socket.set_read_timeout(Some(DEADLINE))?;
    socket.set_write_timeout(Some(DEADLINE))?;
    let (size, flags) = negotiate(&mut &socket, name)?;
    socket.set_read_timeout(None)?;
    socket.set_write_timeout(None)?;
    Ok(Opened { socket, size, flags })
}

/// Greeting, then `NBD_OPT_GO`; gives size and transmission flags.
fn negotiate(stream: &mut (impl Read + Write), name: &str) -> Result<(u64, u16), HandshakeError> {
    if u64::from_be_bytes(read(stream)?) != NBDMAGIC || u64::from_be_bytes(read(stream)?) != IHAVEOPT {
        return Err(HandshakeError::Protocol("it greets otherwise"));
    }
    let flags = u16::from_be_bytes(read(stream)?);
    if flags & FIXED_NEWSTYLE == 0 {
        return Err(HandshakeError::Protocol("it is too old"));
    }
    let wanted = FIXED_NEWSTYLE | flags & FLAG_NO_ZEROES;
    let mut request = u32::from(wanted).to_be_bytes().to_vec();
    request.extend(go(name));
    stream.write_all(&request)?;
    let mut export = None;
    for _ in 0..REPLIES_MAX {
        if u64::from_be_bytes(read(stream)?) != OPTION_REPLY_MAGIC
            || u32::from_be_bytes(read(stream)?) != option::GO
        {
            return Err(HandshakeError::Protocol("it answers something that was not asked"));
        }
        let kind = u32::from_be_bytes(read(stream)?);
        let length = u32::from_be_bytes(read(stream)?) as usize;
        if length > STRING_MAX + 16 {
            return Err(HandshakeError::Protocol("its answer is too long"));
        }
        let mut data = vec![0; length];
        stream.read_exact(&mut data)?;
        match kind {
            reply::ACK => return export.ok_or(HandshakeError::Protocol("it does not tell the size")),
            reply::INFO => export = export_info(&data).or(export),
            _ if kind >> 31 == 1 => {
                let text = String::from_utf8_lossy(&data);
                let text: String = text.chars().filter(|char| !char.is_control()).collect();
                return Err(HandshakeError::Refused(if text.is_empty() {
                    format!("error {}", kind & 0x7fff_ffff)
                } else {
                    text
                }));
            }
            _ => {}
        }
    }
    Err(HandshakeError::Protocol("its answer does not end"))
}

/// `NBD_OPT_GO` for an export, asking for nothing beyond what must be told.
fn go(name: &str) -> Vec<u8> {
    let length = |bytes: usize| u32::try_from(bytes).expect("a name is short").to_be_bytes();
    let mut bytes = IHAVEOPT.to_be_bytes().to_vec();
    bytes.extend(option::GO.to_be_bytes());
    bytes.extend(length(4 + name.len() + 2));
    bytes.extend(length(name.len()));
    bytes.extend(name.as_bytes());
    bytes.extend(0u16.to_be_bytes());
    bytes
}

/// Size and flags of `NBD_INFO_EXPORT`; nothing of other information.
fn export_info(data: &[u8]) -> Option<(u64, u16)> {
    let (kind, rest) = data.split_first_chunk::<2>()?;
    let (size, flags) = rest.split_first_chunk::<8>()?;
    (u16::from_be_bytes(*kind) == info::EXPORT)
        .then(|| Some((u64::from_be_bytes(*size), u16::from_be_bytes(flags.try_into().ok()?))))?
}

fn read<const N: usize>(stream: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that says what it is told to say, whatever is asked.
    struct Scripted(io::Cursor<Vec<u8>>);

    impl Read for Scripted {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            self.0.read(buf)
        }
    }

    impl Write for Scripted {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            Ok(buf.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn talk(replies: &[(u32, &[u8])]) -> Result<(u64, u16), HandshakeError> {
        negotiate(&mut Scripted(io::Cursor::new(script(replies))), "vm")
    }

    fn script(replies: &[(u32, &[u8])]) -> Vec<u8> {
        let mut bytes = [NBDMAGIC.to_be_bytes(), IHAVEOPT.to_be_bytes()].concat();
        bytes.extend(3u16.to_be_bytes());
        for (kind, data) in replies {
            bytes.extend(OPTION_REPLY_MAGIC.to_be_bytes());
            bytes.extend(option::GO.to_be_bytes());
            bytes.extend(kind.to_be_bytes());
            bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
            bytes.extend(*data);
        }
        bytes
    }

    const EXPORT: &[u8] = &[0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 1, 3];

    #[test]
    fn learns_size_and_flags() {
        assert_eq!(talk(&[(reply::INFO, EXPORT), (reply::ACK, &[])]).unwrap(), (4096, 0x103));
        let name: &[u8] = &[0, 1, b'v', b'm'];
        assert_eq!(talk(&[(reply::INFO, EXPORT), (reply::INFO, name), (reply::ACK, &[])]).unwrap().0, 4096);
    }

    #[test]
    fn a_refusal_is_told_in_the_servers_words() {
        let error = talk(&[(reply::ERR_UNKNOWN, b"no such export\x1b[0m")]).unwrap_err();
        assert_eq!(error.to_string(), "the server says: no such export[0m");
    }

    #[test]
    fn a_server_that_breaks_off_lies_or_never_ends_is_an_error() {
        let whole = script(&[(reply::INFO, EXPORT), (reply::ACK, &[])]);
        for length in 0..whole.len() {
            let mut server = Scripted(io::Cursor::new(whole[..length].to_vec()));
            assert!(negotiate(&mut server, "vm").is_err(), "{length}");
        }
        assert!(talk(&[(reply::ACK, &[])]).is_err());
        assert!(talk(&[(reply::INFO, &[0; 5000]), (reply::ACK, &[])]).is_err());
        assert!(talk(&vec![(reply::INFO, EXPORT); 100]).is_err());
    }
}
