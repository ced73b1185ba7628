//! The CONNECT and its answer. Takes what one side wants to say, gives the HTTP message, and back;
//! never sends one.

use std::sync::Arc;

use http::header::{FORWARDED, HeaderName};
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri, Version, request};

use super::authority::Authority;
use super::baggage::{BAGGAGE, Baggage};
use super::forwarded::Forwarded;
use super::malformed::Malformed;
use super::traceparent::Traceparent;
use crate::model::{ClientAddr, Reason};

/// A CONNECT that we send.
#[derive(Clone, Debug)]
pub struct Connect<'a> {
    /// Where the connection shall go.
    pub authority: &'a Authority,
    /// Who asks, as [`Baggage::encode`] gives it once per workload.
    pub baggage: &'a HeaderValue,
    /// For whom.
    pub source: ClientAddr,
    /// The host name of the service that was addressed, if one was.
    pub host: Option<&'a Arc<str>>,
    /// The connection's trace identity.
    pub traceparent: Traceparent,
    /// Our own network: only on the inner CONNECT of double HBONE.
    pub network: Option<&'a str>,
}

/// A CONNECT that we received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectRequest {
    /// Where the connection shall go.
    pub authority: Authority,
    /// Who asks, as its proxy says; proves nothing.
    pub baggage: Baggage,
    /// For whom, as its proxy says; proves nothing.
    pub forwarded: Forwarded,
    /// The connection's trace identity, if there is a well-formed one.
    pub traceparent: Option<Traceparent>,
    /// The network that the connection comes from, if its proxy says so.
    pub network: Option<Arc<str>>,
}

impl Connect<'_> {
    /// The request, with its headers in the order that peers are used to.
    ///
    /// # Errors
    /// When the authority's host name cannot be sent.
    // PROTOCOL.md#connect-request: of the pseudo-headers only `:method` and `:authority`.
    pub fn encode(&self) -> Result<Request<()>, Malformed> {
        let authority = self.authority.to_string();
        let Ok(authority) = authority.parse::<http::uri::Authority>() else {
            return Err(Malformed::AuthorityHost(authority));
        };
        let mut request = Request::new(());
        *request.method_mut() = Method::CONNECT;
        *request.version_mut() = Version::HTTP_2;
        *request.uri_mut() = Uri::from(authority);
        let forwarded = Forwarded {
            source: Some(self.source),
            host: self.host.cloned(),
        };
        let headers = request.headers_mut();
        headers.insert(BAGGAGE, self.baggage.clone());
        headers.insert(FORWARDED, forwarded.encode());
        headers.insert(TRACEPARENT, self.traceparent.encode());
        if let Some(network) = self.network.and_then(|n| HeaderValue::from_str(n).ok()) {
            headers.insert(NETWORK, network);
        }
        Ok(request)
    }
}

impl ConnectRequest {
    /// Reads a request. Only method and authority can be wrong: a header that cannot be read is
    /// absent.
    ///
    /// # Errors
    /// When it is not a CONNECT to a host and a port.
    pub fn decode(parts: &request::Parts) -> Result<Self, Malformed> {
        if parts.method != Method::CONNECT {
            return Err(Malformed::Method(parts.method.clone()));
        }
        let authority = parts
            .uri
            .authority()
            .ok_or(Malformed::AuthorityNoHost)?
            .as_str()
            .parse()?;
        let headers = &parts.headers;
        Ok(Self {
            authority,
            baggage: Baggage::decode(headers),
            forwarded: headers
                .get(FORWARDED)
                .map(Forwarded::decode)
                .unwrap_or_default(),
            traceparent: headers.get(TRACEPARENT).and_then(Traceparent::decode),
            // A name in odd bytes is still a name that is not ours.
            network: headers
                .get(NETWORK)
                .map(|name| String::from_utf8_lossy(name.as_bytes()).into()),
        })
    }
}

/// The answer that opens the connection, with a description of the workload that took it.
// PROTOCOL.md#connect-response
#[must_use]
pub fn accepted(baggage: Option<&HeaderValue>) -> Response<()> {
    let mut response = Response::new(());
    if let Some(baggage) = baggage {
        response.headers_mut().insert(BAGGAGE, baggage.clone());
    }
    response
}

/// The answer that refuses the connection: a status and nothing else.
// PROTOCOL.md#connect-response
#[must_use]
pub fn refused(reason: Reason) -> Response<()> {
    let mut response = Response::new(());
    *response.status_mut() =
        StatusCode::from_u16(reason.http_status()).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
    response
}

/// Names are on the wire as written here.
// PROTOCOL.md#connect-headers
const NETWORK: HeaderName = HeaderName::from_static("x-forwarded-network");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

#[cfg(test)]
mod tests;
