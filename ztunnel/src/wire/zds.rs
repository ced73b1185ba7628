//! Messages of the node agent, one a packet. Takes a packet, gives what the agent asks for, checked, and
//! gives the packets that answer; never touches the descriptors that come beside them.

use std::sync::Arc;

use prost::Message as _;
use thiserror::Error;

use crate::model::{PodRef, PodUid};
use crate::proto::zds as message;

/// What an agent asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ZdsRequest {
    /// Enrol this pod; its network namespace comes beside the message.
    Add(PodUid, PodRef),
    /// It is gone.
    Delete(PodUid),
    /// It is still there.
    Keep(PodUid),
    /// Every pod has been named since the hello.
    SnapshotSent,
}

/// Why a packet is no request.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum InvalidZds {
    /// It is not a message.
    #[error("the packet is no protobuf message of the agreed shape")]
    Encoding(#[from] prost::DecodeError),
    /// A pod without a name, a namespace or a service account.
    #[error("pod {uid} has no {field}")]
    Incomplete {
        /// The pod.
        uid: PodUid,
        /// What is missing.
        field: &'static str,
    },
    /// A pod without an identifier.
    #[error("the message names no pod")]
    NoUid,
    /// Nobody could write this identifier down.
    #[error("the pod's identifier is longer than {MAX_UID_BYTES} bytes or has control characters")]
    Uid,
    /// The message asks for nothing that this version knows.
    #[error("the message asks for nothing that is known here")]
    Unknown,
    /// An Add without a workload.
    #[error("pod {0} has no workload")]
    NoWorkload(PodUid),
}

impl InvalidZds {
    /// Whether it is a message, of which what it asks for cannot be done; the ones after it are none
    /// the worse.
    #[must_use]
    pub const fn is_a_message(&self) -> bool {
        match self {
            Self::Encoding(_) => false,
            Self::Incomplete { .. }
            | Self::NoUid
            | Self::NoWorkload(_)
            | Self::Uid
            | Self::Unknown => true,
        }
    }

    /// The pod that is to be enrolled, and of which too little is said.
    #[must_use]
    pub fn unclear_pod(&self) -> Option<PodUid> {
        match self {
            Self::Incomplete { uid, .. } | Self::NoWorkload(uid) => Some(uid.clone()),
            Self::Encoding(_) | Self::NoUid | Self::Uid | Self::Unknown => None,
        }
    }
}

impl ZdsRequest {
    /// Reads a packet.
    ///
    /// # Errors
    /// When it is no request, or lacks something.
    // PROTOCOL.md#zds
    pub fn decode(packet: &[u8]) -> Result<Self, InvalidZds> {
        use message::workload_request::Payload;
        let request = message::WorkloadRequest::decode(packet)?;
        match request.payload {
            Some(Payload::Add(add)) => {
                let uid = uid(&add.uid)?;
                let Some(workload) = add.workload_info else {
                    return Err(InvalidZds::NoWorkload(uid));
                };
                let part = |field, text: String| {
                    if text.is_empty() {
                        let uid = uid.clone();
                        return Err(InvalidZds::Incomplete { uid, field });
                    }
                    Ok(Arc::from(text))
                };
                let pod = PodRef {
                    name: part("name", workload.name)?,
                    namespace: part("namespace", workload.namespace)?,
                    service_account: part("service account", workload.service_account)?,
                };
                Ok(Self::Add(uid, pod))
            }
            Some(Payload::Del(delete)) => Ok(Self::Delete(uid(&delete.uid)?)),
            Some(Payload::Keep(keep)) => Ok(Self::Keep(uid(&keep.uid)?)),
            Some(Payload::SnapshotSent(message::SnapshotSent {})) => Ok(Self::SnapshotSent),
            None => Err(InvalidZds::Unknown),
        }
    }
}

/// The first packet of a connection.
// PROTOCOL.md#zds
#[must_use]
pub fn zds_hello() -> Vec<u8> {
    let version = message::Version::V1.into();
    message::ZdsHello { version }.encode_to_vec()
}

/// The answer to a request; the error's text is cut to what a packet holds.
#[must_use]
pub fn zds_ack(outcome: Result<(), &str>) -> Vec<u8> {
    let mut error = outcome.err().unwrap_or_default().to_owned();
    if outcome.is_err() && error.is_empty() {
        // An empty error would be read as success.
        "refused".clone_into(&mut error);
    }
    let mut end = error.len().min(MAX_ERROR_BYTES);
    while !error.is_char_boundary(end) {
        end -= 1;
    }
    error.truncate(end);
    let ack = message::Ack { error };
    let payload = Some(message::workload_response::Payload::Ack(ack));
    message::WorkloadResponse { payload }.encode_to_vec()
}

