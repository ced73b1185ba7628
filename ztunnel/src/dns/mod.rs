//! The resolver that a pod's questions reach. Takes what its applications ask of any resolver, gives
//! what the mesh knows of the name, and passes everything else on to the resolver that was meant,
//! byte for byte; never keeps an answer.

mod counts;
mod datagrams;
mod pod;
mod search;
mod stream;

pub use counts::{Counts, Tally};
pub use datagrams::serve;
pub use pod::{Pod, Server};
pub use search::{Params, look_up};
pub use stream::serve as serve_connection;

/// Where resolvers are asked.
pub const PORT: u16 = 53;
