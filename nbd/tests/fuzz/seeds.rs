//! The seed corpus: conversations that keep every rule, and what a fuzzer does to them.

use bolero::TypeGenerator;

/// Bytes that begin as a conversation of the corpus and are spoilt after that.
#[derive(Debug, Clone, TypeGenerator)]
pub(crate) struct Spoilt {
    /// Which conversation; any number will do.
    pub(crate) seed: u8,
    edits: Vec<Edit>,
    tail: Vec<u8>,
}

#[derive(Debug, Clone, TypeGenerator)]
enum Edit {
    Set {
        at: u16,
        to: u8,
    },
    /// Numbers at the borders of what fits, where lengths and offsets may stand.
    Word {
        at: u16,
        to: u8,
    },
    Cut {
        at: u16,
        length: u8,
    },
    Repeat {
        at: u16,
        length: u8,
    },
}

const WORDS: [u64; 12] = [
    0,
    1,
    u64::MAX,
    1 << 63,
    1 << 32,
    u32::MAX as u64,
    0xffff_ffff_0000_0000,
    33 << 20,
    32 << 20,
    4096,
    (1 << 20) - 1,
    0x8000_0001_8000_0001,
];

impl Spoilt {
    /// The bytes.
    pub(crate) fn bytes(&self, seeds: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = seeds[usize::from(self.seed) % seeds.len()].clone();
        for edit in &self.edits {
            edit.apply(&mut bytes);
        }
        bytes.extend_from_slice(&self.tail);
        bytes
    }
}

impl Edit {
    fn apply(&self, bytes: &mut Vec<u8>) {
        let (Self::Set { at, .. } | Self::Word { at, .. } | Self::Cut { at, .. } | Self::Repeat { at, .. }) =
            *self;
        if bytes.is_empty() {
            return;
        }
        let at = usize::from(at) % bytes.len();
        match *self {
            Self::Set { to, .. } => bytes[at] = to,
            Self::Word { to, .. } => {
                let word = WORDS[usize::from(to) % WORDS.len()].to_be_bytes();
                let width = if to & 0x80 == 0 { 8 } else { 4 };
                let end = (at + width).min(bytes.len());
                bytes[at..end].copy_from_slice(&word[8 - width..][..end - at]);
            }
            Self::Cut { length, .. } => {
                bytes.drain(at..(at + usize::from(length)).min(bytes.len()));
            }
            Self::Repeat { length, .. } => {
                let part = bytes[at..(at + usize::from(length)).min(bytes.len())].to_vec();
                bytes.splice(at..at, part);
            }
        }
    }
}

/// One option of the handshake.
pub(crate) fn option(code: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend(code.to_be_bytes());
    bytes.extend(length(data));
    bytes.extend(data);
    bytes
}

fn length(data: &[u8]) -> [u8; 4] {
    u32::try_from(data.len()).expect("seeds are short").to_be_bytes()
}

fn string(text: &[u8]) -> Vec<u8> {
    [&length(text)[..], text].concat()
}

/// `NBD_OPT_GO` for the export.
pub(crate) fn go() -> Vec<u8> {
    option(7, &[string(b"disk"), vec![0, 1, 0, 3]].concat())
}

fn context(code: u32) -> Vec<u8> {
    option(code, &[string(b"disk"), 1_u32.to_be_bytes().to_vec(), string(b"base:allocation")].concat())
}

/// What a client says in the handshake to be answered in each of the three styles.
pub(crate) fn openings() -> [Vec<u8>; 3] {
    let flags = vec![0, 0, 0, 3];
    [
        [flags.clone(), go()].concat(),
        [flags.clone(), option(8, &[]), context(10), go()].concat(),
        [flags, option(11, &[]), context(10), go()].concat(),
    ]
}

/// Whole handshakes of a client.
pub(crate) fn handshakes() -> Vec<Vec<u8>> {
    let mut seeds = openings().to_vec();
    let flags = vec![0, 0, 0, 3];
    seeds.push(
        [flags.clone(), option(3, &[]), context(9), option(6, &[string(b""), vec![0, 0]].concat())].concat(),
    );
    seeds.push([vec![0, 0, 0, 1], option(1, b"disk")].concat());
    seeds.push([flags.clone(), option(5, &[]), option(2, &[])].concat());
    seeds.push(
        [flags, option(99, b"unknown"), option(8, &[]), option(11, &[]), option(8, &[]), go()].concat(),
    );
    seeds
}

