//! Sessions against the TLS library itself, whole, in pieces, and broken.

use std::io::{Read as _, Write as _};
use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs::cipher_suite;
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, ProtocolVersion, ServerConfig,
    SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
use tokio_rustls::TlsConnector;

use super::super::testing::{BANK, CART, accept_tls};
use super::*;
use crate::identity::testing::{Authority, Leaf, id};
use crate::identity::{Credentials, Versions};

/// The accepting end, ours.
struct Near {
    tls: Tls<DuplexStream>,
    flush: Flush<DuplexStream>,
}

impl Near {
    fn of(greeted: Greeted<DuplexStream>) -> Self {
        let (tls, flush) = greeted.session.split();
        Self { tls, flush }
    }

    async fn read(&mut self, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        let read = self.flush.run(self.tls.read_exact(&mut bytes));
        let read = tokio::time::timeout(Duration::from_secs(60), read);
        read.await.expect("something comes")?;
        Ok(bytes)
    }

    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.flush.run(self.tls.write_all(bytes)).await?;
        // A driver is polled again when there is room for the rest.
        std::future::poll_fn(|cx| self.flush.0.borrow_mut().poll_flush(cx)).await?;
        let failed = self.flush.0.borrow().failed.as_ref().map(Failed::error);
        failed.map_or(Ok(()), Err)
    }

    /// Sends one record of whatever kind and size.
    async fn seal(&self, kind: ContentType, payload: &[u8]) {
        {
            let mut session = self.flush.0.borrow_mut();
            let Session { keys, output, .. } = &mut *session;
            keys.seal(kind, OutboundChunks::Single(payload), output)
                .unwrap();
        }
        let flushed = std::future::poll_fn(|cx| self.flush.0.borrow_mut().poll_flush(cx));
        flushed.await.unwrap();
    }

    /// What the next read says.
    async fn refusal(&mut self) -> io::Error {
        self.read(1).await.unwrap_err()
    }

    fn holds_nothing(&self) -> bool {
        let session = self.flush.0.borrow();
        session.input.buffer.is_none()
            && session.output.records.capacity() == 0
            && session.output.open.capacity() == 0
    }
}

/// The connecting end: the library, and the wire in our hands.
struct Far {
    io: DuplexStream,
    tls: ClientConnection,
}

impl Far {
    /// Sealed bytes for `plain`, and for whatever waits.
    fn seal(&mut self, plain: &[u8]) -> Vec<u8> {
        let mut sealed = Vec::new();
        for part in plain.chunks(1 << 14).chain([&[][..]]) {
            self.tls.writer().write_all(part).unwrap();
            while self.tls.wants_write() {
                self.tls.write_tls(&mut sealed).unwrap();
            }
        }
        sealed
    }

    async fn send(&mut self, sealed: &[u8]) {
        self.io.write_all(sealed).await.unwrap();
    }

    /// Reads until `len` bytes of plaintext came, or something is wrong.
    async fn read(&mut self, len: usize) -> Result<Vec<u8>, rustls::Error> {
        let mut plain = Vec::new();
        while plain.len() < len {
            let mut bytes = vec![0; 4096];
            let read = tokio::time::timeout(Duration::from_secs(60), self.io.read(&mut bytes));
            let read = read.await.expect("something comes").unwrap();
            assert_ne!(read, 0, "closed after {} bytes", plain.len());
            let mut bytes = bytes.get(..read).unwrap();
            while !bytes.is_empty() {
                self.tls.read_tls(&mut bytes).unwrap();
                let state = self.tls.process_new_packets()?;
                let mut more = vec![0; state.plaintext_bytes_to_read()];
                self.tls.reader().read_exact(&mut more).unwrap();
                plain.extend(more);
            }
        }
        Ok(plain)
    }

    async fn alert(&mut self) -> AlertDescription {
        match self.read(1).await {
            Err(rustls::Error::AlertReceived(alert)) => alert,
            other => panic!("{other:?}"),
        }
    }
}

