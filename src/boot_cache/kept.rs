//! The recordings that are kept beside an image's boot cache: `images/ROOT/recordings/1`, `2`, …

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::recording::Recording;
use crate::digest::Digest;
use crate::store::write_atomic;

/// Most recordings that are kept of one image.
pub const RECORDINGS_MAX: usize = 999;
/// Most bytes of a recording's file that are read.
const FILE_MAX: u64 = 256 << 20;

/// The files of the recordings in `image_dir`, by number, the oldest first.
///
/// # Errors
/// Those of the file system; that there is none is not one.
pub fn recordings(image_dir: &Path) -> io::Result<Vec<(usize, PathBuf)>> {
    let entries = match fs::read_dir(image_dir.join("recordings")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
        found
            .extend(number.filter(|number| (1..=RECORDINGS_MAX).contains(number)).map(|n| (n, entry.path())));
    }
    found.sort();
    Ok(found)
}

/// The number that the next recording in `image_dir` gets, when `count` more are to be kept.
///
/// # Errors
/// Those of the file system; when there are [`RECORDINGS_MAX`] by then.
pub fn next(image_dir: &Path, count: usize) -> io::Result<usize> {
    let number = recordings(image_dir)?.last().map_or(1, |(last, _)| last + 1);
    if number + count > RECORDINGS_MAX + 1 {
        let what = format!(
            "more than {RECORDINGS_MAX} would be kept: remove some of the last in {}",
            image_dir.join("recordings").display()
        );
        return Err(io::Error::other(what));
    }
    Ok(number)
}

/// Keeps `recording` of the image `root` in `image_dir` under the next number, which is returned.
///
/// # Errors
/// Those of [`next`].
pub fn keep(image_dir: &Path, root: Digest, recording: &Recording) -> io::Result<usize> {
    let number = next(image_dir, 1)?;
    let dir = image_dir.join("recordings");
    fs::create_dir_all(&dir)?;
    write_atomic(&dir.join(number.to_string()), &recording.to_bytes(root))?;
    Ok(number)
}

/// Removes what was kept under `number`.
///
/// # Errors
/// Those of the file system.
pub fn remove(image_dir: &Path, number: usize) -> io::Result<()> {
    fs::remove_file(image_dir.join("recordings").join(number.to_string()))
}

/// The recording in the file at `path`, and the image that it is of.
///
/// # Errors
/// Those of the file system; [`io::ErrorKind::InvalidData`] with a [`super::recording::RecordingError`] inside.
pub fn read(path: &Path) -> io::Result<(Digest, Recording)> {
    if fs::metadata(path)?.len() > FILE_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is too large for a recording"));
    }
    Recording::from_bytes(&fs::read(path)?).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use super::super::recording::Read;
    use super::*;

    #[test]
    fn recordings_are_numbered_in_the_order_in_which_they_were_kept() {
        let dir = tempfile::tempdir().unwrap();
        assert!(recordings(dir.path()).unwrap().is_empty());
        let root = Digest::of(b"image");
        for at in 1..=11 {
            let reads = vec![Read { offset: at << 12, length: 4096, time_ns: 5, took_ns: 0 }];
            assert_eq!(keep(dir.path(), root, &Recording::new(reads, 9)).unwrap() as u64, at);
        }
        assert_eq!(next(dir.path(), RECORDINGS_MAX - 11).unwrap(), 12);
        assert!(next(dir.path(), RECORDINGS_MAX - 10).is_err());
        fs::write(dir.path().join("recordings/notes"), "x").unwrap();
        let kept = recordings(dir.path()).unwrap();
        assert_eq!(kept.iter().map(|(number, _)| *number).collect::<Vec<_>>(), (1..=11).collect::<Vec<_>>());
        let (found, last) = read(&kept[10].1).unwrap();
        assert_eq!((found, last.reads[0].offset), (root, 11 << 12));
        remove(dir.path(), 11).unwrap();
        assert_eq!(next(dir.path(), 1).unwrap(), 11);
    }
}
