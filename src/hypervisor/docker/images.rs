//! Images of containers: a tar archive goes into the engine as it arrives, and is known there by a name of ours.
//!
//! An archive is what `docker save` or an OCI tool wrote, or a root file system; `crate::image::archive` tells which by
//! its first entry. Names inside an archive are not taken over: a `busybox:latest` that the host has stays what it is.

use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use bollard::query_parameters::{CreateImageOptions, RemoveImageOptions};
use futures_util::{Stream, StreamExt, TryStreamExt};
use tokio::io::{AsyncRead, AsyncReadExt, ReadBuf};
use tokio::sync::{RwLockReadGuard, oneshot};

use super::saved::Saved;
use super::{DEADLINE, Docker, status};
use crate::digest::Digest;
use crate::hypervisor::HypervisorError;
use crate::image::archive::{ArchiveKind, HEAD_BYTES};
use crate::name::ImageName;

/// How long an image may make no progress: neither do bytes come, nor does the engine take or unpack any.
const STALL: Duration = Duration::from_secs(900);
/// How many bytes go to the engine at a time.
const PIECE: usize = 256 << 10;

/// Why an image was not loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The archive cannot be read, or is none.
    #[error("image {name}: {reason}")]
    Archive {
        /// The image.
        name: ImageName,
        /// What is wrong with its bytes.
        reason: String,
    },
    /// Its bytes stopped coming; trying again may help.
    #[error("image {name} came in part: {reason}")]
    Cut {
        /// The image.
        name: ImageName,
        /// Why no more came.
        reason: String,
    },
    /// The engine did not do it.
    #[error(transparent)]
    Engine(#[from] HypervisorError),
}

impl Docker {
    /// The name that an image has in the engine: `bootcache/NAME:` and its root, all of it, since several names of ours
    /// come to one repository and whoever makes images can choose some digits of a root.
    pub fn reference(name: &ImageName, root: Digest) -> String {
        // A repository's name may not end in a separator nor have two, as ours may.
        let words = name.as_str().split(['.', '_', '-']).filter(|word| !word.is_empty());
        format!("bootcache/{}:{}", words.collect::<Vec<_>>().join("-"), root)
    }

    /// Waits until the engine has no names of an archive's own, and keeps them out.
    pub(super) async fn names(&self) -> Result<RwLockReadGuard<'_, ()>, HypervisorError> {
        let names = tokio::time::timeout(DEADLINE, self.naming.read()).await;
        names.map_err(|_| {
            HypervisorError::TimedOut(format!(
                "Docker at {} has not unpacked an image within {DEADLINE:?}: see whether dockerd hangs",
                self.address
            ))
        })
    }

    /// Whether the engine has an image of that name.
    pub async fn has_image(&self, reference: &str) -> Result<bool, HypervisorError> {
        let _names = self.names().await?;
        match self.client().await?.inspect_image(reference).await {
            Err(error) if status(&error) == Some(404) => Ok(false),
            other => other.map(|_| true).map_err(|error| self.failed("inspect an image", error)),
        }
    }

    /// Takes a name, and with an image's last name the image, out of the engine. What is not there is no error.
    pub async fn remove_image(&self, reference: &str) -> Result<(), HypervisorError> {
        let removed = self.client().await?.remove_image(reference, None::<RemoveImageOptions>, None).await;
        match removed {
            Err(error) if status(&error) == Some(404) => Ok(()),
            other => other.map(drop).map_err(|error| self.failed(&format!("remove {reference}"), error)),
        }
    }

    /// Loads the image `name`, whose archive `bytes` are, and returns its name in the engine. Bytes are taken as they
    /// arrive. Dropping the future leaves either nothing or the whole image there.
    pub async fn load(
        &self,
        name: &ImageName,
        root: Digest,
        mut bytes: impl AsyncRead + Send + Unpin + 'static,
    ) -> Result<String, LoadError> {
        let reference = Self::reference(name, root);
        if self.has_image(&reference).await? {
            return Ok(reference);
        }
        let archive = |reason: String| LoadError::Archive { name: name.clone(), reason };
        let mut head = Vec::new();
        let cut = |reason: String| LoadError::Cut { name: name.clone(), reason };
        let read = (&mut bytes).take(HEAD_BYTES as u64).read_to_end(&mut head).await;
        read.map_err(|error| cut(error.to_string()))?;
        let kind = ArchiveKind::of_head(&head).map_err(|error| archive(error.to_string()))?;

        // The client's own deadline is one for the whole request, however slowly the image comes: here it is on progress.
        let client = self.client().await?.clone().with_timeout(Duration::from_secs(7 * 24 * 3600));
        let source = Arc::<Source>::default();
        let body = pieces(std::io::Cursor::new(head).chain(bytes), Arc::clone(&source));
        let loaded = match kind {
            ArchiveKind::RootFs => source.moving(name, self.import(&client, &reference, body)).await,
            ArchiveKind::Saved => {
                let (name, reference, source) = (name.clone(), reference.clone(), Arc::clone(&source));
                Saved { name, reference, body, source }.load(self, &client).await
            }
        };
        match (loaded, source.cut.get()) {
            // The engine says as much of an archive that breaks off as of one that is damaged.
            (Err(_), Some(reason)) => Err(cut(reason.clone())),
            (loaded, _) => loaded.map(|()| reference),
        }
    }

    /// A root file system.
    async fn import(
        &self,
        client: &bollard::Docker,
        reference: &str,
        body: impl Stream<Item = std::io::Result<bytes::Bytes>> + Send + 'static,
    ) -> Result<(), LoadError> {
        let (repo, tag) = split(reference);
        let options = CreateImageOptions {
            from_src: Some("-".to_owned()),
            repo: Some(repo),
            tag: Some(tag),
            ..CreateImageOptions::default()
        };
        // The name that it gives is not to be taken for one of an archive that comes to its end meanwhile.
        let (give, _given) = oneshot::channel();
        let naming = Arc::clone(&self.naming);
        let end = async move {
            let _ = give.send(naming.read_owned().await);
            Ok::<_, std::io::Error>(bytes::Bytes::new())
        };
        let body = body.chain(futures_util::stream::once(end));
        let told = client.create_image(Some(options), Some(bollard::body_try_stream(body)), None);
        let told: Result<Vec<_>, _> = told.try_collect().await;
        told.map(drop).map_err(|error| self.failed(&format!("import {reference}"), error).into())
    }
}

