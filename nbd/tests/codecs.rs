//! Requests and reply headers: what is written is read again, no part of it is taken for the whole, and the bytes are
//! those of the specification.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use bootcache_nbd::StatusExtent;
use bootcache_nbd::chunk::{Answer, Header, Style};
use bootcache_nbd::consts::{Errno, command, command_flag};
use bootcache_nbd::request::{COMPACT_BYTES, EXTENDED_BYTES, Request};
use proptest::prelude::*;

fn request(extended: bool) -> impl Strategy<Value = Request> {
    let length = if extended { any::<u64>().boxed() } else { any::<u32>().prop_map(u64::from).boxed() };
    (any::<u16>(), 0..10_u16, any::<u64>(), any::<u64>(), length).prop_map(
        move |(flags, command, cookie, offset, length)| {
            let payload =
                if extended { flags & command_flag::PAYLOAD_LEN != 0 } else { command == command::WRITE };
            Request { flags, command, cookie, offset, length, payload: if payload { length } else { 0 } }
        },
    )
}

/// Reads the header at the front of `bytes`, as a client does; the rest is what stands behind it.
fn header(bytes: &[u8], style: Style) -> Option<(Header, &[u8])> {
    let size = Header::size(u32::from_be_bytes(*bytes.first_chunk()?), style)?;
    let (header, rest) = bytes.split_at_checked(size)?;
    Some((Header::parse(header, style)?, rest))
}

proptest! {
    #[test]
    fn requests_are_read_as_they_were_written(
        (extended, request) in any::<bool>().prop_flat_map(|extended| (Just(extended), request(extended)))
    ) {
        let mut bytes = Vec::new();
        prop_assert!(request.encode(&mut bytes, extended));
        prop_assert_eq!(bytes.len(), if extended { EXTENDED_BYTES } else { COMPACT_BYTES });
        prop_assert_eq!(Request::parse(&bytes, extended), Ok(Some(request)));
        for end in 0..bytes.len() {
            prop_assert_eq!(Request::parse(&bytes[..end], extended), Ok(None), "prefix of {}", end);
        }
        prop_assert!(Request::parse(&bytes, !extended).is_err(), "the other kind of headers");
    }

    #[test]
    fn lengths_of_4_gib_do_not_fit_compact_requests(length in 1_u64 << 32..) {
        let request = Request { flags: 0, command: 4, cookie: 0, offset: 0, length, payload: 0 };
        let mut bytes = Vec::new();
        prop_assert!(!request.encode(&mut bytes, false));
        prop_assert!(bytes.is_empty());
    }

    #[test]
    fn replies_are_read_as_they_were_written(
        style in prop_oneof![Just(Style::Simple), Just(Style::Structured), Just(Style::Extended)],
        cookie: u64, offset: u64, length in 1_u32..1 << 20, message in ".{0,40}",
    ) {
        let answer = Answer { style, cookie, offset };
        let mut out = Vec::new();
        answer.done(&mut out);
        let done = header(&out, style).unwrap();
        prop_assert!(done.1.is_empty());
        let cookie_of_done = match done.0 {
            Header::Simple { errno: 0, cookie } | Header::Chunk { flags: 1, kind: 0, cookie, length: 0 } => cookie,
            other => panic!("{other:?}"),
        };
        prop_assert_eq!(cookie_of_done, cookie);

        out.clear();
        answer.error(&mut out, Errno::NoSpc, &message);
        match header(&out, style).unwrap() {
            (Header::Simple { errno, cookie: c }, []) => prop_assert_eq!((errno, c), (28, cookie)),
            (Header::Chunk { flags: 1, kind: 0x8001, cookie: c, length }, rest) => {
                prop_assert_eq!((c, length), (cookie, rest.len() as u64));
                prop_assert_eq!(&rest[..4], &[0, 0, 0, 28]);
                prop_assert_eq!(&rest[6..], message.as_bytes());
            }
            other => prop_assert!(false, "{:?}", other),
        }

        out.clear();
        answer.data(&mut out, offset, length as usize, false);
        match header(&out, style).unwrap() {
            (Header::Simple { errno: 0, cookie: c }, []) => prop_assert_eq!(c, cookie),
            (Header::Chunk { flags: 0, kind: 1, cookie: c, length: told }, rest) => {
                prop_assert_eq!((c, told), (cookie, u64::from(length) + 8));
                prop_assert_eq!(rest, &offset.to_be_bytes()[..]);
            }
            other => prop_assert!(false, "{:?}", other),
        }
        for end in 0..out.len() {
            if let Some((found, rest)) = header(&out[..end], style) {
                prop_assert_eq!(header(&out, style).unwrap().0, found);
                prop_assert!(rest.len() < 8);
            }
        }
    }

    #[test]
    fn no_bytes_are_a_header_of_another_style(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
        for style in [Style::Simple, Style::Structured, Style::Extended] {
            if let Some((_, rest)) = header(&bytes, style) {
                prop_assert!(rest.len() < bytes.len());
            }
        }
    }
}

#[test]
fn extended_headers_are_those_of_the_specification() {
    let mut bytes = Vec::new();
    let request = Request {
        flags: 1 << 5,
        command: 1,
        cookie: 0x0a,
        offset: 0x1000,
        length: 1 << 33,
        payload: 1 << 33,
    };
    assert!(request.encode(&mut bytes, true));
    assert_eq!(
        bytes,
        [
            [0x21, 0xe4, 0x1c, 0x71, 0, 0x20, 0, 1],
            [0, 0, 0, 0, 0, 0, 0, 0x0a],
            [0, 0, 0, 0, 0, 0, 0x10, 0],
            [0, 0, 0, 2, 0, 0, 0, 0],
        ]
        .concat()
    );
    bytes.clear();
    let extents = [StatusExtent { length: 1 << 40, flags: 3 }];
    Answer { style: Style::Extended, cookie: 0x0a, offset: 0x1000 }.status(&mut bytes, 7, &extents, true);
    assert_eq!(
        bytes,
        [
            [0x6e, 0x8a, 0x27, 0x8c, 0, 1, 0, 6],
            [0, 0, 0, 0, 0, 0, 0, 0x0a],
            [0, 0, 0, 0, 0, 0, 0x10, 0],
            [0, 0, 0, 0, 0, 0, 0, 24],
            [0, 0, 0, 7, 0, 0, 0, 1],
            [0, 0, 1, 0, 0, 0, 0, 0],
            [0, 0, 0, 0, 0, 0, 0, 3],
        ]
        .concat()
    );
}

#[test]
fn compact_status_is_that_of_the_specification() {
    let mut bytes = Vec::new();
    let extents = [StatusExtent { length: 0x0102, flags: 2 }];
    Answer { style: Style::Structured, cookie: 5, offset: 0 }.status(&mut bytes, 1, &extents, false);
    assert_eq!(
        bytes,
        [
            0x66, 0x8e, 0x33, 0xef, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 12, 0, 0, 0, 1, 0, 0, 1, 2,
            0, 0, 0, 2
        ]
    );
}
