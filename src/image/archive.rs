//! Container images as tar archives: which kind one is, and whether it is whole.
//!
//! Which kind is decided by its first entries alone, so that it is known when the first bytes of the archive arrive
//! (`docker save` writes its manifest last). Whether the rest is as those promise is checked when the image is added, and
//! so are the names that the archive would bring into an engine.

use std::io::{self, Read};

use flate2::read::MultiGzDecoder;
use serde_json::Value;

/// How many bytes of an archive are enough to tell its kind; of a shorter one all are.
pub const HEAD_BYTES: usize = 64 << 10;

/// Bytes of a tar header, and the unit of everything in the archive.
const RECORD: usize = 512;
/// Most bytes of a file of names, or of a header about the next entry.
const TEXT_BYTES: u64 = 4 << 20;
/// First bytes of a gzip file.
const GZIP: [u8; 2] = [0x1f, 0x8b];

/// What a container's archive is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ArchiveKind {
    /// `docker save`, which may be an OCI layout too: layers, and what says how they go together.
    Saved,
    /// A root file system.
    RootFs,
}

/// What is wrong with an archive.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// It is no tar archive, plain or by gzip.
    #[error("it is not a tar archive, plain or compressed with gzip")]
    NotTar,
    /// It ends in the middle.
    #[error("the archive ends in the middle: it was not copied as a whole")]
    Truncated,
    /// A header is damaged.
    #[error("the archive is damaged at its byte {0}")]
    Damaged(u64),
    /// It has no entries.
    #[error("the archive is empty")]
    Empty,
    /// What is needed to load it is missing.
    #[error("it looks like a saved image, but has no manifest.json: save it again")]
    NoManifest,
    /// An OCI layout alone, which dockerd does not load: tried with 20.10.
    #[error(
        "it is an OCI layout without manifest.json, which Docker does not load: make it one with \
         `skopeo copy oci-archive:FILE docker-archive:NEW`, or take what `docker save` writes"
    )]
    OciLayout,
    /// A saved image that begins with something else.
    #[error(
        "it is a saved image in an order that cannot be loaded while it arrives: load it into Docker and `docker save` it"
    )]
    Order,
    /// It would give an image a name of ours.
    #[error(
        "it names an image '{}', as only bootcache may: give it another name by `docker tag` and save that",
        .0.escape_debug()
    )]
    OurName(String),
    /// It would give an image a name that is none.
    #[error(
        "it names an image '{}', which Docker does not take: give it another name by `docker tag` and save that",
        .0.escape_debug()
    )]
    InvalidName(String),
    /// What says its names is unreadable.
    #[error("its {0} is not what a saved image has (or is over 4 MiB): save it again")]
    Names(&'static str),
    /// It cannot be read.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl ArchiveKind {
    /// The kind, by the first [`HEAD_BYTES`] of the archive.
    pub fn of_head(head: &[u8]) -> Result<Self, ArchiveError> {
        let mut entries = entries(head)?;
        while let Some(entry) = entries.next()? {
            if let Some(kind) = entry.kind() {
                return Ok(kind);
            }
        }
        if entries.at == 0 { Err(ArchiveError::Empty) } else { Ok(Self::RootFs) }
    }
}

/// Reads a whole archive and says what it is.
///
/// # Errors
/// When it is cut short, damaged, not what its beginning promises, or names images as it must not.
pub fn check(archive: impl Read) -> Result<ArchiveKind, ArchiveError> {
    let mut entries = entries(archive)?;
    let (mut kind, mut has_manifest, mut is_layout) = (None, false, false);
    let mut names = Ok(());
    while let Some(entry) = entries.next()? {
        kind = kind.or_else(|| entry.kind());
        let path = entry.path();
        has_manifest |= path == "manifest.json";
        is_layout |= matches!(path.as_str(), "index.json" | "oci-layout");
        let file = match path.as_str() {
            "manifest.json" => "manifest.json",
            "index.json" => "index.json",
            _ => continue,
        };
        // An engine takes the last of several: none may be wrong.
        if kind == Some(ArchiveKind::Saved) && names.is_ok() {
            names = match entries.text(&entry)? {
                Some(text) => check_names(file, &text),
                None => Err(ArchiveError::Names(file)),
            };
        }
    }
    match kind {
        None if entries.at == 0 => Err(ArchiveError::Empty),
        Some(ArchiveKind::Saved) if !has_manifest && is_layout => Err(ArchiveError::OciLayout),
        Some(ArchiveKind::Saved) if !has_manifest => Err(ArchiveError::NoManifest),
        Some(ArchiveKind::RootFs) if has_manifest || is_layout => Err(ArchiveError::Order),
        kind => names.map(|()| kind.unwrap_or(ArchiveKind::RootFs)),
    }
}

