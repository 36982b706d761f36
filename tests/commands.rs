//! What commands of one host print: tables, JSON, pictures, and into a pipe that nobody reads.

#![allow(clippy::unwrap_used, reason = "a test program")]

mod support;

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bootcache::control::{Client, Reply, Request};
use bootcache_nbd::client::{Address, Client as NbdClient, Policy};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use support::process::Process;
use support::store::{Store, bootcache};

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

/// A store with the image `golden` of 1 MiB.
fn store() -> Store {
    let store = Store::new();
    let raw = store.beside("golden.raw");
    fs::write(&raw, support::noise(3, 1 << 20)).unwrap();
    store.run(["image", "add", "golden", raw.to_str().unwrap()]);
    store
}

#[test]
fn analyze_tells_draws_and_compares_what_was_recorded() {
    let store = store();
    for count in ["count=64", "count=32"] {
        store.run([
            "record",
            "golden",
            "--runs",
            "1",
            "--",
            "dd",
            "if={disk}",
            "of=/dev/null",
            "bs=4K",
            count,
        ]);
    }
    let told = store.run(["analyze", "golden"]);
    for part in ["logical size        1.0 MB", "unique              0.3 MB", "sizes of reads", "2 recorded"] {
        assert!(told.contains(part), "{part}: {told}");
    }
    let told = json(&store.run(["--json", "analyze", "golden"]));
    assert_eq!((&told["summary"]["unique"], &told["summary"]["boots"]), (&(64 * 4096).into(), &2.into()));
    assert!(told["boot_cache_bytes"].as_u64() > Some(32 * 4096), "{told}");
    assert_eq!(json(&store.run(["--json", "analyze", "golden", "--list"])).as_array().unwrap().len(), 2);

    let compared = store.run(["analyze", "golden", "--compare", "1", "2"]);
    assert!(compared.contains("Jaccard index                 0.5000"), "{compared}");
    let compared = json(&store.run(["--json", "analyze", "golden", "--compare", "1", "2"]));
    assert_eq!((&compared["both"], &compared["only_first"]), (&32.into(), &32.into()));

    let drawn = store.beside("drawn");
    let folder = drawn.to_str().unwrap();
    store.run(["analyze", "golden", "--svg", folder, "--png", folder, "--theme", "dark"]);
    for picture in ["offsets", "sizes"] {
        let svg = fs::read_to_string(drawn.join(picture).with_extension("svg")).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{picture}");
        let png = fs::read(drawn.join(picture).with_extension("png")).unwrap();
        assert!(png.starts_with(b"\x89PNG\r\n") && png.len() > 1000, "{picture}");
    }
    let said = store.refused(["analyze", "golden", "--compare", "1", "9"]);
    assert!(said.contains("recording 9"), "{said}");
}

#[test]
fn an_overlay_is_shown_and_its_removal_told() {
    let store = store();
    store.run(["overlay", "create", "golden", "vm", "--size", "2M"]);
    let shown = store.run(["overlay", "show", "vm"]);
    for part in ["name      vm", "image     golden", "(2097152 bytes)", "written   0 B", "clients   0"] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    let shown = json(&store.run(["--json", "overlay", "show", "vm"]));
    assert_eq!((&shown["size"], &shown["image"]), (&(2 << 20).into(), &"golden".into()));
    assert!(store.refused(["overlay", "show", "other"]).contains("no overlay 'other'"));
    assert_eq!(json(&store.run(["--json", "overlay", "remove", "vm"]))["name"], "vm");
}

#[tokio::test]
async fn a_vm_that_runs_and_that_boot_did_not_start_is_not_stopped() {
    let store = store();
    let _serve = store.serve([""; 0]);
    store.run(["overlay", "create", "golden", "vm"]);
    // As an agent does for the VM of a plan, and then its QEMU.
    let mut client = Client::connect(&store.path().join(bootcache::serve::CONTROL_SOCKET)).await.unwrap();
    let open = Request::VmOpen { name: "vm".parse().unwrap(), owner: None };
    let Reply::Vm(vm) = client.call(&open).await.unwrap() else { panic!("another answer") };
    let guest = NbdClient::connect(Address::Unix(vm.socket), &vm.export, Policy::default()).await.unwrap();
    let before = guest.read(0, 4096).await.unwrap();
    let said = store.refused(["stop", "vm", "--remove"]);
    assert!(said.contains("`boot` did not start it") && said.contains("`bootcache end TASK`"), "{said}");
    assert_eq!(guest.read(0, 4096).await.unwrap(), before);
    assert!(store.run(["overlay", "list"]).contains("vm") && store.path().join("vms/vm").exists());
}

