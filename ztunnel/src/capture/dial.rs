//! Sockets for our own connections from a pod: takes where they go, gives a socket inside the pod's
//! namespace that capture lets through. It never connects.

use std::{
    cell::RefCell,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::OwnedFd,
    sync::Arc,
    time::Duration,
};

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::time::Instant;

use super::{Netns, netns, route, sys};

/// Makes sockets in one pod. Cheap to clone; every worker has one.
#[derive(Debug)]
pub struct Dialer {
    netns: Arc<Netns>,
    exempt: Exempt,
    /// The mark of our sockets that leave the pod.
    mark: Option<u32>,
    addresses: Arc<[IpAddr]>,
    v4: RefCell<Stock>,
    v6: RefCell<Stock>,
}

/// Sockets of one family that were made ahead, because going into the namespace and back costs half
/// as much as a socket: while a pod is busy, one visit makes several.
#[derive(Debug, Default)]
struct Stock {
    ready: Vec<Socket>,
    visited: Option<Instant>,
}

impl Clone for Dialer {
    /// The clone begins with an empty stock.
    fn clone(&self) -> Self {
        Self::new(
            Arc::clone(&self.netns),
            self.exempt.clone(),
            self.mark,
            Arc::clone(&self.addresses),
        )
    }
}

/// How capture knows our own sockets.
#[derive(Clone, Debug)]
pub(super) enum Exempt {
    /// Our programs by a tag on the socket, kept in this map.
    ByTag(Arc<OwnedFd>),
    /// Rules of others by the mark.
    ByMark,
}

impl Dialer {
    pub(super) fn new(
        netns: Arc<Netns>,
        exempt: Exempt,
        mark: Option<u32>,
        addresses: Arc<[IpAddr]>,
    ) -> Self {
        Self {
            netns,
            exempt,
            mark,
            addresses,
            v4: RefCell::default(),
            v6: RefCell::default(),
        }
    }

    /// A socket for a connection to `destination`, nonblocking, in the pod's namespace, which leaves
    /// the pod directly.
    ///
    /// # Errors
    /// The namespace cannot be entered, or the kernel refuses a socket.
    pub fn upstream_socket(&self, destination: IpAddr) -> io::Result<Socket> {
        let socket = self.socket(destination.to_canonical())?;
        self.mark(&socket)?;
        Ok(socket)
    }

    /// A socket for questions to a resolver at `destination`, nonblocking, in the pod's namespace,
    /// whose datagrams leave the pod directly.
    ///
    /// # Errors
    /// The namespace cannot be entered, or the kernel refuses the socket.
    pub fn question_socket(&self, destination: IpAddr) -> io::Result<Socket> {
        let domain = match destination.to_canonical() {
            IpAddr::V4(_) => Domain::IPV4,
            IpAddr::V6(_) => Domain::IPV6,
        };
        let make = || Socket::new(domain, Type::DGRAM.nonblocking(), Some(Protocol::UDP));
        let socket = self.netns.run(make)??;
        match &self.exempt {
            Exempt::ByTag(ours) => sys::socket_tag(ours, &socket)?,
            Exempt::ByMark => {}
        }
        self.mark(&socket)?;
        Ok(socket)
    }

    /// Whether an address is one of the pod's: what our programs bring is for one, but rules of others
    /// bring whatever reaches the pod, also what it only forwards. False where that cannot be said.
    #[must_use]
    pub fn has_address(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        if matches!(self.exempt, Exempt::ByTag(_)) || self.addresses.contains(&address) {
            return true;
        }
        // A pod may have devices of which the mesh knows nothing; the kernel binds what is local.
        let at = SocketAddr::new(address, 0);
        let bound = self.netns.run(|| {
            Socket::new(Domain::for_address(at), Type::DGRAM, Some(Protocol::UDP))?.bind(&at.into())
        });
        matches!(bound, Ok(Ok(())))
    }

