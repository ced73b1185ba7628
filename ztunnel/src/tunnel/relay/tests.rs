//! Bytes, ends and resets between real sockets and real streams.

#![expect(
    clippy::large_futures,
    reason = "a test runs one of them and then ends"
)]

use std::future::poll_fn as poll;
use std::io;
use std::time::Duration;

use bytes::Bytes;
use h2::{RecvStream, SendStream};
use socket2::SockRef;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};
use tokio::task::JoinHandle;

use super::super::Params;
use super::super::stream::H2Stream;
use super::super::testing::{Counts, connect_request, give, tcp_pair, worker};
use super::*;
use crate::authz::{Live, Policies};
use crate::identity::testing::id;
use crate::model::{Reason, ToReason as _, WorkloadUid};

/// The two ends of one stream: ours, and the halves of a peer that is the HTTP/2 library itself.
struct Stream {
    ours: H2Stream,
    send: SendStream<Bytes>,
    recv: RecvStream,
    /// The peer's connection, to be aborted.
    peer: JoinHandle<()>,
}

/// We accept, the peer has opened.
async fn stream() -> Stream {
    stream_with(&Params::default()).await
}

async fn stream_with(params: &Params) -> Stream {
    let (near, far) = duplex(1 << 16);
    let mut server = h2::server::Builder::new();
    server
        .initial_window_size(params.stream_window_bytes)
        .initial_connection_window_size(params.connection_window_bytes)
        .max_send_buffer_size(params.send_buffer_bytes);
    let (client, server) = tokio::join!(h2::client::handshake(far), server.handshake(near));
    let (sender, client) = client.unwrap();
    let peer = tokio::task::spawn_local(async move { drop(client.await) });
    let mut server: h2::server::Connection<_, Bytes> = server.unwrap();
    let mut sender = sender.ready().await.unwrap();
    let (response, send) = sender.send_request(connect_request(), false).unwrap();
    let (request, mut respond) = server.accept().await.unwrap().unwrap();
    let ours = respond
        .send_response(http::Response::new(()), false)
        .unwrap();
    tokio::task::spawn_local(async move { while server.accept().await.is_some() {} });
    Stream {
        ours: H2Stream::new(ours, request.into_body(), None),
        send,
        recv: response.await.unwrap().into_body(),
        peer,
    }
}

/// A relay under way.
struct Relay {
    end: JoinHandle<Result<(), Error>>,
    live: Live,
    drain: drain::Trigger,
    counts: Counts,
}

fn start(a: impl Side + 'static, b: impl Side + 'static) -> Relay {
    let live = Live::default();
    let permit = live.outbound(&WorkloadUid("cart".into()), id("cart"));
    let (drain, mut signal) = drain::channel();
    let counts = Counts::default();
    let meter = counts.clone();
    let end =
        tokio::task::spawn_local(async move { relay(a, b, &permit, &meter, &mut signal).await });
    Relay {
        end,
        live,
        drain,
        counts,
    }
}

/// An application on one end, the peer on the other, we between them.
async fn tcp_to_stream() -> (TcpStream, Relay, Stream2) {
    let (app, ours) = tcp_pair().await;
    let stream = stream().await;
    let relay = start(ours, stream.ours);
    (
        app,
        relay,
        Stream2 {
            send: stream.send,
            recv: stream.recv,
            peer: stream.peer,
        },
    )
}

struct Stream2 {
    send: SendStream<Bytes>,
    recv: RecvStream,
    peer: JoinHandle<()>,
}

impl Stream2 {
    /// The next bytes, with their credit given back; empty at the end.
    async fn read(&mut self) -> Result<Bytes, h2::Error> {
        match self.recv.data().await {
            Some(data) => {
                let data = data?;
                self.recv.flow_control().release_capacity(data.len())?;
                Ok(data)
            }
            None => Ok(Bytes::new()),
        }
    }

    async fn read_all(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            let data = self.read().await.unwrap();
            if data.is_empty() {
                return all;
            }
            all.extend_from_slice(&data);
        }
    }

    async fn reset(&mut self) -> h2::Reason {
        poll(|cx| self.send.poll_reset(cx)).await.unwrap()
    }
}

