//! Nodes that boot at once beside one: the last of them, over the boot of one node where boots are replayed. Real guests
//! share the processors, so that theirs stands over the last of as many local boots.

use super::results::Results;
use super::rows::Rows;
use super::setting::{Play, Setting};
use super::ways::{BOOTCACHE, LOCAL};

/// At most so many nodes, and the goal for them.
const GOALS: [(usize, f64); 2] = [(3, 1.15), (16, 1.25)];

/// Prints every setting of several nodes whose counterpart was measured too.
pub(crate) fn print(all: &[&Results]) {
    let lines: Vec<String> = all.iter().filter_map(|results| line(results, all)).collect();
    if !lines.is_empty() {
        println!("boots at once by bootcache, over one; of real guests, over as many local boots");
        lines.iter().for_each(|line| println!("{line}"));
        println!("! is beyond the goal\n");
    }
}

fn line(several: &Results, all: &[&Results]) -> Option<String> {
    let setting = several.head.as_ref().map(|head| &head.setting).filter(|setting| setting.nodes > 1)?;
    let rows = Rows::of(several)?;
    let beside = match setting.play {
        Play::Guest => rows.row(LOCAL)?.seconds,
        Play::Replay => {
            let one = Setting { nodes: 1, ..setting.clone() };
            let alone =
                all.iter().find(|other| other.head.as_ref().is_some_and(|head| head.setting == one))?;
            Rows::of(alone)?.row(BOOTCACHE)?.seconds
        }
    };
    let ratio = rows.row(BOOTCACHE)?.seconds / beside;
    let goal = GOALS.iter().find(|(most, _)| setting.nodes <= *most).map(|(_, goal)| goal);
    let verdict = goal.map_or_else(String::new, |goal| {
        format!(" (goal {goal:.2}){}", if ratio > *goal { " !" } else { "" })
    });
    Some(format!("{:<61} {ratio:.2}{verdict}", rows.title))
}
