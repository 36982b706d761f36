//! TLS: with our client, nbdinfo and qemu-img; off, allowed and required; and never less than was asked for.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![cfg(feature = "tls")]

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

use bootcache_nbd::client::{Address, Client, Policy, Security};
use bootcache_nbd::layers::MemoryDisk;
use bootcache_nbd::{Export, Limits, Server, Tls};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

const SIZE: usize = 1 << 20;

/// An authority, a server's certificate for `localhost` and 127.0.0.1, and a client's, in the files that QEMU reads.
fn certificates(dir: &Path) {
    let ca_key = KeyPair::generate().unwrap();
    let mut ca = CertificateParams::new(Vec::<String>::new()).unwrap();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    std::fs::write(dir.join("ca-cert.pem"), ca.self_signed(&ca_key).unwrap().pem()).unwrap();
    let issuer = Issuer::from_params(&ca, &ca_key);
    for side in ["server", "client"] {
        let key = KeyPair::generate().unwrap();
        let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
        let mut params = CertificateParams::new(names).unwrap();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        let certificate = params.signed_by(&key, &issuer).unwrap();
        std::fs::write(dir.join(format!("{side}-cert.pem")), certificate.pem()).unwrap();
        std::fs::write(dir.join(format!("{side}-key.pem")), key.serialize_pem()).unwrap();
    }
}

fn load(dir: &Path, side: &str) -> (rustls::RootCertStore, CertificateDer<'static>, PrivateKeyDer<'static>) {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(dir.join("ca-cert.pem")).unwrap()).unwrap();
    (
        roots,
        CertificateDer::from_pem_file(dir.join(format!("{side}-cert.pem"))).unwrap(),
        PrivateKeyDer::from_pem_file(dir.join(format!("{side}-key.pem"))).unwrap(),
    )
}

fn server_config(dir: &Path) -> Arc<rustls::ServerConfig> {
    let (roots, certificate, key) = load(dir, "server");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let clients =
        rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider));
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(clients.build().unwrap())
        .with_single_cert(vec![certificate], key);
    Arc::new(config.unwrap())
}

/// `known` says whether the client shows its certificate.
fn client_security(dir: &Path, known: bool, name: &'static str) -> Security {
    let (roots, certificate, key) = load(dir, "client");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let config = if known {
        config.with_client_auth_cert(vec![certificate], key).unwrap()
    } else {
        config.with_no_client_auth()
    };
    Security::Tls(Arc::new(config), ServerName::try_from(name).unwrap())
}

struct Served {
    dir: tempfile::TempDir,
    port: u16,
    runtime: Runtime,
}

impl Served {
    fn new(tls: impl FnOnce(Arc<rustls::ServerConfig>) -> Tls) -> Self {
        let dir = tempfile::tempdir().unwrap();
        certificates(dir.path());
        let content: Vec<u8> = (0..251).cycle().take(SIZE).collect();
        std::fs::write(dir.path().join("reference.raw"), &content).unwrap();
        let export = Export::new("disk", Arc::new(MemoryDisk::from(content)));
        let server = Server::new(Arc::new(export), Limits::default(), tls(server_config(dir.path())));
        let runtime = Runtime::new().unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let port = listener.local_addr().unwrap().port();
        runtime.spawn(async move { server.serve_tcp(listener, CancellationToken::new()).await });
        Self { dir, port, runtime }
    }

    fn connect(&self, security: Security) -> std::io::Result<Client> {
        let address = Address::Tcp(([127, 0, 0, 1], self.port).into());
        let policy = Policy { connect_timeout: Duration::from_secs(10), ..Policy::default() };
        self.runtime.block_on(Client::connect_securely(address, "disk", policy, security))
    }

    fn security(&self) -> Security {
        client_security(self.dir.path(), true, "localhost")
    }

    fn reads(&self, client: &Client) {
        let data = self.runtime.block_on(client.read(250, 100_000)).unwrap();
        assert!(data.into_iter().eq((0..251).cycle().skip(250).take(100_000)));
    }
}

