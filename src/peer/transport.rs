//! Whom a node speaks to, and how: mutual TLS within the cluster; plain TCP on loopback, elsewhere only when told so.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;
use std::time::Duration;

use rustix::net::sockopt;
use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::{client, server};

use super::local_user;
use crate::digest::Digest;
use crate::name::HostName;
use crate::tls::{Identity, Role, has_name, has_role};

/// How long a TCP connection may take where there is somebody else to turn to.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// And where there is not: the kernel asks again for a connection after one second and after three.
const PATIENT_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes of a TLS record at most, with its header and what encryption adds (RFC 8446 section 5.2).
const TLS_RECORD_MAX: usize = 5 + (1 << 14) + 256;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// A connection, encrypted or not.
pub trait Transport: AsyncRead + AsyncWrite + Send + Unpin {
    /// Says that a read that waits need not be woken before `bytes` are there, or the connection ends. One that cannot
    /// do that wakes for whatever comes.
    fn wake_for(&self, _bytes: usize) {}
}

impl Transport for TcpStream {
    fn wake_for(&self, bytes: usize) {
        let bytes = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
        let length = libc::socklen_t::try_from(size_of_val(&bytes)).expect("an int is short");
        // SAFETY: the descriptor is open for the whole call, which reads one int (SO_RCVLOWAT, socket(7)).
        let _ = unsafe {
            libc::setsockopt(
                self.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_RCVLOWAT,
                (&raw const bytes).cast(),
                length,
            )
        };
    }
}

impl Transport for client::TlsStream<TcpStream> {
    /// Part of a record that has come is kept within and not there to be woken for.
    fn wake_for(&self, bytes: usize) {
        self.get_ref().0.wake_for(bytes.saturating_sub(TLS_RECORD_MAX).max(1));
    }
}

impl Transport for server::TlsStream<TcpStream> {}

impl Transport for UnixStream {}

impl Transport for DuplexStream {}

/// What protects connections between nodes.
#[derive(Clone, Default)]
pub struct Security {
    /// This node's certificate: connections use TLS and only members of the cluster are spoken to.
    pub identity: Option<Identity>,
    /// Without a certificate, speak plain TCP beyond loopback too.
    pub plain: bool,
}

impl fmt::Debug for Security {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.identity.is_some() { "mutual TLS" } else { "plain TCP" };
        f.debug_struct("Security").field("kind", &kind).field("plain", &self.plain).finish()
    }
}

/// Why a node may not be spoken to without encryption.
#[derive(Debug, thiserror::Error)]
#[error(
    "{0} is beyond loopback and what passes would be neither encrypted nor authenticated: \
     give --tls-dir (see `bootcache ca`), or --plain for a network that you trust"
)]
pub struct PlainRefused(pub SocketAddr);

impl Security {
    /// Whether the settings allow to listen on, or connect to, `address`.
    ///
    /// # Errors
    /// [`PlainRefused`] for plain TCP beyond loopback that nobody asked for.
    pub fn check(&self, address: SocketAddr) -> Result<(), PlainRefused> {
        let loopback = match address.ip() {
            IpAddr::V6(ip) => ip.to_canonical().is_loopback(),
            ip @ IpAddr::V4(_) => ip.is_loopback(),
        };
        if self.identity.is_some() || self.plain || loopback { Ok(()) } else { Err(PlainRefused(address)) }
    }

    /// Connects to the peer at `address`, one of several as a rule.
    ///
    /// # Errors
    /// Those of TCP and TLS, [`io::ErrorKind::TimedOut`], [`PlainRefused`] as [`io::ErrorKind::PermissionDenied`].
    pub async fn connect(&self, address: SocketAddr) -> io::Result<Box<dyn Transport>> {
        self.connect_within(CONNECT_TIMEOUT, address, Role::Node, None).await
    }

    /// Connects to the member of the cluster at `address` that has `role`.
    ///
    /// # Errors
    /// As those of [`Security::connect`].
    pub async fn connect_to(&self, address: SocketAddr, role: Role) -> io::Result<Box<dyn Transport>> {
        self.connect_within(PATIENT_CONNECT_TIMEOUT, address, role, None).await
    }