/// What a socket says after a reset.
async fn is_reset(app: &mut TcpStream) -> bool {
    let mut buffer = [0; 4096];
    loop {
        match app.read(&mut buffer).await {
            Ok(0) => return false,
            Ok(_) => {}
            Err(e) => return e.kind() == io::ErrorKind::ConnectionReset,
        }
    }
}

/// Bytes that show where they belong.
fn pattern(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_u32;
    std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    })
    .take(len)
    .collect()
}

/// Behaviours 122 and 125, through a stream.
#[tokio::test]
async fn every_size_arrives_whole_both_ways_and_is_counted() {
    for len in [1, 16 << 10, 1 << 20, 40 << 20] {
        worker(async {
            let (app, relay, mut peer) = tcp_to_stream().await;
            let data = pattern(len);
            let (mut read, mut write) = app.into_split();
            let up = data.clone();
            let writer = tokio::task::spawn_local(async move {
                write.write_all(&up).await.unwrap();
                write.shutdown().await.unwrap();
            });
            assert!(peer.read_all().await == data);
            writer.await.unwrap();
            let down = Bytes::from(data.clone());
            let sender = tokio::task::spawn_local(async move {
                give(&mut peer.send, down).await.unwrap();
                peer.send.send_data(Bytes::new(), true).unwrap();
            });
            let mut got = Vec::new();
            read.read_to_end(&mut got).await.unwrap();
            assert!(got == data);
            sender.await.unwrap();
            relay.end.await.unwrap().unwrap();
            let len = u64::try_from(len).unwrap();
            assert_eq!(
                (relay.counts.received.get(), relay.counts.sent.get()),
                (len, len)
            );
        })
        .await;
    }
}

/// Behaviour 122, between two sockets, both ways at once.
#[tokio::test]
async fn sockets_are_relayed_both_ways_at_once() {
    worker(async {
        let ((client, a), (b, server)) = (tcp_pair().await, tcp_pair().await);
        let relay = start(a, b);
        let data = pattern(20 << 20);
        let mut tasks = Vec::new();
        for socket in [client, server] {
            let (mut read, mut write) = socket.into_split();
            let out = data.clone();
            tasks.push(tokio::task::spawn_local(async move {
                write.write_all(&out).await.unwrap();
                write.shutdown().await.unwrap();
                Vec::new()
            }));
            tasks.push(tokio::task::spawn_local(async move {
                let mut got = Vec::new();
                read.read_to_end(&mut got).await.unwrap();
                got
            }));
        }
        for task in tasks {
            let got = task.await.unwrap();
            assert!(got.is_empty() || got == data);
        }
        relay.end.await.unwrap().unwrap();
        assert_eq!(relay.counts.received.get(), relay.counts.sent.get());
    })
    .await;
}

/// Behaviour 118.
#[tokio::test]
async fn a_client_that_has_finished_still_gets_the_whole_answer() {
    worker(async {
        let (mut app, relay, mut peer) = tcp_to_stream().await;
        app.write_all(b"question").await.unwrap();
        app.shutdown().await.unwrap();
        assert_eq!(peer.read_all().await, b"question");
        give(&mut peer.send, Bytes::from_static(b"answer"))
            .await
            .unwrap();
        peer.send.send_data(Bytes::new(), true).unwrap();
        let mut answer = Vec::new();
        app.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"answer");
        relay.end.await.unwrap().unwrap();
    })
    .await;
}

/// Behaviours 97 and 119.
#[tokio::test]
async fn a_server_that_speaks_first_and_finishes_first_still_hears_everything() {
    worker(async {
        let (mut app, relay, mut peer) = tcp_to_stream().await;
        give(&mut peer.send, Bytes::from_static(b"banner"))
            .await
            .unwrap();
        peer.send.send_data(Bytes::new(), true).unwrap();
        let mut banner = Vec::new();
        app.read_to_end(&mut banner).await.unwrap();
        assert_eq!(banner, b"banner");
        app.write_all(b"late").await.unwrap();
        app.shutdown().await.unwrap();
        assert_eq!(peer.read_all().await, b"late");
        relay.end.await.unwrap().unwrap();
    })
    .await;
}

