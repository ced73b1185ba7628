//! A peer that misbehaves on command: an HBONE client or server that is a TLS library and frames
//! written by hand. Takes the mesh's root and what to say; gives what came back; never uses our
//! code, and never waits without a deadline.

use std::{
    fs,
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use rcgen::{
    CertificateParams, CertificateRevocationListParams, ExtendedKeyUsagePurpose, Issuer,
    KeyIdMethod, KeyPair, RevokedCertParams, SanType,
};
use rustls::{
    ClientConfig, ClientConnection, ConnectionCommon, DigitallySignedStruct, ServerConfig,
    ServerConnection, SignatureScheme, StreamOwned,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime},
};
use x509_parser::{certificate::X509Certificate, prelude::FromDer as _};

use crate::{apps, netns::Netns, topology::Topology};

/// Who the peer says it is, with the mesh's own signature.
#[derive(Debug)]
pub struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl Identity {
    /// A certificate of this SPIFFE identity for the next hour, signed with the root of the mesh.
    pub fn signed(topology: &Topology, spiffe_id: &str) -> Result<Self> {
        Self::lasting(topology, spiffe_id, Duration::from_secs(3600))
    }

    /// The same, for another time.
    pub fn lasting(topology: &Topology, spiffe_id: &str, time: Duration) -> Result<Self> {
        Self::by(&topology.directory()?.join("ca"), spiffe_id, time)
    }

    /// The same, signed with the root in this directory.
    pub fn by(ca: &Path, spiffe_id: &str, time: Duration) -> Result<Self> {
        let read = |name| fs::read_to_string(ca.join(name));
        let root_key = KeyPair::from_pem(&read("root-key.pem")?)?;
        let root = Issuer::from_ca_cert_pem(&read("root-cert.pem")?, root_key)?;
        let mut params = CertificateParams::default();
        let now = std::time::SystemTime::now();
        params.not_before = (now - Duration::from_secs(60)).into();
        params.not_after = (now + time).into();
        params.subject_alt_names = vec![SanType::URI(spiffe_id.try_into()?)];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        let key = KeyPair::generate()?;
        let leaf = params.signed_by(&key, &root)?;
        Ok(Self {
            chain: vec![leaf.der().clone()],
            key: PrivatePkcs8KeyDer::from(key.serialize_der()).into(),
        })
    }

    /// Its certificate, in DER.
    pub fn certificate(&self) -> Result<&[u8]> {
        let leaf = self.chain.first().context("no certificate")?;
        Ok(leaf)
    }

    fn server(&self) -> Result<Arc<ServerConfig>> {
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_no_client_auth()
            .with_single_cert(self.chain.clone(), self.key.clone_key())?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }

    fn client(&self) -> Result<Arc<ClientConfig>> {
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyServer(provider())))
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }
}

/// The mesh's own list of these revoked certificates, as PEM, and whether it is out of date.
pub fn revocation_list(topology: &Topology, revoked: &[&[u8]], expired: bool) -> Result<String> {
    let ca = topology.directory()?.join("ca");
    let read = |name| fs::read_to_string(ca.join(name));
    let root_key = KeyPair::from_pem(&read("root-key.pem")?)?;
    let root = Issuer::from_ca_cert_pem(&read("root-cert.pem")?, root_key)?;
    let day = Duration::from_secs(24 * 3600);
    let now = std::time::SystemTime::now();
    let mut revoked_certs = Vec::new();
    for certificate in revoked {
        let (_, certificate) = X509Certificate::from_der(certificate)?;
        revoked_certs.push(RevokedCertParams {
            serial_number: certificate.raw_serial().to_vec().into(),
            revocation_time: (now - 3 * day).into(),
            reason_code: None,
            invalidity_date: None,
        });
    }
    let params = CertificateRevocationListParams {
        this_update: (now - 2 * day).into(),
        next_update: if expired { now - day } else { now + day }.into(),
        crl_number: 1.into(),
        issuing_distribution_point: None,
        revoked_certs,
        key_identifier_method: KeyIdMethod::Sha256,
    };
    Ok(params.signed_by(&root)?.pem()?)
}

/// A place where node processes find an HBONE server.
#[derive(Debug)]
pub struct Listener {
    listener: TcpListener,
    config: Arc<ServerConfig>,
    patience: Duration,
}

impl Listener {
    /// Listens on this port of every address of the namespace.
    pub fn start(netns: &Netns, port: u16, identity: &Identity) -> Result<Self> {
        Ok(Self {
            listener: netns.listen(SocketAddr::new(
                std::net::Ipv6Addr::UNSPECIFIED.into(),
                port,
            ))?,
            config: identity.server()?,
            patience: PATIENCE,
        })
    }