    /// Connects to a member that has several addresses, at whichever answers first of those that are asked in turn.
    ///
    /// # Errors
    /// As those of [`Security::connect`], of the last address.
    pub async fn connect_to_any(
        &self,
        addresses: &[SocketAddr],
        role: Role,
    ) -> io::Result<Box<dyn Transport>> {
        if let [only] = addresses {
            return self.connect_to(*only, role).await;
        }
        let mut last = io::Error::new(io::ErrorKind::NotFound, "it has no address");
        for limit in [CONNECT_TIMEOUT, PATIENT_CONNECT_TIMEOUT] {
            for address in addresses {
                match self.connect_within(limit, *address, role, None).await {
                    Ok(stream) => return Ok(stream),
                    Err(error) => last = error,
                }
            }
        }
        Err(last)
    }

    /// Connects to the node called `name` at `address`. Over plain TCP whoever is there passes for it.
    ///
    /// # Errors
    /// As those of [`Security::connect`], and [`io::ErrorKind::PermissionDenied`] when it is another member.
    pub async fn connect_to_node(
        &self,
        address: SocketAddr,
        name: &HostName,
    ) -> io::Result<Box<dyn Transport>> {
        self.connect_within(PATIENT_CONNECT_TIMEOUT, address, Role::Node, Some(name)).await
    }

    async fn connect_within(
        &self,
        limit: Duration,
        address: SocketAddr,
        role: Role,
        name: Option<&HostName>,
    ) -> io::Result<Box<dyn Transport>> {
        self.check(address).map_err(|error| io::Error::new(io::ErrorKind::PermissionDenied, error))?;
        let stream = within(limit, TcpStream::connect(address)).await?;
        prepare(&stream)?;
        let Some(identity) = &self.identity else { return Ok(Box::new(stream)) };
        let stream = within(HANDSHAKE_TIMEOUT, identity.connect(stream, role)).await.map_err(no_tls)?;
        match name.filter(|name| !has_name(stream.get_ref().1.peer_certificates(), name)) {
            None => Ok(Box::new(stream)),
            Some(name) => Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                format!("the certificate at {address} is not that of node '{name}'"),
            )),
        }
    }

    /// Takes a connection from another node, and says from which.
    ///
    /// # Errors
    /// Those of TLS, and [`io::ErrorKind::PermissionDenied`] for a certificate that is not a node's or the
    /// controller's.
    pub async fn accept(&self, stream: TcpStream) -> io::Result<(Box<dyn Transport>, Caller)> {
        let (stream, caller) = self.accept_any(stream).await?;
        if caller.is(Role::Node) || caller.is(Role::Controller) {
            Ok((stream, caller))
        } else {
            Err(io::Error::new(io::ErrorKind::PermissionDenied, "the certificate is not a node's"))
        }
    }

    /// Takes a connection from any member of the cluster, and says from whom it is. Without certificates, one over
    /// loopback has to be root's or of this process's user: it may pass for anybody.
    ///
    /// # Errors
    /// Those of TLS, and [`io::ErrorKind::PermissionDenied`] for another user of this host.
    pub async fn accept_from(&self, stream: TcpStream) -> io::Result<(Box<dyn Transport>, Caller)> {
        if self.identity.is_none() && !self.plain {
            let (from, to) = (stream.peer_addr()?, stream.local_addr()?);
            tokio::task::spawn_blocking(move || local_user::check(from, to))
                .await
                .map_err(io::Error::other)??;
        }
        self.accept_any(stream).await
    }

    async fn accept_any(&self, stream: TcpStream) -> io::Result<(Box<dyn Transport>, Caller)> {
        prepare(&stream)?;
        let Some(identity) = &self.identity else { return Ok((Box::new(stream), Caller::trusted())) };
        let stream = within(HANDSHAKE_TIMEOUT, identity.acceptor().accept(stream)).await.map_err(no_tls)?;
        let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
        let caller =
            Caller { certificates: Some(certificates.iter().map(|c| c.clone().into_owned()).collect()) };
        Ok((Box::new(stream), caller))
    }
}

/// Who is at the other end of a connection that was taken.
#[derive(Debug, Clone)]
pub struct Caller {
    /// What TLS has verified; none on a connection that is trusted as it is.
    certificates: Option<Vec<CertificateDer<'static>>>,
}

impl Caller {
    /// Somebody on this host's own socket, or on a network that is trusted: may pass for anybody.
    pub const fn trusted() -> Self {
        Self { certificates: None }
    }

    /// The digest of its certificate, if it has shown one.
    pub fn certificate(&self) -> Option<Digest> {
        let certificates = self.certificates.as_ref()?;
        certificates.first().map(|certificate| Digest::of(certificate))
    }

    /// Whether it has `role`.
    pub fn is(&self, role: Role) -> bool {
        self.certificates.as_ref().is_none_or(|certificates| has_role(Some(certificates), role))
    }

