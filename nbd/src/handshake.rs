//! Fixed newstyle negotiation: bytes to options, and replies to bytes (NBD specification, "Fixed newstyle negotiation").
//!
//! Pure. What an option leads to is decided in [`crate::server`].

use crate::consts::{HANDSHAKE_FLAGS, IHAVEOPT, NBDMAGIC, OPTION_REPLY_MAGIC, STRING_MAX, flag, info, reply};
use crate::disk::Features;

/// Bytes before an option's data: magic, option, length.
pub const OPTION_HEADER_BYTES: usize = 16;

/// The server's greeting.
pub fn greeting() -> [u8; 18] {
    let mut bytes = [0; 18];
    bytes[..8].copy_from_slice(&NBDMAGIC.to_be_bytes());
    bytes[8..16].copy_from_slice(&IHAVEOPT.to_be_bytes());
    bytes[16..].copy_from_slice(&HANDSHAKE_FLAGS.to_be_bytes());
    bytes
}

/// The option number and data length of an option's header; `None` if its magic is wrong.
pub fn option_header(bytes: [u8; OPTION_HEADER_BYTES]) -> Option<(u32, usize)> {
    let [m0, m1, m2, m3, m4, m5, m6, m7, o0, o1, o2, o3, l0, l1, l2, l3] = bytes;
    let magic = u64::from_be_bytes([m0, m1, m2, m3, m4, m5, m6, m7]);
    let length = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
    (magic == IHAVEOPT).then_some((u32::from_be_bytes([o0, o1, o2, o3]), length))
}

/// Appends one option reply to `out`.
pub fn option_reply(out: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&length(data.len()).to_be_bytes());
    out.extend_from_slice(data);
}

/// Appends `NBD_REP_SERVER`: one export of a list.
pub fn list_entry(out: &mut Vec<u8>, option: u32, name: &str, description: &str) {
    let mut data = length(name.len()).to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(description.as_bytes());
    option_reply(out, option, reply::SERVER, &data);
}

/// Appends the `NBD_REP_INFO` replies about an export: what must be told, and what was `wanted`.
pub fn export_info(out: &mut Vec<u8>, option: u32, export: &ExportInfo<'_>, wanted: &[u16]) {
    let mut about = |kind: u16, data: &[u8]| {
        let mut bytes = kind.to_be_bytes().to_vec();
        bytes.extend_from_slice(data);
        option_reply(out, option, reply::INFO, &bytes);
    };
    if wanted.contains(&info::NAME) {
        about(info::NAME, export.name.as_bytes());
    }
    if wanted.contains(&info::DESCRIPTION) && !export.description.is_empty() {
        about(info::DESCRIPTION, export.description.as_bytes());
    }
    let mut sizes = [0; 12];
    sizes[..4].copy_from_slice(&export.features.block_min.to_be_bytes());
    sizes[4..8].copy_from_slice(&export.features.block_preferred.to_be_bytes());
    sizes[8..].copy_from_slice(&export.payload_max.to_be_bytes());
    about(info::BLOCK_SIZE, &sizes);
    let mut size_and_flags = [0; 10];
    size_and_flags[..8].copy_from_slice(&export.size.to_be_bytes());
    size_and_flags[8..].copy_from_slice(&export.flags.to_be_bytes());
    about(info::EXPORT, &size_and_flags);
}

/// What `NBD_OPT_INFO` and `NBD_OPT_GO` tell of an export.
#[derive(Debug)]
pub struct ExportInfo<'a> {
    /// Its canonical name.
    pub name: &'a str,
    /// For people; may be empty.
    pub description: &'a str,
    /// Bytes.
    pub size: u64,
    /// What it can do.
    pub features: Features,
    /// Transmission flags, see [`transmission_flags`].
    pub flags: u16,
    /// Largest payload in bytes.
    pub payload_max: u32,
}

