# What a person runs. `make` alone explains; every target installs what it needs (Debian 12, root or sudo).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
CARGO ?= cargo

.PHONY: help setup guests build demo test soak soak-transfer soak-control bench-control bench-cluster fuzz prove-checks check bench-quick bench-boot bench-boot-show bench-predict bench-transfer bench-faults bench-memory bench-similar bench-tracer bench-import bench-nbd bench-attack miri memcheck test-kernel-disk clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: ## install what is missing on this machine (quick when nothing is)
	@scripts/setup

guests: setup ## the disks that the tests boot: a tiny one and a Debian (kept in ~/.cache/bootcache)
	@for guest in tiny fast; do scripts/guest $$guest >/dev/null; done

build: setup ## the release binary, target/release/bootcache
	$(CARGO) build --release --locked

demo: ## the main job, with figures: import, record and boot a real Debian, through libvirt (PAIRS=10: more boots)
	@scripts/demo $(if $(PAIRS),--pairs $(PAIRS))

test: guests ## all tests, the end-to-end ones with real QEMU, libvirt and Docker too
	$(CARGO) test --locked --workspace --no-fail-fast

soak: guests ## 200 rounds of kill -9 and 200 power losses under writing guests (an hour), NBD clients against a model (half an hour), 6,000 VMs that come and go (ten minutes)
	BOOTCACHE_MODEL_SECONDS=1800 $(CARGO) test --locked -p bootcache-nbd --test model -- --nocapture
	BOOTCACHE_ATTACK=full $(CARGO) test --locked -p bootcache-nbd --test attack -- --nocapture
	BOOTCACHE_ROUNDS=200 $(CARGO) test --locked --test crash -- --nocapture
	BOOTCACHE_ROUNDS=1500 $(CARGO) test --locked --test churn -- --nocapture

soak-transfer: ## 500 faults of peers, 100 rounds of kill -9 of a node's daemon, 30 deaths of the origin (half an hour)
	BOOTCACHE_ROUNDS=500 $(CARGO) test --locked --test transfer_faults -- --nocapture
	BOOTCACHE_ROUNDS=100 $(CARGO) test --locked --test transfer_kill -- --nocapture

soak-control: guests ## 200 kills of the controller and of agents each, with real daemons and in memory; ten minutes without a controller (an hour)
	BOOTCACHE_ROUNDS=200 $(CARGO) test --locked --test control_plane kills -- --nocapture
	BOOTCACHE_ROUNDS=200 $(CARGO) test --locked --test cluster_faults kills -- --nocapture
	BOOTCACHE_AWAY_SECONDS=600 $(CARGO) test --locked --test cluster_faults instances_notice -- --nocapture

bench-cluster: guests ## 20 VMs and 80 containers on four nodes, as in the thesis, beside copy-then-boot and containers only
	$(CARGO) test --release --locked --test cluster_bench -- --ignored --nocapture

test-kernel-disk: guests ## libvirt's domains on /dev/nbdX, in a guest that has the kernel's NBD client (5 minutes)
	@scripts/guest libvirt >/dev/null
	$(CARGO) test --locked --test kernel_disk -- --ignored --nocapture

bench-control: ## CPU of a heartbeat of 1,000 nodes, and of a choice among them; fails at ten times a goal
	$(CARGO) bench --locked --bench control

prove-checks: ## a build that does not check what peers send must fail its test
	@scripts/prove-checks

fuzz: ## the NBD server, client and codecs against spoilt bytes, 20 minutes (BOOTCACHE_FUZZ_SECONDS)
	BOOTCACHE_FUZZ_SECONDS=$${BOOTCACHE_FUZZ_SECONDS:-1200} $(CARGO) test --locked -p bootcache-nbd --test fuzz -- --nocapture

miri: ## the NBD codecs under Miri, where a nightly toolchain has it (rustup +nightly component add miri)
	@$(CARGO) +nightly miri --version >/dev/null 2>&1 \
	|| { echo 'miri: no nightly toolchain with Miri here: rustup toolchain install nightly --component miri rust-src' >&2; exit 1; }
	PROPTEST_CASES=16 MIRIFLAGS=-Zmiri-disable-isolation \
	$(CARGO) +nightly miri test --locked -p bootcache-nbd --lib --test codecs -- request chunk handshake replies

memcheck: setup ## the NBD codecs and unit tests under valgrind, for where Miri is not to be had (2 minutes)
	PROPTEST_CASES=16 CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER='valgrind --quiet --error-exitcode=99' \
	$(CARGO) test --locked -p bootcache-nbd --features tls --lib --test codecs

check: setup ## formatting, lints, documentation, licences
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	$(CARGO) check --locked -p bootcache --lib --bins --no-default-features
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --locked --workspace --no-deps --document-private-items
	@if $(CARGO) deny --version >/dev/null 2>&1; then $(CARGO) deny --locked check; \
	else scripts/check-licences && echo 'check: known vulnerabilities not looked for: cargo-deny is not installed'; fi

bench-quick: setup ## instructions of the hot paths, counted and compared with what is expected (a minute; in CI)
	$(CARGO) bench --locked --profile dev --bench quick

bench-boot: guests ## every way to boot, tabled, drawn, predicted; hours, resumable (MINUTES=60 bounds it, FRESH=1 starts anew)
	$(CARGO) bench --locked --bench boot -- --all $(if $(MINUTES),--minutes $(MINUTES)) $(if $(FRESH),--fresh)
	$(CARGO) bench --locked --bench boot -- --pictures target/bench/pictures

bench-boot-show: ## the tables of what bench-boot has measured so far
	$(CARGO) bench --locked --bench boot -- --show

bench-predict: guests ## the simulator, fixed by one node, against replays of 3 and 16 nodes and of a slow one (15 minutes)
	$(CARGO) bench --locked --bench boot -- --predict

bench-transfer: guests build ## replay a recorded boot over shaped links: one node, three, twice the image, misses under fill
	scripts/bench-transfer --rate 100
	scripts/bench-transfer --rate 1000

bench-faults: ## what a boot takes beside a source that lies, stalls, breaks or trickles (2 minutes)
	$(CARGO) test --release --locked --test transfer_faults -- --ignored --nocapture

bench-memory: guests build ## memory of a node's daemon with 20 VMs and three images on their way (5 minutes)
	scripts/bench-memory

bench-similar: guests build ## what a second image costs the network beside a similar one (4 minutes)
	scripts/bench-similar

bench-tracer: setup ## what the tracer adds to a read, of the image and of another file (a minute)
	$(CARGO) bench --locked --bench tracer

bench-import: setup ## `image add` beside `qemu-img convert` and `b3sum`, from raw and qcow2 (3 minutes)
	$(CARGO) bench --locked --bench import

bench-nbd: setup ## bootcache, qemu-nbd and nbdkit side by side, with fio; the table also as target/bench-nbd.json
	$(CARGO) bench --locked --bench nbd -- --json target/bench-nbd.json

bench-attack: ## what a good client of the NBD server waits while others attack it: p50 and p99 for each attack (2 minutes)
	BOOTCACHE_ATTACK=full $(CARGO) test --release --locked -p bootcache-nbd --test attack -- --nocapture --test-threads 1

clean: ## remove what was built (guests and images kept in the cache folder stay)
	$(CARGO) clean
