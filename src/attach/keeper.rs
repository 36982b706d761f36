//! The keeper of one device: attaches it, gives the kernel new sockets when the server was restarted, and ends with it.
//!
//! It keeps duplicates of the sockets that the kernel has, and looks at them for a hang-up without ever reading. When it
//! is killed, the device goes on; only nobody would reconnect it, so the next `attach` of the name takes it over. That
//! one cannot have the sockets. It holds a connection of its own ready and offers it to the kernel, and then the next, which
//! takes one as soon as one of its own is dead, whoever ended that.

mod connections;

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::ioctl::{self, Session};
use super::netlink::{Kernel, KernelError, Setup};
use super::opening::Opened;
use super::table::KeeperLock;
use super::{AttachError, Device, Entry, Options, Table, Way};

/// How often the connections and the device are looked at.
const LOOK: Duration = Duration::from_millis(200);
/// How often the kernel is offered a connection by a keeper that does not have its sockets.
const OFFER: Duration = Duration::from_secs(1);
/// How long a keeper may take to see that its device is gone.
const KEEPER_END: Duration = Duration::from_secs(10);
/// How long the next keeper of a name waits for the last one, which may be about to end.
const KEEPER_START: Duration = Duration::from_secs(1);
/// How long who has a device open, though what used it has ended, is waited for: udev looks at what was just closed.
const LAST_USER: Duration = Duration::from_secs(10);
/// How long a keeper may take to attach a device, or to give it up, before its name is left to it.
const FORGET: Duration = Duration::from_secs(60);
/// Logical block size: what the images' partition tables count in.
const BLOCK_SIZE: u32 = 512;

/// Attaches what `options` say, tells `ready` the entry, and keeps the device connected until it is detached (by whomever)
/// or `stop` is cancelled. On `stop` the device is detached if nothing uses it; one that was to be taken over from a dead
/// keeper, and that no server was there for yet, stays as it is.
///
/// # Errors
///
/// [`AttachError`]; nothing is attached then, except that a device which was in use when `stop` came stays.
pub async fn keep(
    table: &Table,
    options: &Options,
    stop: &CancellationToken,
    ready: impl FnOnce(&Entry),
) -> Result<(), AttachError> {
    let Some(lock) = become_keeper(table, &options.name).await? else {
        return Err(match table.get(&options.name)? {
            Some(entry) => AttachError::Attached { name: entry.name, device: entry.device },
            None => AttachError::Attaching(options.name.clone()),
        });
    };
    let keeper = Keeper { table, options, _lock: lock };
    let kernel = match options.way {
        Some(Way::Ioctl) => None,
        _ => match open_kernel().await {
            Ok(kernel) => Some(kernel),
            Err(KernelError::NoModule) if options.way.is_none() && !Device::all().is_empty() => None,
            Err(error) => return Err(error.into()),
        },
    };
    match kernel {
        Some(kernel) => keeper.by_netlink(kernel, stop, ready).await,
        // Such a device has gone with its keeper.
        None if options.again => Err(AttachError::NotAttached(options.name.clone())),
        None => keeper.by_ioctl(stop, ready).await,
    }
}

/// Takes the name's lock. Who merely looks whether a name has a keeper holds it for an instant, and a keeper whose device
/// has just been detached for a little longer: so more than one look.
async fn become_keeper(table: &Table, name: &str) -> Result<Option<KeeperLock>, AttachError> {
    let deadline = Instant::now() + KEEPER_START;
    loop {
        let lock = table.lock(name)?;
        if lock.is_some() || Instant::now() >= deadline {
            return Ok(lock);
        }
        sleep(LOOK / 10).await;
    }
}

/// Opens the kernel's client; loads its module first if it is there to be loaded.
async fn open_kernel() -> Result<Kernel, KernelError> {
    match Kernel::open().await {
        Err(KernelError::NoModule) => {
            // It fails where there is no module, or no modprobe; the second look tells what counts.
            let _ = tokio::process::Command::new("modprobe").args(["-q", "nbd"]).status().await;
            Kernel::open().await
        }
        opened => opened,
    }
}

