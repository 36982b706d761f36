# Runs in the guest of tests/attach.rs: sh of busybox, bootcache and serve_overlay in PATH.
export BOOTCACHE_STORE=/tmp/store
mkdir -p /tmp/mnt
fail() { echo "ATTACH-FAILED: $*"; cat /tmp/store/attached/*.log; dmesg | tail -30; exit 1; }
# A step is named, so that the log tells where the time went.
step() { echo "STEP $(cut -d' ' -f1 /proc/uptime) $*"; }
quiet_log() { dmesg | grep -iE 'I/O error|EXT4-fs (error|warning)|Buffer I/O|blk_update_request' && fail "the kernel complains: $1"; }
sum() { sha256sum "$1" | cut -d' ' -f1; }
# serve NAME: a server of one overlay, its pid in /tmp/NAME.pid
serve() {
	[ -e /tmp/$1.raw ] || truncate -s 128M /tmp/$1.raw
	serve_overlay /tmp/$1.raw /tmp/$1.overlay /tmp/$1.sock >/tmp/$1.said 2>&1 &
	echo $! >/tmp/$1.pid
	for try in $(seq 100); do grep -q ready /tmp/$1.said && return; usleep 100000; done
	cat /tmp/$1.said; fail "server $1 does not start"
}
attach() { bootcache attach overlay --socket /tmp/one.sock "$@"; }

step no module
rmmod nbd 2>/dev/null
mv /lib/modules /lib/modules.away
serve one
attach >/tmp/out 2>&1 && fail "attached without a module"
grep -q 'no NBD client.*modprobe nbd' /tmp/out || fail "no help: $(cat /tmp/out)"
mv /lib/modules.away /lib/modules

step netlink
device=$(attach) || fail "attach"
[ "$device" = /dev/nbd0 ] || fail "device '$device'"
nbd-client -c /dev/nbd0 >/dev/null || fail "nbd-client -c does not see it"
attach 2>/tmp/out && fail "attached twice"
grep -q "is attached as /dev/nbd0" /tmp/out || fail "attached twice says: $(cat /tmp/out)"
bootcache attached
[ "$(bootcache attached --json | grep -c '"state": "attached"')" = 1 ] || fail "attached"

step file system
mkfs.ext4 -q -F $device || fail "mkfs"
step mount
mount -t ext4 $device /tmp/mnt || fail "mount"
dd if=/dev/urandom of=/tmp/mnt/a bs=64k count=256 conv=fsync 2>/dev/null || fail "write"
a=$(sum /tmp/mnt/a)
bootcache detach overlay 2>/tmp/out && fail "detached while mounted"
grep -q 'in use by the mount /tmp/mnt' /tmp/out || fail "busy says: $(cat /tmp/out)"

step server killed and restarted under I/O
{ for n in 1 2 3 4 5 6; do dd if=/dev/urandom of=/tmp/mnt/b$n bs=64k count=64 conv=fsync 2>/dev/null || echo WRITE-FAILED; done; sum /tmp/mnt/b6; } >/tmp/writer 2>&1 &
writer=$!
usleep 300000
kill -9 $(cat /tmp/one.pid); wait $(cat /tmp/one.pid)
sleep 3
[ -e /proc/$writer ] || fail "the writer did not wait"
serve one
wait $writer
grep -q WRITE-FAILED /tmp/writer && fail "a write failed"
sync
echo 3 >/proc/sys/vm/drop_caches
[ "$(sum /tmp/mnt/a)" = "$a" ] || fail "a differs"
[ "$(sum /tmp/mnt/b6)" = "$(cat /tmp/writer)" ] || fail "b6 differs"
quiet_log "after the restart"

step keeper killed and replaced
keeper=$(bootcache attached --json | sed -n 's/.*"keeper": \([0-9]*\).*/\1/p')
kill -9 $keeper
usleep 300000
bootcache attached 2>/dev/null | grep -q unattended || fail "a dead keeper is not seen"
[ "$(attach)" = /dev/nbd0 ] || fail "not taken over"
said=$(wc -l </tmp/store/attached/overlay.log)
sleep 3
said=$(($(wc -l </tmp/store/attached/overlay.log) - said))
[ $said -lt 3 ] || fail "the next keeper said $said lines in three seconds"
kill -9 $(cat /tmp/one.pid); wait $(cat /tmp/one.pid)
serve one
dd if=/dev/urandom of=/tmp/mnt/c bs=64k count=16 conv=fsync 2>/dev/null || fail "write after the second restart"
quiet_log "after the second restart"

step two devices
serve two
second=$(bootcache attach two --socket /tmp/two.sock 2>/tmp/out) && fail "an export of another name"
grep -q "cannot open export 'two'" /tmp/out || fail "another name says: $(cat /tmp/out)"
second=$(BOOTCACHE_STORE=/tmp/store2 bootcache attach overlay /dev/nbd3 --connections 4 --socket /tmp/two.sock) || fail "second device"
[ "$second" = /dev/nbd3 ] || fail "second is '$second'"
dd if=/dev/urandom of=$second bs=1M count=8 conv=fsync 2>/dev/null || fail "write to the second"
[ "$(dd if=/dev/nbd0 bs=64k count=4 2>/dev/null | sha256sum)" != "$(dd if=$second bs=64k count=4 2>/dev/null | sha256sum)" ] || fail "the two are one"
sleep 100 <$second &
BOOTCACHE_STORE=/tmp/store2 bootcache detach $second 2>/tmp/out && fail "detached while open"
grep -q 'in use by process' /tmp/out || fail "open says: $(cat /tmp/out)"
kill $!; wait $! 2>/dev/null

step discard
blkdiscard $second || fail "blkdiscard"
echo 3 >/proc/sys/vm/drop_caches
[ "$(dd if=$second bs=1M count=8 2>/dev/null | tr -d '\0' | wc -c)" = 0 ] || fail "discarded blocks are not zero"
fstrim /tmp/mnt || fail "fstrim"

step detach
BOOTCACHE_STORE=/tmp/store2 bootcache detach $second || fail "detach the second"
umount /tmp/mnt
bootcache detach overlay || fail "detach"
nbd-client -c /dev/nbd0 >/dev/null && fail "nbd-client still sees it"
bootcache attached 2>&1 | grep -q 'nothing is attached' || fail "still attached"
bootcache detach overlay 2>/tmp/out && fail "detached twice"

step again, and what was written is there
[ "$(attach)" = /dev/nbd0 ] || fail "not the free device"
mount -t ext4 /dev/nbd0 /tmp/mnt || fail "mount again"
[ "$(sum /tmp/mnt/a)" = "$a" ] || fail "a differs after detaching"
umount /tmp/mnt
bootcache detach /dev/nbd0 || fail "detach by device"

step a device that somebody else has by now
[ "$(attach)" = /dev/nbd0 ] || fail "not the free device again"
kill -9 $(bootcache attached --json | sed -n 's/.*"keeper": \([0-9]*\).*/\1/p')
nbd-client -d /dev/nbd0 >/dev/null || fail "nbd-client -d"
for try in $(seq 100); do [ -e /sys/block/nbd0/pid ] || break; usleep 100000; done
nbd-client -unix /tmp/one.sock /dev/nbd0 -N overlay >/tmp/out 2>&1 || fail "nbd-client: $(cat /tmp/out)"
bootcache attached | grep -q gone || fail "taken for ours: $(bootcache attached)"
bootcache detach overlay || fail "detach what is gone"
nbd-client -c /dev/nbd0 >/dev/null || fail "somebody else's device was disconnected"
nbd-client -d /dev/nbd0 >/dev/null || fail "nbd-client -d again"
for try in $(seq 100); do [ -e /sys/block/nbd0/pid ] || break; usleep 100000; done

step ioctl
device=$(attach --ioctl) || fail "attach by ioctl"
nbd-client -c $device >/dev/null || fail "nbd-client -c does not see it by ioctl"
mount -t ext4 $device /tmp/mnt || fail "mount by ioctl"
[ "$(sum /tmp/mnt/a)" = "$a" ] || fail "a differs by ioctl"
dd if=/dev/urandom of=/tmp/mnt/d bs=64k count=32 conv=fsync 2>/dev/null || fail "write by ioctl"
d=$(sum /tmp/mnt/d)
bootcache detach overlay 2>/dev/null && fail "detached by ioctl while mounted"
umount /tmp/mnt
blkdiscard -o 120M -l 1M $device 2>/dev/null
bootcache detach overlay || fail "detach by ioctl"
nbd-client -c $device >/dev/null && fail "nbd-client still sees it by ioctl"
bootcache attach overlay --socket /tmp/one.sock --foreground >/tmp/out 2>&1 & # no function: $! must be the program
for try in $(seq 100); do grep -q /dev/nbd /tmp/out && break; usleep 100000; done
mount -t ext4 -o ro "$(cat /tmp/out)" /tmp/mnt || fail "mount in the foreground"
[ "$(sum /tmp/mnt/d)" = "$d" ] || fail "d differs"
umount /tmp/mnt
kill $!; wait $! || fail "SIGTERM does not end it well: $(cat /tmp/out)"
bootcache attached 2>&1 | grep -q 'nothing is attached' || fail "the foreground left something"
quiet_log "at the end"

step an attached overlay is in use though nobody is connected
export BOOTCACHE_STORE=/tmp/store3
daemon() {
	bootcache serve >/tmp/daemon.said 2>&1 &
	daemon=$!
	for try in $(seq 100); do grep -q ready /tmp/daemon.said && return; usleep 100000; done
	cat /tmp/daemon.said; fail "serve does not start"
}
dd if=/dev/urandom of=/tmp/golden.raw bs=64k count=64 2>/dev/null
bootcache image add golden /tmp/golden.raw >/tmp/out 2>&1 || fail "image add: $(cat /tmp/out)"
daemon
bootcache overlay create golden vm || fail "overlay create"
device=$(bootcache attach vm) || fail "attach to serve"
kill -9 $(bootcache attached --json | sed -n 's/.*"keeper": \([0-9]*\).*/\1/p') $daemon; wait $daemon
daemon
for words in "overlay remove vm" "overlay commit vm more"; do
	bootcache $words 2>/tmp/out && fail "$words of what is attached"
	grep -q "attached as $device" /tmp/out || fail "$words says: $(cat /tmp/out)"
done
[ "$(bootcache attach vm)" = $device ] || fail "vm is not taken over"
bootcache detach vm || fail "detach vm"
bootcache overlay remove vm || fail "overlay remove"

step VMs of a plan, though libvirt pretends
made() { dmesg | grep -c 'nbd[0-9]*: detected capacity change from 0 '; }
becomes() {
	for try in $(seq 300); do bootcache --json instances >/tmp/out 2>&1; grep -q "$1" /tmp/out && return; usleep 100000; done
	cat /tmp/agent.said; fail "no instance is $1: $(cat /tmp/out)"
}
nothing_of() {
	bootcache attached 2>&1 | grep -q 'nothing is attached' || fail "$1: a device is left: $(bootcache attached)"
	[ -z "$(ls $BOOTCACHE_STORE/attached | grep lab-)" ] || fail "$1: left: $(ls $BOOTCACHE_STORE/attached)"
}
mkdir -p /tmp/bin
export PATH=/tmp/bin:$PATH
bootcache controller --allow-privileged >/tmp/controller.said 2>&1 &
bootcache -v agent --name n1 --connect test:///default --no-containers >/tmp/agent.said 2>&1 &
for try in $(seq 300); do bootcache --json images 2>/dev/null | grep -q golden && break; usleep 100000; done
cat >/tmp/plan.toml <<'PLAN'
name = "lab"
[[groups]]
name = "g"
type = "vm"
image = "golden"
memory = 16
disk_by = "kernel"
PLAN
before=$(made)
bootcache deploy /tmp/plan.toml >/tmp/out 2>&1 || fail "deploy: $(cat /tmp/out)"
becomes failed # its launch: there is no QEMU here
grep -q 'is not installed' /tmp/out || fail "it failed otherwise: $(cat /tmp/out)"
[ $(made) = $((before + 1)) ] || fail "it had no device: $(cat /tmp/out)"
nothing_of "a launch that failed"
bootcache end 1 || fail "end 1"
printf '#!/bin/sh\n' >/tmp/bin/qemu-system-x86_64; chmod 755 /tmp/bin/qemu-system-x86_64
echo 'template = "domain.xml"' >>/tmp/plan.toml
cat >/tmp/domain.xml <<'XML'
<domain type='test'><name>@NAME@</name><uuid>@UUID@</uuid><memory>4096</memory><os><type>hvm</type></os>
<devices>@DISK@@NICS@</devices></domain>
XML
bootcache deploy /tmp/plan.toml >/tmp/out 2>&1 || fail "deploy again: $(cat /tmp/out)"
becomes stopped # such a domain ends with the connection that made it
[ $(made) = $((before + 2)) ] || fail "it had no device the second time: $(cat /tmp/out)"
nothing_of "a VM that has ended"
bootcache overlay list | grep -q lab-2-g-1 || fail "its overlay has gone before its task"
bootcache end 2 || fail "end 2"
bootcache overlay list | grep -q lab- && fail "its overlay is left"
quiet_log "after the plans"
kill $daemon; wait $daemon
step done
echo ATTACH-OK
