//! gRPC to the control plane, over our own HTTP/2 connection: TLS, the token, calls and their status. Takes where to
//! and with what, gives answers or an error that an operator can act on; never knows what is asked.

mod call;
mod connection;
mod error;
mod params;
mod tls;

pub use call::Stream;
pub use connection::Connection;
pub use error::{Code, Error, Status};
pub use params::{Endpoint, InvalidEndpoint, Params, Roots, Token};