/// Behaviour 120, better: a reset stays a reset.
#[tokio::test]
async fn a_reset_socket_resets_the_stream() {
    worker(async {
        let (mut app, relay, mut peer) = tcp_to_stream().await;
        app.write_all(b"x").await.unwrap();
        peer.read().await.unwrap();
        app.abort();
        drop(app);
        assert_eq!(peer.reset().await, h2::Reason::CANCEL);
        let error = relay.end.await.unwrap().unwrap_err();
        assert_eq!(error.to_reason(), Reason::Reset);
    })
    .await;
}

#[tokio::test]
async fn what_was_sent_before_a_reset_is_delivered_if_there_is_room() {
    worker(async {
        let ((mut client, a), (b, mut server)) = (tcp_pair().await, tcp_pair().await);
        let relay = start(a, b);
        client.write_all(b"last words").await.unwrap();
        client.abort();
        drop(client);
        let mut heard = [0; 10];
        server.read_exact(&mut heard).await.unwrap();
        assert_eq!(&heard, b"last words");
        assert!(is_reset(&mut server).await);
        assert!(matches!(relay.end.await.unwrap(), Err(Error::Reset)));
    })
    .await;
}

/// Behaviour 121, better: the application sees what happened.
#[tokio::test]
async fn a_reset_stream_resets_the_socket() {
    for reason in [
        h2::Reason::CANCEL,
        h2::Reason::INTERNAL_ERROR,
        // Not after a whole answer, so it is not the clean end.
        h2::Reason::NO_ERROR,
    ] {
        worker(async {
            let (mut app, relay, mut peer) = tcp_to_stream().await;
            app.write_all(b"x").await.unwrap();
            peer.read().await.unwrap();
            peer.send.send_reset(reason);
            assert!(is_reset(&mut app).await, "{reason:?}");
            let error = relay.end.await.unwrap().unwrap_err();
            assert_eq!(error.to_reason(), Reason::Reset, "{reason:?}");
        })
        .await;
    }
}

