//! Pictures of a recorded boot, as SVG or PNG: where in the image it read and when, and how large its reads were.
//!
//! Every picture carries its own background, light or dark, so that it can be read on any page. Text in a PNG is drawn
//! with the Latin letters of Roboto (Apache-2.0), which the program carries; an SVG names the reader's sans-serif.

use std::path::Path;
use std::sync::Once;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontStyle, register_font};

use super::summary::{CLASS_LABELS, Summary};
use crate::boot_cache::merge::Touch;

/// Colours of a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Theme {
    /// Dark on light.
    Light,
    /// Light on dark.
    Dark,
}

/// How a picture is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Scalable.
    Svg,
    /// At twice the size, for sharp screens.
    Png,
}

/// A picture that could not be drawn or written.
#[derive(Debug, thiserror::Error)]
#[error("the picture cannot be written: {0}")]
pub struct PictureError(String);

const WIDTH: u32 = 920;
const MARGIN: i32 = 40;
const COLUMNS: usize = 210;
const ROWS_MAX: u64 = 120;
/// Steps of the colours of time.
const SHADES: f64 = 24.0;

struct Palette {
    background: RGBColor,
    ink: RGBColor,
    faint: RGBColor,
    /// What holds no data.
    empty: RGBColor,
    /// What holds data that the boot did not read.
    unread: RGBColor,
    /// Reads, early to late.
    time: [RGBColor; 4],
    bars: [RGBColor; 2],
}

const LIGHT: Palette = Palette {
    background: RGBColor(252, 252, 253),
    ink: RGBColor(31, 35, 40),
    faint: RGBColor(101, 109, 118),
    empty: RGBColor(240, 242, 244),
    unread: RGBColor(208, 214, 221),
    time: [RGBColor(230, 74, 25), RGBColor(216, 27, 96), RGBColor(123, 31, 162), RGBColor(26, 35, 126)],
    bars: [RGBColor(57, 73, 171), RGBColor(230, 96, 50)],
};

const DARK: Palette = Palette {
    background: RGBColor(13, 17, 23),
    ink: RGBColor(230, 237, 243),
    faint: RGBColor(145, 152, 161),
    empty: RGBColor(22, 27, 34),
    unread: RGBColor(53, 60, 69),
    time: [RGBColor(255, 238, 120), RGBColor(255, 152, 67), RGBColor(236, 64, 122), RGBColor(149, 117, 255)],
    bars: [RGBColor(121, 134, 255), RGBColor(255, 152, 67)],
};

impl Theme {
    const fn palette(self) -> &'static Palette {
        match self {
            Self::Light => &LIGHT,
            Self::Dark => &DARK,
        }
    }
}

/// Draws the image as a map, a cell for some blocks, from the first at the upper left on: what the boot read, coloured
/// by when it first did, what it did not read, and what holds no data. `is_zero` says which blocks hold none.
///
/// # Errors
/// [`PictureError`].
pub fn draw_offsets(
    path: &Path,
    form: Form,
    theme: Theme,
    summary: &Summary,
    touches: &[Touch],
    is_zero: &dyn Fn(u64) -> bool,
) -> Result<(), PictureError> {
    let map = Map::of(summary, touches, is_zero);
    let height = u32::try_from(map.rows * 4 + 150).expect("rows are few");
    draw(path, form, (WIDTH, height), |canvas| map.draw(canvas, theme.palette(), summary))
}

/// Draws the share of reads and of bytes in each size class.
///
/// # Errors
/// [`PictureError`].
pub fn draw_sizes(path: &Path, form: Form, theme: Theme, summary: &Summary) -> Result<(), PictureError> {
    draw(path, form, (WIDTH, 380), |canvas| sizes(canvas, theme.palette(), summary))
}

type Canvas<'a> = dyn Surface + 'a;

/// Rectangles and text in points; what both kinds of picture are made of.
trait Surface {
    fn rect(&self, at: (i32, i32), size: (i32, i32), colour: RGBColor) -> Result<(), PictureError>;
    fn text(
        &self,
        at: (i32, i32),
        text: &str,
        size: u32,
        colour: RGBColor,
        align: HPos,
    ) -> Result<(), PictureError>;
}