/// Checks the names in a saved image's `manifest.json`, or in an OCI layout's `index.json`.
fn check_names(file: &'static str, text: &[u8]) -> Result<(), ArchiveError> {
    let unreadable = || ArchiveError::Names(file);
    let json: Value = serde_json::from_slice(text).map_err(|_| unreadable())?;
    if file == "manifest.json" {
        for image in json.as_array().ok_or_else(unreadable)? {
            // Docker reads a key whatever its case is.
            let fields = image.as_object().ok_or_else(unreadable)?.iter();
            for (_, tags) in fields.filter(|(key, tags)| key.to_uppercase() == "REPOTAGS" && !tags.is_null())
            {
                for tag in tags.as_array().ok_or_else(unreadable)? {
                    check_name(tag.as_str().ok_or_else(unreadable)?, true)?;
                }
            }
        }
        return Ok(());
    }
    for image in json["manifests"].as_array().into_iter().flatten() {
        for key in ["org.opencontainers.image.ref.name", "io.containerd.image.name"] {
            if let Some(name) = image["annotations"][key].as_str() {
                check_name(name, false)?;
            }
        }
    }
    Ok(())
}

/// Checks a name that an archive brings, as a reference of Docker's; only an OCI layout's may go without a tag, or be one.
fn check_name(reference: &str, tagged: bool) -> Result<(), ArchiveError> {
    let shown = || reference.chars().take(120).collect();
    let (name, tag) = match reference.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        _ => (reference, None),
    };
    let path = match name.split_once('/') {
        Some((host, path)) if host.contains(['.', ':']) || host == "localhost" => {
            if !is_host(host) {
                return Err(ArchiveError::InvalidName(shown()));
            }
            path
        }
        _ => name,
    };
    // Of whatever registry: the engine leaves its own one's name out.
    if path == "bootcache" || path.starts_with("bootcache/") {
        return Err(ArchiveError::OurName(shown()));
    }
    let is_name = name.len() <= 255 && path.split('/').all(is_component);
    let is_valid = match tag {
        Some(tag) => is_name && is_tag(tag),
        None => !tagged && (is_name || is_tag(reference)),
    };
    if is_valid { Ok(()) } else { Err(ArchiveError::InvalidName(shown())) }
}

/// Whether it is a registry's host, maybe with a port.
fn is_host(host: &str) -> bool {
    let (host, port) = host.rsplit_once(':').unwrap_or((host, "0"));
    let is_word = |word: &str| {
        !word.is_empty()
            && !word.starts_with('-')
            && !word.ends_with('-')
            && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    host.split('.').all(is_word) && !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit())
}

/// Whether it is a part of a repository's path: words of small letters and digits, between them `.`, `_`, `__` or dashes.
fn is_component(part: &str) -> bool {
    let is_word = |byte: char| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    part.starts_with(is_word)
        && part.ends_with(is_word)
        && part.split(is_word).all(|between| {
            matches!(between, "" | "." | "_" | "__") || between.bytes().all(|byte| byte == b'-')
        })
}

fn is_tag(tag: &str) -> bool {
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    (1..=128).contains(&tag.len())
        && tag.bytes().next().is_some_and(is_word)
        && tag.bytes().all(|byte| is_word(byte) || matches!(byte, b'.' | b'-'))
}

