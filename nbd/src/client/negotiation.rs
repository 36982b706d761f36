//! The client's side of the handshake (NBD specification, "Fixed newstyle negotiation").

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::Security;
use crate::chunk::Style;
use crate::consts::{
    FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, IHAVEOPT, NBDMAGIC, OPTION_REPLY_MAGIC, STRING_MAX, flag, info,
    option, reply,
};
use crate::disk::BASE_ALLOCATION;
use crate::negotiate::Stream;

/// Longest option reply that is taken.
const REPLY_MAX: usize = 64 << 10;
/// Most replies to one option; none of those that are sent here has more than a few.
const REPLIES_MAX: usize = 64;
/// Largest payload where the server does not say.
const PAYLOAD_MAX: u32 = 32 << 20;

/// What a server says of an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportDescription {
    /// Bytes.
    pub size: u64,
    /// Transmission flags, see [`flag`].
    pub flags: u16,
    /// Smallest, preferred and largest request in bytes.
    pub block_sizes: (u32, u32, u32),
    /// How the server replies.
    pub style: Style,
    /// The number of `base:allocation`, if it was selected.
    pub allocation: Option<u32>,
}

impl ExportDescription {
    /// Whether it is safe to open several connections.
    pub fn can_multi_conn(&self) -> bool {
        self.flags & flag::CAN_MULTI_CONN != 0
    }

    /// Whether a later description of the same export keeps what this one promised.
    pub(super) fn is_kept_by(&self, later: &Self) -> bool {
        let ((least, _, most), (least_later, _, most_later)) = (self.block_sizes, later.block_sizes);
        self.size == later.size
            && self.flags & !later.flags == 0
            && least_later <= least
            && most <= most_later
            && (self.allocation.is_none() || later.allocation.is_some())
    }
}

/// Why a server was not agreed with.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HandshakeError {
    /// The connection broke.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It refuses the export, in its own words; nothing in them moves a terminal's cursor.
    #[error("the server says: {0}")]
    Refused(String),
    /// It does not do TLS, and nothing less was asked for.
    #[error("the NBD server offers no TLS")]
    NoTls,
    /// It does not speak the protocol, or not what is needed of it.
    #[error("not a usable NBD server: {0}")]
    Unusable(&'static str),
}

impl From<HandshakeError> for io::Error {
    fn from(error: HandshakeError) -> Self {
        match error {
            HandshakeError::Io(error) => error,
            HandshakeError::Refused(_) => Self::new(io::ErrorKind::NotFound, error),
            HandshakeError::NoTls => Self::new(io::ErrorKind::ConnectionRefused, error),
            HandshakeError::Unusable(_) => Self::new(io::ErrorKind::InvalidData, error),
        }
    }
}

type Result<T> = std::result::Result<T, HandshakeError>;

/// Opens `export` on a fresh connection without TLS, with replies in at most `style`.
///
/// Not a byte beyond the handshake is read, so that the stream can be given to somebody else afterwards, such as the
/// kernel. Sets no deadline. Dropping the future leaves the stream amid the handshake.
///
/// # Errors
///
/// [`HandshakeError`]; the stream is of no use then.
pub async fn handshake<S>(stream: &mut S, export: &str, style: Style) -> Result<ExportDescription>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    greet(stream).await?;
    open(stream, export, style).await
}

/// The same, behind TLS if `security` wants that.
pub(super) async fn client(
    mut stream: Box<dyn Stream>,
    export: &str,
    style: Style,
    security: &Security,
) -> Result<(Box<dyn Stream>, ExportDescription)> {
    greet(&mut stream).await?;
    stream = secure(stream, security).await?;
    let description = open(&mut stream, export, style).await?;
    Ok((stream, description))
}

/// Hears the server's greeting and answers it.
async fn greet(stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> Result<()> {
    let (magic, version) = (stream.read_u64().await?, stream.read_u64().await?);
    if magic != NBDMAGIC || version != IHAVEOPT {
        return Err(HandshakeError::Unusable("it does not greet as one"));
    }
    let flags = stream.read_u16().await?;
    if flags & FLAG_FIXED_NEWSTYLE == 0 {
        return Err(HandshakeError::Unusable("it does not speak fixed newstyle"));
    }
    Ok(stream.write_u32((flags & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES)).into()).await?)
}