/// Ends a daemon that an agent has started, which outlives it.
struct Daemon(Pid);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _best_effort = kill_process(self.0, Signal::KILL);
    }
}

#[tokio::test]
async fn a_daemon_that_hangs_is_replaced_by_its_agent_also_after_an_update() {
    let store = store();
    let (program, update) = (store.beside("bootcache"), store.beside("update"));
    fs::copy(bootcache(), &program).unwrap();
    let socket = store.path().join(bootcache::serve::CONTROL_SOCKET);
    let mut agent = Command::new(&program);
    agent.args(["agent", "--name", "n1", "--no-vms", "--no-containers", "--daemon-patience", "5"]);
    let agent = Process::start(agent.env("BOOTCACHE_STORE", store.path()));
    agent.wait_for("ready", Duration::from_secs(20));
    let first = Daemon(Client::connect(&socket).await.unwrap().pid().unwrap());
    fs::copy(bootcache(), &update).unwrap();
    fs::rename(&update, &program).unwrap();
    kill_process(first.0, Signal::STOP).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    let second = loop {
        assert!(Instant::now() < deadline, "{}", agent.said());
        if let Ok(mut client) = Client::connect(&socket).await
            && let Some(pid) = client.pid().filter(|pid| *pid != first.0)
        {
            let daemon = Daemon(pid);
            client.call(&Request::Status).await.unwrap();
            break daemon;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    assert!(agent.said().contains("was silent for 5s: it was killed"), "{}", agent.said());
    drop((agent, second));
}

#[tokio::test]
async fn the_daemons_have_as_many_files_open_as_they_may() {
    let store = Store::new();
    let start = |words: &str| {
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("ulimit -S -n 200 && exec {} {words}", bootcache())]);
        let process = Process::start(shell.env("BOOTCACHE_STORE", store.path()));
        process.wait_for("ready", Duration::from_secs(20));
        process
    };
    let controller = start("controller");
    let agent = start("agent --name n1 --no-vms --no-containers");
    let socket = store.path().join(bootcache::serve::CONTROL_SOCKET);
    let serve = Daemon(Client::connect(&socket).await.unwrap().pid().unwrap());
    for pid in [controller.id(), agent.id(), u32::try_from(serve.0.as_raw_nonzero().get()).unwrap()] {
        let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let files: Vec<_> = limits
            .lines()
            .find(|line| line.starts_with("Max open files"))
            .unwrap()
            .split_whitespace()
            .collect();
        assert_eq!(files[3], files[4], "{pid}: {limits}");
    }
    drop((controller, agent, serve));
}

#[test]
fn what_was_made_issued_and_detached_is_told_as_json_too() {
    let store = Store::new();
    let (ca, node) = (store.beside("ca"), store.beside("ca/n1"));
    let run = |words: &[&str]| {
        let begin = ["--json", "ca", "--ca-dir", ca.to_str().unwrap()];
        json(&store.run(begin.iter().chain(words)))
    };
    assert_eq!(run(&["init"]), json!({ "ca": ca }));
    assert_eq!(
        run(&["issue", "n1"]),
        json!({ "name": "n1", "role": "node", "dir": node, "replaced": false })
    );
    assert_eq!(run(&["issue", "n1"])["replaced"], true);
    let said = store.refused(["ca", "--ca-dir", ca.to_str().unwrap(), "issue", "n2", "--address", "foo bar"]);
    assert!(said.contains("neither an IP address nor a host name"), "{said}");
    run(&["issue", "c", "--role", "controller"]);
    let of_controller = ca.join("c");
    let serve = ["serve", "--peer-listen", "127.0.0.1:0", "--tls-dir", of_controller.to_str().unwrap()];
    assert!(store.refused(serve).contains("is not a node's"));
    // What the kernel has not is detached too: it is forgotten.
    let attached = store.path().join("attached");
    fs::create_dir_all(&attached).unwrap();
    let holder = json!({ "boot": "another", "backend": "bootcache:vm", "pid": null });
    let entry = json!({
        "name": "vm", "device": 7, "way": "netlink", "size": 4096, "read_only": false, "keeper": 1, "holder": holder
    });
    fs::write(attached.join("vm.json"), entry.to_string()).unwrap();
    assert_eq!(json(&store.run(["--json", "detach", "vm"])), json!({ "name": "vm", "device": 7 }));
}