/// Disconnects a device that nothing uses, after its last writes have reached the server, and waits until it is quiet.
///
/// # Errors
///
/// [`AttachError::Busy`] when something uses it; nothing has changed then.
pub async fn detach(table: &Table, entry: &Entry) -> Result<(), AttachError> {
    if entry.is_live() {
        disconnect(entry).await?;
    }
    // The keeper ends when it sees that the device is gone. A dead one has nothing to see.
    let end = tokio::time::timeout(KEEPER_END, async {
        while table.is_kept(&entry.name)? {
            sleep(LOOK / 4).await;
        }
        Ok::<_, AttachError>(())
    });
    end.await.unwrap_or(Ok(()))?;
    table.remove(entry)
}

/// Detaches what is attached under `name` in the store in `store`, if anything is, and removes what the table has of it:
/// what used it has ended. A keeper that is just attaching it is waited for.
///
/// # Errors
///
/// As [`detach`]; [`AttachError::Attaching`] when a keeper neither attaches it nor ends.
pub async fn forget(store: &Path, name: &str) -> Result<(), AttachError> {
    let (table, began) = (Table::of(store), Instant::now());
    while table.knows(name) {
        match table.get(name)? {
            Some(entry) => match detach(&table, &entry).await {
                Err(AttachError::Busy { .. }) if began.elapsed() < LAST_USER => {}
                detached => detached?,
            },
            None if table.clear(name)? => return Ok(()),
            None => {}
        }
        if began.elapsed() > FORGET {
            return Err(AttachError::Attaching(name.to_owned()));
        }
        sleep(LOOK / 4).await;
    }
    Ok(())
}

async fn disconnect(entry: &Entry) -> Result<(), AttachError> {
    let device = entry.device;
    let device_error = move |error: io::Error| AttachError::Device { device, error };
    let keeper = entry.keeper;
    let claim = tokio::task::spawn_blocking(move || {
        let file = device.claim(keeper)?;
        file.sync_all().map_err(device_error)?;
        Ok::<_, AttachError>(file)
    });
    let file = claim.await.map_err(|error| device_error(io::Error::other(error)))??;
    match entry.way {
        Way::Netlink => Kernel::open().await?.disconnect(device.0).await?,
        Way::Ioctl => ioctl::disconnect(&file).map_err(device_error)?,
    }
    drop(file); // The kernel keeps a device until it is closed.
    device.quiet().await
}

struct Keeper<'a> {
    table: &'a Table,
    options: &'a Options,
    _lock: KeeperLock,
}

