//! Sizes as people write them: `512M`, `20G`.

/// Bytes in `text`: a whole number, with K, M, G or T for powers of 1024.
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    const RULE: &str = "use a whole number of bytes, or one with K, M, G or T, such as 20G";
    let digits = text.trim_end_matches(|letter: char| !letter.is_ascii_digit());
    let shift = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KIB" => 10,
        "M" | "MIB" => 20,
        "G" | "GIB" => 30,
        "T" | "TIB" => 40,
        _ => return Err(RULE.to_owned()),
    };
    let number: u64 = digits.parse().map_err(|_| RULE.to_owned())?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text} is too large"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_whole_numbers_with_a_unit() {
        assert_eq!(parse("0"), Ok(0));
        assert_eq!(parse("512M"), Ok(512 << 20));
        assert_eq!(parse("20GiB"), Ok(20 << 30));
        for bad in ["", "G", "1.5G", "-1", "1X", "99999999999T", "1é"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
