//! An archive that `docker save` or an OCI tool wrote, which brings names of its own into the engine.
//!
//! Once the engine has all of an archive it gives its images the names in it, one by one, and may fail at any of them.
//! From then on until those names mean what they did before, no other archive comes to its end here, or the one would be
//! taken for the other, and nobody goes by a name; and that work is done to its end by whatever it was ordered, and
//! whatever the engine says.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bollard::query_parameters::{ImportImageOptions, ListImagesOptions, TagImageOptions};
use futures_util::{Stream, StreamExt, TryStreamExt};
use tokio::sync::{OwnedRwLockWriteGuard, oneshot};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::Docker;
use super::images::{LoadError, Source, split};
use crate::hypervisor::HypervisorError;
use crate::name::ImageName;

/// How often an engine that is away is asked to put its names back.
const TICK: Duration = Duration::from_secs(1);

/// What the engine's names mean.
type Tags = HashMap<String, String>;

/// An archive on its way into the engine.
pub(super) struct Saved<S> {
    pub(super) name: ImageName,
    /// The image's name in the engine.
    pub(super) reference: String,
    /// The archive's bytes.
    pub(super) body: S,
    /// Where they come from.
    pub(super) source: Arc<Source>,
}

impl<S> Saved<S>
where
    S: Stream<Item = io::Result<bytes::Bytes>> + Send + 'static,
{
    /// Loads the archive by `client`, and takes its own names away. Dropping the future breaks off an archive that is
    /// still coming; what the engine has whole gets its name, and no other.
    pub(super) async fn load(self, docker: &Docker, client: &bollard::Docker) -> Result<(), LoadError> {
        let given_up = CancellationToken::new();
        let _with_us = given_up.clone().drop_guard();
        let (docker, client) = (docker.clone(), client.clone());
        let (tell, told) = oneshot::channel();
        tokio::spawn(async move { self.load_whole(&docker, &client, given_up, tell).await });
        told.await.unwrap_or_else(|_| {
            Err(HypervisorError::Unreachable("the load of an image was ended".to_owned()).into())
        })
    }

    /// Loads it, and tells how that went: maybe before the names are put back, when the engine does not answer.
    async fn load_whole(
        self,
        docker: &Docker,
        client: &bollard::Docker,
        given_up: CancellationToken,
        tell: oneshot::Sender<Result<(), LoadError>>,
    ) {
        let Self { name, reference, body, source } = self;
        let mut tell = Some(tell);
        let mut tell = |result| tell.take().map(|tell| tell.send(result));
        let at_first = match docker.tags().await {
            Ok(tags) => tags,
            Err(error) => return drop(tell(Err(error.into()))),
        };
        let (give, mut given) = oneshot::channel();
        let (owner, naming) = (docker.clone(), Arc::clone(&docker.naming));
        let until = given_up.clone().cancelled_owned();
        // The engine is given the end of the archive when it is this one's turn.
        let end = async move {
            let turn = naming.write_owned().await;
            if given_up.is_cancelled() {
                return Err(io::Error::other("nobody waits for it any more"));
            }
            let before = owner.tags().await.map_err(io::Error::other)?;
            let given = give.send((turn, before));
            given.map_err(|_| io::Error::other("it has failed, or the engine has answered already"))?;
            Ok(bytes::Bytes::new())
        };
        let body = body.take_until(until).chain(futures_util::stream::once(end));
        let mut lines = client.import_image_stream(ImportImageOptions::default(), body, None);
        // What it said before it failed counts too.
        let mut loaded = Vec::new();
        let mut told: Result<(), LoadError> = {
            let answer = async {
                while let Some(line) = lines.try_next().await? {
                    source.progressed();
                    let lines = line.stream.as_deref().unwrap_or_default().lines();
                    loaded.extend(lines.filter_map(loaded_image));
                }
                Ok::<(), bollard::errors::Error>(())
            };
            let mut answer = std::pin::pin!(answer);
            let told = source.moving(&name, async { Ok((&mut answer).await) }).await;
            given.close();
            match told {
                Ok(told) => told.map_err(|error| docker.failed(&format!("load {reference}"), error).into()),
                // An engine that has all of it goes on, whoever listens.
                Err(stalled) if !given.is_empty() => {
                    tell(Err(stalled));
                    answer.await.map_err(|error| docker.failed(&format!("load {reference}"), error).into())
                }
                Err(stalled) => Err(stalled),
            }
        };
        drop(lines);
        let (turn, before, had_end) = match given.try_recv() {
            Ok((turn, before)) => (turn, before, true),
            // An engine may answer at the end of the tar, before that of what it is sent.
            Err(_) => (Arc::clone(&docker.naming).write_owned().await, at_first, false),
        };
        // An engine that failed at it need not have said all the names that it gave.
        let any = had_end && (told.is_err() || loaded.is_empty());
        if told.is_ok() {
            told = match loaded.as_slice() {
                [] => Err(LoadError::Archive { name, reason: "there is no image in it".to_owned() }),
                // One image may have several names.
                [first, ..] => docker.tag(first, &reference).await.map_err(LoadError::from),
            };
        }
        let may_be = |name: &str| name != reference && (any || loaded.iter().any(|loaded| loaded == name));
        let mut back = docker.put_back(&turn, &before, may_be).await;
        while let Err(error @ (HypervisorError::Unreachable(_) | HypervisorError::TimedOut(_))) = back {
            tell(Err(error.into()));
            tokio::time::sleep(TICK).await;
            back = docker.put_back(&turn, &before, may_be).await;
        }
        if let Err(error) = &back {
            warn!("a name in the archive of {reference} stays in the engine: {error}");
        }
        drop(turn);
        tell(told.and_then(|()| back.map_err(LoadError::from)));
    }
}

