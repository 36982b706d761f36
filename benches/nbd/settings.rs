//! How the other servers are run. The first settings of each are those of the table: what people use, and the best that
//! was found; `--settings` compares all.

use std::process::Command;

/// A server with options.
#[derive(Debug)]
pub(crate) struct Setting {
    pub(crate) name: &'static str,
    pub(crate) options: &'static [&'static str],
    /// nbdkit's plugin and its parameters; `FILE` stands for the file.
    pub(crate) plugin: &'static [&'static str],
}

const fn qemu(name: &'static str, options: &'static [&'static str]) -> Setting {
    Setting { name, options, plugin: &[] }
}

const fn nbdkit(name: &'static str, options: &'static [&'static str]) -> Setting {
    Setting { name, options, plugin: &["file", "FILE"] }
}

/// qemu-nbd's; what bypasses the page cache reads the device.
pub(crate) const QEMU: [Setting; 5] = [
    qemu("qemu-nbd", &["--cache=writeback"]),
    qemu("qemu-nbd io_uring", &["--cache=writeback", "--aio=io_uring"]),
    qemu("qemu-nbd unsafe", &["--cache=unsafe", "--aio=io_uring"]),
    qemu("qemu-nbd native", &["--cache=none", "--aio=native"]),
    qemu("qemu-nbd direct", &["--cache=none", "--aio=io_uring"]),
];

/// nbdkit's.
pub(crate) const NBDKIT: [Setting; 8] = [
    nbdkit("nbdkit", &["--threads=16"]),
    nbdkit("nbdkit 4 threads", &["--threads=4"]),
    nbdkit("nbdkit 1 thread", &["--threads=1"]),
    nbdkit("nbdkit 64 threads", &["--threads=64"]),
    nbdkit("nbdkit multi-conn", &["--threads=16", "--filter=multi-conn"]),
    Setting { plugin: &["file", "FILE", "fadvise=random"], ..nbdkit("nbdkit random", &["--threads=16"]) },
    Setting {
        plugin: &["file", "FILE", "fadvise=sequential"],
        ..nbdkit("nbdkit sequential", &["--threads=16"])
    },
    // Zeroes in memory: not the same work, but nothing of nbdkit can be faster.
    Setting { plugin: &["memory", "512M"], ..nbdkit("nbdkit memory", &["--threads=16"]) },
];

/// Settings of the table, qemu-nbd's and nbdkit's.
pub(crate) const QEMU_USED: usize = 2;
pub(crate) const NBDKIT_USED: usize = 2;

/// Prints what the names in the table stand for.
pub(crate) fn explain(all: bool) {
    let shown = |used: usize, have: usize| if all { have } else { used };
    for (program, settings) in [
        ("qemu-nbd", &QEMU[..shown(QEMU_USED, QEMU.len())]),
        ("nbdkit", &NBDKIT[..shown(NBDKIT_USED, NBDKIT.len())]),
    ] {
        let version = super::support::run(Command::new(program).arg("--version"));
        println!("{}", version.lines().next().unwrap_or(program));
        for setting in settings {
            let words = [setting.options, setting.plugin].concat().join(" ");
            println!("  {}: {program} {words}", setting.name);
        }
    }
}
