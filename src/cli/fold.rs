//! Long lines for a terminal: broken where a part of them ends, and never within one.

/// Columns that every terminal has.
const WIDTH: usize = 80;
/// What the lines after the first begin with, beside what the first begins with.
const INDENT: usize = 2;

/// `line` in lines of 80 columns, broken behind commas, semicolons and colons; a longer part stays whole.
pub(super) fn fold(line: &str) -> String {
    let text = line.trim_start();
    let margin = line.len() - text.len();
    let mut folded = " ".repeat(margin);
    let mut column = margin;
    for part in parts(text) {
        let width = part.chars().count();
        if column > margin && column + 1 + width > WIDTH {
            folded.push('\n');
            folded.push_str(&" ".repeat(margin + INDENT));
            column = margin + INDENT;
        } else if column > margin {
            folded.push(' ');
            column += 1;
        }
        folded.push_str(part);
        column += width;
    }
    folded
}

/// What stands between the places where `text` may be broken.
fn parts(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let at = [", ", "; ", ": "].iter().filter_map(|mark| rest.find(mark)).min();
        let (part, behind) = at.map_or((rest, ""), |at| (&rest[..=at], &rest[at + 2..]));
        rest = behind;
        Some(part)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn breaks_between_parts_and_keeps_every_word() {
        let line = "  a: boot frames 130/130, 123.45 MiB of 20.00 GiB here; came: stream 123.45 MiB, demand 1.00 MiB";
        let folded = fold(line);
        assert_eq!(
            folded,
            "  a: boot frames 130/130, 123.45 MiB of 20.00 GiB here; came: stream 123.45 MiB,\n    demand 1.00 MiB"
        );
        assert!(folded.lines().all(|line| line.chars().count() <= WIDTH), "{folded}");
        let long = format!("{}, b", "a".repeat(100));
        assert_eq!(fold(&long), format!("{},\n  b", "a".repeat(100)));
        assert_eq!(fold("[::1]:80 n1: sent 3 B"), "[::1]:80 n1: sent 3 B");
        assert_eq!(fold(""), "");
    }
}
