//! A bulk stream that nobody reads: sends until the path takes no more, says how much that was, and keeps the
//! connection until it is killed. Takes the server.

use std::{
    io::{Read as _, Write as _},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use serde_json::json;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[arg(long)]
    to: SocketAddr,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let mut stream = super::dial(args.to).with_context(|| format!("connect to {}", args.to))?;
    stream.read_exact(&mut [0])?;
    stream.set_write_timeout(None)?;
    let sent = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&sent);
    thread::spawn(move || {
        let block = vec![b'b'; BLOCK_BYTES];
        while let Ok(length) = stream.write(&block) {
            counter.fetch_add(u64::try_from(length).unwrap_or_default(), Ordering::Relaxed);
        }
    });
    let mut before = 0;
    loop {
        thread::sleep(STILL);
        let now = sent.load(Ordering::Relaxed);
        if now > 0 && now == before {
            break;
        }
        before = now;
    }
    super::say(&json!({ "stuck_after_bytes": before }))?;
    loop {
        thread::park();
    }
}

const BLOCK_BYTES: usize = 64 * 1024;
/// No byte for this long: every buffer on the way is full.
const STILL: Duration = Duration::from_millis(150);
