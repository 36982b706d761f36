//! The time of the last boot against the number of nodes that boot at once, both on logarithmic axes.

use std::fmt::Write;

use super::super::rows::Rows;
use super::super::ways::BOOTCACHE;
use super::{BOUND, OTHERS, OURS, frame};

const LEFT: f64 = 56.0;
const TOP: f64 = 62.0;
const WIDTH: f64 = 470.0;
const HEIGHT: f64 = 230.0;
const NAMES: f64 = 150.0;
/// Seconds that get a line across, as far as they are within the picture.
const LINES: [f64; 10] = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0];

pub(super) fn draw(tables: &[Rows], rate: u32) -> String {
    let lines = [
        (BOOTCACHE, "bootcache", OURS, ""),
        ("bootcache, relay off", "origin alone", "#8f63d2", ""),
        ("qemu-nbd", "qemu-nbd", OTHERS, ""),
    ];
    let points = |way: &str| -> Vec<(f64, f64)> {
        tables.iter().filter_map(|rows| Some((rows.nodes as f64, rows.row(way)?.seconds))).collect()
    };
    let bound: Vec<(f64, f64)> =
        tables.iter().map(|rows| (rows.nodes as f64, rows.local + rows.bound)).collect();
    let all: Vec<(f64, f64)> =
        lines.iter().flat_map(|(way, ..)| points(way)).chain(bound.iter().copied()).collect();
    let most_nodes = all.iter().map(|(nodes, _)| *nodes).fold(2.0, f64::max);
    let least = all.iter().map(|(_, seconds)| *seconds).fold(f64::INFINITY, f64::min) * 0.8;
    let most = all.iter().map(|(_, seconds)| *seconds).fold(0.0, f64::max) * 1.15;
    let x = |nodes: f64| LEFT + nodes.ln() / most_nodes.ln() * WIDTH;
    let y = |seconds: f64| TOP + HEIGHT - (seconds / least).ln() / (most / least).ln() * HEIGHT;
    let mut body = String::new();
    for seconds in LINES.iter().filter(|seconds| (least..most).contains(seconds)) {
        let _to_a_string = writeln!(
            body,
            "<path class='g' d='M{LEFT} {0:.1}H{1}'/><text class='q' x='{2}' y='{3:.1}' text-anchor='end'>{seconds} s</text>",
            y(*seconds),
            LEFT + WIDTH,
            LEFT - 6.0,
            y(*seconds) + 4.0,
        );
    }
    for (nodes, _) in &bound {
        let _to_a_string = writeln!(
            body,
            "<text class='q' x='{:.1}' y='{}' text-anchor='middle'>{nodes}</text>",
            x(*nodes),
            TOP + HEIGHT + 18.0
        );
    }
    let mut line = |points: &[(f64, f64)], name: &str, colour: &str, dash: &str, below: f64| {
        let Some((nodes, seconds)) = points.last() else { return };
        let path: Vec<String> =
            points.iter().map(|(nodes, seconds)| format!("{:.1} {:.1}", x(*nodes), y(*seconds))).collect();
        let _to_a_string = writeln!(
            body,
            "<path d='M{}' fill='none' stroke='{colour}' stroke-width='2' {dash}/>\
             <text x='{:.1}' y='{:.1}' style='fill:{colour}'>{name}, {seconds:.1} s</text>",
            path.join("L"),
            x(*nodes) + 8.0,
            y(*seconds) + 4.0 + below,
        );
        if dash.is_empty() {
            for (nodes, seconds) in points {
                let _to_a_string = writeln!(
                    body,
                    "<circle cx='{:.1}' cy='{:.1}' r='3.5' fill='{colour}'/>",
                    x(*nodes),
                    y(*seconds)
                );
            }
        }
    };
    for (way, name, colour, dash) in lines {
        line(&points(way), name, colour, dash, 0.0);
    }
    line(&bound, "lower bound", BOUND, "stroke-dasharray='4 3'", 14.0);
    let slow = tables.first().map_or(1, |rows| rows.slow);
    let title = format!("Nodes that boot at once, {rate} Mbit/s each and at the origin");
    let below = format!("seconds until the last has booted; replayed Debian 12, in slow motion ÷ {slow}");
    frame(LEFT + WIDTH + NAMES, TOP + HEIGHT + 32.0, &title, &below, &body)
}
