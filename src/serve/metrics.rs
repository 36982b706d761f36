//! What this node has done, for Prometheus: one page, made anew for each scrape from the counters that `status` shows.
//!
//! Names end in their unit; counters begin anew with the daemon. Labels are image and overlay names, kinds and addresses:
//! as many series as there are images, open overlays and sources.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::node::Node;
use crate::control::{OverlayInfo, Reply, Request, Status, TransferStatus, WaitStatus};
use crate::peer::server::ServerCounters;
use crate::transfer::Kind;

/// How long the pages that are being sent may take when the daemon ends.
const LAST_PAGES: Duration = Duration::from_secs(1);

type Labels = Vec<(&'static str, String)>;
type Seconds = Family<Labels, Counter<f64, AtomicU64>>;

/// What a scrape reads.
#[derive(Clone)]
pub(super) struct Source {
    pub(super) node: Arc<Node>,
    /// Of the peer server, if there is one.
    pub(super) served: Option<Arc<ServerCounters>>,
}

/// Serves `/metrics` on `listener` until `cancel`. Pages under way may take [`LAST_PAGES`] then; who has sent half a
/// request, or reads no answer, is not waited for.
pub(super) async fn serve(source: Source, listener: TcpListener, cancel: CancellationToken) {
    let app = Router::new().route("/metrics", get(page)).with_state(source);
    let stop = cancel.clone().cancelled_owned();
    let over = async {
        cancel.cancelled().await;
        tokio::time::sleep(LAST_PAGES).await;
    };
    tokio::select! {
        served = axum::serve(listener, app).with_graceful_shutdown(stop).into_future() => {
            if let Err(error) = served {
                tracing::error!(%error, "metrics are no longer served");
            }
        }
        () = over => {}
    }
}

/// Binds `address`.
///
/// # Errors
/// Those of the socket.
pub(super) async fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(address).await
}

async fn page(State(source): State<Source>) -> Response {
    let Ok(Reply::Status(status)) = source.node.handle(Request::Status).await else {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    };
    let text = render(&status, source.served.as_deref());
    ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text)
        .into_response()
}

/// The families of a page.
#[derive(Default)]
struct Families {
    received: Family<Labels, Counter>,
    origin: Family<Labels, Counter>,
    from_source: Family<Labels, Counter>,
    copied: Family<Labels, Counter>,
    data: Family<Labels, Gauge>,
    present: Family<Labels, Gauge>,
    overlay: Overlays,
    reads: Family<Labels, Counter>,
    waited: Seconds,
    blocked: Seconds,
    waiting: Family<Labels, Gauge>,
    events: Family<Labels, Counter>,
    sent: Family<Labels, Counter>,
    peers: Family<Labels, Gauge>,
}

/// What clients of overlays do, wherever the images below are.
#[derive(Default)]
struct Overlays {
    data: Family<Labels, Gauge>,
    clients: Family<Labels, Gauge>,
    reads: Family<Labels, Counter>,
    read: Family<Labels, Counter>,
    written: Family<Labels, Counter>,
}

fn render(status: &Status, served: Option<&ServerCounters>) -> String {
    let families = Families::default();
    for image in &status.images {
        let labels = vec![("image", image.name.to_string())];
        families.data.get_or_create(&labels).set(image.allocated.cast_signed());
        families.present.get_or_create(&labels).set(image.present.cast_signed());
        if let Some(transfer) = &image.transfer {
            families.transfer(image.name.as_str(), transfer);
        }
    }
    for overlay in &status.overlays {
        families.overlay.note(overlay);
        if let Some(waits) = &overlay.waits {
            families.waits(&[("overlay", overlay.name.to_string())], waits);
        }
    }
    if let Some(served) = served {
        families.served(served);
    }
    let mut registry = Registry::with_prefix("bootcache");
    registry.register("build", "What runs", Info::new([("version", status.version.clone())]));
    let up = ConstGauge::new(status.uptime_seconds.cast_signed());
    registry.register("uptime_seconds", "Time since the daemon was ready", up);
    families.register(&mut registry);
    let mut text = String::new();
    encode(&mut text, &registry).expect("a string takes every write");
    text
}

