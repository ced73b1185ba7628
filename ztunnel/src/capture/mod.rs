//! The kernel: takes pods (network namespaces) and settings, gives listeners, sockets and counters.
//! Sole importer of aya, nix, socket2 and rtnetlink; it never judges a policy or reads a byte.

mod accept;
mod bpf;
mod diag;
mod dial;
mod error;
mod external;
mod limits;
mod listen;
mod maps;
mod means;
mod netns;
mod owner;
mod packets;
mod pins;
mod pod;
mod preflight;
mod questions;
mod release;
mod route;
mod settings;
mod sys;
mod watch;

pub use accept::{Arrival, Captured, Listener};
pub use bpf::{Capture, Params};
pub use diag::node_holds;
pub use dial::Dialer;
pub use error::Error;
pub use external::{External, ExternalParams, ExternalPod};
pub use limits::raise_descriptor_limit;
pub use listen::WorkerListeners;
pub use maps::{Count, CountSource};
pub use means::{Means, PodMeans};
pub use netns::{Netns, NetnsCookie};
pub use packets::{Packet, PacketSocket};
pub use pod::PodCapture;
pub use preflight::{preflight, preflight_external};
pub use questions::{Asker, Asking, QuestionSocket, Questions};
pub use release::{Released, release_all};
pub use settings::{PlaintextVerdict, PodSettings};