async fn pair() -> (Near, Far) {
    let authority = Authority::new();
    let server = authority.credentials(&[BANK]).server_config();
    let client = authority.credentials(&[CART]).client_config(&[id("bank")]);
    pair_of(server, client, ProtocolVersion::TLSv1_3).await
}

/// A pair whose connecting end knows nothing newer than TLS 1.2.
async fn old_pair(suite: rustls::SupportedCipherSuite) -> (Near, Far) {
    let authority = Authority::new();
    let leaf = |uris| Leaf {
        uris,
        ..Leaf::default()
    };
    let bank = authority.leaf(leaf(&[BANK]));
    let bank = Credentials::new(BANK.parse().unwrap(), bank, Versions::From12).unwrap();
    let cart = authority.leaf(leaf(&[CART]));
    let provider = rustls::crypto::CryptoProvider {
        cipher_suites: vec![suite],
        ..rustls::crypto::aws_lc_rs::default_provider()
    };
    let client = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone))
        .with_client_auth_cert(cart.chain, cart.key)
        .unwrap();
    let server = bank.server_config();
    pair_of(server, Arc::new(client), ProtocolVersion::TLSv1_2).await
}

/// Believes whatever it is told.
#[derive(Debug)]
struct Anyone;

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ECDSA_NISTP256_SHA256]
    }
}

async fn pair_of(
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
    version: ProtocolVersion,
) -> (Near, Far) {
    let (near, far) = duplex(1 << 18);
    let name = ServerName::from(std::net::IpAddr::from([0, 0, 0, 0]));
    let connecting = TlsConnector::from(client).connect(name, far);
    let accepting = accept(server, near);
    let (greeted, connected) = tokio::join!(accepting, connecting);
    let (io, tls) = connected.unwrap().into_inner();
    assert_eq!(tls.protocol_version(), Some(version));
    let greeted = greeted.unwrap();
    assert!(!greeted.chain.is_empty());
    (Near::of(greeted), Far { io, tls })
}

/// Two ends, both ours: the first is the client.
async fn twins() -> (Near, Near) {
    let authority = Authority::new();
    let server = authority.credentials(&[BANK]).server_config();
    let client = authority.credentials(&[CART]).client_config(&[id("bank")]);
    let (near, far) = duplex(1 << 18);
    let name = ServerName::from(std::net::IpAddr::from([0, 0, 0, 0]));
    let (near, far) = tokio::join!(connect(client, name, near), accept(server, far));
    (Near::of(near.unwrap()), Near::of(far.unwrap()))
}

type Change = fn(&mut Vec<u8>);

fn noise(len: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(7);
    std::iter::repeat_with(|| random.u8(..)).take(len).collect()
}

#[tokio::test(start_paused = true)]
async fn bytes_go_both_ways_in_either_role() {
    let (mut near, mut far) = pair().await;
    let sent = noise(1 << 20);
    let sealed = far.seal(&sent[..100_000]);
    far.send(&sealed).await;
    assert_eq!(near.read(100_000).await.unwrap(), sent[..100_000]);
    let (written, read) = tokio::join!(near.write(&sent), far.read(sent.len()));
    written.unwrap();
    assert_eq!(read.unwrap(), sent);
    assert!(near.holds_nothing());

    let authority = Authority::new();
    let (near, far) = duplex(1 << 18);
    let config = authority.credentials(&[CART]).client_config(&[id("bank")]);
    let name = ServerName::from(std::net::IpAddr::from([0, 0, 0, 0]));
    let bank = authority.credentials(&[BANK]);
    let (greeted, mut far) = tokio::join!(connect(config, name, near), accept_tls(far, &bank));
    let mut near = Near::of(greeted.unwrap());
    far.write_all(&sent[..200_000]).await.unwrap();
    far.flush().await.unwrap();
    assert_eq!(near.read(200_000).await.unwrap(), sent[..200_000]);
    let mut got = vec![0; sent.len()];
    let (written, read) = tokio::join!(near.write(&sent), far.read_exact(&mut got));
    written.unwrap();
    read.unwrap();
    assert_eq!(got, sent);
    assert!(near.holds_nothing());
}

