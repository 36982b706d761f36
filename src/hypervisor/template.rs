//! A user's own domain XML with named places, filled for one instance.
//!
//! | place | what stands there afterwards |
//! |---|---|
//! | `@NAME@` `@UUID@` | what libvirt knows the domain by; in `<name>` and `<uuid>` |
//! | `@DISK@` | the `<disk>` element: an NBD export on a socket, or a `/dev/nbdX`, as the plan says |
//! | `@NICS@` | an `<interface>` element for each interface |
//! | `@FACTS@` | the `<sysinfo>` element; wants `<smbios mode='sysinfo'/>` in `<os>` |
//! | `@TYPE@` | `kvm` or `qemu` |
//! | `@MEMORY_MIB@` `@CPUS@` `@EMULATOR@` `@SERIAL@` | numbers and paths |
//!
//! The first four must be there, and an unknown one is an error. Values are escaped, so that they stay one value
//! wherever they land, and the result is read again: it must be XML, a domain, and this one.

use std::path::Path;

use quick_xml::Reader;
use quick_xml::escape::escape;
use quick_xml::events::Event;

use super::domain::{Domain, DomainDisk};
use crate::qemu::Accelerator;

/// Places without which the instance would not be the one that was asked for.
const NEEDED: [&str; 4] = ["NAME", "UUID", "DISK", "NICS"];
/// The longest template that is taken, in bytes.
pub const TEMPLATE_BYTES_MAX: usize = 256 << 10;