    /// Waits only so long for somebody to connect.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// The next TCP connection, without TLS so far.
    pub fn accept_tcp(&self) -> Result<TcpStream> {
        self.listener.set_nonblocking(true)?;
        let deadline = Instant::now() + self.patience;
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false)?;
                    stream.set_read_timeout(Some(PATIENCE))?;
                    stream.set_write_timeout(Some(PATIENCE))?;
                    return Ok(stream);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    ensure!(Instant::now() < deadline, "nobody connected");
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The next connection with its TLS handshake done; HTTP/2 is not begun.
    pub fn accept_tls(&self) -> Result<Server> {
        self.tls(self.accept_tcp()?)
    }

    /// The next connection that has spoken HTTP/2's preface and had our SETTINGS.
    pub fn accept(&self, settings: &[(u16, u32)]) -> Result<Server> {
        self.http2(self.accept_tcp()?, settings)
    }

    /// Does the TLS handshake on a connection.
    pub fn tls(&self, tcp: TcpStream) -> Result<Server> {
        let tls = ServerConnection::new(Arc::clone(&self.config))?;
        let mut stream = StreamOwned::new(tls, tcp);
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock)?;
        }
        Ok(Peer { stream })
    }

    /// The same, and begins HTTP/2.
    pub fn http2(&self, tcp: TcpStream, settings: &[(u16, u32)]) -> Result<Server> {
        let mut peer = self.tls(tcp)?;
        peer.read_preface()?;
        peer.settings(settings)?;
        Ok(peer)
    }
}

/// An end of a tunnel.
#[derive(Debug)]
pub struct Peer<C> {
    stream: StreamOwned<C, TcpStream>,
}

/// One that was connected to.
pub type Server = Peer<ServerConnection>;
/// One that connected.
pub type Client = Peer<ClientConnection>;

/// One HTTP/2 frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

impl Client {
    /// Connects and does the TLS handshake; HTTP/2 is not begun.
    pub fn connect_tls(netns: &Netns, to: SocketAddr, identity: &Identity) -> Result<Self> {
        let tcp = apps::dial(netns, to)?;
        tcp.set_read_timeout(Some(PATIENCE))?;
        tcp.set_write_timeout(Some(PATIENCE))?;
        let name = ServerName::from(to.ip());
        let tls = ClientConnection::new(identity.client()?, name)?;
        let mut stream = StreamOwned::new(tls, tcp);
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock)?;
        }
        Ok(Self { stream })
    }

    /// The certificate that the server has shown, in DER.
    pub fn certificate(&self) -> Result<Vec<u8>> {
        let chain = self.stream.conn.peer_certificates();
        let leaf = chain.and_then(<[_]>::first).context("no certificate")?;
        Ok(leaf.to_vec())
    }

    /// Connects and begins HTTP/2.
    pub fn connect(netns: &Netns, to: SocketAddr, identity: &Identity) -> Result<Self> {
        let mut peer = Self::connect_tls(netns, to, identity)?;
        peer.write(PREFACE)?;
        peer.settings(&[])?;
        Ok(peer)
    }

    /// Asks for a stream to `authority`.
    pub fn ask(&mut self, stream: u32, authority: &str) -> Result<()> {
        let headers = [(":method", "CONNECT"), (":authority", authority)];
        self.headers(stream, &headers)
    }
}

