//! How fast a connection brings bytes: what is noted of them as they come, and how rarely its reader is woken.
//!
//! A frame is of use as a whole, and on a link of 100 Mbit/s one of 100 KiB comes in seventy packets. To be woken for each
//! cost a node as much processor time as all that it does with the bytes, beside a guest that boots.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use super::transport::Transport;

/// A connection that brings fewer bytes a second brings nothing: a source could hold a guest up with single bytes.
const RATE_MIN: f64 = 8192.0;
/// What comes within this time is waited for in one piece; in ms.
const GATHER_MS: u64 = 2;
/// And no more than this, in bytes, should the link become slow meanwhile.
const GATHER_MAX: usize = 32 << 10;
/// Over how long the rate is taken.
const WINDOW: Duration = Duration::from_millis(10);

/// When a connection last brought something: a whole reply, or since then bytes at [`RATE_MIN`] or more.
#[derive(Debug)]
pub(super) struct Meter(Mutex<Pace>);

#[derive(Debug)]
struct Pace {
    last: Instant,
    /// Bytes since then.
    bytes: u64,
}

impl Meter {
    pub(super) fn new() -> Self {
        Self(Mutex::new(Pace { last: Instant::now(), bytes: 0 }))
    }

    fn note_bytes(&self, bytes: usize) {
        let mut pace = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pace.bytes += bytes as u64;
        if pace.bytes as f64 >= pace.last.elapsed().as_secs_f64() * RATE_MIN {
            *pace = Pace { last: Instant::now(), bytes: 0 };
        }
    }

    pub(super) fn note_reply(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Pace { last: Instant::now(), bytes: 0 };
    }

    pub(super) fn last(&self) -> Instant {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).last
    }
}

/// A connection whose bytes are noted as they come. The buffer of a read says how much is of use only as a whole: a read
/// that waits is woken when all of it is there, or what comes in [`GATHER_MS`].
pub(super) struct Paced {
    stream: Box<dyn Transport>,
    meter: Arc<Meter>,
    rate: Rate,
    /// For how many bytes the reader is woken.
    mark: usize,
}

impl Paced {
    pub(super) fn new(stream: Box<dyn Transport>, meter: Arc<Meter>) -> Self {
        Self { stream, meter, rate: Rate::new(), mark: 1 }
    }
}

impl AsyncRead for Paced {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        let polled = Pin::new(&mut this.stream).poll_read(cx, buffer);
        if polled.is_pending() {
            let mark = this.rate.gathers().min(buffer.remaining()).max(1);
            if mark != this.mark {
                this.mark = mark;
                this.stream.wake_for(mark);
            }
            return Poll::Pending;
        }
        let came = buffer.filled().len() - before;
        if came > 0 {
            this.meter.note_bytes(came);
            this.rate.note(came);
        }
        polled
    }
}

impl AsyncWrite for Paced {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Bytes a second over the last [`WINDOW`] in which something came, pauses included: after one it is low, and every packet
/// wakes.
#[derive(Debug)]
struct Rate {
    since: Instant,
    bytes: u64,
    a_second: u64,
}

impl Rate {
    fn new() -> Self {
        Self { since: Instant::now(), bytes: 0, a_second: 0 }
    }

    fn note(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
        let passed = self.since.elapsed();
        if passed >= WINDOW {
            let micros = u64::try_from(passed.as_micros()).unwrap_or(u64::MAX);
            self.a_second = self.bytes.saturating_mul(1_000_000) / micros.max(1);
            (self.since, self.bytes) = (Instant::now(), 0);
        }
    }

    /// How many bytes are waited for in one piece.
    fn gathers(&self) -> usize {
        let bytes = self.a_second.saturating_mul(GATHER_MS) / 1000;
        usize::try_from(bytes).unwrap_or(usize::MAX).min(GATHER_MAX)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_slow_link_is_not_silent_and_one_that_drips_is() {
        for (bytes, pause_ms, is_silent) in
            [(1448, 30, false), (400, 20, false), (1024, 250, true), (1, 1, true)]
        {
            let meter = Meter::new();
            for _ in 0..4000 / pause_ms {
                tokio::time::advance(Duration::from_millis(pause_ms)).await;
                meter.note_bytes(bytes);
            }
            assert_eq!(
                meter.last().elapsed() > Duration::from_secs(2),
                is_silent,
                "{bytes} bytes each {pause_ms} ms"
            );
            meter.note_reply();
            assert_eq!(meter.last().elapsed(), Duration::ZERO);
        }
        // What did not come for a while and then does is no silence.
        let meter = Meter::new();
        tokio::time::advance(Duration::from_millis(1500)).await;
        for _ in 0..50 {
            tokio::time::advance(Duration::from_millis(10)).await;
            meter.note_bytes(500);
        }
        assert!(meter.last().elapsed() < Duration::from_millis(100), "{:?}", meter.last().elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_fast_link_gathers_and_one_that_has_become_slow_does_not() {
        let mut rate = Rate::new();
        let bring = async |rate: &mut Rate, bytes, pause| {
            tokio::time::advance(pause).await;
            rate.note(bytes);
        };
        for _ in 0..100 {
            bring(&mut rate, 1448, Duration::from_micros(116)).await;
        }
        assert!((20_000..30_000).contains(&rate.gathers()), "{}", rate.gathers());
        for _ in 0..100 {
            bring(&mut rate, 64 << 10, Duration::from_micros(100)).await;
        }
        assert_eq!(rate.gathers(), GATHER_MAX);
        bring(&mut rate, GATHER_MAX, Duration::from_secs(1)).await;
        assert!(rate.gathers() < 4096, "{}", rate.gathers());
    }

    /// What is left of a frame is less than what was gathered before, comes in pieces, or is followed by the end.
    #[tokio::test]
    async fn nothing_is_waited_for_that_does_not_come() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut far = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        far.set_nodelay(true).unwrap();
        let near = Box::new(listener.accept().await.unwrap().0);
        let mut near = Paced::new(near, Arc::new(Meter::new()));
        let lengths = [9, 100_000, 9, 40, 9, 300_000, 1, 9, 50_000, 9];
        let sending = tokio::spawn(async move {
            for round in 0..20 {
                for length in lengths {
                    for piece in vec![7; length].chunks(1448 + round) {
                        far.write_all(piece).await.unwrap();
                    }
                    if round % 5 == 0 {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                }
            }
            far.write_all(&[7; 1000]).await.unwrap();
        });
        // As if the link had been fast, whatever this machine is.
        let reads = async {
            for _ in 0..20 {
                for length in lengths {
                    near.rate.a_second = 1_000_000_000;
                    let mut bytes = vec![0; length];
                    near.read_exact(&mut bytes).await.unwrap();
                    assert!(bytes.iter().all(|byte| *byte == 7));
                }
            }
            let mut rest = vec![0; 10_000];
            near.rate.a_second = 1_000_000_000;
            near.read_exact(&mut rest).await.unwrap_err().kind()
        };
        let end = tokio::time::timeout(Duration::from_secs(30), reads).await.expect("nothing hangs");
        assert_eq!(end, io::ErrorKind::UnexpectedEof);
        sending.await.unwrap();
    }
}
