//! The web page: nodes, images, deployments and instances at a glance, plans taken and ended (`002`'s user interface).
//!
//! A client of the controller like the commands, with its user's credentials; it is not part of the controller and
//! keeps nothing. It listens on loopback alone, and every request for data must carry the token that is in the page's
//! address, so that neither another user of the host nor another page in the same browser can ask for anything.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, Path, Request, State};
use axum::http::{HeaderName, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::json;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::controller::client::{Client, ClientError, Target};
use crate::peer::transport::Security;
use crate::plan::TEXT_BYTES_MAX;
use crate::plan::read::parse;
use crate::wire::cluster::{Body, Deploy, End, Found, Query};
use crate::wire::link::CallError;

/// A plan in a request: JSON may write a character with six.
const REQUEST_BYTES_MAX: usize = 6 * TEXT_BYTES_MAX + 4096;
/// Nothing but the page's own files is loaded, and no other page may show it in a frame.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'";

/// Why the page cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum WebError {
    /// An address that others reach.
    #[error(
        "the page is for this host alone: listen on 127.0.0.1, and reach it from another by `ssh -L {0}:127.0.0.1:{0} HOST`"
    )]
    NotLoopback(u16),
    /// The address cannot be had.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system says.
        source: std::io::Error,
    },
    /// No token could be made.
    #[error("the kernel gives no random numbers: {0}")]
    Token(std::io::Error),
}

/// The page, bound to its address.
#[derive(Debug)]
pub struct Web {
    listener: TcpListener,
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    target: Target,
    security: Security,
    token: String,
}

impl Web {
    /// A page on `address` for the controller at `target`.
    ///
    /// # Errors
    /// [`WebError`].
    pub async fn bind(address: SocketAddr, target: Target, security: Security) -> Result<Self, WebError> {
        if !address.ip().is_loopback() {
            return Err(WebError::NotLoopback(address.port()));
        }
        let listen = |source| WebError::Listen { address, source };
        let listener = TcpListener::bind(address).await.map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;
        let random = std::fs::read_to_string("/proc/sys/kernel/random/uuid").map_err(WebError::Token)?;
        let token = random.trim().to_owned();
        Ok(Self { listener, address, shared: Arc::new(Shared { target, security, token }) })
    }

    /// What to open in a browser; whoever knows it may do what the user may. The token is behind `#`, which browsers
    /// send to nobody.
    pub fn url(&self) -> String {
        format!("http://{}/#{}", self.address, self.shared.token)
    }

    /// Serves until `cancel`.
    ///
    /// # Errors
    /// Those of the socket.
    pub async fn run(self, cancel: CancellationToken) -> std::io::Result<()> {
        let api = Router::new()
            .route("/api/{what}", get(list))
            .route("/api/tasks", get(|state| list(state, Path("tasks".to_owned()))).post(deploy))
            .route("/api/tasks/{task}", delete(end))
            .layer(DefaultBodyLimit::max(REQUEST_BYTES_MAX))
            .layer(from_fn_with_state(Arc::clone(&self.shared), authorised))
            .with_state(self.shared);
        let app = Router::new()
            .route("/", get(|| file("text/html; charset=utf-8", include_str!("web/page.html"))))
            .route("/page.js", get(|| file("text/javascript; charset=utf-8", include_str!("web/page.js"))))
            .route("/page.css", get(|| file("text/css; charset=utf-8", include_str!("web/page.css"))))
            .merge(api);
        let stop = async move { cancel.cancelled().await };
        axum::serve(self.listener, app).with_graceful_shutdown(stop).await
    }
}

async fn file(content_type: &'static str, text: &'static str) -> impl IntoResponse {
    let headers: [(HeaderName, &str); 4] = [
        (header::CONTENT_TYPE, content_type),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ];
    (headers, text)
}

/// Lets through what carries the token.
async fn authorised(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    let given = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let given = given.and_then(|value| value.strip_prefix("Bearer "));
    // Compared by digest: the time that takes tells nothing of the token.
    let same =
        given.is_some_and(|given| blake3::hash(given.as_bytes()) == blake3::hash(shared.token.as_bytes()));
    if same {
        next.run(request).await
    } else {
        Refusal(StatusCode::UNAUTHORIZED, "open the address that `bootcache web` printed".to_owned())
            .into_response()
    }
}

/// Why a request was not carried out.
struct Refusal(StatusCode, String);

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.0, Json(json!({ "error": self.1 }))).into_response()
    }
}

impl From<ClientError> for Refusal {
    fn from(error: ClientError) -> Self {
        let status = match &error {
            ClientError::Call(CallError::Refused(_)) => StatusCode::BAD_REQUEST,
            _ => StatusCode::BAD_GATEWAY,
        };
        Self(status, error.to_string())
    }
}

impl Shared {
    async fn call<B: Body>(&self, body: &B) -> Result<B::Answer, Refusal> {
        let mut client = Client::connect(&self.target, &self.security).await?;
        Ok(client.call(body).await?)
    }
}

async fn list(State(shared): State<Arc<Shared>>, Path(what): Path<String>) -> Result<Response, Refusal> {
    let query = match what.as_str() {
        "nodes" => Query::nodes(),
        "images" => Query::images(),
        "tasks" => Query::tasks(None),
        "instances" => Query::instances(None),
        _ => return Err(Refusal(StatusCode::NOT_FOUND, format!("there is no list of {what}"))),
    };
    let mut client = Client::connect(&shared.target, &shared.security).await?;
    Ok(match client.list(&query).await? {
        Found::Nodes(rows) => Json(rows).into_response(),
        Found::Images(rows) => Json(rows).into_response(),
        Found::Tasks(rows) => Json(rows).into_response(),
        Found::Instances(rows) => Json(rows).into_response(),
    })
}

/// A plan as the page sends it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Order {
    /// As in [`Deploy`]: sent twice, it is one deployment.
    request: String,
    /// TOML or JSON.
    plan: String,
}

async fn deploy(State(shared): State<Arc<Shared>>, Json(order): Json<Order>) -> Result<Response, Refusal> {
    let plan = parse(&order.plan).map_err(|mistakes| {
        let lines: Vec<String> = mistakes.iter().map(ToString::to_string).collect();
        Refusal(StatusCode::BAD_REQUEST, lines.join("\n"))
    })?;
    let deployed = shared.call(&Deploy { request: order.request, plan }).await?;
    Ok(Json(deployed).into_response())
}

async fn end(State(shared): State<Arc<Shared>>, Path(task): Path<i64>) -> Result<Response, Refusal> {
    shared.call(&End { task }).await?;
    Ok(Json(json!({})).into_response())
}

#[cfg(test)]
mod tests;
