//! The tracer in processes of other people: what it notes, what it flags, and that it leaves them alone.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use bootcache::boot_cache::recording::Recording;
use bootcache::trace::{Trace, TraceError};

const IMAGE_BYTES: usize = 1 << 20;
const FOREVER_NS: u64 = u64::MAX;

/// A folder with an image and, after a run, its trace.
struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("image"), support::noise(7, IMAGE_BYTES)).unwrap();
        std::fs::write(folder.path().join("other"), support::noise(8, IMAGE_BYTES)).unwrap();
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Compiles a C program; false when there is no compiler.
    fn compile(&self, source: &str, flags: &[&str]) -> bool {
        if !support::require(&["cc"]) {
            return false;
        }
        let file = self.path("subject.c");
        std::fs::write(&file, source).unwrap();
        let mut cc = Command::new("cc");
        cc.args(["-D_GNU_SOURCE", "-pthread", "-o"]).arg(self.path("subject")).arg(&file).args(flags);
        support::run(&mut cc);
        true
    }

    /// Runs a command in the folder with the tracer.
    fn run<S: AsRef<std::ffi::OsStr>>(
        &self,
        program: &Path,
        arguments: impl IntoIterator<Item = S>,
    ) -> Output {
        let _ = std::fs::remove_file(self.path("trace"));
        Trace::create(&self.path("trace"), &self.path("image")).unwrap();
        let mut command = Command::new(program);
        command
            .args(arguments)
            .current_dir(self.folder.path())
            .env("LD_PRELOAD", library())
            .env("BOOTCACHE_TRACE_IMAGE", self.path("image"))
            .env("BOOTCACHE_TRACE_OUT", self.path("trace"));
        command.output().unwrap_or_else(|error| panic!("{}: {error}", program.display()))
    }

    fn run_subject(&self) -> Output {
        self.run::<&str>(&self.path("subject"), [])
    }

    fn recording(&self) -> Result<Recording, TraceError> {
        Trace::open(&self.path("trace")).unwrap().recording(IMAGE_BYTES as u64, FOREVER_NS)
    }

    fn ranges(&self) -> Vec<(u64, u64)> {
        self.recording().unwrap().reads.iter().map(|read| (read.offset, read.length)).collect()
    }
}

/// Beside the test program: the tracer is a dev-dependency for that.
fn library() -> PathBuf {
    let library = std::env::current_exe().unwrap().with_file_name("libbootcache_tracer.so");
    assert!(library.is_file(), "{} is made by cargo test", library.display());
    library
}

