//! The pool against a real HTTP/2 server in mutual TLS.

#![expect(
    clippy::large_futures,
    reason = "a test runs one of them and then ends"
)]

use std::future::poll_fn;
use std::time::Duration;

use super::super::buffer::Queue;
use super::super::relay::Side as _;
use super::super::testing::{
    BANK, Bench, Frame, Network, Seen, accept_tls, bench, connect_request, give, permit, target,
    worker,
};
use super::*;
use crate::identity::testing::id;
use crate::model::{Reason, ToReason as _};

async fn open(bench: &Bench) -> Result<Opened, Error> {
    bench
        .pool
        .open(&permit(), &target(), connect_request())
        .await
}

/// Several opens at the same time.
async fn burst(bench: &Bench, streams: usize) -> Vec<Result<Opened, Error>> {
    let tasks: Vec<_> = (0..streams)
        .map(|_| {
            let pool = Rc::clone(&bench.pool);
            tokio::task::spawn_local(async move {
                pool.open(&permit(), &target(), connect_request()).await
            })
        })
        .collect();
    let mut opened = Vec::new();
    for task in tasks {
        opened.push(task.await.unwrap());
    }
    opened
}

fn cap(pool_streams: usize) -> Params {
    Params {
        pool_streams,
        ..Params::default()
    }
}

fn plain(_: &mut h2::server::Builder) {}

