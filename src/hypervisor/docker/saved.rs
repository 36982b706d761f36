//! An archive that `docker save` or an OCI tool wrote, which brings names of its own into the engine.
//!
//! Once the engine has all of an archive it gives its images the names in it. From then on until those names mean what
//! they did before, no other archive comes to its end here, or the one would be taken for the other; and that work is
//! done to its end by whatever it was ordered.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use bollard::query_parameters::{ImportImageOptions, ListImagesOptions, TagImageOptions};
use futures_util::{Stream, StreamExt, TryStreamExt};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::Docker;
use super::images::{LoadError, Source, split};
use crate::hypervisor::HypervisorError;
use crate::name::ImageName;

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
        let work = async move { self.load_whole(&docker, &client, given_up).await };
        tokio::spawn(work)
            .await
            .unwrap_or_else(|error| Err(HypervisorError::Refused(error.to_string()).into()))
    }

    async fn load_whole(
        self,
        docker: &Docker,
        client: &bollard::Docker,
        given_up: CancellationToken,
    ) -> Result<(), LoadError> {
        let Self { name, reference, body, source } = self;
        let at_first = docker.tags().await?;
        let (give, mut given) = oneshot::channel();
        let (owner, naming) = (docker.clone(), Arc::clone(&docker.naming));
        let until = given_up.clone().cancelled_owned();
        // The engine is given the end of the archive when it is this one's turn.
        let end = async move {
            let turn = naming.lock_owned().await;
            if given_up.is_cancelled() {
                return Err(io::Error::other("nobody waits for it any more"));
            }
            let before = owner.tags().await.map_err(io::Error::other)?;
            // Nobody takes it when the engine has answered already.
            let _ = give.send((turn, before));
            Ok(bytes::Bytes::new())
        };
        let body = body.take_until(until).chain(futures_util::stream::once(end));
        let told = client.import_image_stream(ImportImageOptions::default(), body, None);
        let told = async {
            let told: Result<Vec<_>, _> = told.try_collect().await;
            told.map_err(|error| LoadError::from(docker.failed(&format!("load {reference}"), error)))
        };
        let told = source.moving(&name, told).await?;
        // An engine may answer at the end of the tar, before that of what it is sent.
        given.close();
        let (_turn, before) = match given.try_recv() {
            Ok(given) => given,
            Err(_) => (Arc::clone(&docker.naming).lock_owned().await, at_first),
        };
        let lines = told.iter().filter_map(|line| line.stream.as_deref());
        let loaded: Vec<String> = lines.flat_map(str::lines).filter_map(loaded_image).collect();
        let result = match loaded.as_slice() {
            [] => Err(LoadError::Archive { name, reason: "there is no image in it".to_owned() }),
            // One image may have several names.
            [first, ..] => docker.tag(first, &reference).await.map_err(LoadError::from),
        };
        for other in loaded.iter().filter(|other| !other.starts_with("sha256:")) {
            match before.get(other) {
                Some(id) => docker.tag(id, other).await?,
                None => docker.remove_image(other).await?,
            }
        }
        result
    }
}

impl Docker {
    /// The images that the engine's names mean.
    async fn tags(&self) -> Result<HashMap<String, String>, HypervisorError> {
        let images = self.client().await?.list_images(None::<ListImagesOptions>).await;
        let images = images.map_err(|error| self.failed("list images", error))?;
        let tags = images.into_iter().flat_map(|image| {
            let id = image.id;
            image.repo_tags.into_iter().map(move |tag| (tag, id.clone()))
        });
        Ok(tags.collect())
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
