//! The weighted load score of the thesis: `f(x₁ … xₙ) = Σ wᵢ·xᵢ`, 0 ≤ xᵢ ≤ 1, 0 ≤ wᵢ ≤ 1, Σ wᵢ = 1; the lowest wins.

/// A load item, by its number in the database's `host_load`. The first four are fixed; others may be added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Item(pub u16);

impl Item {
    /// Share of CPU time in use.
    pub const CPU: Self = Self(0);
    /// Share of memory in use.
    pub const MEMORY: Self = Self(1);
    /// Share of time for which the disk is busy.
    pub const DISK: Self = Self(2);
    /// Share of the link's capacity that is in use.
    pub const NETWORK: Self = Self(3);
}

/// Reported values of load items, each in [0, 1].
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Load(Vec<(Item, f32)>);

/// What an item counts as that was not reported: neither good nor bad.
const UNKNOWN: f32 = 0.5;

impl Load {
    /// The load of `items`; values outside [0, 1] are brought into it, those that are not numbers are left out.
    pub fn new(items: impl IntoIterator<Item = (Item, f32)>) -> Self {
        let sane = items.into_iter().filter(|(_, value)| !value.is_nan());
        Self(sane.map(|(item, value)| (item, value.clamp(0.0, 1.0))).collect())
    }

    /// The value of `item`, if it was reported.
    pub fn get(&self, item: Item) -> Option<f32> {
        self.0.iter().find(|(other, _)| *other == item).map(|(_, value)| *value)
    }
}

/// How much each load item counts: each in [0, 1], together 1.
#[derive(Debug, Clone, PartialEq)]
pub struct Weights(Vec<(Item, f32)>);

/// Weights that break the rule.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum WeightsError {
    /// One is not in [0, 1].
    #[error("the weight of load item {} is {value}: a weight is from 0 to 1", item.0)]
    OutOfRange {
        /// Whose weight.
        item: Item,
        /// What was given.
        value: f32,
    },
    /// An item has two.
    #[error("load item {} has two weights: give one", .0.0)]
    Twice(Item),
    /// They do not add up.
    #[error("the weights add up to {0}: make them add up to 1")]
    Sum(f32),
}

impl Default for Weights {
    /// Disk and network count most.
    fn default() -> Self {
        Self(vec![(Item::CPU, 0.2), (Item::MEMORY, 0.1), (Item::DISK, 0.35), (Item::NETWORK, 0.35)])
    }
}

impl Weights {
    /// # Errors
    /// [`WeightsError`].
    pub fn new(weights: impl IntoIterator<Item = (Item, f32)>) -> Result<Self, WeightsError> {
        let mut known: Vec<(Item, f32)> = Vec::new();
        for (item, value) in weights {
            if !(0.0..=1.0).contains(&value) {
                return Err(WeightsError::OutOfRange { item, value });
            }
            if known.iter().any(|(other, _)| *other == item) {
                return Err(WeightsError::Twice(item));
            }
            known.push((item, value));
        }
        let sum: f32 = known.iter().map(|(_, value)| value).sum();
        if (sum - 1.0).abs() > 1e-4 { Err(WeightsError::Sum(sum)) } else { Ok(Self(known)) }
    }

    /// The score of `load`, in [0, 1].
    pub fn score(&self, load: &Load) -> f32 {
        self.0.iter().map(|(item, weight)| weight * load.get(*item).unwrap_or(UNKNOWN)).sum()
    }

    /// The score of a report that is `age_ms` old: the older it is, the less it says.
    pub fn score_aged(&self, load: &Load, age_ms: u32) -> f32 {
        const HALF_MS: f32 = 5000.0;
        let trust = HALF_MS / (HALF_MS + age_ms.min(1 << 24) as f32);
        UNKNOWN + (self.score(load) - UNKNOWN) * trust
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_each_from_0_to_1_and_together_1() {
        assert!(Weights::new([(Item::CPU, 0.5), (Item(9), 0.5)]).is_ok());
        assert_eq!(Weights::new([(Item::CPU, 0.5)]), Err(WeightsError::Sum(0.5)));
        assert_eq!(Weights::new([]), Err(WeightsError::Sum(0.0)));
        let twice = Weights::new([(Item::CPU, 0.5), (Item::CPU, 0.5)]);
        assert_eq!(twice, Err(WeightsError::Twice(Item::CPU)));
        for bad in [-0.1, 1.1, f32::INFINITY, f32::NAN] {
            let weights = Weights::new([(Item::CPU, bad), (Item::DISK, 1.0 - bad)]);
            assert!(matches!(weights, Err(WeightsError::OutOfRange { .. })), "{bad}");
        }
    }

    #[test]
    fn the_score_is_the_weighted_sum() {
        let load =
            Load::new([(Item::CPU, 1.0), (Item::MEMORY, 0.0), (Item::DISK, 0.2), (Item::NETWORK, 7.0)]);
        let score = Weights::default().score(&load);
        assert!((score - (0.2 + 0.35 * 0.2 + 0.35)).abs() < 1e-6, "{score}");
    }

    #[test]
    fn an_old_report_says_less_but_never_the_opposite() {
        let weights = Weights::default();
        let (idle, busy) = ([0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]);
        let load = |values: [f32; 4]| Load::new((0..4).map(Item).zip(values));
        let gap = |age| weights.score_aged(&load(busy), age) - weights.score_aged(&load(idle), age);
        assert!(gap(0) > gap(1000) && gap(1000) > gap(60_000) && gap(u32::MAX) > 0.0);
    }
}
