//! A page of the digest tree: the digests of 128 blocks (512 KiB of image), as they are hashed and sent.
//!
//! ```text
//! bitmap   16 bytes, bit i (least significant first) set when block i is not all zeroes
//! digests  32 bytes for each set bit, in order: BLAKE3 of the 4 KiB block, the disk's last block padded with zeroes
//! ```
//!
//! The form is canonical: a run of blocks has exactly one page, so equal content has equal digests.

use std::ops::Range;

use crate::block::{BLOCK_BYTES, BLOCK_SIZE};
use crate::digest::{DIGEST_BYTES, Digest};

use super::tree::TreeError;

/// Blocks in a page.
pub const PAGE_BLOCKS: u64 = 128;
/// Bytes of image that a page covers.
pub const PAGE_SPAN: u64 = PAGE_BLOCKS * BLOCK_SIZE;
/// Bytes of a page's bitmap.
pub const BITMAP_BYTES: usize = 16;
/// Bytes of the digests of a page without a zero block.
pub const PAGE_DIGEST_BYTES: usize = 128 * DIGEST_BYTES;
/// Bytes of the longest page.
pub const PAGE_BYTES_MAX: usize = BITMAP_BYTES + PAGE_DIGEST_BYTES;

const ZERO_BLOCK: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];

/// Whether all of `data`, at most one block, is zero.
pub fn is_zero(data: &[u8]) -> bool {
    data == &ZERO_BLOCK[..data.len()]
}

/// The digest of a block's content; a short last block is padded with zeroes.
pub fn block_digest(data: &[u8]) -> Digest {
    debug_assert!(data.len() <= BLOCK_BYTES, "a block has at most 4096 bytes");
    let mut hasher = blake3::Hasher::new();
    hasher.update(data).update(&ZERO_BLOCK[data.len()..]);
    hasher.finalize().into()
}

/// The place of `block` in its page.
pub(super) fn place_in_page(block: u64) -> usize {
    usize::try_from(block % PAGE_BLOCKS).expect("a page has 128 blocks")
}

/// The digests of up to 128 consecutive blocks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Page {
    bitmap: u128,
    digests: Vec<Digest>,
}

impl Page {
    /// The page of blocks that are all zero.
    pub const fn zero() -> Self {
        Self { bitmap: 0, digests: Vec::new() }
    }

    /// The page of `data`: at most [`PAGE_SPAN`] bytes that begin at a page's first block.
    pub fn of(data: &[u8]) -> Self {
        debug_assert!(data.len() as u64 <= PAGE_SPAN, "a page covers 128 blocks");
        let mut page = Self::zero();
        for (i, block) in data.chunks(BLOCK_BYTES).enumerate() {
            if !is_zero(block) {
                page.push(i, block_digest(block));
            }
        }
        page
    }

    /// Adds the digest of block `i`; blocks come in ascending order.
    pub(super) fn push(&mut self, i: usize, digest: Digest) {
        debug_assert!(self.bitmap >> i == 0, "blocks come in ascending order");
        self.bitmap |= 1 << i;
        self.digests.push(digest);
    }

    /// Reads the form in which a page is sent; `blocks` is how many the page covers, 128 but for the last.
    ///
    /// # Errors
    /// [`TreeError::Malformed`] when the length does not fit the bitmap, or the bitmap the page.
    pub fn parse(bytes: &[u8], blocks: u64) -> Result<Self, TreeError> {
        let (bitmap, digests) =
            bytes.split_first_chunk().ok_or(TreeError::Malformed("a page is shorter than its bitmap"))?;
        let bitmap = u128::from_le_bytes(*bitmap);
        if blocks < PAGE_BLOCKS && bitmap >> blocks != 0 {
            return Err(TreeError::Malformed("a page names blocks past the end of the disk"));
        }
        let (digests, rest) = digests.as_chunks::<DIGEST_BYTES>();
        if !rest.is_empty() || digests.len() != bitmap.count_ones() as usize {
            return Err(TreeError::Malformed("a page's length does not fit its bitmap"));
        }
        Ok(Self { bitmap, digests: digests.iter().map(|digest| Digest(*digest)).collect() })
    }

