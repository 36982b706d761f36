//! A plan file's text, and where in it something is wrong.

use toml::de::{DeTable, DeValue};

use super::check::{Mistake, Step, check};
use super::{Plan, TEXT_BYTES_MAX};

/// A mistake in a plan, with its place in the text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Located {
    /// The line, counted from 1, where it is known.
    pub line: Option<usize>,
    /// What is wrong, and what to do.
    pub message: String,
}

impl std::fmt::Display for Located {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.line {
            Some(line) => write!(f, "line {line}: {}", self.message),
            None => f.write_str(&self.message),
        }
    }
}

/// Reads a plan from TOML, or from JSON when the text begins with a brace, and checks it.
///
/// # Errors
/// Everything that is wrong with it by itself; at least one.
pub fn parse(text: &str) -> Result<Plan, Vec<Located>> {
    if text.len() > TEXT_BYTES_MAX {
        let message = format!("the plan is longer than {} KiB", TEXT_BYTES_MAX >> 10);
        return Err(vec![Located { line: None, message }]);
    }
    let plan = if text.trim_start().starts_with('{') { from_json(text) } else { from_toml(text) }?;
    let mistakes = check(&plan);
    if mistakes.is_empty() { Ok(plan) } else { Err(located(text, mistakes)) }
}

/// Finds the places of `mistakes` in `text`.
pub fn located(text: &str, mistakes: Vec<Mistake>) -> Vec<Located> {
    let tree = DeTable::parse(text).ok();
    let mut located: Vec<_> = mistakes
        .into_iter()
        .map(|mistake| {
            let line = tree.as_ref().map(|tree| line_at(text, offset_of(tree.get_ref(), &mistake.path)));
            let message = if line.is_some() { mistake.message } else { mistake.to_string() };
            Located { line, message }
        })
        .collect();
    located.sort_by_key(|mistake| mistake.line);
    located
}

fn from_toml(text: &str) -> Result<Plan, Vec<Located>> {
    toml::from_str(text).map_err(|error: toml::de::Error| {
        let line = error.span().map(|span| line_at(text, span.start));
        vec![Located { line, message: one_line(error.message()) }]
    })
}

fn from_json(text: &str) -> Result<Plan, Vec<Located>> {
    serde_json::from_str(text).map_err(|error| {
        let full = error.to_string();
        let message = full.rsplit_once(" at line ").map_or(full.as_str(), |(message, _)| message);
        vec![Located { line: Some(error.line()), message: one_line(message) }]
    })
}

fn one_line(message: &str) -> String {
    message.lines().map(str::trim).collect::<Vec<_>>().join(" ")
}

fn line_at(text: &str, offset: usize) -> usize {
    1 + text.as_bytes()[..offset.min(text.len())].iter().filter(|byte| **byte == b'\n').count()
}

/// Where the value at `path` begins; that of the last step on the way that there is, when there is no such value.
fn offset_of(tree: &DeTable<'_>, path: &[Step]) -> usize {
    let mut offset = 0;
    let mut here: Option<&DeValue<'_>> = None;
    for step in path {
        let next = match (step, here) {
            (Step::Key(key), None) => tree.get(key.as_str()),
            (Step::Key(key), Some(DeValue::Table(table))) => table.get(key.as_str()),
            (Step::Index(number), Some(DeValue::Array(array))) => array.get(*number),
            _ => None,
        };
        let Some(value) = next else { break };
        offset = value.span().start;
        here = Some(value.get_ref());
    }
    offset
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
name = "lab"
[networks.lan]
subnet = "10.0.0.0/24"
[[groups]]
name = "web"
type = "vm"
image = "debian"
count = 2
memory = "1G"
disk = "8G"
disk_by = "kernel"
until = "report"
networks = [{ network = "lan", address = "10.0.0.10" }]
"#;

    fn errors(text: &str) -> Vec<String> {
        parse(text).unwrap_err().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn toml_and_json_of_the_same_shape_are_the_same_plan() {
        let plan = parse(GOOD).unwrap();
        assert_eq!(plan.groups[0].memory.0, 1024);
        assert_eq!(plan.groups[0].disk.map(crate::plan::DiskSize::bytes), Some(8 << 30));
        assert_eq!(plan.groups[0].disk_by, Some(crate::hypervisor::DiskBy::Kernel));
        let json = serde_json::to_string(&plan).unwrap();
        assert_eq!(parse(&json).unwrap(), plan);
        let packed = rmp_serde::to_vec_named(&plan).unwrap();
        assert_eq!(rmp_serde::from_slice::<Plan>(&packed).unwrap(), plan);
    }

    #[test]
    fn mistakes_are_told_with_their_lines() {
        assert_eq!(errors(&GOOD.replace("name = \"web\"", "name = \"Web\""))[0][..8], *"line 6: ");
        let unknown = errors(&GOOD.replace("count = 2", "cuont = 2"));
        assert!(unknown[0].starts_with("line 9: unknown field `cuont`"), "{unknown:?}");
        let zero = errors(&GOOD.replace("count = 2", "count = 0"));
        assert!(zero[0].starts_with("line 9: "), "{zero:?}");
        let small = errors(&GOOD.replace("\"8G\"", "0"));
        assert!(small[0].starts_with("line 11: a disk has 1 MiB"), "{small:?}");
        let odd = errors(&GOOD.replace("8G", "8X"));
        assert!(odd[0].starts_with("line 11: disk is a number of MiB"), "{odd:?}");
        let outside = errors(&GOOD.replace("10.0.0.10", "10.0.1.10"));
        assert!(outside[0].starts_with("line 14: ") && outside[0].contains("10.0.0.0/24"), "{outside:?}");
        let nobody = errors(&GOOD.replace("\"kernel\"", "\"nobody\""));
        assert!(
            nobody[0].starts_with("line 12: ") && nobody[0].contains("`socket` or `kernel`"),
            "{nobody:?}"
        );
    }

    #[test]
    fn mistakes_in_json_are_told_with_their_place() {
        let json = serde_json::to_string_pretty(&parse(GOOD).unwrap()).unwrap();
        let zero = errors(&json.replace("\"count\": 2", "\"count\": 0"));
        assert!(zero[0].contains("groups[0].count"), "{zero:?}");
        let broken = errors(&json.replace("\"count\": 2", "\"count\": x"));
        assert!(broken[0].starts_with("line "), "{broken:?}");
    }
}
