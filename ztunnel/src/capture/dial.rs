//! Sockets for our own connections from a pod: takes where they go, gives a socket inside the pod's
//! namespace that capture lets through. It never connects.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::OwnedFd,
    sync::Arc,
};

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

use super::{Netns, netns, route, sys};

/// Makes sockets in one pod. Cheap to clone; every worker has one.
#[derive(Clone, Debug)]
pub struct Dialer {
    pub(super) netns: Arc<Netns>,
    pub(super) ours: Arc<OwnedFd>,
    pub(super) addresses: Arc<[IpAddr]>,
}

impl Dialer {
    /// A socket for a connection to `destination`, nonblocking, in the pod's namespace, which leaves
    /// the pod directly.
    ///
    /// # Errors
    /// The namespace cannot be entered, or the kernel refuses a socket.
    pub fn upstream_socket(&self, destination: IpAddr) -> io::Result<Socket> {
        self.socket(destination.to_canonical())
    }

    /// A socket for a connection to the pod's application at `app`. The application sees `client` as
    /// its peer, unless that is unknown, of the other family, or an address of the pod itself.
    /// The client keeps its address but not its port: it may be using the same pair itself.
    ///
    /// # Errors
    /// The namespace cannot be entered, or the kernel refuses the socket or the address.
    pub fn app_socket(&self, client: Option<IpAddr>, app: IpAddr) -> io::Result<Socket> {
        let app = app.to_canonical();
        let socket = self.socket(app)?;
        let Some(client) = client.map(|client| client.to_canonical()) else {
            return Ok(socket);
        };
        let inside = client.is_loopback()
            || client.is_unspecified()
            || client == app
            || self.addresses.contains(&client);
        if inside || client.is_ipv4() != app.is_ipv4() {
            return Ok(socket);
        }
        if client.is_ipv4() {
            socket.set_ip_transparent_v4(true)?;
        } else {
            socket.set_ip_transparent_v6(true)?;
        }
        // The application's answers carry the mark of our SYN, and so come back to us over `lo`.
        socket.set_mark(route::REPLY_MARK)?;
        // Without it the kernel side sees the device of the address, and would capture us.
        socket.bind_device_by_index_v4(Some(netns::LOOPBACK))?;
        // connect(2) needs the port unique per destination only, bind(2) would need it free.
        setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
        socket.bind(&SocketAddr::new(client, 0).into())?;
        Ok(socket)
    }

    fn socket(&self, destination: IpAddr) -> io::Result<Socket> {
        let domain = Domain::for_address(SocketAddr::new(destination, 0));
        let socket = self
            .netns
            .run(|| Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP)))??;
        sys::socket_tag(&self.ours, &socket)?;
        Ok(socket)
    }
}
