//! A guest as libvirt's domain XML (<https://libvirt.org/formatdomain.html>).
//!
//! Written by an XML writer that escapes, so nothing that a user or a plan says becomes markup.

use std::io::Cursor;
use std::path::{Path, PathBuf};

use quick_xml::Writer;
use quick_xml::events::{BytesDecl, BytesText, Event};

use crate::name::HostName;
use crate::qemu::Accelerator;

/// Where a domain's disk is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DomainDisk {
    /// An NBD export on a Unix socket.
    Nbd {
        /// The socket.
        socket: PathBuf,
        /// The export's name.
        export: String,
    },
    /// A block device of the host, such as `/dev/nbd0`.
    Block(PathBuf),
}

/// A guest to be.
#[derive(Debug, Clone)]
pub struct Domain {
    /// Its name.
    pub name: HostName,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Virtual processors.
    pub cpus: u32,
    /// What runs the guest's code.
    pub accelerator: Accelerator,
    /// The program that runs it.
    pub emulator: PathBuf,
    /// Its disk, the first virtio one.
    pub disk: DomainDisk,
    /// Network interfaces.
    pub interfaces: Vec<Interface>,
    /// File for its first serial line.
    pub serial: PathBuf,
    /// Facts that the guest finds among the OEM strings of its SMBIOS, each as `bootcache:KEY=VALUE`.
    pub facts: Vec<(String, String)>,
    /// Whether it has a channel for QEMU's guest agent.
    pub guest_agent: bool,
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// The bridge of the host that it is on; without one it is behind QEMU's own NAT.
    pub bridge: Option<String>,
    /// Its hardware address; libvirt makes one up otherwise.
    pub mac: Option<String>,
    /// The name of the host's end, at most 15 bytes; libvirt counts them otherwise.
    pub tap: Option<String>,
    /// Largest packet in bytes, which the guest is told; without it, the bridge's.
    pub mtu: Option<u32>,
}

impl Domain {
    /// The domain's UUID: always the same for one name of one owner (a store's folder, or what cannot be a folder), so
    /// that defining it again replaces it, and that the owner knows it by that.
    pub fn uuid(owner: &Path, name: &HostName) -> String {
        let mut hasher = blake3::Hasher::new_derive_key("bootcache domain uuid v1");
        hasher.update(owner.as_os_str().as_encoded_bytes());
        hasher.update(b"\0");
        hasher.update(name.as_str().as_bytes());
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        // Version 8 (RFC 9562): the rest is ours to define.
        bytes[6] = bytes[6] & 0x0f | 0x80;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
    }

    /// The XML, for the owner's domain of that name.
    pub fn to_xml(&self, owner: &Path) -> String {
        written(|xml| self.write(xml, owner))
    }