/// An entry's header.
struct Entry {
    name: String,
    /// What it is, as tar says it.
    flag: u8,
    /// Regular file, folder, or another thing of a file system; otherwise a header about the next entry.
    is_file: bool,
    length: u64,
}

impl Entry {
    /// Reads a header; `None` if its sum is wrong.
    fn parse(header: &[u8]) -> Option<Self> {
        let text = |from: usize, length: usize| {
            let field = &header[from..from + length];
            let end = field.iter().position(|byte| *byte == 0).unwrap_or(length);
            String::from_utf8_lossy(&field[..end]).into_owned()
        };
        let octal = |from, length| u64::from_str_radix(text(from, length).trim(), 8).ok();
        let sum: u64 = (0..RECORD)
            .map(|at| if (148..156).contains(&at) { u64::from(b' ') } else { u64::from(header[at]) })
            .sum();
        if octal(148, 8)? != sum {
            return None;
        }
        // Sizes of 8 GiB and more are binary.
        let length = match header[124] & 0x80 {
            0 => octal(124, 12)?,
            _ => u64::from_be_bytes(header[128..136].try_into().ok()?),
        };
        let prefix = if header[257..].starts_with(b"ustar\0") { text(345, 155) } else { String::new() };
        let name = if prefix.is_empty() { text(0, 100) } else { format!("{prefix}/{}", text(0, 100)) };
        // x, g: POSIX; K, L: GNU's long names.
        let is_file = !matches!(header[156], b'x' | b'g' | b'K' | b'L');
        (length < 1 << 50).then_some(Self { name, flag: header[156], is_file, length })
    }

    /// Its path in the folder that the archive is unpacked to.
    fn path(&self) -> String {
        let mut path = Vec::new();
        for part in self.name.split('/') {
            match part {
                "" | "." => {}
                ".." => drop(path.pop()),
                part => path.push(part),
            }
        }
        path.join("/")
    }

    /// Takes over what a header before this one says of it.
    fn amend(&mut self, said: &Said) {
        if let Some(name) = &said.name {
            self.name.clone_from(name);
        }
        self.length = said.length.unwrap_or(self.length);
    }

    /// What an archive that begins with this entry is; `None` if it says nothing.
    fn kind(&self) -> Option<ArchiveKind> {
        let path = self.path();
        let first = path.split('/').next().unwrap_or_default();
        if !self.is_file || first.is_empty() {
            return None;
        }
        let digest = first.split('.').next().unwrap_or_default();
        let is_layer = digest.len() == 64 && digest.bytes().all(|byte| byte.is_ascii_hexdigit());
        let is_saved =
            matches!(first, "blobs" | "oci-layout" | "index.json" | "manifest.json" | "repositories");
        Some(if is_layer || is_saved { ArchiveKind::Saved } else { ArchiveKind::RootFs })
    }
}

/// What a header says of the next entry.
#[derive(Default)]
struct Said {
    name: Option<String>,
    length: Option<u64>,
}

impl Said {
    /// Reads POSIX records, `LENGTH KEY=VALUE` and a line's end each; `None` if they are none.
    fn read_records(&mut self, mut text: &[u8]) -> Option<()> {
        while text.iter().any(|byte| *byte != 0) {
            let space = text.iter().position(|byte| *byte == b' ')?;
            let length: usize = std::str::from_utf8(&text[..space]).ok()?.parse().ok()?;
            let record = text.get(space + 1..length)?.strip_suffix(b"\n")?;
            text = &text[length..];
            let equals = record.iter().position(|byte| *byte == b'=')?;
            let value = String::from_utf8_lossy(&record[equals + 1..]);
            match &record[..equals] {
                b"path" | b"GNU.sparse.name" => self.name = Some(value.into_owned()),
                b"size" => self.length = Some(value.parse().ok().filter(|length| *length < 1 << 50)?),
                _ => {}
            }
        }
        Some(())
    }
}

/// Reads headers, and skips what lies between them.
struct Entries<R> {
    archive: R,
    /// Bytes of records read.
    at: u64,
    /// Bytes of the last entry's data, which come before the next header.
    data: u64,
    /// What was said of the next entry.
    said: Said,
}

