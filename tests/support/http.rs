//! One HTTP/1.1 GET, for the ports that a node serves to its operator. Takes a namespace, an address
//! and a path; gives status and body; reads at most a fixed amount.

use std::{
    io::{Read as _, Write as _},
    net::SocketAddr,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use crate::netns::Netns;

/// An answer, its body put together.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: String,
}

/// Asks for `path` on a connection of its own.
pub fn get(netns: &Netns, at: SocketAddr, path: &str) -> Result<Answer> {
    request(netns, at, "GET", path)
}

/// Sends a request without a body on a connection of its own.
pub fn request(netns: &Netns, at: SocketAddr, method: &str, path: &str) -> Result<Answer> {
    let what = || format!("{method} http://{at}{path}");
    let mut stream = netns.dial(at, PATIENCE).with_context(what)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: {at}\r\nConnection: close\r\n\r\n"
    )
    .with_context(what)?;
    let mut bytes = Vec::new();
    stream
        .take(ANSWER_BYTES)
        .read_to_end(&mut bytes)
        .with_context(what)?;
    parse(&bytes).with_context(what)
}

fn parse(bytes: &[u8]) -> Result<Answer> {
    let text = String::from_utf8_lossy(bytes);
    let (head, body) = text.split_once("\r\n\r\n").context("no end of the head")?;
    let mut lines = head.lines();
    let status = lines
        .next()
        .and_then(|line| line.split(' ').nth(1))
        .context("no status")?;
    let headers: Vec<_> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    let chunked = headers
        .iter()
        .any(|(n, v)| n == "transfer-encoding" && v == "chunked");
    let body = if chunked {
        join_chunks(body)?
    } else {
        body.to_owned()
    };
    Ok(Answer {
        status: status.parse()?,
        headers,
        body,
    })
}

fn join_chunks(mut rest: &str) -> Result<String> {
    let mut body = String::new();
    loop {
        let (size, after) = rest.split_once("\r\n").context("no chunk size")?;
        let size = usize::from_str_radix(size.trim(), 16).context("chunk size")?;
        if size == 0 {
            return Ok(body);
        }
        let Some((chunk, after)) = after.split_at_checked(size) else {
            bail!("chunk cut short");
        };
        body.push_str(chunk);
        rest = after.strip_prefix("\r\n").context("no end of chunk")?;
    }
}

const PATIENCE: Duration = Duration::from_secs(30);
const ANSWER_BYTES: u64 = 64 * 1024 * 1024;
