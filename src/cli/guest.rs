//! One guest of `bootcache boot`: made, started, waited for, and undone when it does not come up.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use bootcache::attach;
use bootcache::control::{Client, ControlError, Owner, Reply, Request, VmInfo};
use bootcache::digest::Digest;
use bootcache::hypervisor::domain::{Domain, DomainDisk, Interface, RECONNECT_SECONDS, install_emulator};
use bootcache::hypervisor::libvirt::Libvirt;
use bootcache::name::{HostName, ImageName};
use bootcache::qemu::until::{Condition, Until};
use bootcache::qemu::{self, Accelerator, Aio, Machine, Serial, ShutDown, accelerator, qmp};
use bootcache::serve::CONTROL_SOCKET;
use bootcache::store::Store;
use bootcache::vm::{Runner, VmRecord, open_log, qemu_log_path, qmp_path, serial_path};
use tokio::io::AsyncWriteExt;

/// How often the serial log is looked at.
const TICK: Duration = Duration::from_millis(10);

/// How long a guest may take to come back to a daemon that was started again: QEMU tries again after 16 s at most.
const RETURN_SECONDS: u64 = 20;

/// How long libvirt may take to hand on that a guest is to shut down.
const ANSWER: Duration = Duration::from_secs(10);

/// Lines of its console that are shown of a guest that did not boot.
const LINES_SHOWN: usize = 8;

/// How a guest reaches its disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum DiskWay {
    /// QEMU's own NBD client, on the VM's socket
    Socket,
    /// The kernel's: the disk is attached as /dev/nbdX
    Kernel,
}

/// What all guests of one command have in common.
pub(super) struct Plan {
    pub(super) store: Store,
    pub(super) image: ImageName,
    pub(super) root: Digest,
    /// Guests whose overlay was there before, and outlives a boot that fails; each with the lock of who goes on with it.
    pub(super) kept: HashMap<HostName, File>,
    pub(super) disk: DiskWay,
    pub(super) memory_mib: u32,
    pub(super) cpus: u32,
    pub(super) accelerator: Accelerator,
    pub(super) bridges: Vec<String>,
    /// Gives it an interface behind QEMU's own NAT, as it had when it was recorded.
    pub(super) nat: bool,
    /// When a guest has booted; nobody waits otherwise.
    pub(super) until: Option<Until>,
    /// How long it may take.
    pub(super) time_limit: Duration,
    /// libvirt, or none for a plain QEMU.
    pub(super) libvirt: Option<(Libvirt, String)>,
    /// Who QEMU runs as, when that is somebody else.
    pub(super) owner: Option<Owner>,
    pub(super) qemu_arguments: Vec<std::ffi::OsString>,
}

impl Plan {
    /// Where what the boot cache did not foresee is kept.
    pub(super) fn misses(&self) -> PathBuf {
        self.store.image_dir(self.root).join(bootcache::transfer::missed::FILE)
    }

    /// A connection to the store's daemon, which runs.
    pub(super) async fn client(&self) -> anyhow::Result<Client> {
        Ok(Client::connect(&self.store.dir().join(CONTROL_SOCKET)).await?)
    }
}

/// A guest that was started.
pub(super) struct Guest {
    name: HostName,
    dir: PathBuf,
    started: Instant,
    child: Option<tokio::process::Child>,
    condition: Option<Condition>,
}

impl Guest {
    /// Makes the overlay and the socket, and starts the guest; undoes what it did when that fails.
    ///
    /// Dropped, it may leave a guest that starts all the same: libvirt goes on.
    pub(super) async fn start(plan: &Plan, name: HostName) -> anyhow::Result<Self> {
        let condition = match plan.until.clone() {
            Some(until) => Some(Condition::prepare(until, std::net::Ipv4Addr::UNSPECIFIED).await?),
            None => None,
        };
        let mut client = plan.client().await?;
        if !plan.kept.contains_key(&name) {
            let request =
                Request::OverlayCreate { image: plan.image.clone(), name: name.clone(), size: None };
            client.call(&request).await?;
        }
        match Self::start_on_overlay(plan, &mut client, &name, condition).await {
            Ok(guest) => Ok(guest),
            Err(error) => {
                undo(plan, &name).await;
                Err(error)
            }
        }
    }

