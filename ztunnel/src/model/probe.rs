//! From where a pod is asked how it is. Takes nothing but what an operator wrote, gives plain values;
//! never says that somebody who comes from there is who he seems to be.

use std::net::IpAddr;

/// An address of the node from which it asks a pod how it is, whatever the pod's policies say.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ProbeSource {
    /// Where the question comes from.
    pub address: IpAddr,
    /// At which ports of the pod it may be asked.
    pub ports: Vec<u16>,
}

impl ProbeSource {
    /// Whether a connection can come from an address, in canonical form, to a pod.
    #[must_use]
    pub const fn can_be(address: IpAddr) -> bool {
        !(address.is_unspecified() || address.is_loopback() || address.is_multicast())
    }
}
