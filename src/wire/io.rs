//! Moves MFD frames over a connection. The only place that allocates for a length a peer has sent, after its check.

use std::io;

use bytes::BufMut as _;
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::frame::{self, FrameError, FrameType, HEADER_BYTES, Header};

/// Bytes of a payload that memory is reserved for at once, and that a read asks for.
const PIECE: usize = 64 << 10;

/// Why a frame could not be moved.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The connection broke.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The bytes are not what the protocol allows; the connection must be closed.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

/// Reads one frame of at most `limit` payload bytes; `None` when the other side has closed between two frames.
///
/// Dropping the future may lose part of a frame: close the connection then.
pub async fn read_frame<R: AsyncRead + Unpin>(
    reader: &mut R,
    limit: usize,
) -> Result<Option<(FrameType, Vec<u8>)>, WireError> {
    let mut bytes = [0; HEADER_BYTES];
    let mut filled = 0;
    while filled < HEADER_BYTES {
        match reader.read(&mut bytes[filled..]).await.map_err(plainly)? {
            0 if filled == 0 => return Ok(None),
            0 if frame::is_tls(&bytes[..filled]) => return Err(FrameError::Tls.into()),
            0 => return Err(ended().into()),
            got => filled += got,
        }
    }
    let header = Header::parse(bytes, limit)?;
    let mut payload = Vec::new();
    while payload.len() < header.length {
        // Grows with what arrives, so that a header alone reserves little memory.
        let mut piece = (header.length - payload.len()).min(PIECE);
        payload.reserve(piece);
        while piece > 0 {
            match reader.read_buf(&mut (&mut payload).limit(piece)).await.map_err(plainly)? {
                0 => return Err(ended().into()),
                got => piece -= got,
            }
        }
    }
    Ok(Some((header.frame_type, payload)))
}

/// TLS has more to say of a connection that was closed without a word, and nothing that helps.
fn plainly(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::UnexpectedEof { ended() } else { error }
}

/// What is said of a connection that was closed where more was to come.
pub(crate) fn ended() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the other side ended the connection: its log may say why")
}

/// Writes one message frame and flushes it.
pub async fn write_message<W: AsyncWrite + Unpin, T: Serialize>(
    writer: &mut W,
    frame_type: FrameType,
    message: &T,
) -> Result<(), WireError> {
    writer.write_all(&frame::encode(frame_type, message)?).await?;
    writer.flush().await?;
    Ok(())
}
