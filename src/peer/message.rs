//! What nodes say to each other. Wire structs only: MessagePack maps with field names in MFD frames.
//!
//! ```text
//! asker                                server
//!   PEER_HELLO   Hello            ──►
//!                                 ◄──  PEER_HELLO   Hello
//!   PEER_REQUEST Request{id, ask} ──►                            any number in flight
//!                                 ◄──  PEER_REPLY   Reply{id, answer} | bulk     in any order
//! ```
//!
//! Each request has one reply, but [`Ask::Watch`], which has one whenever there are more boot frames, and
//! every [`HEARTBEAT`]. All lists and lengths are bounded, here by [`Ask::is_within_limits`], and by the frame.

use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::block::{BLOCK_SIZE, Extent};
use crate::boot_cache::{FRAME_LENGTH_MAX, HEADS_LENGTH_MAX};
use crate::digest::Digest;
use crate::name::ImageName;
use crate::wire::frame::BULK_DATA_MAX;

/// The version of this protocol. A connection closes when the two differ.
pub const PROTOCOL_VERSION: u16 = 1;
/// Most blocks in one [`Ask::Blocks`]: 1 MiB.
pub const BLOCKS_MAX: u64 = (1 << 20) / BLOCK_SIZE;
/// Most extents in one [`Ask::Blocks`].
pub const EXTENTS_MAX: usize = 256;
/// Most pages, and most groups, in one [`Ask::Blocks`].
pub const PAGES_MAX: usize = 128;
/// Most peers that an answer names.
pub const PEERS_MAX: usize = 1000;
/// Most bytes of [`Have::pages`]; of an image so large and so scattered that its bitmap is longer, none is told.
pub const PAGES_LENGTH_MAX: usize = 48 << 10;
/// Longest name of a node.
pub const NODE_NAME_MAX: usize = 64;
/// A watched peer says something at least this often; silence for several of these means that it is gone.
pub const HEARTBEAT: Duration = Duration::from_millis(500);

const _: () =
    assert!(HEADS_LENGTH_MAX <= BULK_DATA_MAX && FRAME_LENGTH_MAX <= BULK_DATA_MAX, "each goes in one reply");

/// First message on a connection, both ways.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hello {
    /// [`PROTOCOL_VERSION`].
    pub version: u16,
    /// Who speaks, for logs. Proves nothing.
    pub node: String,
    /// Who speaks, for the order of the relay (`crate::choose::PeerKey`): different for every node.
    pub key: u64,
    /// The TCP port on which the speaker serves peers itself, on the address that the connection comes from.
    pub listen: Option<u16>,
}

/// A request; `id` is chosen by the asker and unique among those in flight.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Comes back in the reply.
    pub id: u32,
    /// What is asked.
    pub ask: Ask,
}

/// Which image is meant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wanted {
    /// The one that has this name at the server.
    Name(ImageName),
    /// The one with this root.
    Root(Digest),
}

/// What may be asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Ask {
    /// The manifest, what the server has of the image, and who else has or is getting it.
    Describe(Wanted),
    /// The boot cache's heads.
    Heads {
        /// The image.
        root: Digest,
    },
    /// The top of the digest tree.
    Top {
        /// The image.
        root: Digest,
    },
    /// One frame of the boot cache, compressed, as it was recorded.
    Frame {
        /// The image.
        root: Digest,
        /// Which frame.
        index: u32,
        /// If the server does not have it yet but will, answer when it has come.
        wait: bool,
    },
    /// Blocks, and parts of the digest tree that the asker lacks to check them.
    Blocks {
        /// The image.
        root: Digest,
        /// First block and number of blocks, at most [`BLOCKS_MAX`] in all.
        extents: Vec<(u64, u32)>,
        /// Groups of the tree to send along.
        groups: Vec<u32>,
        /// Pages of the tree to send along.
        pages: Vec<u32>,
        /// A guest waits for it.
        urgent: bool,
        /// The blocks may be compressed: the link is so slow that it pays.
        pack: bool,
    },
    /// What the server has, now and whenever it has more.
    Watch {
        /// The image.
        root: Digest,
    },
    /// The asker, who serves too, is full, or no longer: nobody should be pointed to it until it says otherwise.
    Full {
        /// The image.
        root: Digest,
        /// Whether it is.
        full: bool,
    },
    /// The reply to request `id` is no longer wanted.
    Cancel {
        /// The request.
        id: u32,
    },
}

/// The head of a reply.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reply {
    /// The request's.
    pub id: u32,
    /// What the bulk bytes are.
    pub answer: Answer,
}

