//! The server's side of the handshake, on a connection (NBD specification, "Fixed newstyle negotiation").
//!
//! Reads exactly the bytes of one option at a time, so that nothing sent in plain text before STARTTLS can be taken
//! for something sent behind it. The caller sets the deadline.

use std::any::Any;
use std::io;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::chunk::{Style, message};
use crate::consts::{FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, HANDSHAKE_FLAGS, STRING_MAX, option, reply};
use crate::handshake::{
    ExportInfo, OPTION_HEADER_BYTES, export_info, greeting, list_entry, option_header, option_reply,
    parse_go, parse_queries, transmission_flags,
};
use crate::limits::OPTION_SKIP_MAX;
use crate::server::{Export, OpenError, Place, Shared, Tls};

/// A connection's bytes, whatever carries them.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Any + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Any + Send + Unpin> Stream for T {}

/// What a handshake came to.
pub(crate) struct Agreed {
    pub(crate) export: Export,
    /// Held for as long as the connection lasts.
    pub(crate) place: Place,
    pub(crate) style: Style,
    /// Selected metadata contexts; a context's number on the wire is its place here plus one.
    pub(crate) contexts: Vec<&'static str>,
}

/// Greets a client and waits for its flags.
pub(crate) async fn greet(stream: &mut Box<dyn Stream>) -> io::Result<u32> {
    stream.write_all(&greeting()).await?;
    stream.read_u32().await
}

/// Leads a client that sent these flags through the handshake; `None` when it left in order.
pub(crate) async fn server(
    stream: Box<dyn Stream>,
    client_flags: u32,
    shared: &Arc<Shared>,
    tls: &Tls,
) -> io::Result<Option<(Box<dyn Stream>, Agreed)>> {
    let fixed_newstyle = client_flags & u32::from(FLAG_FIXED_NEWSTYLE) != 0;
    if client_flags & !u32::from(HANDSHAKE_FLAGS) != 0 || !fixed_newstyle {
        return Err(violation("unknown client flags"));
    }
    let mut session = Session {
        stream,
        shared,
        tls,
        no_zeroes: client_flags & u32::from(FLAG_NO_ZEROES) != 0,
        encrypted: false,
        style: Style::Simple,
        selected: None,
        out: Vec::new(),
    };
    for _ in 0..shared.limits.options {
        let step = session.next().await?;
        match step {
            Step::More => {}
            Step::Left => return Ok(None),
            Step::Transmission(export, place) => return Ok(Some(session.finish(export, place))),
        }
    }
    Err(violation("too many options"))
}

enum Step {
    More,
    Left,
    Transmission(Export, Place),
}

struct Session<'a> {
    stream: Box<dyn Stream>,
    shared: &'a Arc<Shared>,
    tls: &'a Tls,
    no_zeroes: bool,
    encrypted: bool,
    style: Style,
    /// The export that contexts were selected for, and the contexts.
    selected: Option<(String, Vec<&'static str>)>,
    out: Vec<u8>,
}

