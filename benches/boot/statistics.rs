//! Medians, and the interval of a mean of few differences.

/// The middle value; the mean of the two middle ones for an even count; 0 of none.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        count if count % 2 == 1 => sorted[count / 2],
        count => f64::midpoint(sorted[count / 2 - 1], sorted[count / 2]),
    }
}

/// Mean of paired differences and half the width of its 95 % interval (Student's t).
pub(crate) fn paired_interval(differences: &[f64]) -> (f64, f64) {
    let count = differences.len() as f64;
    let mean = differences.iter().sum::<f64>() / count;
    let variance = differences.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (count - 1.0);
    (mean, student_t(differences.len()) * (variance / count).sqrt())
}

/// The two-sided 95 % quantile of Student's t for so many values (one degree of freedom less).
fn student_t(values: usize) -> f64 {
    const QUANTILES: [f64; 15] = [
        12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
        2.131,
    ];
    match values {
        0 | 1 => f64::INFINITY,
        _ => QUANTILES.get(values - 2).copied().unwrap_or(2.05),
    }
}
