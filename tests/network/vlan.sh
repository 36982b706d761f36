# Runs in both guests of tests/network_vlan.rs, each a host of its own on one cable: SELF is 1 or 2, OTHER the other.
fail() { echo "VLAN-FAILED: $*"; ip addr; exit 1; }
modprobe bridge; modprobe 8021q
# spec NAME VLAN: a network 172.16.NAME.0/24 in a VLAN of the interface that also has the host's own address.
spec() {
	echo "{\"name\": \"net$1\", \"bridge\": \"br$1\", \"subnet\": [\"172.16.$1.0\", 24], \"gateway\": null," \
		"\"node_address\": \"172.16.$1.$SELF\", \"uplink\": \"eth0\", \"vlan\": $2, \"mtu\": null}" >/tmp/net$1.json
}
spec 10 10; spec 20 20
# One network by its addresses, in a VLAN of its own on each host.
spec 30 $((30 + SELF))
made=$(make_network host$SELF /tmp/net30.json /tmp/net10.json /tmp/net20.json) || fail "networks"
[ "$(echo $made | tr ' ' '\n' | sort | tr '\n' ' ')" = "br10 br20 br30 " ] || fail "made $made"
make_network host$SELF /tmp/net10.json >/dev/null || fail "a second time"

reaches() { ping -c 1 -W 1 $1 >/dev/null; }
for try in $(seq 120); do reaches 172.16.20.$OTHER && break; done
# A ping may be lost under a loaded host.
comes_to_reach() { for try in $(seq 20); do reaches $1 && return; done; return 1; }
comes_to_reach 172.16.10.$OTHER || fail "VLAN 10 does not pass"
comes_to_reach 172.16.20.$OTHER || fail "VLAN 20 does not pass on the same cable"
comes_to_reach 10.0.0.$OTHER || fail "the interface is the host's no longer"
for try in 1 2 3; do reaches 172.16.30.$OTHER && fail "VLAN 31 reaches VLAN 32"; done
echo VLAN-ISOLATED
if [ $SELF = 1 ]; then
	# It is the number alone that kept them apart.
	make_network host1 --remove br30 >/dev/null || fail "remove"
	[ ! -e /sys/class/net/eth0.31 ] && [ ! -e /sys/class/net/br30 ] || fail "something is left of VLAN 31"
	spec 30 32
	make_network host1 /tmp/net30.json >/dev/null || fail "made again"
	comes_to_reach 172.16.30.2 || fail "VLAN 32 does not pass"
	sleep 15 # for the other, which may still look
	make_network host1 --remove br10 br20 br30 >/dev/null || fail "remove all"
	[ -z "$(ls /sys/class/net | grep -v -e '^lo$' -e '^eth0$')" ] || fail "something is left"
fi
echo VLAN-OK
