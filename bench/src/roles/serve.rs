//! The server of our own load generators: one port echoes, on another a connection is greeted with one byte and then
//! never read. Takes the ports; threads that block do the work, so that nothing but the kernel is measured.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd as _,
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
    time::Duration,
};

use anyhow::Result;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::json;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[arg(long)]
    echo: u16,
    #[arg(long)]
    hold: u16,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let any = |port| SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
    let echo = Arc::new(super::listen(any(args.echo))?);
    let hold = super::listen(any(args.hold))?;
    for _ in 0..ECHO_THREADS {
        let echo = Arc::clone(&echo);
        thread::Builder::new()
            .stack_size(STACK_BYTES)
            .spawn(move || accept_and_echo(&echo))?;
    }
    super::say(&json!({ "ready": true }))?;
    hold_all(&hold)
}

/// Serves one connection at a time to its end: no thread is made for a connection, as that would be what a test of
/// new connections measures.
fn accept_and_echo(listener: &TcpListener) {
    let mut buffer = vec![0; BUFFER_BYTES];
    while let Ok((mut stream, _)) = listener.accept() {
        if stream.set_nodelay(true).is_err() {
            continue;
        }
        while let Ok(length @ 1..) = stream.read(&mut buffer) {
            let Some(bytes) = buffer.get(..length) else {
                break;
            };
            if stream.write_all(bytes).is_err() {
                break;
            }
        }
    }
}

/// Connections that are held until their client is gone, and the bell that says that there are some.
type Held = (Mutex<Vec<TcpStream>>, Condvar);

fn hold_all(listener: &TcpListener) -> Result<()> {
    let held = Arc::new(Held::default());
    let sweeper = Arc::clone(&held);
    thread::spawn(move || sweep(&sweeper));
    loop {
        let (mut stream, _) = listener.accept()?;
        if stream.write_all(b"!").is_ok() {
            let mut streams = held.0.lock().unwrap_or_else(PoisonError::into_inner);
            streams.push(stream);
            drop(streams);
            held.1.notify_one();
        }
    }
}

/// Closes what the other side has closed. Sleeps without a timer while nothing is held.
fn sweep((held, bell): &Held) {
    // The library has no name for it.
    let closed = PollFlags::from_bits_retain(libc::POLLRDHUP);
    loop {
        let streams = held.lock().unwrap_or_else(PoisonError::into_inner);
        let streams = bell
            .wait_while(streams, |streams| streams.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        drop(streams);
        thread::sleep(SWEEP);
        let mut streams = held.lock().unwrap_or_else(PoisonError::into_inner);
        let mut watched: Vec<PollFd<'_>> = streams
            .iter()
            .map(|stream| PollFd::new(stream.as_fd(), closed))
            .collect();
        if poll(&mut watched, PollTimeout::ZERO).is_err() {
            continue;
        }
        let ended: Vec<bool> = watched.iter().map(|fd| fd.any() != Some(false)).collect();
        let mut ended = ended.into_iter();
        streams.retain(|_| ended.next() == Some(false));
    }
}

/// More than any scenario has connections at a time on this port.
const ECHO_THREADS: usize = 320;
const STACK_BYTES: usize = 128 * 1024;
const BUFFER_BYTES: usize = 64 * 1024;
const SWEEP: Duration = Duration::from_millis(200);
