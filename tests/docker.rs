//! Containers by a real dockerd, one for each (namespaced) host.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bootcache::agent::{self, Agent, ContainerImages, DockerImages, MemoryDataPlane, Options, Services};
use bootcache::digest::Digest;
use bootcache::hypervisor::docker::Docker;
use bootcache::hypervisor::{DiskBy, Hypervisor, HypervisorError, InstanceType, Launch, Nic, Root, Running};
use bootcache::image::manifest::ImageKind;
use bootcache::name::ImageName;
use bootcache::network::{NetworkSpec, Networks};
use bootcache::peer::transport::Security;
use bootcache::tls::Role;
use bootcache::wire::cluster::{AskNode, InstanceOrder, InstanceStatus, Needed, Part, RunPart, UpWhen};
use bootcache::wire::link::Link;
use bootcache_nbd::BoxFuture;
use serde_json::{Value, json};
use support::container;
use support::host::Host;
use support::net::{Net, Rate};

const NEEDS: [&str; 7] = ["libvirtd", "dockerd", "unshare", "curl", "busybox", "ip", "tar"];

fn launch(name: &str, image: &str) -> Launch {
    Launch {
        name: name.parse().unwrap(),
        root: Root::Image(image.to_owned()),
        cpus: 1,
        memory_mib: 64,
        nics: Vec::new(),
        env: BTreeMap::from([("GREETING".to_owned(), "hello there".to_owned())]),
        command: container::reporting(),
        privileged: false,
        facts: vec![("instance".to_owned(), name.to_owned())],
        serial: PathBuf::new(),
        template: None,
    }
}

fn nic(host: u8) -> Nic {
    Nic {
        network: "lab".parse().unwrap(),
        bridge: "br-lab".to_owned(),
        mac: format!("52:54:00:55:00:{host:02x}"),
        address: Some((format!("10.55.0.{host}").parse().unwrap(), 24)),
        gateway: None,
        mtu: None,
    }
}

/// `docker CMD…` on an engine; its stdout.
#[track_caller]
fn docker(address: &str, arguments: &[&str]) -> String {
    support::run(Command::new("docker").args(["-H", address]).args(arguments)).trim_end().to_owned()
}

/// A host with a dockerd of its own, and a client of it. Taken apart in this order, they end in the right one.
struct OneHost {
    folder: tempfile::TempDir,
    net: Net,
    host: Host,
    address: String,
    engine: Docker,
}