fn succeeded(output: &Output) {
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn every_way_to_read_is_noted_with_what_was_really_read() {
    let bench = Bench::new();
    let source = r#"
        #include <fcntl.h>
        #include <stdio.h>
        #include <sys/sendfile.h>
        #include <sys/syscall.h>
        #include <sys/uio.h>
        #include <unistd.h>
        int main(void) {
            char a[8192], b[100];
            struct iovec two[2] = {{a, 1000}, {b, 24}};
            int other = open("other", O_RDONLY), out = open("out", O_RDWR | O_CREAT, 0600);
            int fd = open("image", O_RDONLY);
            loff_t at = 600000;
            read(other, a, 100);
            read(fd, a, 4096);
            read(fd, a, 512);
            readv(fd, two, 2);
            pread(fd, a, 4096, 100000);
            pread64(fd, a, 4096, 200000);
            preadv(fd, two, 2, 300000);
            preadv2(fd, two, 2, 400000, 0);
            preadv2(fd, two, 2, -1, 0);
            syscall(SYS_pread64, fd, a, 10L, 500000L);
            copy_file_range(fd, &at, out, NULL, 7000, 0);
            at = 700000;
            sendfile(out, fd, &at, 8000);
            pread(fd, a, 8192, 1048576 - 1000);
            pread(fd, a, 8192, 1048576);
            lseek(fd, 50000, SEEK_SET);
            read(fd, a, 300);
            lseek(fd, 10000, SEEK_CUR);
            readv(fd, two, 2);
            return 0;
        }"#;
    if !bench.compile(source, &["-O2", "-D_FORTIFY_SOURCE=2", "-w"]) {
        return;
    }
    succeeded(&bench.run_subject());
    let expected = [
        (0, 4096),
        (4096, 512),
        (4608, 1024),
        (100_000, 4096),
        (200_000, 4096),
        (300_000, 1024),
        (400_000, 1024),
        (5632, 1024),
        (500_000, 10),
        (600_000, 7000),
        (700_000, 8000),
        (1_048_576 - 1000, 1000),
        (50_000, 300),
        (60_300, 1024),
    ];
    assert_eq!(bench.ranges(), expected);
    assert!(bench.recording().unwrap().reads.iter().all(|read| read.took_ns > 0));
}

#[test]
fn it_does_not_matter_how_a_descriptor_was_come_by() {
    let bench = Bench::new();
    let source = r#"
        #include <fcntl.h>
        #include <stdio.h>
        #include <string.h>
        #include <sys/socket.h>
        #include <sys/wait.h>
        #include <unistd.h>
        static void give(int socket, int fd) {
            char byte = 0, room[CMSG_SPACE(sizeof(int))] = {0};
            struct iovec one = {&byte, 1};
            struct msghdr message = {0, 0, &one, 1, room, sizeof room, 0};
            struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
            rights->cmsg_level = SOL_SOCKET, rights->cmsg_type = SCM_RIGHTS, rights->cmsg_len = CMSG_LEN(sizeof(int));
            memcpy(CMSG_DATA(rights), &fd, sizeof fd);
            sendmsg(socket, &message, 0);
        }
        static int take(int socket) {
            char byte, room[CMSG_SPACE(sizeof(int))];
            struct iovec one = {&byte, 1};
            struct msghdr message = {0, 0, &one, 1, room, sizeof room, 0};
            int fd = -1;
            if (recvmsg(socket, &message, 0) == 1) memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
            return fd;
        }
        int main(void) {
            char a[16];
            int pair[2], fd = open("image", O_RDONLY), copy = dup(fd), status;
            socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
            pread(copy, a, 1, 1000);
            pread(fcntl(fd, F_DUPFD, 100), a, 2, 2000);
            int other = open("other", O_RDONLY);
            pread(other, a, 16, 5);                 /* known not to be the image ... */
            dup2(fd, other);
            pread(other, a, 3, 3000);               /* ... until it is */
            dup2(open("other", O_RDONLY), copy);
            pread(copy, a, 16, 6);                  /* and the other way round */
            close(other);
            give(pair[0], fd);
            pread(take(pair[1]), a, 4, 4000);       /* the same number again, received */
            if (fork() == 0) { pread(fd, a, 5, 5000); _exit(0); }
            wait(&status);
            link("image", "hard");
            pread(open("hard", O_RDONLY), a, 6, 6000);
            FILE *stream = fopen("other", "r");
            pread(fileno(stream), a, 16, 7);
            fclose(stream);                         /* which closes the number inside libc */
            give(pair[0], fd);
            pread(take(pair[1]), a, 7, 7000);       /* the same number again */
            return 0;
        }"#;
    if !bench.compile(source, &["-w"]) {
        return;
    }
    succeeded(&bench.run_subject());
    assert_eq!(bench.ranges(), [1, 2, 3, 4, 5, 6, 7].map(|n| (n * 1000, n)));
}

#[test]
fn the_program_does_not_notice() {
    let bench = Bench::new();
    let source = r#"
        #include <errno.h>
        #include <fcntl.h>
        #include <pthread.h>
        #include <unistd.h>
        static int ends[2], image;
        static void *blocked(void *x) { char c; read(ends[0], &c, 1); return x; }
        static void *busy(void *x) {
            char c[512];
            for (int i = 0; i < 20000; i++) if (pread(image, c, 512, (i % 2048) * 512) != 512) return "short";
            return NULL;
        }
        int main(void) {
            char c;
            void *result;
            pthread_t thread, threads[8];
            image = open("image", O_RDONLY);
            errno = 4711;
            if (read(image, &c, 1) != 1 || errno != 4711) return 1;
            if (read(-1, &c, 1) != -1 || errno != EBADF) return 2;
            errno = 0;
            if (pread(image, &c, 1, -1) != -1 || errno != EINVAL) return 3;
            pipe(ends);
            pthread_create(&thread, NULL, blocked, NULL);
            usleep(50000);
            pthread_cancel(thread);                  /* unwinds through the hook */
            pthread_join(thread, &result);
            if (result != PTHREAD_CANCELED) return 4;
            for (int i = 0; i < 8; i++) pthread_create(&threads[i], NULL, busy, NULL);
            for (int i = 0; i < 8; i++) { pthread_join(threads[i], &result); if (result) return 5; }
            return 0;
        }"#;
    if !bench.compile(source, &["-w"]) {
        return;
    }
    let output = bench.run_subject();
    succeeded(&output);
    assert_eq!((output.stdout.len(), output.stderr.len()), (0, 0), "it says nothing");
    assert_eq!(bench.ranges().len(), 160_001);
}

#[test]
fn the_trace_outlives_kill_9() {
    let bench = Bench::new();
    let source = r#"
        #include <fcntl.h>
        #include <signal.h>
        #include <unistd.h>
        int main(void) {
            char c[64];
            int fd = open("image", O_RDONLY);
            for (int i = 0; i < 1000; i++) pread(fd, c, 64, i * 64);
            kill(getpid(), SIGKILL);
        }"#;
    if !bench.compile(source, &["-w"]) {
        return;
    }
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&bench.run_subject().status), Some(9));
    let expected: Vec<(u64, u64)> = (0..1000).map(|index| (index * 64, 64)).collect();
    assert_eq!(bench.ranges(), expected);
}