/// A reference's repository and tag.
pub(super) fn split(reference: &str) -> (String, String) {
    let (repo, tag) = reference.rsplit_once(':').unwrap_or((reference, "latest"));
    (repo.to_owned(), tag.to_owned())
}

/// Where an archive's bytes come from, as the engine is given them.
#[derive(Debug, Default)]
pub(super) struct Source {
    /// Bytes that came, and what the engine said of them.
    moved: AtomicU64,
    /// Why no more came, when there should have been more.
    cut: OnceLock<String>,
}

impl Source {
    /// The engine has done something.
    pub(super) fn progressed(&self) {
        self.moved.fetch_add(1, Ordering::Relaxed);
    }

    /// Does `work` while bytes come, and for [`STALL`] after the last.
    pub(super) async fn moving<T>(
        &self,
        name: &ImageName,
        work: impl Future<Output = Result<T, LoadError>>,
    ) -> Result<T, LoadError> {
        tokio::select! {
            result = work => result,
            () = self.stalled() => Err(HypervisorError::TimedOut(format!(
                "image {name}: nothing of it came or was unpacked for {STALL:?}"
            )).into()),
        }
    }

    /// Resolves when nothing has come for [`STALL`].
    async fn stalled(&self) {
        let mut before = self.moved.load(Ordering::Relaxed);
        loop {
            tokio::time::sleep(STALL).await;
            let now = self.moved.load(Ordering::Relaxed);
            if now == before {
                return;
            }
            before = now;
        }
    }
}

/// What `bytes` gives, in pieces, counted.
fn pieces(
    bytes: impl AsyncRead + Send + Unpin + 'static,
    source: Arc<Source>,
) -> impl Stream<Item = std::io::Result<bytes::Bytes>> + Send + 'static {
    Pieces { bytes, source, buffer: vec![0; PIECE] }.fuse()
}

struct Pieces<R> {
    bytes: R,
    source: Arc<Source>,
    buffer: Vec<u8>,
}

impl<R: AsyncRead + Unpin> Stream for Pieces<R> {
    type Item = std::io::Result<bytes::Bytes>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        let mut buffer = ReadBuf::new(&mut this.buffer);
        match Pin::new(&mut this.bytes).poll_read(context, &mut buffer) {
            Poll::Pending => Poll::Pending,
            // The engine must not take it for the end: the request breaks off.
            Poll::Ready(Err(error)) => {
                this.source.cut.get_or_init(|| error.to_string());
                Poll::Ready(Some(Err(error)))
            }
            Poll::Ready(Ok(())) if buffer.filled().is_empty() => Poll::Ready(None),
            Poll::Ready(Ok(())) => {
                let piece = bytes::Bytes::copy_from_slice(buffer.filled());
                this.source.moved.fetch_add(piece.len() as u64, Ordering::Relaxed);
                Poll::Ready(Some(Ok(piece)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn a_reference_is_one_that_docker_takes() {
        let root = Digest::of(b"x");
        let reference = |name: &str| Docker::reference(&name.parse().unwrap(), root);
        assert_eq!(reference("busy"), format!("bootcache/busy:{root}"));
        assert_eq!(reference("a-.b__c-"), format!("bootcache/a-b-c:{root}"));
        assert_eq!(root.to_string().len(), 64);
    }

    #[tokio::test]
    async fn nobody_goes_by_a_name_while_an_archive_s_own_are_in_the_engine() {
        let docker = Docker::new("unix:///nowhere/docker.sock", "node".parse().unwrap());
        let turn = docker.naming.write().await;
        let mut asked = Box::pin(docker.has_image("bootcache/a:0"));
        assert!(asked.as_mut().now_or_never().is_none());
        drop(turn);
        assert!(matches!(asked.await, Err(HypervisorError::Unreachable(_))));
    }
}
