//! The manifest: what is to be known of an image before any byte of its disk.
//!
//! JSON that people can read, in one canonical form: `{"manifest": {…}, "digest": "…"}`, where the digest is BLAKE3 of
//! the manifest's compact JSON. A text that is not exactly what this version writes is refused, so that no changed
//! byte goes unnoticed. The manifest says nothing of the node it lies on, and so is the same on all.

use serde::{Deserialize, Serialize};

use crate::digest::Digest;

/// The version that this code writes and reads.
pub const MANIFEST_VERSION: u32 = 1;
/// The longest manifest that is read, in bytes.
pub const MANIFEST_BYTES_MAX: usize = 64 * 1024;

/// What an image is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageKind {
    /// A virtual machine's disk.
    Vm,
    /// A container archive: `docker save`, an OCI archive, or a root file system as tar, byte for byte.
    Container,
}

impl std::fmt::Display for ImageKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Vm => "vm",
            Self::Container => "container",
        })
    }
}

/// What an image was made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SourceFormat {
    /// Bytes as they are: a raw disk, or an archive.
    Raw,
    /// QEMU's format.
    Qcow2,
    /// VMware's format, in any of its kinds.
    Vmdk,
    /// VirtualBox's format.
    Vdi,
    /// Hyper-V's format.
    Vhdx,
    /// A sealed overlay.
    Overlay,
}

impl SourceFormat {
    /// The format that a file name's extension speaks of, if any.
    pub fn of_extension(extension: &str) -> Option<Self> {
        match extension.to_ascii_lowercase().as_str() {
            "raw" => Some(Self::Raw),
            "qcow2" => Some(Self::Qcow2),
            "vmdk" => Some(Self::Vmdk),
            "vdi" => Some(Self::Vdi),
            "vhdx" => Some(Self::Vhdx),
            _ => None,
        }
    }
}

impl std::fmt::Display for SourceFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
            Self::Vdi => "vdi",
            Self::Vhdx => "vhdx",
            Self::Overlay => "overlay",
        })
    }
}

/// The boot cache that belongs to an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Boot {
    /// BLAKE3 of the boot cache's heads as stored.
    pub heads_digest: Digest,
    /// Their length in bytes.
    pub heads_length: u64,
    /// Length of the whole boot cache file in bytes.
    pub file_length: u64,
    /// The condition that ended the recording, as `record --until` took it.
    pub until: Option<String>,
}

/// What is to be known of an image before any byte of its disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`MANIFEST_VERSION`].
    pub version: u32,
    /// Bytes that a guest sees; need not be a multiple of 4096.
    pub size: u64,
    /// The image's identity: the root of its digest tree.
    pub root: Digest,
    /// Plain BLAKE3 of the disk, as `b3sum` prints it; not known of an increment until someone reads all of it.
    pub raw_blake3: Option<Digest>,
    /// What it is for.
    #[serde(rename = "type")]
    pub kind: ImageKind,
    /// What it was made from.
    pub source_format: SourceFormat,
    /// The image that an incremental image adds to.
    pub base: Option<Digest>,
    /// Bytes of blocks that are not all zero; of an increment, only those it holds itself.
    pub allocated: u64,
    /// Its boot cache, once there is one.
    pub boot: Option<Boot>,
}

/// Text that is not a manifest.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// It was changed, or never was one.
    #[error("the manifest is damaged ({0}); remove the image and add it again")]
    Damaged(String),
    /// It is longer than any manifest.
    #[error("the manifest is longer than {MANIFEST_BYTES_MAX} bytes")]
    TooLong,
    /// A newer program wrote it.
    #[error("the manifest has version {0}, this program knows {MANIFEST_VERSION}: use a newer bootcache")]
    Version(u32),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sealed<M> {
    manifest: M,
    digest: Digest,
}

impl Manifest {
    /// The digest of this manifest: pins everything it says, among it the boot cache's heads.
    pub fn digest(&self) -> Digest {
        Digest::of(&serde_json::to_vec(self).expect("a manifest has only fields that JSON can hold"))
    }

    /// The text that is stored and sent.
    pub fn to_bytes(&self) -> Vec<u8> {
        let sealed = Sealed { manifest: self, digest: self.digest() };
        let mut bytes =
            serde_json::to_vec_pretty(&sealed).expect("a manifest has only fields that JSON can hold");
        bytes.push(b'\n');
        bytes
    }

    /// Reads what [`Manifest::to_bytes`] wrote.
    ///
    /// # Errors
    /// [`ManifestError::Damaged`] when any byte differs from what this version would write.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ManifestError> {
        #[derive(Deserialize)]
        struct Version {
            manifest: VersionOnly,
        }
        #[derive(Deserialize)]
        struct VersionOnly {
            version: u32,
        }
        if bytes.len() > MANIFEST_BYTES_MAX {
            return Err(ManifestError::TooLong);
        }
        let damaged = |error: serde_json::Error| ManifestError::Damaged(error.to_string());
        let sealed: Sealed<Self> = match serde_json::from_slice(bytes) {
            Ok(sealed) => sealed,
            Err(error) => {
                return Err(match serde_json::from_slice::<Version>(bytes) {
                    Ok(other) if other.manifest.version > MANIFEST_VERSION => {
                        ManifestError::Version(other.manifest.version)
                    }
                    _ => damaged(error),
                });
            }
        };
        if sealed.digest != sealed.manifest.digest() || sealed.manifest.to_bytes() != bytes {
            return Err(ManifestError::Damaged("it does not have its digest".to_owned()));
        }
        if sealed.manifest.version != MANIFEST_VERSION {
            return Err(ManifestError::Version(sealed.manifest.version));
        }
        Ok(sealed.manifest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        Manifest {
            version: MANIFEST_VERSION,
            size: 10_000,
            root: Digest::of(b"root"),
            raw_blake3: Some(Digest::of(b"raw")),
            kind: ImageKind::Vm,
            source_format: SourceFormat::Qcow2,
            base: None,
            allocated: 8192,
            boot: Some(Boot {
                heads_digest: Digest::of(b"heads"),
                heads_length: 100,
                file_length: 2000,
                until: Some("serial:login:".to_owned()),
            }),
        }
    }

    #[test]
    fn reads_back_what_it_wrote() {
        let manifest = manifest();
        assert_eq!(Manifest::from_bytes(&manifest.to_bytes()).unwrap(), manifest);
    }

    #[test]
    fn every_changed_byte_is_detected_with_one_line() {
        let sound = manifest().to_bytes();
        for at in 0..sound.len() {
            for value in [sound[at] ^ 1, sound[at] ^ 0x20, b' ', b'\t', b'0', b'"'] {
                if value == sound[at] {
                    continue;
                }
                let mut bytes = sound.clone();
                bytes[at] = value;
                let error = Manifest::from_bytes(&bytes).expect_err("a changed byte").to_string();
                assert!(!error.contains('\n'), "{error}");
            }
            assert!(Manifest::from_bytes(&sound[..at]).is_err());
        }
    }

    #[test]
    fn a_newer_version_is_named() {
        let text = String::from_utf8(manifest().to_bytes()).unwrap();
        let newer = text.replace("\"version\": 1", "\"version\": 9").replace("\"boot\"", "\"new\"");
        assert!(matches!(Manifest::from_bytes(newer.as_bytes()), Err(ManifestError::Version(9))));
    }
}