/// Whether a tool is here. A missing one is a skip for people, and an error in CI.
fn have(program: &str) -> bool {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&paths).any(|dir| dir.join(program).is_file());
    assert!(found || std::env::var_os("CI").is_none(), "{program} is missing, and this is CI");
    if !found {
        eprintln!("SKIPPED: {program} is not installed");
    }
    found
}

fn output(program: &str, arguments: &[&str]) -> Output {
    Command::new("timeout").args(["60", program]).args(arguments).output().unwrap()
}

#[track_caller]
fn succeeds(program: &str, arguments: &[&str]) -> String {
    let output = output(program, arguments);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {errors}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn our_client_is_served_where_tls_is_required_or_allowed() {
    for tls in [Tls::Required as fn(_) -> _, Tls::Allowed] {
        let served = Served::new(tls);
        let client = served.connect(served.security()).unwrap();
        served.reads(&client);
        served.runtime.block_on(client.write(5, b"secret", true)).unwrap();
        assert_eq!(served.runtime.block_on(client.read(5, 6)).unwrap(), b"secret");
    }
}

#[test]
fn a_client_that_wants_tls_takes_nothing_less() {
    let served = Served::new(|_| Tls::Off);
    let refused = served.connect(served.security()).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused, "{refused}");
    let served = Served::new(Tls::Required);
    assert!(
        served.connect(client_security(served.dir.path(), true, "example.org")).is_err(),
        "another's name"
    );
    let stranger = tempfile::tempdir().unwrap();
    certificates(stranger.path());
    assert!(
        served.connect(client_security(stranger.path(), true, "localhost")).is_err(),
        "another authority"
    );
}

#[test]
fn a_server_that_requires_tls_serves_no_one_without_it_and_no_stranger() {
    let served = Served::new(Tls::Required);
    assert!(served.connect(Security::Plain).is_err());
    // TLS 1.3 tells of the refusal only behind the handshake.
    let unknown = served.connect(client_security(served.dir.path(), false, "localhost"));
    assert!(unknown.is_err(), "a client without a certificate was served");
    // Every option but STARTTLS and ABORT is answered by ERR_TLS_REQD; EXPORT_NAME has no answer but the end.
    for option in [3_u32, 6, 7, 8, 9, 10, 11, 99] {
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", served.port)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream
            .write_all(&[b"\0\0\0\x03IHAVEOPT".as_slice(), &option.to_be_bytes(), &[0; 4]].concat())
            .unwrap();
        let mut reply = [0; 18 + 20];
        stream.read_exact(&mut reply).unwrap();
        assert_eq!(reply[18 + 12..18 + 16], [0x80, 0, 0, 5], "option {option}");
    }
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", served.port)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x04disk").unwrap();
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest);
    assert_eq!(rest.len(), 18, "only the greeting is expected");
}

/// Our client and the tools take TLS 1.3 of two that know both.
#[test]
fn a_foreign_client_that_knows_tls_1_2_only_is_served() {
    if !have("qemu-img") {
        return;
    }
    let served = Served::new(Tls::Required);
    let dir = served.dir.path().display();
    let reference = served.dir.path().join("reference.raw").display().to_string();
    let image = format!(
        "driver=nbd,server.type=inet,server.host=localhost,server.port={},export=disk,tls-creds=tls0",
        served.port
    );
    let compare = |versions: &str| {
        let object =
            format!("tls-creds-x509,id=tls0,endpoint=client,dir={dir},priority=NORMAL:-VERS-ALL:{versions}");
        output(
            "qemu-img",
            &[
                "compare",
                "--object",
                &object,
                "--image-opts",
                &image,
                &format!("driver=raw,file.driver=file,file.filename={reference}"),
            ],
        )
    };
    for (versions, is_served) in [("+VERS-TLS1.2", true), ("+VERS-TLS1.3", true), ("+VERS-TLS1.1", false)] {
        let compared = compare(versions);
        assert_eq!(compared.status.success(), is_served, "{versions}: {compared:?}");
    }
}

