//! Images: who has what.

use std::net::SocketAddr;

use rusqlite::{OptionalExtension, Row, Transaction, params};

use super::{DatabaseError, Page, Result, number, parsed, unsigned};
use crate::digest::Digest;
use crate::image::manifest::ImageKind;
use crate::name::ImageName;
use crate::wire::cluster::{ImageHere, ImageRow};

/// A node that has an image, or a part of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Holder {
    pub(crate) host_id: i64,
    /// Where it serves peers.
    pub(crate) peer: SocketAddr,
    pub(crate) complete: bool,
    pub(crate) boot_complete: bool,
    /// Nothing of the image came to it over the network.
    pub(crate) origin: bool,
}

const HERE: &str =
    "img_name, root, img_type, img_size, host_img.bt_size, present, allocated, complete, boot_told,
    received, host_img.boot";

fn kind(word: &str) -> Result<ImageKind> {
    match word {
        "vm" => Ok(ImageKind::Vm),
        "container" => Ok(ImageKind::Container),
        other => Err(DatabaseError::Content(other.to_owned())),
    }
}

fn digest(word: Option<String>) -> Result<Option<Digest>> {
    word.map(|word| parsed(&word)).transpose()
}

fn here(row: &Row<'_>) -> Result<ImageHere> {
    Ok(ImageHere {
        name: parsed(&row.get::<_, String>(0)?)?,
        root: parsed(&row.get::<_, String>(1)?)?,
        kind: kind(&row.get::<_, String>(2)?)?,
        size: unsigned(row.get(3)?),
        boot_bytes: unsigned(row.get(4)?),
        present: unsigned(row.get(5)?),
        allocated: unsigned(row.get(6)?),
        complete: row.get(7)?,
        boot_complete: row.get(8)?,
        received: unsigned(row.get(9)?),
        boot: digest(row.get(10)?)?,
    })
}

/// The images of one node.
pub(super) fn of_host(tx: &Transaction<'_>, host_id: i64) -> Result<Vec<ImageHere>> {
    let sql =
        format!("SELECT {HERE} FROM host_img JOIN image USING (img_id) WHERE host_id = ?1 ORDER BY img_name");
    let mut statement = tx.prepare_cached(&sql)?;
    let mut rows = statement.query([host_id])?;
    let mut images = Vec::new();
    while let Some(row) = rows.next()? {
        images.push(here(row)?);
    }
    Ok(images)
}

/// What is known of an image's boot cache.
struct Known {
    boot_bytes: i64,
    boot: Option<String>,
    publisher: Option<i64>,
}

impl Known {
    /// Whether a host that has the boot cache `boot` says which one the cluster takes. Where there is no publisher, since the
    /// cluster was told to forget it or the image is older than publishers, a host becomes it that changes nothing, or that
    /// has a boot cache where only its length is known.
    fn is_published_by(&self, host_id: i64, boot: Option<&str>) -> bool {
        match (self.publisher, self.boot.as_deref()) {
            (Some(publisher), _) => publisher == host_id,
            (None, None) => boot.is_some() || self.boot_bytes == 0,
            (None, known) => known == boot,
        }
    }
}