    async fn start_on_overlay(
        plan: &Plan,
        client: &mut Client,
        name: &HostName,
        condition: Option<Condition>,
    ) -> anyhow::Result<Self> {
        let open = Request::VmOpen { name: name.clone(), owner: plan.owner };
        let Reply::Vm(vm) = client.call(&open).await? else { bail!("the daemon answered out of turn") };
        let dir = plan.store.vm_dir(name);
        let serial = serial_path(&dir);
        let log = open_log(&serial, plan.owner).and_then(|log| log.set_len(0));
        log.with_context(|| format!("cannot write {}", serial.display()))?;
        let device = match plan.disk {
            DiskWay::Socket => None,
            DiskWay::Kernel => Some(attached(plan, name, &vm).await?),
        };
        let started = Instant::now();
        let child = match &plan.libvirt {
            Some((libvirt, uri)) => {
                let runner = Runner::Libvirt { uri: uri.clone() };
                VmRecord::new(plan.image.clone(), runner).write(&dir)?;
                let xml = domain_xml(plan, name, &vm, device, serial)?;
                std::fs::write(dir.join("domain.xml"), &xml)?;
                libvirt.launch(xml).await?;
                None
            }
            None => Some(start_qemu(plan, &vm, device, &dir, serial).await?),
        };
        Ok(Self { name: name.clone(), dir, started, child, condition })
    }

    /// Waits until the guest has booted, which the plan says when; returns how long that took.
    pub(super) async fn booted(mut self, plan: &Plan) -> anyhow::Result<Duration> {
        let (Some(condition), Some(until)) = (self.condition.take(), &plan.until) else {
            bail!("nobody said when it has booted");
        };
        let limit = plan.time_limit;
        let (mut writer, reader) = tokio::io::duplex(64 << 10);
        let path = serial_path(&self.dir);
        let tail = async move {
            let mut file = tokio::fs::File::open(&path).await?;
            loop {
                if tokio::io::copy(&mut file, &mut writer).await? == 0 {
                    tokio::time::sleep(TICK).await;
                }
                writer.flush().await?;
            }
            #[expect(unreachable_code, reason = "gives the block its type")]
            Ok::<(), std::io::Error>(())
        };
        let (reads, watch_reads) = self.watch_reads(plan, until);
        let started = self.started;
        let dir = self.dir.clone();
        let died = died(&mut self.child, plan, &self.name, &dir);
        let met = async move {
            condition.met(reader, move || reads.load(std::sync::atomic::Ordering::Relaxed)).await
        };
        let error = tokio::select! {
            at = met => return Ok(at.into_std().duration_since(started)),
            result = tail => anyhow!("cannot read its serial log: {result:?}"),
            reason = died => anyhow!("it ended, or stands still, before it had booted: {reason}"),
            error = watch_reads => error,
            () = tokio::time::sleep(limit) => anyhow!(
                "it had not booted after {} s (waiting for {until}): give more with --time-limit, or look at it with \
                 --keep",
                limit.as_secs(),
            ),
        };
        Err(anyhow!("{error:#}{}", console(&serial_path(&dir))))
    }

    /// Its name.
    pub(super) fn name(&self) -> &HostName {
        &self.name
    }

