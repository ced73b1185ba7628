//! Medians, and what they are worth: a bootstrap interval of the median of paired ratios. Pure; the same values always
//! give the same interval.

use serde::Serialize;

/// The middle of some values, and how far they reach.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Summary {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    pub(crate) n: usize,
}

/// A median with its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Interval {
    pub(crate) median: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
}

/// Nothing for no values.
pub(crate) fn summary(values: &[f64]) -> Option<Summary> {
    let mut sorted = values.to_vec();
    Some(Summary {
        median: median(&mut sorted)?,
        min: *sorted.first()?,
        max: *sorted.last()?,
        n: sorted.len(),
    })
}

/// The median of `value / base`, repetition by repetition; nothing if there is no pair, or nothing to divide by.
pub(crate) fn paired_ratio(pairs: &[(f64, f64)]) -> Option<Interval> {
    let ratios: Vec<f64> = pairs
        .iter()
        .filter(|(_, base)| *base > 0.0)
        .map(|(value, base)| value / base)
        .collect();
    let middle = median(&mut ratios.clone())?;
    // A fixed seed: looking twice at the same values shows the same.
    let mut random = fastrand::Rng::with_seed(SEED);
    let mut medians: Vec<f64> = (0..RESAMPLES)
        .filter_map(|_| {
            let mut drawn: Vec<f64> = (0..ratios.len())
                .filter_map(|_| ratios.get(random.usize(..ratios.len())).copied())
                .collect();
            median(&mut drawn)
        })
        .collect();
    medians.sort_by(f64::total_cmp);
    let at = |per_mille: usize| medians.get(medians.len() * per_mille / 1000).copied();
    Some(Interval {
        median: middle,
        low: at(25)?,
        high: at(975)?,
    })
}

/// Sorts the values.
pub(crate) fn median(values: &mut [f64]) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let upper = *values.get(middle)?;
    if values.len() % 2 == 1 {
        return Some(upper);
    }
    let lower = *values.get(middle.checked_sub(1)?)?;
    Some(f64::midpoint(lower, upper))
}

const RESAMPLES: usize = 2000;
const SEED: u64 = 15008;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_or_between_the_two_in_the_middle() {
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&mut [4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(&mut []), None);
    }

    #[test]
    fn ratios_are_taken_pair_by_pair() {
        // The box became twice as slow half way; the ratio did not.
        let ratio = paired_ratio(&[(5.0, 10.0), (2.5, 5.0), (5.0, 10.0), (2.5, 5.0)]).unwrap();
        assert_eq!((ratio.median, ratio.low, ratio.high), (0.5, 0.5, 0.5));
    }

    #[test]
    fn an_interval_holds_its_median_and_stays_within_the_values() {
        let pairs: Vec<_> = [4.0, 5.0, 6.0, 5.5, 4.5, 5.2, 4.8]
            .map(|value| (value, 10.0))
            .into();
        let ratio = paired_ratio(&pairs).unwrap();
        assert_eq!(ratio.median, 0.5);
        assert!(ratio.low >= 0.4 && ratio.low < 0.5, "{ratio:?}");
        assert!(ratio.high <= 0.6 && ratio.high > 0.5, "{ratio:?}");
        assert_eq!(paired_ratio(&pairs), Some(ratio));
    }

    #[test]
    fn nothing_is_divided_by_nothing() {
        assert_eq!(paired_ratio(&[(1.0, 0.0)]), None);
        assert_eq!(summary(&[]), None);
    }
}
