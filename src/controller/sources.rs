//! From whom a node fetches an image: the nodes that have it or are getting it, the best first.
//!
//! The chooser decides, over what nodes reported. A node corrects that by what it sees itself, once it transfers.

use std::net::SocketAddr;

use super::database::{self, Holder};
use super::{DatabaseError, Shared};
use crate::choose::{Candidate, Chooser, Draw, Has, Item, Load, Need, PeerKey, eligible};
use crate::name::ImageName;
use crate::wire::cluster::Needed;

/// Most sources that a node is told. It learns of more from those.
const SOURCES_MAX: usize = 8;

/// The sources of `image` for the node `host_id`: none if it needs none. Or, for people, why it lacks the image and
/// nobody gives it.
pub(super) async fn of(
    shared: &Shared,
    image: &ImageName,
    host_id: i64,
) -> Result<Result<Vec<SocketAddr>, String>, DatabaseError> {
    let name = image.clone();
    let (holders, loads, nowhere) = shared
        .database
        .run::<_, DatabaseError, _>(move |tx| {
            let found = (database::holders(tx, &name)?, database::loads(tx)?);
            Ok((found.0, found.1, database::nowhere(tx, &name, host_id)?))
        })
        .await?;
    let candidates: Vec<_> = holders
        .iter()
        .filter(|holder| holder.host_id != host_id)
        .map(|holder| {
            let items = loads.get(&holder.host_id).cloned().unwrap_or_default();
            candidate(holder, Load::new(items.into_iter().map(|(item, value)| (Item(item), value))))
        })
        .collect();
    let sources = shared.draw(|draw| ranked(&candidates, shared.options.chooser.as_ref(), draw));
    Ok(match nowhere {
        Some(reason) if sources.is_empty() => Err(reason),
        _ => Ok(sources),
    })
}

/// `image` with its sources for the node `host_id`; none if there is no such image. Or why nobody gives it, as [`of`].
pub(super) async fn needed(
    shared: &Shared,
    image: &ImageName,
    host_id: i64,
) -> Result<Option<Result<Needed, String>>, DatabaseError> {
    let name = image.clone();
    let Some(found) = shared.database.run(move |tx| database::find_image(tx, &name)).await? else {
        return Ok(None);
    };
    let sources = of(shared, image, host_id).await?;
    Ok(Some(sources.map(|sources| needs(image, &found, sources))))
}

/// `image`, which was `found`, from `sources`.
pub(super) fn needs(image: &ImageName, found: &database::Image, sources: Vec<SocketAddr>) -> Needed {
    Needed { name: image.clone(), root: found.root, boot: found.boot, size: found.size, sources }
}

/// A source, and where it is.
type Source = (SocketAddr, Candidate);

fn candidate(holder: &Holder, load: Load) -> Source {
    let has = if holder.complete { Has::Complete } else { Has::Answer(true) };
    let peer = PeerKey::of(&holder.peer.to_string());
    (holder.peer, Candidate { load, ..Candidate::new(peer, has, holder.origin) })
}

/// The addresses in the order in which `chooser` picks them.
fn ranked(sources: &[Source], chooser: &dyn Chooser, draw: &mut Draw) -> Vec<SocketAddr> {
    let need = Need::Frame(0);
    let mut left: Vec<&Source> = sources.iter().collect();
    let mut addresses = Vec::new();
    while addresses.len() < SOURCES_MAX && !left.is_empty() {
        let offered = eligible(need, left.iter().map(|(_, candidate)| candidate), 0, chooser);
        let Some(index) = chooser.choose(need, &offered, draw) else { break };
        let chosen = offered[index].peer;
        addresses.extend(left.iter().filter(|(_, c)| c.peer == chosen).map(|(address, _)| *address));
        left.retain(|(_, candidate)| candidate.peer != chosen);
    }
    addresses
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::choose::{Weights, by_name};

    fn holder(port: u16, complete: bool, origin: bool, load: f32) -> Source {
        let peer = SocketAddr::from(([10, 0, 0, 1], port));
        let holder = Holder { host_id: i64::from(port), peer, complete, boot_complete: complete, origin };
        candidate(&holder, Load::new((0..4).map(|item| (Item(item), load))))
    }

    #[test]
    fn a_loaded_node_and_the_origin_come_last() {
        let sources = [holder(1, true, true, 0.0), holder(2, true, false, 0.9), holder(3, false, false, 0.1)];
        let chooser = by_name("least-load", &Weights::default()).unwrap();
        for seed in 0..20 {
            let ports: Vec<_> = ranked(&sources, chooser.as_ref(), &mut Draw::new(seed))
                .iter()
                .map(SocketAddr::port)
                .collect();
            assert_eq!(ports, [3, 2, 1]);
        }
    }

    #[test]
    fn every_chooser_ranks_all_sources_once() {
        let sources: Vec<_> = (1..=20).map(|port| holder(port, true, port == 1, 0.5)).collect();
        for name in crate::choose::policy::NAMES {
            let chooser = by_name(name, &Weights::default()).unwrap();
            let mut found = ranked(&sources, chooser.as_ref(), &mut Draw::new(7));
            assert!((1..=SOURCES_MAX).contains(&found.len()), "{name}: {found:?}");
            found.sort_unstable();
            found.dedup();
            assert!(found.len() <= SOURCES_MAX, "{name}");
        }
    }
}
