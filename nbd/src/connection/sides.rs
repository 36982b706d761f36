//! The two sides of a connection's stream. A plain socket also takes pages of a file as they are, out of a [`Pipe`].

use std::any::Any;
use std::io;

use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite, Interest, WriteHalf};
use tokio::net::{TcpStream, UnixStream, tcp, unix};

use super::pipe::Pipe;
use crate::limits::PIECE_BYTES;
use crate::negotiate::Stream;

/// What a client sends.
pub(super) type Incoming = Box<dyn AsyncRead + Send + Unpin>;

/// Where a client is answered.
pub(super) enum Outgoing {
    Tcp(tcp::OwnedWriteHalf),
    Unix(unix::OwnedWriteHalf),
    /// TLS, or what the server's owner brought along.
    Other(WriteHalf<Box<dyn Stream>>),
}

/// Parts a stream into its sides.
pub(super) fn split(stream: Box<dyn Stream>) -> (Incoming, Outgoing) {
    let stream = match downcast::<TcpStream>(stream) {
        Ok(tcp) => {
            let (incoming, outgoing) = tcp.into_split();
            return (Box::new(incoming), Outgoing::Tcp(outgoing));
        }
        Err(stream) => stream,
    };
    match downcast::<UnixStream>(stream) {
        Ok(unix) => {
            // For a piece instead of a few pages more than half of one. Without it, only slower.
            let _ = sockopt::set_socket_send_buffer_size(&*unix, PIECE_BYTES);
            let (incoming, outgoing) = unix.into_split();
            (Box::new(incoming), Outgoing::Unix(outgoing))
        }
        Err(stream) => {
            let (incoming, outgoing) = tokio::io::split(stream);
            (Box::new(incoming), Outgoing::Other(outgoing))
        }
    }
}

fn downcast<T: 'static>(stream: Box<dyn Stream>) -> Result<Box<T>, Box<dyn Stream>> {
    if (&*stream as &dyn Any).is::<T>() {
        let any: Box<dyn Any> = stream;
        return Ok(any.downcast().expect("it was looked at"));
    }
    Err(stream)
}

impl Outgoing {
    /// Where bytes are written.
    pub(super) fn bytes(&mut self) -> &mut (dyn AsyncWrite + Send + Unpin) {
        match self {
            Self::Tcp(side) => side,
            Self::Unix(side) => side,
            Self::Other(side) => side,
        }
    }

    /// Whether [`Outgoing::drain`] can be used.
    pub(super) const fn is_socket(&self) -> bool {
        !matches!(self, Self::Other(_))
    }

    /// Sends the next `length` bytes of a pipe, which has them. The side is a socket.
    pub(super) async fn drain(&mut self, pipe: &Pipe, length: usize) -> io::Result<()> {
        let mut left = length;
        while left > 0 {
            let sent = match self {
                Self::Tcp(side) => {
                    let socket: &TcpStream = side.as_ref();
                    socket.writable().await?;
                    socket.try_io(Interest::WRITABLE, || pipe.drain(socket, left))
                }
                Self::Unix(side) => {
                    let socket: &UnixStream = side.as_ref();
                    socket.writable().await?;
                    socket.try_io(Interest::WRITABLE, || pipe.drain(socket, left))
                }
                Self::Other(_) => return Err(io::ErrorKind::Unsupported.into()),
            };
            match sent {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => left -= count,
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