impl<C, S> Peer<C>
where
    C: std::ops::DerefMut<Target = ConnectionCommon<S>>,
    S: rustls::SideData,
{
    /// Bytes as they are.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes)?;
        self.stream.flush()?;
        Ok(())
    }

    /// One frame, whatever it says.
    pub fn frame(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Result<()> {
        self.write(&frame(kind, flags, stream, payload))
    }

    /// SETTINGS, as pairs of identifier and value.
    pub fn settings(&mut self, settings: &[(u16, u32)]) -> Result<()> {
        let pairs = settings.iter().flat_map(|(id, value)| {
            let (id, value) = (id.to_be_bytes(), value.to_be_bytes());
            id.into_iter().chain(value)
        });
        let payload: Vec<u8> = pairs.collect();
        self.frame(SETTINGS, 0, 0, &payload)
    }

    /// HEADERS that end no stream, each field spelled out.
    pub fn headers(&mut self, stream: u32, headers: &[(&str, &str)]) -> Result<()> {
        self.frame(HEADERS, END_HEADERS, stream, &block(headers))
    }

    /// The server's yes.
    pub fn answer(&mut self, stream: u32, status: &str) -> Result<()> {
        self.headers(stream, &[(":status", status)])
    }

    pub fn data(&mut self, stream: u32, bytes: &[u8]) -> Result<()> {
        self.frame(DATA, 0, stream, bytes)
    }

    pub fn reset(&mut self, stream: u32, code: u32) -> Result<()> {
        self.frame(RST_STREAM, 0, stream, &code.to_be_bytes())
    }

    /// The client's preface, read by a server.
    fn read_preface(&mut self) -> Result<()> {
        let mut preface = vec![0; PREFACE.len()];
        self.stream.read_exact(&mut preface)?;
        ensure!(preface == PREFACE, "no HTTP/2 preface");
        Ok(())
    }

    /// The next frame, or `None` at the end of the connection.
    pub fn read_frame(&mut self) -> Result<Option<Frame>> {
        let mut head = [0; 9];
        match self.stream.read_exact(&mut head) {
            Ok(()) => {}
            Err(error) if is_end(error.kind()) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        let [a, b, c, kind, flags, s1, s2, s3, s4] = head;
        let length = usize::try_from(u32::from_be_bytes([0, a, b, c]))?;
        let mut payload = vec![0; length];
        match self.stream.read_exact(&mut payload) {
            Ok(()) => {}
            // It ended within a frame.
            Err(error) if is_end(error.kind()) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        Ok(Some(Frame {
            kind,
            flags,
            stream: u32::from_be_bytes([s1, s2, s3, s4]),
            payload,
        }))
    }

    /// The next frame of this kind; SETTINGS and PINGs that come before it are answered.
    pub fn wait(&mut self, kind: u8) -> Result<Frame> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            let Some(frame) = self.read_frame()? else {
                bail!("the connection ended before a frame of kind {kind}");
            };
            if frame.kind == kind {
                return Ok(frame);
            }
            self.please(&frame)?;
        }
        bail!("no frame of kind {kind} in {PATIENCE:?}")
    }

    /// Reads until the connection ends; gives the error code of a GOAWAY that came before, if one
    /// did.
    pub fn wait_end(&mut self) -> Result<Option<u32>> {
        let deadline = Instant::now() + PATIENCE;
        let mut code = None;
        while Instant::now() < deadline {
            match self.read_frame() {
                Ok(None) => return Ok(code),
                Ok(Some(frame)) if frame.kind == GOAWAY => {
                    code = frame
                        .payload
                        .get(4..8)
                        .and_then(|c| Some(u32::from_be_bytes(c.try_into().ok()?)));
                }
                Ok(Some(frame)) => drop(self.please(&frame)),
                Err(error) => return Err(error.context("the connection is still open")),
            }
        }
        bail!("the connection is still open after {PATIENCE:?}")
    }

    /// Answers what every peer must answer.
    fn please(&mut self, frame: &Frame) -> Result<()> {
        match (frame.kind, frame.flags) {
            (SETTINGS, 0) => self.frame(SETTINGS, ACK, 0, &[]),
            (PING, 0) => self.frame(PING, ACK, 0, &frame.payload),
            _ => Ok(()),
        }
    }

    /// Takes whatever comes, until the connection ends.
    pub fn drain(&mut self) {
        // How it ends does not matter.
        drop(std::io::copy(&mut self.stream, &mut std::io::sink()));
    }

    /// The TCP connection underneath.
    #[must_use]
    pub fn tcp(&self) -> &TcpStream {
        &self.stream.sock
    }

    /// Resets the TCP connection.
    pub fn abort(self) -> Result<()> {
        Ok(apps::abort(self.stream.sock)?)
    }
}

/// A frame's bytes.
#[must_use]
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    let [_, a, b, c] = length.to_be_bytes();
    let mut bytes = vec![a, b, c, kind, flags];
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// A header block in which every field is spelled out and none is remembered.
#[must_use]
pub fn block(headers: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in headers {
        block.push(0);
        for text in [name, value] {
            length(&mut block, text.len());
            block.extend(text.as_bytes());
        }
    }
    block
}

/// An HPACK integer of a 7-bit prefix.
fn length(block: &mut Vec<u8>, mut length: usize) {
    let low = |n: usize| u8::try_from(n & 0x7f).unwrap_or_default();
    if length < 127 {
        block.push(low(length));
        return;
    }
    block.push(127);
    length -= 127;
    while length >= 128 {
        block.push(low(length) | 0x80);
        length >>= 7;
    }
    block.push(low(length));
}

fn is_end(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::UnexpectedEof
            | ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted
            | ErrorKind::BrokenPipe
    )
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

/// Believes every server: who it is does not matter to the one who misbehaves.
#[derive(Debug)]
struct AnyServer(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;
pub const ACK: u8 = 1;
pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;
/// Identifiers of settings.
pub const INITIAL_WINDOW_SIZE: u16 = 4;
pub const MAX_CONCURRENT_STREAMS: u16 = 3;

const PATIENCE: Duration = Duration::from_secs(60);
