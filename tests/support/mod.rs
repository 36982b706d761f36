//! What the end-to-end tests share: needs that are checked, children that are ended, and a cluster in namespaces.
//!
//! A test begins with what it needs and returns when it is not there: `if !support::require(&["qemu-img"]) { return }`.
//! The skip is printed by name; with `CI` set it is a failure. Everything here cleans up on drop, after a panic too.
//! (Cargo takes every file directly in `tests/` for a test program: hence this one `mod.rs`.)

#![allow(dead_code, unreachable_pub, reason = "each test program uses a part of it")]

pub mod cluster;
pub mod container;
pub mod control;
pub mod guest;
pub mod host;
pub mod net;
pub mod process;
pub mod store;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Whether all these programs are installed; says which is missing, and panics instead when `CI` is set.
pub fn require(programs: &[&str]) -> bool {
    programs.iter().all(|program| {
        find(program).is_some() || skip(&format!("{program} is not installed; run scripts/setup"))
    })
}

/// Whether this is root, as namespaces, loop devices and libvirt's system mode need.
pub fn require_root() -> bool {
    rustix::process::geteuid().is_root() || skip("this test needs root")
}

/// Where a program is: in `PATH` or the administrator's folders.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(program))
        .find(|file| file.is_file())
}

/// Says loudly that this test does not run, and why; returns false. A panic when `CI` is set: CI has everything.
pub fn skip(reason: &str) -> bool {
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    assert!(std::env::var_os("CI").is_none(), "{test} cannot run: {reason}");
    eprintln!("SKIPPED {test}: {reason}");
    false
}

/// An example's program; `cargo test` builds them, `cargo test --test NAME` does not.
pub fn example(name: &str) -> PathBuf {
    static BUILT: std::sync::Once = std::sync::Once::new();
    let profile = Path::new(env!("CARGO_BIN_EXE_bootcache")).parent().expect("in a folder");
    BUILT.call_once(|| {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut build = Command::new(cargo);
        // What cargo tells this test of its package would make build scripts run anew.
        for (name, _) in std::env::vars_os() {
            if name
                .to_str()
                .is_some_and(|name| name.starts_with("CARGO_PKG") || name.starts_with("CARGO_MANIFEST"))
            {
                build.env_remove(name);
            }
        }
        build.args(["build", "--quiet", "--locked", "--examples"]).current_dir(checkout("."));
        run(build.args(profile.ends_with("release").then_some("--release")));
    });
    profile.join("examples").join(name)
}

/// How many rounds a test of random moments makes: `BOOTCACHE_ROUNDS`, or `few` in CI.
pub fn rounds(few: u32) -> u32 {
    std::env::var("BOOTCACHE_ROUNDS").map_or(few, |text| text.parse().expect("BOOTCACHE_ROUNDS is a number"))
}

/// A TCP port of loopback that nobody listens on now.
pub fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback has ports");
    listener.local_addr().expect("it is bound").port()
}

/// A file of the checkout, such as `scripts/guest`.
pub fn checkout(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Runs a command to its end and returns its stdout; panics with what it printed when it fails.
#[track_caller]
pub fn run(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{command:?}: {}\n{stdout}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    stdout
}

/// Bytes without a pattern, the same for the same seed (xorshift64*).
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let words = std::iter::repeat_with(|| {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    });
    words.flat_map(u64::to_le_bytes).take(length).collect()
}