/// Writes down which images a node has; gives the names by which it has another image than the cluster.
pub(crate) fn register(tx: &Transaction<'_>, host_id: i64, images: &[ImageHere]) -> Result<Vec<ImageName>> {
    if of_host(tx, host_id)? == images {
        return Ok(Vec::new());
    }
    tx.execute("DELETE FROM host_img WHERE host_id = ?1", [host_id])?;
    let mut strangers = Vec::new();
    for image in images {
        let root = image.root.to_string();
        let known: Option<(i64, String, Known)> = tx
            .query_row(
                "SELECT img_id, root, bt_size, boot, publisher FROM image WHERE img_name = ?1",
                [image.name.as_str()],
                |row| {
                    let known = Known { boot_bytes: row.get(2)?, boot: row.get(3)?, publisher: row.get(4)? };
                    Ok((row.get(0)?, row.get(1)?, known))
                },
            )
            .optional()?;
        // A node that took the image before it was recorded waits for no boot cache, and has none.
        let recorded_later =
            known.as_ref().is_some_and(|(.., known)| known.boot_bytes > 0) && image.boot_bytes == 0;
        let (name, size, boot_bytes) = (image.name.as_str(), number(image.size), number(image.boot_bytes));
        let boot = image.boot.map(|boot| boot.to_string());
        let img_id: i64 = match known {
            Some((_, other, ..)) if other != root => {
                strangers.push(image.name.clone());
                continue;
            }
            Some((id, _, known)) => {
                // A boot cache may be recorded later, or anew, where the image comes from.
                if known.is_published_by(host_id, boot.as_deref()) {
                    let sql = "UPDATE image SET bt_size = ?1, boot = ?2, publisher = ?3 WHERE img_id = ?4
                               AND (bt_size, boot, publisher) IS NOT (?1, ?2, ?3)";
                    if tx.execute(sql, params![boot_bytes, boot, host_id, id])? > 0 {
                        let sql = "UPDATE host_img SET boot_complete = 0
                                   WHERE img_id = ?1 AND NOT complete AND boot IS NOT ?2";
                        tx.execute(sql, params![id, boot])?;
                    }
                }
                id
            }
            None => tx.query_row(
                "INSERT INTO image (img_type, img_name, img_size, bt_size, root, boot, publisher)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7) RETURNING img_id",
                params![image.kind.to_string(), name, size, boot_bytes, root, boot, host_id],
                |row| row.get(0),
            )?,
        };
        tx.execute(
            "INSERT OR REPLACE INTO host_img (host_id, img_id, present, allocated, received, complete, boot_complete,
                 boot_told, bt_size, boot) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
            params![
                host_id,
                img_id,
                number(image.present),
                number(image.allocated),
                number(image.received),
                image.complete,
                image.complete || (image.boot_complete && !recorded_later),
                image.boot_complete,
                boot_bytes,
                boot,
            ],
        )?;
    }
    // An image that nobody has any more may be added anew, as another one. Offline nodes still have theirs.
    tx.execute("DELETE FROM image WHERE img_id NOT IN (SELECT img_id FROM host_img)", [])?;
    Ok(strangers)
}

/// An image of the cluster: what is the same for all nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Image {
    pub(crate) root: Digest,
    /// Digest of its boot cache's heads, if it has one.
    pub(crate) boot: Option<Digest>,
    pub(crate) kind: ImageKind,
    /// Bytes that a guest sees.
    pub(crate) size: u64,
}

/// An image by name.
pub(crate) fn find(tx: &Transaction<'_>, name: &ImageName) -> Result<Option<Image>> {
    let found: Option<(String, Option<String>, String, i64)> = tx
        .query_row(
            "SELECT root, boot, img_type, img_size FROM image WHERE img_name = ?1",
            [name.as_str()],
            |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)),
        )
        .optional()?;
    let image = |(root, boot, word, size): (String, _, String, _)| -> Result<Image> {
        Ok(Image { root: parsed(&root)?, boot: digest(boot)?, kind: kind(&word)?, size: unsigned(size) })
    };
    found.map(image).transpose()
}

/// The nodes that are online, serve peers and have some of the image.
pub(crate) fn holders(tx: &Transaction<'_>, name: &ImageName) -> Result<Vec<Holder>> {
    let mut statement = tx.prepare_cached(
        "SELECT host_id, peer, complete, boot_complete, received = 0
         FROM host_img JOIN image USING (img_id) JOIN host USING (host_id)
         WHERE img_name = ?1 AND status = 'online' AND peer IS NOT NULL ORDER BY host_id",
    )?;
    let mut rows = statement.query([name.as_str()])?;
    let mut holders = Vec::new();
    while let Some(row) = rows.next()? {
        holders.push(Holder {
            host_id: row.get(0)?,
            peer: parsed(&row.get::<_, String>(1)?)?,
            complete: row.get(2)?,
            boot_complete: row.get(3)?,
            origin: row.get(4)?,
        });
    }
    Ok(holders)
}

