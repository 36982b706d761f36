//! Who belongs to the cluster: its certificate authority, and mutual TLS 1.3 between its members.
//!
//! `bootcache ca init` makes the authority, `bootcache ca issue NAME` a member's certificate. A certificate carries
//! the member's name, and its [`Role`] as a DNS name below `.bootcache`: whoever connects asks for the role it wants
//! to speak to (`node.bootcache`, `controller.bootcache`), so that addresses may change and a node can still not pass
//! for the controller. A member's folder has the file names that QEMU, libvirt and nbdkit use, so that their NBD
//! clients and servers can use it as it is:
//!
//! ```text
//! ca-cert.pem  server-cert.pem  server-key.pem  client-cert.pem  client-key.pem
//! ```
//!
//! Not here: what a role may do. That is decided where requests are handled.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::client::verify_server_name;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use crate::name::HostName;
use crate::store::write_atomic_as;

/// The authority's certificate; every member has it.
pub const CA_CERT: &str = "ca-cert.pem";
/// The authority's key; stays where `ca init` made it.
pub const CA_KEY: &str = "ca-key.pem";

const MEMBER_FILES: [(&str, &str); 2] =
    [("server-cert.pem", "server-key.pem"), ("client-cert.pem", "client-key.pem")];
const CA_LIFETIME: Duration = Duration::from_secs(10 * 365 * 86_400);
const MEMBER_LIFETIME: Duration = Duration::from_secs(2 * 365 * 86_400);
/// How long before its end a certificate is complained of.
const EXPIRY_NOTICE: Duration = Duration::from_secs(30 * 86_400);
/// Certificates hold from an hour before they were made: the cluster's clocks may differ.
const CLOCK_SLACK: Duration = Duration::from_secs(3600);

/// What a member of the cluster is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A node: its data plane and its agent.
    Node,
    /// The controller.
    Controller,
    /// A person or a program that gives the controller orders.
    User,
}

impl Role {
    /// The DNS name that certificates of this role carry.
    pub const fn dns_name(self) -> &'static str {
        match self {
            Self::Node => "node.bootcache",
            Self::Controller => "controller.bootcache",
            Self::User => "user.bootcache",
        }
    }

    fn server_name(self) -> ServerName<'static> {
        ServerName::try_from(self.dns_name()).expect("the names above are DNS names")
    }
}

/// Why a certificate could not be made or used; says what to do.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file is missing or unreadable.
    #[error("cannot use {path}: {source}{}", hint(path))]
    File {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A file is not what its name says.
    #[error("{path} is not a PEM certificate or key: make a new one with `bootcache ca issue`")]
    Pem {
        /// The file.
        path: PathBuf,
    },
    /// There is an authority already, and it must not be lost.
    #[error("{0} already holds a certificate authority: nothing was changed")]
    Exists(PathBuf),
    /// Something that nobody can be reached under.
    #[error("'{0}' is neither an IP address nor a host name")]
    Address(String),
    /// A certificate could not be made.
    #[error("cannot make the certificate: {0}")]
    Generate(#[from] rcgen::Error),
    /// The files do not belong together.
    #[error("the certificates in {dir} cannot be used: {source}")]
    Unusable {
        /// The member's folder.
        dir: PathBuf,
        /// What rustls says.
        source: rustls::Error,
    },
}

fn hint(path: &Path) -> &'static str {
    match path.file_name().and_then(|name| name.to_str()) {
        Some(CA_KEY) => " (make an authority with `bootcache ca init`)",
        _ => "",
    }
}

/// Makes a certificate authority in `dir`, which is created for its owner alone.
pub fn init_ca(dir: &Path) -> Result<(), TlsError> {
    if dir.join(CA_KEY).exists() || dir.join(CA_CERT).exists() {
        return Err(TlsError::Exists(dir.to_owned()));
    }
    private_folder(dir)?;
    let mut params = parameters("bootcache cluster CA", CA_LIFETIME);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate()?;
    let certificate = params.self_signed(&key)?;
    write(&dir.join(CA_KEY), key.serialize_pem().as_bytes(), 0o600)?;
    write(&dir.join(CA_CERT), certificate.pem().as_bytes(), 0o644)
}