    /// A count of the guest's reads, for [`Until::Idle`] alone, and what keeps it up to date.
    fn watch_reads(
        &self,
        plan: &Plan,
        until: &Until,
    ) -> (std::sync::Arc<std::sync::atomic::AtomicU64>, impl Future<Output = anyhow::Error> + use<>) {
        let reads = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
        let count = std::sync::Arc::clone(&reads);
        let wanted = matches!(until, Until::Idle(_));
        let (socket, name) = (plan.store.dir().join(CONTROL_SOCKET), self.name.clone());
        let watch = async move {
            if !wanted {
                return std::future::pending().await;
            }
            loop {
                let asked = async {
                    let mut client = Client::connect(&socket).await?;
                    client.call(&Request::OverlayShow { name: name.clone() }).await
                };
                match asked.await {
                    Ok(Reply::Overlay(info)) => count.store(info.reads, std::sync::atomic::Ordering::Relaxed),
                    Ok(_) => return anyhow!("the daemon answered out of turn"),
                    Err(error) => return error.into(),
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        (reads, watch)
    }
}

/// The last bytes of a log, which may be of any length; none where it cannot be read.
fn end_of(log: &Path) -> Vec<u8> {
    let mut bytes = vec![0; 64 << 10];
    let read = std::fs::File::open(log).and_then(|file| {
        let from = file.metadata()?.len().saturating_sub(bytes.len() as u64);
        file.read_at(&mut bytes, from)
    });
    bytes.truncate(read.unwrap_or(0));
    bytes
}

/// The last lines of a guest's console, to follow an error; nothing when it is empty.
fn console(serial: &Path) -> String {
    let bytes = end_of(serial);
    // It may hold anything, terminal codes too.
    let text = String::from_utf8_lossy(&bytes);
    let clean = |line: &str| line.chars().filter(|letter| !letter.is_control()).take(200).collect::<String>();
    let mut lines: Vec<String> =
        text.lines().rev().map(clean).filter(|line| !line.trim().is_empty()).take(LINES_SHOWN).collect();
    lines.push("its console's last lines:".to_owned());
    match lines.len() {
        1 => "\nits console is empty: a guest writes there with console=ttyS0 on its kernel's command line"
            .to_owned(),
        _ => lines.iter().rev().fold(String::new(), |text, line| text + "\n  " + line),
    }
}

/// Ends a guest and removes what belongs to it, but for an overlay that was there before.
pub(super) async fn undo(plan: &Plan, name: &HostName) {
    let dir = plan.store.vm_dir(name);
    if let Err(error) = end(&plan.store, name).await {
        eprintln!("{name}: {error:#}");
    }
    if let Err(error) = attach::forget(plan.store.dir(), name.as_str()).await {
        eprintln!("{name}: {error}");
    }
    let removed = async {
        let mut client = plan.client().await?;
        let _ = client.call(&Request::VmClose { name: name.clone() }).await;
        let _ = std::fs::remove_dir_all(&dir);
        if !plan.kept.contains_key(name) {
            client.call(&Request::OverlayRemove { name: name.clone() }).await?;
        }
        anyhow::Ok(())
    };
    if let Err(error) = removed.await {
        eprintln!("{name}: its overlay stays: {error:#}");
    }
}

/// Whether the store's guest of that name runs, as far as its record says.
pub(super) async fn runs(store: &Store, name: &HostName) -> anyhow::Result<bool> {
    let dir = store.vm_dir(name);
    match VmRecord::read(&dir)?.map(|record| record.runner) {
        None => Ok(false),
        Some(Runner::Libvirt { uri }) => {
            Ok(Libvirt::new(uri).is_running(&Domain::uuid(store.dir(), name)).await?)
        }
        Some(Runner::Qemu { pid }) => Ok(is_qemu_of(pid, &dir)),
    }
}

/// Whether the process with that id is the QEMU that was started for the VM in `dir`.
fn is_qemu_of(pid: u32, dir: &Path) -> bool {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let needle = serial_path(dir);
    let needle = needle.as_os_str().as_encoded_bytes();
    line.windows(needle.len()).any(|window| window == needle)
}

/// Refuses a VM that runs and that `boot` did not start, as those of an agent are: only its own side knows how to end it,
/// and without its disk it would be lost.
pub(super) async fn check_ours(store: &Store, client: &mut Client, name: &HostName) -> anyhow::Result<()> {
    if VmRecord::read(&store.vm_dir(name))?.is_some() {
        return Ok(());
    }
    loop {
        let Reply::Status(status) = client.call(&Request::Status).await? else {
            bail!("the daemon answered out of turn");
        };
        if status.overlays.iter().any(|overlay| overlay.name == *name && overlay.connections > 0) {
            bail!(
                "VM '{name}' runs, and `boot` did not start it: `bootcache end TASK` ends what a plan started"
            );
        }
        let has_socket = status.vms.iter().any(|vm| vm.name == *name);
        if !has_socket || status.uptime_seconds >= RETURN_SECONDS {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Lets the store's guest of that name shut down, if it runs, and forgets its domain. One that takes longer than `patience`
/// is ended, and said to be.
///
/// # Errors
/// It stands still, or has something that would be lost, such as its memory on disk or writes in a snapshot.
pub(super) async fn shut_down(store: &Store, name: &HostName, patience: Duration) -> anyhow::Result<()> {
    let dir = store.vm_dir(name);
    let Some(record) = VmRecord::read(&dir)? else { return Ok(()) };
    let asked = match &record.runner {
        Runner::Libvirt { uri } => {
            let (libvirt, uuid) = (Libvirt::new(uri), Domain::uuid(store.dir(), name));
            if let Some(what) = libvirt.would_lose(&uuid, name).await? {
                bail!("{what}; `bootcache stop --force {name}` ends it without");
            }
            let asked = libvirt.shut_down(&uuid);
            tokio::time::timeout(patience.max(ANSWER), asked).await.map_err(|_| {
                anyhow!(
                    "libvirt does not answer for '{name}': its QEMU or libvirtd hangs; try `stop --force`"
                )
            })??
        }
        Runner::Qemu { pid } if !is_qemu_of(*pid, &dir) => ShutDown::Off,
        Runner::Qemu { .. } => qmp::shut_down(&qmp_path(&dir)).await.with_context(|| {
            format!("VM '{name}' cannot be asked to shut down: `stop --force` ends it at once")
        })?,
    };
    match asked {
        ShutDown::Off => {}
        ShutDown::Paused => {
            let resume = match &record.runner {
                Runner::Libvirt { .. } => format!("let it go on (`virsh resume {name}`), or "),
                Runner::Qemu { .. } => String::new(),
            };
            bail!(
                "VM '{name}' is paused, and can write nothing before it ends: {resume}end it as it is with \
                 `bootcache stop --force {name}`"
            )
        }
        ShutDown::Asked => {
            let deadline = Instant::now() + patience;
            while runs(store, name).await? {
                if Instant::now() >= deadline {
                    eprintln!("{name} did not shut down within {} s: it is ended", patience.as_secs());
                    break;
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    end(store, name).await
}

/// Ends the store's guest of that name at once, if it runs, and forgets its domain.
pub(super) async fn end(store: &Store, name: &HostName) -> anyhow::Result<()> {
    let dir = store.vm_dir(name);
    match VmRecord::read(&dir)?.map(|record| record.runner) {
        None => Ok(()),
        Some(Runner::Libvirt { uri }) => {
            Ok(Libvirt::new(uri).delete(&Domain::uuid(store.dir(), name)).await?)
        }
        Some(Runner::Qemu { pid }) => end_process(pid, &dir).await,
    }
}

/// What a guest that went off by itself would lose if it were made again on its overlay, as a sentence; none when nothing.
pub(super) async fn would_lose(store: &Store, name: &HostName) -> anyhow::Result<Option<String>> {
    match VmRecord::read(&store.vm_dir(name))?.map(|record| record.runner) {
        Some(Runner::Libvirt { uri }) => {
            Ok(Libvirt::new(uri).would_lose(&Domain::uuid(store.dir(), name), name).await?)
        }
        _ => Ok(None),
    }
}

/// Refuses an overlay that somebody has open though its guest has ended here: it was migrated, and runs elsewhere.
pub(super) async fn check_unused(client: &mut Client, name: &HostName) -> anyhow::Result<()> {
    for _ in 0..50 {
        match client.call(&Request::OverlayShow { name: name.clone() }).await {
            Ok(Reply::Overlay(info)) if info.connections > 0 => {}
            Ok(_) | Err(ControlError::Refused(_)) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    bail!("VM '{name}' has ended here, and something else has its disk open: was it migrated? End that first")
}

/// Ends the QEMU with that process id, if that is still the one that was started for the VM in `dir`.
async fn end_process(pid: u32, dir: &Path) -> anyhow::Result<()> {
    use rustix::process::{Pid, Signal, kill_process};
    let Some(target) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(()) };
    for signal in [Signal::TERM, Signal::KILL] {
        if !is_qemu_of(pid, dir) {
            return Ok(());
        }
        let _ = kill_process(target, signal);
        for _ in 0..100 {
            if !is_qemu_of(pid, dir) {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    bail!("QEMU (process {pid}) does not end")
}

/// Attaches a guest's disk, through its own socket; gives the path of the device.
async fn attached(plan: &Plan, name: &HostName, vm: &VmInfo) -> anyhow::Result<PathBuf> {
    let (program, options) = (super::daemon::program()?, attach::Options::of_vm(name, vm.socket.clone()));
    Ok(attach::start(&program, plan.store.dir(), &options).await?.device.path())
}

fn domain_xml(
    plan: &Plan,
    name: &HostName,
    vm: &VmInfo,
    device: Option<PathBuf>,
    serial: PathBuf,
) -> anyhow::Result<String> {
    let emulator = install_emulator(plan.store.dir())?;
    let mut interfaces: Vec<Interface> = Vec::new();
    interfaces.extend(plan.nat.then(|| Interface {
        bridge: None,
        mac: Some(qemu::FIRST_MAC.to_owned()),
        tap: None,
        mtu: None,
    }));
    interfaces.extend(plan.bridges.iter().map(|bridge| Interface {
        bridge: Some(bridge.clone()),
        mac: None,
        tap: None,
        mtu: None,
    }));
    let domain = Domain {
        name: name.clone(),
        memory_mib: plan.memory_mib,
        cpus: plan.cpus,
        accelerator: plan.accelerator,
        emulator,
        disk: match device {
            Some(path) => DomainDisk::Block(path),
            None => DomainDisk::Nbd { socket: vm.socket.clone(), export: vm.export.clone() },
        },
        interfaces,
        serial,
        facts: Vec::new(),
        guest_agent: false,
    };
    Ok(domain.to_xml(plan.store.dir()))
}

/// Starts a plain QEMU that outlives this process, and writes down which one it is.
async fn start_qemu(
    plan: &Plan,
    vm: &VmInfo,
    device: Option<PathBuf>,
    dir: &Path,
    serial: PathBuf,
) -> anyhow::Result<tokio::process::Child> {
    let machine = Machine {
        disk: match device {
            Some(path) => qemu::Disk::Block(path),
            None => qemu::Disk::Nbd {
                socket: vm.socket.clone(),
                export: vm.export.clone(),
                reconnect_s: RECONNECT_SECONDS,
            },
        },
        aio: Aio::default(),
        memory_mib: plan.memory_mib,
        cpus: plan.cpus,
        accelerator: plan.accelerator,
        serial: Serial::File(serial),
        qmp: Some(qmp_path(dir)),
        reboots: true,
        arguments: plan.qemu_arguments.clone(),
    };
    let log = open_log(&qemu_log_path(dir), None)?;
    let mut command = std::process::Command::new(qemu::PROGRAM);
    command.args(machine.arguments()).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    command.process_group(0);
    let mut child = tokio::process::Command::from(command)
        .spawn()
        .with_context(|| format!("cannot start {}: is it installed?", qemu::PROGRAM))?;
    let pid = child.id().context("QEMU ended at once")?;
    if let Err(error) = VmRecord::new(plan.image.clone(), Runner::Qemu { pid }).write(dir) {
        // Nobody would find it again, and another VM of its name would get its writes.
        let _ = child.kill().await;
        return Err(error).context("cannot write down which process QEMU is");
    }
    Ok(child)
}

/// Resolves when the guest has ended, with the reason.
async fn died(child: &mut Option<tokio::process::Child>, plan: &Plan, name: &HostName, dir: &Path) -> String {
    if let Some(child) = child {
        let said = || end_of(&qemu_log_path(dir));
        let status = loop {
            match tokio::time::timeout(Duration::from_secs(1), child.wait()).await {
                Ok(status) => break status,
                Err(_) if accelerator::gave_up(&said()) => {
                    return "KVM cannot run it on this host (QEMU: KVM internal error): --accel tcg runs it \
                            without KVM"
                        .to_owned();
                }
                Err(_) => {}
            }
        };
        let log = String::from_utf8_lossy(&said()).into_owned();
        let last = log.lines().last().unwrap_or_default();
        return match status {
            Ok(status) if status.success() && last.is_empty() => "the guest went off".to_owned(),
            Ok(status) => format!("QEMU, {status} {last}"),
            Err(error) => error.to_string(),
        };
    }
    let Some((libvirt, _)) = &plan.libvirt else { return std::future::pending().await };
    let uuid = Domain::uuid(plan.store.dir(), name);
    let mut stood = false;
    loop {
        tokio::time::sleep(Duration::from_secs(2)).await;
        let seen = match libvirt.is_running(&uuid).await {
            Ok(true) => libvirt.stands_still(&uuid).await,
            Ok(false) => return "the domain is off (see its log in /var/log/libvirt/qemu)".to_owned(),
            Err(error) => Err(error),
        };
        match seen {
            // Some of what libvirt does stops a guest for a moment.
            Ok(Some(why)) if stood => {
                return format!(
                    "{why} (see its log in /var/log/libvirt/qemu; where that says KVM internal error, --accel tcg runs \
                     it without KVM)"
                );
            }
            Ok(still) => stood = still.is_some(),
            Err(error) => return error.to_string(),
        }
    }
}