/// Why a node that has not all of an image gets it from nobody; nothing if it has.
pub(crate) fn nowhere(tx: &Transaction<'_>, name: &ImageName, host_id: i64) -> Result<Option<String>> {
    let mut statement = tx.prepare_cached(
        "SELECT host_id, name, status = 'online' FROM host_img JOIN image USING (img_id) JOIN host USING (host_id)
         WHERE img_name = ?1 AND complete ORDER BY name",
    )?;
    let rows = statement
        .query_map([name.as_str()], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?
        .collect::<rusqlite::Result<Vec<(i64, String, bool)>>>()?;
    if rows.iter().any(|(id, ..)| *id == host_id) {
        return Ok(None);
    }
    let silent = rows.iter().find(|(_, _, online)| *online);
    Ok(Some(match (silent, rows.first()) {
        (Some((_, node, _)), _) => format!(
            "node '{node}' has image '{name}' and gives it to no other: start its agent with --peer-listen ADDR:PORT"
        ),
        (None, Some((_, node, _))) => format!("image '{name}' is on node '{node}', which is offline"),
        (None, None) => format!("no node has all of image '{name}'"),
    }))
}

/// The images, as users see them, from behind `after` on.
pub(crate) fn rows(tx: &Transaction<'_>, after: Option<&ImageName>, mut page: Page) -> Result<Vec<ImageRow>> {
    let mut statement = tx.prepare_cached(
        "SELECT img_name, root, img_type, img_size, bt_size, img_id FROM image
         WHERE ?1 IS NULL OR img_name > ?1 ORDER BY img_name",
    )?;
    let mut rows = statement.query([after.map(ImageName::as_str)])?;
    let mut images = Vec::new();
    while let Some(row) = rows.next()? {
        let img_id: i64 = row.get(5)?;
        let row = ImageRow {
            name: parsed(&row.get::<_, String>(0)?)?,
            root: parsed(&row.get::<_, String>(1)?)?,
            kind: kind(&row.get::<_, String>(2)?)?,
            size: unsigned(row.get(3)?),
            boot_bytes: unsigned(row.get(4)?),
            complete: holder_names(tx, img_id, true)?,
            partial: holder_names(tx, img_id, false)?,
        };
        if !page.takes(&row)? {
            break;
        }
        images.push(row);
    }
    Ok(images)
}

fn holder_names(tx: &Transaction<'_>, img_id: i64, complete: bool) -> Result<Vec<crate::name::HostName>> {
    let mut statement = tx.prepare_cached(
        "SELECT name FROM host_img JOIN host USING (host_id) WHERE img_id = ?1 AND complete = ?2 ORDER BY name",
    )?;
    let names = statement.query_map(params![img_id, complete], |row| row.get::<_, String>(0))?;
    names.map(|name| parsed(&name?)).collect()
}

/// What nodes that are online lack of the boot caches of all images, node and image: those that have nothing of the
/// image, and those that have a part of it without its boot cache.
pub(crate) fn without_boot_cache(tx: &Transaction<'_>) -> Result<Vec<(i64, ImageName)>> {
    let mut statement = tx.prepare_cached(
        "SELECT host.host_id, img_name FROM host, image
         WHERE status = 'online' AND image.bt_size > 0 AND NOT EXISTS (
             SELECT 1 FROM host_img
             WHERE host_img.host_id = host.host_id AND host_img.img_id = image.img_id AND (complete OR boot_complete)
         ) ORDER BY host.host_id, img_name",
    )?;
    let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get::<_, String>(1)?)))?;
    rows.map(|row| {
        let (host_id, name) = row?;
        Ok((host_id, parsed(&name)?))
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::database::{Database, hosts};
    use crate::wire::cluster::RegisterCompute;

    fn node(tx: &Transaction<'_>, name: &str) -> i64 {
        let node = RegisterCompute {
            node: name.parse().unwrap(),
            ip: None,
            port: 1,
            kinds: Vec::new(),
            cpus: 1,
            memory_bytes: 1,
            addresses: Vec::new(),
        };
        let address = SocketAddr::from(([127, 0, 0, 1], 1));
        let host_id = hosts::register(tx, &node, address, 0).unwrap();
        hosts::set_peer(tx, host_id, Some(address)).unwrap();
        host_id
    }

    fn image(boot_bytes: u64, complete: bool, boot_complete: bool) -> ImageHere {
        ImageHere {
            name: "debian".parse().unwrap(),
            root: Digest::of(b"debian"),
            kind: ImageKind::Vm,
            size: 1 << 20,
            boot_bytes,
            boot: (boot_bytes > 0).then(|| Digest::of(&boot_bytes.to_le_bytes())),
            present: 1,
            allocated: 9,
            complete,
            boot_complete,
            received: 1,
        }
    }

    #[tokio::test]
    async fn a_boot_cache_is_lacked_by_whoever_has_not_all_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let database = Database::open(&dir.path().join("db")).unwrap();
        let work = |tx: &Transaction<'_>| -> Result<()> {
            let [origin, other] = ["n1", "n2"].map(|name| node(tx, name));
            // It gets images all the same.
            hosts::set_peer(tx, other, None).unwrap();
            let has = |host_id, image: ImageHere| register(tx, host_id, &[image]).unwrap();
            let lack = || -> Vec<i64> {
                without_boot_cache(tx).unwrap().into_iter().map(|(host_id, _)| host_id).collect()
            };
            // Nothing was recorded yet.
            has(origin, image(0, true, true));
            has(other, image(0, false, true));
            assert!(lack().is_empty());
            // It is recorded: the other one began without a boot cache, and says that it waits for none.
            has(origin, image(7, true, true));
            assert_eq!(lack(), [other]);
            has(other, image(0, false, true));
            assert_eq!(lack(), [other]);
            // It has begun to fetch the boot cache, has it, has lost it all, and has everything.
            has(other, image(7, false, false));
            assert_eq!(lack(), [other]);
            has(other, image(7, false, true));
            assert!(lack().is_empty());
            register(tx, other, &[]).unwrap();
            assert_eq!(lack(), [other]);
            has(other, image(0, true, true));
            assert!(lack().is_empty());
            Ok(())
        };
        database.run(work).await.unwrap();
    }

    #[tokio::test]
    async fn the_boot_cache_of_an_image_is_what_its_publisher_says() {
        let dir = tempfile::tempdir().unwrap();
        let database = Database::open(&dir.path().join("db")).unwrap();
        let work = |tx: &Transaction<'_>| -> Result<()> {
            let [origin, other] = ["n1", "n2"].map(|name| node(tx, name));
            let boot = |boot_bytes| image(boot_bytes, true, true).boot;
            let cluster = || find(tx, &"debian".parse().unwrap()).unwrap().unwrap().boot;
            register(tx, origin, &[image(0, true, true)])?;
            assert_eq!(cluster(), None);
            // Another node has one, of its own making or invented: nodes take none from it.
            register(tx, other, &[image(9, true, true)])?;
            assert_eq!(cluster(), None);
            assert_eq!(of_host(tx, other)?, [image(9, true, true)], "what is told again is nothing new");
            register(tx, origin, &[image(7, true, true)])?;
            assert_eq!(cluster(), boot(7));
            // Recorded anew.
            register(tx, origin, &[image(5, true, true)])?;
            assert_eq!(cluster(), boot(5));
            Ok(())
        };
        database.run(work).await.unwrap();
    }

    #[tokio::test]
    async fn nobody_brings_another_boot_cache_when_the_publisher_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let database = Database::open(&dir.path().join("db")).unwrap();
        let work = |tx: &Transaction<'_>| -> Result<()> {
            let [origin, liar, heir] = ["n1", "n2", "n3"].map(|name| node(tx, name));
            let boot = |boot_bytes| image(boot_bytes, true, true).boot;
            let cluster = || find(tx, &"debian".parse().unwrap()).unwrap().unwrap().boot;
            let publisher = || -> Option<i64> {
                tx.query_row("SELECT publisher FROM image", [], |row| row.get(0)).unwrap()
            };
            register(tx, origin, &[image(7, true, true)])?;
            register(tx, heir, &[image(7, false, true)])?;
            tx.execute("DELETE FROM host WHERE host_id = ?1", [origin])?;
            assert_eq!(publisher(), None);
            for invented in [9, 0] {
                register(tx, liar, &[image(invented, true, true)])?;
                assert_eq!((cluster(), publisher()), (boot(7), None));
            }
            // Whoever has the same takes its place, and may record it anew.
            register(tx, heir, &[image(7, true, true)])?;
            assert_eq!((cluster(), publisher()), (boot(7), Some(heir)));
            register(tx, liar, &[image(9, true, true)])?;
            assert_eq!(cluster(), boot(7));
            register(tx, heir, &[image(5, true, true)])?;
            assert_eq!(cluster(), boot(5));
            Ok(())
        };
        database.run(work).await.unwrap();
    }

    #[tokio::test]
    async fn who_has_the_same_boot_cache_publishes_from_the_moment_the_publisher_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let database = Database::open(&dir.path().join("db")).unwrap();
        let work = |tx: &Transaction<'_>| -> Result<()> {
            let [origin, other, heir] = ["n1", "n2", "n3"].map(|name| node(tx, name));
            register(tx, origin, &[image(7, true, true)])?;
            register(tx, other, &[image(9, true, true)])?;
            register(tx, heir, &[image(7, true, true)])?;
            tx.execute("UPDATE host SET status = 'offline' WHERE host_id = ?1", [origin])?;
            assert!(matches!(hosts::forget(tx, &"n1".parse().unwrap(), 1)?, hosts::Forgotten::Gone));
            let publisher =
                tx.query_row("SELECT publisher FROM image", [], |row| row.get::<_, Option<i64>>(0))?;
            assert_eq!(publisher, Some(heir));
            // Nothing is new of it but a recording.
            register(tx, heir, &[image(5, true, true)])?;
            register(tx, other, &[image(8, true, true)])?;
            let boot = find(tx, &"debian".parse().unwrap())?.unwrap().boot;
            assert_eq!(boot, image(5, true, true).boot);
            Ok(())
        };
        database.run(work).await.unwrap();
    }

    #[tokio::test]
    async fn an_image_of_a_release_without_publishers_gets_its_boot_cache_from_who_has_one() {
        let dir = tempfile::tempdir().unwrap();
        let database = Database::open(&dir.path().join("db")).unwrap();
        let work = |tx: &Transaction<'_>| -> Result<()> {
            let [origin, late, liar] = ["n1", "n2", "n3"].map(|name| node(tx, name));
            let cluster = || find(tx, &"debian".parse().unwrap()).unwrap().unwrap().boot;
            register(tx, origin, &[image(7, true, true)])?;
            // As the second version of the schema finds it.
            tx.execute("UPDATE image SET boot = NULL, publisher = NULL", [])?;
            tx.execute("UPDATE host_img SET boot = NULL, bt_size = 0", [])?;
            // It took the image before it was recorded: that is not how the image is.
            register(tx, late, &[image(0, false, true)])?;
            register(tx, origin, &[image(7, true, true)])?;
            assert_eq!(cluster(), image(7, true, true).boot);
            register(tx, liar, &[image(9, true, true)])?;
            assert_eq!(cluster(), image(7, true, true).boot);
            Ok(())
        };
        database.run(work).await.unwrap();
    }
}
