use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::*;
use crate::controller::{Controller, Options, SOCKET};

struct Page {
    address: SocketAddr,
    token: String,
    controller: Controller,
    _dir: tempfile::TempDir,
}

impl Page {
    async fn open() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let controller = Controller::start(Options::new(dir.path())).await.unwrap();
        let target = Target::Socket(dir.path().join(SOCKET));
        let web = Web::bind("127.0.0.1:0".parse().unwrap(), target, Security::default()).await.unwrap();
        let url = web.url();
        let (place, token) = url.strip_prefix("http://").unwrap().split_once("/#").unwrap();
        let (address, token) = (place.parse().unwrap(), token.to_owned());
        tokio::spawn(web.run(CancellationToken::new()));
        Self { address, token, controller, _dir: dir }
    }

    /// The whole answer to a request, head and all.
    async fn ask(&self, request: &str, token: &str, body: &str) -> String {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let head = format!(
            "{request} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\nauthorization: Bearer {token}\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            self.address,
            body.len()
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    async fn call(&self, request: &str, body: &str) -> String {
        self.ask(request, &self.token, body).await
    }
}

#[tokio::test]
async fn the_page_is_there_for_everybody_and_loads_nothing_from_elsewhere() {
    let page = Page::open().await;
    for (path, begins) in [("/", "<!doctype html>"), ("/page.js", "// Asks"), ("/page.css", ":root")] {
        let answer = page.ask(&format!("GET {path}"), "", "").await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(answer.contains("content-security-policy: default-src 'none'"), "{answer}");
        assert!(answer.split("\r\n\r\n").nth(1).unwrap().starts_with(begins), "{answer}");
        assert!(!answer.contains("https://"), "{path}");
    }
}

#[tokio::test]
async fn nothing_is_told_or_done_without_the_token() {
    let page = Page::open().await;
    for request in ["GET /api/nodes", "GET /api/tasks", "POST /api/tasks", "DELETE /api/tasks/1"] {
        for token in ["", "a", &page.token[1..], &format!("{}0", page.token)] {
            let answer = page.ask(request, token, "").await;
            assert!(answer.starts_with("HTTP/1.1 401"), "{request}: {answer}");
            assert!(answer.contains("open the address that"), "{answer}");
        }
    }
}

#[tokio::test]
async fn lists_are_json_and_orders_reach_the_controller() {
    let page = Page::open().await;
    for what in ["nodes", "images", "tasks", "instances"] {
        let answer = page.call(&format!("GET /api/{what}"), "").await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("\r\n\r\n[]"), "{answer}");
    }
    assert!(page.call("GET /api/secrets", "").await.starts_with("HTTP/1.1 404"));
    // A mistake in the text is found with its line, one that only the controller can know in its words.
    let unreadable = r#"{"request":"a","plan":"name = \"lab\"\nnonsense = 1"}"#;
    let answer = page.call("POST /api/tasks", unreadable).await;
    assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("line 2: "), "{answer}");
    let no_image = r#"{"request":"a","plan":"name = \"lab\"\n[[groups]]\nname = \"g\"\ntype = \"vm\"\nimage = \"debian\"\nmemory = 16\ncount = 1"}"#;
    let answer = page.call("POST /api/tasks", no_image).await;
    assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("debian"), "{answer}");
    let answer = page.call("DELETE /api/tasks/7", "").await;
    assert!(answer.starts_with("HTTP/1.1 400") && answer.contains('7'), "{answer}");
    page.controller.stop().await;
    let answer = page.call("GET /api/nodes", "").await;
    assert!(answer.starts_with("HTTP/1.1 502") && answer.contains("no controller runs here"), "{answer}");
}

#[tokio::test]
async fn others_cannot_reach_it() {
    let bound =
        Web::bind("0.0.0.0:7680".parse().unwrap(), Target::Socket("s".into()), Security::default()).await;
    assert!(bound.unwrap_err().to_string().contains("ssh -L 7680:127.0.0.1:7680"));
}