#[tokio::test(start_paused = true)]
async fn tls_1_2_carries_bytes_too() {
    for suite in [
        cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
        cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
    ] {
        let (mut near, mut far) = old_pair(suite).await;
        let sent = noise(100_000);
        for _ in 0..3 {
            let sealed = far.seal(&sent[..50_000]);
            far.send(&sealed).await;
            assert_eq!(near.read(50_000).await.unwrap(), sent[..50_000]);
            near.write(&sent).await.unwrap();
            assert_eq!(far.read(sent.len()).await.unwrap(), sent);
        }
        let mut broken = far.seal(b"changed on its way");
        broken[20] ^= 1;
        far.send(&broken).await;
        let error = near.refusal().await;
        assert_eq!(error.to_string(), Violation::BadRecord.to_string());
        assert_eq!(far.alert().await, AlertDescription::BadRecordMac);
    }
}

#[tokio::test(start_paused = true)]
async fn what_one_turn_writes_shares_records() {
    let (near, mut far) = pair().await;
    let Near { mut tls, flush } = near;
    let many = async {
        for _ in 0..100 {
            tls.write_all(&[7; 1000]).await.unwrap();
            tls.flush().await.unwrap();
        }
    };
    flush.run(many).await;
    std::future::poll_fn(|cx| flush.0.borrow_mut().poll_flush(cx))
        .await
        .unwrap();
    let mut records = Vec::new();
    let mut bytes = Vec::new();
    while records.iter().sum::<usize>() < 100_000 {
        far.io.read_buf(&mut bytes).await.unwrap();
        while let Some(len) = frame::record(&bytes)
            .unwrap()
            .filter(|len| *len <= bytes.len())
        {
            bytes.drain(..len);
            records.push(len - frame::HEADER_BYTES - 17);
        }
    }
    assert_eq!(
        records,
        [[16_384; 6].as_slice(), &[100_000 - 6 * 16_384]].concat()
    );
}

#[tokio::test(start_paused = true)]
async fn records_in_pieces_are_put_together() {
    let (mut near, mut far) = pair().await;
    let sent = noise(40_000);
    let sealed = far.seal(&sent);
    let sending = async {
        for piece in sealed.chunks(7) {
            far.send(piece).await;
            tokio::task::yield_now().await;
        }
    };
    let ((), got) = tokio::join!(sending, near.read(sent.len()));
    assert_eq!(got.unwrap(), sent);
}

#[tokio::test(start_paused = true)]
async fn keys_change_whoever_wants_it() {
    let (mut near, mut far) = pair().await;
    for round in 0..40_u8 {
        if round % 2 == 0 {
            // Asks for a new key of ours in return.
            far.tls.refresh_traffic_keys().unwrap();
        } else {
            near.flush.0.borrow_mut().keys.owe();
        }
        let sealed = far.seal(&[round; 3]);
        far.send(&sealed).await;
        assert_eq!(near.read(3).await.unwrap(), [round; 3]);
        near.write(&[round; 5]).await.unwrap();
        assert_eq!(far.read(5).await.unwrap(), [round; 5]);
    }
}

/// RFC 8446, 4.6.3: one answer may serve many requests, so a peer that reads nothing costs nothing.
#[tokio::test(start_paused = true)]
async fn a_peer_that_wants_key_after_key_is_answered_once() {
    let (mut near, mut far) = pair().await;
    for round in 0..200_u8 {
        far.tls.refresh_traffic_keys().unwrap();
        let sealed = far.seal(&[round]);
        far.send(&sealed).await;
        assert_eq!(near.read(1).await.unwrap(), [round]);
        assert_eq!(near.flush.0.borrow().output.bytes, 0);
    }
    near.write(b"with one new key").await.unwrap();
    assert_eq!(far.read(16).await.unwrap(), b"with one new key");
}