/// The transmission flags that tell what a disk can do.
pub fn transmission_flags(features: Features, structured: bool) -> u16 {
    let pairs = [
        (true, flag::HAS_FLAGS),
        (features.read_only, flag::READ_ONLY),
        (features.flush, flag::SEND_FLUSH),
        (features.fua && !features.read_only, flag::SEND_FUA),
        (features.rotational, flag::ROTATIONAL),
        (features.trim && !features.read_only, flag::SEND_TRIM),
        (features.zero && !features.read_only, flag::SEND_WRITE_ZEROES),
        (structured, flag::SEND_DF),
        (features.multi_conn, flag::CAN_MULTI_CONN),
        (features.prefetch, flag::SEND_CACHE),
        (features.fast_zero && !features.read_only, flag::SEND_FAST_ZERO),
    ];
    pairs.iter().filter(|(on, _)| *on).fold(0, |flags, (_, flag)| flags | flag)
}

/// `NBD_OPT_INFO` and `NBD_OPT_GO`: the export's name and the information types asked for.
pub fn parse_go(data: &[u8]) -> Option<(&str, Vec<u16>)> {
    let (name, rest) = string(data)?;
    let (count, rest) = rest.split_first_chunk::<2>()?;
    let wanted: Vec<u16> = rest.as_chunks::<2>().0.iter().map(|kind| u16::from_be_bytes(*kind)).collect();
    let count = usize::from(u16::from_be_bytes(*count));
    (rest.len() == 2 * count && wanted.len() == count).then_some((name, wanted))
}

/// `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`: the export's name and at most
/// `queries_max` queries.
pub fn parse_queries(data: &[u8], queries_max: usize) -> Option<(&str, Vec<&str>)> {
    let (name, rest) = string(data)?;
    let (count, mut rest) = rest.split_first_chunk::<4>()?;
    let count = u32::from_be_bytes(*count) as usize;
    if count > queries_max {
        return None;
    }
    let mut queries = Vec::with_capacity(count);
    for _ in 0..count {
        let (query, after) = string(rest)?;
        queries.push(query);
        rest = after;
    }
    rest.is_empty().then_some((name, queries))
}

/// A 32-bit length and as many bytes of UTF-8.
fn string(data: &[u8]) -> Option<(&str, &[u8])> {
    let (length, rest) = data.split_first_chunk::<4>()?;
    let length = u32::from_be_bytes(*length) as usize;
    if length > STRING_MAX || length > rest.len() {
        return None;
    }
    let (text, rest) = rest.split_at(length);
    Some((std::str::from_utf8(text).ok()?, rest))
}

fn length(bytes: usize) -> u32 {
    u32::try_from(bytes).expect("replies are far below 4 GiB")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_prefix_of_a_go_is_refused() {
        let mut data = 3u32.to_be_bytes().to_vec();
        data.extend(b"abc");
        data.extend([0, 2, 0, 1, 0, 3]);
        assert_eq!(parse_go(&data), Some(("abc", vec![1, 3])));
        for end in 0..data.len() {
            assert_eq!(parse_go(&data[..end]), None, "{end}");
        }
    }

    #[test]
    fn names_that_are_too_long_or_lie_about_their_length_are_refused() {
        let mut data = u32::MAX.to_be_bytes().to_vec();
        data.extend([b'a'; 8]);
        assert_eq!(parse_go(&data), None);
        let mut data = 5000u32.to_be_bytes().to_vec();
        data.extend([b'a'; 5002]);
        assert_eq!(parse_go(&data), None);
        assert_eq!(parse_queries(&[0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff], 1024), None);
    }

    #[test]
    fn so_many_queries_are_taken_and_no_more() {
        let mut data = vec![0, 0, 0, 0, 0, 0, 0, 2];
        data.extend([0, 0, 0, 1, b'a', 0, 0, 0, 1, b'b']);
        assert_eq!(parse_queries(&data, 2), Some(("", vec!["a", "b"])));
        assert_eq!(parse_queries(&data, 1), None);
    }
}