/// What is wrong with a template.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// It is longer than [`TEMPLATE_BYTES_MAX`].
    #[error("the template is longer than {TEMPLATE_BYTES_MAX} bytes")]
    TooLong,
    /// A place that has no meaning.
    #[error("the template's line {line}: @{place}@ is no place that is known")]
    Unknown {
        /// Its name.
        place: String,
        /// Counted from 1.
        line: usize,
    },
    /// A place that must be there.
    #[error("the template has no @{0}@")]
    Missing(&'static str),
    /// An element would land where no element can be.
    #[error("the template's @{0}@ stands for elements, and must stand between elements")]
    Misplaced(&'static str),
    /// What comes of it is no XML.
    #[error("the template is not XML: {0}")]
    NotXml(String),
    /// What comes of it is XML, but not this domain.
    #[error("the template's <domain> must have <name>@NAME@</name> and <uuid>@UUID@</uuid>")]
    NotTheDomain,
}

/// Whether a template can be filled, whatever the domain.
pub fn check(template: &str) -> Result<(), TemplateError> {
    let any = Domain {
        name: "any".parse().expect("it is a name"),
        memory_mib: 1,
        cpus: 1,
        accelerator: Accelerator::Tcg,
        emulator: "/any".into(),
        disk: DomainDisk::Block("/any".into()),
        interfaces: Vec::new(),
        serial: "/any".into(),
        facts: Vec::new(),
        guest_agent: false,
    };
    fill(template, &any, Path::new("/any")).map(drop)
}

/// Fills a template for the owner's domain.
pub fn fill(template: &str, domain: &Domain, owner: &Path) -> Result<String, TemplateError> {
    if template.len() > TEMPLATE_BYTES_MAX {
        return Err(TemplateError::TooLong);
    }
    for place in ["DISK", "NICS", "FACTS"] {
        stands_between_elements(template, place)?;
    }
    let (name, uuid) = (domain.name.to_string(), Domain::uuid(owner, &domain.name));
    let place = regex::Regex::new("@([A-Z][A-Z_]*)@").expect("the pattern is valid");
    let mut filled = String::with_capacity(template.len() + 2048);
    let (mut end, mut missing) = (0, NEEDED.to_vec());
    for found in place.captures_iter(template) {
        let (whole, word) = (found.get(0).expect("it matched"), &found[1]);
        let path = |path: &Path| escape(path.to_string_lossy()).into_owned();
        let value = match word {
            "NAME" => escape(name.as_str()).into_owned(),
            "UUID" => uuid.clone(),
            "DISK" => domain.disk_xml(),
            "NICS" => domain.interfaces_xml(),
            "FACTS" => domain.facts_xml(),
            "TYPE" => domain.kind().to_owned(),
            "MEMORY_MIB" => domain.memory_mib.to_string(),
            "CPUS" => domain.cpus.to_string(),
            "EMULATOR" => path(&domain.emulator),
            "SERIAL" => path(&domain.serial),
            _ => {
                let line = template[..whole.start()].lines().count().max(1);
                return Err(TemplateError::Unknown { place: word.to_owned(), line });
            }
        };
        missing.retain(|needed| *needed != word);
        filled.push_str(&template[end..whole.start()]);
        filled.push_str(&value);
        end = whole.end();
    }
    filled.push_str(&template[end..]);
    match missing.first() {
        Some(place) => Err(TemplateError::Missing(place)),
        None if is_domain(&filled, &name, &uuid)? => Ok(filled),
        None => Err(TemplateError::NotTheDomain),
    }
}

/// Every occurrence of a place for elements must be text, by itself.
fn stands_between_elements(template: &str, place: &'static str) -> Result<(), TemplateError> {
    let needle = format!("@{place}@");
    let mut reader = Reader::from_str(template);
    let mut between = 0;
    loop {
        match reader.read_event().map_err(|error| TemplateError::NotXml(error.to_string()))? {
            Event::Eof => break,
            Event::Text(text) => between += String::from_utf8_lossy(&text).matches(&*needle).count(),
            _ => {}
        }
    }
    if between == template.matches(&*needle).count() { Ok(()) } else { Err(TemplateError::Misplaced(place)) }
}

/// Whether this is XML, and a domain of that name and UUID.
fn is_domain(xml: &str, name: &str, uuid: &str) -> Result<bool, TemplateError> {
    let not_xml = |error: &dyn std::fmt::Display| TemplateError::NotXml(error.to_string());
    let mut reader = Reader::from_str(xml);
    let mut path: Vec<String> = Vec::new();
    let (mut names, mut uuids) = (Vec::new(), Vec::new());
    loop {
        match reader.read_event().map_err(|error| not_xml(&error))? {
            Event::Eof => break,
            Event::Start(tag) => {
                for attribute in tag.attributes() {
                    attribute.map_err(|error| not_xml(&error))?;
                }
                path.push(String::from_utf8_lossy(tag.name().as_ref()).into_owned());
            }
            Event::End(_) => drop(path.pop()),
            Event::Text(text) => match path.iter().map(String::as_str).collect::<Vec<_>>()[..] {
                ["domain", "name"] => names.push(String::from_utf8_lossy(&text).trim().to_owned()),
                ["domain", "uuid"] => uuids.push(String::from_utf8_lossy(&text).trim().to_owned()),
                _ => {}
            },
            _ => {}
        }
    }
    if !path.is_empty() {
        return Err(TemplateError::NotXml(format!("<{}> is not closed", path.join("><"))));
    }
    Ok(names == [name] && uuids == [uuid])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::domain::Interface;

    const TEMPLATE: &str = "<domain type='@TYPE@'>\n<name>@NAME@</name><uuid>@UUID@</uuid>\n\
        <memory unit='MiB'>@MEMORY_MIB@</memory><vcpu>@CPUS@</vcpu>@FACTS@\n\
        <devices><emulator>@EMULATOR@</emulator>@DISK@ @NICS@\n\
        <serial type='file'><source path='@SERIAL@'/></serial></devices></domain>";

    fn domain() -> Domain {
        Domain {
            name: "vm-1".parse().unwrap(),
            memory_mib: 128,
            cpus: 2,
            accelerator: Accelerator::Tcg,
            emulator: "/bin/qemu".into(),
            disk: DomainDisk::Nbd { socket: "/s/nbd.sock".into(), export: "vm-1".into() },
            interfaces: vec![Interface {
                bridge: Some("br-lab".into()),
                mac: Some("52:54:00:00:00:01".into()),
                tap: None,
                mtu: None,
            }],
            serial: "/s/'/><evil a='&.log".into(),
            facts: vec![("instance".into(), "vm-1".into())],
            guest_agent: true,
        }
    }

    fn filled(template: &str) -> Result<String, TemplateError> {
        fill(template, &domain(), Path::new("/s"))
    }

    #[test]
    fn every_place_is_filled_and_no_value_becomes_markup() {
        let xml = filled(TEMPLATE).unwrap();
        for part in
            ["type='qemu'", "<vcpu>2</vcpu>", "52:54:00:00:00:01", "/s/nbd.sock", "bootcache:instance=vm-1"]
        {
            assert!(xml.contains(part), "{part}: {xml}");
        }
        assert!(!xml.contains('@') && !xml.contains("<evil"), "{xml}");
        assert!(xml.contains(&Domain::uuid(Path::new("/s"), &domain().name)));
    }

    #[test]
    fn the_place_for_the_disk_takes_a_device_too() {
        let domain = Domain { disk: DomainDisk::Block("/dev/nbd0".into()), ..domain() };
        let xml = fill(TEMPLATE, &domain, Path::new("/s")).unwrap();
        assert!(xml.contains("<source dev=\"/dev/nbd0\"/>") && !xml.contains("nbd.sock"), "{xml}");
    }

    #[test]
    fn a_template_that_would_not_be_the_instance_is_refused() {
        let cases = [
            (TEMPLATE.replace("@DISK@", ""), TemplateError::Missing("DISK")),
            (TEMPLATE.replace("@CPUS@", "@CPU@"), TemplateError::Unknown { place: "CPU".into(), line: 3 }),
            (TEMPLATE.replace("@SERIAL@", "@DISK@"), TemplateError::Misplaced("DISK")),
            (TEMPLATE.replace("@DISK@", "<!-- @DISK@ -->"), TemplateError::Misplaced("DISK")),
            (TEMPLATE.replace("<name>@NAME@", "<name>x-@NAME@"), TemplateError::NotTheDomain),
            (TEMPLATE.replace("domain", "network"), TemplateError::NotTheDomain),
            (" ".repeat(TEMPLATE_BYTES_MAX + 1), TemplateError::TooLong),
        ];
        for (template, expected) in cases {
            assert_eq!(check(&template).unwrap_err(), expected, "{template}");
            assert_eq!(filled(&template).unwrap_err(), expected, "{template}");
        }
        for broken in [&TEMPLATE[..TEMPLATE.len() - 9], &TEMPLATE.replace("</vcpu>", "</cpu>")] {
            assert!(matches!(filled(broken), Err(TemplateError::NotXml(_))), "{broken}");
        }
    }
}