    /// Whether it is the member called `name`.
    pub fn is_named(&self, name: &HostName) -> bool {
        self.certificates.as_ref().is_none_or(|certificates| has_name(Some(certificates), name))
    }
}

/// Who does not know TLS ends the connection at its first bytes, or says something else.
fn no_tls(error: io::Error) -> io::Error {
    use io::ErrorKind::{ConnectionReset, UnexpectedEof};
    let corrupt = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    let nonsense = matches!(corrupt, Some(rustls::Error::InvalidMessage(_)));
    if nonsense || matches!(error.kind(), UnexpectedEof | ConnectionReset) {
        let said = "it does not speak TLS: give --tls-dir there too, or here neither that nor a folder tls in the store";
        return io::Error::new(error.kind(), said);
    }
    error
}

/// No delay for small messages, and an end to a connection whose other side has lost its power: after half a minute.
fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(15))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(5))?;
    sockopt::set_tcp_keepcnt(stream, 3)?;
    sockopt::set_tcp_user_timeout(stream, 30_000)?;
    Ok(())
}

async fn within<T>(limit: Duration, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls;

    #[test]
    fn plain_tcp_leaves_the_host_only_when_told_so() {
        let security = Security::default();
        assert!(security.check("127.0.0.1:1".parse().unwrap()).is_ok());
        assert!(security.check("[::1]:1".parse().unwrap()).is_ok());
        assert!(security.check("10.0.0.1:1".parse().unwrap()).is_err());
        assert!(security.check("[::ffff:10.0.0.1]:1".parse().unwrap()).is_err());
        let said = security.check("0.0.0.0:1".parse().unwrap()).unwrap_err().to_string();
        assert!(said.contains("beyond loopback") && said.contains("--tls-dir"), "{said}");
        let told = Security { plain: true, ..Security::default() };
        assert!(told.check("10.0.0.1:1".parse().unwrap()).is_ok());
    }

    #[tokio::test]
    async fn of_several_addresses_one_that_answers_is_found() {
        let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let somebody = listener.local_addr().unwrap();
        let security = Security::default();
        for addresses in [&[somebody][..], &[nobody, somebody], &[somebody, nobody]] {
            security.connect_to_any(addresses, Role::Controller).await.map(drop).unwrap();
        }
        for addresses in [&[nobody, nobody][..], &[]] {
            security.connect_to_any(addresses, Role::Controller).await.map(drop).unwrap_err();
        }
    }

    #[tokio::test]
    async fn a_node_that_is_asked_for_by_name_is_no_other() {
        let ca = tempfile::tempdir().unwrap();
        tls::init_ca(ca.path()).unwrap();
        let member = |name: &str, role| {
            let out = tempfile::tempdir().unwrap();
            tls::issue(ca.path(), &name.parse().unwrap(), role, &[], out.path()).unwrap();
            Security { identity: Some(Identity::load(out.path()).unwrap()), plain: false }
        };
        let (node, controller) = (member("n2", Role::Node), member("control", Role::Controller));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let accepting = tokio::spawn(async move {
            for _ in 0..2 {
                let (stream, _) = listener.accept().await.unwrap();
                let _ = node.accept(stream).await;
            }
        });
        controller.connect_to_node(address, &"n2".parse().unwrap()).await.map(drop).unwrap();
        let other = controller.connect_to_node(address, &"n1".parse().unwrap()).await.map(drop).unwrap_err();
        assert_eq!(other.kind(), io::ErrorKind::PermissionDenied);
        assert!(other.to_string().contains("is not that of node 'n1'"), "{other}");
        accepting.await.unwrap();
    }

    #[tokio::test]
    async fn tls_at_one_end_only_says_so() {
        let ca = tempfile::tempdir().unwrap();
        tls::init_ca(ca.path()).unwrap();
        tls::issue(ca.path(), &"n1".parse().unwrap(), Role::Node, &[], ca.path()).unwrap();
        let secure = Security { identity: Some(Identity::load(ca.path()).unwrap()), plain: false };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let plain = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            // What a node does that reads a frame.
            crate::wire::io::read_frame(&mut stream, 100).await.map(drop).unwrap_err().to_string()
        });
        let said = secure.connect(address).await.map(drop).unwrap_err().to_string();
        assert!(said.contains("does not speak TLS"), "{said}");
        assert!(plain.await.unwrap().contains("give --tls-dir"));
    }
}