/// What was sent in plain text behind STARTTLS must not count as said under TLS.
#[test]
fn options_that_were_sent_ahead_of_the_tls_handshake_are_not_answered() {
    let served = Served::new(Tls::Allowed);
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", served.port)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let start = b"\0\0\0\x03IHAVEOPT\0\0\0\x05\0\0\0\0".as_slice();
    stream.write_all(&[start, b"IHAVEOPT\0\0\0\x08\0\0\0\0"].concat()).unwrap();
    let mut said = Vec::new();
    let _ = stream.read_to_end(&mut said);
    // Greeting, one ACK; then at most a TLS alert: those bytes are no TLS.
    assert!(said.len() < 18 + 20 + 20 && said[18 + 12..18 + 16] == [0, 0, 0, 1], "{said:?}");
}

#[test]
fn nbdinfo_and_qemu_img_read_over_tls() {
    if !have("nbdinfo") || !have("qemu-img") {
        return;
    }
    for tls in [Tls::Required as fn(_) -> _, Tls::Allowed] {
        let served = Served::new(tls);
        let dir = served.dir.path().to_str().unwrap();
        let uri = format!("nbds://localhost:{}/disk?tls-certificates={dir}", served.port);
        assert_eq!(succeeds("nbdinfo", &["--size", &uri]).trim(), SIZE.to_string());
        assert!(succeeds("nbdinfo", &[&uri]).contains("with TLS"));
        let object = format!("tls-creds-x509,id=tls0,endpoint=client,dir={dir}");
        let image = format!(
            "driver=nbd,server.type=inet,server.host=127.0.0.1,server.port={},export=disk,tls-creds=tls0,tls-hostname=localhost",
            served.port
        );
        let reference = format!("driver=file,filename={dir}/reference.raw");
        succeeds("qemu-img", &["compare", "--object", &object, "--image-opts", &image, &reference]);
        let copy = format!("{dir}/copy.raw");
        succeeds("qemu-img", &["convert", "--object", &object, "--image-opts", &image, "-O", "raw", &copy]);
        assert!(std::fs::read(&copy).unwrap() == std::fs::read(format!("{dir}/reference.raw")).unwrap());
    }
}

#[test]
fn foreign_clients_get_what_they_insist_on_or_nothing() {
    if !have("nbdinfo") {
        return;
    }
    type Choose = fn(Arc<rustls::ServerConfig>) -> Tls;
    let cases: [(Choose, bool, bool); 3] =
        [(|_| Tls::Off, true, false), (Tls::Allowed, true, true), (Tls::Required, false, true)];
    for (tls, expected, offered) in cases {
        let served = Served::new(tls);
        let plain = output("nbdinfo", &["--size", &format!("nbd://localhost:{}/disk", served.port)]);
        assert_eq!(plain.status.success(), expected);
        let secure =
            format!("nbds://localhost:{}/disk?tls-certificates={}", served.port, served.dir.path().display());
        // Where there is no TLS, a client that insists on it gets nothing.
        assert_eq!(output("nbdinfo", &["--size", &secure]).status.success(), offered);
    }
}

/// Whatever else is wrong with an option, TLS comes first.
#[test]
fn where_tls_is_required_an_option_that_is_too_long_is_told_so_and_no_more() {
    let served = Served::new(Tls::Required);
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", served.port)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let length = 100_u32 << 10;
    stream.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x06").unwrap();
    stream.write_all(&length.to_be_bytes()).unwrap();
    stream.write_all(&vec![0; length as usize]).unwrap();
    let mut answer = [0; 18 + 20];
    stream.read_exact(&mut answer).unwrap();
    let kind = u32::from_be_bytes(answer[18 + 12..18 + 16].try_into().unwrap());
    assert_eq!(kind, bootcache_nbd::consts::reply::ERR_TLS_REQD);
}
