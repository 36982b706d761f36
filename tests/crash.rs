//! `kill -9` of the data plane under a guest that writes, and power losses of its machine: what was synced is there, the
//! image below is as it was.
//!
//! A round of kills: the guest writes numbered files on a file system of its own, syncs each and says so on its serial line. The
//! server is killed at a random moment and started again; the guest must go on as if nothing had been. Then server and
//! guest are killed together, and the next round's guest must find every file that was ever said to be synced.
//! A round of power losses: the same guest on an overlay whose storage loses what was not synced, at a random moment.
//! `BOOTCACHE_ROUNDS` sets the rounds (10; `make soak`: 200), `BOOTCACHE_SEED` the random moments.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;
#[path = "crash/volatile.rs"]
mod volatile;

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bootcache::digest::Digest;
use bootcache::image_disk::ImageDisk;
use bootcache::overlay::{self, Overlay};
use bootcache_nbd::server::{Export, Server, Tls};
use bootcache_nbd::{Limits, SharedDisk};
use support::guest::{self, Tiny};
use support::process::Process;
use support::store::Store;

/// For a guest's next step, on processors that others use.
const DEADLINE: Duration = Duration::from_secs(240);

/// Checks all files against their sums, then writes more until the end of days. 64 KiB of noise each, four at a time
/// beside a file that is written over and over, so that there is more in flight than what is synced.
const WORK: &str = r#"
if ! mount -t ext4 /dev/vda2 /mnt 2>/dev/null; then
	[ "$FIRST" = 1 ] || { echo WORK-FAILED no file system; exit 1; }
	mkfs.ext4 -q -F /dev/vda2 && mount -t ext4 /dev/vda2 /mnt || { echo WORK-FAILED mkfs; exit 1; }
fi
cd /mnt
for sums in *.sum; do
	[ -e $sums ] || continue
	sha256sum -c -s $sums && continue
	[ ${sums%.sum} -le $SYNCED ] && echo WORK-FAILED $sums is damaged
	rm -f ${sums%.sum}.* 
done
n=$SYNCED; have=0
while [ $have -lt $n ]; do have=$((have + 1)); [ -e $((have)).sum ] || [ $have -le $OLDEST ] || echo WORK-FAILED $have is lost; done
echo WORK-VERIFIED $SYNCED
while :; do
	n=$((n + 1))
	dd if=/dev/urandom of=$n.data bs=65536 count=1 2>/dev/null
	sha256sum $n.data >$n.sum
	dd if=/dev/urandom of=scratch bs=4096 count=16 seek=$((n % 64)) conv=notrunc 2>/dev/null
	sync
	echo WORK-SYNCED $n
	[ $n -le 500 ] || rm -f $((n - 500)).data $((n - 500)).sum
done
"#;

/// Bytes that decide moments and losses; the same for the same `BOOTCACHE_SEED`.
fn random_bytes() -> impl FnMut() -> u8 {
    let seed = std::env::var("BOOTCACHE_SEED")
        .map_or_else(|_| u64::from(std::process::id()), |text| text.parse().unwrap());
    println!("BOOTCACHE_SEED={seed}");
    let (mut block, mut bytes) = (seed << 20, Vec::new().into_iter());
    move || {
        bytes.next().unwrap_or_else(|| {
            block += 1;
            bytes = support::noise(block, 4096).into_iter();
            bytes.next().unwrap()
        })
    }
}

/// Sleeps for a part of so many ms.
fn pause(part: u8, most_ms: u64) {
    std::thread::sleep(Duration::from_millis(u64::from(part) * most_ms / 255));
}

/// A guest that checks what was `synced` by the guests before it, and goes on.
fn working_guest(drive: &str, script: &Path, round: u32, synced: u32) -> Process {
    let (first, oldest) = (u8::from(round == 0), synced.max(500) - 500);
    std::fs::write(script, format!("FIRST={first}; SYNCED={synced}; OLDEST={oldest}; {WORK}")).unwrap();
    let told = format!("name=opt/bootcache/run,file={}", script.display());
    let guest = Tiny::new(drive).arguments(["-fw_cfg".to_owned(), told]).start();
    guest::wait_for_boot(&guest);
    guest.wait_for("WORK-VERIFIED", DEADLINE);
    guest.wait_for(&format!("WORK-SYNCED {}", synced + 1), DEADLINE);
    guest
}