/// The entries of an archive, which gzip may have compressed.
fn entries<'a>(mut archive: impl Read + 'a) -> io::Result<Entries<Box<dyn Read + 'a>>> {
    let mut magic = Vec::new();
    archive.by_ref().take(GZIP.len() as u64).read_to_end(&mut magic)?;
    let compressed = magic == GZIP;
    let whole = io::Cursor::new(magic).chain(archive);
    let archive: Box<dyn Read> = if compressed {
        Box::new(io::BufReader::with_capacity(HEAD_BYTES, MultiGzDecoder::new(whole)))
    } else {
        Box::new(io::BufReader::with_capacity(HEAD_BYTES, whole))
    };
    Ok(Entries { archive, at: 0, data: 0, said: Said::default() })
}

impl<R: Read> Entries<R> {
    /// The next entry; `None` at the end of the archive.
    fn next(&mut self) -> Result<Option<Entry>, ArchiveError> {
        let skipped = io::copy(&mut self.archive.by_ref().take(self.data), &mut io::sink());
        if skipped.map_err(cut_short)? < self.data {
            return Err(ArchiveError::Truncated);
        }
        self.at += self.data;
        let mut header = Vec::with_capacity(RECORD);
        let read = self.archive.by_ref().take(RECORD as u64).read_to_end(&mut header);
        let read =
            read.map_err(|error| if self.at == 0 { ArchiveError::NotTar } else { cut_short(error) })?;
        let damaged = if self.at == 0 { ArchiveError::NotTar } else { ArchiveError::Damaged(self.at) };
        match read {
            0 => return Ok(None), // some tools leave the end mark out
            RECORD => {}
            _ if self.at == 0 => return Err(ArchiveError::NotTar),
            _ => return Err(ArchiveError::Truncated),
        }
        if header.iter().all(|byte| *byte == 0) {
            return Ok(None); // the end mark; what follows is padding
        }
        self.at += RECORD as u64;
        let mut entry = Entry::parse(&header).ok_or(damaged)?;
        if entry.is_file {
            entry.amend(&std::mem::take(&mut self.said));
        }
        self.data = entry.length.next_multiple_of(RECORD as u64);
        if matches!(entry.flag, b'x' | b'L') {
            let damaged = ArchiveError::Damaged(self.at);
            match (self.text(&entry)?, entry.flag) {
                (Some(text), b'x') if self.said.read_records(&text).is_some() => {}
                (Some(text), b'L') => {
                    let end = text.iter().position(|byte| *byte == 0).unwrap_or(text.len());
                    self.said.name = Some(String::from_utf8_lossy(&text[..end]).into_owned());
                }
                _ => return Err(damaged),
            }
        }
        Ok(Some(entry))
    }

    /// What the entry that was read last holds; `None` if it is no text of a moderate length.
    fn text(&mut self, entry: &Entry) -> Result<Option<Vec<u8>>, ArchiveError> {
        if entry.length > TEXT_BYTES || !matches!(entry.flag, 0 | b'0' | b'x' | b'L') {
            return Ok(None);
        }
        let mut text = Vec::new();
        let read = self.archive.by_ref().take(entry.length).read_to_end(&mut text);
        let read = read.map_err(cut_short)? as u64;
        if read < entry.length {
            return Err(ArchiveError::Truncated);
        }
        self.at += read;
        self.data -= read;
        Ok(Some(text))
    }
}

