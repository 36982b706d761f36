//! A device of the kernel's NBD client, as sysfs and `/dev` show it.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{AttachError, Way};

/// Where the kernel shows its block devices.
const SYSFS: &str = "/sys/block";
/// Where it shows a number that is another after each of its starts.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// How long a device may take to become ready or quiet.
const SETTLE: Duration = Duration::from_secs(30);

/// X of `/dev/nbdX`. Text form: `/dev/nbdX`, which may be given as `nbdX` or `X` too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Device(pub u32);

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/dev/nbd{}", self.0)
    }
}

/// Text that names no device.
#[derive(Debug, thiserror::Error)]
#[error("'{0}' is no NBD device: /dev/nbd0 is one")]
pub struct ParseDeviceError(String);

impl FromStr for Device {
    type Err = ParseDeviceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let rest = text.strip_prefix("/dev/").unwrap_or(text);
        let digits = rest.strip_prefix("nbd").unwrap_or(rest);
        let all_digits = digits.bytes().all(|byte| byte.is_ascii_digit());
        digits.parse().ok().filter(|_| all_digits).map(Self).ok_or_else(|| ParseDeviceError(text.to_owned()))
    }
}

impl Device {
    /// Every device that the kernel knows, in order.
    pub fn all() -> Vec<Self> {
        let names = fs::read_dir(SYSFS).into_iter().flatten().flatten();
        let mut devices: Vec<Self> = names
            .filter_map(|entry| entry.file_name().to_str()?.strip_prefix("nbd")?.parse().ok().map(Self))
            .collect();
        devices.sort_unstable();
        devices
    }

    /// `/dev/nbdX`.
    pub fn path(self) -> PathBuf {
        PathBuf::from(self.to_string())
    }

    /// Whether a client has it: what `nbd-client -c` looks at.
    pub fn is_connected(self) -> bool {
        self.attribute("pid").is_some()
    }

    /// Who has it now, if it was set up that `way`.
    pub(super) fn holder(self, way: Way) -> Holder {
        let boot = fs::read_to_string(BOOT_ID).unwrap_or_default();
        Holder::shown(Path::new(SYSFS), boot.trim_end(), self, way)
    }

    /// Size in bytes; 0 when nobody has it.
    pub fn size(self) -> u64 {
        self.attribute("size")
            .and_then(|sectors| sectors.parse::<u64>().ok())
            .map_or(0, |sectors| sectors * 512)
    }

    fn attribute(self, name: &str) -> Option<String> {
        self.attribute_in(Path::new(SYSFS), name)
    }

    fn attribute_in(self, sysfs: &Path, name: &str) -> Option<String> {
        let text = fs::read_to_string(sysfs.join(format!("nbd{}/{name}", self.0))).ok()?;
        Some(text.trim_end().to_owned())
    }

    /// Waits until it shows `size` bytes.
    pub(super) async fn ready(self, size: u64) -> Result<(), AttachError> {
        self.settle("ready", || self.is_connected() && self.size() == size / 512 * 512).await
    }

    /// Waits until nothing of its last user is left, so that the next one does not inherit it.
    pub(super) async fn quiet(self) -> Result<(), AttachError> {
        self.settle("quiet", || !self.is_connected() && self.size() == 0).await
    }

