//! A VM that `bootcache boot` started: what its folder says of it, so that other commands find it again.

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::control::Owner;
use crate::name::ImageName;
use crate::store::write_atomic;

const META_FILE: &str = "vm.json";
const VERSION: u32 = 1;

/// `vms/NAME/vm.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmRecord {
    version: u32,
    /// The image that it was made of.
    pub image: ImageName,
    /// Who runs it.
    pub runner: Runner,
}

/// Who runs a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Runner {
    /// A domain of libvirt, which has the VM's name.
    Libvirt {
        /// The daemon.
        uri: String,
    },
    /// A QEMU process.
    Qemu {
        /// Its process id.
        pid: u32,
    },
}

impl VmRecord {
    /// A record of a VM made of `image`.
    pub fn new(image: ImageName, runner: Runner) -> Self {
        Self { version: VERSION, image, runner }
    }

    /// Reads the record in the VM's folder; `None` if there is none.
    pub fn read(dir: &Path) -> io::Result<Option<Self>> {
        match std::fs::read(dir.join(META_FILE)) {
            Ok(text) => Ok(Some(serde_json::from_slice(&text)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes it, durably.
    pub fn write(&self, dir: &Path) -> io::Result<()> {
        write_atomic(&dir.join(META_FILE), &serde_json::to_vec(self)?)
    }
}

/// The file that a VM's first serial line goes to.
pub fn serial_path(dir: &Path) -> PathBuf {
    dir.join("serial.log")
}

/// The file that a plain QEMU's own messages go to.
pub fn qemu_log_path(dir: &Path) -> PathBuf {
    dir.join("qemu.log")
}

/// The socket on which a plain QEMU takes commands.
pub fn qmp_path(dir: &Path) -> PathBuf {
    dir.join("qmp.sock")
}

/// Opens a log of a VM to append to, for `owner`, else for this process's user, and for nobody else to read: a console
/// says passwords.
pub fn open_log(path: &Path, owner: Option<Owner>) -> io::Result<File> {
    let file = File::options().create(true).append(true).mode(0o600).open(path)?;
    file.set_permissions(Permissions::from_mode(0o600))?;
    if let Some(owner) = owner {
        fchown(&file, Some(owner.uid), Some(owner.gid))?;
    }
    Ok(file)
}