impl Keeper<'_> {
    async fn by_netlink(
        &self,
        mut kernel: Kernel,
        stop: &CancellationToken,
        ready: impl FnOnce(&Entry),
    ) -> Result<(), AttachError> {
        let Some(old) = self.table.get(&self.options.name)?.filter(Entry::is_live) else {
            if self.options.again {
                return Err(AttachError::NotAttached(self.options.name.clone()));
            }
            return self.attach(kernel, stop, ready).await;
        };
        let Some(spare) = self.open_while(|| old.is_live(), stop).await? else {
            if old.is_live() {
                return Ok(());
            }
            self.table.remove(&old)?;
            return Err(AttachError::NotAttached(old.name));
        };
        let entry = Entry { keeper: std::process::id(), ..old };
        self.table.put(&entry)?;
        ready(&entry);
        self.look_after(&mut kernel, &entry, spare, stop).await?;
        self.table.remove(&entry)
    }

    /// Attaches it, and keeps the sockets that the kernel has.
    async fn attach(
        &self,
        mut kernel: Kernel,
        stop: &CancellationToken,
        ready: impl FnOnce(&Entry),
    ) -> Result<(), AttachError> {
        let (setup, mut sockets) = self.open_all().await?;
        let fds: Vec<_> = sockets.iter().map(AsFd::as_fd).collect();
        let device = Device(kernel.connect(&setup, &fds).await?);
        let entry = self.entry(device, Way::Netlink, &setup);
        if let Err(error) = self.write_down(&entry).await {
            // A device that is not in the table is nobody's: the next keeper would make a second one of the same disk.
            if let Err(error) = kernel.disconnect(device.0).await {
                warn!(%device, %error, "it stays connected");
            }
            self.table.remove(&entry)?;
            return Err(error);
        }
        ready(&entry);
        while entry.is_live() {
            if stop.is_cancelled() {
                disconnect(&entry).await?;
                break;
            }
            let dead = hung_up(&sockets);
            if dead.is_empty() {
                tokio::select! { () = sleep(LOOK) => {}, () = stop.cancelled() => {} }
            } else {
                info!(device = %entry.device, connections = dead.len(), "the server hung up; reconnecting");
                self.reconnect(&mut kernel, &entry, &setup, &mut sockets, &dead, stop).await?;
            }
        }
        self.table.remove(&entry)
    }

    /// Puts a device into the table as soon as the kernel has it, and waits until it is ready.
    async fn write_down(&self, entry: &Entry) -> Result<(), AttachError> {
        self.table.put(entry)?;
        entry.device.ready(entry.size).await
    }

    /// Keeps a device going whose sockets another process gave the kernel, with a connection that stands ready.
    async fn look_after(
        &self,
        kernel: &mut Kernel,
        entry: &Entry,
        spare: Opened,
        stop: &CancellationToken,
    ) -> Result<(), AttachError> {
        let mut offer_at = Instant::now();
        let mut spare = Some(spare);
        while entry.is_live() {
            if stop.is_cancelled() {
                return disconnect(entry).await;
            }
            let Some(held) = &spare else {
                spare = self.open_while(|| entry.is_live(), stop).await?;
                continue;
            };
            if !hung_up(std::slice::from_ref(&held.socket)).is_empty() {
                info!(device = %entry.device, "the server hung up; reconnecting");
                offer_at = Instant::now();
            } else if Instant::now() >= offer_at {
                self.offer(kernel, entry, held).await?;
                offer_at = Instant::now() + OFFER;
            } else {
                tokio::select! { () = sleep(LOOK) => {}, () = stop.cancelled() => {} }
                continue;
            }
            // Given back before the next is opened: the export may have no place for both.
            spare = None;
        }
        Ok(())
    }

    /// Offers the kernel a connection, which it takes if one of its own is dead. It does not say whether it has: one that
    /// was offered must not be offered again, since the kernel would read from it twice.
    async fn offer(&self, kernel: &mut Kernel, entry: &Entry, spare: &Opened) -> Result<(), AttachError> {
        self.same_size(entry, spare)?;
        let offered = kernel.reconfigure(entry.device.0, &self.setup(spare), &[spare.socket.as_fd()]).await;
        if let Err(error) = offered {
            warn!(device = %entry.device, %error, "the kernel did not take the new connection");
        }
        Ok(())
    }

    /// Gives the kernel a new socket for each that is dead, as soon as there is a server again.
    async fn reconnect(
        &self,
        kernel: &mut Kernel,
        entry: &Entry,
        setup: &Setup,
        sockets: &mut [UnixStream],
        dead: &[usize],
        stop: &CancellationToken,
    ) -> Result<(), AttachError> {
        for index in dead {
            let Some(opened) = self.open_while(|| entry.is_live(), stop).await? else { return Ok(()) };
            self.same_size(entry, &opened)?;
            // The kernel may not have noticed yet that the old one is dead: no room is a reason to try again.
            while entry.is_live() && !stop.is_cancelled() {
                match kernel.reconfigure(entry.device.0, setup, &[opened.socket.as_fd()]).await {
                    Err(KernelError::Io(error)) if is(&error, Errno::NOSPC) => sleep(LOOK).await,
                    Ok(()) => break,
                    Err(error) => {
                        warn!(device = %entry.device, %error, "the kernel did not take the new connection");
                        sleep(LOOK).await;
                    }
                }
            }
            sockets[*index] = opened.socket;
        }
        info!(device = %entry.device, "reconnected");
        Ok(())
    }

    async fn by_ioctl(
        &self,
        stop: &CancellationToken,
        ready: impl FnOnce(&Entry),
    ) -> Result<(), AttachError> {
        let (setup, sockets) = self.open_all().await?;
        let fds: Vec<_> = sockets.iter().map(AsFd::as_fd).collect();
        let session = Session::start(&setup, &fds)?;
        let device = session.device();
        let mut run = tokio::task::spawn_blocking(move || session.run());
        let device_error = |error: io::Error| AttachError::Device { device, error };
        tokio::select! {
            result = device.ready(setup.size) => result?,
            ended = &mut run => {
                ended.map_err(|error| device_error(io::Error::other(error)))?.map_err(device_error)?;
            }
        }
        let entry = self.entry(device, Way::Ioctl, &setup);
        self.table.put(&entry)?;
        ready(&entry);
        tokio::select! {
            _ = &mut run => {}
            () = stop.cancelled() => {
                while let Err(error) = disconnect(&entry).await {
                    warn!(%error, "staying, since the device would end with this process");
                    sleep(Duration::from_secs(5)).await;
                }
            }
        }
        self.table.remove(&entry)
    }

    /// The entry of a device that the kernel has just been given.
    fn entry(&self, device: Device, way: Way, setup: &Setup) -> Entry {
        Entry {
            name: self.options.name.clone(),
            device,
            way,
            size: setup.size,
            read_only: !setup.is_writable(),
            keeper: std::process::id(),
            holder: device.holder(way),
        }
    }
}

