//! The results as a picture: a bar for each way, its spread, and the lower bound as a line. SVG, by hand, some kilobytes.

use std::fmt::Write;

use super::Options;
use super::lab::Lab;
use super::table::Row;

const LABELS: f64 = 210.0;
const BARS: f64 = 440.0;
const ROW: f64 = 24.0;
const TOP: f64 = 58.0;

pub(crate) fn draw(options: &Options, lab: &Lab, rows: &[Row]) -> String {
    let bound = (lab.local_ms(options.speed()) + lab.bound_ms(options.speed())) / 1000.0;
    let most = rows.iter().map(|row| row.most).fold(bound, f64::max);
    let x = |seconds: f64| LABELS + seconds / most * BARS;
    let height = TOP + rows.len() as f64 * ROW + 30.0;
    let mut svg = format!(
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {} {height}' font-family='sans-serif' font-size='12'>\n\
         <rect width='100%' height='100%' fill='#fff'/>\n\
         <text x='10' y='22' font-size='15' font-weight='bold'>{}</text>\n\
         <text x='10' y='40' fill='#555'>seconds until the guest reports (of the last node); median, least and most of {} rounds</text>\n",
        LABELS + BARS + 70.0,
        options.title(),
        options.rounds,
    );
    for (row, top) in rows.iter().zip(std::iter::successors(Some(TOP), |top| Some(top + ROW))) {
        let colour = match row.way {
            "local" => "#9aa0a6",
            way if way.starts_with("bootcache") => "#1a73e8",
            _ => "#e8a33d",
        };
        let middle = top + ROW / 2.0;
        let _to_a_string = writeln!(
            svg,
            "<text x='{}' y='{:.0}' text-anchor='end'>{}</text>\
             <rect x='{LABELS}' y='{:.1}' width='{:.1}' height='{}' fill='{colour}'/>\
             <path d='M{:.1} {middle}H{:.1}' stroke='#000'/>\
             <text x='{:.1}' y='{:.0}'>{:.2}</text>",
            LABELS - 8.0,
            middle + 4.0,
            row.way,
            top + 4.0,
            x(row.seconds) - LABELS,
            ROW - 8.0,
            x(row.least),
            x(row.most),
            x(row.most) + 5.0,
            middle + 4.0,
            row.seconds,
        );
    }
    let bottom = height - 26.0;
    let _to_a_string = writeln!(
        svg,
        "<path d='M{0:.1} {TOP}V{bottom}' stroke='#c5221f' stroke-dasharray='4 3'/>\
         <text x='{0:.1}' y='{1}' fill='#c5221f' text-anchor='middle'>lower bound {bound:.2} s</text>\n</svg>",
        x(bound),
        bottom + 15.0,
    );
    svg
}
