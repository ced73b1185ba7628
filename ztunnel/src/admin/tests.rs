//! What a probe and a scraper get, over real sockets.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::task::JoinHandle;

use super::*;
use crate::drain::{self, Trigger};

const LOOPBACK: SocketAddr = SocketAddr::new(
    std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST),
    0, // the kernel chooses
);

fn start(handler: impl Handler) -> (SocketAddr, Trigger, JoinHandle<()>) {
    let server = Server::bind(LOOPBACK).unwrap();
    let addr = server.addr();
    let (trigger, signal) = drain::channel();
    (addr, trigger, tokio::spawn(server.serve(handler, signal)))
}

/// Sends one request on a connection of its own and gives all that comes back.
async fn ask(addr: SocketAddr, request: &str) -> String {
    String::from_utf8(ask_bytes(addr, request).await).unwrap()
}

async fn ask_bytes(addr: SocketAddr, request: &str) -> Vec<u8> {
    let mut socket = TcpStream::connect(addr).await.unwrap();
    let head = format!("{request}Host: localhost\r\nConnection: close\r\n\r\n");
    socket.write_all(head.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer).await.unwrap();
    answer
}

fn body(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").unwrap().1
}

#[tokio::test]
async fn both_paths_give_the_page_and_accept_decides_its_type() {
    let accounts = Accounts::new(1);
    let (addr, _trigger, _server) = start(Stats::new(accounts));
    for path in ["/metrics", "/stats/prometheus"] {
        let answer = ask(addr, &format!("GET {path} HTTP/1.1\r\n")).await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(answer.contains("content-type: text/plain; charset=utf-8\r\n"));
        assert!(body(&answer).contains("process_open_fds "), "{answer}");
        assert!(body(&answer).ends_with("# EOF\n"), "{answer}");

        let accept = "Accept: text/html, application/openmetrics-text;version=1.0.0\r\n";
        let answer = ask(addr, &format!("GET {path} HTTP/1.1\r\n{accept}")).await;
        assert!(answer.contains("content-type: application/openmetrics-text; version=1.0.0;"));
        assert!(body(&answer).ends_with("# EOF\n"), "{answer}");
    }
    for (accept, packed) in [
        ("gzip", true),
        ("br, gzip;q=0.5", true),
        ("gzip;q=0", false),
    ] {
        let request = format!("GET /metrics HTTP/1.1\r\nAccept-Encoding: {accept}\r\n");
        let bytes = ask_bytes(addr, &request).await;
        let end = bytes.windows(4).position(|at| at == b"\r\n\r\n").unwrap() + 4;
        let head = String::from_utf8_lossy(&bytes[..end]);
        assert_eq!(
            head.contains("content-encoding: gzip\r\n"),
            packed,
            "{head}"
        );
        let mut page = String::new();
        let body = &bytes[end..];
        if packed {
            let mut unpack = flate2::read::GzDecoder::new(body);
            io::Read::read_to_string(&mut unpack, &mut page).unwrap();
        } else {
            page = String::from_utf8_lossy(body).into_owned();
        }
        assert!(page.ends_with("# EOF\n"), "{page}");
    }
    let answer = ask(addr, "POST /metrics HTTP/1.1\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 405 "), "{answer}");
    assert!(answer.contains("allow: GET, HEAD\r\n"), "{answer}");
    let answer = ask(addr, "GET /other HTTP/1.1\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 404 "), "{answer}");
}

#[tokio::test]
async fn readiness_names_what_is_pending_sorted_until_nothing_is() {
    let readiness = Readiness::default();
    let proxy = readiness.task("workload proxy manager");
    let state = readiness.task("state manager");
    let again = readiness.task("state manager");
    let (addr, _trigger, _server) = start(readiness);
    for (done, answer) in [
        (
            None,
            "not ready, pending: state manager, workload proxy manager",
        ),
        (
            Some(state),
            "not ready, pending: state manager, workload proxy manager",
        ),
        (Some(again), "not ready, pending: workload proxy manager"),
    ] {
        drop(done);
        let got = ask(addr, "GET /healthz/ready HTTP/1.1\r\n").await;
        assert!(got.starts_with("HTTP/1.1 500 "), "{got}");
        assert_eq!(body(&got), answer);
    }
    drop(proxy);
    let got = ask(addr, "GET /healthz/ready HTTP/1.1\r\n").await;
    assert!(got.starts_with("HTTP/1.1 200 "), "{got}");
    assert_eq!(body(&got), "ready");
    let got = ask(addr, "POST /healthz/ready HTTP/1.1\r\n").await;
    assert!(got.starts_with("HTTP/1.1 405 "), "{got}");
    let got = ask(addr, "GET /healthz HTTP/1.1\r\n").await;
    assert!(got.starts_with("HTTP/1.1 404 "), "{got}");
}