/// Which of the connections have been closed by the server. Reads nothing: the bytes are the kernel's.
fn hung_up(sockets: &[UnixStream]) -> Vec<usize> {
    let mut fds: Vec<_> = sockets.iter().map(|socket| PollFd::new(socket, PollFlags::RDHUP)).collect();
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    if poll(&mut fds, Some(&now)).is_err() {
        return Vec::new(); // Interrupted: the next look will tell.
    }
    let ended = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
    (0..fds.len()).filter(|index| fds[*index].revents().intersects(ended)).collect()
}

fn is(error: &io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno.raw_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_name_whose_keeper_is_about_to_end_gets_the_next_one() {
        let folder = tempfile::tempdir().unwrap();
        let table = Table::open(folder.path()).unwrap();
        let last = table.lock("vm").unwrap().unwrap();
        assert!(become_keeper(&table, "vm").await.unwrap().is_none());
        let end = async {
            sleep(KEEPER_START / 4).await;
            drop(last);
        };
        let (next, ()) = tokio::join!(become_keeper(&table, "vm"), end);
        assert!(next.unwrap().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_forgotten_leaves_no_file_and_waits_for_a_keeper_that_is_attaching() {
        let folder = tempfile::tempdir().unwrap();
        forget(folder.path(), "vm").await.unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "nothing was attached here");

        let table = Table::open(folder.path()).unwrap();
        let keeper = table.lock("vm").unwrap().unwrap();
        std::fs::write(table.log_path("vm"), "it says").unwrap();
        let mut entry = super::super::table::tests::entry("vm", u32::MAX);
        let attaching = async {
            sleep(FORGET / 4).await;
            table.put(&entry).unwrap();
            drop(keeper);
        };
        let (forgotten, ()) = tokio::join!(forget(folder.path(), "vm"), attaching);
        forgotten.unwrap();
        assert_eq!(std::fs::read_dir(folder.path().join("attached")).unwrap().count(), 0);

        // One that hangs keeps its name.
        entry.name = "other".to_owned();
        let _keeper = table.lock("other").unwrap().unwrap();
        let error = forget(folder.path(), "other").await.unwrap_err();
        assert!(matches!(error, AttachError::Attaching(name) if name == "other"));
    }

    #[test]
    fn a_hang_up_is_seen_without_reading() {
        use std::io::{Read, Write};
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        let (other, _open) = UnixStream::pair().unwrap();
        theirs.write_all(b"x").unwrap();
        let sockets = [other, ours.try_clone().unwrap()];
        assert!(hung_up(&sockets).is_empty());
        drop(theirs);
        assert_eq!(hung_up(&sockets), [1]);
        let mut byte = [0];
        ours.read_exact(&mut byte).unwrap();
        assert_eq!(byte, *b"x");
    }
}