/// A stream that gzip says has ended early.
fn cut_short(error: io::Error) -> ArchiveError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => ArchiveError::Truncated,
        _ => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// A tar archive with these files, as tar writes it.
    fn tar(files: &[&str]) -> Vec<u8> {
        let content = |file: &&str| if file.ends_with(".json") { b"[]".to_vec() } else { vec![7; 1000] };
        let files: Vec<_> = files.iter().map(|file| (*file, content(file))).collect();
        tar_of(&files, &[])
    }

    /// A tar archive with these files and what is in them, written with some options.
    fn tar_of(files: &[(&str, Vec<u8>)], options: &[&str]) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        for (file, content) in files {
            let path = dir.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        let mut tar = std::process::Command::new("tar");
        tar.arg("-C").arg(dir.path()).args(options).arg("-c").args(files.iter().map(|(file, _)| file));
        tar.output().unwrap().stdout
    }

    /// A saved image whose `manifest.json` is this.
    fn saved(manifest: &str) -> Vec<u8> {
        let layer = format!("{}/layer.tar", "0a".repeat(32));
        tar_of(&[(&layer, vec![7; 1000]), ("manifest.json", manifest.into())], &[])
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn a_root_file_system_and_a_saved_image_are_told_apart_by_their_beginning() {
        let layer = format!("{}/layer.tar", "0a".repeat(32));
        let cases = [
            (tar(&["bin/sh", "etc/passwd"]), ArchiveKind::RootFs),
            (tar(&["./bin/sh", "./blobs"]), ArchiveKind::RootFs),
            (tar(&[&layer, "manifest.json"]), ArchiveKind::Saved),
            (tar(&["./blobs/sha256/x", "./index.json", "./manifest.json"]), ArchiveKind::Saved),
        ];
        for (archive, kind) in cases {
            for bytes in [archive.clone(), gzip(&archive)] {
                assert_eq!(ArchiveKind::of_head(&bytes[..bytes.len().min(HEAD_BYTES)]).unwrap(), kind);
                assert_eq!(check(&bytes[..]).unwrap(), kind);
            }
        }
    }

    #[test]
    fn an_archive_that_is_cut_short_or_damaged_is_refused() {
        let whole = tar(&["bin/sh", "etc/passwd", "etc/group"]);
        for end in (1..whole.len()).step_by(100).filter(|end| *end < 4600 && !end.is_multiple_of(RECORD)) {
            assert!(check(&whole[..end]).is_err(), "{end}");
        }
        let packed = gzip(&whole);
        assert!(matches!(check(&packed[..packed.len() / 2]), Err(ArchiveError::Truncated)));
        let mut damaged = whole.clone();
        damaged[1536 + 3] ^= 1;
        assert!(matches!(check(&damaged[..]), Err(ArchiveError::Damaged(1536))));
        assert!(matches!(check(&[7; 5000][..]), Err(ArchiveError::NotTar)));
        assert!(matches!(check(&gzip(b"text")[..]), Err(ArchiveError::NotTar)));
        assert!(matches!(check(&[0; 10240][..]), Err(ArchiveError::Empty)));
    }

    #[test]
    fn a_saved_image_without_a_manifest_or_in_another_order_is_refused() {
        let layer = format!("{}/layer.tar", "0a".repeat(32));
        assert!(matches!(check(&tar(&[&layer])[..]), Err(ArchiveError::NoManifest)));
        let layout = tar(&["./blobs/sha256/x", "./index.json", "./oci-layout"]);
        assert!(matches!(check(&layout[..]), Err(ArchiveError::OciLayout)));
        assert!(matches!(check(&tar(&["a", &layer, "manifest.json"])[..]), Err(ArchiveError::Order)));
    }

    #[test]
    fn an_archive_that_names_an_image_of_ours_or_has_no_valid_name_is_refused() {
        let tags = |tags: &str| check(&saved(&format!(r#"[{{"Config":"c","RepoTags":{tags}}}]"#))[..]);
        let host = "r.example:5000/a/b__c.d--e:V_1.0-x";
        let valid = format!(r#"["busybox:latest", "{host}", "localhost/a:1", "mybootcache/a:1"]"#);
        for valid in ["null", "[]", &valid] {
            assert_eq!(tags(valid).unwrap(), ArchiveKind::Saved, "{valid}");
        }
        for ours in ["bootcache/base:0", "docker.io/bootcache/base:0", "localhost:1/bootcache/a/b:0"] {
            let error = tags(&format!(r#"["busybox:latest","{ours}"]"#)).unwrap_err();
            assert!(matches!(&error, ArchiveError::OurName(name) if name == ours), "{ours}: {error}");
            let error = error.to_string();
            assert!(error.contains("docker tag") && error.lines().count() == 1, "{error}");
        }
        let digest = format!("a@sha256:{}", "0".repeat(64));
        for none in
            ["", "busybox", ":1", "Not Valid", "A/b:1", "a//b:1", "a:", "a:-1", "a/:1", "a._b:1", "a-:1"]
                .into_iter()
                .chain(["-.x/a:1", "x.y:p/a:1", "a:1\\n2", digest.as_str()])
        {
            let error = tags(&format!(r#"["{none}"]"#)).unwrap_err();
            assert!(matches!(&error, ArchiveError::InvalidName(_)), "{none}: {error}");
            assert_eq!(error.to_string().lines().count(), 1, "{error}");
        }
        assert!(matches!(
            check(&saved(r#"[{"repotagS":["bootcache/a:0"]}]"#)[..]),
            Err(ArchiveError::OurName(_))
        ));
        for unreadable in ["", "{}", "[1]", r#"[{"RepoTags":[1]}]"#, r#"[{"RepoTags":"a:1"}]"#, "[] []"] {
            let error = check(&saved(unreadable)[..]).unwrap_err();
            assert!(matches!(error, ArchiveError::Names("manifest.json")), "{unreadable}: {error}");
        }
        let long = format!("[{}]", " ".repeat(usize::try_from(TEXT_BYTES).unwrap()));
        assert!(matches!(check(&saved(&long)[..]), Err(ArchiveError::Names("manifest.json"))));
    }

    #[test]
    fn an_oci_layout_s_names_are_checked_too() {
        let layout = |key: &str, name: &str| {
            let index = format!(r#"{{"manifests":[{{"annotations":{{"{key}":"{name}"}}}}]}}"#);
            let files = [
                ("oci-layout", b"{}".to_vec()),
                ("index.json", index.into()),
                ("manifest.json", "[]".into()),
            ];
            check(&tar_of(&files, &[])[..])
        };
        let [tag, name] = ["org.opencontainers.image.ref.name", "io.containerd.image.name"];
        for valid in ["latest", "v1.0-x", "busybox:latest", "docker.io/library/busybox"] {
            assert_eq!(layout(tag, valid).unwrap(), ArchiveKind::Saved, "{valid}");
        }
        for key in [tag, name] {
            assert!(matches!(layout(key, "bootcache/base:0"), Err(ArchiveError::OurName(_))));
            assert!(matches!(layout(key, "docker.io/bootcache/base"), Err(ArchiveError::OurName(_))));
            assert!(matches!(layout(key, "Not Valid"), Err(ArchiveError::InvalidName(_))));
        }
    }

    #[test]
    fn names_are_found_wherever_an_engine_would_find_them() {
        let bad = r#"[{"RepoTags":["bootcache/a:0"]}]"#;
        let first = saved("[]");
        // In a second manifest, and in a second member of a compressed archive.
        let end = first.len() - first.iter().rev().take_while(|byte| **byte == 0).count();
        let end = end.next_multiple_of(RECORD);
        let second = tar_of(&[("manifest.json", bad.into())], &[]);
        let both = [&first[..end], &second[..]].concat();
        assert!(matches!(check(&both[..]), Err(ArchiveError::OurName(_))));
        let members = [gzip(&first[..end]), gzip(&second)].concat();
        assert!(matches!(check(&members[..]), Err(ArchiveError::OurName(_))));
        // By a path that is longer than a header has room for, or says it otherwise.
        let rename = format!("--transform=s,^twice,{}manifest.json,", "./".repeat(80));
        let layer = format!("{}/layer.tar", "0a".repeat(32));
        for format in ["--format=gnu", "--format=posix"] {
            let files =
                [(layer.as_str(), vec![7; 1000]), ("twice", bad.into()), ("manifest.json", "[]".into())];
            let archive = tar_of(&files, &[format, &rename]);
            assert!(matches!(check(&archive[..]), Err(ArchiveError::OurName(_))), "{format}");
        }
    }
}