    /// The form in which a page is hashed and sent.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(BITMAP_BYTES + self.digests.len() * DIGEST_BYTES);
        bytes.extend_from_slice(&self.bitmap.to_le_bytes());
        self.digests.iter().for_each(|digest| bytes.extend_from_slice(&digest.0));
        bytes
    }

    /// The digest that stands for this page in its group.
    pub fn digest(&self) -> Digest {
        super::tree::page_digest(&self.to_bytes())
    }

    /// Whether every block is zero.
    pub const fn is_zero(&self) -> bool {
        self.bitmap == 0
    }

    /// Bit i set: block i is not all zeroes.
    pub const fn bitmap(&self) -> u128 {
        self.bitmap
    }

    /// The runs of blocks that are not all zero, in order, as places in the page.
    pub fn data_runs(&self) -> impl Iterator<Item = Range<usize>> {
        runs(self.bitmap)
    }

    /// The runs of zero blocks among the first `blocks` of the page, in order, as places in the page.
    pub fn zero_runs(&self, blocks: usize) -> impl Iterator<Item = Range<usize>> {
        let past_end = u128::MAX.checked_shl(u32::try_from(blocks).unwrap_or(u32::MAX)).unwrap_or(0);
        runs(!self.bitmap & !past_end)
    }

    /// Whether block `i` is all zeroes.
    pub const fn is_zero_at(&self, i: usize) -> bool {
        self.bitmap >> i & 1 == 0
    }

    /// The digest of block `i`; none when it is all zeroes.
    pub fn digest_at(&self, i: usize) -> Option<Digest> {
        let before = (self.bitmap & ((1 << i) - 1)).count_ones();
        (!self.is_zero_at(i)).then(|| self.digests[before as usize])
    }

    /// Whether `data` is the content of block `i`: 4096 bytes, or those that the disk has of its last block.
    pub fn verify(&self, i: usize, data: &[u8]) -> bool {
        self.digest_at(i).map_or_else(|| is_zero(data), |digest| block_digest(data) == digest)
    }

    /// The digest of each block that is not zero, with its place in the page.
    pub fn digests(&self) -> impl Iterator<Item = (usize, Digest)> {
        let bitmap = self.bitmap;
        (0..128).filter(move |i| bitmap >> i & 1 == 1).zip(self.digests.iter().copied())
    }
}

/// The page that was looked at last: who goes through the blocks of one tree in order reads each page once.
#[derive(Debug, Default)]
pub struct LastPage {
    index: Option<u64>,
    page: Page,
}

impl LastPage {
    /// Page `index`, with `read` when it is not the last.
    pub(super) fn get(
        &mut self,
        index: u64,
        read: impl FnOnce(u64) -> Result<Page, TreeError>,
    ) -> Result<&Page, TreeError> {
        if self.index != Some(index) {
            self.page = read(index)?;
            self.index = Some(index);
        }
        Ok(&self.page)
    }
}

/// The runs of set bits, in order.
fn runs(mut bitmap: u128) -> impl Iterator<Item = Range<usize>> {
    std::iter::from_fn(move || {
        if bitmap == 0 {
            return None;
        }
        let start = bitmap.trailing_zeros();
        let end = start + (bitmap >> start).trailing_ones();
        bitmap &= u128::MAX.checked_shl(end).unwrap_or(0);
        Some(start as usize..end as usize)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_page_reads_back_from_its_bytes(blocks in prop::collection::vec(any::<bool>(), 1..=128)) {
            let data: Vec<u8> = blocks.iter().flat_map(|full| vec![u8::from(*full); BLOCK_BYTES]).collect();
            let page = Page::of(&data);
            let bytes = page.to_bytes();
            let count = blocks.len() as u64;
            prop_assert_eq!(&Page::parse(&bytes, count).unwrap(), &page);
            for length in 0..bytes.len() {
                prop_assert!(Page::parse(&bytes[..length], count).is_err());
            }
            let places: Vec<usize> = page.digests().map(|(i, _)| i).collect();
            let expected: Vec<usize> = (0..blocks.len()).filter(|i| blocks[*i]).collect();
            prop_assert_eq!(&places, &expected);
            prop_assert_eq!(page.data_runs().flatten().collect::<Vec<_>>(), expected);
            let digests: Vec<_> = (0..blocks.len()).filter_map(|i| Some((i, page.digest_at(i)?))).collect();
            prop_assert_eq!(digests, page.digests().collect::<Vec<_>>());
            let zero: Vec<usize> = (0..blocks.len()).filter(|i| !blocks[*i]).collect();
            prop_assert_eq!(page.zero_runs(blocks.len()).flatten().collect::<Vec<_>>(), zero);
            prop_assert!(page.data_runs().zip(page.data_runs().skip(1)).all(|(a, b)| a.end < b.start));
        }
    }

    #[test]
    fn a_page_that_names_blocks_past_the_end_is_refused() {
        let bytes = Page::of(&[1; 2 * BLOCK_BYTES]).to_bytes();
        assert!(Page::parse(&bytes, 2).is_ok());
        assert!(Page::parse(&bytes, 1).is_err());
    }

    #[test]
    fn a_short_last_block_counts_as_padded_with_zeroes() {
        let mut padded = vec![7; 100];
        assert_eq!(block_digest(&padded), Page::of(&padded).digests().next().unwrap().1);
        padded.resize(BLOCK_BYTES, 0);
        assert_eq!(block_digest(&padded), Digest::of(&padded));
        assert_eq!(block_digest(&[7; 100]), Digest::of(&padded));
    }
}