    /// The value of the domain's `type`.
    pub(super) fn kind(&self) -> &'static str {
        match self.accelerator {
            Accelerator::Kvm => "kvm",
            Accelerator::Tcg => "qemu",
        }
    }

    /// The elements of its interfaces alone, for a template.
    pub(super) fn interfaces_xml(&self) -> String {
        written(|xml| self.interfaces(xml))
    }

    /// The element of its disk alone, for a template.
    pub(super) fn disk_xml(&self) -> String {
        written(|xml| self.disk(xml))
    }

    /// The element of its facts alone, for a template.
    pub(super) fn facts_xml(&self) -> String {
        written(|xml| self.sysinfo(xml))
    }

    fn write(&self, xml: &mut Xml, owner: &Path) -> std::io::Result<()> {
        let kind = self.kind();
        xml.write_event(Event::Decl(BytesDecl::new("1.0", Some("UTF-8"), None)))?;
        xml.create_element("domain").with_attribute(("type", kind)).write_inner_content(|xml| {
            text(xml, "name", self.name.as_str())?;
            text(xml, "uuid", &Self::uuid(owner, &self.name))?;
            text_with(xml, "memory", ("unit", "MiB"), &self.memory_mib.to_string())?;
            text(xml, "vcpu", &self.cpus.to_string())?;
            self.sysinfo(xml)?;
            xml.create_element("os").write_inner_content(|xml| {
                let kind = xml.create_element("type");
                kind.with_attributes([("arch", "x86_64"), ("machine", "pc")])
                    .write_text_content(BytesText::new("hvm"))?;
                xml.create_element("boot").with_attribute(("dev", "hd")).write_empty()?;
                if !self.facts.is_empty() {
                    xml.create_element("smbios").with_attribute(("mode", "sysinfo")).write_empty()?;
                }
                Ok(())
            })?;
            xml.create_element("features").write_inner_content(|xml| {
                xml.create_element("acpi").write_empty()?;
                Ok(())
            })?;
            if self.accelerator == Accelerator::Kvm {
                xml.create_element("cpu").with_attribute(("mode", "host-passthrough")).write_empty()?;
            }
            text(xml, "on_poweroff", "destroy")?;
            text(xml, "on_reboot", "restart")?;
            text(xml, "on_crash", "destroy")?;
            xml.create_element("devices").write_inner_content(|xml| self.devices(xml))?;
            Ok(())
        })?;
        Ok(())
    }

    fn devices(&self, xml: &mut Xml) -> std::io::Result<()> {
        text(xml, "emulator", &self.emulator.to_string_lossy())?;
        self.disk(xml)?;
        self.interfaces(xml)?;
        xml.create_element("serial").with_attribute(("type", "file")).write_inner_content(|xml| {
            let path = self.serial.to_string_lossy();
            xml.create_element("source").with_attribute(("path", path.as_ref())).write_empty()?;
            Ok(())
        })?;
        if self.guest_agent {
            xml.create_element("channel").with_attribute(("type", "unix")).write_inner_content(|xml| {
                xml.create_element("target")
                    .with_attributes([("type", "virtio"), ("name", "org.qemu.guest_agent.0")])
                    .write_empty()?;
                Ok(())
            })?;
        }
        xml.create_element("controller")
            .with_attributes([("type", "usb"), ("model", "none")])
            .write_empty()?;
        xml.create_element("memballoon").with_attribute(("model", "none")).write_empty()?;
        Ok(())
    }

    fn interfaces(&self, xml: &mut Xml) -> std::io::Result<()> {
        for nic in &self.interfaces {
            let kind = if nic.bridge.is_some() { "bridge" } else { "user" };
            let interface = xml.create_element("interface").with_attribute(("type", kind));
            interface.write_inner_content(|xml| {
                if let Some(mac) = &nic.mac {
                    xml.create_element("mac").with_attribute(("address", mac.as_str())).write_empty()?;
                }
                if let Some(bridge) = &nic.bridge {
                    let source = xml.create_element("source");
                    source.with_attribute(("bridge", bridge.as_str())).write_empty()?;
                }
                if let Some(tap) = &nic.tap {
                    xml.create_element("target").with_attribute(("dev", tap.as_str())).write_empty()?;
                }
                xml.create_element("model").with_attribute(("type", "virtio")).write_empty()?;
                if let Some(mtu) = nic.mtu {
                    let size = mtu.to_string();
                    xml.create_element("mtu").with_attribute(("size", size.as_str())).write_empty()?;
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    fn sysinfo(&self, xml: &mut Xml) -> std::io::Result<()> {
        if self.facts.is_empty() {
            return Ok(());
        }
        xml.create_element("sysinfo").with_attribute(("type", "smbios")).write_inner_content(|xml| {
            xml.create_element("oemStrings").write_inner_content(|xml| {
                for (key, value) in &self.facts {
                    text(xml, "entry", &format!("bootcache:{key}={value}"))?;
                }
                Ok(())
            })?;
            Ok(())
        })?;
        Ok(())
    }

    fn disk(&self, xml: &mut Xml) -> std::io::Result<()> {
        let kind = match &self.disk {
            DomainDisk::Nbd { .. } => "network",
            DomainDisk::Block(_) => "block",
        };
        let disk = xml.create_element("disk").with_attributes([("type", kind), ("device", "disk")]);
        disk.write_inner_content(|xml| {
            // An error of the disk stops the guest, which can go on once it is mended, and never reaches it.
            xml.create_element("driver")
                .with_attributes([
                    ("name", "qemu"),
                    ("type", "raw"),
                    ("cache", "none"),
                    ("discard", "unmap"),
                    ("error_policy", "stop"),
                    ("rerror_policy", "stop"),
                ])
                .write_empty()?;
            match &self.disk {
                DomainDisk::Nbd { socket, export } => {
                    let source = xml.create_element("source");
                    source
                        .with_attributes([("protocol", "nbd"), ("name", export.as_str())])
                        .write_inner_content(|xml| {
                            let socket = socket.to_string_lossy();
                            xml.create_element("host")
                                .with_attributes([("transport", "unix"), ("socket", socket.as_ref())])
                                .write_empty()?;
                            Ok(())
                        })?;
                }
                DomainDisk::Block(path) => {
                    let path = path.to_string_lossy();
                    xml.create_element("source").with_attribute(("dev", path.as_ref())).write_empty()?;
                }
            }
            xml.create_element("target")
                .with_attributes([("dev", "vda"), ("bus", "virtio")])
                .write_empty()?;
            Ok(())
        })?;
        Ok(())
    }
}

/// What is written to.
type Xml = Writer<Cursor<Vec<u8>>>;

fn written(write: impl FnOnce(&mut Xml) -> std::io::Result<()>) -> String {
    let mut writer = Writer::new_with_indent(Cursor::new(Vec::new()), b' ', 2);
    write(&mut writer).expect("writing to memory does not fail");
    String::from_utf8(writer.into_inner().into_inner()).expect("only UTF-8 was written")
}

fn text(xml: &mut Xml, name: &str, content: &str) -> std::io::Result<()> {
    xml.create_element(name).write_text_content(BytesText::new(content))?;
    Ok(())
}

fn text_with(xml: &mut Xml, name: &str, attribute: (&str, &str), content: &str) -> std::io::Result<()> {
    xml.create_element(name).with_attribute(attribute).write_text_content(BytesText::new(content))?;
    Ok(())
}

/// How long QEMU waits for a data plane that went away, in seconds.
pub const RECONNECT_SECONDS: u32 = 3600;

/// Writes [`reconnecting_emulator`] for the QEMU of this host to a file in `folder`, and returns the file.
pub fn install_emulator(folder: &Path) -> std::io::Result<PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    const MODE: u32 = 0o755;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let program = std::env::split_paths(&path)
        .map(|dir| dir.join(crate::qemu::PROGRAM))
        .find(|file| file.is_file())
        .ok_or_else(|| std::io::Error::other(format!("{} is not installed", crate::qemu::PROGRAM)))?;
    let script = reconnecting_emulator(&program, RECONNECT_SECONDS);
    let emulator = folder.join("qemu-reconnect");
    // Written whole, since others may be starting a guest with it, and only when it changes: libvirt probes an emulator anew when its time of change is another.
    let is_so = || {
        let mode = std::fs::metadata(&emulator).ok()?.permissions().mode() & 0o777;
        Some(mode == MODE && std::fs::read_to_string(&emulator).ok()? == script)
    };
    if is_so() != Some(true) {
        crate::store::write_atomic_as(&emulator, script.as_bytes(), MODE)?;
    }
    Ok(emulator)
}

/// An emulator that gives every NBD disk a delay to reconnect, as a shell script.
///
/// libvirt 9.0 drops `<reconnect>` for NBD, so its line to QEMU is changed on the way. QEMU waits `seconds` for a
/// server that went away before it lets a request fail.
pub fn reconnecting_emulator(program: &Path, seconds: u32) -> String {
    let program = program.to_string_lossy().replace('\'', r"'\''");
    format!(
        r#"#!/bin/sh
# QEMU as bootcache has libvirt start it: NBD disks wait up to {seconds} s for their server to come back.
count=$#
while [ "$count" -gt 0 ]; do
	word=$1
	shift
	case $word in
	'{{"driver":"nbd",'*)
		word='{{"driver":"nbd","reconnect-delay":{seconds},"open-timeout":{seconds},'${{word#'{{"driver":"nbd",'}} ;;
	esac
	set -- "$@" "$word"
	count=$((count - 1))
done
exec '{program}' "$@"
"#
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domain() -> Domain {
        Domain {
            name: "vm-1".parse().unwrap(),
            memory_mib: 512,
            cpus: 1,
            accelerator: Accelerator::Tcg,
            emulator: "/usr/bin/qemu-system-x86_64".into(),
            disk: DomainDisk::Nbd { socket: "/s/'<&>\".sock".into(), export: "vm-1".into() },
            interfaces: vec![Interface {
                bridge: Some("br0\"/><evil/>".into()),
                mac: None,
                tap: None,
                mtu: Some(1450),
            }],
            serial: "/s/serial.log".into(),
            facts: vec![("address".into(), "</entry><evil/>".into())],
            guest_agent: true,
        }
    }

    #[test]
    fn nothing_in_a_description_becomes_markup() {
        let xml = domain().to_xml(Path::new("/s"));
        assert!(!xml.contains("<evil") && xml.contains("<mtu size=\"1450\"/>"), "{xml}");
        let mut reader = quick_xml::Reader::from_str(&xml);
        loop {
            match reader.read_event().unwrap() {
                Event::Eof => break,
                Event::Start(tag) | Event::Empty(tag) => {
                    for attribute in tag.attributes() {
                        attribute.unwrap();
                    }
                }
                _ => {}
            }
        }
    }

    #[test]
    fn a_disk_is_an_export_on_a_socket_or_a_device_and_its_errors_stop_the_guest_either_way() {
        let export = domain().disk_xml();
        let device = Domain { disk: DomainDisk::Block("/dev/nbd7".into()), ..domain() }.disk_xml();
        assert!(export.contains("<disk type=\"network\" device=\"disk\">"), "{export}");
        assert!(export.contains("<source protocol=\"nbd\" name=\"vm-1\">"), "{export}");
        assert!(device.contains("<disk type=\"block\" device=\"disk\">"), "{device}");
        assert!(device.contains("<source dev=\"/dev/nbd7\"/>") && !device.contains("socket"), "{device}");
        for xml in [export, device] {
            let driver = xml.lines().find(|line| line.contains("<driver")).unwrap().to_owned();
            for part in ["type=\"raw\"", "cache=\"none\"", "error_policy=\"stop\"", "rerror_policy=\"stop\""]
            {
                assert!(driver.contains(part), "{part}: {driver}");
            }
            assert!(xml.contains("<target dev=\"vda\" bus=\"virtio\"/>"), "{xml}");
        }
    }

    #[test]
    fn the_uuid_is_the_store_s_and_the_name_s() {
        let name = |text: &str| text.parse::<HostName>().unwrap();
        let uuid = |store: &str, text| Domain::uuid(Path::new(store), &name(text));
        assert_eq!(uuid("/a", "vm"), uuid("/a", "vm"));
        assert_ne!(uuid("/a", "vm"), uuid("/b", "vm"));
        assert_ne!(uuid("/a", "vm"), uuid("/a", "vm2"));
        assert_eq!(uuid("/a", "vm").len(), 36);
    }

    #[test]
    fn an_emulator_that_lost_its_permissions_is_made_anew_and_one_that_is_as_it_should_be_stays() {
        use std::os::unix::fs::{MetadataExt, PermissionsExt};
        let dir = tempfile::tempdir().unwrap();
        let Ok(emulator) = install_emulator(dir.path()) else {
            assert!(std::env::var_os("CI").is_none(), "{} is not installed", crate::qemu::PROGRAM);
            return eprintln!("SKIPPED: {} is not installed", crate::qemu::PROGRAM);
        };
        let is = || std::fs::metadata(&emulator).map(|data| (data.ino(), data.mode() & 0o777)).unwrap();
        let first = is();
        assert_eq!(first.1, 0o755);
        install_emulator(dir.path()).unwrap();
        assert_eq!(is(), first, "libvirt would probe it anew");
        std::fs::set_permissions(&emulator, std::fs::Permissions::from_mode(0o644)).unwrap();
        install_emulator(dir.path()).unwrap();
        assert_eq!(is().1, 0o755);
    }

    #[test]
    fn the_emulator_changes_nbd_disks_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let script = dir.path().join("emulator");
        std::fs::write(&script, reconnecting_emulator(Path::new("/bin/echo"), 30)).unwrap();
        let output = std::process::Command::new("sh")
            .arg(&script)
            .args(["-name", "a  b'c", r#"{"driver":"nbd","server":1}"#, r#"{"driver":"raw"}"#])
            .output()
            .unwrap();
        let expected = concat!(
            "-name a  b'c {\"driver\":\"nbd\",\"reconnect-delay\":30,\"open-timeout\":30,\"server\":1} ",
            "{\"driver\":\"raw\"}\n"
        );
        assert_eq!(String::from_utf8_lossy(&output.stdout), expected);
    }
}
