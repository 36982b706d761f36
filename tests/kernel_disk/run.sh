# Runs in the outer guest of tests/kernel_disk.rs: goes into the Debian root, where libvirt and QEMU are, and there boots
# an image from /dev/nbd0.
if [ "$1" != inside ]; then
	modprobe nbd nbds_max=4 max_part=4
	mount -t ext4 "$(findfs LABEL=LIBVIRT)" /mnt || { echo "KERNEL-DISK-FAILED: no Debian"; exit 1; }
	for folder in dev proc sys; do mount -o bind /$folder /mnt/$folder; done
	mkdir -p /mnt/dev/pts /mnt/payload
	mount -o bind /dev/pts /mnt/dev/pts
	mount -o bind /payload /mnt/payload
	mount -t tmpfs run /mnt/run
	mount -t tmpfs tmp /mnt/tmp
	exec env -i PATH=/payload:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb BOOTCACHE_STORE=/srv/store \
		chroot /mnt /bin/sh /payload/run inside
fi
export PATH=/payload:/usr/sbin:/usr/bin:/sbin:/bin
unset LD_LIBRARY_PATH # this root has what is needed
fail() { echo "KERNEL-DISK-FAILED: $*"; tail -30 /tmp/serve.log /tmp/libvirtd.log /var/log/libvirt/qemu/*.log; dmesg | tail; exit 1; }
step() { echo "STEP $(cut -d' ' -f1 /proc/uptime) $*"; }
quiet_log() { dmesg | grep -iE 'I/O error|Buffer I/O|blk_update_request' && fail "the kernel complains: $1"; }
serve() {
	bootcache serve >>/tmp/serve.log 2>&1 &
	serve=$!
	for try in $(seq 300); do [ -S $BOOTCACHE_STORE/nbd.sock ] && bootcache status >/dev/null 2>&1 && return; sleep 0.2; done
	fail "serve does not start"
}

step libvirtd
libvirtd >/tmp/libvirtd.log 2>&1 &
libvirtd=$!
for try in $(seq 300); do
	virsh list >/dev/null 2>&1 && break
	kill -0 $libvirtd 2>/dev/null || fail "libvirtd has ended"
	sleep 1
done
virsh version || fail "libvirtd does not answer"

step image
for golden in /dev/vd?; do [ "$(dd if=$golden bs=3 count=1 2>/dev/null)" = QFI ] && break; done
dd if=$golden of=/srv/golden.qcow2 bs=1M 2>/dev/null
bootcache image add golden /srv/golden.qcow2 || fail "image add"
serve

step boot
bootcache boot golden --name vm --disk kernel --memory 128 --accel tcg --until serial:BOOTED-OK --time-limit 1200 || fail "boot"
step booted
virsh list
virsh domblklist vm
virsh dumpxml vm | grep -A4 "<disk type='block'"
virsh dumpxml vm | grep -q "<source dev='/dev/nbd0'" || fail "the domain's disk is another"
bootcache attached
nbd-client -c /dev/nbd0 || fail "nbd-client -c does not see it"
bootcache detach vm 2>/tmp/out && fail "detached under a running domain"
grep -q 'in use by process' /tmp/out || fail "busy says: $(cat /tmp/out)"

step restart of the server
kill -9 $serve; wait $serve 2>/dev/null
serve
sleep 5
[ "$(virsh domstate vm)" = running ] || fail "the domain is $(virsh domstate vm)"
# The guest's own shut down writes to its disk: through the new connections.
before=$(virsh domblkstat vm vda | awk '/wr_operations/ {print $3}')
virsh shutdown vm
for try in $(seq 240); do [ "$(virsh domstate vm 2>/dev/null)" = running ] || break; sleep 1; done
[ "$(virsh domstate vm 2>/dev/null)" != running ] || fail "the guest does not shut down ($before writes before)"
quiet_log "after the restart"

step stop
bootcache stop vm --force --remove || fail "stop"
bootcache attached 2>&1 | grep -q 'nothing is attached' || fail "something is attached still"
nbd-client -c /dev/nbd0 >/dev/null && fail "the device is taken still"
virsh list --all | grep -q vm && fail "the domain is there still"
step done
echo KERNEL-DISK-OK