/// A client may send its last flight together with what follows, and with what ends it.
#[tokio::test(start_paused = true)]
async fn what_comes_with_the_end_of_the_handshake_belongs_to_the_session() {
    let authority = Authority::new();
    let server = authority.credentials(&[BANK]).server_config();
    let client = authority.credentials(&[CART]).client_config(&[id("bank")]);
    let (near, io) = duplex(1 << 18);
    let name = ServerName::from(std::net::IpAddr::from([0, 0, 0, 0]));
    let tls = ClientConnection::new(client, name).unwrap();
    let mut far = Far { io, tls };
    let sent = noise(20_000);
    let greeting = async {
        let mut flight = far.seal(&[]);
        while far.tls.is_handshaking() {
            far.send(&flight).await;
            let mut bytes = Vec::new();
            assert_ne!(far.io.read_buf(&mut bytes).await.unwrap(), 0);
            let mut bytes = bytes.as_slice();
            while !bytes.is_empty() {
                far.tls.read_tls(&mut bytes).unwrap();
                far.tls.process_new_packets().unwrap();
            }
            flight = if far.tls.is_handshaking() {
                Vec::new()
            } else {
                far.seal(&[])
            };
        }
        far.tls.refresh_traffic_keys().unwrap();
        flight.extend(far.seal(&sent));
        far.tls.send_close_notify();
        flight.extend(far.seal(&[]));
        far.send(&flight).await;
    };
    let (greeted, ()) = tokio::join!(accept(server, near), greeting);
    let mut near = Near::of(greeted.unwrap());
    assert_eq!(near.read(sent.len()).await.unwrap(), sent);
    assert_eq!(near.tls.read(&mut [0]).await.unwrap(), 0);
    near.write(b"with a new key").await.unwrap();
    assert_eq!(far.read(14).await.unwrap(), b"with a new key");
}

#[tokio::test(start_paused = true)]
async fn empty_records_tickets_and_full_records_are_read() {
    let (client, server) = twins().await;
    let mut client = client;
    let data = ContentType::ApplicationData;
    for round in 0..4 {
        for _ in 0..MAX_RESTLESS - 3 {
            server.seal(data, &[]).await;
        }
        // Two tickets, one of them cut by the end of a record.
        let ticket = [&[4, 0, 4, 0][..], &noise(1024)].concat();
        let tickets = [ticket.as_slice(), &ticket].concat();
        let (first, second) = tickets.split_at(1500);
        server.seal(ContentType::Handshake, first).await;
        server.seal(ContentType::Handshake, second).await;
        let full = vec![round; frame::MAX_PLAIN_BYTES];
        server.seal(data, &full).await;
        assert_eq!(client.read(full.len()).await.unwrap(), full);
    }
    for _ in 0..=MAX_RESTLESS {
        server.seal(data, &[]).await;
    }
    let error = client.refusal().await;
    assert_eq!(error.to_string(), Violation::Restless.to_string());
}

