//! An error as a person reads it: one line, nothing said twice, and what to do about a full disk.

/// What the operating system says when there is no room, or the user's share of it is used up.
const FULL: [&str; 2] = ["(os error 28)", "(os error 122)"];
const MAKE_ROOM: &str = "free some space, or choose another store with --store";

/// The chain of causes. A cause that a message before it has told already is left out.
pub(crate) fn complaint(error: &anyhow::Error) -> String {
    let mut said = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !said.contains(&cause) {
            if !said.is_empty() {
                said.push_str(": ");
            }
            said.push_str(&cause);
        }
    }
    if FULL.iter().any(|full| said.ends_with(full)) {
        said.push_str(": ");
        said.push_str(MAKE_ROOM);
    }
    said
}

#[cfg(test)]
mod tests {
    use std::io;

    use anyhow::Context;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("the trace: {0}: record again")]
    struct Told(#[from] io::Error);

    #[test]
    fn nothing_is_said_twice() {
        let error: anyhow::Result<()> = Err(Told(io::Error::other("it broke")).into());
        let error = error.context("cannot record").unwrap_err();
        assert_eq!(complaint(&error), "cannot record: the trace: it broke: record again");
    }

    #[test]
    fn a_full_disk_comes_with_what_to_do() {
        let full = io::Error::from_raw_os_error(28);
        let error = Err::<(), _>(full).context("/store/lock").unwrap_err();
        let said = complaint(&error);
        assert!(said.starts_with("/store/lock: ") && said.ends_with(MAKE_ROOM), "{said}");
    }
}