#[tokio::test]
async fn pods_in_trouble_are_told_and_leave_the_node_ready() {
    let readiness = Readiness::default();
    let (addr, _trigger, _server) = start(readiness.clone());
    for (troubled, answer) in [(2, "ready\npods in trouble: 2, see the log"), (0, "ready")] {
        readiness.troubled(troubled);
        let got = ask(addr, "GET /healthz/ready HTTP/1.1\r\n").await;
        assert!(got.starts_with("HTTP/1.1 200 "), "{got}");
        assert_eq!(body(&got), answer);
    }
}

#[tokio::test]
async fn a_drain_closes_the_listener_and_idle_connections_and_ends_the_server() {
    let (addr, trigger, server) = start(Readiness::default());
    let mut idle = TcpStream::connect(addr).await.unwrap();
    idle.write_all(b"GET /healthz/ready HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .await
        .unwrap();
    let mut answer = [0; 17];
    idle.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200 OK\r\n");
    trigger.graceful();
    server.await.unwrap();
    let mut rest = Vec::new();
    idle.read_to_end(&mut rest).await.unwrap();
    let refused = TcpStream::connect(addr).await.unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    trigger.finished().await;
}

// In real time: a paused clock does not wait for packets that are on their way.
#[tokio::test]
async fn a_request_that_stalls_is_cut_and_one_that_is_too_long_is_refused() {
    let (addr, _trigger, _server) = start(Readiness::default());
    let began = tokio::time::Instant::now();
    let mut stalled = TcpStream::connect(addr).await.unwrap();
    stalled.write_all(b"GET /healthz/re").await.unwrap();
    let mut rest = Vec::new();
    stalled.read_to_end(&mut rest).await.unwrap();
    assert!(began.elapsed() >= HEADER_READ_TIMEOUT);

    let long = format!("GET /{} HTTP/1.1\r\n", "a".repeat(BUFFER_BYTES));
    let mut socket = TcpStream::connect(addr).await.unwrap();
    socket.write_all(long.as_bytes()).await.unwrap();
    let mut start = [0; 12];
    socket.read_exact(&mut start).await.unwrap();
    assert!(start.starts_with(b"HTTP/1.1 4"), "{start:?}");
}

#[tokio::test]
async fn a_flood_of_silent_connections_holds_every_place_only_until_they_time_out() {
    let (addr, _trigger, _server) = start(Readiness::default());
    let began = tokio::time::Instant::now();
    let mut silent = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        silent.push(TcpStream::connect(addr).await.unwrap());
    }
    let got = ask(addr, "GET /healthz/ready HTTP/1.1\r\n").await;
    assert_eq!(body(&got), "ready");
    assert!(began.elapsed() >= HEADER_READ_TIMEOUT);
}

#[tokio::test]
async fn a_taken_port_is_named_with_what_to_look_at() {
    let first = Server::bind(LOOPBACK).unwrap();
    let error = Server::bind(first.addr()).unwrap_err().to_string();
    let port = first.addr().port();
    assert_eq!(
        error,
        format!("listen on 127.0.0.1:{port} (who holds it: ss -ltnp 'sport = :{port}')")
    );
    let elsewhere = Server::bind("192.0.2.1:0".parse().unwrap()).unwrap_err();
    assert!(elsewhere.to_string().contains("192.0.2.1:0"), "{elsewhere}");
}

