//! The programs of a benchmark that no distribution has: servers, load generators and a relay that is a bound. Each is
//! this binary started with another verb, takes everything by its arguments, and answers with one line of JSON.

mod connect;
mod idle;
mod limit;
mod pingpong;
mod serve;
mod unread;

use std::{
    io::{self, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result};
use clap::Subcommand;
use serde_json::Value;
use socket2::{Domain, Socket, Type};

/// One program.
#[derive(Debug, Subcommand)]
pub(crate) enum Role {
    /// Answers on the port for echoes, and takes connections on the one for those that nobody reads.
    Serve(serve::Args),
    /// New connections, each for one byte there and back.
    Connect(connect::Args),
    /// Messages there and back over a number of connections.
    Pingpong(pingpong::Args),
    /// Opens connections and holds them.
    Idle(idle::Args),
    /// Sends to somebody who never reads.
    Unread(unread::Args),
    /// The client's half of the bound.
    LimitClient(limit::ClientArgs),
    /// The server's half of the bound.
    LimitServer(limit::ServerArgs),
}

impl Role {
    /// Plays it; servers do not return.
    pub(crate) fn play(self) -> Result<()> {
        match self {
            Self::Serve(args) => serve::run(&args),
            Self::Connect(args) => connect::run(&args),
            Self::Pingpong(args) => pingpong::run(&args),
            Self::Idle(args) => idle::run(&args),
            Self::Unread(args) => unread::run(&args),
            Self::LimitClient(args) => limit::client(&args),
            Self::LimitServer(args) => limit::server(args),
        }
    }
}

/// A listener whose queue holds a burst.
fn listen(at: SocketAddr) -> Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(at), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket
        .bind(&at.into())
        .with_context(|| format!("bind {at}"))?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// A connection on which nothing waits for company, and nothing waits for ever.
fn dial(to: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(to)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// The answer of a program: one line.
fn say(answer: &Value) -> Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{answer}")?;
    Ok(out.flush()?)
}

/// Microseconds, for one line of JSON.
fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// The value below which this share of the sorted values lies.
fn quantile(sorted: &[Duration], per_mille: usize) -> f64 {
    let at = (sorted.len() * per_mille / 1000).min(sorted.len().saturating_sub(1));
    sorted.get(at).map_or(f64::NAN, |time| micros(*time))
}

const BACKLOG: i32 = 4096;
const PATIENCE: Duration = Duration::from_secs(20);
