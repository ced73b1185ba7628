//! The numbers of a tunnel. Takes nothing, gives the values that the established proxy uses, and
//! a deadline for each wait.

use std::time::Duration;

/// Sizes and deadlines of both ends of a tunnel.
#[derive(Clone, Debug)]
pub struct Params {
    /// Bytes that a peer may send on one stream before we take them.
    pub stream_window_bytes: u32,
    /// Bytes that a peer may send on all streams before we take them; larger than one stream's,
    /// so that streams that stand still cannot stop the others.
    pub connection_window_bytes: u32,
    /// The largest frame that we accept.
    pub frame_bytes: u32,
    /// The largest header list that we accept as a client.
    pub client_header_bytes: u32,
    /// The largest header list that we accept as a server.
    pub server_header_bytes: u32,
    /// Streams that a peer may have open at once.
    pub server_streams: u32,
    /// Streams that we open at once on one tunnel.
    pub pool_streams: usize,
    /// Bytes of one stream that wait for the peer's window before we stop reading its other side.
    pub send_buffer_bytes: usize,
    /// How long a tunnel without streams is kept.
    pub idle_timeout: Duration,
    /// For the TCP connection of a tunnel.
    pub connect_timeout: Duration,
    /// For the TLS handshake, either role.
    pub tls_timeout: Duration,
    /// For the peer's preface and SETTINGS, either role.
    pub h2_timeout: Duration,
    /// For the answer to a CONNECT. Longer than what a healthy peer may need to give up by itself
    /// (5 s to know its pod and 10 s to connect to the application), so that its own answer wins.
    pub response_timeout: Duration,
    /// Between two pings.
    pub ping_interval: Duration,
    /// For the answer to a ping, or any other byte.
    pub ping_timeout: Duration,
}

impl Default for Params {
    // PROTOCOL.md#h2-parameters
    // PROTOCOL.md#pool
    // PROTOCOL.md#h2-ping
    fn default() -> Self {
        Self {
            stream_window_bytes: 4 << 20,
            connection_window_bytes: 16 << 20,
            frame_bytes: 1 << 20,
            client_header_bytes: 16 << 10,
            server_header_bytes: 64 << 10,
            server_streams: 200,
            pool_streams: 100,
            send_buffer_bytes: 512 << 10,
            idle_timeout: Duration::from_secs(300),
            connect_timeout: Duration::from_secs(10),
            tls_timeout: Duration::from_secs(10),
            h2_timeout: Duration::from_secs(10),
            response_timeout: Duration::from_secs(20),
            ping_interval: Duration::from_secs(10),
            ping_timeout: Duration::from_secs(20),
        }
    }
}