#[test]
fn verify_tells_of_a_damaged_manifest_as_json_too() {
    let store = store();
    let root = json(&store.run(["--json", "image", "show", "golden"]))["root"].clone();
    let manifest = store.path().join("images").join(root.as_str().unwrap()).join("manifest");
    fs::write(&manifest, "{").unwrap();
    let output = store.command(["--json", "image", "verify", "golden"]).output().unwrap();
    assert!(!output.status.success());
    let told = json(std::str::from_utf8(&output.stdout).unwrap());
    assert_eq!((&told["root"], told["findings"].as_array().unwrap().len()), (&root, 1), "{told}");
}

#[test]
fn a_reader_that_has_gone_is_no_reason_to_panic() {
    let store = store();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = store.command(["image", "list"]);
    let output = command.stdout(writer).stderr(Stdio::piped()).spawn().unwrap().wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(141), b"".as_slice()));
}

#[test]
fn a_script_for_a_shell_that_nobody_reads_to_its_end_is_no_reason_to_panic() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = Store::new().command(["completions", "bash"]);
    let output = command.stdout(writer).stderr(Stdio::piped()).spawn().unwrap().wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(141), b"".as_slice()));
}

#[test]
fn logs_in_a_file_have_no_colours() {
    let store = store();
    fs::create_dir_all(store.path().join("tmp/left")).unwrap();
    let output = store.command(["-v", "image", "list"]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("removing") && !said.contains('\u{1b}'), "{said:?}");
}

#[test]
fn a_full_disk_under_stdout_is_an_error_like_others() {
    let store = store();
    let simulate = ["--json", "simulate", "--nodes", "4", "--boot-seconds", "1"];
    for words in [&["image", "list"][..], &["completions", "bash"], &simulate] {
        let full = fs::File::options().write(true).open("/dev/full").unwrap();
        let output = store.command(words).stdout(full).stderr(Stdio::piped()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{words:?}: {said}");
        assert!(said.starts_with("bootcache: cannot write to stdout: No space left"), "{words:?}: {said}");
    }
}

#[test]
fn what_a_command_cannot_do_is_said_with_what_it_can() {
    if !support::require(&["tar"]) {
        return;
    }
    let store = store();
    let archive = store.beside("c.tar");
    support::run(
        Command::new("tar").arg("-C").arg(store.beside("")).arg("-cf").arg(&archive).arg("golden.raw"),
    );
    store.run(["image", "add", "box", archive.to_str().unwrap(), "--type", "container"]);
    for command in ["boot", "record", "analyze"] {
        let said = store.refused([command, "box"]);
        assert!(said.contains("'box' is a container image"), "{said}");
    }
    for until in ["exit", "bad"] {
        let said = store.refused(["boot", "golden", "--until", until]);
        assert!(said.ends_with("serial:REGEX, tcp:PORT or idle:SECONDS"), "{said}");
    }
    for command in ["instances", "tasks", "end"] {
        assert!(store.refused([command, "abc"]).contains("a task's number is expected"), "{command}");
    }
    assert!(store.refused(["prefetch"]).contains("<IMAGE|--standing <on|off>>"));
}

#[test]
fn a_pull_is_complete_in_each_of_its_words() {
    let origin = store();
    fs::write(origin.beside("zeroes.raw"), vec![0; 1 << 20]).unwrap();
    origin.run(["image", "add", "zeroes", origin.beside("zeroes.raw").to_str().unwrap()]);
    let serve = origin.serve(["--peer-listen", "127.0.0.1:0"]);
    let ready = serve.wait_for("peers=", Duration::from_secs(20));
    let address = ready.split("peers=").nth(1).unwrap().split(' ').next().unwrap();
    let node = Store::new();
    for image in ["zeroes", "golden"] {
        let told = json(&node.run(["--json", "pull", image, "--from", address]));
        assert_eq!((&told["complete"], &told["status"]["complete"]), (&true.into(), &true.into()), "{told}");
    }
}

/// Nothing could end it but the daemon's end, after which the next daemon went on with it.
#[test]
fn a_pull_whose_command_has_ended_is_ended_by_removing_the_image() {
    let origin = store();
    let serve = origin.serve(["--peer-listen", "127.0.0.1:0"]);
    let ready = serve.wait_for("peers=", Duration::from_secs(20));
    let address = ready.split("peers=").nth(1).unwrap().split(' ').next().unwrap();
    let node = Store::new();
    let daemon = node.serve([""; 0]);
    node.run(["pull", "golden", "--from", address, "--boot-only"]);
    assert!(node.run(["image", "remove", "golden"]).contains("removed golden: "));
    let status = json(&node.run(["--json", "status"]));
    assert_eq!(status["images"], serde_json::json!([]), "{status}");
    drop(daemon);
}

#[test]
fn an_example_fits_on_a_page() {
    let folder = support::checkout("examples");
    let mut seen = 0;
    for entry in fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let lines = fs::read_to_string(&path).unwrap().lines().count();
        let limit = if path.extension().is_some_and(|extension| extension == "rs") { 59 } else { 60 };
        assert!(lines <= limit, "{} has {lines} lines", path.display());
        seen += 1;
    }
    assert!(seen >= 7, "{seen} examples in {}", folder.display());
}