/// One request of the transmission, compact or extended.
pub(crate) fn request(extended: bool, command: u16, flags: u16, offset: u64, length: u32) -> Vec<u8> {
    let magic: u32 = if extended { 0x21e4_1c71 } else { 0x2560_9513 };
    let mut bytes = magic.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend((offset ^ 0x1234).to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    if extended {
        bytes.extend(u64::from(length).to_be_bytes());
    } else {
        bytes.extend(length.to_be_bytes());
    }
    bytes
}

/// Requests of every command, some with a payload.
pub(crate) fn transmissions(extended: bool) -> Vec<Vec<u8>> {
    let payload = if extended { 1 << 5 } else { 0 };
    let read = request(extended, 0, 0, 4096, 8192);
    let write = [request(extended, 1, payload, 512, 64), vec![7; 64]].concat();
    let rest = [
        request(extended, 3, 0, 0, 0),
        request(extended, 4, 1, 0, 65536),
        request(extended, 5, 0, 4096, 4096),
        request(extended, 6, 2 | 16, 8192, 4096),
        request(extended, 7, 8, 0, 1 << 20),
    ]
    .concat();
    vec![
        [read.clone(), write.clone(), rest.clone()].concat(),
        [rest, request(extended, 0, 4, 0, 1 << 20), request(extended, 2, 0, 0, 0)].concat(),
        [write, read, request(extended, 0, 0, 0, 0)].concat(),
    ]
}

fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(length(data));
    bytes.extend(data);
    bytes
}

/// All that a server says to a client that opens an export of 1 MiB and reads, asks for status and writes.
///
/// The client's cookies begin at 1: the answers fit the first requests.
pub(crate) fn servers() -> Vec<Vec<u8>> {
    let greeting = b"NBDMAGICIHAVEOPT\0\x03".to_vec();
    let export = [&[0, 0][..], &(1_u64 << 20).to_be_bytes(), &[0x05, 0xff]].concat();
    let sizes = [0, 3, 0, 0, 0, 1, 0, 0, 16, 0, 2, 0, 0, 0];
    let opened = |options: Vec<u8>| {
        [
            greeting.clone(),
            options,
            option_reply(7, 3, &export),
            option_reply(7, 3, &sizes),
            option_reply(7, 1, &[]),
        ]
        .concat()
    };
    let refused = |code| option_reply(code, 0x8000_0001, b"no");
    let selected = [option_reply(10, 4, b"\0\0\0\x01base:allocation"), option_reply(10, 1, &[])].concat();
    let chunk = |flags: u16, kind: u16, cookie: u64, data: &[u8]| {
        let mut bytes = 0x668e_33ef_u32.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(length(data));
        bytes.extend(data);
        bytes
    };
    let wide = |flags: u16, kind: u16, cookie: u64, offset: u64, data: &[u8]| {
        let mut bytes = 0x6e8a_278c_u32.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(u64::from(u32::from_be_bytes(length(data))).to_be_bytes());
        bytes.extend(data);
        bytes
    };
    let simple = |cookie: u64, data: &[u8]| {
        [&0x6744_6698_u32.to_be_bytes()[..], &[0; 4], &cookie.to_be_bytes(), data].concat()
    };
    let at = |offset: u64, data: &[u8]| [&offset.to_be_bytes()[..], data].concat();
    let extents = [0, 0, 0, 1, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 3];
    let wide_extents =
        [&[0, 0, 0, 1, 0, 0, 0, 1][..], &(1_u64 << 20).to_be_bytes(), &3_u64.to_be_bytes()].concat();
    let structured = [refused(11), option_reply(8, 1, &[]), selected.clone()].concat();
    vec![
        [opened([refused(11), refused(8)].concat()), simple(1, &[5; 512]), simple(3, &[])].concat(),
        [
            opened(structured),
            chunk(0, 1, 1, &at(4096, &[9; 256])),
            chunk(1, 2, 1, &at(4352, &[0, 0, 1, 0])),
            chunk(1, 5, 2, &extents),
            chunk(1, 0x8001, 3, b"\0\0\0\x05\0\x02no"),
        ]
        .concat(),
        [
            opened([option_reply(11, 1, &[]), selected].concat()),
            wide(1, 1, 1, 4096, &at(4096, &[9; 512])),
            wide(1, 6, 2, 4096, &wide_extents),
            wide(1, 0, 3, 4096, &[]),
        ]
        .concat(),
    ]
}
