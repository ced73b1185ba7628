//! Asks the kernel who holds the other end of a connection. Takes its two addresses, says whether that
//! is a socket of the node's own network namespace; never lists sockets or touches one.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd as _;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};

// PROTOCOL.md#node-socket
/// Whether a process of the node itself, and not one behind a network, is connected from `from` to
/// `to`: exactly these four numbers. To be called in the node's namespace; it does not wait.
///
/// # Errors
/// The kernel does not answer such questions.
pub fn node_holds(from: SocketAddr, to: SocketAddr) -> io::Result<bool> {
    let kernel = socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        SockProtocol::NetlinkSockDiag,
    )?;
    send(kernel.as_raw_fd(), &question(from, to), MsgFlags::empty())?;
    // The answer is there when the question was taken.
    let mut answer = [0; ANSWER_BYTES];
    let length = recv(kernel.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    read(answer.get(..length).unwrap_or_default(), from, to)
}

/// One socket by its four numbers, as `struct inet_diag_req_v2` asks for it.
fn question(from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    let family = if from.is_ipv4() { AF_INET } else { AF_INET6 };
    let mut bytes = Vec::with_capacity(usize::from(QUESTION_BYTES));
    bytes.extend(u32::from(QUESTION_BYTES).to_ne_bytes());
    bytes.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes.extend(NLM_F_REQUEST.to_ne_bytes());
    // Sequence and sender: there is one question on this socket.
    bytes.extend([0; 8]);
    bytes.extend([family, IPPROTO_TCP, 0, 0]);
    bytes.extend(ANY_STATE.to_ne_bytes());
    bytes.extend(ports(from, to));
    bytes.extend(address(from.ip()));
    bytes.extend(address(to.ip()));
    // No device, and whichever socket it is.
    bytes.extend(0_u32.to_ne_bytes());
    bytes.extend([0xff; 8]);
    bytes
}

/// What the kernel found: a socket whose owner has the connection or has just closed it. Where no
/// connection has these numbers the kernel gives a listener, and for a minute what is left of the last
/// one that had them: neither is the other end of a connection that nobody here has ended.
fn read(answer: &[u8], from: SocketAddr, to: SocketAddr) -> io::Result<bool> {
    let kind = answer.get(4..6).and_then(|kind| kind.try_into().ok());
    match kind.map(u16::from_ne_bytes) {
        Some(SOCK_DIAG_BY_FAMILY) => {
            let (state, found) = (answer.get(STATE_AT), answer.get(PORTS_AT..PORTS_AT + 4));
            Ok(state.is_some_and(|state| OPEN.contains(state))
                && found == Some(ports(from, to).as_slice()))
        }
        Some(NLMSG_ERROR) => {
            let code = answer.get(16..20).and_then(|code| code.try_into().ok());
            let code = code.map_or(0, i32::from_ne_bytes).saturating_neg();
            if code == libc::ENOENT {
                return Ok(false);
            }
            Err(Errno::from_raw(code).into())
        }
        Some(_) | None => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn ports(from: SocketAddr, to: SocketAddr) -> [u8; 4] {
    let ([a, b], [c, d]) = (from.port().to_be_bytes(), to.port().to_be_bytes());
    [a, b, c, d]
}

fn address(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(ip) => {
            let [a, b, c, d] = ip.octets();
            [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
        }
        IpAddr::V6(ip) => ip.octets(),
    }
}

// From linux/netlink.h, linux/sock_diag.h and linux/inet_diag.h; stable ABI.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_TCP: u8 = 6;
const ANY_STATE: u32 = u32::MAX;
/// `TCP_ESTABLISHED`, `TCP_FIN_WAIT1` and `TCP_FIN_WAIT2`: those of a client to whom no end was said.
const OPEN: [u8; 3] = [1, 4, 5];
/// A header of 16 bytes, and `struct inet_diag_req_v2`.
const QUESTION_BYTES: u8 = 72;
/// The answer's beginning is enough; the rest is cut.
const ANSWER_BYTES: usize = 128;
/// In `struct inet_diag_msg` behind the header: the state, and the two ports.
const STATE_AT: usize = 17;
const PORTS_AT: usize = 20;

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::net::{Shutdown, TcpListener, TcpStream};

    use super::*;

    #[test]
    fn only_the_exact_connection_is_held_and_no_listener_stands_for_it() {
        for any in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(any).unwrap();
            let at = listener.local_addr().unwrap();
            let client = TcpStream::connect(at).unwrap();
            let from = client.local_addr().unwrap();
            assert!(node_holds(from, at).unwrap());
            let mut other = from;
            other.set_port(from.port().wrapping_add(1).max(1));
            assert!(!node_holds(other, at).unwrap(), "another port");
            other.set_port(from.port());
            let mut elsewhere = at;
            elsewhere.set_port(at.port().wrapping_add(1).max(1));
            assert!(!node_holds(from, elsewhere).unwrap(), "another destination");
            // A connection from the port at which somebody listens would find the listener.
            assert!(!node_holds(at, elsewhere).unwrap(), "a listener");
        }
    }

    #[test]
    fn a_connection_is_held_after_its_owner_has_closed_it_and_not_when_it_is_over() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let client = TcpStream::connect(at).unwrap();
        let from = client.local_addr().unwrap();
        let (mut server, _) = listener.accept().unwrap();
        drop(client);
        let heard = server.read(&mut [0]).unwrap();
        assert_eq!(heard, 0);
        assert!(node_holds(from, at).unwrap(), "a probe that only connects");
        // Its end is answered: what stays is a trace, and whoever uses the numbers now is another.
        server.shutdown(Shutdown::Write).unwrap();
        drop(server);
        // The kernel may deliver the end a moment later.
        let began = tokio::time::Instant::now();
        while node_holds(from, at).unwrap() {
            assert!(began.elapsed() < std::time::Duration::from_secs(60));
            std::thread::yield_now();
        }
    }

    #[test]
    fn ipv4_on_a_socket_of_both_families_is_found_by_ipv4() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let mapped = format!("[::ffff:127.0.0.1]:{}", at.port());
        let client = TcpStream::connect(mapped).unwrap();
        let port = client.local_addr().unwrap().port();
        assert!(node_holds(([127, 0, 0, 1], port).into(), at).unwrap());
    }

    #[test]
    fn an_answer_that_is_none_is_no_proof() {
        let (from, to) = ("10.0.0.1:1".parse().unwrap(), "10.0.0.2:2".parse().unwrap());
        let none = [
            &[][..],
            &[0; 16],
            &[0, 0, 0, 0, 20, 0],
            &[16, 0, 0, 0, 3, 0, 0, 0],
        ];
        for answer in none {
            let read = read(answer, from, to);
            assert!(!read.unwrap_or_default(), "{answer:?}");
        }
    }
}