    /// A socket for a connection to the pod's application at `app`. The application sees `client` as
    /// its peer, unless that is unknown, of the other family, an address of the pod itself, or one
    /// that the kernel does not let us use, or `app` is an address that the mesh does not know.
    /// The client keeps its address but not its port: it may be using the same pair itself.
    ///
    /// # Errors
    /// The namespace cannot be entered, or the kernel refuses the socket.
    pub fn app_socket(&self, client: Option<IpAddr>, app: IpAddr) -> io::Result<Socket> {
        let app = app.to_canonical();
        let socket = self.inner_socket(app)?;
        let Some(client) = client.map(|client| client.to_canonical()) else {
            return Ok(socket);
        };
        let inside = client.is_loopback()
            || client.is_unspecified()
            || client == app
            || self.addresses.contains(&client);
        if inside || client.is_ipv4() != app.is_ipv4() || self.is_untold(app) {
            return Ok(socket);
        }
        match self.stand_in(&socket, client) {
            Ok(()) => Ok(socket),
            Err(error) => {
                tracing::debug!(%client, %app, %error, "the application sees the pod, not its client");
                // What was set on the first one must not stay.
                self.inner_socket(app)
            }
        }
    }

    /// Whether our programs know nothing of an address of the pod: somebody else's, on `lo`, they would
    /// take for that of an outbound connection.
    // PROTOCOL.md#untold-address
    fn is_untold(&self, app: IpAddr) -> bool {
        matches!(self.exempt, Exempt::ByTag(_))
            && !app.is_loopback()
            && !self.addresses.contains(&app)
    }

    /// A socket for a connection to the pod's application, as the pod itself.
    fn inner_socket(&self, app: IpAddr) -> io::Result<Socket> {
        let socket = self.socket(app)?;
        match self.exempt {
            Exempt::ByMark => self.mark(&socket)?,
            Exempt::ByTag(_) => {}
        }
        Ok(socket)
    }

    /// Makes a socket connect from the client's address.
    fn stand_in(&self, socket: &Socket, client: IpAddr) -> io::Result<()> {
        if client.is_ipv4() {
            socket.set_ip_transparent_v4(true)?;
        } else {
            socket.set_ip_transparent_v6(true)?;
        }
        match self.exempt {
            Exempt::ByTag(_) => {
                // The application's answers carry the mark of our SYN, and so come back to us over
                // `lo`.
                socket.set_mark(route::REPLY_MARK)?;
                // Without it the kernel side sees the device of the address, and would capture us.
                socket.bind_device_by_index_v4(Some(netns::LOOPBACK))?;
            }
            // The rules remember our mark with the connection, and bring the answers back by it.
            Exempt::ByMark => {}
        }
        // connect(2) needs the port unique per destination only, bind(2) would need it free.
        setsockopt(socket, sockopt::IpBindAddressNoPort, &true)?;
        socket.bind(&SocketAddr::new(client, 0).into())
    }

    fn socket(&self, destination: IpAddr) -> io::Result<Socket> {
        let (domain, stock) = if destination.is_ipv4() {
            (Domain::IPV4, &self.v4)
        } else {
            (Domain::IPV6, &self.v6)
        };
        let mut stock = stock.borrow_mut();
        let socket = match stock.ready.pop() {
            Some(socket) => socket,
            None => self.netns.run(|| stock.visit(domain))??,
        };
        match &self.exempt {
            Exempt::ByTag(ours) => sys::socket_tag(ours, &socket)?,
            Exempt::ByMark => {}
        }
        Ok(socket)
    }

    // PROTOCOL.md#packet-mark
    fn mark(&self, socket: &Socket) -> io::Result<()> {
        self.mark.map_or(Ok(()), |mark| socket.set_mark(mark))
    }
}

impl Stock {
    /// Makes a socket for now and, if the last visit was a moment ago, some for later. To be called
    /// inside the namespace.
    fn visit(&mut self, domain: Domain) -> io::Result<Socket> {
        let make = || Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP));
        let socket = make()?;
        let now = Instant::now();
        let before = self.visited.replace(now);
        if before.is_some_and(|before| now.duration_since(before) < BUSY) {
            // Without descriptors for later there is still one for now.
            let more = std::iter::repeat_with(make).map_while(Result::ok);
            self.ready.extend(more.take(AHEAD));
        }
        Ok(socket)
    }
}

/// Sockets made ahead in one visit, at most; they wait in a pod that has been busy.
const AHEAD: usize = 7;

/// Two visits within this time make a pod busy.
const BUSY: Duration = Duration::from_millis(10);
