//! What one connection does: each kind is a function that takes a path and gives nothing, or the first
//! thing that was not as it should be. Nothing is taken on trust: bytes, counts and endings are
//! compared.

use std::{
    io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _},
    net::{Shutdown, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use fastrand::Rng;

use super::paths::{
    BANNER, BULK, COUNT, ECHO, GREETING, HTTP, Path, READS, REDIS, RESET, SLOW, Site,
};
use crate::{
    apps::{self, End},
    bulk,
};

/// One kind of traffic.
#[derive(Debug)]
pub(super) struct Kind {
    pub(super) name: &'static str,
    /// Between two of them, on one path.
    pub(super) rest: Duration,
    /// The last argument is how long the run still lasts.
    pub(super) run: fn(&Path, &Site, &mut Rng, Duration) -> Result<()>,
}

const fn kind(
    name: &'static str,
    rest_ms: u64,
    run: fn(&Path, &Site, &mut Rng, Duration) -> Result<()>,
) -> Kind {
    Kind {
        name,
        rest: Duration::from_millis(rest_ms),
        run,
    }
}

/// Every kind.
pub(super) const KINDS: &[Kind] = &[
    kind("tiny", 20, tiny),
    kind("bulk", 150, transfer),
    kind("half-close", 60, half_close),
    kind("server first", 60, server_first),
    kind("reset by server", 80, reset_by_server),
    kind("reset by client", 80, reset_by_client),
    kind("slow reader", 100, slow_reader),
    kind("idle", 50, idle),
    kind("connect only", 60, connect_only),
    kind("http", 40, http),
    kind("redis", 50, redis),
];

/// A few bytes at a time, each answered before the next.
fn tiny(path: &Path, _: &Site, random: &mut Rng, _: Duration) -> Result<()> {
    let mut stream = apps::dial(&path.from, path.at(ECHO))?;
    for _ in 0..random.usize(1..20) {
        echoed(&mut stream, random)?;
    }
    ended(stream)
}

/// Both directions at once, with checksums; sizes from nothing to some mebibytes.
fn transfer(path: &Path, _: &Site, random: &mut Rng, _: Duration) -> Result<()> {
    let bits = random.u32(0..23);
    let bytes = random.u64(0..1 << bits);
    bulk::exchange(&path.from, path.at(BULK), bytes, random.u64(..)).map(drop)
}

fn half_close(path: &Path, _: &Site, random: &mut Rng, _: Duration) -> Result<()> {
    let bytes = random.usize(0..100_000);
    let reply = apps::ask(&path.from, path.at(COUNT), &vec![7; bytes])?;
    let expected = format!("received {bytes}");
    ensure!(reply.text() == expected, "the answer is {:?}", reply.text());
    Ok(())
}

fn server_first(path: &Path, _: &Site, random: &mut Rng, _: Duration) -> Result<()> {
    let (mut stream, greeting) = apps::listen_first(&path.from, path.at(BANNER), GREETING.len())?;
    ensure!(greeting == GREETING.as_bytes(), "another greeting");
    echoed(&mut stream, random)?;
    ended(stream)
}

fn reset_by_server(path: &Path, _: &Site, _: &mut Rng, _: Duration) -> Result<()> {
    let mut stream = apps::dial(&path.from, path.at(RESET))?;
    stream.write_all(b"x")?;
    let (end, bytes) = apps::read_end(&stream, PATIENCE)?;
    ensure!(
        (end, bytes.len()) == (End::Reset, 0),
        "{end:?} and {} bytes where the server has reset",
        bytes.len()
    );
    Ok(())
}

fn reset_by_client(path: &Path, site: &Site, random: &mut Rng, _: Duration) -> Result<()> {
    let mut stream = apps::dial(&path.from, path.at(READS))?;
    let number = random.u64(..);
    stream.write_all(&number.to_be_bytes())?;
    // A reset takes along what is on its way, so it waits for the answer.
    stream.read_exact(&mut [0])?;
    apps::abort(stream)?;
    let end = site.end_of(number, PATIENCE)?;
    ensure!(
        end == Some(ErrorKind::ConnectionReset),
        "{end:?} where the client has reset"
    );
    Ok(())
}

fn slow_reader(path: &Path, _: &Site, random: &mut Rng, _: Duration) -> Result<()> {
    let bytes = random.usize(0..1 << 20);
    let reply = apps::ask(&path.from, path.at(SLOW), &vec![7; bytes])?;
    let expected = format!("received {bytes}");
    ensure!(reply.text() == expected, "the answer is {:?}", reply.text());
    Ok(())
}

/// Silent for up to a minute, then alive.
fn idle(path: &Path, _: &Site, random: &mut Rng, left: Duration) -> Result<()> {
    let mut stream = apps::dial(&path.from, path.at(ECHO))?;
    echoed(&mut stream, random)?;
    let silence = Duration::from_millis(random.u64(500..60_000)).min(left);
    if !silence.is_zero() {
        let (end, bytes) = apps::read_end(&stream, silence)?;
        ensure!(
            (end, bytes.len()) == (End::Open, 0),
            "{end:?} and {} bytes in silence",
            bytes.len()
        );
    }
    stream.set_read_timeout(Some(PATIENCE))?;
    echoed(&mut stream, random).context("after silence")?;
    ended(stream)
}

fn connect_only(path: &Path, _: &Site, _: &mut Rng, _: Duration) -> Result<()> {
    apps::dial(&path.from, path.at(ECHO)).and_then(ended)
}

/// Requests on one connection, some of them sent before the answers of others have come.
fn http(path: &Path, _: &Site, random: &mut Rng, _: Duration) -> Result<()> {
    let stream = apps::dial(&path.from, path.at(HTTP))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    for _ in 0..random.usize(1..5) {
        let uris: Vec<_> = (0..random.usize(1..4))
            .map(|_| format!("/{:016x}", random.u64(..)))
            .collect();
        let ask = |uri: &String| format!("GET {uri} HTTP/1.1\r\nHost: traffic\r\n\r\n");
        let requests: String = uris.iter().map(ask).collect();
        (&stream).write_all(requests.as_bytes())?;
        for uri in uris {
            let (status, body) = response(&mut reader)?;
            ensure!(status == 200, "status {status}");
            ensure!(
                body == format!("{uri}\n").as_bytes(),
                "another body than {uri}"
            );
        }
    }
    Ok(())
}

/// Values of any bytes, set and read back on one connection.
fn redis(path: &Path, _: &Site, random: &mut Rng, _: Duration) -> Result<()> {
    let stream = apps::dial(&path.from, path.at(REDIS))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    for _ in 0..random.usize(1..5) {
        let key = format!("{}:{}", path.name, random.u8(..));
        let value: Vec<u8> = (0..random.usize(0..2000)).map(|_| random.u8(..)).collect();
        (&stream).write_all(&resp(&[b"SET", key.as_bytes(), &value]))?;
        ensure!(line(&mut reader)? == "+OK", "SET was not accepted");
        (&stream).write_all(&resp(&[b"GET", key.as_bytes()]))?;
        let header = line(&mut reader)?;
        ensure!(header == format!("${}", value.len()), "GET gave {header}");
        let mut back = vec![0; value.len() + 2];
        reader.read_exact(&mut back)?;
        ensure!(
            back.strip_suffix(b"\r\n") == Some(&value[..]),
            "another value"
        );
    }
    Ok(())
}

fn resp(words: &[&[u8]]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", words.len()).into_bytes();
    for word in words {
        bytes.extend(format!("${}\r\n", word.len()).into_bytes());
        bytes.extend(*word);
        bytes.extend(b"\r\n");
    }
    bytes
}

/// Status and body of an answer that says how long it is.
fn response(reader: &mut BufReader<TcpStream>) -> Result<(u16, Vec<u8>)> {
    let first = line(reader)?;
    let status = first.split(' ').nth(1).context("no status")?.parse()?;
    let mut length = 0;
    loop {
        let header = line(reader)?;
        if header.is_empty() {
            break;
        }
        if let Some((name, value)) = header.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse()?;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    Ok((status, body))
}

fn line(reader: &mut BufReader<TcpStream>) -> Result<String> {
    let mut line = String::new();
    let length = reader.read_line(&mut line)?;
    ensure!(length > 0, "the connection ended");
    Ok(line.trim_end().to_owned())
}

fn echoed(stream: &mut TcpStream, random: &mut Rng) -> Result<()> {
    let sent: Vec<u8> = (0..random.usize(1..64)).map(|_| random.u8(..)).collect();
    stream.write_all(&sent)?;
    let mut back = vec![0; sent.len()];
    stream.read_exact(&mut back)?;
    ensure!(back == sent, "other bytes came back");
    Ok(())
}

/// Ends our direction, and expects the server to end its own.
fn ended(mut stream: TcpStream) -> Result<()> {
    stream.shutdown(Shutdown::Write)?;
    let more = stream.read(&mut [0]).context("wait for the end")?;
    ensure!(more == 0, "bytes after the end");
    Ok(())
}

const PATIENCE: Duration = Duration::from_secs(60);