#[tokio::test]
async fn no_error_after_a_whole_answer_is_a_clean_end() {
    worker(async {
        let (mut app, relay, mut peer) = tcp_to_stream().await;
        give(&mut peer.send, Bytes::from_static(b"answer"))
            .await
            .unwrap();
        peer.send.send_data(Bytes::new(), true).unwrap();
        let mut answer = Vec::new();
        app.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"answer");
        peer.send.send_reset(h2::Reason::NO_ERROR);
        app.write_all(b"nobody listens").await.unwrap();
        app.shutdown().await.unwrap();
        relay.end.await.unwrap().unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_lost_tunnel_is_a_reset_for_the_application() {
    worker(async {
        let (mut app, relay, mut peer) = tcp_to_stream().await;
        app.write_all(b"x").await.unwrap();
        peer.read().await.unwrap();
        peer.peer.abort();
        assert!(is_reset(&mut app).await);
        let error = relay.end.await.unwrap().unwrap_err();
        assert_eq!(error.to_reason(), Reason::TunnelLost, "{error}");
    })
    .await;
}

/// Writes until nothing more is taken; gives how much was.
async fn fill(app: &TcpStream) -> usize {
    let block = vec![7; 1 << 16];
    let mut taken = 0;
    loop {
        let writable = tokio::time::timeout(Duration::from_millis(200), app.writable());
        if writable.await.is_err() {
            return taken;
        }
        match app.try_write(&block) {
            Ok(bytes) => taken += bytes,
            Err(e) => assert_eq!(e.kind(), io::ErrorKind::WouldBlock),
        }
    }
}

/// Behaviour 123.
#[tokio::test]
async fn a_receiver_that_stands_still_stops_the_sender_and_resumes_it() {
    worker(async {
        let (app, relay, mut peer) = tcp_to_stream().await;
        let taken = fill(&app).await;
        // The peer's window of 64 KiB, our buffers, and those of two sockets.
        assert!(taken < 16 << 20, "{taken}");
        let window = usize::from(u16::MAX);
        let moved = usize::try_from(relay.counts.received.get()).unwrap();
        assert!(
            moved <= window + Params::default().send_buffer_bytes,
            "{moved}"
        );
        let mut app = app;
        app.shutdown().await.unwrap();
        assert_eq!(peer.read_all().await.len(), taken);
        peer.send.send_data(Bytes::new(), true).unwrap();
        relay.end.await.unwrap().unwrap();
    })
    .await;
}

/// Credit returns only for what the application's socket took.
#[tokio::test]
async fn a_peer_may_send_no_more_than_its_window_to_an_application_that_stands_still() {
    worker(async {
        let (app, relay, mut peer) = tcp_to_stream().await;
        let mut sent = 0;
        loop {
            peer.send.reserve_capacity(1 << 16);
            let more = poll(|cx| peer.send.poll_capacity(cx));
            match tokio::time::timeout(Duration::from_millis(200), more).await {
                Ok(granted) => {
                    let bytes = granted.unwrap().unwrap();
                    peer.send
                        .send_data(Bytes::from(vec![7; bytes]), false)
                        .unwrap();
                    sent += bytes;
                }
                Err(_) => break,
            }
        }
        let delivered = usize::try_from(relay.counts.sent.get()).unwrap();
        let params = Params::default();
        let window = usize::try_from(params.stream_window_bytes).unwrap();
        assert!(
            sent <= delivered + window + (1 << 16),
            "{sent} sent, {delivered} delivered"
        );
        peer.send.send_data(Bytes::new(), true).unwrap();
        let mut app = app;
        app.shutdown().await.unwrap();
        let mut all = Vec::new();
        app.read_to_end(&mut all).await.unwrap();
        assert_eq!(all.len(), sent);
        relay.end.await.unwrap().unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_reset_is_noticed_while_the_other_side_stands_still() {
    worker(async {
        let (app, relay, mut peer) = tcp_to_stream().await;
        fill(&app).await;
        app.abort();
        drop(app);
        assert_eq!(peer.reset().await, h2::Reason::CANCEL);
        assert!(matches!(relay.end.await.unwrap(), Err(Error::Reset)));

        let (app, relay, mut peer) = tcp_to_stream().await;
        fill(&app).await;
        peer.send.send_reset(h2::Reason::CANCEL);
        assert!(matches!(relay.end.await.unwrap(), Err(Error::Reset)));
        drop(app);

        let ((client, a), (b, server)) = (tcp_pair().await, tcp_pair().await);
        let relay = start(a, b);
        fill(&client).await;
        client.abort();
        drop(client);
        assert!(matches!(relay.end.await.unwrap(), Err(Error::Reset)));
        drop(server);
    })
    .await;
}

/// Behaviours 114 and 149, for the bytes.
#[tokio::test]
async fn an_order_ends_the_connection_as_a_reset_for_both() {
    worker(async {
        let (mut app, relay, mut peer) = tcp_to_stream().await;
        app.write_all(b"x").await.unwrap();
        peer.read().await.unwrap();
        assert_eq!(relay.live.judge_again(&Policies::default(), |_| None), 1);
        let error = relay.end.await.unwrap().unwrap_err();
        assert_eq!(error.to_reason(), Reason::UnknownWorkload);
        assert!(is_reset(&mut app).await);
        assert_eq!(peer.reset().await, h2::Reason::CANCEL);

        let (mut app, relay, mut peer) = tcp_to_stream().await;
        relay.drain.graceful();
        app.write_all(b"x").await.unwrap();
        assert_eq!(peer.read().await.unwrap(), "x");
        relay.drain.force(Reason::PodRemoved);
        let error = relay.end.await.unwrap().unwrap_err();
        assert_eq!(error.to_reason(), Reason::PodRemoved);
        assert!(is_reset(&mut app).await);
        assert_eq!(peer.reset().await, h2::Reason::CANCEL);
    })
    .await;
}

/// Behaviour 114, on a connection that never rests.
#[tokio::test]
async fn a_busy_connection_does_not_outrun_an_order() {
    worker(async {
        let ((client, a), (b, server)) = (tcp_pair().await, tcp_pair().await);
        let relay = start(a, b);
        let (stop, stopped) = (relay.live.clone(), relay.end);
        let pump = std::thread::spawn({
            let (client, server) = (client.into_std().unwrap(), server.into_std().unwrap());
            client.set_nonblocking(false).unwrap();
            server.set_nonblocking(false).unwrap();
            move || {
                let sink = std::thread::spawn(move || {
                    let read = io::copy(&mut &server, &mut io::sink());
                    assert!(read.is_err(), "a reset");
                });
                let block = [7; 1 << 16];
                while io::Write::write_all(&mut &client, &block).is_ok() {}
                sink.join().unwrap();
            }
        });
        tokio::time::sleep(Duration::from_millis(50)).await;
        let start = tokio::time::Instant::now();
        stop.judge_again(&Policies::default(), |_| None);
        assert!(matches!(
            stopped.await.unwrap(),
            Err(Error::Revoked(Reason::UnknownWorkload))
        ));
        assert!(start.elapsed() < Duration::from_secs(5));
        pump.join().unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_relay_that_is_dropped_resets_both() {
    worker(async {
        let (mut app, relay, mut peer) = tcp_to_stream().await;
        app.write_all(b"x").await.unwrap();
        peer.read().await.unwrap();
        relay.end.abort();
        assert!(is_reset(&mut app).await);
        assert_eq!(peer.reset().await, h2::Reason::CANCEL);
    })
    .await;
}

/// A tunnel carries many small frames to an application that stands still for a while.
#[tokio::test]
async fn a_flood_of_tiny_frames_does_not_end_the_tunnel() {
    worker(async {
        let (mut app, ours) = tcp_pair().await;
        // So small that the frames wait in this process.
        SockRef::from(&app).set_recv_buffer_size(1 << 16).unwrap();
        SockRef::from(&ours).set_send_buffer_size(1 << 16).unwrap();
        let stream = stream().await;
        let (mut send, _recv) = (stream.send, stream.recv);
        let relay = start(ours, stream.ours);
        let frames = 300_000;
        for number in 0..frames {
            give(&mut send, Bytes::from_static(b"0123456789"))
                .await
                .unwrap();
            if number % 64 == 0 {
                tokio::task::yield_now().await;
            }
        }
        send.send_data(Bytes::new(), true).unwrap();
        let mut all = Vec::new();
        app.read_to_end(&mut all).await.unwrap();
        assert_eq!(all.len(), 10 * frames);
        app.shutdown().await.unwrap();
        relay.end.await.unwrap().unwrap();
    })
    .await;
}

/// Behaviour 124, and the budget of an idle connection.
#[tokio::test(start_paused = true)]
async fn an_idle_connection_stays_for_hours_and_is_small() {
    worker(async {
        let stream = stream().await;
        let other = self::stream().await;
        let permit = Live::default().outbound(&WorkloadUid("cart".into()), id("cart"));
        let (_drain, signal) = drain::channel();
        let counts = Counts::default();
        let relay: Carrying<'_, Error> = carry(stream.ours, other.ours, permit, &counts, signal);
        let bytes = size_of_val(&*relay);
        assert!(bytes <= 1088, "{bytes}");
        let (mut send, mut recv) = (stream.send, other.recv);
        let hours = async {
            tokio::time::sleep(Duration::from_secs(48 * 3600)).await;
            give(&mut send, Bytes::from_static(b"awake")).await.unwrap();
            assert_eq!(recv.data().await.unwrap().unwrap(), "awake");
        };
        tokio::select! {
            end = relay => panic!("{end:?}"),
            () = hours => {}
        }
    })
    .await;
}