/// The largest packet that either side reads.
// PROTOCOL.md#zds
pub const MAX_ZDS_BYTES: usize = 1024;

/// What Kubernetes lets a name have, and far more than an identifier has.
const MAX_UID_BYTES: usize = 253;

/// Leaves room for the tags and lengths around it.
const MAX_ERROR_BYTES: usize = MAX_ZDS_BYTES - 24;

fn uid(uid: &str) -> Result<PodUid, InvalidZds> {
    if uid.is_empty() {
        return Err(InvalidZds::NoUid);
    }
    if uid.len() > MAX_UID_BYTES || uid.chars().any(char::is_control) {
        return Err(InvalidZds::Uid);
    }
    Ok(PodUid(uid.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    // Written by hand, so that a slip in the schema shows: field numbers are the wire.
    #[test]
    fn each_request_is_read_by_its_numbers() {
        let add = b"\x0a\x17\x0a\x02u1\x12\x11\x0a\x01n\x12\x02ns\x1a\x02sa\x22\x04junk";
        let pod = PodRef {
            name: "n".into(),
            namespace: "ns".into(),
            service_account: "sa".into(),
        };
        let uid = || PodUid("u1".into());
        for (packet, want) in [
            (&add[..], ZdsRequest::Add(uid(), pod)),
            (b"\x12\x04\x12\x02u1", ZdsRequest::Delete(uid())),
            (b"\x1a\x00", ZdsRequest::SnapshotSent),
            (b"\x2a\x04\x0a\x02u1", ZdsRequest::Keep(uid())),
        ] {
            assert_eq!(ZdsRequest::decode(packet), Ok(want));
        }
    }

    #[test]
    fn what_lacks_something_is_refused_by_name() {
        for (packet, want) in [
            (&b""[..], "nothing that is known"),
            (b"\x22\x00", "nothing that is known"),
            (b"\x0a\x17\x0a\x02u1", "no protobuf message"),
            (b"\x0a\x04\x0a\x02u1", "pod u1 has no workload"),
            (b"\x0a\x00", "names no pod"),
            (b"\x12\x04\x0a\x02u1", "names no pod"),
            (b"\x2a\x05\x0a\x03a\x00b", "control characters"),
            (b"\x0a\x09\x0a\x02u1\x12\x03\x0a\x01n", "has no namespace"),
            (
                b"\x0a\x0d\x0a\x02u1\x12\x07\x0a\x01n\x12\x02ns",
                "has no service account",
            ),
        ] {
            let error = ZdsRequest::decode(packet).unwrap_err().to_string();
            assert!(error.contains(want), "{packet:?}: {error}");
        }
    }

    #[test]
    fn what_one_pod_lacks_is_about_that_pod_alone() {
        for (packet, is_a_message, pod) in [
            (&b"\x0a\x04\x0a\x02u1"[..], true, Some("u1")),
            (b"\x0a\x09\x0a\x02u1\x12\x03\x0a\x01n", true, Some("u1")),
            (b"\x0a\x00", true, None),
            (b"\x32\x00", true, None),
            (b"\xff", false, None),
        ] {
            let error = ZdsRequest::decode(packet).unwrap_err();
            assert_eq!(error.is_a_message(), is_a_message, "{error}");
            assert_eq!(error.unclear_pod(), pod.map(|pod| PodUid(pod.into())));
        }
        let long = [&b"\x2a\x81\x02\x0a\xfe\x01"[..], &[b'x'; 254]].concat();
        assert_eq!(ZdsRequest::decode(&long), Err(InvalidZds::Uid));
    }

    #[test]
    fn hello_and_acks_are_the_agreed_bytes_and_fit_a_packet() {
        assert_eq!(zds_hello(), b"\x08\x01");
        assert_eq!(zds_ack(Ok(())), b"\x0a\x00");
        assert_eq!(zds_ack(Err("no")), b"\x0a\x04\x0a\x02no");
        assert_eq!(zds_ack(Err("")), zds_ack(Err("refused")));
        let long = zds_ack(Err(&"\u{e4}".repeat(4000)));
        assert!(long.len() > 900 && long.len() <= MAX_ZDS_BYTES);
        let text = String::from_utf8(long.get(6..).unwrap().to_vec());
        assert!(text.is_ok(), "cut between characters");
    }
}