impl Docker {
    /// The images that the engine's names mean.
    async fn tags(&self) -> Result<Tags, HypervisorError> {
        let images = self.client().await?.list_images(None::<ListImagesOptions>).await;
        let images = images.map_err(|error| self.failed("list images", error))?;
        let tags = images.into_iter().flat_map(|image| {
            let id = image.id;
            image.repo_tags.into_iter().map(move |tag| (tag, id.clone()))
        });
        Ok(tags.collect())
    }

    /// Lets the names for which `may_be` is true mean what they did `before`, or nothing. What is refused for one holds up
    /// no other.
    async fn put_back(
        &self,
        _turn: &OwnedRwLockWriteGuard<()>,
        before: &Tags,
        may_be: impl Fn(&str) -> bool,
    ) -> Result<(), HypervisorError> {
        let mut result = Ok(());
        for (name, now) in self.tags().await? {
            if !may_be(&name) || before.get(&name) == Some(&now) {
                continue;
            }
            let mut done = match before.get(&name) {
                Some(id) => self.tag(id, &name).await,
                None => self.remove_image(&name).await,
            };
            // The image that it meant may have gone since.
            if matches!(done, Err(HypervisorError::Refused(_))) && before.contains_key(&name) {
                done = self.remove_image(&name).await;
            }
            match done {
                Err(HypervisorError::Refused(_)) | Ok(()) => result = result.and(done),
                away => return away,
            }
        }
        result
    }

    async fn tag(&self, image: &str, reference: &str) -> Result<(), HypervisorError> {
        let (repo, tag) = split(reference);
        let options = TagImageOptions { repo: Some(repo), tag: Some(tag) };
        let tagged = self.client().await?.tag_image(image, Some(options)).await;
        tagged.map_err(|error| self.failed(&format!("name {image} {reference}"), error))
    }
}

/// The image in a line such as `Loaded image: busybox:latest` or `Loaded image ID: sha256:…`.
fn loaded_image(line: &str) -> Option<String> {
    let (_, image) = line.strip_prefix("Loaded image")?.split_once(": ")?;
    Some(image.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_what_was_loaded_is_found_in_what_the_engine_says() {
        assert_eq!(loaded_image("Loaded image: a/b:1").as_deref(), Some("a/b:1"));
        assert_eq!(loaded_image("Loaded image ID: sha256:00").as_deref(), Some("sha256:00"));
        assert_eq!(loaded_image("something else: x"), None);
    }
}
