//! The way into a pod. Takes a CONNECT's authority and the pod that was dialled, gives the
//! application's address; never leaves the pod.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::model::{AppAddr, OrigDst, Service, Workload};

use super::{Error, Snapshot, balance};

/// The authority of a CONNECT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// A service's host name and port.
    Host(String, u16),
    /// An address.
    Ip(SocketAddr),
}

/// An inbound HBONE request.
#[derive(Clone, Debug)]
pub struct InboundQuery<'a> {
    /// The workload of the pod that was dialled.
    pub local: &'a Workload,
    /// Where the peer connected to: the pod's IP and 15008.
    pub dialled: OrigDst,
    /// What the peer asks for.
    pub asked: Asked,
    /// The host name that the peer says its application dialled.
    pub forwarded_host: Option<&'a str>,
}

/// Where an inbound connection is delivered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// The application.
    pub app: AppAddr,
    /// The service that the client dialled, if the pod serves it.
    pub service: Option<Arc<Service>>,
}

/// Finds the application of one inbound HBONE request.
///
/// # Errors
/// When the authority is not this pod's to serve.
// PROTOCOL.md#inbound-validation
pub fn deliver(snapshot: &Snapshot, query: &InboundQuery<'_>) -> Result<Delivery, Error> {
    if query.local.application_tunnel.is_some() {
        return Err(Error::Unsupported("an application tunnel"));
    }
    let pod = query.dialled.ip();
    let (port, asked_service) = match &query.asked {
        Asked::Ip(asked) => {
            let asked_ip = asked.ip().to_canonical();
            if asked_ip != pod {
                return Err(Error::WrongPod {
                    asked: asked_ip,
                    pod,
                });
            }
            (asked.port(), None)
        }
        Asked::Host(host, port) => {
            let unknown = || Error::UnknownHost {
                host: host.clone(),
                port: *port,
            };
            let service = snapshot.service_of(query.local, host).ok_or_else(unknown)?;
            let target = balance::target_port(service, query.local, *port).ok_or_else(unknown)?;
            (target, Some(service))
        }
    };
    if OWN_PORTS.contains(&port) {
        return Err(Error::OwnPort(port));
    }
    let service = asked_service.or_else(|| {
        query
            .forwarded_host
            .and_then(|host| snapshot.service_of(query.local, host))
    });
    Ok(Delivery {
        app: AppAddr::new(SocketAddr::new(pod, port)),
        service: service.map(Arc::clone),
    })
}

/// Ports that would lead back into the node proxy.
// PROTOCOL.md#ports
pub(crate) const OWN_PORTS: [u16; 3] = [15001, 15006, 15008];
