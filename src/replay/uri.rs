//! NBD URIs: `nbd://HOST[:PORT]/EXPORT` and `nbd+unix:///EXPORT?socket=PATH` (the NBD project's `doc/uri.md`).

use std::net::{SocketAddr, ToSocketAddrs};
use std::str::FromStr;

use bootcache_nbd::client::Address;

const PORT: u16 = 10809;

/// An export and where its server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uri {
    place: Place,
    /// The export's name; may be empty.
    pub export: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Unix(String),
    Tcp(String, u16),
}

/// Text that is not an NBD URI that this program can use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{given}' is no NBD URI ({why}): use nbd://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=PATH")]
pub struct UriError {
    given: String,
    why: &'static str,
}

impl Uri {
    /// The server's address; a name is looked up.
    ///
    /// # Errors
    /// Those of the look-up.
    pub fn address(&self) -> std::io::Result<Address> {
        match &self.place {
            Place::Unix(path) => Ok(Address::Unix(path.into())),
            Place::Tcp(host, port) => {
                let first: Option<SocketAddr> = (host.as_str(), *port).to_socket_addrs()?.next();
                first.map(Address::Tcp).ok_or_else(|| std::io::Error::other(format!("{host} has no address")))
            }
        }
    }
}

impl FromStr for Uri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        parse(text).map_err(|why| UriError { given: text.chars().take(200).collect(), why })
    }
}

fn parse(text: &str) -> Result<Uri, &'static str> {
    let (scheme, rest) = text.split_once("://").ok_or("there is no ://")?;
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, export) = path.split_once('/').unwrap_or((path, ""));
    let export = decode(export)?;
    let place = match scheme {
        "nbd" => {
            let (host, port) = host_and_port(authority)?;
            Place::Tcp(host.to_owned(), port)
        }
        "nbd+unix" => {
            let socket = query.split('&').find_map(|part| part.strip_prefix("socket=")).unwrap_or("");
            Place::Unix(decode(socket)?)
        }
        "nbds" | "nbds+unix" => return Err("TLS is not supported here"),
        _ => return Err("the scheme is unknown"),
    };
    match &place {
        Place::Unix(path) if path.is_empty() => Err("the socket is missing"),
        Place::Tcp(host, _) if host.is_empty() => Err("the host is missing"),
        _ => Ok(Uri { place, export }),
    }
}

fn host_and_port(authority: &str) -> Result<(&str, u16), &'static str> {
    let (host, port) = match authority.strip_prefix('[').map(|rest| rest.split_once(']')) {
        Some(Some((host, after))) => (host, after.strip_prefix(':')),
        Some(None) => return Err("a ] is missing"),
        None => authority.split_once(':').map_or((authority, None), |(host, port)| (host, Some(port))),
    };
    let port = port.map_or(Ok(PORT), str::parse).map_err(|_| "the port is not a number")?;
    Ok((host, port))
}

/// Undoes percent-encoding.
fn decode(text: &str) -> Result<String, &'static str> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digits = rest.get(..2).and_then(|digits| std::str::from_utf8(digits).ok());
        let value = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok());
        bytes.push(value.ok_or("after % come two hexadecimal digits")?);
        rest = &rest[2..];
    }
    String::from_utf8(bytes).map_err(|_| "it is not UTF-8")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn understands_both_forms() {
        let tcp: Uri = "nbd://127.0.0.1:9000/debian-12".parse().unwrap();
        assert_eq!(tcp.export, "debian-12");
        assert_eq!(tcp.address().unwrap(), Address::Tcp("127.0.0.1:9000".parse().unwrap()));
        let six: Uri = "nbd://[::1]".parse().unwrap();
        assert_eq!(six.address().unwrap(), Address::Tcp("[::1]:10809".parse().unwrap()));
        let unix: Uri = "nbd+unix:///a%20b?socket=/run/x.sock".parse().unwrap();
        assert_eq!(
            (unix.address().unwrap(), unix.export.as_str()),
            (Address::Unix("/run/x.sock".into()), "a b")
        );
    }

    #[test]
    fn says_what_is_wrong() {
        for bad in
            ["debian", "http://x/y", "nbd://", "nbd+unix:///x", "nbd://h:port/", "nbds://h/x", "nbd://h/%f"]
        {
            let error = bad.parse::<Uri>().unwrap_err();
            assert!(error.to_string().contains("use nbd://"), "{bad}: {error}");
        }
    }
}
