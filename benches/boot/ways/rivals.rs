//! What one would use instead, each in the best setting that its manual tells.

use std::path::PathBuf;
use std::process::Command;

use super::super::boot::Prepared;
use super::super::drive::Drive;
use super::super::lab::{Lab, Server};
use super::super::support;
use super::{text, with_servers, without_servers};

const NBD_PORT: u16 = 10809;
const NFS_PORT: u16 = 2049;

/// The raw disk in the node's page cache.
pub(super) fn local(_lab: &Lab) -> Prepared {
    without_servers(|lab, _| Drive::Raw(lab.raw.clone()))
}

/// qemu-nbd at the origin.
fn origin_qemu_nbd(lab: &Lab) -> Server {
    let origin = lab.origin();
    let arguments = ["--read-only", "-f", "raw", "--persistent", "--shared=64", "--cache=writeback"];
    let place = ["-b", &origin, "-p", "10809", text(&lab.raw)];
    lab.server(0, NBD_PORT, "qemu-nbd", &[&arguments[..], &place].concat())
}

/// QEMU straight to qemu-nbd at the origin; its writes go to a snapshot on the node.
pub(super) fn qemu_nbd(lab: &Lab) -> Prepared {
    let origin = lab.origin();
    with_servers(vec![origin_qemu_nbd(lab)], move |_, _| Drive::Tcp(origin.clone()))
}

/// nbdkit at the origin.
fn origin_nbdkit(lab: &Lab) -> Server {
    let origin = lab.origin();
    lab.server(0, NBD_PORT, "nbdkit", &["-f", "-r", "-i", &origin, "-p", "10809", "file", text(&lab.raw)])
}

/// QEMU straight to nbdkit at the origin.
pub(super) fn nbdkit(lab: &Lab) -> Prepared {
    let origin = lab.origin();
    with_servers(vec![origin_nbdkit(lab)], move |_, _| Drive::Tcp(origin.clone()))
}

/// nbdkit on the node in front of nbdkit at the origin, with filters on the node.
pub(super) fn nbdkit_on_node(lab: &Lab, filters: &[&str], parameters: &[&str]) -> Prepared {
    let mut servers = vec![origin_nbdkit(lab)];
    let hostname = format!("hostname={}", lab.origin());
    let sockets: Vec<PathBuf> = (1..=lab.nodes).map(|node| lab.fresh(&format!("nbdkit-{node}"))).collect();
    for (node, socket) in (1..).zip(&sockets) {
        let mut arguments = vec!["-f", "-r", "-U", text(socket)];
        arguments.extend(filters);
        arguments.extend(["nbd", &hostname, "port=10809"]);
        arguments.extend(parameters);
        servers.push(lab.socket_server(node, socket, "nbdkit", &arguments));
    }
    with_servers(servers, move |_, node| Drive::Unix(sockets[node - 1].clone(), String::new()))
}

/// A qcow2 file on the node whose backing is qemu-nbd at the origin; what is read is kept.
pub(super) fn qcow2_copy_on_read(lab: &Lab) -> Prepared {
    with_servers(vec![origin_qemu_nbd(lab)], |lab, node| {
        let overlay = lab.fresh("overlay.qcow2");
        let backing = format!("nbd://{}:{NBD_PORT}", lab.origin());
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", &backing]).arg(&overlay);
        lab.run(node, &create);
        let drive = format!("file={},format=qcow2,copy-on-read=on", overlay.display());
        let file = "driver=copy-on-read,file.driver=qcow2,file.file.driver=file,file.file.filename";
        let export = vec!["--image-opts".to_owned(), format!("{file}={}", overlay.display())];
        Drive::Qemu { drive, export }
    })
}

/// NFS by nfs-ganesha at the origin and QEMU's own client on the node (libnfs), which speaks version 3: both in user
/// space, so that it runs where the kernel has no NFS.
pub(super) fn nfs(lab: &Lab) -> Prepared {
    let folder = lab.raw.parent().expect("it is in the image's folder");
    let configuration = lab.folder().join("ganesha.conf");
    let export = format!(
        "NFS_CORE_PARAM {{ Protocols = 3; mount_path_pseudo = false; Enable_NLM = false; Enable_RQUOTA = false; \
         MNT_Port = 20048; }}\n\
         EXPORT {{ Export_Id = 1; Path = {0}; Pseudo = {0}; Access_Type = RO; Squash = No_Root_Squash; \
         SecType = sys; Protocols = 3; Transports = TCP; FSAL {{ Name = VFS; }} }}\n",
        folder.display()
    );
    std::fs::write(&configuration, export).expect("a temporary file");
    // rpcbind and the server want places of their own below /run.
    let start = format!(
        "mount -t tmpfs tmpfs /run; mkdir -p /run/rpcbind /run/ganesha; rpcbind -f -i & sleep 0.3; \
         exec ganesha.nfsd -F -f {} -L {}/ganesha.log -p /run/ganesha.pid",
        configuration.display(),
        lab.folder().display()
    );
    let arguments =
        ["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--", "bash", "-c", &start];
    let server = lab.server(0, NFS_PORT, "unshare", &arguments);
    let file = format!(
        "driver=raw,file.driver=nfs,file.server.type=inet,file.server.host={},file.path={},\
         file.readahead-size=131072,file.page-cache-size=8192",
        lab.origin(),
        text(&lab.raw)
    );
    with_servers(vec![server], move |_, _| Drive::Qemu {
        drive: format!("snapshot=on,{file}"),
        export: vec!["--read-only".to_owned(), "--image-opts".to_owned(), file.clone()],
    })
}

/// The whole disk first, its holes skipped.
pub(super) fn nbdcopy(lab: &Lab) -> Prepared {
    with_servers(vec![origin_nbdkit(lab)], |lab, node| {
        let disk = lab.folder().join("copied.raw");
        let _from_the_round_before = std::fs::remove_file(&disk);
        let mut copy = Command::new("nbdcopy");
        copy.arg(format!("nbd://{}", lab.origin())).arg(&disk);
        lab.run(node, &copy);
        Drive::Raw(disk)
    })
}

pub(super) fn qemu_img(lab: &Lab) -> Prepared {
    with_servers(vec![origin_nbdkit(lab)], |lab, node| {
        let disk = lab.folder().join("converted.raw");
        let _from_the_round_before = std::fs::remove_file(&disk);
        let mut copy = Command::new("qemu-img");
        copy.args(["convert", "-f", "raw", "-O", "raw", "-W", "-m", "16"]);
        copy.arg(format!("nbd://{}", lab.origin())).arg(&disk);
        lab.run(node, &copy);
        Drive::Raw(disk)
    })
}

/// The whole disk first, compressed beforehand, over HTTP.
pub(super) fn zstd_http(lab: &Lab) -> Prepared {
    let compressed = lab.folder().join("golden.zst");
    if !compressed.exists() {
        support::run(Command::new("zstd").args(["-q", "-3", text(&lab.raw), "-o"]).arg(&compressed));
    }
    let (origin, folder) = (lab.origin(), text(lab.folder()));
    let arguments = ["-m", "http.server", "8080", "--bind", &origin, "--directory", folder];
    let server = lab.server(0, 8080, "/usr/bin/python3", &arguments);
    with_servers(vec![server], move |lab, node| {
        let disk = lab.folder().join("unpacked.raw");
        let fetch = format!(
            "curl -sf http://{origin}:8080/golden.zst | zstd -dcq --sparse -f -o {} -",
            disk.display()
        );
        lab.run(node, Command::new("bash").args(["-o", "pipefail", "-c", &fetch]));
        Drive::Raw(disk)
    })
}
