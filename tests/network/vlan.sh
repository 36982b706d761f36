# Runs in both guests of tests/network_vlan.rs, each a host of its own on one cable: SELF is 1 or 2, OTHER the other.
fail() { echo "VLAN-FAILED: $*"; ip addr; exit 1; }
modprobe bridge; modprobe 8021q; modprobe veth
# spec NAME VLAN UPLINK: a network 172.16.NAME.0/24 in a VLAN of an interface, or of a bridge; eth0, which also has the
# host's own address, where none is given.
spec() {
	echo "{\"name\": \"net$1\", \"bridge\": \"br$1\", \"subnet\": [\"172.16.$1.0\", 24], \"gateway\": null," \
		"\"node_address\": \"172.16.$1.$SELF\", \"uplink\": \"${3:-eth0}\", \"vlan\": $2, \"mtu\": null}" \
		>/tmp/net$1.json
}
spec 10 10; spec 20 20
# One network by its addresses, in a VLAN of its own on each host.
spec 30 $((30 + SELF))
# The host's own bridge, whose trunk to the other host is a port with VLANs 110, 120, 131 and 132.
ip link add eth0.99 link eth0 type vlan id 99 || fail "eth0.99"
ip link add vmbr type bridge || fail "vmbr"
ip link set eth0.99 master vmbr up; ip link set vmbr up; ip addr add 172.16.101.$SELF/24 dev vmbr
spec 110 110 vmbr; spec 120 120 vmbr; spec 130 $((130 + SELF)) vmbr
make_network host$SELF /tmp/net110.json >/dev/null || fail "on a bridge that filters no VLANs"
[ -e /sys/class/net/vmbr.110 ] || fail "no 802.1Q device on a bridge that filters no VLANs"
make_network host$SELF --remove br110 >/dev/null && [ ! -e /sys/class/net/vmbr.110 ] || fail "remove vmbr.110"
echo 1 >/sys/class/net/vmbr/bridge/vlan_filtering
for vlan in 110 120 131 132; do bridge vlan add dev eth0.99 vid $vlan || fail "the trunk"; done
make_network host$SELF /tmp/net110.json /tmp/net120.json /tmp/net130.json >/dev/null || fail "networks on a bridge"
make_network host$SELF /tmp/net110.json >/dev/null || fail "on a bridge a second time"
bridge vlan show
made=$(make_network host$SELF /tmp/net30.json /tmp/net10.json /tmp/net20.json) || fail "networks"
[ "$(echo $made | tr ' ' '\n' | sort | tr '\n' ' ')" = "br10 br110 br120 br130 br20 br30 " ] || fail "made $made"
make_network host$SELF /tmp/net10.json >/dev/null || fail "a second time"

reaches() { ping -c 1 -W 1 $1 >/dev/null; }
for try in $(seq 120); do reaches 172.16.20.$OTHER && break; done
# A ping may be lost under a loaded host.
comes_to_reach() { for try in $(seq 20); do reaches $1 && return; done; return 1; }
comes_to_reach 172.16.10.$OTHER || fail "VLAN 10 does not pass"
comes_to_reach 172.16.20.$OTHER || fail "VLAN 20 does not pass on the same cable"
comes_to_reach 10.0.0.$OTHER || fail "the interface is the host's no longer"
comes_to_reach 172.16.110.$OTHER || fail "VLAN 110 does not pass the trunk"
comes_to_reach 172.16.120.$OTHER || fail "VLAN 120 does not pass the trunk"
comes_to_reach 172.16.101.$OTHER || fail "the bridge is the host's no longer"
for try in 1 2 3; do
	reaches 172.16.30.$OTHER && fail "VLAN 31 reaches VLAN 32"
	reaches 172.16.130.$OTHER && fail "VLAN 131 reaches VLAN 132"
done
echo VLAN-ISOLATED
if [ $SELF = 1 ]; then
	# In the host's own VLAN of that bridge nothing of a network is seen, though all have the same trunk. On one host
	# alone: the address of a device that is down answers by the others.
	ip addr add 172.16.110.101/24 dev vmbr; ip link set br110 down
	reaches 172.16.110.2 && fail "VLAN 110 is in the bridge's own"
	ip addr del 172.16.110.101/24 dev vmbr; ip link set br110 up
	# It is the number alone that kept them apart.
	make_network host1 --remove br30 >/dev/null || fail "remove"
	[ ! -e /sys/class/net/eth0.31 ] && [ ! -e /sys/class/net/br30 ] || fail "something is left of VLAN 31"
	spec 30 32
	make_network host1 /tmp/net30.json >/dev/null || fail "made again"
	comes_to_reach 172.16.30.2 || fail "VLAN 32 does not pass"
	make_network host1 --remove br130 >/dev/null || fail "remove from a bridge"
	spec 130 132 vmbr
	make_network host1 /tmp/net130.json >/dev/null || fail "made again on a bridge"
	comes_to_reach 172.16.130.2 || fail "VLAN 132 does not pass"
	sleep 15 # for the other, which may still look
	make_network host1 --remove br10 br20 br30 br110 br120 br130 >/dev/null || fail "remove all"
	ip link show vmbr >/dev/null || fail "the host's bridge is gone"
	left=$(ls /sys/class/net | grep -v -e '^lo$' -e '^eth0$' -e '^eth0.99$' -e '^vmbr$')
	[ -z "$left" ] || fail "something is left: $left"
fi
echo VLAN-OK