/// Makes the member `name` a certificate, signed by the authority in `ca_dir`, and writes its files into `out`.
///
/// `addresses` are IP addresses or DNS names under which foreign NBD clients reach it.
pub fn issue(
    ca_dir: &Path,
    name: &HostName,
    role: Role,
    addresses: &[String],
    out: &Path,
) -> Result<(), TlsError> {
    let ca_certificate = read(&ca_dir.join(CA_CERT))?;
    let ca_key = KeyPair::from_pem(&read(&ca_dir.join(CA_KEY))?)?;
    let issuer = Issuer::from_ca_cert_pem(&ca_certificate, ca_key)?;

    let mut params = parameters(name.as_str(), MEMBER_LIFETIME);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    for dns in [name.as_str(), role.dns_name()] {
        params.subject_alt_names.push(SanType::DnsName(dns.try_into()?));
    }
    for address in addresses {
        params.subject_alt_names.push(match ServerName::try_from(address.as_str()) {
            Ok(ServerName::IpAddress(ip)) => SanType::IpAddress(IpAddr::from(ip)),
            Ok(ServerName::DnsName(name)) => SanType::DnsName(name.as_ref().try_into()?),
            _ => return Err(TlsError::Address(address.clone())),
        });
    }
    let key = KeyPair::generate()?;
    let certificate = params.signed_by(&key, &issuer)?;

    private_folder(out)?;
    write(&out.join(CA_CERT), ca_certificate.as_bytes(), 0o644)?;
    for (certificate_file, key_file) in MEMBER_FILES {
        write(&out.join(certificate_file), certificate.pem().as_bytes(), 0o644)?;
        write(&out.join(key_file), key.serialize_pem().as_bytes(), 0o600)?;
    }
    Ok(())
}

/// Whether `dir` holds a member's files, which [`issue`] would replace.
pub fn holds_member(dir: &Path) -> bool {
    MEMBER_FILES.iter().any(|(certificate, key)| dir.join(certificate).exists() || dir.join(key).exists())
}

/// A member's certificate and the authority it trusts, ready for connections both ways.
#[derive(Debug, Clone)]
pub struct Identity {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
    nbd: Arc<ServerConfig>,
    /// What this member shows to those who connect.
    shown: Vec<CertificateDer<'static>>,
    /// When its certificates and the authority's end.
    ends: Vec<(PathBuf, SystemTime)>,
}

impl Identity {
    /// Loads a member's folder, as [`issue`] writes it.
    pub fn load(dir: &Path) -> Result<Self, TlsError> {
        let unusable = |source| TlsError::Unusable { dir: dir.to_owned(), source };
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&dir.join(CA_CERT))? {
            roots.add(certificate).map_err(unusable)?;
        }
        let roots = Arc::new(roots);
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls13 = &[&rustls::version::TLS13];

        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
            .build()
            .map_err(|error| unusable(rustls::Error::General(error.to_string())))?;
        let [(server_certificate, server_key), (client_certificate, client_key)] =
            MEMBER_FILES.map(|(certificate, key)| (dir.join(certificate), dir.join(key)));
        let server = |versions: &[&'static rustls::SupportedProtocolVersion]| {
            let config = ServerConfig::builder_with_provider(Arc::clone(&provider))
                .with_protocol_versions(versions)
                .map_err(unusable)?
                .with_client_cert_verifier(Arc::clone(&verifier))
                .with_single_cert(certificates(&server_certificate)?, private_key(&server_key)?)
                .map_err(unusable)?;
            Ok::<_, TlsError>(Arc::new(config))
        };
        let nbd = server(rustls::ALL_VERSIONS)?;
        let server = server(tls13)?;
        let client = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(tls13)
            .map_err(unusable)?
            .with_root_certificates(roots)
            .with_client_auth_cert(certificates(&client_certificate)?, private_key(&client_key)?)
            .map_err(unusable)?;
        let shown = certificates(&server_certificate)?;
        // Of several authorities the last one counts: the others are there until nobody needs them.
        let ends = [&server_certificate, &client_certificate, &dir.join(CA_CERT)].map(|path| {
            let end = certificates(path)?.iter().filter_map(end).max();
            Ok::<_, TlsError>(end.map(|end| (path.clone(), end)))
        });
        let ends: Vec<_> = ends.into_iter().collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect();
        let identity = Self { server, client: Arc::new(client), nbd, shown, ends };
        if let Some(warning) = identity.expiry_warning(SystemTime::now()) {
            tracing::warn!("{warning}");
        }
        Ok(identity)
    }

    /// What to tell people when, at the time `now`, one of this member's certificates or the authority's has ended or will
    /// within 30 days.
    pub fn expiry_warning(&self, now: SystemTime) -> Option<String> {
        let (path, end) = self.ends.iter().min_by_key(|(_, end)| *end)?;
        let remedy = match path.file_name() {
            Some(name) if name == CA_CERT => "make a new authority (Certificates in docs/operations.md)",
            _ => "issue it anew (`bootcache ca issue`), and restart what uses it",
        };
        let path = path.display();
        match end.duration_since(now) {
            Ok(left) if left > EXPIRY_NOTICE => None,
            Ok(left) => {
                Some(format!("the certificate {path} ends in {} days: {remedy}", left.as_secs() / 86_400))
            }
            Err(_) => Some(format!("the certificate {path} has ended: {remedy}")),
        }
    }

    /// Whether others take this member for one that has `role`.
    pub fn is(&self, role: Role) -> bool {
        has_role(Some(&self.shown), role)
    }

    /// Takes connections from members of the cluster, and from nobody else.
    pub fn acceptor(&self) -> tokio_rustls::TlsAcceptor {
        tokio_rustls::TlsAcceptor::from(Arc::clone(&self.server))
    }

    /// For NBD's STARTTLS: members of the cluster only, whose foreign clients may still speak TLS 1.2.
    pub fn nbd(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.nbd)
    }

    /// Connects `stream` to a member of the cluster that has `role`.
    ///
    /// Has no deadline of its own. Dropping the future closes the connection.
    pub async fn connect<S>(&self, stream: S, role: Role) -> io::Result<tokio_rustls::client::TlsStream<S>>
    where
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    {
        tokio_rustls::TlsConnector::from(Arc::clone(&self.client)).connect(role.server_name(), stream).await
    }
}

