//! How alike two recorded boots of one image are.

use std::collections::HashMap;

use serde::Serialize;

use crate::boot_cache::merge::first_touches;
use crate::boot_cache::recording::Recording;

/// Two boots of one image.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Comparison {
    /// Blocks that both read.
    pub both: u64,
    /// Blocks that only the first read.
    pub only_first: u64,
    /// Blocks that only the second read.
    pub only_second: u64,
    /// Blocks that both read, as a share of those that either did; 1 when none did.
    pub jaccard: f64,
    /// Spearman's rank correlation of the first touches of the blocks that both read: 1 for the same order, −1 for the
    /// reverse, 1 when there are fewer than two.
    pub order_correlation: f64,
}

impl Comparison {
    /// Compares two boots of an image of `image_blocks` blocks.
    pub fn of(first: &Recording, second: &Recording, image_blocks: u64) -> Self {
        let order = |recording: &Recording| -> Vec<u64> {
            let touches = first_touches(std::slice::from_ref(recording), image_blocks);
            touches.into_iter().map(|touch| touch.block).collect()
        };
        let (first, second) = (order(first), order(second));
        let mut place: HashMap<u64, Option<usize>> = first.iter().map(|block| (*block, None)).collect();
        let common: Vec<u64> = second.iter().copied().filter(|block| place.contains_key(block)).collect();
        for (rank, block) in common.iter().enumerate() {
            place.insert(*block, Some(rank));
        }
        let ranks_in_second: Vec<usize> = first.iter().filter_map(|block| place[block]).collect();
        let both = common.len() as u64;
        let either = first.len() as u64 + second.len() as u64 - both;
        Self {
            both,
            only_first: first.len() as u64 - both,
            only_second: second.len() as u64 - both,
            jaccard: if either == 0 { 1.0 } else { both as f64 / either as f64 },
            order_correlation: spearman(&ranks_in_second),
        }
    }
}

/// Spearman's ρ between 0, 1, 2 … and `ranks`, a permutation: `1 − 6·Σd² ÷ n(n² − 1)`.
fn spearman(ranks: &[usize]) -> f64 {
    let n = ranks.len() as f64;
    if ranks.len() < 2 {
        return 1.0;
    }
    let squares = ranks.iter().enumerate().map(|(own, other)| (own as f64 - *other as f64).powi(2));
    1.0 - 6.0 * squares.sum::<f64>() / (n * (n * n - 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot_cache::recording::Read;

    fn boot(blocks: &[u64]) -> Recording {
        let read = |(at, block): (usize, &u64)| Read {
            offset: block << 12,
            length: 1,
            time_ns: at as u64,
            took_ns: 0,
        };
        Recording::new(blocks.iter().enumerate().map(read).collect(), 0)
    }

    fn compare(first: &[u64], second: &[u64]) -> Comparison {
        Comparison::of(&boot(first), &boot(second), 1000)
    }

    #[test]
    fn equal_boots_are_equal_and_reversed_ones_are_opposite() {
        let same = compare(&[5, 1, 9], &[5, 1, 9]);
        assert_eq!((same.jaccard, same.order_correlation), (1.0, 1.0));
        let reversed = compare(&[1, 2, 3, 4], &[4, 3, 2, 1]);
        assert_eq!((reversed.jaccard, reversed.order_correlation), (1.0, -1.0));
    }

    #[test]
    fn blocks_of_one_boot_only_count_against_likeness_and_not_against_order() {
        let some = compare(&[1, 2, 3, 50], &[60, 1, 70, 2, 3]);
        assert_eq!((some.both, some.only_first, some.only_second), (3, 1, 2));
        assert_eq!((some.jaccard, some.order_correlation), (0.5, 1.0));
        let nothing = compare(&[], &[]);
        assert_eq!((nothing.jaccard, nothing.order_correlation), (1.0, 1.0));
        assert_eq!(compare(&[1], &[2]).jaccard, 0.0);
    }
}
