//! The one line per connection. Takes a connection's record, gives events of target `access` whose
//! field names and order tools know; never prints an identity that nobody proved.

use std::time::Duration;

use super::ledger::{Learned, Opening};
use crate::model::{Direction, LogLevel, Reason, SecurityPolicy, SpiffeId, Workload};

/// How a connection ended.
#[derive(Debug)]
pub(super) struct Ending {
    pub(super) received_bytes: u64,
    pub(super) sent_bytes: u64,
    pub(super) duration: Duration,
    pub(super) retries: u32,
    pub(super) reason: Reason,
    pub(super) error: Option<String>,
}

/// The fields that are known from [`Learned`] on, then others, then the message. Text is recorded
/// as text and addresses by `Display`: the plain format quotes the former.
// PROTOCOL.md#access-line
macro_rules! learned {
    ($level:ident, $opening:ident, $learned:ident, { $($more:tt)* }, $message:literal) => {
        tracing::event!(
            target: "access",
            parent: None,
            tracing::Level::$level,
            src.addr = %$opening.source,
            src.workload = workload($learned.source.as_deref()),
            src.namespace = namespace($learned.source.as_deref()),
            src.identity = identity($learned.proven_source_identity()),
            src.cluster = cluster($learned.source.as_deref()),
            dst.addr = %$learned.dst_addr,
            dst.hbone_addr = $learned.hbone_addr.as_deref().map(tracing::field::display),
            dst.service = $learned.service.as_deref().map(|service| &*service.key.hostname),
            dst.workload = workload($learned.destination.as_deref()),
            dst.namespace = namespace($learned.destination.as_deref()),
            dst.identity = identity($learned.proven_destination_identity()),
            dst.cluster = cluster($learned.destination.as_deref()),
            direction = $opening.direction.as_str(),
            $($more)*
            $message
        )
    };
}

macro_rules! complete {
    ($level:ident, $opening:ident, $learned:ident, $ending:ident, $sent:ident, $received:ident) => {
        learned!($level, $opening, $learned, {
            bytes_sent = $sent,
            bytes_recv = $received,
            duration = milliseconds($ending.duration),
            retries = (($ending.retries) > 0).then_some($ending.retries),
            reason = $ending.reason.as_str(),
            path = path($learned.security),
            error = $ending.error.as_deref(),
        }, "connection complete")
    };
}

macro_rules! failed {
    ($level:ident, $opening:ident, $ending:ident) => {
        tracing::event!(
            target: "access",
            parent: None,
            tracing::Level::$level,
            src.addr = %$opening.source,
            dst.addr = %$opening.destination,
            direction = $opening.direction.as_str(),
            duration = milliseconds($ending.duration),
            reason = $ending.reason.as_str(),
            error = $ending.error.as_deref(),
            "connection failed"
        )
    };
}

/// The connection has its route.
pub(super) fn opened(opening: &Opening, learned: &Learned) {
    learned!(DEBUG, opening, learned, { path = path(learned.security), }, "connection opened");
}

/// The connection had its route, and ended.
pub(super) fn complete(opening: &Opening, learned: &Learned, ending: &Ending) {
    let (sent, received) = seen_from_here(opening, ending);
    match ending.reason.level() {
        LogLevel::Info => complete!(INFO, opening, learned, ending, sent, received),
        LogLevel::Warn => complete!(WARN, opening, learned, ending, sent, received),
    }
}

/// The connection ended before it had a route.
pub(super) fn failed(opening: &Opening, ending: &Ending) {
    match ending.reason.level() {
        LogLevel::Info => failed!(INFO, opening, ending),
        LogLevel::Warn => failed!(WARN, opening, ending),
    }
}

/// Bytes sent and received as the reporting side sees them: what one node's line calls sent, the
/// other node's line calls received. The metrics do not turn with the reporter.
// PROTOCOL.md#access-line-bytes
fn seen_from_here(opening: &Opening, ending: &Ending) -> (u64, u64) {
    match opening.direction {
        Direction::Inbound => (ending.sent_bytes, ending.received_bytes),
        Direction::Outbound => (ending.received_bytes, ending.sent_bytes),
    }
}

/// Told only where the line would look like that of a tunnel, and there was none, or like one that
/// policy admitted, and it did not.
const fn path(security: SecurityPolicy) -> Option<&'static str> {
    match security {
        SecurityPolicy::NodeLocal | SecurityPolicy::Probe => Some(security.path()),
        SecurityPolicy::MutualTls | SecurityPolicy::Unknown => None,
    }
}

/// The pod's name, or the service that it calls itself.
fn workload(workload: Option<&Workload>) -> Option<&str> {
    let workload = workload?;
    known(&workload.name).or_else(|| known(&workload.canonical_name))
}

fn namespace(workload: Option<&Workload>) -> Option<&str> {
    known(&workload?.namespace)
}

fn cluster(workload: Option<&Workload>) -> Option<&str> {
    known(&workload?.cluster_id)
}

fn identity(identity: Option<&SpiffeId>) -> Option<String> {
    identity.map(ToString::to_string)
}

fn known(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}

fn milliseconds(duration: Duration) -> String {
    format!("{}ms", duration.as_millis())
}