struct Scaled<'a, B: DrawingBackend> {
    area: &'a DrawingArea<B, Shift>,
    scale: i32,
}

impl<B: DrawingBackend> Surface for Scaled<'_, B> {
    fn rect(&self, at: (i32, i32), size: (i32, i32), colour: RGBColor) -> Result<(), PictureError> {
        let scale = |point: (i32, i32)| (point.0 * self.scale, point.1 * self.scale);
        let corners = [scale(at), scale((at.0 + size.0, at.1 + size.1))];
        self.area.draw(&Rectangle::new(corners, colour.filled())).map_err(failed)
    }

    fn text(
        &self,
        at: (i32, i32),
        text: &str,
        size: u32,
        colour: RGBColor,
        align: HPos,
    ) -> Result<(), PictureError> {
        let font = ("sans-serif", size * self.scale.unsigned_abs()).into_font().color(&colour);
        let style = font.pos(Pos::new(align, VPos::Center));
        let at = (at.0 * self.scale, at.1 * self.scale);
        self.area.draw(&Text::new(text, at, style)).map_err(failed)
    }
}

fn draw(
    path: &Path,
    form: Form,
    size: (u32, u32),
    paint: impl Fn(&Canvas<'_>) -> Result<(), PictureError>,
) -> Result<(), PictureError> {
    static FONT: Once = Once::new();
    FONT.call_once(|| {
        // Fails only for a file that is no font, which the tests would notice.
        let _ = register_font("sans-serif", FontStyle::Normal, include_bytes!("roboto.ttf"));
    });
    match form {
        Form::Svg => {
            let mut text = String::new();
            {
                let area = SVGBackend::with_string(&mut text, size).into_drawing_area();
                paint(&Scaled { area: &area, scale: 1 })?;
                area.present().map_err(failed)?;
            }
            // What is so anyway is half of the file.
            let text = text.replace(" opacity=\"1\"", "").replace(" stroke=\"none\"", "");
            std::fs::write(path, text).map_err(failed)
        }
        Form::Png => {
            let area = BitMapBackend::new(path, (size.0 * 2, size.1 * 2)).into_drawing_area();
            paint(&Scaled { area: &area, scale: 2 })?;
            area.present().map_err(failed)
        }
    }
}

fn failed(error: impl std::fmt::Display) -> PictureError {
    PictureError(error.to_string())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cell {
    Empty,
    Unread,
    /// Milliseconds after the start.
    Read(u64),
}

struct Map {
    blocks_per_cell: u64,
    rows: u64,
    cells: Vec<Cell>,
}

impl Map {
    fn of(summary: &Summary, touches: &[Touch], is_zero: &dyn Fn(u64) -> bool) -> Self {
        let blocks = summary.logical.div_ceil(4096).max(1);
        let blocks_per_cell = blocks.div_ceil(COLUMNS as u64 * ROWS_MAX);
        let count = blocks.div_ceil(blocks_per_cell);
        let holds_data = |cell: u64| {
            (cell * blocks_per_cell..((cell + 1) * blocks_per_cell).min(blocks)).any(|block| !is_zero(block))
        };
        let mut cells: Vec<Cell> =
            (0..count).map(|cell| if holds_data(cell) { Cell::Unread } else { Cell::Empty }).collect();
        for touch in touches.iter().rev() {
            let index = usize::try_from(touch.block / blocks_per_cell).expect("cells are few");
            cells[index] = Cell::Read(touch.time_ns / 1_000_000);
        }
        Self { blocks_per_cell, rows: count.div_ceil(COLUMNS as u64), cells }
    }

    fn draw(&self, canvas: &Canvas<'_>, palette: &Palette, summary: &Summary) -> Result<(), PictureError> {
        let latest = self.latest_ms();
        let height = i32::try_from(self.rows * 4 + 150).expect("rows are few");
        canvas.rect((0, 0), (signed(WIDTH), height), palette.background)?;
        canvas.text((MARGIN, 32), "Where a boot reads, and when", 20, palette.ink, HPos::Left)?;
        let share = 100.0 * summary.unique as f64 / summary.logical.max(1) as f64;
        let what = format!(
            "{} of {} ({share:.1} %) in {} extents; a cell is {}, the image runs from upper left to lower right",
            megabytes(summary.unique),
            megabytes(summary.logical),
            summary.extents,
            kibibytes(self.blocks_per_cell * 4),
        );
        canvas.text((MARGIN, 58), &what, 13, palette.faint, HPos::Left)?;
        for (y, row) in (0_i32..).zip(self.cells.chunks(COLUMNS)) {
            let colours = row.iter().map(|cell| match cell {
                Cell::Empty => palette.empty,
                Cell::Unread => palette.unread,
                Cell::Read(time_ms) => {
                    let share = *time_ms as f64 / latest as f64;
                    at_time(&palette.time, (share * SHADES).round() / SHADES)
                }
            });
            // Neighbours of one colour are drawn together: an SVG has a line for each.
            let colours: Vec<RGBColor> = colours.collect();
            let mut x = 0;
            for cells in colours.chunk_by(|a, b| a == b) {
                let (colour, count) = (cells[0], cells.len());
                let count = i32::try_from(count).expect("a row is short");
                canvas.rect((MARGIN + x * 4, 80 + y * 4), (count * 4 - 1, 3), colour)?;
                x += count;
            }
        }
        legend(canvas, palette, latest, height - 38)
    }

    fn latest_ms(&self) -> u64 {
        let times = self.cells.iter().map(|cell| if let Cell::Read(time_ms) = cell { *time_ms } else { 0 });
        times.max().unwrap_or(0).max(1)
    }
}

fn legend(canvas: &Canvas<'_>, palette: &Palette, latest_ms: u64, y: i32) -> Result<(), PictureError> {
    const STEPS: i32 = 120;
    for step in 0..STEPS {
        let colour = at_time(&palette.time, f64::from(step) / f64::from(STEPS));
        canvas.rect((MARGIN + 90 + step * 2, y - 6), (2, 12), colour)?;
    }
    let end = format!("{:.1} s", latest_ms as f64 / 1000.0);
    canvas.text((MARGIN, y), "first read at 0", 13, palette.faint, HPos::Left)?;
    canvas.text((MARGIN + 90 + STEPS * 2 + 8, y), &end, 13, palette.faint, HPos::Left)?;
    for (x, colour, label) in [(470, palette.unread, "data, not read"), (620, palette.empty, "no data")] {
        canvas.rect((x, y - 6), (12, 12), colour)?;
        canvas.text((x + 20, y), label, 13, palette.faint, HPos::Left)?;
    }
    Ok(())
}

fn sizes(canvas: &Canvas<'_>, palette: &Palette, summary: &Summary) -> Result<(), PictureError> {
    const FLOOR: i32 = 310;
    const TALLEST: f64 = 200.0;
    let total = summary.classes.iter().fold((0, 0), |sum, class| (sum.0 + class.reads, sum.1 + class.bytes));
    let shares = summary.classes.map(|class| {
        [class.reads as f64 / total.0.max(1) as f64, class.bytes as f64 / total.1.max(1) as f64]
    });
    let most = shares.iter().flatten().fold(0.01_f64, |most, share| most.max(*share));
    canvas.rect((0, 0), (signed(WIDTH), 380), palette.background)?;
    canvas.text((MARGIN, 32), "How large the reads of a boot are", 20, palette.ink, HPos::Left)?;
    let what = format!("{} reads ask for {}", summary.reads, megabytes(summary.requested));
    canvas.text((MARGIN, 58), &what, 13, palette.faint, HPos::Left)?;
    let step = (signed(WIDTH) - 2 * MARGIN) / 7;
    for (index, (label, pair)) in (0_i32..).zip(CLASS_LABELS.iter().zip(&shares)) {
        let x = MARGIN + index * step;
        for (side, (share, colour)) in (0_i32..).zip(pair.iter().zip(&palette.bars)) {
            let height = rounded(share / most * TALLEST);
            let left = x + 12 + side * 44;
            canvas.rect((left, FLOOR - height), (40, height), *colour)?;
            let percent = format!("{:.0} %", share * 100.0);
            canvas.text((left + 20, FLOOR - height - 10), &percent, 12, palette.faint, HPos::Center)?;
        }
        canvas.text((x + 54, FLOOR + 18), label, 14, palette.ink, HPos::Center)?;
    }
    canvas.rect((MARGIN, FLOOR), (signed(WIDTH) - 2 * MARGIN, 1), palette.faint)?;
    for (x, colour, label) in
        [(MARGIN, palette.bars[0], "share of reads"), (MARGIN + 150, palette.bars[1], "share of bytes")]
    {
        canvas.rect((x, 350), (12, 12), colour)?;
        canvas.text((x + 20, 356), label, 13, palette.faint, HPos::Left)?;
    }
    Ok(())
}

/// The colour at `share` of the way from the first to the last of `colours`.
fn at_time(colours: &[RGBColor; 4], share: f64) -> RGBColor {
    let place = share.clamp(0.0, 1.0) * 3.0;
    let index = [1.0, 2.0].iter().filter(|bound| place >= **bound).count();
    let part = place - index as f64;
    let between = |from: u8, to: u8| {
        u8::try_from(rounded(f64::from(from) + (f64::from(to) - f64::from(from)) * part)).unwrap_or(u8::MAX)
    };
    let (from, to) = (colours[index], colours[index + 1]);
    RGBColor(between(from.0, to.0), between(from.1, to.1), between(from.2, to.2))
}

#[expect(clippy::cast_possible_truncation, reason = "pixels and colours are small")]
fn rounded(value: f64) -> i32 {
    value.round() as i32
}

fn signed(value: u32) -> i32 {
    i32::try_from(value).expect("a picture is smaller than 2^31 pixels")
}

fn megabytes(bytes: u64) -> String {
    let megabytes = bytes as f64 / 1e6;
    if megabytes < 100.0 { format!("{megabytes:.1} MB") } else { format!("{megabytes:.0} MB") }
}

fn kibibytes(kibibytes: u64) -> String {
    if kibibytes.is_multiple_of(1024) {
        format!("{} MiB", kibibytes / 1024)
    } else {
        format!("{kibibytes} KiB")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot_cache::recording::{Read, Recording};

    fn sample() -> (Summary, Vec<Touch>) {
        let read = |at: u64| Read {
            offset: (at * 37 % 500) << 14,
            length: 1 << (9 + at % 10),
            time_ns: at * 10_000_000,
            took_ns: 0,
        };
        let recording = Recording::new((0..400).map(read).collect(), 4_000_000_000);
        let touches = crate::boot_cache::merge::first_touches(std::slice::from_ref(&recording), 4096);
        (Summary::of(&[recording], 16 << 20, Some(9 << 20)), touches)
    }

    #[test]
    fn draws_each_picture_in_each_form_and_theme() {
        let dir = tempfile::tempdir().unwrap();
        let (summary, touches) = sample();
        for (form, extension, magic) in
            [(Form::Svg, "svg", &b"<svg "[..]), (Form::Png, "png", &b"\x89PNG"[..])]
        {
            for theme in [Theme::Light, Theme::Dark] {
                let offsets = dir.path().join(format!("offsets.{extension}"));
                let sizes = dir.path().join(format!("sizes.{extension}"));
                draw_offsets(&offsets, form, theme, &summary, &touches, &|block| block > 2000).unwrap();
                draw_sizes(&sizes, form, theme, &summary).unwrap();
                for path in [offsets, sizes] {
                    let bytes = std::fs::read(path).unwrap();
                    assert!(bytes.starts_with(magic) && bytes.len() > 2000);
                }
            }
        }
    }

    #[test]
    fn a_cell_shows_the_first_read_of_any_of_its_blocks() {
        let (summary, _) = sample();
        let summary = Summary { logical: 4096 * COLUMNS as u64 * ROWS_MAX * 2, ..summary };
        let touch = |block, ms: u64| Touch { block, time_ns: ms * 1_000_000 };
        let map = Map::of(&summary, &[touch(3, 5), touch(2, 9), touch(0, 30)], &|block| block >= 6);
        assert_eq!(map.blocks_per_cell, 2);
        assert_eq!(map.cells[..4], [Cell::Read(30), Cell::Read(5), Cell::Unread, Cell::Empty]);
    }

    #[test]
    fn an_unwritable_folder_is_an_error() {
        let (summary, _) = sample();
        let path = Path::new("/nonexistent/sizes.svg");
        assert!(draw_sizes(path, Form::Svg, Theme::Light, &summary).is_err());
    }
}