/// Panics if the guest has complained.
fn is_well(said: &str, round: u32) {
    for bad in ["WORK-FAILED", "I/O error", "EXT4-fs error", "Aborting journal", "PAYLOAD-DAMAGED"] {
        assert!(!said.contains(bad), "round {round}: {bad}\n{said}");
    }
}

/// The number of the last file that the guest said is synced. It may have been ended within a number.
fn last_synced(guest: &Process) -> Option<u32> {
    let said = guest.said();
    said.lines().filter_map(|line| line.trim().strip_prefix("WORK-SYNCED ")?.parse().ok()).max()
}

#[test]
fn a_guest_finds_what_it_synced_after_any_kill_of_the_server() {
    if !support::require(&["qemu-system-x86_64"]) || !support::require_root() {
        return;
    }
    let mut random = random_bytes();
    let store = Store::new();
    store.run(["image", "add", "tiny", guest::disk("tiny").to_str().unwrap()]);
    let mut serve = store.serve([""; 0]);
    store.run(["overlay", "create", "tiny", "vm"]);
    let drive = guest::patient_nbd_drive(&store.path().join("nbd.sock"), "vm");
    let mut synced = 0;
    for round in 0..support::rounds(10) {
        let mut guest = working_guest(&drive, &store.beside("work.sh"), round, synced);
        pause(random(), 700);
        serve.kill();
        pause(random(), 300);
        serve = store.serve([""; 0]);
        let before = last_synced(&guest).expect("it has synced one");
        guest.wait_for(&format!("WORK-SYNCED {}", before + 2), Duration::from_secs(90));

        pause(random(), 700);
        serve.kill();
        guest.kill();
        std::thread::sleep(Duration::from_millis(50)); // the last lines
        is_well(&guest.said(), round);
        let now = last_synced(&guest).expect("it has synced one");
        assert!(now > synced, "the guest made progress");
        synced = now;
        println!("kills, round {round}: {synced} files synced");
        serve = store.serve([""; 0]);
    }
    assert!(serve.terminate(Duration::from_secs(10)).success());
    store.run(["image", "verify", "tiny"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_finds_what_it_synced_after_any_power_loss() {
    if !support::require(&["qemu-system-x86_64"]) || !support::require_root() {
        return;
    }
    let mut random = random_bytes();
    let folder = tempfile::tempdir().unwrap();
    let (socket, script) = (folder.path().join("nbd.sock"), folder.path().join("work.sh"));
    let disk = guest::disk("tiny");
    let before = Digest::of(&std::fs::read(&disk).unwrap());
    let base: SharedDisk = Arc::new(ImageDisk::open(&disk).unwrap());
    let files = folder.path().join("overlay");
    Overlay::create(&files, before, base.size()).unwrap();
    let log = std::fs::read(files.join(overlay::INDEX_FILE)).unwrap();
    let diff = File::options().read(true).write(true).open(files.join(overlay::DIFF_FILE)).unwrap();
    let mut machine = volatile::Machine::new(log, diff);
    let (mut synced, mut lost_in_all) = (0, 0);
    for round in 0..support::rounds(10) {
        let overlay = Overlay::from_files(machine.clone(), machine.clone(), base.clone()).unwrap();
        let server = Server::new(Arc::new(Export::new("vm", Arc::new(overlay))), Limits::default(), Tls::Off);
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let cancel = tokio_util::sync::CancellationToken::new();
        let serving = tokio::spawn({
            let cancel = cancel.clone();
            async move { server.serve_unix(listener, cancel).await }
        });

        let drive = guest::nbd_drive(&socket, "vm");
        let mut guest = tokio::task::block_in_place(|| working_guest(&drive, &script, round, synced));
        tokio::time::sleep(Duration::from_millis(u64::from(random()) * 1500 / 255)).await;
        let said = guest.said();
        // All of it, none of it, or some.
        let kept = [0, 128, 128, 255][usize::from(random() % 4)];
        let (next, lost) = machine.power_loss(kept, &mut random);
        guest.kill();
        cancel.cancel();
        serving.await.unwrap();
        std::fs::remove_file(&socket).unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await; // the last lines
        is_well(&said, round);
        let now = last_synced(&guest).expect("it has synced one");
        assert!(now > synced, "the guest made progress");
        (machine, synced, lost_in_all) = (next, now, lost_in_all + lost);
        println!("power losses, round {round}: {synced} files synced, {lost} blocks lost");
    }
    assert!(lost_in_all > 0, "something was lost");
    assert_eq!(Digest::of(&std::fs::read(&disk).unwrap()), before, "the image is as it was");
}
