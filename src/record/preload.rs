//! Seeing reads inside the process: where the tracer's library is, and how a process is made to load it.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::RecordError;

/// The file name of the tracer's library.
pub(super) const LIBRARY: &str = "libbootcache_tracer.so";

/// The tracer's library: what `BOOTCACHE_TRACER` says; else beside this program, in `../lib/bootcache` of it, or in
/// `deps` beside it, where cargo puts it.
///
/// # Errors
/// [`RecordError::NoTracer`].
pub fn library() -> Result<PathBuf, RecordError> {
    if let Some(path) = env::var_os("BOOTCACHE_TRACER").map(PathBuf::from) {
        let found = path.is_file().then(|| path.canonicalize().ok()).flatten();
        return found.ok_or(RecordError::NoTracer);
    }
    let program =
        env::current_exe().and_then(|path| path.canonicalize()).map_err(|_| RecordError::NoTracer)?;
    let dir = program.parent().unwrap_or_else(|| Path::new("/"));
    let places = [dir.to_owned(), dir.join("../lib/bootcache"), dir.join("deps"), dir.join("..")];
    let found = places.iter().map(|place| place.join(LIBRARY)).find(|path| path.is_file());
    found.and_then(|path| path.canonicalize().ok()).ok_or(RecordError::NoTracer)
}

/// The environment that makes a process, and those it starts, trace reads of `image` into `trace`.
pub(super) fn environment(library: &Path, image: &Path, trace: &Path) -> [(&'static str, OsString); 3] {
    let mut preload = library.as_os_str().to_owned();
    if let Some(others) = env::var_os("LD_PRELOAD").filter(|others| !others.is_empty()) {
        preload.push(":");
        preload.push(others);
    }
    [("LD_PRELOAD", preload), ("BOOTCACHE_TRACE_IMAGE", image.into()), ("BOOTCACHE_TRACE_OUT", trace.into())]
}
