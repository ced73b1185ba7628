//! The server against a real HTTP/2 client in mutual TLS.

#![expect(
    clippy::large_futures,
    reason = "a test runs one of them and then ends"
)]

use std::cell::RefCell;
use std::rc::Rc;

use h2::client::SendRequest;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;

use super::super::relay::Side as _;
use super::super::testing::{BANK, CART, Frame, connect_request, give, worker};
use super::*;
use crate::identity::testing::{Authority, id};
use crate::model::ToReason as _;

type ClientTls = tokio_rustls::client::TlsStream<DuplexStream>;

/// A served tunnel and the client's end of its wire.
struct Served {
    tls: ClientTls,
    end: JoinHandle<Result<(), Error>>,
    requests: Rc<RefCell<Vec<Request>>>,
    drain: drain::Trigger,
}

async fn serve_one() -> Served {
    let authority = Authority::new();
    let (near, far) = duplex(1 << 18);
    let requests: Rc<RefCell<Vec<Request>>> = Rc::default();
    let (drain, signal) = drain::channel();
    let bank = authority.credentials(&[BANK]);
    let kept = Rc::clone(&requests);
    let end = tokio::task::spawn_local(async move {
        let params = Params::default();
        let accepted = handshake(far, &bank, &params).await?;
        assert_eq!(accepted.peer, id("cart"));
        serve(accepted, &params, signal, |request| {
            kept.borrow_mut().push(request)
        })
        .await
    });
    let config = authority.credentials(&[CART]).client_config(&[id("bank")]);
    let name = ServerName::from(std::net::IpAddr::from([0, 0, 0, 0]));
    let tls = TlsConnector::from(config)
        .connect(name, near)
        .await
        .unwrap();
    Served {
        tls,
        end,
        requests,
        drain,
    }
}

/// A client that is the HTTP/2 library itself.
async fn client(tls: ClientTls) -> (SendRequest<Bytes>, JoinHandle<Result<(), h2::Error>>) {
    let (sender, connection) = h2::client::handshake(tls).await.unwrap();
    (sender, tokio::task::spawn_local(connection))
}