impl OneHost {
    /// None, told by name, where something is missing.
    fn up() -> Option<Self> {
        if !support::require(&NEEDS) || !support::require_root() {
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let net = Net::new(1, Rate::Unlimited);
        let host = Host::up(folder.path(), &net, 0);
        let address = host.docker();
        let engine = Docker::new(&address, "node-a".parse().unwrap());
        Some(Self { folder, net, host, address, engine })
    }
}

async fn load(docker: &Docker, name: &str, archive: &std::path::Path) -> String {
    let bytes = std::fs::read(archive).unwrap();
    let root = Digest::of(&bytes);
    docker.load(&name.parse().unwrap(), root, std::io::Cursor::new(bytes)).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_is_started_once_limited_watched_and_forgotten() {
    let Some(OneHost { folder, net, host, address, engine }) = OneHost::up() else { return };
    Hypervisor::check(&engine).await.unwrap();

    let archive = folder.path().join("box.tar");
    container::root_fs(&archive, 1 << 20);
    let image = load(&engine, "box", &archive).await;
    assert!(engine.has_image(&image).await.unwrap());

    let one = launch("one", &image);
    engine.launch(&one).await.unwrap();
    let id = docker(&address, &["inspect", "-f", "{{.Id}}", "one"]);
    engine.launch(&one).await.unwrap();
    assert_eq!(docker(&address, &["inspect", "-f", "{{.Id}}", "one"]), id, "the same container");
    let limits = docker(
        &address,
        &[
            "inspect",
            "-f",
            "{{.HostConfig.Memory}} {{.HostConfig.NanoCpus}} {{.HostConfig.Privileged}}",
            "one",
        ],
    );
    assert_eq!(limits, "67108864 1000000000 false");
    let told = docker(&address, &["exec", "one", "sh", "-c", "echo $BOOTCACHE_INSTANCE $GREETING; hostname"]);
    assert_eq!(told, "one hello there\none");

    assert_eq!(engine.info(&one.name).await.unwrap().unwrap().state, Running::Running);
    docker(&address, &["exec", "-d", "one", "sh", "-c", "while :; do :; done"]);
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let info = engine.info(&one.name).await.unwrap().unwrap();
        if info.cpu > 0.05 && info.memory_bytes > 0 {
            break;
        }
        assert!(Instant::now() < deadline, "{info:?}");
    }

    // Somebody else's container of a name that is asked for: refused, and left alone.
    docker(&address, &["run", "-d", "--network", "none", "--name", "other", &image, "sleep", "100"]);
    let error = engine.launch(&launch("other", &image)).await.unwrap_err();
    assert!(matches!(&error, HypervisorError::Refused(_)) && error.to_string().contains("/other"), "{error}");
    let other = "other".parse().unwrap();
    engine.stop(&other, Duration::ZERO).await.unwrap();
    engine.delete(&other).await.unwrap();
    assert_eq!(docker(&address, &["inspect", "-f", "{{.State.Running}}", "other"]), "true");
    assert_eq!(engine.list().await.unwrap(), std::slice::from_ref(&one.name));

    // Whoever asked for it was killed, and it is made all the same.
    for patience in (0..60).step_by(4).map(Duration::from_millis) {
        let three = launch("three", &image);
        let _given_up = tokio::time::timeout(patience, engine.launch(&three)).await;
        engine.launch(&three).await.unwrap();
        assert_eq!(engine.info(&three.name).await.unwrap().unwrap().state, Running::Running);
        engine.delete(&three.name).await.unwrap();
    }

    let error = engine.launch(&launch("two", "bootcache/none:1")).await.unwrap_err().to_string();
    assert!(error.contains("No such image"), "{error}");
    assert_eq!(engine.list().await.unwrap().len(), 1, "what did not start is not left behind");

    engine.stop(&one.name, Duration::from_secs(5)).await.unwrap();
    engine.stop(&one.name, Duration::from_secs(5)).await.unwrap();
    assert_eq!(engine.info(&one.name).await.unwrap().unwrap().state, Running::Stopped);
    engine.launch(&one).await.unwrap();
    assert_eq!(engine.info(&one.name).await.unwrap().unwrap().state, Running::Running);

    // The engine dies with the host; a later one is talked to by the same owner.
    host.power_loss();
    let error = engine.info(&one.name).await.unwrap_err();
    assert!(matches!(error, HypervisorError::Unreachable(_)), "{error}");
    host.power_on(&net, 0);
    host.docker();
    assert_eq!(engine.info(&one.name).await.unwrap().unwrap().state, Running::Stopped);
    engine.delete(&one.name).await.unwrap();
    engine.delete(&one.name).await.unwrap();
    assert_eq!(engine.info(&one.name).await.unwrap(), None);
    assert!(engine.list().await.unwrap().is_empty());
}

fn order(name: &str, script: &str, time_limit_s: u32) -> InstanceOrder {
    InstanceOrder {
        name: name.parse().unwrap(),
        kind: InstanceType::Container,
        image: "box".parse().unwrap(),
        cpus: 1,
        memory_mib: 64,
        disk_bytes: None,
        disk_by: DiskBy::Socket,
        nics: Vec::new(),
        env: BTreeMap::new(),
        command: ["sh", "-c", script].map(str::to_owned).to_vec(),
        privileged: false,
        template: None,
        common: None,
        up_when: UpWhen::Serial("service is [r]eady".to_owned()),
        time_limit_s,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_is_up_when_its_log_says_so() {
    let Some(OneHost { folder, net: _net, host: _host, address, engine }) = OneHost::up() else { return };
    let archive = folder.path().join("box.tar");
    container::root_fs(&archive, 0);
    docker(&address, &["import", archive.to_str().unwrap(), "box"]);

    let engine = Arc::new(engine);
    let image: ImageName = "box".parse().unwrap();
    let services = Services {
        data_plane: Arc::new(MemoryDataPlane::with_image(image.clone(), ImageKind::Container, 4096)),
        hypervisors: vec![Arc::clone(&engine) as Arc<dyn Hypervisor>],
        networks: None,
        container_images: None,
    };
    let options = Options::new("node-a".parse().unwrap(), folder.path().join("agent"));
    let agent = Agent::start(options, services).await.unwrap();
    let stream = Security::default().connect_to(agent.address(), Role::Node).await.unwrap();
    let mut link = Link::new(stream);

    let needed =
        Needed { root: Digest::of(b"box"), boot: None, name: image, size: 4096, sources: Vec::new() };
    let instances = vec![
        order("slow", "echo starting; sleep 3; echo service is ready; sleep 1000", 60),
        order("errs", "head -c 300000 /bin/busybox; echo service is ready >&2; sleep 1000", 60),
        order("brief", "echo the service is ready", 60),
        order("mute", "echo; echo no configuration >&2; sleep 1000", 10),
        order("dead", "echo no memory", 60),
        order("wrong", "echo the service is ready; sleep 2; echo a test has failed; exit 3", 60),
    ];
    let part =
        Part { networks: Vec::new(), images: vec![needed], common: Vec::new(), instances, report: None };
    let run = RunPart { cluster: "lab".to_owned(), task: 1, part };
    link.call(&run, Duration::from_secs(10)).await.unwrap();
    let expected = [
        ("brief", InstanceStatus::Stopped, ""),
        ("dead", InstanceStatus::Failed, "it ended before it was up: the last that it wrote is: no memory"),
        ("errs", InstanceStatus::Running, ""),
        (
            "mute",
            InstanceStatus::Failed,
            "it was not up after 10 s: the last that it wrote is: no configuration",
        ),
        ("slow", InstanceStatus::Running, ""),
        ("wrong", InstanceStatus::Failed, "it ended with exit code 3: a test has failed"),
    ];
    let deadline = Instant::now() + Duration::from_secs(120);
    let found = loop {
        let mut found = link.call(&AskNode {}, Duration::from_secs(10)).await.unwrap().instances;
        found.sort_by(|a, b| a.name.cmp(&b.name));
        let seen = found.iter().map(|i| (i.name.as_str(), i.status, i.reason.as_deref().unwrap_or("")));
        if seen.eq(expected) {
            break found;
        }
        assert!(Instant::now() < deadline, "{found:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    let up_ms = |index: usize| found[index].up_ms;
    assert!(up_ms(4) >= Some(3000), "it was not up before it said so: {found:?}");
    assert!(up_ms(0).is_some() && up_ms(3).is_none(), "{found:?}");
    agent.stop().await;
    for name in engine.list().await.unwrap() {
        engine.delete(&name).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_loads_from_what_docker_saved_and_the_host_s_own_names_stay() {
    let Some(OneHost { folder, net: _net, host: _host, address, engine }) = OneHost::up() else { return };

    let (root_fs, saved) = (folder.path().join("box.tar"), folder.path().join("saved.tar"));
    container::root_fs(&root_fs, 1 << 20);
    docker(&address, &["import", "-c", "CMD [\"/bin/report\"]", root_fs.to_str().unwrap(), "box:latest"]);
    docker(&address, &["save", "-o", saved.to_str().unwrap(), "box:latest"]);
    docker(&address, &["rmi", "box:latest"]);
    // The host has another image of the name that is in the archive.
    docker(&address, &["import", root_fs.to_str().unwrap(), "box:latest"]);
    let before = docker(&address, &["inspect", "-f", "{{.Id}}", "box:latest"]);

    let image = load(&engine, "saved", &saved).await;
    assert_eq!(docker(&address, &["inspect", "-f", "{{.Id}}", "box:latest"]), before);
    assert_ne!(docker(&address, &["inspect", "-f", "{{.Id}}", &image]), before);
    engine.launch(&Launch { command: Vec::new(), ..launch("one", &image) }).await.unwrap();
    engine.delete(&"one".parse().unwrap()).await.unwrap();

    // Compressed, by bytes that come slowly: the engine takes them as they come, and waits.
    docker(&address, &["rmi", &image]);
    support::run(Command::new("gzip").args(["-k", "-1"]).arg(&saved));
    let bytes = std::fs::read(folder.path().join("saved.tar.gz")).unwrap();
    let (mut feed, slow) = tokio::io::duplex(64 << 10);
    let pieces: Vec<Vec<u8>> = bytes.chunks(200_000).map(<[u8]>::to_vec).collect();
    let feeder = tokio::spawn(async move {
        for piece in pieces {
            tokio::io::AsyncWriteExt::write_all(&mut feed, &piece).await.unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    let again = engine.load(&"saved".parse().unwrap(), Digest::of(&bytes), slow).await.unwrap();
    feeder.await.unwrap();
    assert!(engine.has_image(&again).await.unwrap());
    engine.remove_image(&again).await.unwrap();
    engine.remove_image(&again).await.unwrap();

    // One that breaks off half-way leaves nothing.
    let broken = std::io::Cursor::new(bytes[..bytes.len() / 2].to_vec());
    let root = Digest::of(b"broken");
    engine.load(&"broken".parse().unwrap(), root, broken).await.unwrap_err();
    assert!(!engine.has_image(&Docker::reference(&"broken".parse().unwrap(), root)).await.unwrap());

    // And neither does one whose bytes stop coming, of either kind: it is tried again.
    let images = DockerImages::new(Arc::new(engine.clone()));
    let root_fs = std::fs::read(&root_fs).unwrap();
    for (bytes, root) in [(bytes, Digest::of(b"saved")), (root_fs, Digest::of(b"root fs"))] {
        for length in [100, bytes.len() / 2] {
            let (name, sources) = ("cut".parse().unwrap(), Vec::new());
            let needed = Needed { name, root, boot: None, size: bytes.len() as u64, sources };
            let part = std::io::Cursor::new(bytes[..length].to_vec());
            let part = tokio::io::AsyncReadExt::chain(part, Broken);
            let source: BoxFuture<'_, _> = Box::pin(async { Ok(Box::new(part) as agent::Bytes) });
            let error = images.ensure(&needed, Box::new(|| source)).await.unwrap_err();
            let expected =
                agent::ServiceError::Away("image cut came in part: the other side has gone".into());
            assert_eq!(error, expected, "after {length} bytes");
            assert!(!engine.has_image(&Docker::reference(&needed.name, root)).await.unwrap());
        }
    }
}

/// What a stream comes to whose other side has gone.
struct Broken;

impl tokio::io::AsyncRead for Broken {
    fn poll_read(
        self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
        _: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::task::Poll::Ready(Err(std::io::Error::other("the other side has gone")))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn archives_with_the_same_name_in_them_that_load_at_once_stay_what_they_are() {
    let Some(OneHost { folder, net: _net, host: _host, address, engine }) = OneHost::up() else { return };
    let root_fs = folder.path().join("box.tar");
    container::root_fs(&root_fs, 1 << 20);
    let saved = ["one", "two"].map(|name| {
        let archive = folder.path().join(format!("{name}.tar"));
        let label = format!("LABEL what={name}");
        docker(&address, &["import", "-c", &label, root_fs.to_str().unwrap(), "app:latest"]);
        docker(&address, &["save", "-o", archive.to_str().unwrap(), "app:latest"]);
        docker(&address, &["rmi", "app:latest"]);
        archive
    });
    for round in 0..8 {
        let loaded = tokio::join!(load(&engine, "one", &saved[0]), load(&engine, "two", &saved[1]));
        let labels = [loaded.0, loaded.1].map(|image| {
            let label = docker(&address, &["inspect", "-f", "{{.Config.Labels.what}}", &image]);
            docker(&address, &["rmi", &image]);
            label
        });
        assert_eq!(labels, ["one", "two"], "round {round}");
        assert_eq!(docker(&address, &["images", "-q"]), "", "round {round}");
    }

    // Given up early, while the engine unpacks, and late: the name in the archive is nowhere left.
    let bytes = std::fs::read(&saved[0]).unwrap();
    let (name, root) = ("one".parse().unwrap(), Digest::of(&bytes));
    for patience_ms in [5, 50, 150, 300] {
        let (patience, body) = (Duration::from_millis(patience_ms), std::io::Cursor::new(bytes.clone()));
        let given_up = tokio::time::timeout(patience, engine.load(&name, root, body)).await;
        // An engine that is slow may have it for a moment.
        let (mut absent, deadline) = (0, Instant::now() + Duration::from_secs(60));
        while absent < 10 {
            tokio::time::sleep(Duration::from_millis(200)).await;
            let names = docker(&address, &["images", "--format", "{{.Repository}}"]);
            absent = if names.contains("app") { 0 } else { absent + 1 };
            assert!(Instant::now() < deadline, "{names}: {given_up:?} after {patience_ms} ms");
        }
        engine.remove_image(&Docker::reference(&name, root)).await.unwrap();
    }
}

/// Writes what `docker save` wrote once more, with a file of it changed, or without it.
fn with_file(archive: &Path, name: &str, content: Option<&Value>) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    support::run(Command::new("tar").arg("-C").arg(folder.path()).arg("-xf").arg(archive));
    match content {
        Some(content) => std::fs::write(folder.path().join(name), content.to_string()).unwrap(),
        None => std::fs::remove_file(folder.path().join(name)).unwrap(),
    }
    let tar = archive.with_extension("new");
    support::run(
        Command::new("tar").arg("-C").arg(folder.path()).args(["--sort=name", "-cf"]).arg(&tar).arg("."),
    );
    std::fs::read(tar).unwrap()
}

/// What the engine's names mean.
fn meanings(address: &str) -> Vec<String> {
    let format = "{{.Repository}}:{{.Tag}} {{.ID}}";
    let images = docker(address, &["images", "--no-trunc", "--format", format]);
    let mut named: Vec<_> =
        images.lines().filter(|line| !line.contains("<none>")).map(str::to_owned).collect();
    named.sort();
    named
}

#[tokio::test(flavor = "multi_thread")]
async fn names_in_an_archive_that_the_engine_fails_at_mean_what_they_did() {
    let Some(OneHost { folder, net: _net, host: _host, address, engine }) = OneHost::up() else { return };
    let (root_fs, saved) = (folder.path().join("box.tar"), folder.path().join("saved.tar"));
    container::root_fs(&root_fs, 1 << 20);
    docker(&address, &["import", "-c", "LABEL what=bad", root_fs.to_str().unwrap(), "bad:latest"]);
    docker(&address, &["save", "-o", saved.to_str().unwrap(), "bad:latest"]);
    docker(&address, &["rmi", "bad:latest"]);
    let base = load(&engine, "base", &root_fs).await;
    docker(&address, &["import", root_fs.to_str().unwrap(), "busybox:latest"]);
    let before = meanings(&address);
    assert_eq!(before.len(), 2, "{before:?}");

    let manifest = support::run(Command::new("tar").arg("-xOf").arg(&saved).arg("manifest.json"));
    let manifest: Value = serde_json::from_str(&manifest).unwrap();
    let named = |names: &[&str]| {
        let mut manifest = manifest.clone();
        manifest[0]["RepoTags"] = json!(names);
        with_file(&saved, "manifest.json", Some(&manifest))
    };
    let bad = "bad".parse().unwrap();
    let root = Digest::of(b"bad");
    let load = |bytes: &[u8]| engine.load(&bad, root, std::io::Cursor::new(bytes.to_vec()));

    // The engine fails at the last name.
    for names in [&[base.as_str(), "busybox:latest", "new:1", "Not Valid"][..], &["new:1", "Not Valid"]] {
        let error = load(&named(names)).await.unwrap_err().to_string();
        assert!(error.contains("invalid reference format"), "{error}");
        assert_eq!(meanings(&address), before, "{names:?}");
        assert!(!engine.has_image(&Docker::reference(&bad, root)).await.unwrap());
    }
    // Without the manifest it goes by another file, and does not say what it named.
    load(&with_file(&saved, "manifest.json", None)).await.unwrap_err();
    assert_eq!(meanings(&address), before);
    // It takes all the names, and the one that waits for it gives up at some time, or does not.
    let bytes = named(&[&base, "busybox:latest", "new:1"]);
    for patience_ms in [5, 20, 50, 100, 200, 400, 60_000] {
        let given_up = tokio::time::timeout(Duration::from_millis(patience_ms), load(&bytes)).await;
        // Whoever looks waits for what is under way.
        let loaded = engine.has_image(&Docker::reference(&bad, root)).await.unwrap();
        assert!(loaded || given_up.is_err(), "{given_up:?}");
        engine.remove_image(&Docker::reference(&bad, root)).await.unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while meanings(&address) != before {
            engine.remove_image(&Docker::reference(&bad, root)).await.unwrap();
            assert!(Instant::now() < deadline, "after {patience_ms} ms: {:?}", meanings(&address));
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

/// Writes the root file system `archive` as an image in an OCI layout; with `manifest`, in the way of `docker save` too.
fn oci_layout(folder: &Path, archive: &Path, manifest: bool) -> PathBuf {
    let layout = folder.join(format!("layout-{manifest}"));
    let blobs = layout.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    let blob = |media_type: &str, content: &[u8]| {
        let path = blobs.join("new");
        std::fs::write(&path, content).unwrap();
        let digest = support::run(Command::new("sha256sum").arg(&path))[..64].to_owned();
        std::fs::rename(&path, blobs.join(&digest)).unwrap();
        let kind = format!("application/vnd.oci.image.{media_type}");
        json!({ "mediaType": kind, "digest": format!("sha256:{digest}"), "size": content.len() })
    };
    let layer = blob("layer.v1.tar", &std::fs::read(archive).unwrap());
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": { "Cmd": ["/bin/report"] },
        "rootfs": { "type": "layers", "diff_ids": [layer["digest"]] },
    });
    let config = blob("config.v1+json", config.to_string().as_bytes());
    let image = json!({ "schemaVersion": 2, "config": config, "layers": [layer] });
    let image = blob("manifest.v1+json", image.to_string().as_bytes());
    let index = json!({ "schemaVersion": 2, "manifests": [image] });
    std::fs::write(layout.join("index.json"), index.to_string()).unwrap();
    std::fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    if manifest {
        let path = |blob: &Value| blob["digest"].as_str().unwrap().replace("sha256:", "blobs/sha256/");
        let saved = json!([{ "Config": path(&config), "RepoTags": null, "Layers": [path(&layer)] }]);
        std::fs::write(layout.join("manifest.json"), saved.to_string()).unwrap();
    }
    let tar = layout.with_extension("tar");
    support::run(Command::new("tar").arg("-C").arg(&layout).args(["--sort=name", "-cf"]).arg(&tar).arg("."));
    tar
}

#[tokio::test(flavor = "multi_thread")]
async fn an_oci_layout_that_docker_does_not_load_is_not_added() {
    let Some(OneHost { folder, net: _net, host: _host, address: _address, engine }) = OneHost::up() else {
        return;
    };
    let root_fs = folder.path().join("box.tar");
    container::root_fs(&root_fs, 0);
    let add = |archive: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bootcache"));
        command.arg("--store").arg(folder.path().join("store"));
        command.args(["image", "add", "--type", "container", "box"]).arg(archive).output().unwrap()
    };

    let layout = oci_layout(folder.path(), &root_fs, false);
    let bytes = std::fs::read(&layout).unwrap();
    let loaded = engine.load(&"box".parse().unwrap(), Digest::of(&bytes), std::io::Cursor::new(bytes)).await;
    loaded.expect_err("this Docker loads OCI layouts: they need not be refused any more");
    let output = add(&layout);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.lines().count() == 1, "{said}");
    assert!(said.contains("skopeo copy oci-archive:") && said.contains("docker save"), "{said}");

    let both = oci_layout(folder.path(), &root_fs, true);
    assert!(add(&both).status.success());
    let image = load(&engine, "box", &both).await;
    engine.launch(&Launch { command: Vec::new(), ..launch("one", &image) }).await.unwrap();
    engine.delete(&"one".parse().unwrap()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_of_two_hosts_are_on_one_network_and_report() {
    if !support::require(&NEEDS) || !support::require_root() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let net = Net::new(2, Rate::Unlimited);
    net.add_uplinks(Rate::Unlimited);
    let hosts = [Host::up(folder.path(), &net, 0), Host::up(folder.path(), &net, 1)];
    let archive = folder.path().join("box.tar");
    container::root_fs(&archive, 0);
    let listener = net.within(1, || std::net::TcpListener::bind("0.0.0.0:7777").unwrap());

    let mut engines = Vec::new();
    for (index, host) in hosts.iter().enumerate() {
        let node: bootcache::name::HostName = format!("node-{index}").parse().unwrap();
        let spec = NetworkSpec {
            name: "lab".parse().unwrap(),
            bridge: "br-lab".to_owned(),
            subnet: ("10.55.0.0".parse().unwrap(), 24),
            gateway: Some("10.55.0.1".parse().unwrap()),
            node_address: Some(format!("10.55.0.25{index}").parse().unwrap()),
            uplink: Some("eth1".to_owned()),
            vlan: None,
            mtu: Some(1400),
            containers: true,
        };
        let engine = Docker::new(host.docker(), node.clone());
        net.within(index, || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(Networks::new(node).ensure(&spec)).unwrap();
        });
        engine.ensure_network(&spec).await.unwrap();
        engine.ensure_network(&spec).await.unwrap();
        assert_eq!(engine.networks().await.unwrap(), ["br-lab"]);
        let image = load(&engine, "box", &archive).await;
        let number = u8::try_from(index + 11).unwrap();
        let mut instance = Launch { nics: vec![nic(number)], ..launch(&format!("c-{index}"), &image) };
        instance.facts.push(("report".to_owned(), "10.55.0.251:7777".to_owned()));
        engine.launch(&instance).await.unwrap();
        engines.push((engine, host.docker_address()));
    }

    let mut reports: Vec<String> = (0..2)
        .map(|_| {
            let mut text = String::new();
            listener.accept().unwrap().0.read_to_string(&mut text).unwrap();
            text
        })
        .collect();
    reports.sort();
    assert_eq!(reports, ["c-0\n", "c-1\n"]);
    docker(&engines[0].1, &["exec", "c-0", "ping", "-c", "1", "-W", "5", "10.55.0.12"]);
    let interface = docker(&engines[0].1, &["exec", "c-0", "ip", "addr", "show", "eth0"]);
    assert!(interface.contains("52:54:00:55:00:0b") && interface.contains("10.55.0.11/24"), "{interface}");
    assert!(interface.contains("mtu 1400"), "{interface}");
    let route = docker(&engines[0].1, &["exec", "c-0", "ip", "route"]);
    assert!(route.contains("default via 10.55.0.1"), "{route}");
    assert!(engines[0].0.info(&"c-0".parse().unwrap()).await.unwrap().unwrap().network_bytes[0] > 0);

    for (index, (engine, _)) in engines.iter().enumerate() {
        for name in engine.list().await.unwrap() {
            engine.delete(&name).await.unwrap();
        }
        engine.remove_network("br-lab").await.unwrap();
        net.within(index, || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let networks = Networks::new(format!("node-{index}").parse().unwrap());
            runtime.block_on(networks.remove("br-lab")).unwrap();
        });
        let links = support::run(&mut net.on(index, Command::new("ip").args(["-o", "link"])));
        assert_eq!(links.lines().count(), 3, "lo, eth0 and eth1: {links}");
    }
}