#[test]
fn a_static_program_is_noticed() {
    let bench = Bench::new();
    let source = r#"
        #include <fcntl.h>
        #include <unistd.h>
        int main(void) { char c; return read(open("image", O_RDONLY), &c, 1) == 1 ? 0 : 1; }"#;
    if !bench.compile(source, &["-static"]) {
        return;
    }
    succeeded(&bench.run_subject());
    assert!(matches!(bench.recording(), Err(TraceError::NotAttached)));
}

#[test]
fn reads_that_are_not_recorded_are_flagged() {
    if !support::require(&["fio", "qemu-io", "md5sum"]) {
        return;
    }
    let bench = Bench::new();
    let fio = |engine: &str| {
        let job = ["--name=x", "--filename=image", "--rw=randread", "--bs=4k", "--thread"].map(str::to_owned);
        succeeded(&bench.run(Path::new("fio"), job.into_iter().chain([format!("--ioengine={engine}")])));
        bench.recording()
    };
    assert!(matches!(fio("io_uring"), Err(TraceError::Unseen(_))));
    assert!(matches!(fio("mmap"), Err(TraceError::Unseen(_))));
    assert!(matches!(fio("posixaio"), Err(TraceError::Unseen(_))));
    succeeded(&bench.run(Path::new("md5sum"), ["image"]));
    assert!(matches!(bench.recording(), Err(TraceError::Unseen("stdio or POSIX aio"))));
    let qemu_io = |aio: &str| {
        let arguments =
            ["-f", "raw", "-r", "-n", "-i", aio, "-c", "aio_read 8192 4096", "-c", "aio_flush", "image"];
        succeeded(&bench.run(Path::new("qemu-io"), arguments));
        bench.recording()
    };
    assert!(matches!(qemu_io("io_uring"), Err(TraceError::Unseen("io_uring"))));
    // QEMU waits with an io_uring whatever it reads with: that is no reason to doubt the trace.
    for aio in ["threads", "native"] {
        let reads = qemu_io(aio).unwrap().reads;
        assert!(reads.iter().any(|read| (read.offset, read.length) == (8192, 4096)), "{aio}: {reads:?}");
    }
}

#[test]
fn libaio_is_noted_once_a_request() {
    if !support::require(&["fio"]) {
        return;
    }
    let bench = Bench::new();
    let job =
        ["--name=x", "--filename=image", "--rw=randread", "--bs=4k", "--iodepth=16", "--ioengine=libaio"];
    succeeded(&bench.run(Path::new("fio"), job.iter().chain(&["--direct=1", "--thread"])));
    let ranges = bench.ranges();
    assert_eq!(ranges.len(), IMAGE_BYTES / 4096);
    assert_eq!(ranges.iter().collect::<BTreeSet<_>>().len(), IMAGE_BYTES / 4096);
}
