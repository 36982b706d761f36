//! Why a node does not do what it is asked.

use std::io;
use std::path::PathBuf;

use bootcache_nbd::OpenError;
use indicatif::HumanBytes;

use super::images::BASE_DEPTH_MAX;
use crate::attach::{AttachError, Device};
use crate::digest::Digest;
use crate::image::increment::IncrementError;
use crate::image::tree::SIZE_MAX;
use crate::name::HostName;
use crate::name::ImageName;
use crate::overlay::OverlayError;
use crate::store::StoreError;
use crate::transfer::PullError;

/// Why a request was not carried out; one line for a person.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The store has not got it, or cannot give it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The overlay cannot be made, opened or sealed.
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    /// A file or socket cannot be used.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or socket.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// No overlay of that name.
    #[error("there is no overlay '{0}': `bootcache overlay list` shows those there are")]
    NoOverlay(HostName),
    /// Nothing of that name.
    #[error("there is no image or overlay '{0}'")]
    NoExport(String),
    /// No VM of that name has a socket.
    #[error("VM '{0}' has no open socket")]
    NoVm(HostName),
    /// An image or overlay has the name already.
    #[error(
        "the name '{0}' is taken: choose another, or remove what has it (`boot --reuse` goes on with an overlay)"
    )]
    Taken(String),
    /// The overlay cannot have that size.
    #[error(
        "an overlay cannot have {} on image '{image}': take a multiple of 4 KiB from {}, the image's size, to {}",
        size_text(*.size), size_text(*.least), size_text(SIZE_MAX)
    )]
    OverlaySize {
        /// What was asked for.
        size: u64,
        /// The image.
        image: ImageName,
        /// The image's size.
        least: u64,
    },
    /// Containers are not started from overlays.
    #[error("'{0}' is a container image: overlays are for images of VMs")]
    Container(String),
    /// Somebody uses the overlay.
    #[error("overlay '{0}' is in use: stop its VM first")]
    InUse(HostName),
    /// The kernel has the overlay, and may have writes of it that have not come.
    #[error("overlay '{name}' is attached as {device}: `bootcache detach {name}` first")]
    Attached {
        /// The overlay.
        name: HostName,
        /// What it is.
        device: Device,
    },
    /// It cannot be told whether the overlay is attached.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// What it was sealed to cannot become an image.
    #[error("cannot commit the overlay: {0}")]
    Commit(IncrementError),
    /// Only some of the image is here.
    #[error("only a part of image {} is here: go on with `bootcache pull`", .0.short())]
    Incomplete(Digest),
    /// What has come of the image is still being read, after a restart.
    #[error("what is here of image {} is still being taken up after the daemon's restart: try again", .0.short())]
    Resuming(Digest),
    /// An image cannot be fetched.
    #[error(transparent)]
    Pull(#[from] PullError),
    /// Increments on increments without end.
    #[error("image {} stands on more than {BASE_DEPTH_MAX} others: its manifest is damaged", .0.short())]
    TooDeep(Digest),
}

/// What a client of NBD is told.
impl From<NodeError> for OpenError {
    fn from(error: NodeError) -> Self {
        match error {
            NodeError::NoExport(_)
            | NodeError::NoOverlay(_)
            | NodeError::Store(StoreError::NoSuchImage(_) | StoreError::NoSuchRoot(_)) => {
                Self::Unknown(error.to_string())
            }
            _ => Self::Refused(error.to_string()),
        }
    }
}

/// A size as commands print it; one that this would round is told to the byte.
fn size_text(bytes: u64) -> String {
    let unit = 1_u128 << (bytes.max(1).ilog2() / 10 * 10);
    let text = HumanBytes(bytes);
    let is_exact = (u128::from(bytes) * 100).is_multiple_of(unit);
    if is_exact { text.to_string() } else { format!("{text} ({bytes} bytes)") }
}
