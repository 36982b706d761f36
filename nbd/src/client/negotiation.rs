//! The client's side of the handshake (NBD specification, "Fixed newstyle negotiation").

use std::io;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::Security;
use crate::chunk::Style;
use crate::consts::{IHAVEOPT, NBDMAGIC, OPTION_REPLY_MAGIC, STRING_MAX, flag, info, option, reply};
use crate::disk::BASE_ALLOCATION;
use crate::negotiate::Stream;

/// Longest option reply that is taken.
const REPLY_MAX: usize = 64 << 10;
/// Most replies to one option.
const REPLIES_MAX: usize = 1000;
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
}

/// Opens `export` on a fresh connection, with replies in at most `style`.
pub(super) async fn client(
    mut stream: Box<dyn Stream>,
    export: &str,
    style: Style,
    security: &Security,
) -> io::Result<(Box<dyn Stream>, ExportDescription)> {
    if export.len() > STRING_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the export's name is too long"));
    }
    let (magic, version) = (stream.read_u64().await?, stream.read_u64().await?);
    if magic != NBDMAGIC || version != IHAVEOPT {
        return Err(broken("it is not a newstyle NBD server"));
    }
    let handshake_flags = stream.read_u16().await?;
    if handshake_flags & 1 == 0 {
        return Err(broken("it does not speak fixed newstyle"));
    }
    stream.write_u32(u32::from(handshake_flags & 3)).await?;
    stream = secure(stream, security).await?;
    let description = open(&mut stream, export, style).await?;
    Ok((stream, description))
}

/// What comes behind STARTTLS, or takes its place.
async fn open(stream: &mut Box<dyn Stream>, export: &str, wanted: Style) -> io::Result<ExportDescription> {
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
    let mut description =
        ExportDescription { size: 0, flags: 0, block_sizes: (1, 4096, PAYLOAD_MAX), style, allocation };
    let mut told = false;
    for (kind, data) in &replies {
        if *kind != reply::INFO {
            continue;
        }
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
    if !told {
        return Err(broken("it does not say how large the export is"));
    }
    Ok(description)
}

/// Whether the server takes an option that has no data.
async fn agrees(stream: &mut Box<dyn Stream>, code: u32) -> io::Result<bool> {
    Ok(ask(stream, code, &[]).await?.pop().is_some_and(|(kind, _)| kind == reply::ACK))
}

#[cfg(feature = "tls")]
async fn secure(mut stream: Box<dyn Stream>, security: &Security) -> io::Result<Box<dyn Stream>> {
    let Security::Tls(config, name) = security else { return Ok(stream) };
    if !agrees(&mut stream, option::STARTTLS).await? {
        return Err(io::Error::new(io::ErrorKind::ConnectionRefused, "the server offers no TLS"));
    }
    let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::clone(config));
    Ok(Box::new(connector.connect(name.clone(), stream).await?))
}

#[cfg(not(feature = "tls"))]
#[allow(clippy::unused_async, reason = "its other form waits")]
async fn secure(stream: Box<dyn Stream>, security: &Security) -> io::Result<Box<dyn Stream>> {
    let Security::Plain = security;
    Ok(stream)
}

async fn select_allocation(stream: &mut Box<dyn Stream>, export: &str) -> io::Result<Option<u32>> {
    let mut data = length(export.len()).to_be_bytes().to_vec();
    data.extend_from_slice(export.as_bytes());
    data.extend_from_slice(&1_u32.to_be_bytes());
    data.extend_from_slice(&length(BASE_ALLOCATION.len()).to_be_bytes());
    data.extend_from_slice(BASE_ALLOCATION.as_bytes());
    let Ok(replies) = ask(stream, option::SET_META_CONTEXT, &data).await else { return Ok(None) };
    Ok(replies.iter().find_map(|(kind, data)| match data.split_first_chunk::<4>() {
        Some((number, name)) if *kind == reply::META_CONTEXT && name == BASE_ALLOCATION.as_bytes() => {
            Some(u32::from_be_bytes(*number))
        }
        _ => None,
    }))
}

/// Sends one option and reads all replies to it, up to the one that is final. A refusal of an option that the server
/// need not know is a reply; a refusal of GO is an error.
async fn ask(stream: &mut Box<dyn Stream>, code: u32, data: &[u8]) -> io::Result<Vec<(u32, Vec<u8>)>> {
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
            return Err(broken("it answers out of turn"));
        }
        let mut data = vec![0; size];
        stream.read_exact(&mut data).await?;
        let refused = kind & 0x8000_0000 != 0;
        if refused && code == option::GO {
            let reason = String::from_utf8_lossy(&data);
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!("the server refuses the export: {reason}"),
            ));
        }
        replies.push((kind, data));
        if refused || kind == reply::ACK {
            return Ok(replies);
        }
    }
    Err(broken("it answers without end"))
}

fn length(bytes: usize) -> u32 {
    u32::try_from(bytes).expect("names are bounded")
}

fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("not a usable NBD server: {what}"))
}
