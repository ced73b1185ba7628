//! A bound, not a product: two relays that copy one connection each, sealing 16 KB records with AES-256-GCM between
//! them. No handshake, no identity, no policy, no HTTP/2: what remains is two copies through the kernel and the cipher.

use std::{
    io::{self, IoSlice, IoSliceMut, Read as _, Write as _},
    mem,
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream},
    thread,
};

use anyhow::{Result, anyhow};
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

#[derive(Debug, clap::Args)]
pub(crate) struct ClientArgs {
    /// Where the applications connect to; the port is that of the server.
    #[arg(long, required = true, value_delimiter = ',')]
    listen: Vec<SocketAddr>,
    /// The other relay.
    #[arg(long)]
    to: SocketAddr,
}

#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct ServerArgs {
    #[arg(long)]
    listen: SocketAddr,
}

pub(super) fn client(args: &ClientArgs) -> Result<()> {
    let to = args.to;
    thread::scope(|scope| {
        let listeners: Vec<_> = args
            .listen
            .iter()
            .map(|at| {
                scope.spawn(move || -> Result<()> {
                    let listener = super::listen(*at)?;
                    loop {
                        let (app, _) = listener.accept()?;
                        let port = at.port();
                        thread::spawn(move || {
                            let mut tunnel = super::dial(to)?;
                            tunnel.write_all(&port.to_be_bytes())?;
                            relay(app, tunnel, Side::Client)
                        });
                    }
                })
            })
            .collect();
        listeners.into_iter().try_for_each(|listener| {
            listener
                .join()
                .map_err(|_panic| anyhow!("a thread broke"))?
        })
    })
}

pub(super) fn server(args: ServerArgs) -> Result<()> {
    let listener = super::listen(args.listen)?;
    loop {
        let (mut tunnel, _) = listener.accept()?;
        thread::spawn(move || {
            let mut port = [0; 2];
            tunnel.read_exact(&mut port)?;
            let to = SocketAddr::from((Ipv4Addr::LOCALHOST, u16::from_be_bytes(port)));
            relay(super::dial(to)?, tunnel, Side::Server)
        });
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Client,
    Server,
}

fn relay(app: TcpStream, tunnel: TcpStream, side: Side) -> io::Result<()> {
    for stream in [&app, &tunnel] {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(None)?;
        stream.set_write_timeout(None)?;
    }
    let (app_too, tunnel_too) = (app.try_clone()?, tunnel.try_clone()?);
    let (out, back) = match side {
        Side::Client => (1, 2),
        Side::Server => (2, 1),
    };
    thread::spawn(move || {
        // An end, wanted or not, ends this direction.
        drop(seal_all(&app_too, &tunnel_too, Cipher::new(out)?));
        tunnel_too.shutdown(Shutdown::Write)
    });
    drop(open_all(&tunnel, &app, Cipher::new(back)?));
    app.shutdown(Shutdown::Write)
}

/// A key that anybody knows: this measures, it does not protect.
struct Cipher {
    key: LessSafeKey,
    direction: u8,
    records: u64,
}

impl Cipher {
    fn new(direction: u8) -> io::Result<Self> {
        let key = UnboundKey::new(&AES_256_GCM, &[direction; 32]).map_err(io::Error::other)?;
        Ok(Self {
            key: LessSafeKey::new(key),
            direction,
            records: 0,
        })
    }

    fn nonce(&mut self) -> Nonce {
        self.records += 1;
        let [a, b, c, d, e, f, g, h] = self.records.to_be_bytes();
        Nonce::assume_unique_for_key([self.direction, 0, 0, 0, a, b, c, d, e, f, g, h])
    }
}

/// Reads as much as four records hold, seals each where it lies, and sends them with one call.
fn seal_all(mut from: &TcpStream, mut to: &TcpStream, mut cipher: Cipher) -> io::Result<()> {
    let mut buffer = vec![0_u8; BURST * RECORD_BYTES];
    loop {
        let mut plain: Vec<IoSliceMut<'_>> = buffer
            .chunks_exact_mut(RECORD_BYTES)
            .filter_map(|record| record.get_mut(HEADER_BYTES..HEADER_BYTES + PLAIN_BYTES))
            .map(IoSliceMut::new)
            .collect();
        let mut left = from.read_vectored(&mut plain)?;
        if left == 0 {
            return Ok(());
        }
        let mut filled = 0;
        for record in buffer.chunks_exact_mut(RECORD_BYTES) {
            if left == 0 {
                break;
            }
            let length = left.min(PLAIN_BYTES);
            left -= length;
            let (header, rest) = record.split_at_mut(HEADER_BYTES);
            let (plain, rest) = rest.split_at_mut(length);
            let sealed = u32::try_from(length + TAG_BYTES).map_err(io::Error::other)?;
            header.copy_from_slice(&sealed.to_be_bytes());
            let nonce = cipher.nonce();
            let tag = cipher
                .key
                .seal_in_place_separate_tag(nonce, Aad::empty(), plain)
                .map_err(io::Error::other)?;
            if let Some(place) = rest.get_mut(..TAG_BYTES) {
                place.copy_from_slice(tag.as_ref());
            }
            filled += HEADER_BYTES + length + TAG_BYTES;
        }
        to.write_all(buffer.get(..filled).unwrap_or_default())?;
    }
}

/// Reads large, opens every whole record where it lies, and passes all of them on with one call.
fn open_all(mut from: &TcpStream, mut to: &TcpStream, mut cipher: Cipher) -> io::Result<()> {
    let mut buffer = vec![0_u8; 2 * BURST * RECORD_BYTES];
    let mut held = 0;
    loop {
        let length = from.read(buffer.get_mut(held..).unwrap_or_default())?;
        if length == 0 {
            return Ok(());
        }
        held += length;
        let mut rest = buffer.get_mut(..held).unwrap_or_default();
        let mut plain = Vec::new();
        let mut used = 0;
        while let Some((header, after)) =
            mem::take(&mut rest).split_first_chunk_mut::<HEADER_BYTES>()
        {
            let sealed = usize::try_from(u32::from_be_bytes(*header)).map_err(io::Error::other)?;
            if sealed > PLAIN_BYTES + TAG_BYTES {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let Some((record, following)) = after.split_at_mut_checked(sealed) else {
                break;
            };
            let nonce = cipher.nonce();
            let opened = cipher
                .key
                .open_in_place(nonce, Aad::empty(), record)
                .map_err(io::Error::other)?;
            plain.push(IoSlice::new(opened));
            used += HEADER_BYTES + sealed;
            rest = following;
        }
        let mut plain = plain.as_mut_slice();
        while !plain.is_empty() {
            let written = to.write_vectored(plain)?;
            IoSlice::advance_slices(&mut plain, written);
        }
        buffer.copy_within(used..held, 0);
        held -= used;
    }
}

const HEADER_BYTES: usize = 4;
const PLAIN_BYTES: usize = 16 * 1024;
const TAG_BYTES: usize = 16;
const RECORD_BYTES: usize = HEADER_BYTES + PLAIN_BYTES + TAG_BYTES;
/// 64 KB at a time: the best of what was tried in C.
const BURST: usize = 4;
