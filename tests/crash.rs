//! `kill -9` of the data plane under a guest that writes: what was synced is there, the image below is as it was.
//!
//! A round: the guest writes numbered files on a file system of its own, syncs each and says so on its serial line. The
//! server is killed at a random moment and started again; the guest must go on as if nothing had been. Then server and
//! guest are killed together, and the next round's guest must find every file that was ever said to be synced.
//! `BOOTCACHE_ROUNDS` sets the rounds (10; `make soak`: 200), `BOOTCACHE_SEED` the random moments.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::time::Duration;

use support::guest::{self, Tiny};
use support::process::Process;
use support::store::Store;

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

fn rounds() -> u32 {
    std::env::var("BOOTCACHE_ROUNDS").map_or(10, |text| text.parse().expect("BOOTCACHE_ROUNDS is a number"))
}

/// The number of the last file that the guest said is synced.
fn last_synced(guest: &Process) -> Option<u32> {
    guest.said().lines().rev().find_map(|line| line.trim().strip_prefix("WORK-SYNCED ")?.parse().ok())
}

#[test]
fn a_guest_finds_what_it_synced_after_any_kill_of_the_server() {
    if !support::require(&["qemu-system-x86_64"]) || !support::require_root() {
        return;
    }
    let seed = std::env::var("BOOTCACHE_SEED")
        .map_or_else(|_| u64::from(std::process::id()), |text| text.parse().unwrap());
    println!("BOOTCACHE_SEED={seed}");
    let mut moments = support::noise(seed, 16 * rounds() as usize).into_iter();
    let mut pause = |most: u64| {
        let part = u64::from(moments.next().unwrap()) * most / 255;
        std::thread::sleep(Duration::from_millis(part));
    };

    let store = Store::new();
    store.run(["image", "add", "tiny", guest::disk("tiny").to_str().unwrap()]);
    let mut serve = store.serve([""; 0]);
    store.run(["overlay", "create", "tiny", "vm"]);
    let drive = guest::patient_nbd_drive(&store.path().join("nbd.sock"), "vm");
    let mut synced = 0;
    for round in 0..rounds() {
        let script = format!(
            "FIRST={}; SYNCED={synced}; OLDEST={}; {WORK}",
            u8::from(round == 0),
            synced.max(500) - 500
        );
        let file = store.beside("work.sh");
        std::fs::write(&file, script).unwrap();
        let mut guest = Tiny::new(&drive)
            .arguments(["-fw_cfg".to_owned(), format!("name=opt/bootcache/run,file={}", file.display())])
            .start();
        guest::wait_for_boot(&guest);
        guest.wait_for("WORK-VERIFIED", Duration::from_secs(60));
        guest.wait_for(&format!("WORK-SYNCED {}", synced + 1), Duration::from_secs(60));

        pause(700);
        serve.kill();
        pause(300);
        serve = store.serve([""; 0]);
        let before = last_synced(&guest).expect("it has synced one");
        guest.wait_for(&format!("WORK-SYNCED {}", before + 2), Duration::from_secs(90));

        pause(700);
        serve.kill();
        guest.kill();
        std::thread::sleep(Duration::from_millis(50)); // the last lines
        let said = guest.said();
        for bad in ["WORK-FAILED", "I/O error", "EXT4-fs error", "Aborting journal", "PAYLOAD-DAMAGED"] {
            assert!(!said.contains(bad), "round {round}: {bad}\n{said}");
        }
        let now = last_synced(&guest).expect("it has synced one");
        assert!(now > synced, "the guest made progress");
        synced = now;
        println!("round {round}: {synced} files synced");
        serve = store.serve([""; 0]);
    }
    assert!(serve.terminate(Duration::from_secs(10)).success());
    store.run(["image", "verify", "tiny"]);
}