async fn next(requests: &Rc<RefCell<Vec<Request>>>) -> Request {
    for _ in 0..10_000 {
        if let Some(request) = requests.borrow_mut().pop() {
            return request;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("no request came");
}

async fn ended(end: JoinHandle<Result<(), Error>>) -> Reason {
    end.await.unwrap().unwrap_err().to_reason()
}

/// Behaviour 75.
#[tokio::test(start_paused = true)]
async fn greets_with_its_settings() {
    worker(async {
        let mut served = serve_one().await;
        served
            .tls
            .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            .await
            .unwrap();
        Frame::empty(Frame::SETTINGS, 0)
            .write(&mut served.tls)
            .await;
        let settings = Frame::read(&mut served.tls).await.unwrap();
        let expected = [(3, 200), (4, 4 << 20), (5, 1 << 20), (6, 64 << 10)];
        assert_eq!(settings.settings(), expected.into_iter().collect());
        loop {
            let frame = Frame::read(&mut served.tls).await.unwrap();
            if frame.kind == Frame::WINDOW_UPDATE {
                assert_eq!(frame.stream, 0);
                assert_eq!(frame.payload, ((16_u32 << 20) - 65_535).to_be_bytes());
                break;
            }
        }
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_request_is_answered_with_a_stream_a_status_or_a_reset() {
    worker(async {
        let served = serve_one().await;
        let (sender, connection) = client(served.tls).await;
        let ask = async || {
            let mut sender = sender.clone().ready().await.unwrap();
            sender.send_request(connect_request(), false).unwrap()
        };
        let (response, mut send) = ask().await;
        let request = next(&served.requests).await;
        assert_eq!(request.parts.method, http::Method::CONNECT);
        assert_eq!(request.parts.uri.authority().unwrap(), "10.0.0.9:8080");
        let stream = request.accept(Response::new(())).unwrap();
        let mut recv = response.await.unwrap().into_body();
        assert!(!recv.is_end_stream());
        give(&mut send, Bytes::from_static(b"hello")).await.unwrap();
        drop(stream);
        let error = recv.data().await.unwrap().unwrap_err();
        assert_eq!(error.reason(), Some(h2::Reason::CANCEL));

        drop((send, recv));
        let (response, send) = ask().await;
        next(&served.requests)
            .await
            .refuse(StatusCode::UNAUTHORIZED);
        let response = response.await.unwrap();
        assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
        assert!(response.body().is_end_stream() && response.headers().is_empty());
        drop((response, send));

        let (response, send) = ask().await;
        drop(next(&served.requests).await);
        assert_eq!(
            response.await.unwrap_err().reason(),
            Some(h2::Reason::CANCEL)
        );

        drop((sender, send));
        // A wire in memory fails our own farewell, because nobody is left to read it.
        let end = served.end.await.unwrap();
        assert!(matches!(end, Ok(()) | Err(Error::TunnelLost(_))), "{end:?}");
        connection.await.unwrap().unwrap();
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_client_that_gives_up_is_noticed_while_it_waits() {
    worker(async {
        let served = serve_one().await;
        let (sender, _connection) = client(served.tls).await;
        let (response, send) = sender
            .clone()
            .send_request(connect_request(), false)
            .unwrap();
        let mut request = next(&served.requests).await;
        let waiting = timeout(Duration::from_secs(5), request.withdrawn()).await;
        assert!(waiting.is_err());
        drop((response, send));
        assert!(matches!(request.withdrawn().await, Error::PeerWithdrew));
        assert!(matches!(
            request.accept(Response::new(())),
            Err(Error::PeerWithdrew)
        ));
    })
    .await;
}

/// Behaviour 92, and the same for what follows TLS.
#[tokio::test(start_paused = true)]
async fn stalled_handshakes_are_given_up() {
    worker(async {
        let start = Instant::now();
        let (_silent, far) = duplex(1024);
        let bank = Authority::new().credentials(&[BANK]);
        let error = handshake(far, &bank, &Params::default()).await.unwrap_err();
        assert_eq!(error.to_reason(), Reason::TlsTimedOut);
        assert_eq!(start.elapsed(), Duration::from_secs(10));

        let served = serve_one().await;
        let start = Instant::now();
        assert_eq!(ended(served.end).await, Reason::H2TimedOut);
        assert_eq!(start.elapsed(), Duration::from_secs(10));
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn garbage_ends_with_a_plain_error() {
    worker(async {
        for garbage in [
            &b"GET / HTTP/1.1\r\nHost: pod\r\n\r\n"[..],
            &[0; 64],
            &[22, 3, 1, 255, 255],
        ] {
            let (mut near, far) = duplex(1024);
            near.write_all(garbage).await.unwrap();
            near.shutdown().await.unwrap();
            let bank = Authority::new().credentials(&[BANK]);
            let error = handshake(far, &bank, &Params::default()).await.unwrap_err();
            assert_eq!(error.to_reason(), Reason::TlsFailed, "{error}");
        }
        let mut wrong_preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        wrong_preface.extend_from_slice(&[255; 64]);
        for garbage in [
            &b"GET / HTTP/1.1\r\nHost: pod\r\n\r\n"[..],
            &[0; 64],
            &wrong_preface,
        ] {
            let mut served = serve_one().await;
            served.tls.write_all(garbage).await.unwrap();
            served.tls.flush().await.unwrap();
            assert_eq!(ended(served.end).await, Reason::H2Failed);
        }
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_of_endless_resets_is_closed() {
    worker(async {
        let served = serve_one().await;
        let (sender, connection) = client(served.tls).await;
        let mut sent = 0;
        while let Ok(mut ready) = sender.clone().ready().await {
            let Ok((_, mut send)) = ready.send_request(connect_request(), false) else {
                break;
            };
            send.send_reset(h2::Reason::CANCEL);
            sent += 1;
            if sent % 100 == 0 {
                tokio::task::yield_now().await;
            }
            assert!(sent < 100_000);
        }
        assert_eq!(ended(served.end).await, Reason::H2Failed);
        assert!(connection.await.unwrap().is_err());
    })
    .await;
}

/// Behaviour 151.
#[tokio::test(start_paused = true)]
async fn a_graceful_drain_says_goodbye_and_serves_what_is_open() {
    worker(async {
        let served = serve_one().await;
        let (sender, connection) = client(served.tls).await;
        let mut opening = sender.clone();
        let (response, mut send) = opening.send_request(connect_request(), false).unwrap();
        let request = next(&served.requests).await;
        let kept = request.accept(Response::new(())).unwrap();
        served.drain.graceful();
        tokio::time::sleep(Duration::from_millis(10)).await;
        let refused = sender.clone().ready().await;
        assert!(
            refused.is_err(),
            "the client knows that it must go elsewhere"
        );
        give(&mut send, Bytes::from_static(b"still here"))
            .await
            .unwrap();
        send.send_data(Bytes::new(), true).unwrap();
        let mut answer = response.await.unwrap().into_body();
        let mut queue = super::super::buffer::Queue::default();
        assert!(poll_fn(|cx| kept.poll_take(cx, &mut queue)).await.unwrap());
        assert!(!served.end.is_finished());
        kept.finish().unwrap();
        assert!(answer.data().await.unwrap().unwrap().is_empty());
        assert!(answer.is_end_stream());
        drop((kept, answer, send));
        served.end.await.unwrap().unwrap();
        assert!(connection.await.is_ok());
    })
    .await;
}

/// Its certificate is what proves who the peer is: nothing new for one that has expired.
#[tokio::test(start_paused = true)]
async fn a_peer_whose_certificate_expires_gets_a_goodbye() {
    worker(async {
        let served = serve_one().await;
        let (sender, connection) = client(served.tls).await;
        let (_, mut send) = sender
            .clone()
            .send_request(connect_request(), false)
            .unwrap();
        let kept = next(&served.requests).await;
        let kept = kept.accept(Response::new(())).unwrap();
        tokio::time::sleep(Duration::from_secs(3500)).await;
        sender.clone().ready().await.unwrap();
        tokio::time::sleep(Duration::from_secs(101)).await;
        assert!(sender.clone().ready().await.is_err());
        give(&mut send, Bytes::from_static(b"still here"))
            .await
            .unwrap();
        let mut queue = super::super::buffer::Queue::default();
        assert!(poll_fn(|cx| kept.poll_take(cx, &mut queue)).await.unwrap());
        assert!(!served.end.is_finished());
        drop((kept, send));
        served.end.await.unwrap().unwrap();
        assert!(connection.await.is_ok());
    })
    .await;
}

/// A CONNECT without indexed fields.
fn connect_frame(stream: u32) -> Frame {
    let mut payload = vec![2, 7];
    payload.extend_from_slice(b"CONNECT");
    payload.extend_from_slice(&[1, 13]);
    payload.extend_from_slice(b"10.0.0.9:8080");
    Frame {
        kind: Frame::HEADERS,
        flags: 4,
        stream,
        payload,
    }
}

/// Better than the established proxy: a stream that crosses the goodbye is served.
#[tokio::test(start_paused = true)]
async fn a_stream_that_crosses_the_goodbye_is_served() {
    worker(async {
        let mut served = serve_one().await;
        let tls = &mut served.tls;
        tls.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            .await
            .unwrap();
        Frame::empty(Frame::SETTINGS, 0).write(tls).await;
        connect_frame(1).write(tls).await;
        let first = next(&served.requests).await;
        served.drain.graceful();
        let last_stream = |frame: &Frame| frame.payload[..4].to_vec();
        let ping = loop {
            let frame = Frame::read(tls).await.unwrap();
            if frame.kind == Frame::GOAWAY {
                assert_eq!(last_stream(&frame), [0x7f, 0xff, 0xff, 0xff]);
            }
            if frame.kind == Frame::PING {
                break frame;
            }
        };
        connect_frame(3).write(tls).await;
        let late = next(&served.requests).await;
        let _stream = late.accept(Response::new(())).unwrap();
        Frame {
            flags: Frame::ACK,
            ..ping
        }
        .write(tls)
        .await;
        let (mut answered, mut last) = (false, None);
        while last.is_none() || !answered {
            let frame = Frame::read(tls).await.unwrap();
            answered |= frame.kind == Frame::HEADERS && frame.stream == 3;
            if frame.kind == Frame::GOAWAY {
                last = Some(last_stream(&frame));
            }
        }
        assert_eq!((answered, last), (true, Some(vec![0, 0, 0, 3])));
        drop(first);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_forced_drain_ends_the_tunnel() {
    worker(async {
        let served = serve_one().await;
        let (sender, connection) = client(served.tls).await;
        let (response, _send) = sender
            .clone()
            .send_request(connect_request(), false)
            .unwrap();
        let request = next(&served.requests).await;
        served.drain.graceful();
        served.drain.force(Reason::Drained);
        assert_eq!(ended(served.end).await, Reason::Drained);
        assert!(response.await.is_err());
        drop((request, connection));
    })
    .await;
}

/// Behaviour 20, for the other role.
#[tokio::test(start_paused = true)]
async fn a_client_that_answers_no_ping_is_left() {
    worker(async {
        let mut served = serve_one().await;
        served
            .tls
            .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            .await
            .unwrap();
        Frame::empty(Frame::SETTINGS, 0)
            .write(&mut served.tls)
            .await;
        let start = Instant::now();
        let mut pings = 0;
        let mut bytes = Vec::new();
        while let Ok(frame) = Frame::read(&mut served.tls).await {
            pings += usize::from(frame.kind == Frame::PING);
        }
        served.tls.read_to_end(&mut bytes).await.unwrap_or_default();
        assert_eq!((pings, start.elapsed().as_secs()), (1, 30));
        assert_eq!(ended(served.end).await, Reason::TunnelLost);
    })
    .await;
}

/// Behaviour 90.
#[tokio::test(start_paused = true)]
async fn streams_that_stand_still_leave_room_for_the_others() {
    worker(async {
        let served = serve_one().await;
        let (sender, _connection) = client(served.tls).await;
        let mut stalled = Vec::new();
        for _ in 0..3 {
            let (response, mut send) = sender
                .clone()
                .send_request(connect_request(), false)
                .unwrap();
            let stream = next(&served.requests)
                .await
                .accept(Response::new(()))
                .unwrap();
            let response = response.await.unwrap();
            // The whole window of a stream, and nobody reads.
            give(&mut send, Bytes::from(vec![7; 4 << 20]))
                .await
                .unwrap();
            stalled.push((stream, send, response));
        }
        for _ in 0..47 {
            let (response, mut send) = sender
                .clone()
                .send_request(connect_request(), false)
                .unwrap();
            let stream = next(&served.requests)
                .await
                .accept(Response::new(()))
                .unwrap();
            response.await.unwrap();
            let sending = async {
                give(&mut send, Bytes::from(vec![7; 1 << 20]))
                    .await
                    .unwrap();
                send.send_data(Bytes::new(), true).unwrap();
            };
            let receiving = async {
                let mut queue = super::super::buffer::Queue::default();
                let mut got = 0;
                while poll_fn(|cx| stream.poll_take(cx, &mut queue))
                    .await
                    .unwrap()
                {
                    while let Some(chunk) = queue.front() {
                        stream.taken(chunk.len());
                        got += chunk.len();
                        chunk.clear();
                    }
                }
                got
            };
            let ((), got) = tokio::join!(sending, receiving);
            assert_eq!(got, 1 << 20);
        }
    })
    .await;
}
