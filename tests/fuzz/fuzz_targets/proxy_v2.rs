//! Any connection has a PROXY header that reads back as what it was, by the specification alone.
//! Two addresses of 19 bytes (family, address, port), then an identity.
#![no_main]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use libfuzzer_sys::fuzz_target;
use ztunnel_fuzz::model::{ClientAddr, SpiffeId};
use ztunnel_fuzz::wire::ProxyHeader;

fuzz_target!(|data: &[u8]| {
    let Some((source, rest)) = address(data) else {
        return;
    };
    let Some((destination, rest)) = address(rest) else {
        return;
    };
    let identity = std::str::from_utf8(rest).ok();
    let identity: Option<SpiffeId> = identity.and_then(|text| text.parse().ok());
    let source = ClientAddr::new(source);
    let header = ProxyHeader {
        source,
        destination,
        identity: identity.as_ref(),
    };
    let Ok(bytes) = header.encode() else {
        assert!(rest.len() > 65_000, "only what is too long does not fit");
        return;
    };
    let (told, told_identity) = read(&bytes).expect("well-formed");
    let same_family = source.addr().is_ipv4() == destination.is_ipv4();
    assert_eq!(told, same_family.then_some((source.addr(), destination)));
    assert_eq!(told_identity, identity.map(|id| id.to_string()));
});

fn address(data: &[u8]) -> Option<(SocketAddr, &[u8])> {
    let (bytes, rest) = data.split_at_checked(19)?;
    let (family, bytes) = bytes.split_first()?;
    let (ip, port) = bytes.split_at_checked(16)?;
    let port = u16::from_be_bytes(port.try_into().ok()?);
    let ip: IpAddr = if family % 2 == 0 {
        Ipv4Addr::from(<[u8; 4]>::try_from(ip.get(..4)?).ok()?).into()
    } else {
        Ipv6Addr::from(<[u8; 16]>::try_from(ip).ok()?).into()
    };
    Some((SocketAddr::new(ip, port), rest))
}

type Told = (Option<(SocketAddr, SocketAddr)>, Option<String>);

/// A reader of its own: proxy-protocol.txt 2.2.
fn read(bytes: &[u8]) -> Option<Told> {
    let rest = bytes.strip_prefix(b"\r\n\r\n\0\r\nQUIT\n\x21")?;
    let (family, rest) = rest.split_first()?;
    let (length, body) = rest.split_at_checked(2)?;
    let length = u16::from_be_bytes(length.try_into().ok()?);
    assert_eq!(body.len(), usize::from(length));
    let size = match family {
        0x01 => 0,
        0x11 => 4,
        0x21 => 16,
        _ => return None,
    };
    let (ips, rest) = body.split_at_checked(2 * size)?;
    let (ports, mut tlvs) = rest.split_at_checked(if size == 0 { 0 } else { 4 })?;
    let ip = |bytes: &[u8]| -> Option<IpAddr> {
        match size {
            4 => Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?).into()),
            _ => Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).into()),
        }
    };
    let port = |bytes: &[u8]| Some(u16::from_be_bytes(bytes.try_into().ok()?));
    let addresses = if size == 0 {
        None
    } else {
        let source = SocketAddr::new(ip(&ips[..size])?, port(&ports[..2])?);
        let destination = SocketAddr::new(ip(&ips[size..])?, port(&ports[2..])?);
        Some((source, destination))
    };
    let mut identity = None;
    while let Some((kind, rest)) = tlvs.split_first() {
        assert_eq!(*kind, 0xd0);
        let (length, rest) = rest.split_at_checked(2)?;
        let (value, rest) = rest.split_at_checked(usize::from(port(length)?))?;
        identity = Some(String::from_utf8(value.to_vec()).ok()?);
        tlvs = rest;
    }
    Some((addresses, identity))
}