/// What may be answered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// To [`Ask::Describe`]; the bulk is the manifest.
    Described {
        /// What the server has, but for the pages, which are told who watches.
        have: Have,
        /// Others that have the image or are getting it, at most [`PEERS_MAX`]: those not named on this connection before,
        /// and a few of the rest.
        peers: Vec<Peer>,
    },
    /// To [`Ask::Heads`], [`Ask::Top`], [`Ask::Frame`]; the bulk is what was asked for.
    Data,
    /// To [`Ask::Blocks`]; the bulk is the groups, then the pages, then the blocks, in the order in which this head
    /// names them.
    Blocks {
        /// The groups that are in the bulk, with their lengths.
        groups: Vec<(u32, u32)>,
        /// The pages that are in the bulk, with their lengths.
        pages: Vec<(u32, u32)>,
        /// The blocks that are in the bulk: those asked for that the server has. The disk's last block may be short.
        extents: Vec<(u64, u32)>,
        /// The blocks' bytes are compressed with zstd.
        packed: bool,
    },
    /// To [`Ask::Watch`].
    Have(Have),
    /// To [`Ask::Frame`] with `wait`: this node has it or is about to; ask it. Who asks again gets the frame.
    Elsewhere(Peer),
    /// The server does not have it.
    Absent,
    /// The server will not, or cannot; why, for a log.
    Refused(String),
}

/// Another node that has the image or is getting it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    /// Where it serves.
    pub address: SocketAddr,
    /// Its [`Hello::key`].
    pub key: u64,
}

/// What a node has of an image.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Have {
    /// Everything.
    pub complete: bool,
    /// The image was published here, not fetched from a peer.
    pub origin: bool,
    /// Frames of the boot cache without a gap from the first.
    pub frames: u32,
    /// The pages all of whose blocks are here, as a roaring bitmap in its portable form, empty when complete; none when it
    /// is told another time.
    #[serde(with = "serde_bytes")]
    pub pages: Option<Vec<u8>>,
    /// The node's load.
    pub load: Load,
}

/// A node's load, each item from 0 (idle) to 1.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Load {
    /// Processors.
    pub cpu: f32,
    /// Memory.
    pub memory: f32,
    /// Disks.
    pub disk: f32,
    /// Network.
    pub network: f32,
}

impl Ask {
    /// Whether every list and number is within what the protocol allows. What does not fit is refused unread.
    pub fn is_within_limits(&self) -> bool {
        match self {
            Self::Blocks { extents, groups, pages, .. } => {
                let blocks: u64 = extents.iter().map(|(_, count)| u64::from(*count)).sum();
                let fits = |(start, count): &(u64, u32)| start.checked_add(u64::from(*count)).is_some();
                extents.len() <= EXTENTS_MAX
                    && groups.len() <= PAGES_MAX
                    && pages.len() <= PAGES_MAX
                    && blocks <= BLOCKS_MAX
                    && extents.iter().all(fits)
            }
            _ => true,
        }
    }
}

/// An extent as it is sent; it has at most [`BLOCKS_MAX`] blocks.
pub fn to_wire(extent: Extent) -> (u64, u32) {
    (extent.start, u32::try_from(extent.count).expect("requests are cut to BLOCKS_MAX blocks"))
}

/// An extent as it was received.
pub fn from_wire((start, count): (u64, u32)) -> Extent {
    Extent::new(start, u64::from(count))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::frame::{self, FrameType};

    #[test]
    fn every_request_and_answer_reads_back() {
        let root = Digest::of(b"image");
        let asks = [
            Ask::Describe(Wanted::Root(root)),
            Ask::Describe(Wanted::Name("debian-12".parse().unwrap())),
            Ask::Heads { root },
            Ask::Frame { root, index: 7, wait: true },
            Ask::Blocks {
                root,
                extents: vec![(1, 2)],
                groups: vec![0],
                pages: vec![3],
                urgent: true,
                pack: true,
            },
            Ask::Cancel { id: 3 },
        ];
        for ask in asks {
            let request = Request { id: 9, ask };
            let bytes = frame::encode(FrameType::PEER_REQUEST, &request).unwrap();
            assert_eq!(frame::decode::<Request>(&bytes[8..]).unwrap(), request);
        }
        let reply =
            Reply { id: 1, answer: Answer::Have(Have { pages: Some(vec![1, 2]), ..Have::default() }) };
        let bytes = frame::encode_bulk(FrameType::PEER_REPLY, &reply, 0).unwrap();
        assert_eq!(frame::decode_bulk::<Reply>(&bytes[8..]).unwrap(), (reply, &[][..]));
    }

    #[test]
    fn the_longest_answers_fit_a_reply() {
        let address = SocketAddr::from(([0xffff; 8], u16::MAX));
        let peers = vec![Peer { address, key: u64::MAX }; PEERS_MAX];
        let have = Have { frames: u32::MAX, pages: Some(vec![0xff; PAGES_LENGTH_MAX]), ..Have::default() };
        let described = Answer::Described { have: Have { pages: None, ..have.clone() }, peers };
        for answer in [described, Answer::Have(have)] {
            let reply = Reply { id: u32::MAX, answer };
            frame::encode_bulk(FrameType::PEER_REPLY, &reply, BULK_DATA_MAX - 1024).unwrap();
        }
    }

    #[test]
    fn requests_beyond_the_limits_are_refused() {
        let blocks = |extents| Ask::Blocks {
            root: Digest::of(b""),
            extents,
            groups: Vec::new(),
            pages: Vec::new(),
            urgent: false,
            pack: false,
        };
        assert!(blocks(vec![(0, 256)]).is_within_limits());
        assert!(!blocks(vec![(0, 256), (900, 1)]).is_within_limits());
        assert!(!blocks(vec![(u64::MAX, 1)]).is_within_limits());
        assert!(!blocks(vec![(0, 0); 300]).is_within_limits());
    }
}
