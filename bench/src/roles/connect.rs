//! The rate of new connections: each is opened, carries one byte there and back, and is closed by the client. Takes
//! the server, the number of threads and a duration; gives counts and times.

use std::{
    io::{self, Read as _, Write as _},
    net::SocketAddr,
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use serde_json::json;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[arg(long)]
    to: SocketAddr,
    #[arg(long, default_value_t = 8)]
    threads: usize,
    #[arg(long)]
    seconds: f64,
}

pub(super) fn run(args: &Args) -> Result<()> {
    // The first one may have to wait for a tunnel.
    once(args.to)?;
    let began = Instant::now();
    let until = began + Duration::from_secs_f64(args.seconds);
    let (mut times, mut errors) = (Vec::new(), 0_u64);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..args.threads)
            .map(|_| scope.spawn(|| work(args.to, until)))
            .collect();
        for (worker_times, worker_errors) in
            workers.into_iter().filter_map(|worker| worker.join().ok())
        {
            times.extend(worker_times);
            errors += worker_errors;
        }
    });
    let took = began.elapsed().as_secs_f64();
    times.sort_unstable();
    super::say(&json!({
        "count": times.len(),
        "errors": errors,
        "seconds": took,
        "p50_us": super::quantile(&times, 500),
        "p99_us": super::quantile(&times, 990),
    }))
}

fn work(to: SocketAddr, until: Instant) -> (Vec<Duration>, u64) {
    let (mut times, mut errors) = (Vec::new(), 0);
    while Instant::now() < until {
        match once(to) {
            Ok(time) => times.push(time),
            Err(_) => errors += 1,
        }
    }
    (times, errors)
}

fn once(to: SocketAddr) -> io::Result<Duration> {
    let began = Instant::now();
    let mut stream = super::dial(to)?;
    stream.write_all(b"x")?;
    stream.read_exact(&mut [0])?;
    Ok(began.elapsed())
}