impl Overlays {
    fn note(&self, overlay: &OverlayInfo) {
        let labels = vec![("overlay", overlay.name.to_string())];
        self.data.get_or_create(&labels).set(overlay.data.cast_signed());
        self.clients.get_or_create(&labels).set(overlay.connections.into());
        self.reads.get_or_create(&labels).inc_by(overlay.reads);
        self.read.get_or_create(&labels).inc_by(overlay.read_bytes);
        self.written.get_or_create(&labels).inc_by(overlay.written_bytes);
    }

    fn register(self, registry: &mut Registry) {
        registry.register("data_bytes", "Bytes that an overlay holds itself", self.data);
        registry.register("clients", "NBD clients that have it open", self.clients);
        registry.register("read_requests", "Reads of its clients", self.reads);
        registry.register("read_bytes", "Bytes that they asked for", self.read);
        registry.register("written_bytes", "Bytes that its clients wrote", self.written);
    }
}

impl Families {
    fn transfer(&self, image: &str, transfer: &TransferStatus) {
        let labels = vec![("image", image.to_owned())];
        let with = |name, value: &str| [labels.clone(), vec![(name, value.to_owned())]].concat();
        for (kind, bytes) in Kind::ALL.into_iter().zip(transfer.bytes) {
            self.received.get_or_create(&with("kind", kind.name())).inc_by(bytes);
        }
        for source in &transfer.sources {
            self.from_source.get_or_create(&with("source", &source.address.to_string())).inc_by(source.bytes);
        }
        self.origin.get_or_create(&labels).inc_by(transfer.origin_bytes);
        self.copied.get_or_create(&labels).inc_by(transfer.similar_bytes);
        self.present.get_or_create(&labels).set(transfer.present.cast_signed());
        let events = [
            ("hedge", transfer.hedges),
            ("failover", transfer.failovers),
            ("corrupt", transfer.corrupt),
            ("ban", transfer.bans),
        ];
        for (event, count) in events {
            self.events.get_or_create(&with("event", event)).inc_by(count);
        }
        self.waits(&labels, &transfer.waits);
    }

