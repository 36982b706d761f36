# Runs in the outer guest of tests/kernel_disk.rs: goes into the Debian root, where libvirt and QEMU are, and there boots
# an image from /dev/nbdX: by `boot`, and by an agent for a plan.
if [ "$1" != inside ]; then
	mount -t ext4 "$(findfs LABEL=LIBVIRT)" /mnt || { echo "KERNEL-DISK-FAILED: no Debian"; exit 1; }
	for folder in dev proc sys; do mount -o bind /$folder /mnt/$folder; done
	mkdir -p /mnt/dev/pts /mnt/payload
	mount -o bind /dev/pts /mnt/dev/pts
	mount -o bind /payload /mnt/payload
	mount -t tmpfs run /mnt/run
	mount -t tmpfs tmp /mnt/tmp
	# The module comes when it is wanted: a plan is carried out without it first.
	(
		until [ -e /mnt/srv/want-module ]; do sleep 1; done
		modprobe nbd nbds_max=4 max_part=4 && touch /mnt/srv/have-module
	) &
	exec env -i PATH=/payload:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb BOOTCACHE_STORE=/srv/store \
		chroot /mnt /bin/sh /payload/run inside
fi
export PATH=/payload:/usr/sbin:/usr/bin:/sbin:/bin
unset LD_LIBRARY_PATH # this root has what is needed
fail() { echo "KERNEL-DISK-FAILED: $*"; tail -30 /tmp/serve.log /tmp/agent.log /tmp/controller.log /tmp/libvirtd.log /var/log/libvirt/qemu/*.log; dmesg | tail; exit 1; }
step() { echo "STEP $(cut -d' ' -f1 /proc/uptime) $*"; }
quiet_log() { dmesg | grep -iE 'I/O error|Buffer I/O|blk_update_request' && fail "the kernel complains: $1"; }
serve() {
	bootcache serve >>/tmp/serve.log 2>&1 &
	serve=$!
	for try in $(seq 300); do [ -S $BOOTCACHE_STORE/nbd.sock ] && bootcache status >/dev/null 2>&1 && return; sleep 0.2; done
	fail "serve does not start"
}
agent() {
	bootcache -v agent --name n1 --no-containers >>/tmp/agent.log 2>&1 &
	agent=$!
}
# becomes STATE SECONDS: an instance does, and all are in /tmp/instances
becomes() {
	for try in $(seq $2); do
		bootcache --json instances >/tmp/instances 2>&1 && grep -q "\"$1\"" /tmp/instances && return
		sleep 1
	done
	fail "no instance is $1: $(cat /tmp/instances)"
}
device() { bootcache attached 2>/dev/null | awk -v name=$1 '$2 == name { print $1 }'; }
nothing_of() { # NAME WHEN
	for folder in vms attached overlays; do
		ls $BOOTCACHE_STORE/$folder 2>/dev/null | grep -q "^$1" && fail "$2: left in $folder: $(ls $BOOTCACHE_STORE/$folder)"
	done
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

step plan without the module
cat >/tmp/plan.toml <<'PLAN'
name = "lab"
[[groups]]
name = "g"
type = "vm"
image = "golden"
memory = 128
disk_by = "kernel"
until = "serial:BOOTED-OK"
time_limit = 1500
PLAN
bootcache controller >/tmp/controller.log 2>&1 &
agent
for try in $(seq 120); do bootcache --json images 2>/dev/null | grep -q golden && break; sleep 1; done
bootcache deploy /tmp/plan.toml || fail "deploy"
becomes failed 300
grep -q 'no NBD client' /tmp/instances || fail "it failed otherwise: $(cat /tmp/instances)"
nothing_of lab "no module"
bootcache end 1 || fail "end 1"
touch /srv/want-module
for try in $(seq 60); do [ -e /srv/have-module ] && break; sleep 1; done
[ -e /srv/have-module ] || fail "there is no module"

step plan
bootcache deploy /tmp/plan.toml || fail "deploy with the module"
becomes booting 300

step boot
bootcache boot golden --name vm --disk kernel --memory 128 --accel tcg --until serial:BOOTED-OK --time-limit 1200 || fail "boot"
step booted
virsh list
virsh domblklist vm
virsh dumpxml vm | grep -A4 "<disk type='block'"
virsh dumpxml vm | grep -q "<source dev='$(device vm)'" || fail "the domain's disk is another"
bootcache attached
vm=$(device vm)
nbd-client -c $vm || fail "nbd-client -c does not see it"
bootcache detach vm 2>/tmp/out && fail "detached under a running domain"
grep -q 'in use by process' /tmp/out || fail "busy says: $(cat /tmp/out)"

step the plan is up
becomes running 1200
lab=$(device lab-2-g-1)
[ -n "$lab" ] && [ $lab != $vm ] || fail "the plan's device is '$lab'"
virsh dumpxml lab-2-g-1 | grep -q "<source dev='$lab'" || fail "the plan's domain has another disk than $lab"

step the agent is killed with the keeper of its device
kill -9 $agent $(sed -n 's/.*"keeper": *\([0-9]*\).*/\1/p' $BOOTCACHE_STORE/attached/lab-2-g-1.json)
wait $agent 2>/dev/null
sleep 1
bootcache attached | grep lab-2-g-1 | grep -q unattended || fail "a dead keeper is not seen: $(bootcache attached)"
agent
for try in $(seq 120); do bootcache attached | grep lab-2-g-1 | grep -q ' attached' && break; sleep 1; done
bootcache attached
bootcache attached | grep lab-2-g-1 | grep -q " attached" || fail "the next agent does not have it looked after"
[ "$(device lab-2-g-1)" = $lab ] || fail "it is another device now"

step restart of the server
kill -9 $serve; wait $serve 2>/dev/null
serve # the agent may have been quicker
sleep 5
for domain in vm lab-2-g-1; do
	[ "$(virsh domstate $domain)" = running ] || fail "$domain is $(virsh domstate $domain)"
done
# The guest's own shut down writes to its disk: through the new connections.
before=$(virsh domblkstat vm vda | awk '/wr_operations/ {print $3}')
virsh shutdown vm
virsh shutdown lab-2-g-1
for try in $(seq 240); do [ "$(virsh domstate vm 2>/dev/null)" = running ] || break; sleep 1; done
[ "$(virsh domstate vm 2>/dev/null)" != running ] || fail "the guest does not shut down ($before writes before)"
quiet_log "after the restart"

step the VM of the plan has ended
becomes stopped 240
[ -z "$(device lab-2-g-1)" ] || fail "it is attached still"
nbd-client -c $lab >/dev/null && fail "$lab is taken still"
bootcache end 2 || fail "end 2"
nothing_of lab "after the end"
virsh list --all | grep -q lab && fail "the plan's domain is there still"
quiet_log "after the plan"

step stop
bootcache stop vm --force --remove || fail "stop"
nothing_of vm "after the stop"
bootcache attached 2>&1 | grep -q 'nothing is attached' || fail "something is attached still"
nbd-client -c $vm >/dev/null && fail "the device is taken still"
virsh list --all | grep -q vm && fail "the domain is there still"
step done
echo KERNEL-DISK-OK
