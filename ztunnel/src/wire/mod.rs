//! Bytes to values and back; pure.
#![warn(clippy::wildcard_enum_match_arm)]

mod authority;
mod baggage;
mod connect;
pub mod dns;
mod forwarded;
mod malformed;
mod proxy_v2;
mod socks5;
mod traceparent;
mod zds;

pub use authority::Authority;
pub use baggage::{Baggage, Owner, OwnerKind};
pub use connect::{Connect, ConnectRequest, accepted, refused};
pub use forwarded::Forwarded;
pub use malformed::Malformed;
pub use proxy_v2::ProxyHeader;
pub use socks5::{
    SOCKS_WELCOME, Socks, SocksFault, SocksReply, SocksTarget, socks_greeting, socks_request,
};
pub use traceparent::Traceparent;
pub use zds::{InvalidZds, MAX_ZDS_BYTES, ZdsRequest, zds_ack, zds_hello};
