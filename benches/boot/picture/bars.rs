//! A bar for each way: the time until the last guest reports, its spread, and the lower bound as a line.

use std::fmt::Write;

use super::super::rows::Rows;
use super::super::ways::LOCAL as LOCAL_WAY;
use super::{BOUND, LOCAL, OTHERS, OURS, frame};

const LABELS: f64 = 180.0;
const BARS: f64 = 400.0;
const NUMBERS: f64 = 165.0;
const ROW: f64 = 23.0;
const TOP: f64 = 58.0;

pub(super) fn draw(rows: &Rows) -> String {
    let bound = rows.local + rows.bound;
    // Copying takes many times as long: its bars are cut off, so that the others can be told apart.
    let boots = rows.rows.iter().filter(|row| !row.way.starts_with("copy"));
    let most = boots.map(|row| row.most).fold(bound, f64::max) * 1.15;
    let x = |seconds: f64| LABELS + seconds.min(most) / most * BARS;
    let height = TOP + rows.rows.len() as f64 * ROW + 30.0;
    let bottom = height - 26.0;
    // Behind everything else.
    let mut body = format!(
        "<path d='M{0:.1} {TOP}V{bottom}' stroke='{BOUND}' stroke-dasharray='4 3'/>\
         <text x='{0:.1}' y='{1}' text-anchor='middle' style='fill:{BOUND}'>lower bound {bound:.2} s</text>\n",
        x(bound),
        bottom + 15.0,
    );
    for (row, top) in rows.rows.iter().zip(std::iter::successors(Some(TOP), |top| Some(top + ROW))) {
        let colour = match row.way.as_str() {
            LOCAL_WAY => LOCAL,
            way if way.starts_with("bootcache") => OURS,
            _ => OTHERS,
        };
        let (middle, end) = (top + ROW / 2.0, x(row.seconds));
        let waited = row.waited().filter(|_| row.way != LOCAL_WAY);
        let waited = waited.map_or_else(String::new, |waited| format!(", {waited:.2} s waited"));
        let _to_a_string = writeln!(
            body,
            "<text x='{:.0}' y='{:.1}' text-anchor='end'>{}</text>\
             <rect x='{LABELS}' y='{:.1}' width='{:.1}' height='{:.0}' fill='{colour}'/>",
            LABELS - 8.0,
            middle + 4.0,
            row.way,
            top + 4.0,
            end - LABELS,
            ROW - 8.0,
        );
        if row.seconds > most {
            let _to_a_string =
                writeln!(body, "<path class='p' d='M{:.1} {top}l8 0l-6 {ROW}l-8 0z'/>", end - 22.0);
        } else if row.rounds > 1 {
            let _to_a_string =
                writeln!(body, "<path class='l' d='M{:.1} {middle}H{:.1}'/>", x(row.least), x(row.most));
        }
        let _to_a_string = writeln!(
            body,
            "<text class='h' x='{:.1}' y='{:.1}'>{:.2} s<tspan class='q'>{waited}</tspan></text>",
            x(row.most) + 6.0,
            middle + 4.0,
            row.seconds
        );
    }
    let below = "seconds from nothing to the guest's report, of the last node; median, least and most";
    frame(LABELS + BARS + NUMBERS, height, &rows.title, below, &body)
}