/// The operator's port over a mesh of nothing.
fn operator() -> (Operate, tokio::sync::mpsc::Receiver<()>) {
    let (quit, quits) = tokio::sync::mpsc::channel(1);
    let operate = Operate {
        sources: Sources {
            world: watch::channel(crate::control::World::default()).1,
            pods: watch::channel(Arc::default()).1,
            store: crate::identity::testing::store(crate::identity::testing::Authority::new()),
            accounts: Accounts::new(1),
            config: serde_json::json!({}),
            istio_version: "unknown".into(),
        },
        levels: crate::logging::Levels::new("info".parse().unwrap()),
        quit,
        turn: Arc::new(tokio::sync::Semaphore::new(1)),
    };
    (operate, quits)
}

// B115, B116, B117.
#[tokio::test]
async fn the_log_filter_is_shown_changed_reset_and_refused() {
    let (operate, _quits) = operator();
    let (addr, _trigger, _server) = start(operate);
    for (request, status, part) in [
        ("GET /logging", 405, "usage: POST /logging"),
        ("POST /logging", 200, "current log level is info"),
        (
            "POST /logging?level=access=debug,warn",
            200,
            "is access=debug,warn",
        ),
        ("POST /logging?level=ztunnel%3Ddebug", 200, "access=debug"),
        ("POST /logging?level=foo", 400, "foo"),
        ("POST /logging?level=access:debug", 400, "access:debug"),
        ("POST /logging?volume=up", 400, "volume"),
        ("POST /logging", 200, "ztunnel=debug"),
        ("POST /logging?level=error&reset", 200, "is error\n"),
        ("POST /logging?reset", 200, "is info\n"),
    ] {
        let answer = ask(addr, &format!("{request} HTTP/1.1\r\n")).await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{request}: {answer}"
        );
        assert!(body(&answer).contains(part), "{request}: {answer}");
    }
}

// B118, B119.
#[tokio::test]
async fn quitting_wants_a_post_and_what_is_not_built_says_so() {
    let (operate, mut quits) = operator();
    let (addr, _trigger, _server) = start(operate);
    let page = |origin: &str| format!("POST /quitquitquit HTTP/1.1\r\nOrigin: {origin}\r\n");
    for origin in [
        "https://example.com",
        "null",
        "http://localhost.example.com:15000",
    ] {
        let answer = ask(addr, &page(origin)).await;
        assert!(answer.starts_with("HTTP/1.1 403 "), "{origin}: {answer}");
    }
    assert!(quits.try_recv().is_err(), "a page of somebody else's");
    for (request, status) in [
        ("GET /", 200),
        ("GET /quitquitquit", 405),
        ("GET /debug/pprof/profile?seconds=0", 400),
        ("GET /debug/pprof/profile?seconds=301", 400),
        ("GET /debug/pprof/profile?frequency=5000", 400),
        ("GET /debug/pprof/profile?seconds=1&frequency=100", 501),
        ("GET /debug/pprof/heap", 500),
        ("GET /debug/pprof/heap/profiling", 200),
        ("GET /debug/pprof/heap/profiling?activate=false", 200),
        ("GET /debug/pprof/heap/profiling?activate=true", 501),
        ("GET /debug/pprof/heap/profiling?activate=1", 400),
        ("GET /other", 404),
    ] {
        let answer = ask(addr, &format!("{request} HTTP/1.1\r\n")).await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{request}: {answer}"
        );
    }
    assert!(quits.try_recv().is_err(), "nobody asked for the end yet");
    let answer = ask(addr, "POST /quitquitquit HTTP/1.1\r\n").await;
    assert_eq!(body(&answer), "shutdown now\n");
    assert!(quits.recv().await.is_some());
}

#[tokio::test]
async fn a_request_that_names_another_host_is_refused() {
    let (operate, mut quits) = operator();
    let (addr, _trigger, _server) = start(operate);
    for (host, status) in [
        ("localhost:15000", 200),
        ("127.0.0.1", 200),
        ("[::1]:15000", 200),
        ("evil.example:15000", 403),
        ("10.0.0.1:15000", 403),
        ("not a host", 403),
    ] {
        let mut socket = TcpStream::connect(addr).await.unwrap();
        let head = format!("POST /logging HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        socket.write_all(head.as_bytes()).await.unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).await.unwrap();
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{host}: {answer}"
        );
    }
    assert!(quits.try_recv().is_err());
}