/// Whether the certificates that the other side showed, and that TLS has verified, give it `role`.
pub fn has_role(certificates: Option<&[CertificateDer<'_>]>, role: Role) -> bool {
    certificates
        .and_then(<[_]>::first)
        .and_then(|certificate| ParsedCertificate::try_from(certificate).ok())
        .is_some_and(|certificate| verify_server_name(&certificate, &role.server_name()).is_ok())
}

/// Whether the certificates that the other side showed, and that TLS has verified, are those of the member `name`.
pub fn has_name(certificates: Option<&[CertificateDer<'_>]>, name: &HostName) -> bool {
    let Ok(name) = ServerName::try_from(name.as_str()) else { return false };
    certificates
        .and_then(<[_]>::first)
        .and_then(|certificate| ParsedCertificate::try_from(certificate).ok())
        .is_some_and(|certificate| verify_server_name(&certificate, &name).is_ok())
}

/// When a certificate ends; none if it says nothing that can be read.
fn end(certificate: &CertificateDer<'_>) -> Option<SystemTime> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let seconds = u64::try_from(parsed.validity().not_after.timestamp()).ok()?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

fn parameters(common_name: &str, lifetime: Duration) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    let now = SystemTime::now();
    params.not_before = (now - CLOCK_SLACK).into();
    params.not_after = (now + lifetime).into();
    params
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let pem = read(path)?;
    let found: Vec<_> =
        CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<_, _>>().unwrap_or_default();
    if found.is_empty() { Err(TlsError::Pem { path: path.to_owned() }) } else { Ok(found) }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_slice(read(path)?.as_bytes()).map_err(|_| TlsError::Pem { path: path.to_owned() })
}

fn read(path: &Path) -> Result<String, TlsError> {
    fs::read_to_string(path).map_err(|source| TlsError::File { path: path.to_owned(), source })
}

/// Replaces the file at `path`: whoever has the one that was there open, or is a link's target, gets nothing of it.
fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<(), TlsError> {
    write_atomic_as(path, bytes, mode).map_err(|source| TlsError::File { path: path.to_owned(), source })
}

fn private_folder(path: &Path) -> Result<(), TlsError> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|source| TlsError::File { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    fn member(ca: &Path, name: &str, role: Role) -> (tempfile::TempDir, Identity) {
        let out = tempfile::tempdir().unwrap();
        issue(ca, &name.parse().unwrap(), role, &["127.0.0.1".into()], out.path()).unwrap();
        let identity = Identity::load(out.path()).unwrap();
        (out, identity)
    }

    async fn talk(server: &Identity, client: &Identity, wanted: Role) -> io::Result<(bool, bool)> {
        let (near, far) = tokio::io::duplex(1 << 16);
        let acceptor = server.acceptor();
        let accepted = tokio::spawn(async move {
            let mut stream = acceptor.accept(far).await?;
            let certificates = stream.get_ref().1.peer_certificates();
            let roles = (has_role(certificates, Role::Node), has_role(certificates, Role::Controller));
            stream.write_all(b"hello").await?;
            stream.shutdown().await?;
            io::Result::Ok(roles)
        });
        let mut stream = client.connect(near, wanted).await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        assert_eq!(text, "hello");
        accepted.await.unwrap()
    }

    #[tokio::test]
    async fn members_of_one_cluster_meet_by_role() {
        let ca = tempfile::tempdir().unwrap();
        init_ca(ca.path()).unwrap();
        let (_n, node) = member(ca.path(), "n1", Role::Node);
        let (_c, controller) = member(ca.path(), "c", Role::Controller);
        assert_eq!(talk(&node, &controller, Role::Node).await.unwrap(), (false, true));
        assert_eq!(talk(&controller, &node, Role::Controller).await.unwrap(), (true, false));
        assert!(talk(&node, &node, Role::Controller).await.is_err(), "a node passed for the controller");
    }

    #[tokio::test]
    async fn a_member_of_another_cluster_is_refused_both_ways() {
        let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        init_ca(ours.path()).unwrap();
        init_ca(theirs.path()).unwrap();
        let (_a, ours) = member(ours.path(), "n1", Role::Node);
        let (_b, theirs) = member(theirs.path(), "n1", Role::Node);
        assert!(talk(&ours, &theirs, Role::Node).await.is_err());
        assert!(talk(&theirs, &ours, Role::Node).await.is_err());
    }

    #[test]
    fn an_authority_is_never_overwritten_and_its_key_is_private() {
        use std::os::unix::fs::PermissionsExt;
        let ca = tempfile::tempdir().unwrap();
        init_ca(ca.path()).unwrap();
        assert!(matches!(init_ca(ca.path()), Err(TlsError::Exists(_))));
        let mode = fs::metadata(ca.path().join(CA_KEY)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_certificate_that_ends_soon_is_complained_of() {
        let ca = tempfile::tempdir().unwrap();
        init_ca(ca.path()).unwrap();
        let (_out, identity) = member(ca.path(), "n1", Role::Node);
        let in_days =
            |days: u64| identity.expiry_warning(SystemTime::now() + Duration::from_secs(days * 86_400));
        assert_eq!(in_days(0), None);
        assert_eq!(in_days(699), None);
        let soon = in_days(720).unwrap();
        assert!(
            soon.contains("server-cert.pem ends in 9 days") || soon.contains("ends in 10 days"),
            "{soon}"
        );
        assert!(in_days(731).unwrap().contains("has ended"));
    }

    #[test]
    fn a_key_goes_into_a_file_of_its_own() {
        use std::os::unix::fs::PermissionsExt;
        let ca = tempfile::tempdir().unwrap();
        init_ca(ca.path()).unwrap();
        let out = tempfile::tempdir().unwrap();
        let (key, elsewhere) = (out.path().join("server-key.pem"), out.path().join("elsewhere"));
        fs::write(&elsewhere, "theirs").unwrap();
        std::os::unix::fs::symlink(&elsewhere, &key).unwrap();
        issue(ca.path(), &"n1".parse().unwrap(), Role::Node, &["127.0.0.1".into()], out.path()).unwrap();
        assert_eq!(fs::read(&elsewhere).unwrap(), b"theirs");
        let meta = fs::symlink_metadata(&key).unwrap();
        assert!(meta.is_file() && meta.permissions().mode() & 0o777 == 0o600);
    }

    #[test]
    fn an_address_is_an_ip_address_or_a_host_name() {
        let ca = tempfile::tempdir().unwrap();
        init_ca(ca.path()).unwrap();
        let out = ca.path().join("n1");
        let issue =
            |address: &str| issue(ca.path(), &"n1".parse().unwrap(), Role::Node, &[address.to_owned()], &out);
        for bad in ["foo bar", "", "10.0.0.300", "a/b", "n1:80"] {
            assert!(matches!(issue(bad), Err(TlsError::Address(_))), "{bad}");
            assert!(!holds_member(&out));
        }
        for good in ["10.0.0.3", "fd00::1", "n1.example.org", "n1"] {
            issue(good).unwrap();
            assert!(holds_member(&out), "{good}");
        }
        let identity = Identity::load(&out).unwrap();
        assert!(identity.is(Role::Node) && !identity.is(Role::Controller));
    }

    #[test]
    fn a_folder_without_certificates_says_what_to_do() {
        let empty = tempfile::tempdir().unwrap();
        let name = "n1".parse().unwrap();
        let error = issue(empty.path(), &name, Role::Node, &[], empty.path()).unwrap_err();
        assert!(error.to_string().contains("ca-cert.pem"), "{error}");
    }
}
