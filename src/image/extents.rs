//! Which parts of a sparse file hold data, as the file system tells (`SEEK_DATA`, `SEEK_HOLE`).
//!
//! A part that is reported as data may still be all zeroes; a hole always reads as zeroes.

use std::fs::File;
use std::io;
use std::ops::Range;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

/// The byte ranges of `file` within `range` that are not holes, in order. Moves the file's position.
pub fn data_extents(file: &File, range: Range<u64>) -> DataExtents<'_> {
    DataExtents { file, range }
}

/// Iterator of [`data_extents`].
#[derive(Debug)]
pub struct DataExtents<'a> {
    file: &'a File,
    range: Range<u64>,
}

impl Iterator for DataExtents<'_> {
    type Item = io::Result<Range<u64>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.range.is_empty() {
            return None;
        }
        let found = self.next_extent();
        match &found {
            Ok(Some(extent)) => self.range.start = extent.end,
            Ok(None) | Err(_) => self.range.start = self.range.end,
        }
        found.transpose()
    }
}

impl DataExtents<'_> {
    fn next_extent(&self) -> io::Result<Option<Range<u64>>> {
        let start = match seek(self.file, SeekFrom::Data(self.range.start)) {
            Ok(start) if start < self.range.end => start,
            Ok(_) | Err(Errno::NXIO) => return Ok(None),
            // A file system that cannot tell: all of it may be data.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some(self.range.clone())),
            Err(error) => return Err(error.into()),
        };
        let end = seek(self.file, SeekFrom::Hole(start))?;
        Ok(Some(start..end.min(self.range.end)))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn finds_the_data_between_holes_and_stays_within_the_range() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 20).unwrap();
        for at in [8 << 20, 32 << 20] {
            file.write_all_at(&[1; 4096], at).unwrap();
        }
        let all: Vec<_> = data_extents(&file, 0..64 << 20).map(Result::unwrap).collect();
        assert_eq!(all.len(), 2);
        assert!(all[0].contains(&(8 << 20)) && all[1].contains(&(32 << 20)));
        let some: Vec<_> = data_extents(&file, 0..(8 << 20) + 100).map(Result::unwrap).collect();
        assert_eq!((some.len(), some[0].clone()), (1, 8 << 20..(8 << 20) + 100));
        assert_eq!(data_extents(&file, 40 << 20..64 << 20).count(), 0);
    }
}