    async fn settle(self, state: &'static str, settled: impl Fn() -> bool) -> Result<(), AttachError> {
        let start = Instant::now();
        while !settled() {
            if start.elapsed() > SETTLE {
                return Err(AttachError::Stuck { device: self, state, seconds: SETTLE.as_secs() });
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    /// Opens it so that nobody can mount it, and refuses if somebody uses it.
    ///
    /// The exclusive open finds mounts, swap and device mapper; processes that merely have it open are looked for
    /// among the descriptors that this user may see. The `keeper` may have it open.
    pub(super) fn claim(self, keeper: u32) -> Result<File, AttachError> {
        let exclusive = rustix::fs::OFlags::EXCL.bits().cast_signed();
        let claimed = File::options().read(true).custom_flags(exclusive).open(self.path());
        let file = claimed.map_err(|error| match error.kind() {
            io::ErrorKind::ResourceBusy => AttachError::Busy {
                device: self,
                by: self.mount_point().unwrap_or_else(|| "the kernel".into()),
            },
            _ => AttachError::Device { device: self, error },
        })?;
        match self.user(&file, keeper) {
            Some(by) => Err(AttachError::Busy { device: self, by }),
            None => Ok(file),
        }
    }

    fn mount_point(self) -> Option<String> {
        let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
        let device = self.to_string();
        mounts.lines().find_map(|line| {
            let mut words = line.split(' ');
            let source = words.next()?;
            // A partition counts: /dev/nbd0p1 is on /dev/nbd0.
            let rest = source.strip_prefix(&device)?;
            let own = rest.is_empty() || rest.starts_with('p');
            own.then(|| words.next().map(|place| format!("the mount {place}"))).flatten()
        })
    }

    /// A process that has it, or a partition of it, open; this one and the keeper aside.
    fn user(self, file: &File, keeper: u32) -> Option<String> {
        let device = file.metadata().ok()?.rdev();
        let own = std::process::id();
        fs::read_dir("/proc").ok()?.flatten().find_map(|process| {
            let pid: u32 = process.file_name().to_str()?.parse().ok()?;
            if pid == own || pid == keeper {
                return None;
            }
            let opens = |path: PathBuf| {
                let metadata = fs::metadata(&path).ok()?;
                let same = metadata.file_type().is_block_device()
                    && rustix::fs::major(metadata.rdev()) == rustix::fs::major(device)
                    && fs::read_link(&path).is_ok_and(|link| self.is_part(&link.to_string_lossy()));
                same.then_some(())
            };
            fs::read_dir(process.path().join("fd")).ok()?.flatten().find_map(|fd| opens(fd.path()))?;
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            Some(format!("process {pid} ({})", name.trim_end()))
        })
    }

    /// Whether a path names this device or a partition of it.
    fn is_part(self, path: &str) -> bool {
        path.strip_prefix(&self.to_string()).is_some_and(|rest| rest.is_empty() || rest.starts_with('p'))
    }
}

/// What tells whether a device is still the one that was attached: the same number may be somebody else's by now.
///
/// `pid` is who called the kernel to set the device up, and stays that when its connections are replaced. By ioctl that
/// call lasts as long as the device does. By netlink it returns at once: the process may have ended long ago, and kernels
/// before Linux 5.16 then read its number from memory that they have given back. So it says nothing there, and must not
/// be asked: a device of ours that is taken for somebody else's would be attached a second time. What was attached by
/// netlink is known by its backend instead, which no other way sets; before Linux 5.14, where there is none either, by
/// the start of the kernel alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The start of the kernel, which no device outlives.
    pub boot: String,
    /// What the client called the export.
    pub backend: Option<String>,
    /// The thread that serves the device, by ioctl.
    pub pid: Option<String>,
}

impl Holder {
    /// What the folder `sysfs` shows of `device`, since the start `boot` of the kernel.
    fn shown(sysfs: &Path, boot: &str, device: Device, way: Way) -> Self {
        let pid = || device.attribute_in(sysfs, "pid");
        Self {
            boot: boot.to_owned(),
            backend: device.attribute_in(sysfs, "backend"),
            pid: (way == Way::Ioctl).then(pid).flatten(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_somebody_else_has_by_now_is_not_the_one_that_was_attached() {
        let sysfs = tempfile::tempdir().unwrap();
        let folder = sysfs.path().join("nbd7");
        let show = |backend: Option<&str>, pid: &str| {
            let _ = fs::remove_dir_all(&folder);
            fs::create_dir(&folder).unwrap();
            fs::write(folder.join("pid"), format!("{pid}\n")).unwrap();
            if let Some(backend) = backend {
                fs::write(folder.join("backend"), format!("{backend}\n")).unwrap();
            }
        };
        let holder = |boot: &str, way| Holder::shown(sysfs.path(), boot, Device(7), way);

        show(Some("bootcache:vm"), "100");
        let attached = holder("first", Way::Netlink);
        assert_ne!(holder("second", Way::Netlink), attached, "the host was started again");
        show(Some("bootcache:vm"), "200");
        assert_eq!(holder("first", Way::Netlink), attached, "an old kernel reads garbage there");
        // As qemu-nbd, nbd-client by netlink, and another of ours show themselves.
        for backend in [None, Some(""), Some("bootcache:other")] {
            show(backend, "100");
            assert_ne!(holder("first", Way::Netlink), attached, "{backend:?}");
        }
        // By ioctl, and on an old kernel, nobody has a backend.
        show(None, "100");
        let (by_ioctl, on_old_kernel) = (holder("first", Way::Ioctl), holder("first", Way::Netlink));
        assert_eq!(holder("first", Way::Ioctl), by_ioctl);
        assert_ne!(holder("second", Way::Netlink), on_old_kernel);
        show(None, "200");
        assert_ne!(holder("first", Way::Ioctl), by_ioctl);
        assert_eq!(holder("first", Way::Netlink), on_old_kernel);
    }

    #[test]
    fn is_written_in_several_ways_and_nothing_else_is_taken_for_one() {
        for text in ["/dev/nbd7", "nbd7", "7"] {
            assert_eq!(text.parse::<Device>().unwrap(), Device(7));
        }
        for text in ["", "/dev/sda", "nbd", "nbd-1", "+7", "/dev/nbd7p1", "99999999999"] {
            assert!(text.parse::<Device>().is_err(), "{text}");
        }
        assert_eq!(Device(7).to_string(), "/dev/nbd7");
    }

    #[test]
    fn partitions_belong_to_their_device_and_longer_numbers_do_not() {
        assert!(Device(1).is_part("/dev/nbd1") && Device(1).is_part("/dev/nbd1p2"));
        assert!(!Device(1).is_part("/dev/nbd10") && !Device(1).is_part("/dev/nbd2"));
    }
}