impl Session<'_> {
    /// Reads and answers one option.
    async fn next(&mut self) -> io::Result<Step> {
        let mut header = [0; OPTION_HEADER_BYTES];
        self.stream.read_exact(&mut header).await?;
        let (code, length) = option_header(header).ok_or_else(|| violation("an option without its magic"))?;
        let too_long = length > self.shared.limits.option_bytes;
        let mut data = Vec::new();
        if too_long {
            if length > OPTION_SKIP_MAX || code == option::EXPORT_NAME {
                return Err(violation("an option of absurd length"));
            }
            let mut skipped = (&mut self.stream).take(length as u64);
            tokio::io::copy(&mut skipped, &mut tokio::io::sink()).await?;
        } else {
            data.resize(length, 0);
            self.stream.read_exact(&mut data).await?;
        }
        if self.needs_tls() && !matches!(code, option::STARTTLS | option::ABORT) {
            if code == option::EXPORT_NAME {
                return Err(violation("an export was opened without TLS"));
            }
            self.say(code, reply::ERR_TLS_REQD, b"this server wants STARTTLS first");
            return self.send().await;
        }
        if too_long {
            self.say(code, reply::ERR_TOO_BIG, b"the option is too long");
            return self.send().await;
        }
        match code {
            option::EXPORT_NAME => return self.export_name(&data).await,
            option::ABORT => {
                self.say(code, reply::ACK, b"");
                // The client may be gone already, as the specification allows.
                let _ = self.send().await;
                return Ok(Step::Left);
            }
            option::STARTTLS if data.is_empty() => return self.start_tls().await,
            option::LIST if data.is_empty() => {
                for (name, description) in self.shared.exports.list().await {
                    list_entry(&mut self.out, code, &name, &description);
                }
                self.say(code, reply::ACK, b"");
            }
            option::STRUCTURED_REPLY if data.is_empty() => {
                if self.style == Style::Extended {
                    self.say(
                        code,
                        reply::ERR_EXT_HEADER_REQD,
                        b"extended headers include structured replies",
                    );
                } else {
                    self.style = Style::Structured;
                    self.say(code, reply::ACK, b"");
                }
            }
            option::EXTENDED_HEADERS if data.is_empty() => {
                self.style = Style::Extended;
                self.say(code, reply::ACK, b"");
            }
            option::LIST | option::STARTTLS | option::STRUCTURED_REPLY | option::EXTENDED_HEADERS => {
                self.say(code, reply::ERR_INVALID, b"this option takes no data");
            }
            option::INFO | option::GO => return self.info_or_go(code, &data).await,
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.contexts(code, &data).await,
            _ => self.say(code, reply::ERR_UNSUP, b"unknown option"),
        }
        self.send().await
    }

    fn needs_tls(&self) -> bool {
        match self.tls {
            #[cfg(feature = "tls")]
            Tls::Required(_) => !self.encrypted,
            _ => false,
        }
    }

    fn say(&mut self, code: u32, kind: u32, data: &[u8]) {
        option_reply(&mut self.out, code, kind, data);
    }

    fn refuse(&mut self, code: u32, error: &OpenError) {
        let kind = match error {
            OpenError::Unknown(_) => reply::ERR_UNKNOWN,
            OpenError::Refused(_) => reply::ERR_POLICY,
            OpenError::Shutdown(_) => reply::ERR_SHUTDOWN,
        };
        self.say(code, kind, message(&error.to_string()));
    }

    async fn send(&mut self) -> io::Result<Step> {
        self.stream.write_all(&self.out).await?;
        self.stream.flush().await?;
        self.out.clear();
        Ok(Step::More)
    }

    fn info<'a>(&self, export: &'a Export) -> ExportInfo<'a> {
        let features = export.disk.features().sound();
        ExportInfo {
            name: &export.name,
            description: &export.description,
            size: export.disk.size(),
            features,
            flags: transmission_flags(features, self.style != Style::Simple),
            payload_max: self.shared.limits.payload,
        }
    }

    async fn export_name(&mut self, data: &[u8]) -> io::Result<Step> {
        // This option has no error reply: the connection ends.
        let name = std::str::from_utf8(data).map_err(|_| violation("an export name that is not UTF-8"))?;
        if self.style == Style::Extended || name.len() > STRING_MAX {
            return Err(violation("an export cannot be opened that way"));
        }
        let export = self.shared.exports.open(name).await.map_err(io::Error::other)?;
        let place = Place::take(self.shared, &export).map_err(io::Error::other)?;
        let info = self.info(&export);
        self.out.extend_from_slice(&info.size.to_be_bytes());
        self.out.extend_from_slice(&info.flags.to_be_bytes());
        if !self.no_zeroes {
            self.out.extend_from_slice(&[0; 124]);
        }
        self.send().await?;
        Ok(Step::Transmission(export, place))
    }

    async fn info_or_go(&mut self, code: u32, data: &[u8]) -> io::Result<Step> {
        let Some((name, wanted)) = parse_go(data) else {
            self.say(code, reply::ERR_INVALID, b"malformed request for an export");
            return self.send().await;
        };
        let export = match self.shared.exports.open(name).await {
            Ok(export) => export,
            Err(error) => {
                self.refuse(code, &error);
                return self.send().await;
            }
        };
        // Before the ACK: a client that is told so knows why, and may come again.
        let place = match (code == option::GO).then(|| Place::take(self.shared, &export)).transpose() {
            Ok(place) => place,
            Err(reason) => {
                self.say(code, reply::ERR_POLICY, reason.as_bytes());
                return self.send().await;
            }
        };
        let info = self.info(&export);
        export_info(&mut self.out, code, &info, &wanted);
        self.say(code, reply::ACK, b"");
        self.send().await?;
        Ok(place.map_or(Step::More, |place| Step::Transmission(export, place)))
    }

    /// `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
    async fn contexts(&mut self, code: u32, data: &[u8]) {
        let setting = code == option::SET_META_CONTEXT;
        if setting {
            self.selected = None;
        }
        if self.style == Style::Simple {
            return self.say(code, reply::ERR_INVALID, b"metadata contexts need structured replies");
        }
        let Some((name, queries)) = parse_queries(data, self.shared.limits.queries) else {
            return self.say(code, reply::ERR_INVALID, b"malformed metadata query");
        };
        let export = match self.shared.exports.open(name).await {
            Ok(export) => export,
            Err(error) => return self.refuse(code, &error),
        };
        let known = export.disk.contexts();
        let all = !setting && queries.is_empty();
        let chosen: Vec<&'static str> = known
            .iter()
            .copied()
            .filter(|context| all || queries.iter().any(|query| matches(query, context, setting)))
            .collect();
        for (number, context) in (1u32..).zip(&chosen) {
            let mut data = if setting { number } else { 0 }.to_be_bytes().to_vec();
            data.extend_from_slice(context.as_bytes());
            self.say(code, reply::META_CONTEXT, &data);
        }
        self.say(code, reply::ACK, b"");
        if setting {
            self.selected = Some((export.name, chosen));
        }
    }

    #[cfg(feature = "tls")]
    async fn start_tls(&mut self) -> io::Result<Step> {
        let code = option::STARTTLS;
        let config = match self.tls {
            _ if self.encrypted => {
                self.say(code, reply::ERR_INVALID, b"the connection is encrypted already");
                return self.send().await;
            }
            Tls::Off => {
                self.say(code, reply::ERR_POLICY, b"this server has no certificate");
                return self.send().await;
            }
            Tls::Allowed(config) | Tls::Required(config) => Arc::clone(config),
        };
        self.say(code, reply::ACK, b"");
        self.send().await?;
        let plain = std::mem::replace(&mut self.stream, Box::new(tokio::io::empty()));
        self.stream = Box::new(tokio_rustls::TlsAcceptor::from(config).accept(plain).await?);
        // What was agreed in plain text is forgotten, as the specification wants.
        self.encrypted = true;
        self.style = Style::Simple;
        self.selected = None;
        Ok(Step::More)
    }

    #[cfg(not(feature = "tls"))]
    async fn start_tls(&mut self) -> io::Result<Step> {
        let Tls::Off = self.tls;
        let _ = self.encrypted;
        self.say(option::STARTTLS, reply::ERR_POLICY, b"this server has no TLS");
        self.send().await
    }

    fn finish(self, export: Export, place: Place) -> (Box<dyn Stream>, Agreed) {
        let contexts = match self.selected {
            // Contexts hold for the export they were selected for.
            Some((name, contexts)) if name == export.name => contexts,
            _ => Vec::new(),
        };
        (self.stream, Agreed { export, place, style: self.style, contexts })
    }
}

/// Whether a query names `context`. A query that ends in a colon lists a namespace, and selects nothing.
fn matches(query: &str, context: &str, setting: bool) -> bool {
    query == context || (!setting && query.ends_with(':') && context.starts_with(query))
}

fn violation(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