    fn waits(&self, labels: &[(&'static str, String)], waits: &WaitStatus) {
        let with = |name, value: &str| [labels.to_vec(), vec![(name, value.to_owned())]].concat();
        let reads = [
            ("hit", waits.hits),
            ("stream", waits.stream_waits),
            ("demand", waits.demand_waits - waits.misses.min(waits.demand_waits)),
            ("miss", waits.misses),
        ];
        for (outcome, count) in reads {
            self.reads.get_or_create(&with("outcome", outcome)).inc_by(count);
        }
        let times =
            [("stream", waits.stream_wait_ms), ("demand", waits.demand_wait_ms), ("disk", waits.local_ms)];
        for (what, ms) in times {
            self.waited.get_or_create(&with("for", what)).inc_by(seconds(ms));
        }
        self.blocked.get_or_create(&labels.to_vec()).inc_by(seconds(waits.blocked_ms));
        self.waiting.get_or_create(&labels.to_vec()).set(waits.waiting.cast_signed());
    }

    fn served(&self, served: &ServerCounters) {
        let kinds = [
            (Kind::Stream.name(), &served.stream_bytes),
            (Kind::Demand.name(), &served.demand_bytes),
            (Kind::Fill.name(), &served.fill_bytes),
            ("other", &served.other_bytes),
        ];
        for (kind, bytes) in kinds {
            let labels = vec![("kind", kind.to_owned())];
            self.sent.get_or_create(&labels).inc_by(bytes.load(Ordering::Relaxed));
        }
        self.peers.get_or_create(&Vec::new()).set(served.connections.load(Ordering::Relaxed).cast_signed());
    }

    fn register(self, registry: &mut Registry) {
        let mut add = |name, help, metric: Family<Labels, Counter>| registry.register(name, help, metric);
        add(
            "received_bytes",
            "Bytes of an image that came over the network, by what they were for",
            self.received,
        );
        add("received_origin_bytes", "Of these, from where the image was published", self.origin);
        add("received_source_bytes", "The same, by source", self.from_source);
        add(
            "copied_bytes",
            "Bytes copied from other images on this node instead of being fetched",
            self.copied,
        );
        add("reads", "Guests' reads, by what they found", self.reads);
        add("transfer_events", "Requests sent twice or again, wrong answers, bans", self.events);
        add("sent_bytes", "Bytes sent to other nodes", self.sent);
        registry.register(
            "waited_seconds",
            "Time of reads, by what they waited for, summed over reads",
            self.waited,
        );
        registry.register("blocked_seconds", "Time in which at least one read waited", self.blocked);
        registry.register("waiting_reads", "Reads that wait now", self.waiting);
        registry.register("data_bytes", "Bytes of an image, zeroes left out", self.data);
        registry.register("present_bytes", "Of these, those that are here", self.present);
        registry.register("peer_connections", "Connections of other nodes", self.peers);
        self.overlay.register(registry.sub_registry_with_prefix("overlay"));
    }
}

fn seconds(ms: u64) -> f64 {
    ms as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;
    use crate::control::ImageStatus;
    use crate::digest::Digest;
    use crate::image::manifest::ImageKind;

    #[tokio::test]
    async fn a_client_that_sends_half_a_request_does_not_hold_up_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let node = Arc::new(Node::open(crate::store::Store::open(dir.path()).unwrap()).unwrap());
        let listener = bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
        let address = listener.local_addr().unwrap();
        let cancel = CancellationToken::new();
        let serving = tokio::spawn(serve(Source { node, served: None }, listener, cancel.clone()));
        let mut half = TcpStream::connect(address).await.unwrap();
        half.write_all(b"GET ").await.unwrap();
        // Answered after the other has been accepted.
        let mut whole = TcpStream::connect(address).await.unwrap();
        whole.write_all(b"GET /metrics HTTP/1.1\r\nHost: n\r\nConnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        whole.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        cancel.cancel();
        tokio::time::timeout(Duration::from_secs(10), serving).await.expect("it ends").unwrap();
        drop(half);
    }

    #[test]
    fn a_page_has_every_counter_by_its_name() {
        let waits = WaitStatus {
            hits: 7,
            stream_waits: 3,
            demand_waits: 5,
            misses: 2,
            blocked_ms: 1500,
            ..WaitStatus::default()
        };
        let image = ImageStatus {
            name: "debian".parse().unwrap(),
            root: Digest([1; 32]),
            kind: ImageKind::Vm,
            boot_bytes: 0,
            boot: None,
            complete: true,
            size: 1 << 20,
            open: true,
            present: 4096,
            allocated: 8192,
            pulled: false,
            transfer: None,
        };
        let mut overlay = OverlayInfo::new("vm".parse().unwrap(), Some(image.root));
        (overlay.connections, overlay.written_bytes, overlay.waits) = (1, 512, Some(waits));
        let status = Status {
            pid: 1,
            version: "0.1".to_owned(),
            uptime_seconds: 5,
            images: vec![image],
            overlays: vec![overlay],
            vms: Vec::new(),
        };
        let served = ServerCounters::default();
        served.stream_bytes.store(99, Ordering::Relaxed);
        let text = render(&status, Some(&served));
        for line in [
            r#"bootcache_build_info{version="0.1"} 1"#,
            "bootcache_uptime_seconds 5",
            r#"bootcache_present_bytes{image="debian"} 4096"#,
            r#"bootcache_data_bytes{image="debian"} 8192"#,
            r#"bootcache_overlay_clients{overlay="vm"} 1"#,
            r#"bootcache_overlay_written_bytes_total{overlay="vm"} 512"#,
            r#"bootcache_reads_total{overlay="vm",outcome="hit"} 7"#,
            r#"bootcache_reads_total{overlay="vm",outcome="demand"} 3"#,
            r#"bootcache_reads_total{overlay="vm",outcome="miss"} 2"#,
            r#"bootcache_blocked_seconds_total{overlay="vm"} 1.5"#,
            r#"bootcache_sent_bytes_total{kind="stream"} 99"#,
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in:\n{text}");
        }
    }
}
