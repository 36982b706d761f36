//! Guests against the NBD crate's own exports, of a file and of memory: QEMU's client carries the system disk, the kernel's
//! client in the guest another one over TCP.

mod support;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bootcache_nbd::layers::{FileDisk, MemoryDisk};
use bootcache_nbd::{Export, ExportStats, Limits, Server, SharedDisk, Tls};
use support::guest::{Tiny, disk, nbd_drive};
use tokio::net::{TcpListener, UnixListener};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

/// TCG on shared cores.
const DEADLINE: Duration = Duration::from_secs(240);
/// Of the second disk.
const SIZE: usize = 32 << 20;

/// In the guest: a file system over the kernel's client, read back after its caches were dropped; then a discard.
const WORK: &str = "fail() { echo GUEST-FAILED: $*; dmesg | tail; exit 1; }
modprobe nbd nbds_max=2
nbd-client 10.0.2.2 PORT /dev/nbd0 -N data >/tmp/said 2>&1 || fail attach: $(cat /tmp/said)
nbd-client -c /dev/nbd0 >/dev/null || fail not connected
mkfs.ext4 -q -F /dev/nbd0 && mount -t ext4 /dev/nbd0 /mnt || fail mount
cp /payload.bin /mnt/ && sync || fail copy
umount /mnt && echo 3 >/proc/sys/vm/drop_caches && mount -t ext4 /dev/nbd0 /mnt || fail mount again
cmp /payload.bin /mnt/payload.bin || fail it differs
umount /mnt && blkdiscard -o 16M -l 8M /dev/nbd0 || fail discard
nbd-client -d /dev/nbd0 >/dev/null || fail detach
mkfs.ext4 -q -F /dev/vda2 && mount -t ext4 /dev/vda2 /mnt && cp /payload.bin /mnt && umount /mnt || fail system disk
dmesg | grep -iE 'I/O error|Buffer I/O' && fail the kernel complains
echo GUEST-OK";

/// The same disk as a file, or in memory.
fn disk_of(kind: &str, folder: &Path, name: &str, content: Vec<u8>) -> SharedDisk {
    if kind == "memory" {
        return Arc::new(MemoryDisk::from(content));
    }
    let path = folder.join(name);
    std::fs::write(&path, content).expect("room for a disk");
    Arc::new(FileDisk::open(&path, false).expect("a file"))
}

fn server(name: &str, disk: SharedDisk) -> (Server, Arc<ExportStats>) {
    let export = Export::new(name, disk);
    let stats = Arc::clone(&export.stats);
    (Server::new(Arc::new(export), Limits::default(), Tls::Off), stats)
}

#[test]
fn a_guest_boots_from_an_export_and_its_kernel_mounts_another() {
    if !support::require(&["qemu-system-x86_64", "nbd-client", "mke2fs", "extlinux"]) {
        return;
    }
    let tiny = std::fs::read(disk("tiny")).expect("the guest's disk");
    for kind in ["file", "memory"] {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join("system.sock");
        let (system, system_stats) =
            server("system", disk_of(kind, folder.path(), "system.raw", tiny.clone()));
        let (data, data_stats) = server("data", disk_of(kind, folder.path(), "data.raw", vec![0; SIZE]));
        let runtime = Runtime::new().expect("a runtime");
        let cancel = CancellationToken::new();
        let port = runtime.block_on(async {
            let unix = UnixListener::bind(&socket).expect("a socket");
            let tcp = TcpListener::bind("127.0.0.1:0").await.expect("a port");
            let port = tcp.local_addr().expect("it is bound").port();
            let (until, also) = (cancel.clone(), cancel.clone());
            tokio::spawn(async move { system.serve_unix(unix, until).await });
            tokio::spawn(async move { data.serve_tcp(tcp, also).await });
            port
        });
        let work = folder.path().join("work.sh");
        std::fs::write(&work, WORK.replace("PORT", &port.to_string())).expect("a script");
        let guest = Tiny::new(&nbd_drive(&socket, "system"))
            .arguments(["-nic", "user,model=virtio-net-pci"])
            .arguments(["-fw_cfg", &format!("name=opt/bootcache/run,file={}", work.display())])
            .start();
        guest.wait_for("RUN-DONE", DEADLINE);
        let said = guest.said();
        assert!(said.contains("GUEST-OK") && !said.contains("GUEST-FAILED"), "{kind}: {said}");
        let read = system_stats.read_bytes.load(std::sync::atomic::Ordering::Relaxed);
        assert!(read >= 8_000_000, "{kind}: it read {read} bytes of its disk, so it did not boot from it");
        for (name, stats) in [("system", system_stats), ("data", data_stats)] {
            let written = stats.written_bytes.load(std::sync::atomic::Ordering::Relaxed);
            assert!(written >= 2 << 20, "{kind}: the guest wrote {written} bytes to the {name} disk");
        }
        cancel.cancel();
    }
}