#[tokio::test(start_paused = true)]
async fn what_must_not_lie_inside_a_record_is_refused() {
    let cut = [4, 0, 4, 0];
    for (records, violation) in [
        (
            vec![(ContentType::ApplicationData, vec![0; (1 << 14) + 1])],
            Violation::Oversized((1 << 14) + 1),
        ),
        (
            vec![
                (ContentType::Handshake, cut.to_vec()),
                (ContentType::ApplicationData, b"within a message".to_vec()),
            ],
            Violation::Unexpected,
        ),
        (
            // A key, and something sealed with the old one.
            vec![(
                ContentType::Handshake,
                [&frame::KEY_UPDATED[..], &cut].concat(),
            )],
            Violation::Unexpected,
        ),
        (
            vec![(ContentType::Handshake, vec![1, 0, 0, 0])],
            Violation::Unexpected,
        ),
        (
            vec![(ContentType::ChangeCipherSpec, vec![1])],
            Violation::Unexpected,
        ),
        (vec![(ContentType::Alert, vec![1])], Violation::Malformed),
    ] {
        let (mut near, mut far) = twins().await;
        for (kind, payload) in records {
            far.seal(kind, &payload).await;
        }
        let error = near.refusal().await;
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert_eq!(error.to_string(), violation.to_string());
        let told = far.refusal().await;
        let alert = AlertDescription::from(violation.alert());
        assert_eq!(
            told.to_string(),
            rustls::Error::AlertReceived(alert).to_string()
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_does_not_read_is_waited_for() {
    let (mut near, mut far) = twins().await;
    let sent = noise(4 << 20);
    let flush = &near.flush;
    let mut writing = Box::pin(flush.run(near.tls.write_all(&sent)));
    // As often as it may be asked, it takes no more than it may hold.
    for _ in 0..100 {
        let pending = std::future::poll_fn(|cx| Poll::Ready(writing.as_mut().poll(cx))).await;
        assert!(pending.is_pending());
    }
    let held = {
        let output = &flush.0.borrow().output;
        output.bytes + output.open.len()
    };
    assert!(held <= OUTPUT_BYTES + 2 * frame::MAX_PLAIN_BYTES, "{held}");
    let written = async move {
        writing.await.unwrap();
        std::future::poll_fn(|cx| flush.0.borrow_mut().poll_flush(cx)).await
    };
    let (written, got) = tokio::join!(written, far.read(sent.len()));
    written.unwrap();
    assert_eq!(got.unwrap(), sent);
    assert!(near.holds_nothing() && far.holds_nothing());
}

#[tokio::test(start_paused = true)]
async fn key_after_key_without_data_is_refused() {
    let (mut near, mut far) = pair().await;
    for _ in 0..40 {
        far.tls.refresh_traffic_keys().unwrap();
    }
    let sealed = far.seal(&[]);
    far.send(&sealed).await;
    let error = near.refusal().await;
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    assert_eq!(error.to_string(), Violation::Restless.to_string());
}

#[tokio::test(start_paused = true)]
async fn a_goodbye_ends_one_direction_and_silence_is_no_goodbye() {
    let (mut near, mut far) = pair().await;
    let mut sealed = far.seal(b"last");
    far.tls.send_close_notify();
    sealed.extend(far.seal(&[]));
    far.send(&sealed).await;
    assert_eq!(near.read(4).await.unwrap(), b"last");
    assert_eq!(near.tls.read(&mut [0]).await.unwrap(), 0);
    near.write(b"still here").await.unwrap();
    assert_eq!(far.read(10).await.unwrap(), b"still here");
    near.flush.run(near.tls.shutdown()).await.unwrap();
    let mut rest = Vec::new();
    far.io.read_to_end(&mut rest).await.unwrap();
    far.tls.read_tls(&mut rest.as_slice()).unwrap();
    assert!(far.tls.process_new_packets().unwrap().peer_has_closed());

    let (mut near, mut far) = pair().await;
    let sealed = far.seal(b"last");
    far.send(&sealed).await;
    far.io.shutdown().await.unwrap();
    assert_eq!(near.read(4).await.unwrap(), b"last");
    assert_eq!(near.refusal().await.kind(), io::ErrorKind::UnexpectedEof);
    assert_eq!(near.refusal().await.kind(), io::ErrorKind::UnexpectedEof);
}

#[tokio::test(start_paused = true)]
async fn half_a_record_is_no_end() {
    let (mut near, mut far) = pair().await;
    let sealed = far.seal(b"last");
    far.send(&sealed[..sealed.len() - 1]).await;
    far.io.shutdown().await.unwrap();
    assert_eq!(near.refusal().await.kind(), io::ErrorKind::UnexpectedEof);
}

#[tokio::test(start_paused = true)]
async fn an_alert_of_the_peer_is_its_reason() {
    let (mut near, mut far) = pair().await;
    let garbage = [23, 3, 3, 0, 32]
        .into_iter()
        .chain([0; 32])
        .collect::<Vec<u8>>();
    far.tls.read_tls(&mut garbage.as_slice()).unwrap();
    far.tls.process_new_packets().unwrap_err();
    let sealed = far.seal(&[]);
    far.send(&sealed).await;
    let error = near.refusal().await;
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    let expected = rustls::Error::AlertReceived(AlertDescription::BadRecordMac);
    assert_eq!(error.to_string(), expected.to_string());
    assert!(near.write(b"more").await.is_err());
}

#[tokio::test(start_paused = true)]
async fn broken_records_are_refused_by_name_and_what_came_before_is_delivered() {
    let change: [(Change, Violation, AlertDescription); 7] = [
        (
            |r| r[9] ^= 1,
            Violation::BadRecord,
            AlertDescription::BadRecordMac,
        ),
        (
            |r| r[0] = 22,
            Violation::Unexpected,
            AlertDescription::UnexpectedMessage,
        ),
        (
            |r| r[0] = 20,
            Violation::Unexpected,
            AlertDescription::UnexpectedMessage,
        ),
        (
            |r| r[1] = 2,
            Violation::Unexpected,
            AlertDescription::UnexpectedMessage,
        ),
        (
            |r| r[3] = 0xff,
            Violation::Oversized(0xff19),
            AlertDescription::RecordOverflow,
        ),
        (
            |r| r.splice(..5, [23, 3, 3, 0, 0]).for_each(drop),
            Violation::BadRecord,
            AlertDescription::BadRecordMac,
        ),
        (
            |r| r.splice(.., *b"GET / HTTP/1.1\r\n\r\n").for_each(drop),
            Violation::Unexpected,
            AlertDescription::UnexpectedMessage,
        ),
    ];
    for (change, violation, alert) in change {
        let (mut near, mut far) = pair().await;
        let mut sealed = far.seal(b"before");
        let mut broken = far.seal(b"after it");
        broken.extend([0; 1]);
        change(&mut broken);
        sealed.extend(broken);
        far.send(&sealed).await;
        assert_eq!(near.read(6).await.unwrap(), b"before");
        let error = near.refusal().await;
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert_eq!(error.to_string(), violation.to_string());
        assert_eq!(far.alert().await, alert, "{violation}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_replayed_or_missing_record_is_refused() {
    for skip in [false, true] {
        let (mut near, mut far) = pair().await;
        let first = far.seal(b"first");
        let second = far.seal(b"other");
        if skip {
            far.send(&second).await;
        } else {
            far.send(&[first.clone(), first].concat()).await;
            assert_eq!(near.read(5).await.unwrap(), b"first");
        }
        let error = near.refusal().await;
        assert_eq!(error.to_string(), Violation::BadRecord.to_string());
    }
}

#[tokio::test(start_paused = true)]
async fn one_turn_reads_only_so_much() {
    let (mut near, mut far) = pair().await;
    let sent = noise(1 << 20);
    let sending = async {
        for part in sent.chunks(32 << 10) {
            let sealed = far.seal(part);
            far.send(&sealed).await;
        }
    };
    let reading = async {
        let (mut got, mut turns) = (0, 0);
        let mut bytes = vec![0; 8 << 20];
        while got < sent.len() {
            let turn = |cx: &mut Context<'_>| {
                let mut out = ReadBuf::new(&mut bytes[got..]);
                while let Poll::Ready(result) = Pin::new(&mut near.tls).poll_read(cx, &mut out) {
                    result.unwrap();
                }
                Poll::Ready(out.filled().len())
            };
            let mut turn = Some(turn);
            let read = std::future::poll_fn(|cx| near.flush.after(cx, turn.take().unwrap()));
            let read = read.await;
            assert!(read <= TURN_BYTES + (80 << 10), "{read}");
            got += read;
            turns += 1;
            tokio::task::yield_now().await;
        }
        assert!(bytes.starts_with(&sent) && turns > 3);
    };
    tokio::join!(sending, reading);
}

#[test]
fn a_session_is_small() {
    assert!(size_of::<Session<tokio::net::TcpStream>>() <= 640);
}
