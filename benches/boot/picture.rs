//! Pictures for documents, from the results: SVG by hand, some kilobytes, readable on light and on dark pages.

mod bars;
mod nodes;

use std::io;
use std::path::Path;

use super::results::Results;
use super::rows::Rows;
use super::setting::Play;

/// Ours, the bound, and what others do; the same in every picture.
const OURS: &str = "#2f7de1";
const BOUND: &str = "#d64545";
const OTHERS: &str = "#d9902f";
const LOCAL: &str = "#8b949e";

/// Draws all that the results tell into `folder`: `KEY.svg`, bars for each table, and `nodes-GUEST-RATE.svg`, the
/// time of the last boot against the number of nodes. Returns the names.
pub(crate) fn draw(results: &[Results], folder: &Path) -> io::Result<Vec<String>> {
    std::fs::create_dir_all(folder)?;
    let mut names = Vec::new();
    let mut write = |name: String, svg: String| {
        let written = std::fs::write(folder.join(&name), svg);
        names.push(name);
        written
    };
    for rows in results.iter().filter_map(Rows::of).filter(|rows| rows.rows.len() > 2) {
        write(format!("{}.svg", rows.key), bars::draw(&rows))?;
    }
    for rate in [100, 1000] {
        let replayed = results.iter().filter(|results| {
            results.head.as_ref().is_some_and(|head| {
                let setting = &head.setting;
                setting.play == Play::Replay
                    && setting.megabits == rate
                    && setting.speed == 1.0
                    && setting.guest == "fast"
            })
        });
        let mut tables: Vec<Rows> = replayed.filter_map(Rows::of).collect();
        let slow = tables.iter().map(|rows| rows.slow).max().unwrap_or(1);
        tables.retain(|rows| rows.slow == slow);
        tables.sort_by_key(|rows| rows.nodes);
        if tables.len() > 2 {
            write(format!("nodes-fast-{rate}.svg"), nodes::draw(&tables, rate))?;
        }
    }
    Ok(names)
}

/// The frame: its own background, so that the page's does not matter.
fn frame(width: f64, height: f64, title: &str, below: &str, body: &str) -> String {
    format!(
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' font-family='sans-serif' font-size='12'>\n\
         <style>.p{{fill:#fff}}text{{fill:#1f2328}}.q{{fill:#59636e}}.l{{stroke:#1f2328}}.g{{stroke:#d1d9e0}}\
         .h{{stroke:#fff;stroke-width:4px;paint-order:stroke}}\
         @media(prefers-color-scheme:dark){{.p{{fill:#0d1117}}text{{fill:#e6edf3}}.q{{fill:#9198a1}}\
         .l{{stroke:#e6edf3}}.g{{stroke:#3d444d}}.h{{stroke:#0d1117}}}}</style>\n\
         <rect class='p' width='100%' height='100%' rx='6'/>\n\
         <text x='14' y='24' font-size='15' font-weight='bold'>{title}</text>\n\
         <text class='q' x='14' y='42'>{below}</text>\n{body}</svg>\n"
    )
}
