//! HBONE: takes a permit and a place to go, gives streams of bytes inside mutual TLS and copies
//! them; never decides who may go where and never makes a socket.

mod buffer;
mod client;
mod error;
mod keepalive;
mod load;
mod nested;
mod params;
mod pipe;
mod pool;
mod relay;
mod server;
mod stream;
mod tcp;
#[cfg(test)]
mod testing;
mod tls;

pub use buffer::Queue;
pub use error::Error;
pub use nested::{Inside, open_inside};
pub use params::Params;
pub use pool::{Dial, Opened, Pool, Target};
pub use relay::{Carrying, Side, Written, carry, relay};
pub use server::{Accepted, Request, handshake, serve};
pub use stream::H2Stream;
pub use tcp::{TcpKeepalive, tune};