/// What comes behind STARTTLS, or takes its place.
async fn open<S>(stream: &mut S, export: &str, wanted: Style) -> Result<ExportDescription>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    if export.len() > STRING_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the export's name is too long").into());
    }
    let style = if wanted == Style::Extended && agrees(stream, option::EXTENDED_HEADERS).await? {
        Style::Extended
    } else if wanted != Style::Simple && agrees(stream, option::STRUCTURED_REPLY).await? {
        Style::Structured
    } else {
        Style::Simple
    };
    let allocation = if style == Style::Simple { None } else { select_allocation(stream, export).await? };
    let mut data = length(export.len()).to_be_bytes().to_vec();
    data.extend_from_slice(export.as_bytes());
    data.extend_from_slice(&[0, 1]);
    data.extend_from_slice(&info::BLOCK_SIZE.to_be_bytes());
    let replies = ask(stream, option::GO, &data).await?;
    if let Some((kind, reason)) = replies.last().filter(|(kind, _)| is_error(*kind)) {
        return Err(HandshakeError::Refused(refusal(*kind, reason)));
    }
    let mut description =
        ExportDescription { size: 0, flags: 0, block_sizes: (1, 4096, PAYLOAD_MAX), style, allocation };
    let mut told = false;
    for (_, data) in replies.iter().filter(|(kind, _)| *kind == reply::INFO) {
        match data.as_slice() {
            [0, 0, rest @ ..] if rest.len() == 10 => {
                description.size = u64::from_be_bytes(rest[..8].try_into().expect("eight bytes"));
                description.flags = u16::from_be_bytes([rest[8], rest[9]]);
                told = true;
            }
            [0, 3, rest @ ..] if rest.len() == 12 => {
                let word = |at: usize| u32::from_be_bytes(rest[at..at + 4].try_into().expect("four bytes"));
                description.block_sizes = (word(0), word(4), word(8));
            }
            _ => {}
        }
    }
    if told {
        Ok(description)
    } else {
        Err(HandshakeError::Unusable("it does not say how large the export is"))
    }
}

/// A refusal as people may read it.
fn refusal(kind: u32, reason: &[u8]) -> String {
    let text: String = String::from_utf8_lossy(reason).chars().filter(|char| !char.is_control()).collect();
    if text.is_empty() { format!("error {}", kind & 0x7fff_ffff) } else { text }
}

const fn is_error(kind: u32) -> bool {
    kind & 0x8000_0000 != 0
}

/// Whether the server takes an option that has no data.
async fn agrees(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), code: u32) -> Result<bool> {
    Ok(ask(stream, code, &[]).await?.pop().is_some_and(|(kind, _)| kind == reply::ACK))
}

#[cfg(feature = "tls")]
async fn secure(mut stream: Box<dyn Stream>, security: &Security) -> Result<Box<dyn Stream>> {
    let Security::Tls(config, name) = security else { return Ok(stream) };
    if !agrees(&mut stream, option::STARTTLS).await? {
        return Err(HandshakeError::NoTls);
    }
    let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::clone(config));
    Ok(Box::new(connector.connect(name.clone(), stream).await?))
}

#[cfg(not(feature = "tls"))]
#[allow(clippy::unused_async, reason = "its other form waits")]
async fn secure(stream: Box<dyn Stream>, security: &Security) -> Result<Box<dyn Stream>> {
    let Security::Plain = security;
    Ok(stream)
}

/// Asks for `base:allocation`; gives its number if it was selected. A server need not know contexts.
async fn select_allocation<S>(stream: &mut S, export: &str) -> Result<Option<u32>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut data = length(export.len()).to_be_bytes().to_vec();
    data.extend_from_slice(export.as_bytes());
    data.extend_from_slice(&1_u32.to_be_bytes());
    data.extend_from_slice(&length(BASE_ALLOCATION.len()).to_be_bytes());
    data.extend_from_slice(BASE_ALLOCATION.as_bytes());
    let replies = ask(stream, option::SET_META_CONTEXT, &data).await?;
    Ok(replies.iter().find_map(|(kind, data)| match data.split_first_chunk::<4>() {
        Some((number, name)) if *kind == reply::META_CONTEXT && name == BASE_ALLOCATION.as_bytes() => {
            Some(u32::from_be_bytes(*number))
        }
        _ => None,
    }))
}