#[test]
fn a_log_that_cannot_be_written_ends_nobody_s_work() {
    if !support::require(&["nbdcopy"]) {
        return;
    }
    let store = store();
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let mut serve = store.command(["-vv", "serve"]);
    let mut serve = serve.env("BOOTCACHE_LOG", "trace").stdout(Stdio::null()).stderr(full).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while store.command(["status"]).output().unwrap().status.code() != Some(0) {
        assert!(Instant::now() < deadline, "the daemon does not answer");
        std::thread::sleep(Duration::from_millis(20));
    }
    store.run(["overlay", "create", "golden", "vm"]);
    support::run(Command::new("nbdcopy").args([&store.uri("golden"), "null:"]));
    let to = store.uri("vm");
    support::run(Command::new("nbdcopy").arg(store.beside("golden.raw")).arg(to));
    store.run(["overlay", "commit", "vm", "sealed"]);
    let pid = Pid::from_child(&serve);
    kill_process(pid, Signal::TERM).unwrap();
    assert_eq!(serve.wait().unwrap().code(), Some(0));
}

#[test]
fn a_mistyped_store_is_no_empty_store() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("stroe");
    let commands: [&[&str]; 8] = [
        &["image", "list"],
        &["image", "remove", "golden"],
        &["overlay", "list"],
        &["boot", "golden"],
        &["stop", "vm"],
        &["record", "golden"],
        &["analyze", "golden"],
        &["replay", "golden", "nbd://127.0.0.1"],
    ];
    for words in commands {
        let output = Command::new(support::store::bootcache()).arg("--store").arg(&dir).args(words).output();
        let said = String::from_utf8_lossy(&output.unwrap().stderr).into_owned();
        assert!(said.contains(&format!("there is no store in {}", dir.display())), "{words:?}: {said}");
        assert!(!dir.exists(), "{words:?}");
    }
}

#[test]
fn where_no_store_can_be_is_said_at_once() {
    let store = store();
    let long = store.beside(&"x".repeat(100));
    for words in [&["image", "add", "x", "x.raw"][..], &["serve"], &["pull", "x", "--from", "127.0.0.1:1"]] {
        let mut command = store.command(["--store"]);
        let output = command.arg(&long).args(words).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains("path may have"), "{words:?}: {said}");
    }
    assert!(!long.exists());
    let mut homeless = Command::new("setpriv");
    homeless.args(["--reuid=nobody", "--regid=nogroup", "--clear-groups"]).arg(bootcache());
    let output = homeless.args(["image", "list"]).env_clear().current_dir("/").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    if support::require_root() && !said.contains("Permission denied") {
        assert!(said.contains("HOME is not set"), "{said}");
    }
}

#[test]
fn the_uri_that_serve_says_works_whatever_its_path() {
    if !support::require(&["nbdinfo"]) {
        return;
    }
    let store = store();
    let odd = store.beside("a b&c#d?e%20,f");
    let raw = store.beside("golden.raw");
    let run = |words: &[&str]| support::run(store.command(["--store"]).arg(&odd).args(words));
    run(&["image", "add", "golden", raw.to_str().unwrap()]);
    let serve = Process::start(store.command(["--store"]).arg(&odd).args(["serve", "--export", "golden"]));
    let said = serve.wait_for("ready", Duration::from_secs(20));
    let uri = said.split_whitespace().find(|word| word.starts_with("nbd+unix:")).expect("a URI").to_owned();
    support::run(Command::new("nbdinfo").arg(uri.replacen("///", "///golden", 1)));
}