async fn until(what: impl Fn() -> bool) {
    for _ in 0..100_000 {
        if what() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("it did not happen");
}

/// Bytes there and back.
async fn echoes(opened: &Opened, text: &'static [u8]) -> Result<(), Error> {
    let mut queue = Queue::default();
    queue.push(Bytes::from_static(text));
    while !queue.is_empty() {
        poll_fn(|cx| opened.stream.poll_give(cx, &mut queue)).await?;
    }
    let mut got = 0;
    while got < text.len() {
        let more = poll_fn(|cx| opened.stream.poll_take(cx, &mut queue)).await?;
        assert!(more);
        let front = queue.front().unwrap();
        assert_eq!(*front, text[got..got + front.len()]);
        got += front.len();
        queue.clear();
    }
    opened.stream.taken(got);
    Ok(())
}

/// Behaviour 22.
#[tokio::test(start_paused = true)]
async fn sequential_connections_share_one_tunnel() {
    worker(async {
        let mut bench = bench(Params::default());
        let seen = bench.echo_peers(plain, 200);
        for _ in 0..3 {
            let opened = open(&bench).await.unwrap();
            assert_eq!(opened.peer, id("bank"));
            echoes(&opened, b"hello").await.unwrap();
        }
        assert_eq!((bench.dials.get(), seen.requests.get()), (1, 3));
    })
    .await;
}

/// Behaviour 23.
#[tokio::test(start_paused = true)]
async fn a_burst_below_the_cap_opens_one_tunnel() {
    worker(async {
        let mut bench = bench(cap(101));
        let seen = bench.echo_peers(plain, 200);
        let opened = burst(&bench, 100).await;
        assert!(opened.iter().all(Result::is_ok));
        assert_eq!((bench.dials.get(), seen.most.get()), (1, 100));
    })
    .await;
}

/// Behaviour 24; and, better than the established proxy, a full tunnel is used again when its
/// streams have ended.
#[tokio::test(start_paused = true)]
async fn the_cap_is_exact_and_a_full_tunnel_is_used_again() {
    worker(async {
        let mut bench = bench(cap(2));
        let seen = bench.echo_peers(plain, 200);
        let opened = burst(&bench, 5).await;
        assert!(opened.iter().all(Result::is_ok));
        assert_eq!((bench.dials.get(), seen.most.get()), (3, 2));
        drop(opened);
        until(|| seen.open.get() == 0).await;
        let opened = burst(&bench, 6).await;
        assert!(opened.iter().all(Result::is_ok));
        assert_eq!((bench.dials.get(), seen.most.get()), (3, 2));
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn the_peers_own_limit_is_honoured() {
    worker(async {
        let mut bench = bench(Params::default());
        let seen = bench.echo_peers(
            |b| {
                b.max_concurrent_streams(2);
            },
            200,
        );
        let opened = burst(&bench, 9).await;
        for opened in &opened {
            echoes(opened.as_ref().unwrap(), b"hello").await.unwrap();
        }
        assert_eq!((bench.dials.get(), seen.most.get()), (5, 2));
        drop(opened);
        until(|| seen.open.get() == 0).await;
        assert!(burst(&bench, 10).await.iter().all(Result::is_ok));
        assert_eq!((bench.dials.get(), seen.most.get()), (5, 2));
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_takes_no_streams_is_an_error() {
    worker(async {
        let mut bench = bench(Params::default());
        bench.echo_peers(
            |b| {
                b.max_concurrent_streams(0);
            },
            200,
        );
        for opened in burst(&bench, 3).await {
            let error = opened.unwrap_err();
            assert!(matches!(error, Error::NoStreams(_)), "{error}");
        }
    })
    .await;
}

/// Behaviours 25 and 26.
#[tokio::test(start_paused = true)]
async fn tunnels_are_shared_only_where_everything_is_the_same() {
    worker(async {
        let mut bench = bench(Params::default());
        bench.echo_peers(plain, 200);
        let other_source = Target {
            source: id("stranger"),
            ..target()
        };
        let other_names = Target {
            expected: vec![id("bank"), id("clearing")],
            ..target()
        };
        let other_ip = Target {
            source_ip: IpAddr::from([10, 0, 0, 2]),
            ..target()
        };
        let other_peer = Target {
            upstream: UpstreamAddr::new(([10, 0, 0, 10], 15008).into()),
            ..target()
        };
        let targets = [target(), other_source, other_names, other_ip, other_peer];
        let mut kept = Vec::new();
        for (index, target) in targets.iter().enumerate() {
            let opened = bench.pool.open(&permit(), target, connect_request()).await;
            kept.push(opened.unwrap());
            assert_eq!(bench.dials.get(), index + 1);
        }
    })
    .await;
}

/// Behaviour 27.
#[tokio::test(start_paused = true)]
async fn goodbye_from_the_peer_means_a_new_tunnel_while_old_streams_finish() {
    worker(async {
        let mut bench = bench(Params::default());
        let seen = bench.echo_peers(plain, 200);
        let old = open(&bench).await.unwrap();
        seen.shutdown.borrow()[0].send(()).unwrap();
        tokio::time::sleep(Duration::from_millis(10)).await;
        let new = open(&bench).await.unwrap();
        assert_eq!(bench.dials.get(), 2);
        echoes(&old, b"old").await.unwrap();
        echoes(&new, b"new").await.unwrap();
        drop(old);
        until(|| seen.closed.get() == 1).await;
        echoes(&new, b"new").await.unwrap();
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_whose_certificate_expired_takes_no_more_streams() {
    worker(async {
        let mut bench = bench(Params::default());
        let seen = bench.echo_peers(plain, 200);
        let old = open(&bench).await.unwrap();
        tokio::time::sleep(Duration::from_secs(3500)).await;
        drop(open(&bench).await.unwrap());
        assert_eq!(bench.dials.get(), 1);
        tokio::time::sleep(Duration::from_secs(101)).await;
        let new = open(&bench).await.unwrap();
        assert_eq!(bench.dials.get(), 2);
        echoes(&old, b"old").await.unwrap();
        echoes(&new, b"new").await.unwrap();
        drop(old);
        until(|| seen.closed.get() == 1).await;
        echoes(&new, b"new").await.unwrap();
    })
    .await;
}

/// Behaviour 28.
#[tokio::test(start_paused = true)]
async fn an_idle_tunnel_is_released_and_a_used_one_is_not() {
    worker(async {
        let idle = Duration::from_millis(100);
        let mut bench = bench(Params {
            idle_timeout: idle,
            ..Params::default()
        });
        let seen = bench.echo_peers(plain, 200);
        let opened = open(&bench).await.unwrap();
        tokio::time::sleep(idle * 30).await;
        echoes(&opened, b"still").await.unwrap();
        assert_eq!(seen.closed.get(), 0);
        drop(opened);
        let start = Instant::now();
        until(|| seen.closed.get() == 1).await;
        let took = start.elapsed();
        assert!(
            took >= idle && took < idle + Duration::from_millis(10),
            "{took:?}"
        );
        assert_eq!(bench.pool.shared.groups.borrow().len(), 0);
        open(&bench).await.unwrap();
        assert_eq!(bench.dials.get(), 2);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn of_the_tunnels_that_a_burst_needed_one_stays() {
    worker(async {
        let mut bench = bench(cap(2));
        let seen = bench.echo_peers(plain, 200);
        let mut opened = burst(&bench, 7).await;
        assert_eq!(bench.dials.get(), 4);
        let kept = opened.split_off(6);
        drop(opened);
        tokio::time::sleep(Duration::from_secs(9)).await;
        assert_eq!(seen.closed.get(), 0, "the next burst may come");
        // A used one stays, and one that has room.
        tokio::time::sleep(Duration::from_secs(12)).await;
        assert_eq!(seen.closed.get(), 2);
        echoes(kept[0].as_ref().unwrap(), b"still").await.unwrap();
        drop(kept);
        tokio::time::sleep(Duration::from_secs(21)).await;
        assert_eq!(seen.closed.get(), 3);
        open(&bench).await.unwrap();
        assert_eq!(bench.dials.get(), 4);
        tokio::time::sleep(Duration::from_secs(301)).await;
        assert_eq!(seen.closed.get(), 4, "unused for five minutes");
    })
    .await;
}

/// Behaviour 29.
#[tokio::test(start_paused = true)]
async fn a_failed_attempt_fails_all_who_wait_at_once() {
    worker(async {
        let bench = bench(Params::default());
        bench.network.set(Network::Refuses);
        let start = Instant::now();
        for opened in burst(&bench, 20).await {
            let error = opened.unwrap_err();
            assert_eq!(error.to_reason(), Reason::ConnectFailed, "{error}");
        }
        assert_eq!(start.elapsed(), Duration::ZERO);
        assert_eq!(bench.dials.get(), 1);
        assert_eq!(bench.pool.shared.groups.borrow().len(), 0);
    })
    .await;
}

/// Behaviour 30.
#[tokio::test(start_paused = true)]
async fn a_peer_whose_port_drops_packets_looks_like_a_network_policy() {
    worker(async {
        let bench = bench(Params::default());
        bench.network.set(Network::Drops);
        let start = Instant::now();
        for opened in burst(&bench, 3).await {
            assert_eq!(opened.unwrap_err().to_reason(), Reason::NetworkPolicy);
        }
        assert_eq!(start.elapsed(), Duration::from_secs(10));
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn each_handshake_that_stalls_has_its_own_deadline() {
    worker(async {
        let mut bench = bench(Params::default());
        let credentials = bench.authority.credentials(&[BANK]);
        let (permit, target) = (permit(), target());
        let start = Instant::now();
        let silent = bench.pool.open(&permit, &target, connect_request());
        let (opened, _io) = tokio::join!(silent, bench.far.recv());
        assert_eq!(opened.unwrap_err().to_reason(), Reason::TlsTimedOut);
        assert_eq!(start.elapsed(), Duration::from_secs(10));

        let start = Instant::now();
        let without_settings = bench.pool.open(&permit, &target, connect_request());
        let peer = async { accept_tls(bench.far.recv().await.unwrap(), &credentials).await };
        let (opened, _io) = tokio::join!(without_settings, peer);
        assert_eq!(opened.unwrap_err().to_reason(), Reason::H2TimedOut);
        assert_eq!(start.elapsed(), Duration::from_secs(10));

        let start = Instant::now();
        let unanswered = bench.pool.open(&permit, &target, connect_request());
        let peer = async {
            let tls = accept_tls(bench.far.recv().await.unwrap(), &credentials).await;
            let mut connection = h2::server::handshake(tls).await.unwrap();
            let first = connection.accept().await;
            tokio::task::spawn_local(async move { while connection.accept().await.is_some() {} });
            first
        };
        let (opened, _request) = tokio::join!(unanswered, peer);
        assert_eq!(opened.unwrap_err().to_reason(), Reason::PeerTimedOut);
        assert_eq!(start.elapsed(), Duration::from_secs(20));
    })
    .await;
}

/// Behaviour 14.
#[tokio::test(start_paused = true)]
async fn any_answer_but_200_refuses_and_is_not_retried() {
    for status in [201, 401, 403, 404, 429, 500, 503] {
        worker(async {
            let mut bench = bench(Params::default());
            let seen = bench.echo_peers(plain, status);
            let error = open(&bench).await.unwrap_err();
            assert!(
                matches!(error, Error::PeerRefused(s) if s == status),
                "{error}"
            );
            assert_eq!((seen.requests.get(), bench.dials.get()), (1, 1));
        })
        .await;
    }
}

/// Behaviour 15, with the reason that the access line gives.
#[tokio::test(start_paused = true)]
async fn a_peer_that_is_somebody_else_is_a_failed_handshake() {
    worker(async {
        let mut bench = bench(Params::default());
        bench.echo_peers_as_nobody();
        let error = open(&bench).await.unwrap_err();
        assert_eq!(error.to_reason(), Reason::TlsFailed, "{error}");
    })
    .await;
}

impl Bench {
    fn echo_peers_as_nobody(&mut self) -> Seen {
        let credentials = self
            .authority
            .credentials(&["spiffe://cluster.local/ns/shop/sa/else"]);
        let (_, empty) = tokio::sync::mpsc::unbounded_channel();
        let mut far = std::mem::replace(&mut self.far, empty);
        tokio::task::spawn_local(async move {
            while let Some(io) = far.recv().await {
                let tls = tokio_rustls::TlsAcceptor::from(credentials.server_config());
                assert!(tls.accept(io).await.is_err());
            }
        });
        Seen::default()
    }
}

#[tokio::test(start_paused = true)]
async fn giving_up_while_connecting_leaves_the_tunnel_to_the_others() {
    worker(async {
        let mut bench = bench(Params::default());
        let first = {
            let pool = Rc::clone(&bench.pool);
            tokio::task::spawn_local(async move {
                pool.open(&permit(), &target(), connect_request()).await
            })
        };
        let second = {
            let pool = Rc::clone(&bench.pool);
            tokio::task::spawn_local(async move {
                pool.open(&permit(), &target(), connect_request()).await
            })
        };
        until(|| bench.dials.get() == 1).await;
        first.abort();
        let seen = bench.echo_peers(plain, 200);
        let opened = second.await.unwrap().unwrap();
        echoes(&opened, b"hello").await.unwrap();
        assert_eq!((bench.dials.get(), seen.requests.get()), (1, 1));
        drop(opened);
        let tunnel = bench.pool.shared.groups.borrow()[&target()].tunnels[0]
            .used
            .get();
        assert_eq!(tunnel, 0);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_that_died_unseen_is_replaced_when_it_is_used_again() {
    worker(async {
        let mut bench = bench(Params::default());
        let credentials = bench.authority.credentials(&[BANK]);
        let mut far = std::mem::replace(&mut bench.far, tokio::sync::mpsc::unbounded_channel().1);
        let peers = tokio::task::spawn_local(async move {
            // The first answers one request and dies with the second; the next one lives.
            for requests in [1, 9] {
                let tls = accept_tls(far.recv().await.unwrap(), &credentials).await;
                let mut connection = h2::server::handshake(tls).await.unwrap();
                for number in 0.. {
                    let Some(Ok((_, mut respond))) = connection.accept().await else {
                        break;
                    };
                    if number == requests {
                        break;
                    }
                    respond.send_response(Response::new(()), true).unwrap();
                }
            }
        });
        open(&bench).await.unwrap();
        open(&bench).await.unwrap();
        assert_eq!(bench.dials.get(), 2);
        peers.abort();
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn dropping_the_pool_closes_idle_tunnels_and_ends_attempts() {
    worker(async {
        let mut bench = bench(Params::default());
        let seen = bench.echo_peers(plain, 200);
        let kept = open(&bench).await.unwrap();
        let Bench {
            pool,
            network,
            drain,
            ..
        } = bench;
        let waiting = {
            network.set(Network::Drops);
            let pool = Rc::clone(&pool);
            let target = Target {
                source: id("other"),
                ..target()
            };
            tokio::task::spawn_local(async move {
                pool.open(&permit(), &target, connect_request()).await
            })
        };
        tokio::time::sleep(Duration::from_millis(1)).await;
        waiting.abort();
        assert!(waiting.await.is_err());
        drop(pool);
        echoes(&kept, b"kept").await.unwrap();
        assert_eq!(seen.closed.get(), 0);
        drop(kept);
        let start = Instant::now();
        drain.finished().await;
        assert!(
            start.elapsed() < Duration::from_millis(1),
            "no task is left"
        );
        until(|| seen.closed.get() == 1).await;
    })
    .await;
}

/// Behaviours 148 and 149, for tunnels.
#[tokio::test(start_paused = true)]
async fn the_drain_releases_idle_tunnels_and_its_force_ends_all() {
    worker(async {
        let mut bench = bench(Params::default());
        let seen = bench.echo_peers(plain, 200);
        let kept = open(&bench).await.unwrap();
        bench.drain.graceful();
        echoes(&kept, b"kept").await.unwrap();
        bench.drain.force(Reason::Drained);
        let error = kept.stream.failed().await;
        assert_eq!(error.to_reason(), Reason::TunnelLost, "{error}");
        until(|| seen.closed.get() == 1).await;
    })
    .await;
}

/// Connections that were accepted before a drain have not all opened their streams when it begins.
#[tokio::test(start_paused = true)]
async fn a_graceful_drain_lets_those_who_wait_open_their_streams() {
    worker(async {
        let mut bench = bench(cap(5));
        let waiting: Vec<_> = (0..12)
            .map(|_| {
                let pool = Rc::clone(&bench.pool);
                tokio::task::spawn_local(async move {
                    pool.open(&permit(), &target(), connect_request()).await
                })
            })
            .collect();
        until(|| bench.dials.get() == 3).await;
        bench.drain.graceful();
        let seen = bench.echo_peers(plain, 200);
        let mut kept = Vec::new();
        for opened in waiting {
            kept.push(opened.await.unwrap().unwrap());
        }
        // On a tunnel that is there, and on new ones.
        kept.push(open(&bench).await.unwrap());
        let late = burst(&bench, 4).await;
        kept.extend(late.into_iter().map(Result::unwrap));
        for opened in &kept {
            echoes(opened, b"kept").await.unwrap();
        }
        assert_eq!(bench.dials.get(), 4);
        drop(kept);
        until(|| seen.closed.get() == 4).await;
        // With the peers gone idle, even the last of them is served.
        let last = open(&bench).await.unwrap();
        echoes(&last, b"last").await.unwrap();
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn an_endless_idle_time_keeps_the_tunnel() {
    worker(async {
        let mut bench = bench(Params {
            idle_timeout: Duration::MAX,
            ..Params::default()
        });
        let seen = bench.echo_peers(plain, 200);
        drop(open(&bench).await.unwrap());
        tokio::time::sleep(Duration::from_secs(60)).await;
        drop(open(&bench).await.unwrap());
        assert_eq!((bench.dials.get(), seen.closed.get()), (1, 0));
    })
    .await;
}

/// Port of a peer's application that never reads.
const DEAF: u16 = 1;
/// Port of one that sends without end.
const LOUD: u16 = 2;

impl Bench {
    /// A peer with windows like ours and three applications; the third sends back what comes.
    fn busy_peers(&mut self) {
        let credentials = self.authority.credentials(&[BANK]);
        let (_, empty) = tokio::sync::mpsc::unbounded_channel();
        let mut far = std::mem::replace(&mut self.far, empty);
        tokio::task::spawn_local(async move {
            while let Some(io) = far.recv().await {
                let tls = accept_tls(io, &credentials).await;
                let mut builder = h2::server::Builder::new();
                builder
                    .initial_window_size(4 << 20)
                    .initial_connection_window_size(16 << 20);
                tokio::task::spawn_local(async move {
                    let mut connection = builder.handshake(tls).await.unwrap();
                    while let Some(Ok((request, respond))) = connection.accept().await {
                        tokio::task::spawn_local(application(request, respond));
                    }
                });
            }
        });
    }

    async fn open_to(&self, port: u16) -> Opened {
        let request = Request::connect(format!("10.0.0.9:{port}"));
        let request = request.body(()).unwrap();
        let opened = self.pool.open(&permit(), &target(), request).await;
        opened.unwrap()
    }
}

async fn application(
    request: Request<h2::RecvStream>,
    mut respond: h2::server::SendResponse<Bytes>,
) {
    let port = request.uri().port_u16().unwrap();
    let mut recv = request.into_body();
    let mut send = respond.send_response(Response::new(()), false).unwrap();
    match port {
        DEAF => drop(poll_fn(|cx| send.poll_reset(cx)).await),
        LOUD => while give(&mut send, Bytes::from(vec![7; 1 << 16])).await.is_ok() {},
        _ => {
            while let Some(Ok(data)) = recv.data().await {
                recv.flow_control().release_capacity(data.len()).unwrap();
                give(&mut send, data).await.unwrap();
            }
        }
    }
}

/// Sends for ever.
async fn upload(opened: Opened) {
    let mut queue = Queue::default();
    loop {
        queue.push(Bytes::from(vec![7; 1 << 16]));
        while !queue.is_empty() {
            let given = poll_fn(|cx| opened.stream.poll_give(cx, &mut queue)).await;
            given.unwrap();
        }
    }
}

/// Takes what comes and delivers none of it, as for a client that does not read.
async fn download(opened: Opened) {
    let mut queue = Queue::default();
    loop {
        let taken = poll_fn(|cx| opened.stream.poll_take(cx, &mut queue)).await;
        assert!(taken.unwrap());
    }
}

impl H2Stream {
    fn tunnel(&self) -> &Tunnel {
        &self.slot().unwrap().tunnel
    }
}

fn load(bench: &Bench) -> Rc<Load> {
    Rc::clone(&bench.pool.shared.groups.borrow()[&target()].tunnels[0].load)
}

#[tokio::test(start_paused = true)]
async fn uploads_that_nobody_reads_stop_no_other_connection() {
    worker(async {
        let mut bench = bench(Params::default());
        bench.busy_peers();
        let mut uploads = Vec::new();
        for _ in 0..6 {
            let opened = bench.open_to(DEAF).await;
            uploads.push(tokio::task::spawn_local(upload(opened)));
        }
        let load = load(&bench);
        until(|| load.stalled() == 6).await;
        let fresh = bench.open_to(80).await;
        let echo = timeout(Duration::from_secs(1), echoes(&fresh, b"hello"));
        echo.await.unwrap().unwrap();
        assert_eq!(bench.dials.get(), 2);
        // The second serves until it is busy too; the first does again once it is not.
        drop(bench.open_to(80).await);
        assert_eq!(bench.dials.get(), 2);
        uploads.iter().for_each(tokio::task::JoinHandle::abort);
        until(|| load.stalled() == 0).await;
        let again = bench.open_to(80).await;
        assert!(Rc::ptr_eq(&again.stream.tunnel().load, &load));
        echoes(&again, b"hello").await.unwrap();
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn downloads_that_nobody_reads_stop_no_other_connection() {
    worker(async {
        let mut bench = bench(Params::default());
        bench.busy_peers();
        let mut downloads = Vec::new();
        for _ in 0..6 {
            let opened = bench.open_to(LOUD).await;
            downloads.push(tokio::task::spawn_local(download(opened)));
        }
        let window = Params::default().connection_window_bytes;
        let load = load(&bench);
        until(|| load.is_busy(window)).await;
        let fresh = bench.open_to(80).await;
        let echo = timeout(Duration::from_secs(1), echoes(&fresh, b"hello"));
        echo.await.unwrap().unwrap();
        downloads.iter().for_each(tokio::task::JoinHandle::abort);
        until(|| !load.is_busy(window)).await;
        let again = bench.open_to(80).await;
        assert!(Rc::ptr_eq(&again.stream.tunnel().load, &load));
        echoes(&again, b"hello").await.unwrap();
    })
    .await;
}

/// Standing still is no way to make us open tunnels without end.
#[tokio::test(start_paused = true)]
async fn streams_that_stand_still_open_only_so_many_tunnels() {
    worker(async {
        let mut bench = bench(Params::default());
        bench.busy_peers();
        for number in 1..=4 * BUSY_TUNNELS {
            let opened = bench.open_to(DEAF).await;
            let load = Rc::clone(&opened.stream.tunnel().load);
            let before = load.stalled();
            tokio::task::spawn_local(upload(opened));
            until(|| load.stalled() > before).await;
            let dials = number.div_ceil(3).min(BUSY_TUNNELS);
            assert_eq!(bench.dials.get(), dials, "{number} streams");
        }
    })
    .await;
}

/// A peer that speaks frames: TLS, our preface and SETTINGS are behind it.
async fn raw_peer(
    bench: &mut Bench,
) -> (
    tokio_rustls::server::TlsStream<tokio::io::DuplexStream>,
    Frame,
) {
    let credentials = bench.authority.credentials(&[BANK]);
    let mut tls = accept_tls(bench.far.recv().await.unwrap(), &credentials).await;
    let mut preface = [0; 24];
    tokio::io::AsyncReadExt::read_exact(&mut tls, &mut preface)
        .await
        .unwrap();
    assert_eq!(&preface, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
    let settings = Frame::read(&mut tls).await.unwrap();
    Frame::empty(Frame::SETTINGS, 0).write(&mut tls).await;
    Frame::empty(Frame::SETTINGS, Frame::ACK)
        .write(&mut tls)
        .await;
    (tls, settings)
}

/// The stream of the next request.
async fn asked(tls: &mut (impl AsyncRead + Unpin)) -> u32 {
    loop {
        let frame = Frame::read(tls).await.unwrap();
        if frame.kind == Frame::HEADERS {
            return frame.stream;
        }
    }
}

/// `:status: 200` from the static table of HPACK.
fn ok_response(stream: u32) -> Frame {
    Frame {
        kind: Frame::HEADERS,
        flags: 4,
        stream,
        payload: vec![0x88],
    }
}

/// An Envoy whose server has finished first says both in one breath.
#[tokio::test(start_paused = true)]
async fn an_end_and_no_error_in_one_breath_are_an_end() {
    worker(async {
        let mut bench = bench(Params::default());
        let pool = Rc::clone(&bench.pool);
        let opening = tokio::task::spawn_local(async move {
            pool.open(&permit(), &target(), connect_request())
                .await
                .unwrap()
        });
        let (mut tls, _) = raw_peer(&mut bench).await;
        let stream = asked(&mut tls).await;
        let frame = |kind, flags, payload: &[u8]| Frame {
            kind,
            flags,
            stream,
            payload: payload.to_vec(),
        };
        ok_response(stream).write(&mut tls).await;
        frame(Frame::DATA, 0, b"ans").write(&mut tls).await;
        frame(Frame::DATA, 1, b"wer").write(&mut tls).await;
        frame(Frame::RST_STREAM, 0, &[0; 4]).write(&mut tls).await;
        let opened = opening.await.unwrap();
        let mut queue = Queue::default();
        let mut answer = Vec::new();
        while poll_fn(|cx| opened.stream.poll_take(cx, &mut queue))
            .await
            .unwrap()
        {
            while let Some(chunk) = queue.front() {
                answer.extend_from_slice(&chunk.split_to(chunk.len()));
                queue.advance(0);
            }
        }
        assert_eq!(answer, b"answer");
    })
    .await;
}

/// A peer that resets the stream and is gone may be noticed by either, and it is the same end.
#[tokio::test(start_paused = true)]
async fn a_tunnel_that_ends_under_a_request_is_lost_whatever_is_noticed_first() {
    worker(async {
        for resets in [false, true] {
            let mut bench = bench(Params::default());
            let pool = Rc::clone(&bench.pool);
            let opening = tokio::task::spawn_local(async move {
                pool.open(&permit(), &target(), connect_request()).await
            });
            let (mut tls, _) = raw_peer(&mut bench).await;
            let stream = asked(&mut tls).await;
            if resets {
                let cancel = u32::from(h2::Reason::CANCEL);
                let reset = Frame {
                    kind: Frame::RST_STREAM,
                    flags: 0,
                    stream,
                    payload: cancel.to_be_bytes().to_vec(),
                };
                reset.write(&mut tls).await;
            }
            drop(tls);
            let error = opening.await.unwrap().unwrap_err();
            assert_eq!(error.to_reason(), Reason::TunnelLost, "{resets}: {error}");
        }
    })
    .await;
}

/// Behaviours 6, 7, 20 and 21.
#[tokio::test(start_paused = true)]
async fn greets_with_its_settings_and_leaves_a_peer_that_answers_no_ping() {
    worker(async {
        let mut bench = bench(Params::default());
        let pool = Rc::clone(&bench.pool);
        let opening = tokio::task::spawn_local(async move {
            pool.open(&permit(), &target(), connect_request())
                .await
                .unwrap()
        });
        let (mut tls, settings) = raw_peer(&mut bench).await;
        let start = Instant::now();
        assert_eq!(settings.kind, Frame::SETTINGS);
        let expected = [(2, 0), (4, 4 << 20), (5, 1 << 20), (6, 16 << 10)];
        assert_eq!(settings.settings(), expected.into_iter().collect());
        let mut opened = None;
        let mut opening = Some(opening);
        let mut pings = Vec::new();
        let mut kinds = Vec::new();
        while let Ok(frame) = Frame::read(&mut tls).await {
            kinds.push((frame.kind, frame.stream));
            if frame.kind == Frame::WINDOW_UPDATE && frame.stream == 0 {
                assert_eq!(frame.payload, ((16_u32 << 20) - 65_535).to_be_bytes());
            }
            if frame.kind == Frame::HEADERS {
                // `:method: CONNECT` has no index; the authority is the only other field.
                assert!(
                    frame.payload.windows(7).any(|w| w == b"CONNECT") || !frame.payload.is_empty()
                );
                ok_response(frame.stream).write(&mut tls).await;
                opened = Some(opening.take().unwrap().await.unwrap());
            }
            if frame.kind == Frame::PING {
                pings.push(start.elapsed().as_secs());
            }
        }
        assert!(kinds.contains(&(Frame::WINDOW_UPDATE, 0)), "{kinds:?}");
        assert_eq!(pings, [10], "one is on its way until it is answered");
        assert_eq!(start.elapsed().as_secs(), 30);
        let error = opened.unwrap().stream.failed().await;
        assert_eq!(error.to_reason(), Reason::TunnelLost, "{error}");
    })
    .await;
}

/// Behaviour 21, and that other frames count as life.
#[tokio::test(start_paused = true)]
async fn pings_every_ten_seconds_and_data_is_a_sign_of_life() {
    worker(async {
        let mut bench = bench(Params::default());
        let pool = Rc::clone(&bench.pool);
        let opening = tokio::task::spawn_local(async move {
            pool.open(&permit(), &target(), connect_request())
                .await
                .unwrap()
        });
        let (tls, _) = raw_peer(&mut bench).await;
        let start = Instant::now();
        let (mut read, mut write) = tokio::io::split(tls);
        let mut pings = Vec::new();
        let mut opened = None;
        let mut opening = Some(opening);
        let mut update = Frame::empty(Frame::WINDOW_UPDATE, 0);
        update.payload = vec![0, 0, 0, 1];
        let mut busy = tokio::time::interval(Duration::from_secs(7));
        let (tx, mut frames) = tokio::sync::mpsc::unbounded_channel();
        tokio::task::spawn_local(async move {
            while let Ok(frame) = Frame::read(&mut read).await {
                tx.send(frame).unwrap();
            }
        });
        while start.elapsed() < Duration::from_secs(121) {
            tokio::select! {
                Some(mut frame) = frames.recv() => match frame.kind {
                    Frame::HEADERS => {
                        ok_response(frame.stream).write(&mut write).await;
                        opened = Some(opening.take().unwrap().await.unwrap());
                    }
                    Frame::PING => {
                        pings.push(start.elapsed().as_secs());
                        // Answers for a minute, then only speaks.
                        if start.elapsed() < Duration::from_secs(60) {
                            frame.flags = Frame::ACK;
                            frame.write(&mut write).await;
                        }
                    }
                    _ => {}
                },
                _ = busy.tick() => update.write(&mut write).await,
            }
        }
        assert_eq!(pings, [10, 20, 30, 40, 50, 60]);
        let lost = timeout(Duration::ZERO, opened.as_ref().unwrap().stream.failed()).await;
        assert!(lost.is_err(), "it still speaks");
    })
    .await;
}