/// Sends one option and reads all replies to it: the last is the one that ends them, an ACK or an error.
async fn ask<S>(stream: &mut S, code: u32, data: &[u8]) -> Result<Vec<(u32, Vec<u8>)>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut bytes = IHAVEOPT.to_be_bytes().to_vec();
    bytes.extend_from_slice(&code.to_be_bytes());
    bytes.extend_from_slice(&length(data.len()).to_be_bytes());
    bytes.extend_from_slice(data);
    stream.write_all(&bytes).await?;
    stream.flush().await?;
    let mut replies = Vec::new();
    while replies.len() < REPLIES_MAX {
        let (magic, option) = (stream.read_u64().await?, stream.read_u32().await?);
        let (kind, size) = (stream.read_u32().await?, stream.read_u32().await? as usize);
        if magic != OPTION_REPLY_MAGIC || option != code || size > REPLY_MAX {
            return Err(HandshakeError::Unusable("it answers out of turn"));
        }
        let mut data = vec![0; size];
        stream.read_exact(&mut data).await?;
        replies.push((kind, data));
        if is_error(kind) || kind == reply::ACK {
            return Ok(replies);
        }
    }
    Err(HandshakeError::Unusable("it answers without end"))
}

fn length(bytes: usize) -> u32 {
    u32::try_from(bytes).expect("names are bounded")
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXPORT: &[u8] = &[0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 1, 3];

    /// All that a server says that replies to GO with `replies`.
    fn script(replies: &[(u32, &[u8])]) -> Vec<u8> {
        let mut bytes = [NBDMAGIC.to_be_bytes(), IHAVEOPT.to_be_bytes()].concat();
        bytes.extend([0, 3]);
        for (kind, data) in replies {
            crate::handshake::option_reply(&mut bytes, option::GO, *kind, data);
        }
        bytes
    }

    /// What becomes of a handshake with a server that says `script` whatever it hears, and what it then says on.
    fn talk(script: &[u8]) -> (Result<ExportDescription>, Vec<u8>) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let (mut near, mut far) = tokio::io::duplex(1 << 20);
            far.write_all(script).await.unwrap();
            far.shutdown().await.unwrap();
            let agreed = handshake(&mut near, "vm", Style::Simple).await;
            let mut rest = Vec::new();
            near.read_to_end(&mut rest).await.unwrap();
            (agreed, rest)
        })
    }

    #[test]
    fn learns_size_and_flags_and_leaves_what_follows() {
        let name: &[u8] = &[0, 1, b'v', b'm'];
        for replies in [
            &[(reply::INFO, EXPORT), (reply::ACK, &[])][..],
            &[(reply::INFO, EXPORT), (reply::INFO, name), (reply::ACK, &[])],
        ] {
            let (agreed, rest) = talk(&[&script(replies), b"reply".as_slice()].concat());
            let agreed = agreed.unwrap();
            assert_eq!((agreed.size, agreed.flags, agreed.style), (4096, 0x103, Style::Simple));
            assert_eq!(rest, b"reply");
        }
    }

    #[test]
    fn a_refusal_is_told_in_the_servers_words() {
        let refused =
            |reason: &[u8]| talk(&script(&[(reply::ERR_UNKNOWN, reason)])).0.unwrap_err().to_string();
        assert_eq!(refused(b"no such export\x1b[0m"), "the server says: no such export[0m");
        assert_eq!(refused(b""), "the server says: error 6");
    }

    #[test]
    fn a_server_that_breaks_off_lies_or_never_ends_is_an_error() {
        let whole = script(&[(reply::INFO, EXPORT), (reply::ACK, &[])]);
        for length in 0..whole.len() {
            assert!(talk(&whole[..length]).0.is_err(), "{length}");
        }
        assert!(talk(&script(&[(reply::ACK, &[])])).0.is_err());
        assert!(talk(&script(&[(reply::INFO, &[0; 5000]), (reply::ACK, &[])])).0.is_err());
        assert!(talk(&script(&vec![(reply::INFO, EXPORT); 100])).0.is_err());
    }
}
