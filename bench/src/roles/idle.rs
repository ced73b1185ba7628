//! Many idle connections: opens them, waits for the server's greeting on each, says so, and holds them until it is
//! killed. Takes the server and how many.

use std::{io::Read as _, net::SocketAddr, thread};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[arg(long)]
    to: SocketAddr,
    #[arg(long)]
    connections: usize,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let mut held = Vec::new();
    thread::scope(|scope| -> Result<()> {
        let workers: Vec<_> = (0..THREADS)
            .map(|number| {
                scope.spawn(move || {
                    (number..args.connections)
                        .step_by(THREADS)
                        .map(|_| open(args.to))
                        .collect::<Result<Vec<_>>>()
                })
            })
            .collect();
        for worker in workers {
            held.extend(worker.join().ok().context("a thread broke")??);
        }
        Ok(())
    })?;
    ensure!(held.len() == args.connections, "{} opened", held.len());
    super::say(&json!({ "opened": held.len() }))?;
    loop {
        thread::park();
    }
}

/// Only the greeting proves that the connection reaches the server.
fn open(to: SocketAddr) -> Result<std::net::TcpStream> {
    let mut stream = super::dial(to)?;
    stream.read_exact(&mut [0])?;
    Ok(stream)
}

const THREADS: usize = 8;
